"""e4m3_rows: rows as 8-bit floats, every implementation against the reference, bit for bit."""

from importlib import import_module

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from optmem import ops, reference
from optmem.errors import BackendError, InputError
from optmem.machine import require_e4m3
from optmem.model.quantize import ROWS_AT_ONCE, quantize_rows_e4m3
from optmem.ops import e4m3
from optmem.testing import assert_equal, every_other, fenced, generator, guarded

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
TINY = torch.finfo(torch.float32).tiny
with_infinities = pytest.mark.filterwarnings("ignore:invalid value encountered in divide")  # of the interpreter's numpy


def half_a_step(steps):
    """Half of what lies between an 8-bit float and its neighbours: 1/16 of its power of two, and 2^-10 below 2^-6."""
    return 2.0 ** (steps.abs().clamp(min=2.0**-6).log2().floor() - 4)


def check_nearest(x, steps, scales):
    """Every finite number is within half a step of what stands for it, and the largest is hit."""
    wide, scales = x.double(), scales.double()[..., None]
    error = (steps.double() * scales - wide).abs()
    assert (error <= half_a_step(steps.double()) * scales * (1 + 1e-6)).all()
    assert_equal(scales[..., 0], (wide.abs().amax(-1) / 448).float().clamp(min=TINY).double())
    is_full = scales[..., 0] > TINY
    assert (steps.double().abs().amax(-1)[is_full] == 448).all()


@given(arrays.arrays("float32", st.tuples(st.integers(1, 4), st.integers(1, 40)), elements=st.floats(width=32, allow_nan=False)))
def test_every_number_is_within_half_a_step(numbers):
    x = torch.from_numpy(numbers)
    x[x.isinf()] = 3e38
    steps, scales, dtype = ops.e4m3_rows(x)
    assert dtype == torch.float32
    check_nearest(x, steps, scales)


def hostile(rows, width, dtype):
    """Rows of every size, of zeros, of the smallest and of the largest numbers, and with a NaN or an infinity in them."""
    rng = generator(f"e4m3 {rows} {width}")
    x = torch.randn(rows, width, generator=rng) * torch.logspace(-6, 4, rows)[:, None]
    x = x.to(dtype)
    odd = (0.0, torch.finfo(dtype).smallest_normal, -torch.finfo(dtype).max, torch.nan, torch.inf, -torch.inf, -torch.nan)
    for row, value in zip(range(1, rows, 2), odd, strict=False):
        x[row, :: max(1, width - 1)] = value
        if value == 0.0:
            x[row] = value
    return x


def same(actual, expected):
    """Bit for bit; of a NaN there are several, and any will do."""
    for one, other in zip(actual, expected, strict=True):
        is_nan = other.float().isnan()
        assert torch.equal(one.float().isnan(), is_nan)
        assert_equal(one.float().nan_to_num(), other.float().nan_to_num())


@with_infinities
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("rows", "width"), [(1, 1), (16, 1), (15, 7), (17, 64), (3, 77), (16, 384), (2, 1280), (15, 2049)])
def test_triton_writes_what_the_reference_writes(dtype, rows, width):
    pytest.importorskip("triton")
    x = hostile(rows, width, dtype).to(DEVICE)
    expected = reference.e4m3_rows(x)
    buffer = torch.full((x.numel() + 512,), 0x55, dtype=torch.uint8, device=DEVICE)  # e4m3 has no empty NaN to tell apart
    steps, scales = buffer[256:-256].view(x.shape).view(e4m3.E4M3), torch.empty(rows, device=DEVICE)
    import_module("optmem.kernels.e4m3_rows").e4m3_rows(fenced(x), steps, scales)
    same((steps, scales), expected)
    assert (buffer[:256] == 0x55).all()
    assert (buffer[-256:] == 0x55).all()
    finite = x[x.isfinite().all(-1)]
    with guarded((len(finite),), torch.float32, DEVICE) as written:
        import_module("optmem.kernels.e4m3_rows").e4m3_rows(finite, torch.empty_like(finite, dtype=e4m3.E4M3), written)


@with_infinities
def test_what_cuda_runs():
    """The function that is registered for it, which needs no CUDA where the interpreter runs: strides, more axes, and nothing."""
    pytest.importorskip("triton")
    x = hostile(12, 33, torch.bfloat16).to(DEVICE)
    for shaped in (x, every_other(x), x.view(2, 3, 2, 33), x[0], x[:0], x.view(3, 4, 33)[:, :0], x.T[:12].contiguous().T):
        same(e4m3._e4m3_rows_cuda(shaped), reference.e4m3_rows(shaped))
    with pytest.raises(InputError, match="a row has at most 32768 numbers, got 32769"):
        e4m3._e4m3_rows_cuda(torch.zeros(1, 32769))


def test_a_row_that_is_no_number_spoils_itself_alone():
    x = hostile(12, 33, torch.float32)
    x[5] /= 1e9  # or its products would be infinite
    steps, scales, _ = ops.e4m3_rows(x)
    is_sound = x.isfinite().all(-1)
    assert torch.equal(scales.isfinite(), is_sound)
    check_nearest(x[is_sound], steps[is_sound], scales[is_sound])
    weight = ops.e4m3_rows(torch.randn(5, 33, generator=generator("weight")))
    out = ops.linear_e4m3(ops.E4m3Rows(steps, scales, x.dtype), weight.steps, weight.scales)
    assert torch.equal(out.isfinite().all(-1), is_sound)
    assert torch.equal(out.isnan().all(-1), ~is_sound)


@pytest.mark.parametrize(
    ("x", "words"),
    [
        (torch.zeros(3, 0), r"x must be \[..., D\] with D at least 1, got \[3, 0\]"),
        (torch.tensor(1.0), r"got \[\]"),
        (torch.zeros(3, 4, dtype=torch.float64), "x must be torch.float32, torch.bfloat16 or torch.float16, got torch.float64"),
        (torch.zeros(3, 4).to(e4m3.E4M3), "got torch.float8_e4m3fn"),
    ],
)
def test_refuses(x, words):
    with pytest.raises(InputError, match=f"e4m3_rows: .*{words}"):
        ops.e4m3_rows(x)


def test_a_gpu_without_such_products_is_refused(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (8, 0))
    with pytest.raises(BackendError, match=r"compute capability 9\.0 or later, .* and cuda:3 has 8\.0: use dtype='bfloat16'"):
        require_e4m3(torch.device("cuda:3"))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (9, 0))
    require_e4m3(torch.device("cuda:3"))
    require_e4m3(torch.device("cpu"))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_weights_are_rounded_as_rows_are(dtype):
    weight = torch.randn(3, ROWS_AT_ONCE // 2 + 1, 9, generator=generator("weights")).to(dtype)
    steps, scales = quantize_rows_e4m3(weight)
    assert (steps.shape, scales.shape) == (weight.shape, weight.shape[:-1])
    same((steps, scales), reference.e4m3_rows(weight))
    for wrong in (torch.nan, torch.inf):
        weight[1, 2, 3] = wrong
        with pytest.raises(InputError, match="NaN or infinite"):
            quantize_rows_e4m3(weight)


def test_says_who_serves_it():
    for operator in ("e4m3_rows", "linear_e4m3"):
        rows = {row.device: row for row in ops.implementations() if row.operator == operator}
        assert rows["cpu"].name == "reference"
        assert "not for speed" in rows["cpu"].reason
        assert rows["cuda"].name == "triton"
        assert "from compute capability 9.0 on" in rows["cuda"].reason
