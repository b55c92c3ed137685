"""compress: every implementation against the reference and against torch's own modules, what it refuses, the choice of tiles.

The Triton kernel runs on the GPU, or in the interpreter where there is none: nine steps and more a tile, so grids are small.
"""

import itertools
from importlib import import_module

import pytest
import torch
from torch import nn

from optmem import ops, reference
from optmem.errors import InputError
from optmem.kernels.launch import (
    CONVOLUTION_NARROW,
    CONVOLUTION_WIDE,
    STREAMING_MULTIPROCESSORS,
    cdiv,
    convolution_tile,
    convolution_tiles,
)
from optmem.ops import vision
from optmem.testing import assert_close, assert_equal, compress_inputs, every_other, fenced, generator, guarded

CPU = torch.device("cpu")
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
WIDTHS = (12, 7, 10, 9)


def triton_kernel():
    pytest.importorskip("triton")
    return import_module("optmem.kernels.compress")


IMPLEMENTATIONS = {"triton": (lambda *inputs: triton_kernel().compress(*inputs), DEVICE), "cpu": (ops.compress, CPU)}
if DEVICE.type == "cuda":
    IMPLEMENTATIONS["cuda"] = (ops.compress, DEVICE)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(("num_grids", "grid"), [(1, (1, 1)), (2, (4, 4)), (1, (5, 7)), (3, (2, 9)), (0, (4, 8))], ids=str)
def test_matches_reference(implementation, dtype, num_grids, grid):
    run, device = IMPLEMENTATIONS[implementation]
    inputs = compress_inputs(num_grids, grid, WIDTHS, dtype, device)
    exact = reference.compress(*(tensor.double() for tensor in inputs))
    actual = run(*(fenced(tensor) for tensor in inputs))
    assert actual.shape == (num_grids, -(-grid[0] // 4), -(-grid[1] // 4), WIDTHS[3])
    assert_close(actual, reference.compress(*inputs), exact=exact)


@pytest.mark.parametrize("tile", [CONVOLUTION_WIDE, CONVOLUTION_NARROW], ids=["wide", "narrow"])
@pytest.mark.parametrize("stride", [1, 2])
def test_triton_tiles(tile, stride, monkeypatch):
    """More than one tile of pixels and of channels, two steps for a neighbour, pages that meet inside a tile; between bands."""
    kernel = triton_kernel()
    monkeypatch.setattr(kernel, "convolution_tile", lambda *_: tile)
    rng = generator("convolve")
    pixels = torch.randn(2, 5 * stride, 14 * stride, 72, generator=rng).to(DEVICE, torch.bfloat16)
    weight = (torch.randn(136, 72, 3, 3, generator=rng) / 25).to(DEVICE, torch.bfloat16)
    with guarded((2, 5, 14, 136), torch.bfloat16, DEVICE) as actual:
        kernel.fill(fenced(pixels), fenced(weight.permute(0, 2, 3, 1).contiguous()), stride, actual)
    exact = reference._convolve(pixels.double(), weight.double(), stride)
    assert_close(actual, reference._convolve(pixels, weight, stride).contiguous(), exact=exact)


def test_triton_a_nan_reaches_its_neighbours_alone():
    kernel = triton_kernel()
    pixels = torch.zeros(2, 7, 7, 16, device=DEVICE)
    pixels[1, 0, 6, 3] = torch.nan
    out = kernel.convolve(pixels, torch.ones(16, 16, 3, 3, device=DEVICE), 1)
    expected = torch.zeros(2, 7, 7, dtype=torch.bool, device=DEVICE)
    expected[1, :2, 5:] = True
    assert_equal(out.isnan().any(-1), expected)


def test_weights_that_are_stored_channels_last_give_the_same_answer():
    patches, *weights = compress_inputs(1, (4, 5), (16, 16, 32, 16), torch.bfloat16, DEVICE)
    last = [weight.contiguous(memory_format=torch.channels_last) if weight.dim() == 4 else weight for weight in weights]
    assert_equal(triton_kernel().compress(patches, *last), triton_kernel().compress(patches, *weights))
    torch.testing.assert_close(ops.compress(patches, *last), ops.compress(patches, *weights), rtol=0.02, atol=0.02)


def test_cuda_takes_the_kernel(monkeypatch):
    monkeypatch.setattr(triton_kernel(), "compress", lambda *inputs: inputs)
    inputs = compress_inputs(1, (4, 5), WIDTHS, torch.float32, DEVICE)
    assert all(a is b for a, b in zip(vision._compress_cuda(*inputs), inputs, strict=True))


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
    pytest.importorskip("triton")
    assert rows == {"cpu": "reference", "cuda": "triton"}


@pytest.mark.parametrize("itemsize", [2, 4])
def test_the_chooser_keeps_its_promises(itemsize):
    """Whatever it returns is among those that the gate builds, and a narrower tile is taken only to fill the device."""
    layers = ((256, 256, 1), (256, 512, 2), (512, 1024, 2), (512, 896, 2), (192, 192, 1), (192, 256, 2), (256, 384, 2), (7, 9, 2))
    for side, num_pages, (channels, width, stride) in itertools.product((512, 640, 768, 1024, 1280), (1, 7, 16), layers):
        pixels = num_pages * (side // 16 // stride) ** 2
        tiles = convolution_tiles(channels, width, itemsize)
        tile = convolution_tile(pixels, width, channels, itemsize)
        fills = cdiv(pixels, tiles[0].BLOCK_M) * cdiv(width, tiles[0].BLOCK_N) >= STREAMING_MULTIPROCESSORS
        assert tile == (tiles[0] if fills else tiles[-1])
