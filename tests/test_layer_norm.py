"""layer_norm and add_layer_norm: every implementation against the reference, what they refuse, and the choice of tiles."""

from importlib import import_module

import pytest
import torch

from optmem import ops, reference
from optmem.errors import InputError
from optmem.kernels.launch import WIDEST_NORM, layer_norm_tile
from optmem.ops import norm
from optmem.testing import assert_close, assert_equal, every_other, fenced, generator, guarded, layer_norm_inputs

CPU = torch.device("cpu")
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
EPS = 1e-6


def triton_kernel():
    pytest.importorskip("triton")
    return import_module("optmem.kernels.layer_norm")


def run_triton(x, weight, bias, eps):
    """The launcher itself, on inputs and an output between guard bands."""
    with guarded(x.shape, x.dtype, x.device) as out:
        triton_kernel().layer_norm(*map(fenced, (x, weight, bias)), eps, out)
    return out


def run_triton_add(x, residual, weight, bias, eps):
    """The same for the sum and its norm."""
    inputs = map(fenced, (x, residual, weight, bias))
    with guarded(x.shape, x.dtype, x.device) as total, guarded(x.shape, x.dtype, x.device) as out:
        triton_kernel().add_layer_norm(*inputs, eps, total, out)
    return total, out


IMPLEMENTATIONS = {"triton": (run_triton, DEVICE), "cpu": (ops.layer_norm, CPU)}
if DEVICE.type == "cuda":
    IMPLEMENTATIONS["cuda"] = (ops.layer_norm, DEVICE)
ADDING = {"triton": run_triton_add, "cpu": ops.add_layer_norm, "cuda": ops.add_layer_norm}
SHAPES = [(0, 8), (1, 1), (3, 7), (130, 16), (9, 256), (5, 768), (2, 1025), (1, 4096)]


def add_inputs(rows, width, dtype, device):
    """x, residual, weight and bias; the sum is no number of 16 bits."""
    x, weight, bias = layer_norm_inputs(rows, width, dtype, device)
    residual = torch.randn(rows, width, generator=generator(f"add_layer_norm {rows} {width}")).to(device, dtype)
    return x, residual, weight, bias


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("rows", "width"), SHAPES)
def test_matches_reference(implementation, dtype, rows, width):
    run, device = IMPLEMENTATIONS[implementation]
    inputs = layer_norm_inputs(rows, width, dtype, device)
    exact = reference.layer_norm(*(tensor.double() for tensor in inputs), EPS)
    assert_close(run(*inputs, EPS), reference.layer_norm(*inputs, EPS), exact=exact)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("rows", "width"), SHAPES)
def test_a_sum_and_its_norm(implementation, dtype, rows, width):
    """The sum is rounded before it is normalised, as if the two were apart: bit for bit, in each implementation."""
    run, device = IMPLEMENTATIONS[implementation]
    x, residual, weight, bias = add_inputs(rows, width, dtype, device)
    total, out = ADDING[implementation](x, residual, weight, bias, EPS)
    assert_equal(total, x + residual)
    assert_equal(out, run(total, weight, bias, EPS))


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_rows_far_from_zero_keep_their_variance(implementation):
    """The mean of squares less the square of the mean would be nothing but rounding here."""
    run, device = IMPLEMENTATIONS[implementation]
    x, weight, bias = layer_norm_inputs(4, 64, torch.float32, device)
    x = x + 1e4
    exact = reference.layer_norm(x.double(), weight.double(), bias.double(), EPS)
    assert_close(run(x, weight, bias, EPS), reference.layer_norm(x, weight, bias, EPS), exact=exact)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_equal_numbers_are_the_bias(implementation):
    run, device = IMPLEMENTATIONS[implementation]
    _, weight, bias = layer_norm_inputs(1, 24, torch.float32, device)
    assert_equal(run(torch.full((3, 24), 2.0, device=device), weight, bias, EPS), bias.expand(3, 24))


def test_a_nan_stays_in_its_row():
    x, weight, bias = layer_norm_inputs(9, 24, torch.bfloat16, DEVICE)
    before = run_triton(x, weight, bias, EPS)
    x[4, 23] = torch.nan
    after = torch.empty_like(x)
    triton_kernel().layer_norm(x, weight, bias, EPS, after)
    assert after[4].isnan().all()
    after[4] = before[4]
    assert_equal(after, before)


def test_a_nan_of_a_residual_stays_in_its_row():
    x, residual, weight, bias = add_inputs(9, 24, torch.bfloat16, DEVICE)
    before = run_triton_add(x, residual, weight, bias, EPS)
    residual[4, 23] = torch.nan
    after = torch.empty_like(x), torch.empty_like(x)
    triton_kernel().add_layer_norm(x, residual, weight, bias, EPS, *after)
    assert after[1][4].isnan().all()
    others = torch.arange(9, device=DEVICE) != 4
    for ours, theirs in zip(after, before, strict=True):
        assert_equal(ours[others], theirs[others])


def test_strided_inputs_and_more_axes():
    inputs = layer_norm_inputs(6, 24, torch.bfloat16, DEVICE)
    expected = ops.layer_norm(*inputs, EPS)
    assert_equal(ops.layer_norm(*map(every_other, inputs), EPS), expected)
    assert_equal(ops.layer_norm(inputs[0].view(2, 3, 24), *inputs[1:], EPS), expected.view(2, 3, 24))
    assert_equal(ops.layer_norm(inputs[0][0], *inputs[1:], EPS), expected[0])
    inputs = add_inputs(6, 24, torch.bfloat16, DEVICE)
    expected = ops.add_layer_norm(*inputs, EPS)
    boxed = (tensor.view(2, 3, 24) for tensor in inputs[:2])
    for got in (ops.add_layer_norm(*map(every_other, inputs), EPS), ops.add_layer_norm(*boxed, *inputs[2:], EPS)):
        for ours, theirs in zip(got, expected, strict=True):
            assert_equal(ours.flatten(0, -2), theirs)


