"""Keys and values as int8: both operators and their Triton kernels against the reference, the cache, and what a decoder says."""

from dataclasses import replace
from importlib import import_module

import pytest
import torch

from optmem import ops, reference
from optmem.engine.kv import make_cache, token_bytes
from optmem.errors import InputError
from optmem.model.cache import Cache
from optmem.model.config import DecoderConfig
from optmem.model.decoder import rope_table
from optmem.model.random import random_decoder
from optmem.testing import assert_close, assert_equal, generator

CUDA = torch.cuda.is_available()
DEVICE = "cuda" if CUDA else "cpu"
DTYPES = [torch.float32, torch.bfloat16]
SPANS = {"steps": [(1, 33, 20), (1, 16, 16), (1, 1, 1)], "mixed": [(18, 35, 35), (3, 20, 9), (0, 5, 5)]}


def written(tokens, heads, dim, dtype):
    """Queries, keys, values, cos, sin, slots, caches and scales of hostile contents; the second token goes nowhere, one is zero."""
    rng = generator(f"8bit {tokens} {heads} {dim}")
    q, k, v = (torch.randn(tokens, heads, dim, generator=rng).to(dtype) for _ in range(3))
    v[-1] = 0
    slots = torch.randperm(32, generator=rng)[:tokens]
    slots[1:2] = -1
    caches = [torch.full((2, 16, heads, dim), -128, dtype=torch.int8) for _ in range(2)]
    scales = [torch.full((2, 16, heads), torch.nan) for _ in range(2)]
    tables = rope_table(torch.arange(tokens) * 7, dim, 10000.0, dtype)
    return [tensor.to(DEVICE) for tensor in (q, k, v, *tables, slots, *caches, *scales)]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("tokens", "heads", "dim"), [(1, 1, 2), (3, 3, 10), (5, 2, 128)])
def test_the_kernel_writes_what_the_reference_writes(dtype, tokens, heads, dim):
    kernel = import_module("optmem.kernels.rope_cache")
    got, expected = written(tokens, heads, dim, dtype), written(tokens, heads, dim, dtype)
    kernel.rope_cache(*got)
    reference.rope_cache(*expected)
    assert_close(got[0], expected[0], exact=expected[0].double(), slack=4.0)
    for cache, scales in ((6, 8), (7, 9)):
        assert_equal(got[scales].isnan(), expected[scales].isnan())
        torch.testing.assert_close(got[scales], expected[scales], rtol=1e-6, atol=0, equal_nan=True)
        assert (got[cache].int() - expected[cache].int()).abs().max() <= 1  # a fused product may fall on the other side of a tie


def test_steps_are_the_nearest():
    numbers = torch.randn(3, 2, 9, generator=generator("steps"))
    numbers[0, 0], numbers[0, 1] = 0.0, 1e-44
    steps, scales = reference.quantize_heads(numbers)
    assert (steps[0, 0] == 0).all()
    assert ((steps.double() * scales.double()[..., None] - numbers).abs() <= 0.501 * scales.double()[..., None] + 1e-43).all()
    assert (steps.abs().amax(-1)[1:] == 127).all()


