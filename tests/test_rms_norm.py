"""rms_norm and add_rms_norm: every instruction set and the Triton kernel against the reference, and where they round.

The kernel runs on the GPU, or in the interpreter where there is none.
"""

from importlib import import_module

import pytest
import torch

from optmem import ops, reference
from optmem.errors import InputError
from optmem.kernels.launch import norm_tile
from optmem.ops import decoding
from optmem.testing import assert_close, assert_equal, available_isas, every_other, fenced, forced_isa, generator, guarded

DTYPES = [torch.float32, torch.bfloat16]
SHAPES = [(1, 1), (3, 31), (2, 64), (9, 100), (20, 1280)]
EPS = 1e-6


def inputs(tokens, width, dtype):
    rng = generator(f"rms_norm {tokens} {width}")
    x, residual = (torch.randn(tokens, width, generator=rng) for _ in range(2))
    x[::3] *= 1e-4  # where eps counts
    residual[::3] *= 1e-4
    return [fenced(t.to(dtype)) for t in (x, residual, 1 + 0.2 * torch.randn(width, generator=rng))]


@pytest.mark.parametrize("isa", available_isas())
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_matches_reference(isa, dtype, shape):
    x, residual, weight = inputs(*shape, dtype)
    with forced_isa(isa):
        normed = ops.rms_norm(x, weight, EPS)
        total, both = ops.add_rms_norm(x, residual, weight, EPS)
        assert_equal(both, ops.rms_norm(total, weight, EPS))
        assert_equal(normed[-1:], ops.rms_norm(x[-1:], weight, EPS))
    exact = reference.rms_norm(x.double(), weight.double(), EPS)
    assert_close(normed, reference.rms_norm(x, weight, EPS), exact=exact)
    assert_equal(total, x + residual)


# --- Triton ---------------------------------------------------------------------------------------------------------------------

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


def run_triton(x, residual, weight):
    """The launcher itself, outputs between guard bands: the norm of x alone, then the sum and its norm."""
    pytest.importorskip("triton")
    kernel = import_module("optmem.kernels.rms_norm")
    x, residual, weight = (fenced(tensor.to(DEVICE)) for tensor in (x, residual, weight))
    with guarded(x.shape, x.dtype, DEVICE) as normed:
        kernel.rms_norm(x, weight, EPS, normed)
    with guarded(x.shape, x.dtype, DEVICE) as total, guarded(x.shape, x.dtype, DEVICE) as both:
        kernel.add_rms_norm(x, residual, weight, EPS, total, both)
    return normed.cpu(), total.cpu(), both.cpu()


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float16], ids=str)
@pytest.mark.parametrize("shape", [*SHAPES, (5, 384), (3, 2049), (0, 7), (2, 0)], ids=str)
def test_triton_matches_reference(dtype, shape):
    x, residual, weight = inputs(*shape, dtype)
    normed, total, both = run_triton(x, residual, weight)
    assert_close(normed, reference.rms_norm(x, weight, EPS), exact=reference.rms_norm(x.double(), weight.double(), EPS))
    assert_equal(total, x + residual)
    assert_close(both, reference.rms_norm(total, weight, EPS), exact=reference.rms_norm(total.double(), weight.double(), EPS))


def test_triton_rounds_before_the_weight_and_knows_no_mates():
    x, residual, weight = inputs(9, 100, torch.bfloat16)
    normed, total, _ = run_triton(x, residual, weight)
    ones = torch.ones_like(weight)
    assert_equal(normed, run_triton(x, residual, ones)[0] * weight)
    for at in range(9):
        alone = slice(at, at + 1)
        assert_equal(run_triton(x[alone], residual[alone], weight)[0], normed[alone])
        assert_equal(run_triton(x[alone], residual[alone], weight)[1], total[alone])


