"""What the processor can do."""

import gc
import mmap
import re
import time
from pathlib import Path

import pytest
import torch

from optmem.engine import Engine
from optmem.machine import cpu_multiplies_bf16, empty_weight, fast_dtype
from optmem.testing import assert_equal

SIDE = 512


def seconds_of_products(dtype: torch.dtype) -> float:
    matrix = torch.ones(SIDE, SIDE, dtype=dtype)
    taken = []
    for _ in range(4):
        start = time.perf_counter()
        matrix @ matrix
        taken.append(time.perf_counter() - start)
    return min(taken)


def test_the_fast_type_is_not_the_slow_one():
    """Where bf16 is done in software it is fifty times slower than fp32, so a factor of four says which it is."""
    other = torch.float32 if fast_dtype(torch.device("cpu")) == torch.bfloat16 else torch.bfloat16
    assert seconds_of_products(fast_dtype(torch.device("cpu"))) < 4 * seconds_of_products(other)


def test_a_gpu_has_bf16():
    assert fast_dtype(torch.device("cuda")) == torch.bfloat16


@pytest.mark.parametrize(("capabilities", "has"), [({"avx512_bf16": True}, True), ({"avx512_f": True}, False), ({}, False)])
def test_instructions_decide(capabilities, has, monkeypatch):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: capabilities)
    assert cpu_multiplies_bf16.__wrapped__() is has


def test_what_is_stored_in_a_slow_type_is_held_as_fp32():
    engine = Engine.from_pretrained("nano", device="cpu")
    assert engine.model.decoder.dtype == fast_dtype(torch.device("cpu"))
    assert Engine.from_pretrained("nano", device="cpu", dtype="bfloat16").model.decoder.dtype == torch.bfloat16


def huge_kilobytes(tensor: torch.Tensor) -> int:
    """What of the mapping that holds a tensor lies in huge pages."""
    start = tensor.data_ptr()
    is_inside = False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if re.match(r"[0-9a-f]+-[0-9a-f]+ ", line):
            first, last = (int(part, 16) for part in line.split()[0].split("-"))
            is_inside = first <= start < last
        elif is_inside and line.startswith("AnonHugePages:"):
            return int(line.split()[1])
    raise AssertionError("a tensor lies in no mapping")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.int8])
@pytest.mark.parametrize("rows", [0, 1, 1000, 4097])
def test_room_for_weights_is_room_like_any_other(dtype, rows):
    weight = empty_weight((rows, 1031), dtype)
    assert (weight.shape, weight.dtype, weight.is_contiguous()) == ((rows, 1031), dtype, True)
    values = torch.arange(rows * 1031).remainder(101).view(rows, 1031).to(dtype)
    weight.copy_(values)
    kept = weight[rows // 2 :]
    del weight
    gc.collect()
    assert_equal(kept, values[rows // 2 :])


def test_large_weights_lie_in_huge_pages():
    setting = Path("/sys/kernel/mm/transparent_hugepage/enabled")
    if not setting.exists() or "[never]" in setting.read_text():
        pytest.skip("this kernel has no huge pages to give")
    weight = empty_weight((8, 1 << 20), torch.bfloat16).fill_(1)
    assert huge_kilobytes(weight) > 0


def test_what_a_weight_took_is_given_back():
    def resident() -> int:
        return int(Path("/proc/self/statm").read_text().split()[1]) * mmap.PAGESIZE

    before = resident()
    for _ in range(8):
        empty_weight((1 << 25,), torch.bfloat16).fill_(1)
    assert resident() - before < 1 << 26
