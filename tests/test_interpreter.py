"""The repairs of Triton's interpreter: what bfloat16 kernels compute in it, and what they refuse to."""

import os

import pytest
import torch

from optmem.testing import assert_equal, generator

if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("no kernel is interpreted in this process", allow_module_level=True)

import triton
import triton.language as tl
from triton.runtime.errors import InterpreterError

from optmem.interpreter import decode_bf16, encode_bf16

BF16, E4M3 = torch.bfloat16, torch.float8_e4m3fn


def every_bf16():
    return torch.arange(-(2**15), 2**15, dtype=torch.int16).view(BF16)


@triton.jit
def cast_kernel(x, y, N: tl.constexpr):
    o_n = tl.arange(0, N)
    tl.store(y + o_n, tl.load(x + o_n).to(y.dtype.element_ty))


def cast(x, dtype):
    y = torch.empty(x.shape, dtype=dtype)
    cast_kernel[(1,)](x, y, N=x.numel())
    return y


def test_every_bf16_survives_fp32():
    x = every_bf16()
    assert_equal(cast(x, torch.float32).nan_to_num(nan=7.0), x.float().nan_to_num(nan=7.0))
    assert torch.equal(cast(cast(x, torch.float32), BF16).isnan(), x.isnan())
    assert_equal(cast(cast(x, torch.float32), BF16).nan_to_num(nan=7.0), x.nan_to_num(nan=7.0))


def test_rounds_to_nearest_even():
    # 1.9999 carries into the exponent (stock: 1.992); then both kinds of tie, overflow, a subnormal and a signed zero.
    values = [1.9999, -1.9999, 1.00390625, 1.01171875, 3.4e38, 1e-40, -0.0, float("inf")]
    assert_equal(cast(torch.tensor(values), BF16), torch.tensor(values).to(BF16))
    assert cast(torch.tensor([1.9999, 0.0]), BF16)[0] == 2.0


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.int32, torch.uint8])
def test_casts_like_torch(dtype):
    x = (torch.rand(1024, generator=generator("casts")) * 255).to(dtype)
    assert_equal(cast(x, BF16), x.to(BF16))
    assert_equal(cast(x.to(BF16), dtype), x.to(BF16).to(dtype))


def test_codes_keep_shapes():
    assert encode_bf16(1.5).shape == ()
    assert decode_bf16(encode_bf16([[1.5, -2.0]])).tolist() == [[1.5, -2.0]]


@triton.jit
def dot_kernel(a, b, c, N: tl.constexpr):
    o_ij = tl.arange(0, N)[:, None] * N + tl.arange(0, N)[None, :]
    b_c = tl.dot(tl.load(a + o_ij), tl.load(b + o_ij))
    tl.store(c + o_ij, b_c)


def test_dot_of_bf16():
    a, b = torch.randn(2, 32, 32, generator=generator("dot")).to(BF16)
    c = torch.empty(32, 32)
    dot_kernel[(1,)](a, b, c, N=32)
    torch.testing.assert_close(c, a.float() @ b.float(), rtol=1e-6, atol=1e-5)


@triton.jit
def raw_kernel(x, y, WHAT: tl.constexpr):
    o_n = tl.arange(0, 16)
    b_x = tl.load(x + o_n)
    if WHAT == "add":
        b_x = b_x + b_x
    elif WHAT == "compare":
        b_x = (b_x < b_x).to(tl.bfloat16)
    elif WHAT == "sum":
        b_x = b_x + tl.sum(b_x, axis=0)
    elif WHAT == "atomic":
        tl.atomic_add(x + o_n, b_x)
    elif WHAT == "where":
        b_x = tl.where(o_n % 2 == 0, b_x, 0.0)
    tl.store(y + o_n, b_x)


@pytest.mark.parametrize("what", ["add", "compare", "sum", "atomic"])
def test_refuses_arithmetic_on_raw_bf16(what):
    x = torch.ones(16, dtype=BF16)
    with pytest.raises((InterpreterError, TypeError), match=r"cast the load with .to\(tl.float32\)"):
        raw_kernel[(1,)](x, torch.empty_like(x), WHAT=what)


def test_selecting_raw_bf16_is_allowed():
    x, y = torch.full((2, 16), 1.5, dtype=BF16)
    raw_kernel[(1,)](x, y, WHAT="where")
    assert y.tolist() == [1.5, 0.0] * 8


@triton.jit
def loop_kernel(x, y, n, BLOCK: tl.constexpr):
    b_y = tl.full([BLOCK], 0.5, tl.bfloat16).to(tl.float32)
    for i in range(tl.cdiv(n, BLOCK)):
        o_n = i * BLOCK + tl.arange(0, BLOCK)
        b_y += tl.load(x + o_n, mask=o_n < n, other=0.0).to(tl.float32)
    for _ in tl.range(n):
        b_y += 1.0
    tl.store(y + tl.arange(0, BLOCK), b_y)


def test_loops_run_to_a_tensor():
    y = torch.empty(4)
    loop_kernel[(1,)](torch.ones(10, dtype=BF16), y, 10, BLOCK=4)
    assert y.tolist() == [13.5, 13.5, 12.5, 12.5]


# --- e4m3 -----------------------------------------------------------------------------------------------------------------------


def every_e4m3():
    return torch.arange(256, dtype=torch.int16).to(torch.uint8).view(E4M3)


def same_bits(actual, expected):
    """Of a NaN there are two, and any will do."""
    is_nan = expected.float().isnan()
    assert torch.equal(actual.float().isnan(), is_nan)
    whole = torch.uint8 if actual.dtype == E4M3 else torch.int32
    assert_equal(actual.view(whole)[~is_nan], expected.view(whole)[~is_nan])


def test_every_e4m3_survives_fp32():
    x = every_e4m3()
    same_bits(cast(x, torch.float32), x.float())
    same_bits(cast(cast(x, torch.float32), E4M3), x)


def test_e4m3_of_every_bf16():
    """Every tie, carry and subnormal; torch makes NaN of what is too large, the hardware and we 448."""
    x = every_bf16().float()
    same_bits(cast(x, E4M3), x.clamp(-448, 448).to(E4M3))
    between = torch.randn(4096, generator=generator("e4m3")) * 2.0 ** torch.randint(-12, 10, (4096,), generator=generator("sizes"))
    same_bits(cast(between, E4M3), between.clamp(-448, 448).to(E4M3))
    assert cast(torch.tensor([float("inf"), -float("inf")]), E4M3).float().tolist() == [448.0, -448.0]


def test_dot_of_e4m3():
    a, b = torch.randn(2, 32, 32, generator=generator("dot")).to(E4M3)
    c = torch.empty(32, 32)
    dot_kernel[(1,)](a, b, c, N=32)
    torch.testing.assert_close(c, a.float() @ b.float(), rtol=1e-6, atol=1e-5)


@triton.jit
def raw_e4m3_kernel(x, y):
    o_n = tl.arange(0, 16)
    b_x = tl.load(x + o_n)
    tl.store(y + o_n, tl.sum(b_x, axis=0))


def test_refuses_arithmetic_on_raw_e4m3():
    with pytest.raises((InterpreterError, TypeError), match="of e4m3 is garbage"):
        raw_e4m3_kernel[(1,)](torch.ones(16).to(E4M3), torch.empty(16))


def test_installing_twice_changes_nothing():
    from optmem import interpreter

    before = interpreter.Builder.create_dot
    interpreter.install()
    assert interpreter.Builder.create_dot is before