def test_what_cuda_runs():
    """The function that is registered for it, which needs no CUDA where the interpreter runs: strided inputs, and fp64 in torch."""
    x, residual, weight = (tensor.to(DEVICE) for tensor in inputs(4, 96, torch.bfloat16))
    expected = run_triton(x, residual, weight)
    wide = [every_other(tensor) for tensor in (x, residual, weight)]
    assert_equal(decoding._rms_norm_cuda(wide[0], wide[2], EPS).cpu(), expected[0])
    for got, want in zip(decoding._add_rms_norm_cuda(*wide, EPS), expected[1:], strict=True):
        assert_equal(got.cpu(), want)
    exact = x.double(), weight.double(), EPS
    assert_equal(decoding._rms_norm_cuda(*exact), reference.rms_norm(*exact))


def test_the_chooser_keeps_its_promises():
    """A row is one block at every width there is; the models' own take few registers and whole warps."""
    for width in (1, 77, 384, 896, 1280, 2049, 6848, 16384, 100_000):
        tile = norm_tile(width)
        assert tile.BLOCK_D // 2 < width <= tile.BLOCK_D
        assert 4 <= tile.num_warps <= 32
        assert 16 * 32 * tile.num_warps >= tile.BLOCK_T * tile.BLOCK_D or width > 16384
    assert [norm_tile(width).BLOCK_T for width in (384, 896, 1280)] == [4, 2, 1]


def test_says_who_serves_it():
    pytest.importorskip("triton")
    rows = {(row.operator, row.device): row.name for row in ops.implementations()}
    assert rows["rms_norm", "cuda"] == rows["add_rms_norm", "cuda"] == "triton"


# --- the operator ---------------------------------------------------------------------------------------------------------------


def test_rounds_before_the_weight():
    """Divided by its root the row is not a bf16, and three times the rounded value is not the rounded three times."""
    x = torch.arange(1, 65).div(7).bfloat16()[None]
    weight = torch.full((64,), 3.0, dtype=torch.bfloat16)
    wide = x.float() * torch.rsqrt(x.float().square().mean() + EPS)
    assert_equal(ops.rms_norm(x, weight, EPS), wide.bfloat16() * weight)
    assert not torch.equal(wide.bfloat16() * weight, (wide * 3).bfloat16())


def test_empty_strided_and_other_types():
    x, residual, weight = inputs(4, 96, torch.bfloat16)
    assert ops.rms_norm(x[:0], weight, EPS).shape == (0, 96)
    wide = torch.stack([x, torch.full_like(x, torch.nan)], -1)[..., 0]
    assert_equal(ops.add_rms_norm(wide, residual, weight, EPS)[1], ops.add_rms_norm(x, residual, weight, EPS)[1])
    assert_equal(ops.rms_norm(x.half(), weight.half(), EPS), reference.rms_norm(x.half(), weight.half(), EPS))


@pytest.mark.parametrize(
    ("x", "weight", "words"),
    [
        (torch.ones(2, 3), torch.ones(4), r"weight must be \[3\], got \[4\]"),
        (torch.ones(3), torch.ones(3), "x must have 2 axes"),
        (torch.ones(2, 3), torch.ones(3).half(), "weight must be torch.float32"),
    ],
)
def test_refuses_wrong_arguments(x, weight, words):
    with pytest.raises(InputError, match=words):
        ops.rms_norm(x, weight, EPS)
    with pytest.raises(InputError, match=words):
        ops.add_rms_norm(x, x, weight, EPS)


def test_refuses_another_residual():
    with pytest.raises(InputError, match=r"residual must be \[2, 3\], got \[3, 3\]"):
        ops.add_rms_norm(torch.ones(2, 3), torch.ones(3, 3), torch.ones(3), EPS)


def test_opcheck():
    x, residual, weight = inputs(3, 8, torch.float32)
    torch.library.opcheck(torch.ops.optmem.rms_norm, (x, weight, EPS))
    torch.library.opcheck(torch.ops.optmem.add_rms_norm, (x, residual, weight, EPS))
