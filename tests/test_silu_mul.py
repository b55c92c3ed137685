"""silu_mul: every instruction set against the reference; a value's place does not matter."""

import pytest
import torch

from optmem import ops, reference
from optmem.errors import InputError
from optmem.testing import assert_close, assert_equal, available_isas, fenced, forced_isa, generator

DTYPES = [torch.float32, torch.bfloat16]


def inputs(tokens, width, dtype):
    rng = generator(f"silu_mul {tokens} {width}")
    return [fenced((4 * torch.randn(tokens, width, generator=rng)).to(dtype)) for _ in range(2)]


@pytest.mark.parametrize("isa", available_isas())
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(1, 1), (3, 37), (7, 6848), (0, 5)], ids=str)
def test_matches_reference(isa, dtype, shape):
    gate, up = inputs(*shape, dtype)
    with forced_isa(isa):
        actual = ops.silu_mul(gate, up)
    assert_close(actual, reference.silu_mul(gate, up), exact=reference.silu_mul(gate.double(), up.double()))


@pytest.mark.parametrize("isa", available_isas())
def test_a_value_s_place_does_not_matter(isa):
    gate, up = inputs(3, 37, torch.float32)
    with forced_isa(isa):
        alone = [ops.silu_mul(g, u) for g, u in zip(gate.view(-1, 1).split(1), up.view(-1, 1).split(1), strict=True)]
        assert_equal(ops.silu_mul(gate, up).view(-1, 1), torch.cat(alone))


def test_refuses_wrong_arguments_strided_and_opcheck():
    gate, up = inputs(2, 3, torch.float32)
    with pytest.raises(InputError, match=r"up must be \[2, 3\], got \[2, 2\]"):
        ops.silu_mul(gate, up[:, :2])
    assert_equal(ops.silu_mul(gate.T, up.T), ops.silu_mul(gate, up).T.contiguous())
    assert_equal(ops.silu_mul(gate.half(), up.half()), reference.silu_mul(gate.half(), up.half()))
    torch.library.opcheck(torch.ops.optmem.silu_mul, (gate, up))
