"""linear_e4m3: every implementation against the reference, and what it refuses."""

from importlib import import_module

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from optmem import ops, reference
from optmem.errors import InputError
from optmem.kernels import launch
from optmem.ops import e4m3
from optmem.testing import assert_close, assert_equal, every_other, fenced, generator, guarded, linear_e4m3_inputs

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
ACTIVATIONS = ["none", "gelu", "quick_gelu"]
TILES = [launch.E4M3_WIDE, launch.E4M3_NARROW, launch.E4M3_FEW, launch.E4M3_FEWEST, launch.E4M3_ODD]


def inputs_of(rows, width_in, width_out, dtype=torch.bfloat16, *, has_bias=True):
    x, weight, bias = linear_e4m3_inputs(rows, width_in, width_out, dtype, DEVICE)
    return (*ops.e4m3_rows(x)[:2], *ops.e4m3_rows(weight)[:2], bias if has_bias else None)


def exactly(given, activation):
    """In fp64, with the same 8-bit floats."""
    x, x_scales, weight, scales, bias = given
    wide = (x, x_scales.double(), weight, scales.double(), None if bias is None else bias.double())
    return reference.linear_e4m3(*wide, activation, torch.float64)


def fenced_all(given):
    """Between guard bands, where a step beyond the tensor is a NaN."""
    return tuple(None if tensor is None else fenced(tensor) for tensor in given)


def run_triton(given, activation, dtype):
    with guarded((given[0].shape[0], given[2].shape[0]), dtype, DEVICE) as out:
        import_module("optmem.kernels.linear_e4m3").linear_e4m3(fenced_all(given), activation, out)
    return out


def check(actual, given, activation):
    """In the interpreter as near as torch's own sums; tensor cores keep about 14 bits of 128 columns' sum."""
    exact = exactly(given, activation)
    if not (actual.is_cuda and actual.dtype == torch.float32):
        assert_close(actual, reference.linear_e4m3(*given, activation, actual.dtype), exact=exact)
        return
    x, x_scales, weight, scales = (tensor.double().abs() for tensor in given[:4])
    sizes = (x @ weight.T) * x_scales[:, None] * scales
    assert ((actual.double() - exact).abs() <= 2.0**-12 * sizes + 1e-6).all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("has_bias", [True, False], ids=["bias", "no bias"])
def test_triton_matches_reference(dtype, activation, has_bias):
    pytest.importorskip("triton")
    given = inputs_of(9, 96, 70, dtype, has_bias=has_bias)
    check(run_triton(given, activation, dtype), given, activation)


@pytest.mark.parametrize("tile", TILES, ids=lambda tile: f"{tile.BLOCK_M}x{tile.BLOCK_N}x{tile.BLOCK_K}")
@pytest.mark.parametrize("shape", [(1, 1, 1), (17, 257, 129), (129, 64, 33)], ids=str)
def test_triton_every_tile(tile, shape, monkeypatch):
    """One past a block each way, and less than one."""
    pytest.importorskip("triton")
    monkeypatch.setattr(import_module("optmem.kernels.linear_e4m3"), "e4m3_tile", lambda *_: tile)
    given = inputs_of(*shape)
    check(run_triton(given, "none", torch.bfloat16), given, "none")


@settings(max_examples=25)
@given(st.integers(1, 40), st.integers(1, 80), st.integers(1, 100), st.booleans(), st.sampled_from(ACTIVATIONS))
def test_triton_any_shape(rows, width_in, width_out, has_bias, activation):
    pytest.importorskip("triton")
    given = inputs_of(rows, width_in, width_out, torch.float32, has_bias=has_bias)
    check(run_triton(given, activation, torch.float32), given, activation)


def test_what_it_means():
    """Near the product of what was rounded: two roundings of 1/16 at most, most of which cancel each other."""
    rng = generator("meaning")
    x, weight = torch.randn(64, 512, generator=rng), torch.randn(96, 512, generator=rng) / 512**0.5
    steps, scales, _ = ops.e4m3_rows(weight)
    bias = torch.randn(96, generator=rng)
    said = ops.linear_e4m3(ops.e4m3_rows(x), steps, scales, bias, "gelu")
    exact = reference.linear(x.double(), weight.double(), bias.double(), "gelu")
    error = (said.double() - exact).norm() / exact.norm()
    assert 0.01 < error < 0.05


def test_a_nan_stays_in_its_row():
    pytest.importorskip("triton")
    given = inputs_of(20, 64, 96)
    before = run_triton(given, "gelu", torch.bfloat16)
    x, x_scales, *others = (tensor.clone() for tensor in given)
    x[7], x_scales[7] = torch.nan, torch.nan
    after = torch.empty_like(before)
    import_module("optmem.kernels.linear_e4m3").linear_e4m3((x, x_scales, *others), "gelu", after)
    assert after[7].isnan().all()
    after[7] = before[7]
    assert_equal(after, before)


