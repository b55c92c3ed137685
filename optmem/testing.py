"""What tests and benches share: comparison, input makers, guard bands.  A bench never measures a shape no test knows."""

from __future__ import annotations

import zlib
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from optmem.native import native


def generator(name: str) -> torch.Generator:
    """Random numbers seeded by a name, so that a failing case can be run alone."""
    return torch.Generator().manual_seed(zlib.crc32(name.encode()))


def available_isas() -> list[str]:
    """The instruction sets of this machine that the C++ kernels have a copy for."""
    cpu = native("_cpu").require()
    best = ["plain", "avx2", "avx512"]
    return best[: best.index(cpu.isa()) + 1]


@contextmanager
def forced_isa(name: str) -> Iterator[None]:
    """The C++ kernels run with this instruction set inside the block."""
    cpu = native("_cpu").require()
    before = cpu.isa()
    cpu.force_isa(name)
    try:
        yield
    finally:
        cpu.force_isa(before)


def assert_equal(actual: Tensor, expected: Tensor) -> None:
    """Bit for bit: same shape, same type, same values."""
    assert actual.shape == expected.shape, f"shape {list(actual.shape)} is not {list(expected.shape)}"
    assert actual.dtype == expected.dtype, f"{actual.dtype} is not {expected.dtype}"
    if not torch.equal(actual, expected):
        wrong = (actual != expected).nonzero()
        first = tuple(wrong[0].tolist())
        raise AssertionError(
            f"{len(wrong)} of {expected.numel()} values differ; first at {first}: {actual[first]} is not {expected[first]}"
        )


def assert_close(actual: Tensor, expected: Tensor, *, exact: Tensor, slack: float = 2.0) -> None:
    """Our error against fp64 is at most ``slack`` times that of torch in the same dtype (``expected``), plus one rounding."""
    assert actual.shape == exact.shape, f"shape {list(actual.shape)} is not {list(exact.shape)}"
    assert actual.dtype == expected.dtype, f"{actual.dtype} is not {expected.dtype}"
    ours = (actual.double() - exact).abs().max().item() if exact.numel() else 0.0
    theirs = (expected.double() - exact).abs().max().item() if exact.numel() else 0.0
    scale = exact.abs().max().item() if exact.numel() else 0.0
    bound = slack * theirs + torch.finfo(actual.dtype).eps * scale
    assert ours <= bound, f"error {ours:.3g} against fp64 is above {bound:.3g} (torch's own is {theirs:.3g})"
