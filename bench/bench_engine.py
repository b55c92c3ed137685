"""The engine around the model.  On a CPU: what share of the time of reading is spent outside the model's operators.

    plain          token by token, up to 128 rows in a pass
    draft          what a glance proposes is verified: few passes, each of up to 1,024 tokens
    one row        a pass of one token, where the overhead weighs most

Steps of the engine's loop are timed while users' calls run (`Engine.decode`), and in them the model's operators: the decoder's
embedding (1 % of a step), its forward pass, its logits, and `pick_token`.  The bar is 5 % of a step of many rows.

On a GPU: the public model at its full size, as engine_on_gpu.py has it.  `python bench/bench_engine.py` prints steps, encoding,
pages per second and gaps, each beside its floor, and keeps figures and a chrome trace in bench/results/.  The bar is 50 pages/s.

    OPTMEM_PAGES=4     pages instead of 16, or instead of 4,096 on a GPU
"""

import json
import os
import sys
import threading
import time
from statistics import median

import pytest
import torch
from gpu_timing import RESULTS, measure_ceilings, provenance

from optmem import Engine, ops, paginate
from optmem.engine.lanes import lanes_for
from optmem.engine.loop import Loop

PAGES = int(os.environ.get("OPTMEM_PAGES", "16"))
ROUNDS = 3
WAYS = {"plain": {"draft": None}, "draft": {"draft": "glance"}, "one row": {"draft": None, "rows": [3]}}


class Clock:
    """Seconds of the loop's steps, and of the operators in them."""

    def __init__(self, model, monkeypatch):
        self.seconds = dict.fromkeys(("step", "embedding", "forward", "logits", "pick_token"), 0.0)
        self.passes, self.thread = 0, None
        decoder = model.decoder
        monkeypatch.setattr(decoder.model.embed_tokens, "forward", self.timed(decoder.model.embed_tokens.forward, "embedding"))
        for owner, name in ((Loop, "step"), (decoder, "forward"), (decoder, "logits"), (ops, "pick_token")):
            monkeypatch.setattr(owner, name, self.timed(getattr(owner, name), name))

    def timed(self, act, name):
        def wrapped(*arguments, **settings):
            if name == "step":
                self.thread = threading.get_ident()
            elif self.thread != threading.get_ident():  # a user's call, beside the steps
                return act(*arguments, **settings)
            start = time.perf_counter()
            result = act(*arguments, **settings)
            self.seconds[name] += time.perf_counter() - start
            self.passes += name == "forward"
            return result

        return wrapped

    def start(self):
        self.seconds, self.passes = dict.fromkeys(self.seconds, 0.0), 0

    @property
    def share(self):
        """Of the steps, outside the operators."""
        whole = self.seconds["step"]
        return (2 * whole - sum(self.seconds.values())) / whole


@pytest.fixture(scope="module")
def reading():
    engine = Engine.from_pretrained("nano", device="cpu")
    text = "".join(f"{at:05} the quick brown fox jumps over the lazy dog, {at * at} times\n" for at in range(40 * PAGES))
    pages = paginate(text)[:PAGES]
    return engine, engine.encode(pages), [page.text() for page in pages]


@pytest.mark.benchmark(group="the engine's own time")
@pytest.mark.parametrize("way", WAYS)
def bench_overhead(benchmark, monkeypatch, reading, way):
    engine, tokens, texts = reading
    tokens = tokens[:1] if way == "one row" else tokens
    clock = Clock(engine.model, monkeypatch)
    found = engine.decode(tokens, **WAYS[way])
    if way != "one row":
        right = sum(done.text == text for done, text in zip(found, texts, strict=True))
        assert right >= 0.9 * len(texts), "the answer is wrong"
    shares = []

    def read():
        clock.start()
        assert engine.decode(tokens, **WAYS[way]) == found
        shares.append(clock.share)

    benchmark.pedantic(read, rounds=ROUNDS)
    benchmark.extra_info |= {"outside the operators": round(median(shares), 4), "passes": clock.passes, "pages": len(tokens)}
    print(f"\n{way}: {median(shares):.1%} of the time outside the operators, {clock.passes} passes")


def main():
    """All of it on a GPU; exit status 2 without one."""
    if not torch.cuda.is_available():
        print("bench_engine: no GPU here; `pytest bench/bench_engine.py --benchmark-enable` measures the CPU", file=sys.stderr)
        return 2
    from engine_on_gpu import Setup, described, full_size, measure
    from floors import Device

    device = torch.device("cuda")
    with torch.inference_mode():
        ceilings = measure_ceilings(device)
        measured = Device(ceilings.bytes_per_s, ceilings.flops_per_s[torch.bfloat16])
        setup = Setup(pages=int(os.environ.get("OPTMEM_PAGES", "4096")), device=measured)
        facts = provenance(ceilings) | {"part": "engine"}
        name = facts["device"].replace(" ", "-").lower()
        RESULTS.mkdir(exist_ok=True)
        with full_size(device) as engine:
            found, idle = measure(engine, lanes_for(device), setup, RESULTS / f"engine-timeline-{name}.json.gz")
    facts |= found
    (RESULTS / f"engine-{name}.json").write_text(json.dumps(facts, indent=1) + "\n")
    print(described(facts, idle))
    print(json.dumps(facts))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
