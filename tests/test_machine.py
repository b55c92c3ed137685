"""What the processor can do."""

import time

import pytest
import torch

from optmem.engine import Engine
from optmem.machine import cpu_multiplies_bf16, fast_dtype

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
