"""Two full-width layers of experts and the head against transformers, bf16: steps of 1, 4 and 8 tokens behind 285, and a prefill.

Other programs on the machine slow both sides, threads that wait for each other most of all: compare the minima, or set
OMP_NUM_THREADS=1, where CPU seconds are wall seconds.
"""

from dataclasses import replace
from functools import cache

import pytest
import torch

from optmem.model.cache import Cache
from optmem.model.config import DecoderConfig
from optmem.model.random import random_decoder

CONFIG = replace(DecoderConfig(), layers=2, dense_layers=0)
PROMPT = 285  # a page of 1024 px and its prompt
SIDES = ("optmem", "transformers")


@cache
def decoder():
    return random_decoder(CONFIG, 1, torch.bfloat16)


@cache
def oracle():
    pytest.importorskip("transformers")
    from transformers.models.unlimited_ocr.configuration_unlimited_ocr import UnlimitedOcrTextConfig
    from transformers.models.unlimited_ocr.modeling_unlimited_ocr import UnlimitedOcrTextModel

    config = UnlimitedOcrTextConfig(num_hidden_layers=CONFIG.layers, first_k_dense_replace=0)
    with torch.device("meta"):
        model = UnlimitedOcrTextModel(config).eval()
    packed = (".experts.gate_up", ".experts.down")
    state = {f"{name}_proj" if name.endswith(packed) else name: value for name, value in decoder().model.state_dict().items()}
    model.load_state_dict(state, assign=True)
    model.rotary_emb = type(model.rotary_emb)(config)
    return model


def embeddings(tokens):
    return torch.randn(tokens, CONFIG.hidden, generator=torch.Generator().manual_seed(tokens)).bfloat16()


def our_pass(prompts, count):
    """A function that runs the last ``count`` tokens of every prompt [T, hidden] again and again."""
    pages = Cache(CONFIG, 24 * len(prompts), dtype=torch.bfloat16)
    sequences = [pages.new_sequence(prompt=len(prompts[0])) for _ in prompts]
    start = len(prompts[0]) - count
    if start:
        decoder()(torch.cat([prompt[:start] for prompt in prompts]), pages.batch(sequences, [start] * len(prompts)), pages)
    news = torch.cat([prompt[start:] for prompt in prompts])

    def run():
        for sequence in sequences:
            sequence.truncate(start)
        return decoder()(news, pages.batch(sequences, [count] * len(prompts)), pages)

    return run


def their_pass(prompts, count):
    stacked = torch.stack(list(prompts))
    start = stacked.shape[1] - count

    @torch.no_grad()
    def prefill():
        return oracle()(inputs_embeds=stacked[:, :start], use_cache=True).past_key_values if start else None

    past = prefill()

    @torch.no_grad()
    def run():
        states = oracle()(inputs_embeds=stacked[:, start:], past_key_values=past, use_cache=True).last_hidden_state
        if past is not None:
            past.crop(-count)
        return states.flatten(0, 1)

    return run


@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("batch", [1, 4, 8])
def bench_step(benchmark, side, batch):
    benchmark.group = f"2 layers of experts, a step of {batch}"
    prompts = embeddings(batch * (PROMPT + 1)).view(batch, PROMPT + 1, -1)
    run = {"optmem": our_pass, "transformers": their_pass}[side](prompts, 1)
    assert run().shape == (batch, CONFIG.hidden)
    benchmark.pedantic(run, rounds=20, warmup_rounds=2)


@pytest.mark.parametrize("side", SIDES)
def bench_prefill(benchmark, side):
    benchmark.group = f"2 layers of experts, a prefill of {PROMPT}"
    run = {"optmem": our_pass, "transformers": their_pass}[side](embeddings(PROMPT)[None], PROMPT)
    expected = their_pass(embeddings(PROMPT)[None], PROMPT)()
    assert (run() - expected).float().square().mean().sqrt() < 0.05, "the answer is wrong"
    benchmark.pedantic(run, rounds=5, warmup_rounds=1)


@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("batch", [1, 4, 8])
def bench_head(benchmark, side, batch):
    benchmark.group = f"lm_head of {batch}"
    x, weight = embeddings(batch), decoder().lm_head.weight
    benchmark.extra_info.update(bytes=weight.numel() * 2)
    run = {"optmem": lambda: decoder().logits(x), "transformers": lambda: torch.nn.functional.linear(x, weight).float()}[side]
    assert run().shape == (batch, CONFIG.vocab_size)
    benchmark.pedantic(run, rounds=10, warmup_rounds=1)
