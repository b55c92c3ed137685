"""Our model against transformers' Unlimited-OCR: the same random full-size weights, bf16, two threads, one process;
and our decoder with int8 weights against their bf16.

    python bench/bench_against_transformers.py [--scale 1.0] [--rounds 5] [--anyway]

Both models share the weights' memory.  Answers are compared before any clock starts; the two sides take turns; the ratio is of the
medians.  A case during which other processes used more than a tenth of a core is not reported, unless --anyway is given.
"""

import argparse
import functools
import json
import os
import resource
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch

from optmem.model.cache import Cache
from optmem.model.decoder import Decoder
from optmem.model.model import Model
from optmem.model.quantize import quantize
from optmem.testing import generator
from optmem.testing.oracle import as_floats, build_oracle

THREADS = 2
PREFILL = 285  # a Base page and its prompt
INT8_TOLERANCE = 0.2  # of random weights: rounding moves the router's choices too, and with them whole experts
QUIET = 0.1  # cores that other processes may use


def check(name: str, ours: torch.Tensor, theirs: torch.Tensor, tolerance: float) -> None:
    error = ((ours.float() - theirs.float()).norm() / theirs.float().norm()).item()
    assert error < tolerance, f"{name}: relative error {error:.3g}, tolerance {tolerance}"


class Case:
    """Two ways to the same answer, compared once and then timed in turn."""

    def __init__(self, name: str, ours: Callable[[], torch.Tensor], theirs: Callable[[], torch.Tensor], tolerance: float) -> None:
        self.name, self.ours, self.theirs = name, ours, theirs
        check(name, ours(), theirs(), tolerance)

    def measure(self, rounds: int) -> dict[str, object]:
        times: tuple[list[float], list[float]] = ([], [])
        for _ in range(rounds):
            for clock, run in zip(times, (self.ours, self.theirs), strict=True):
                start = time.perf_counter()
                run()
                clock.append(time.perf_counter() - start)
        ours, theirs = map(statistics.median, times)
        return {
            "case": self.name,
            "ours_ms": round(1e3 * ours, 2),
            "theirs_ms": round(1e3 * theirs, 2),
            "ratio": round(theirs / ours, 2),
        }


def encode_case(model: Model, whole, side: int) -> Case:
    pixels = torch.randint(0, 256, (1, side, side, 3), generator=generator(f"encode {side}"), dtype=torch.uint8)
    floats = as_floats(pixels, model.decoder.dtype)
    vision = whole.model

    def theirs() -> torch.Tensor:
        return vision.multi_modal_projector(vision.vision_tower(floats).last_hidden_state)

    return Case(f"encode {side} px", lambda: model.encoder(pixels), theirs, 0.02)


def prefill_case(model: Model, whole, length: int) -> Case:
    embeddings = model.decoder.embed(torch.randint(0, 1000, (length,), generator=generator("prefill")))
    cache = Cache.for_tokens(model.config.decoder, length, model.decoder.dtype)  # an engine keeps its own

    def ours() -> torch.Tensor:
        sequence = cache.new_sequence(prompt=length)
        hidden = model.decoder(embeddings, cache.batch([sequence], [length]), cache)
        sequence.close()
        return model.decoder.logits(hidden[-1:])

    def theirs() -> torch.Tensor:
        return whole(inputs_embeds=embeddings[None], logits_to_keep=1, use_cache=True).logits[0]

    return Case(f"prefill {length} tokens", ours, theirs, 0.1)


