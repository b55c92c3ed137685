"""How memory is shared out: passes first, then keys and values, all from what is free, for any GPU and any model."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from optmem.engine.kv import FOR_PASSES, GPU_LIMITS, ON_GPU, gpu_cache_bytes, gpu_limits, make_cache, pass_bytes, token_bytes
from optmem.engine.scheduler import Limits
from optmem.errors import InputError
from optmem.model.config_json import public_config
from optmem.model.nano import MAX_ROW
from optmem.ops import PAGE_UNIT

from .test_scheduler import talkative

V1, NANO = public_config("deepseek-ocr"), public_config("nano")
GIB = 1 << 30


def test_an_h200_reads_a_thousand_pages_at_once():
    """139 GiB, of which 6.2 are weights: performance.md has room for 1,711 pages of 1,285 tokens, without what passes hold."""
    free = int(132.8 * GIB)
    limits = gpu_limits(free, V1, 2)
    assert limits == GPU_LIMITS[0]
    assert token_bytes(V1.decoder, torch.bfloat16) == 61_440
    pages = gpu_cache_bytes(free, V1, limits, torch.bfloat16) // (61_440 * 1285)
    assert 1024 < pages < 1711
    assert 5 * GIB < pass_bytes(V1, limits, 2) < 20 * GIB


@given(st.integers(0, 200 * GIB), st.sampled_from([V1, NANO]), st.sampled_from([torch.bfloat16, torch.float32]))
def test_passes_keys_and_values_are_no_more_than_what_is_free(free, config, dtype):
    limits = gpu_limits(free, config, dtype.itemsize)
    held = pass_bytes(config, limits, dtype.itemsize)
    assert limits in GPU_LIMITS
    assert held <= FOR_PASSES * free or limits == GPU_LIMITS[-1]
    try:
        room = gpu_cache_bytes(free, config, limits, dtype)
    except InputError:
        assert ON_GPU * (free - held) < PAGE_UNIT * token_bytes(config.decoder, dtype)
        return
    assert room >= PAGE_UNIT * token_bytes(config.decoder, dtype)
    assert room + held <= free
    assert room <= limits.texts * config.decoder.max_positions * token_bytes(config.decoder, dtype)


def test_more_memory_is_never_worse():
    for config in (V1, NANO):
        frees = [gib * GIB for gib in (10, 16, 24, 40, 80, 141, 192)]
        limits = [gpu_limits(free, config, 2) for free in frees]
        assert [each.texts for each in limits] == sorted(each.texts for each in limits)
        rooms = [gpu_cache_bytes(free, config, limits[0], torch.bfloat16) for free in frees]
        assert rooms == sorted(rooms)


def test_a_pass_takes_prompts_beside_its_texts():
    assert [limits.texts for limits in GPU_LIMITS] == sorted((limits.texts for limits in GPU_LIMITS), reverse=True)
    assert all(limits.tokens >= limits.texts + 285 for limits in GPU_LIMITS)
    wider = replace(V1, decoder=replace(V1.decoder, vocab_size=2 * V1.decoder.vocab_size))
    assert pass_bytes(wider, GPU_LIMITS[0], 2) > 1.5 * pass_bytes(V1, GPU_LIMITS[0], 2)


def test_a_gpu_that_is_full_is_said_to_be():
    with pytest.raises(InputError, match=r"passes of 1024 texts and 4096 tokens take .* bytes, and of the GPU 5 are free"):
        gpu_cache_bytes(5, V1, Limits(1024, 4096), torch.bfloat16)


def test_a_cache_has_the_pages_that_it_was_given_room_for():
    decoder = talkative()
    page = PAGE_UNIT * token_bytes(decoder.config, decoder.dtype)
    cache = make_cache(decoder, 5 * page + page // 2)
    assert cache.num_pages == 5
    assert cache.keys.nbytes + cache.values.nbytes == 5 * page
    assert make_cache(decoder).num_pages * PAGE_UNIT >= 128 * MAX_ROW
    for given_bytes in (0, page - 1, -page):
        with pytest.raises(InputError, match="cache_bytes must be at least"):
            make_cache(decoder, given_bytes)
