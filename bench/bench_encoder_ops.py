"""The encoder's operators on CPU in bf16, at the shapes of full-size pages, against what torch offers: linear layers with and
without their activation, attention inside windows and over the whole grid.

Answers are compared first.  `vs` is torch's median over ours; run on a quiet machine.

    OPTMEM_THREADS=1   threads a side; 2 unless told
"""

import os
import time
from functools import partial
from statistics import median

import pytest
import torch

from optmem import blockwise, ops, reference
from optmem.testing import assert_close, generator, global_attention_inputs, window_attention_inputs

CPU = torch.device("cpu")
THREADS = int(os.environ.get("OPTMEM_THREADS", "2"))
ROUNDS = 7
# rows, inputs, outputs, activation: stage one at 640 and 1024 px, CLIP at both
LAYERS = {
    "stage one 640 px, lin1": (1600, 768, 3072, "gelu"),
    "stage one 640 px, lin2": (1600, 3072, 768, "none"),
    "stage one 1024 px, qkv": (4096, 768, 2304, "none"),
    "CLIP 640 px, fc1": (101, 1024, 4096, "quick_gelu"),
    "CLIP 640 px, fc2": (101, 4096, 1024, "none"),
    "CLIP 1024 px, qkv": (257, 1024, 3072, "none"),
}
GRIDS = {"640 px": 40, "1024 px": 64}


@pytest.fixture(autouse=True)
def threads():
    before = torch.get_num_threads()
    torch.set_num_threads(THREADS)
    yield
    torch.set_num_threads(before)


def seconds(act):
    start = time.perf_counter()
    act()
    return time.perf_counter() - start


def compare(benchmark, ours, theirs, work):
    """In turn, so that both see the same machine."""
    taken = [(seconds(ours), seconds(theirs)) for _ in range(ROUNDS)]
    mine, other = (median(column) for column in zip(*taken, strict=True))
    benchmark.pedantic(ours, rounds=ROUNDS)
    benchmark.extra_info |= {"vs": round(other / mine, 2), "GFLOP/s": round(work / mine / 1e9)}
    print(f"\n{benchmark.name}: {work / mine / 1e9:.0f} GFLOP/s, torch {work / other / 1e9:.0f}, {other / mine:.2f}x")


@pytest.mark.benchmark(group="linear, bf16")
@pytest.mark.parametrize("layer", LAYERS)
def bench_linear(benchmark, layer):
    rows, width_in, width_out, activation = LAYERS[layer]
    rng = generator(layer)
    x, weight = torch.randn(rows, width_in, generator=rng), torch.randn(width_out, width_in, generator=rng) / width_in**0.5
    inputs = [tensor.bfloat16() for tensor in (x, weight, torch.randn(width_out, generator=rng))]
    exact = reference.linear(*(tensor.double() for tensor in inputs), activation)
    assert_close(ops.linear(*inputs, activation), reference.linear(*inputs, activation), exact=exact)
    work = 2 * rows * width_in * width_out
    compare(benchmark, lambda: ops.linear(*inputs, activation), lambda: reference.linear(*inputs, activation), work)


@pytest.mark.benchmark(group="attention over grids, bf16")
@pytest.mark.parametrize("page", GRIDS)
@pytest.mark.parametrize("is_global", [False, True], ids=["windows", "whole grid"])
def bench_attention(benchmark, page, is_global):
    """Against plain torch in blocks that stay in the cache, what serves other types and processors; the reference, which has all
    logits in memory, is several times slower."""
    side = GRIDS[page]
    qkv, bias, *tables = window_attention_inputs(1, (side, side), 14, 12, 64, torch.bfloat16, CPU)
    name = "global_attention" if is_global else "window_attention"
    inputs = global_attention_inputs(1, (side, side), 12, 64, torch.bfloat16, CPU) if is_global else (qkv, bias, *tables)
    ours, theirs = partial(getattr(ops, name), *inputs), partial(getattr(blockwise, name), *inputs)
    torch.testing.assert_close(ours(), theirs(), atol=0.05, rtol=0.05)
    keys = side**2 if is_global else 14**2
    compare(benchmark, ours, theirs, 4 * side**2 * keys * 64 * 12)
