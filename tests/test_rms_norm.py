"""rms_norm and add_rms_norm: every instruction set against the reference, and where they round."""

import pytest
import torch

from optmem import ops, reference
from optmem.errors import InputError
from optmem.testing import assert_close, assert_equal, available_isas, fenced, forced_isa, generator

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