def test_what_cuda_runs():
    """The function that is registered for it, which needs no CUDA where the interpreter runs: strides, more axes, and nothing."""
    pytest.importorskip("triton")
    x, x_scales, weight, scales, bias = inputs_of(24, 32, 48)
    expected = run_triton((x, x_scales, weight, scales, bias), "none", torch.bfloat16)

    def run(x, x_scales, weight=weight, scales=scales, bias=bias):
        return e4m3._linear_e4m3_cuda(x, x_scales, weight, scales, bias, "none", torch.bfloat16)

    apart = [every_other(tensor) for tensor in (x, x_scales, weight, scales, bias)]
    assert_equal(run(*apart), expected)
    assert_equal(run(x.view(2, 3, 4, 32), x_scales.view(2, 3, 4)), expected.view(2, 3, 4, 48))
    assert_equal(run(x[0], x_scales[0]), expected[0])
    assert run(x[:0], x_scales[:0]).shape == (0, 48)
    assert run(x, x_scales, weight[:0], scales[:0], bias[:0]).shape == (24, 0)


def test_strides_more_axes_and_nothing_on_a_cpu():
    x, x_scales, weight, scales, bias = (tensor.cpu() for tensor in inputs_of(24, 32, 48))
    rows = ops.E4m3Rows(x, x_scales, torch.bfloat16)
    expected = ops.linear_e4m3(rows, weight, scales, bias)
    assert expected.dtype == torch.bfloat16
    apart = ops.E4m3Rows(every_other(x), every_other(x_scales), torch.bfloat16)
    assert_equal(ops.linear_e4m3(apart, every_other(weight), every_other(scales), every_other(bias)), expected)
    shaped = ops.E4m3Rows(x.view(2, 12, 32), x_scales.view(2, 12), torch.bfloat16)
    assert_equal(ops.linear_e4m3(shaped, weight, scales, bias), expected.view(2, 12, 48))
    none = ops.E4m3Rows(x[:0], x_scales[:0], torch.bfloat16)
    assert ops.linear_e4m3(none, weight, scales, bias).shape == (0, 48)
    assert ops.linear_e4m3(rows, weight[:0], scales[:0], bias[:0]).shape == (24, 0)


@pytest.mark.parametrize(
    ("position", "change", "words"),
    [
        (0, lambda x: x._replace(steps=x.steps.float()), "x must be torch.float8_e4m3fn, got torch.float32"),
        (0, lambda x: x._replace(scales=x.scales[:2]), r"x's scales must be \[3\], got \[2\]"),
        (0, lambda x: x._replace(scales=x.scales.double()), "x's scales must be torch.float32, got torch.float64"),
        (0, lambda x: x._replace(dtype=torch.float64), "x must have come as torch.float32, .*, got torch.float64"),
        (1, lambda weight: weight[:, :7], r"weight must be \[out, 8\], got \[5, 7\]"),
        (1, lambda weight: weight[0], r"weight must be \[out, 8\], got \[8\]"),
        (1, lambda weight: weight.float(), "weight must be torch.float8_e4m3fn, got torch.float32"),
        (1, lambda weight: weight.to("meta"), "weight must be on cpu, got meta"),
        (2, lambda scales: scales[:4], r"scales must be \[5\], got \[4\]"),
        (2, lambda scales: scales.half(), "scales must be torch.float32, got torch.float16"),
        (3, lambda bias: bias[:4], r"bias must be \[5\], got \[4\]"),
        (3, lambda bias: bias.float(), "bias must be torch.bfloat16, got torch.float32"),
        (4, lambda _: "relu", "activation must be one of .*, got 'relu'"),
    ],
)
def test_refuses(position, change, words):
    x, x_scales, weight, scales, bias = (tensor.cpu() for tensor in inputs_of(3, 8, 5))
    arguments = [ops.E4m3Rows(x, x_scales, torch.bfloat16), weight, scales, bias, "none"]
    arguments[position] = change(arguments[position])
    with pytest.raises(InputError, match=f"linear_e4m3: {words}"):
        ops.linear_e4m3(*arguments)


def test_the_chooser_follows_rows_and_widths():
    assert launch.e4m3_tile(4096, 3072, 768) == launch.E4M3_WIDE
    assert launch.e4m3_tile(257, 1024, 1024) == launch.E4M3_NARROW
    assert launch.e4m3_tile(17, 129280, 1280) == launch.E4M3_WIDE
    assert launch.e4m3_tile(16, 129280, 1280) == launch.E4M3_FEW
    assert launch.e4m3_tile(1, 1280, 1280) == launch.E4M3_FEWEST
    assert launch.e4m3_tile(500, 1280, 1281) == launch.E4M3_ODD
    for rows in (1, 16, 17, 64, 1000, 70_000):
        for width, width_in in ((1, 1), (384, 24), (1280, 6848), (129280, 1280)):
            assert launch.e4m3_tile(rows, width, width_in) in launch.e4m3_tiles(width_in)
