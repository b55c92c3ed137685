"""silu_mul: every instruction set and the Triton kernel against the reference; a value's place does not matter."""

from importlib import import_module

import pytest
import torch

from optmem import ops, reference
from optmem.errors import InputError
from optmem.kernels.launch import SWIGLU
from optmem.ops import decoding
from optmem.testing import assert_close, assert_equal, available_isas, every_other, fenced, forced_isa, generator, guarded

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


# --- Triton ---------------------------------------------------------------------------------------------------------------------

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


def run_triton(gate, up):
    """The launcher itself, the output between guard bands."""
    pytest.importorskip("triton")
    kernel = import_module("optmem.kernels.silu_mul")
    with guarded(gate.shape, gate.dtype, DEVICE) as out:
        kernel.silu_mul(fenced(gate.to(DEVICE)), fenced(up.to(DEVICE)), out)
    return out.cpu()


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float16], ids=str)
@pytest.mark.parametrize("shape", [(1, 1), (3, 37), (2, 6848), (1, SWIGLU.BLOCK), (1, SWIGLU.BLOCK + 1), (0, 5), (5, 0)], ids=str)
def test_triton_matches_reference(dtype, shape):
    gate, up = inputs(*shape, dtype)
    assert_close(run_triton(gate, up), reference.silu_mul(gate, up), exact=reference.silu_mul(gate.double(), up.double()))


def test_triton_large_gates_neither_overflow_nor_vanish():
    gate = torch.tensor([[500.0, -500.0, 0.0, -20.0]])
    got = run_triton(gate, torch.ones(1, 4))
    assert got[0, :3].tolist() == [500.0, 0.0, 0.0]
    assert torch.allclose(got, reference.silu_mul(gate, torch.ones(1, 4)), rtol=1e-6, atol=0)


def test_what_cuda_runs():
    """The function that is registered for it, which needs no CUDA where the interpreter runs: strided inputs, and fp64 in torch."""
    gate, up = (tensor.to(DEVICE) for tensor in inputs(3, 37, torch.bfloat16))
    assert_equal(decoding._silu_mul_cuda(every_other(gate), every_other(up)).cpu(), run_triton(gate, up))
    assert_equal(decoding._silu_mul_cuda(gate.double(), up.double()), reference.silu_mul(gate.double(), up.double()))
    rows = {row.device: row.name for row in ops.implementations() if row.operator == "silu_mul"}
    assert rows["cuda"] == "triton"