def asked(name, dtype, window, heads=2, dim=24):
    """Scattered pages; of what nobody sees the scales are NaN and the page's number is absurd."""
    rng = generator(f"8bit {name} {window}")
    spans = SPANS[name]
    starts = torch.tensor([0, *torch.tensor([count for count, _, _ in spans]).cumsum(0).tolist()])
    lengths, prompts = (torch.tensor([span[at] for span in spans]) for at in (1, 2))
    keys, values = (torch.randint(-127, 128, (12, 16, heads, dim), generator=rng, dtype=torch.int8) for _ in range(2))
    scales = [torch.rand(12, 16, heads, generator=rng) / 64 for _ in range(2)]
    table, free, used = torch.full((len(spans), 4), 1_000_000, dtype=torch.int32), torch.randperm(12, generator=rng).tolist(), []
    for b, (count, length, prompt) in enumerate(spans):
        seen = reference.allowed_keys(length - count, length, prompt, window, keys.device).any(0).nonzero().flatten()
        for entry in sorted({key // 16 for key in seen.tolist()}):
            table[b, entry] = free.pop()
            used += [int(table[b, entry]) * 16 + offset for offset in range(min(16, length - 16 * entry))]
    for each in scales:
        kept = each.flatten(0, 1)[used].clone()
        each.fill_(torch.nan).flatten(0, 1)[used] = kept
    q = torch.randn(int(starts[-1]), heads, dim, generator=rng).to(dtype)
    tensors = [tensor.to(DEVICE) for tensor in (q, keys, values, table, starts, lengths, prompts)]
    return tensors, window, dim**-0.5, [tensor.to(DEVICE) for tensor in scales]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("window", [0, 7])
@pytest.mark.parametrize("name", SPANS)
def test_the_kernels_read_what_the_reference_reads(name, window, dtype):
    tensors, window, scale, scales = asked(name, dtype, window)
    expected = reference.paged_attention(*tensors, window, scale, *scales)
    exact = reference.paged_attention(tensors[0].double(), *tensors[1:], window, scale, *(each.double() for each in scales))
    out = torch.full_like(tensors[0], torch.nan)
    import_module("optmem.kernels.paged_attention").paged_attention(*tensors, window, scale, out, *scales)
    assert_close(out, expected, exact=exact, slack=2.0 if dtype == torch.bfloat16 else 4.0)


def test_a_cache_of_int8_means_its_steps():
    """Attention over steps and scales is that over the numbers they stand for."""
    tensors, window, scale, scales = asked("mixed", torch.float32, 7)
    plain = [cache * each[..., None] for cache, each in zip(tensors[1:3], scales, strict=True)]
    expected = ops.paged_attention(tensors[0], *plain, *tensors[3:], window, scale)
    actual = ops.paged_attention(*tensors, window, scale, ops.CacheScales(*scales))
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda keys, values, scales: (keys.float(), values, scales), "keys must be torch.int8, got torch.float32"),
        (lambda keys, values, _: (keys, values, None), "keys must be torch.float32, got torch.int8"),
        (lambda keys, values, scales: (keys, values, (scales[0][:3], scales[1])), "key_scales must be"),
        (lambda keys, values, scales: (keys, values, (scales[0], scales[1].half())), "value_scales must be torch.float32"),
        (lambda keys, values, scales: (keys, values, (scales[0].mT.contiguous().mT, scales[1])), "key_scales must be contiguous"),
    ],
)
def test_refuses(change, words):
    (q, keys, values, *places), window, scale, scales = asked("steps", torch.float32, 7)
    keys, values, scales = change(keys, values, scales)
    with pytest.raises(InputError, match=f"paged_attention: {words}"):
        ops.paged_attention(q, keys, values, *places, window, scale, None if scales is None else ops.CacheScales(*scales))


SMALL = DecoderConfig(vocab_size=301, hidden=96, layers=2, heads=3, dense_width=200, experts=8, expert_width=40, top_k=2)


def said(decoder, kv, counts, config=SMALL):
    """Logits of 40 tokens, so many in each pass."""
    cache = Cache(config, 8, dtype=decoder.dtype, kv=kv)
    sequence = cache.new_sequence(prompt=9)
    parts = decoder.embed(torch.randint(0, 301, (40,), generator=generator("tokens"))).split(counts)
    return torch.cat([decoder.logits(decoder(part, cache.batch([sequence], [len(part)]), cache)) for part in parts])


@pytest.fixture
def decoder():
    return random_decoder(SMALL, 1)


@torch.no_grad()
def test_a_decoder_says_nearly_the_same(decoder):
    plain, eight = (said(decoder, kv, [40]).log_softmax(-1) for kv in ("auto", "8bit"))
    error = (plain - eight).abs().max()
    assert 0 < error < 0.05 * plain.std()
    in_parts = said(decoder, "8bit", [13, 1, 26]).log_softmax(-1)
    torch.testing.assert_close(in_parts, eight, rtol=1e-3, atol=1e-3)


@torch.no_grad()
def test_pages_are_copied_with_their_scales(decoder):
    cache = Cache(SMALL, 4, kv="8bit")
    first = cache.new_sequence(prompt=5)
    tokens = decoder.embed(torch.arange(6))
    decoder(tokens[:5], cache.batch([first], [5]), cache)
    fork = first.fork()
    alone = decoder(tokens[5:], cache.batch([first], [1]), cache)
    assert_equal(decoder(tokens[5:], cache.batch([fork], [1]), cache), alone)


def test_holds_about_half_of_bf16(decoder):
    config = replace(SMALL, hidden=1280, heads=10)
    assert token_bytes(config, torch.bfloat16, "8bit") == token_bytes(config, torch.bfloat16) * 132 // 256
    cache = make_cache(decoder, 1 << 20, "8bit")
    held = sum(tensor.nbytes for tensor in (cache.keys, cache.values, *cache.scales))
    assert held <= 1 << 20 < held + token_bytes(SMALL, torch.float32, "8bit") * 16


def test_refuses_another_kind():
    with pytest.raises(InputError, match="kv must be 'auto' or '8bit', got '4bit'"):
        Cache(SMALL, 4, kv="4bit")
