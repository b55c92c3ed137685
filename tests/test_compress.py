"""compress: the operator against the reference and against torch's own modules, and what it refuses."""

import pytest
import torch
from torch import nn

from optmem import ops, reference
from optmem.errors import InputError
from optmem.testing import assert_close, assert_equal, compress_inputs, every_other, fenced, generator

CPU = torch.device("cpu")
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
WIDTHS = (12, 7, 10, 9)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("num_grids", "grid"), [(1, (1, 1)), (2, (4, 4)), (1, (5, 7)), (3, (2, 9)), (0, (4, 8))], ids=str)
def test_matches_reference(dtype, num_grids, grid):
    inputs = compress_inputs(num_grids, grid, WIDTHS, dtype, DEVICE)
    exact = reference.compress(*(tensor.double() for tensor in inputs))
    actual = ops.compress(*(fenced(tensor) for tensor in inputs))
    assert actual.shape == (num_grids, -(-grid[0] // 4), -(-grid[1] // 4), WIDTHS[3])
    assert_close(actual, reference.compress(*inputs), exact=exact)


def test_is_what_torch_modules_compute():
    """Convolutions over channels first, and norms over the channels between them."""
    patches, neck_0, scale_1, shift_1, neck_2, scale_3, shift_3, net_2, net_3 = compress_inputs(
        2, (8, 12), WIDTHS, torch.float64, CPU
    )
    x = nn.functional.conv2d(patches.permute(0, 3, 1, 2), neck_0)
    x = norm_over_channels(x, scale_1, shift_1)
    x = norm_over_channels(nn.functional.conv2d(x, neck_2, padding=1), scale_3, shift_3)
    x = nn.functional.conv2d(nn.functional.conv2d(x, net_2, stride=2, padding=1), net_3, stride=2, padding=1)
    actual = reference.compress(patches, neck_0, scale_1, shift_1, neck_2, scale_3, shift_3, net_2, net_3)
    torch.testing.assert_close(actual, x.permute(0, 2, 3, 1))


def norm_over_channels(x, scale, shift):
    """Written by hand, as the family's own code does."""
    mean = x.mean(1, keepdim=True)
    variance = (x - mean).pow(2).mean(1, keepdim=True)
    return scale[:, None, None] * (x - mean) / (variance + 1e-6).sqrt() + shift[:, None, None]


def test_accepts_strided_inputs():
    inputs = compress_inputs(2, (5, 8), WIDTHS, torch.float32, DEVICE)
    assert_equal(ops.compress(*map(every_other, inputs)), ops.compress(*inputs))


@pytest.mark.parametrize(
    ("position", "wrong", "words"),
    [
        (0, torch.zeros(2, 8, 12), r"patches must be \[B, h, w, D\]"),
        (0, torch.zeros(2, 0, 8, 12), "at least 1"),
        (0, torch.zeros(2, 4, 4, 12, dtype=torch.float64), "got torch.float64"),
        (1, torch.zeros(7, 12), r"neck_0 must be \[7, 12, 1, 1\]"),
        (2, torch.zeros(6), r"scale_1 must be \[7\], got \[6\]"),
        (4, torch.zeros(7, 7, 1, 1), r"neck_2 must be \[7, 7, 3, 3\]"),
        (6, torch.zeros(7, dtype=torch.bfloat16), "shift_3 must be torch.float32 as patches is"),
        (7, torch.zeros(10, 6, 3, 3), r"net_2 must be \[10, 7, 3, 3\]"),
        (8, torch.zeros(9, 7, 3, 3), r"net_3 must be \[9, 10, 3, 3\]"),
    ],
)
def test_refuses_wrong_arguments(position, wrong, words):
    inputs = list(compress_inputs(2, (4, 4), WIDTHS, torch.float32, CPU))
    inputs[position] = wrong
    with pytest.raises(InputError, match=words):
        ops.compress(*inputs)


def test_opcheck():
    inputs = compress_inputs(2, (5, 8), WIDTHS, torch.float32, DEVICE)
    torch.library.opcheck(torch.ops.optmem.compress, inputs)
    leaves = tuple(tensor.requires_grad_() for tensor in inputs)  # traced with gradients in test_encoder.py
    torch.library.opcheck(torch.ops.optmem.compress, leaves, test_utils=("test_autograd_registration", "test_faketensor"))


def test_gradient_is_that_of_the_reference():
    inputs = [tensor.requires_grad_() for tensor in compress_inputs(2, (5, 8), WIDTHS, torch.float32, DEVICE)]
    weight = torch.randn(2, 2, 2, 9, generator=generator("gradient")).to(DEVICE)
    ours, theirs = (torch.autograd.grad((run(*inputs) * weight).sum(), inputs) for run in (ops.compress, reference.compress))
    for actual, expected in zip(ours, theirs, strict=True):
        torch.testing.assert_close(actual, expected)


def test_compiles_into_one_graph():
    inputs = compress_inputs(2, (5, 8), WIDTHS, torch.float32, DEVICE)
    compiled = torch.compile(ops.compress, fullgraph=True, backend="aot_eager")
    assert_equal(compiled(*inputs), ops.compress(*inputs))


def test_says_who_serves_it():
    rows = {row.device: row.name for row in ops.implementations() if row.operator == "compress"}
    assert rows == {"cpu": "reference", "cuda": "reference"}