@pytest.mark.parametrize("shape", [(24,), (2, 3, 24), (0, 24), (2, 0, 24)], ids=str)
def test_cuda_takes_any_axes(shape):
    triton_kernel()
    x, weight, bias = layer_norm_inputs(6, 24, torch.float32, DEVICE)
    x = x.flatten()[: torch.Size(shape).numel()].view(shape)
    torch.testing.assert_close(norm._layer_norm_cuda(x, weight, bias, EPS), reference.layer_norm(x, weight, bias, EPS))
    total, out = norm._add_layer_norm_cuda(x, x + 1, weight, bias, EPS)
    assert_equal(total, x + (x + 1))
    assert_equal(out, norm._layer_norm_cuda(total, weight, bias, EPS))


def test_wider_rows_are_torchs():
    inputs = layer_norm_inputs(1, WIDEST_NORM + 1, torch.float32, DEVICE)
    assert_equal(norm._layer_norm_cuda(*inputs, EPS), reference.layer_norm(*inputs, EPS))
    both = norm._add_layer_norm_cuda(inputs[0], *inputs, EPS)
    for ours, theirs in zip(both, reference.add_layer_norm(inputs[0], *inputs, EPS), strict=True):
        assert_equal(ours, theirs)


@pytest.mark.parametrize(
    ("position", "wrong", "words"),
    [
        (0, torch.zeros(3, 0), r"x must be \[..., D\] with D at least 1"),
        (0, torch.zeros(3, 8, dtype=torch.float64), "got torch.float64"),
        (1, torch.zeros(7), r"weight must be \[8\], got \[7\]"),
        (1, torch.zeros(8, dtype=torch.bfloat16), "weight must be torch.float32, got torch.bfloat16"),
        (2, torch.zeros(8, device="meta"), "bias must be on cpu, got meta"),
    ],
)
def test_refuses_wrong_arguments(position, wrong, words):
    inputs = list(layer_norm_inputs(3, 8, torch.float32, CPU))
    inputs[position] = wrong
    with pytest.raises(InputError, match=f"^layer_norm: .*{words}"):
        ops.layer_norm(*inputs, EPS)
    with pytest.raises(InputError, match=f"^add_layer_norm: .*{words}"):
        ops.add_layer_norm(inputs[0], torch.zeros(3, 8), *inputs[1:], EPS)


@pytest.mark.parametrize(
    ("residual", "words"),
    [
        (torch.zeros(8), r"residual must be \[3, 8\], got \[8\]"),  # no broadcast
        (torch.zeros(3, 8).half(), "residual must be torch.float32, got torch.float16"),
    ],
)
def test_refuses_another_residual(residual, words):
    x, *parameters = layer_norm_inputs(3, 8, torch.float32, CPU)
    with pytest.raises(InputError, match=f"add_layer_norm: {words}"):
        ops.add_layer_norm(x, residual, *parameters, EPS)


def test_opcheck_gradients_and_graphs():
    inputs = layer_norm_inputs(3, 8, torch.float32, DEVICE)
    torch.library.opcheck(torch.ops.optmem.layer_norm, (*inputs, EPS))
    compiled = torch.compile(ops.layer_norm, fullgraph=True, backend="aot_eager")
    assert_equal(compiled(*inputs, EPS), ops.layer_norm(*inputs, EPS))
    leaves = [tensor.requires_grad_() for tensor in inputs]
    ours, theirs = (torch.autograd.grad(run(*leaves, EPS).sum(), leaves) for run in (ops.layer_norm, reference.layer_norm))
    for actual, expected in zip(ours, theirs, strict=True):
        assert_equal(actual, expected)


def test_gradients_of_a_sum():
    """Of both results; so that a residual stream that is carried along trains as one that is added."""
    leaves = [tensor.requires_grad_() for tensor in add_inputs(3, 8, torch.float32, DEVICE)]
    total, out = ops.add_layer_norm(*leaves, EPS)
    ours = torch.autograd.grad(total.square().sum() + out.sin().sum(), leaves)
    apart = leaves[0] + leaves[1]
    expected = torch.autograd.grad(apart.square().sum() + reference.layer_norm(apart, *leaves[2:], EPS).sin().sum(), leaves)
    for mine, theirs in zip(ours, expected, strict=True):
        assert_equal(mine, theirs)


def test_types_of_autocast():
    """A product of autocast is bf16 beside a stream of fp32: plain torch knows what becomes of the two."""
    x, residual, weight, bias = add_inputs(3, 8, torch.float32, CPU)
    with torch.autocast("cpu", torch.bfloat16):
        total, out = ops.add_layer_norm(x, residual.bfloat16(), weight, bias, EPS)
    assert total.dtype == out.dtype == torch.float32
    assert_equal(total, x + residual.bfloat16())


def test_says_who_serves_it():
    pytest.importorskip("triton")
    for operator in ("layer_norm", "add_layer_norm"):
        rows = {row.device: row.name for row in ops.implementations() if row.operator == operator}
        assert rows == {"cpu": "torch", "cuda": "triton"}


@pytest.mark.parametrize("width", [1, 16, 77, 192, 256, 384, 768, 1024, WIDEST_NORM])
def test_a_tile_holds_whole_rows(width):
    tile = layer_norm_tile(width)
    assert width <= tile.BLOCK_D < max(32, 2 * width)
    assert tile.num_warps * 32 * 16 >= tile.ROWS * tile.BLOCK_D