def decode_inputs(batch: int, steps: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Prompts [batch, PREFILL] and the tokens [steps, batch] that follow them."""
    rng = generator(f"decode {batch}")
    return torch.randint(0, 1000, (batch, PREFILL), generator=rng), torch.randint(0, 1000, (steps, batch), generator=rng)


def our_steps(decoder: Decoder, batch: int, steps: int) -> Callable[[], torch.Tensor]:
    """Steps of one token for every sequence of the batch, whose prompts are read here."""
    prompts, tokens = decode_inputs(batch, steps)
    cache = Cache.for_tokens(decoder.config, batch * (PREFILL + 4096), decoder.dtype)
    sequences = [cache.new_sequence(prompt=PREFILL) for _ in range(batch)]
    decoder(decoder.embed(prompts.flatten()), cache.batch(sequences, [PREFILL] * batch), cache)

    def ours() -> torch.Tensor:
        for step in tokens:
            logits = decoder.logits(decoder(decoder.embed(step), cache.batch(sequences, [1] * batch), cache))
        return logits

    return ours


def their_steps(whole, batch: int, steps: int) -> Callable[[], torch.Tensor]:
    prompts, tokens = decode_inputs(batch, steps)
    state = {"theirs": whole(input_ids=prompts, logits_to_keep=1, use_cache=True).past_key_values}

    def theirs() -> torch.Tensor:
        for step in tokens:
            output = whole(input_ids=step[:, None], past_key_values=state["theirs"], use_cache=True)
            state["theirs"] = output.past_key_values
        return output.logits[:, -1]

    return theirs


def decode_case(model: Model, whole, batch: int, steps: int) -> Case:
    return Case(
        f"decode batch {batch}, {steps} steps", our_steps(model.decoder, batch, steps), their_steps(whole, batch, steps), 0.2
    )


def int8_case(model: Model, whole, batch: int, steps: int) -> Case:
    """Our int8 weights against their bf16; the answer is compared with our own bf16 first."""
    name = f"decode int8 batch {batch}, {steps} steps"
    narrow = our_steps(quantized(model.decoder), batch, steps)
    check(f"{name}, against our bf16", narrow(), our_steps(model.decoder, batch, steps)(), INT8_TOLERANCE)
    return Case(name, our_steps(quantized(model.decoder), batch, steps), their_steps(whole, batch, steps), 0.2 + INT8_TOLERANCE)


@functools.cache
def quantized(decoder: Decoder) -> Decoder:
    """A second decoder of int8 weights; what is not quantised is shared.  At full size 3 GB beside the 6 of bf16."""
    with torch.device("meta"):
        narrow = Decoder(decoder.config)
    narrow.load_state_dict(decoder.state_dict(), assign=True)
    quantize(narrow.requires_grad_(requires_grad=False))
    return narrow


def cpu_seconds() -> tuple[float, float]:
    """Busy seconds of the whole machine, and of this process."""
    fields = [int(field) for field in Path("/proc/stat").read_text().splitlines()[0].split()[1:]]
    busy = sum(fields[:3] + fields[5:8]) / os.sysconf("SC_CLK_TCK")
    own = resource.getrusage(resource.RUSAGE_SELF)
    return busy, own.ru_utime + own.ru_stime


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--scale", type=float, default=1.0, help="share of the full size, for a quick look")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--anyway", action="store_true", help="report although the machine was busy")
    options = parser.parse_args()
    torch.set_num_threads(THREADS)
    # Made outside of inference mode, as users load models: tables resized for a view are kept then.
    model = Model.random("unlimited-ocr", scale=options.scale, dtype=torch.bfloat16)
    whole = build_oracle(model)
    with torch.inference_mode():
        compare(model, whole, options)


def compare(model: Model, whole, options: argparse.Namespace) -> None:
    makers = [
        *(lambda side=side: encode_case(model, whole, side) for side in (640, 1024)),
        lambda: prefill_case(model, whole, PREFILL),
        *(lambda batch=batch: decode_case(model, whole, batch, 8) for batch in (1, 4, 8)),
        *(lambda batch=batch: int8_case(model, whole, batch, 8) for batch in (1, 8)),
    ]
    rows = [measured for make in makers if (measured := report(make, options)) is not None]
    print(f"{'case':28} {'ours':>10} {'transformers':>13} {'ratio':>6}")
    for row in rows:
        print(f"{row['case']:28} {row['ours_ms']:8.1f}ms {row['theirs_ms']:11.1f}ms {row['ratio']:5.2f}x")
    print(f"torch {torch.__version__}, {THREADS} threads, scale {options.scale}")


def report(make: Callable[[], Case], options: argparse.Namespace) -> dict[str, object] | None:
    """A case's figures, or None where the machine was not quiet."""
    case = make()
    start, (busy, own) = time.perf_counter(), cpu_seconds()
    row = case.measure(options.rounds)
    seconds, (busy_now, own_now) = time.perf_counter() - start, cpu_seconds()
    row["others"] = round(((busy_now - busy) - (own_now - own)) / seconds, 2)
    if row["others"] > QUIET and not options.anyway:
        print(f"{case.name}: not reported, other processes used {row['others']} cores; run on a quiet machine", flush=True)
        return None
    print(json.dumps(row), flush=True)
    return row


if __name__ == "__main__":
    main()
