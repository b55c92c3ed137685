"""patch_embed: every implementation against the reference, what it refuses, and the choice of tiles.

The Triton kernel runs on the GPU, or in the interpreter where there is none: at 24 dots a tile the cases stay below 100 of them.
"""

import itertools
from importlib import import_module

import pytest
import torch

from optmem import ops, reference
from optmem.errors import InputError
from optmem.kernels.launch import PATCH_NARROW, PATCH_WIDE, patch_embed_tile, patch_embed_tiles
from optmem.ops import registry, vision
from optmem.testing import assert_close, assert_equal, fenced, guarded, patch_embed_inputs

CPU = torch.device("cpu")
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def triton_kernel():
    pytest.importorskip("triton")
    return import_module("optmem.kernels.patch_embed")


def run_triton(pixels, weight, bias, positions):
    """The launcher itself, on inputs and an output between guard bands."""
    kernel = triton_kernel()
    inputs = [fenced(tensor) for tensor in (pixels, weight, bias, positions)]
    with guarded((pixels.shape[0], *positions.shape), weight.dtype, weight.device) as out:
        kernel.patch_embed(*inputs, out)
    return out


IMPLEMENTATIONS = {"triton": (run_triton, DEVICE), "cpu": (ops.patch_embed, CPU)}
if DEVICE.type == "cuda":
    IMPLEMENTATIONS["cuda"] = (ops.patch_embed, DEVICE)


def exact(pixels, weight, bias, positions):
    """fp64 throughout, from the pixels that the weight's type can hold."""
    images = reference.normalise(pixels, weight.dtype).double()
    return reference.project_patches(images, weight.double(), bias.double(), positions.double())


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize(
    ("num_pages", "grid", "width"),
    [
        (1, (1, 1), 1),  # the smallest page: 16 x 16
        (3, (1, 3), 7),  # rows of odd length, a D that is no multiple of anything
        (1, (5, 13), 65),  # one patch and one channel past a tile of 64
        (2, (7, 4), 64),  # page borders inside a tile
    ],
)
def test_matches_reference(implementation, dtype, channels, num_pages, grid, width):
    run, device = IMPLEMENTATIONS[implementation]
    inputs = patch_embed_inputs(num_pages, grid, channels, width, dtype, device)
    assert_close(run(*inputs), reference.patch_embed(*inputs), exact=exact(*inputs))


@pytest.mark.parametrize("channels", [1, 3])
def test_triton_wide_tiles(channels, monkeypatch):
    """Pages that fill them are too many for the interpreter, so here the chooser says wide; one tile and the edges of three."""
    monkeypatch.setattr(triton_kernel(), "patch_embed_tile", lambda *_: PATCH_WIDE)
    inputs = patch_embed_inputs(1, (3, 43), channels, 144, torch.bfloat16, DEVICE)
    assert_close(run_triton(*inputs), reference.patch_embed(*inputs), exact=exact(*inputs))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_one_channel_is_the_page_repeated_to_three(dtype):
    pixels, *parameters = patch_embed_inputs(2, (2, 3), 1, 20, dtype, DEVICE)
    assert_equal(run_triton(pixels, *parameters), run_triton(pixels.expand(-1, -1, -1, 3), *parameters))


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("channels", [1, 3])
def test_every_byte_is_normalised_as_the_reference_does(implementation, dtype, channels):
    """One patch of all 256 bytes, and 256 weights that each pick one: the answer is the normalised pixel, bit for bit."""
    run, device = IMPLEMENTATIONS[implementation]
    pixels = torch.arange(256, dtype=torch.uint8, device=device).view(1, 16, 16, 1)
    weight = torch.zeros(256, 3, 256, dtype=dtype, device=device)
    weight[:, channels - 1] = torch.eye(256, dtype=dtype, device=device)
    nothing = torch.zeros(1, 1, 256, dtype=dtype, device=device)
    actual = run(pixels.expand(-1, -1, -1, channels), weight.view(256, 3, 16, 16), nothing[0, 0], nothing)
    assert_equal(actual.flatten(), reference.normalise(pixels, dtype).flatten())


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_an_empty_batch_and_no_channels(implementation):
    run, device = IMPLEMENTATIONS[implementation]
    for num_pages, width in ((0, 8), (2, 0)):
        inputs = patch_embed_inputs(num_pages, (2, 3), 3, width, torch.float32, device)
        assert run(*inputs).shape == (num_pages, 2, 3, width)


def every_other(tensor):
    """The same values, one cell apart, with 255 or NaN between them."""
    filling = torch.nan if tensor.dtype.is_floating_point else 255
    wide = torch.full((*tensor.shape, 2), filling, dtype=tensor.dtype, device=tensor.device)
    wide[..., 0] = tensor
    return wide[..., 0]


def test_accepts_strided_inputs():
    inputs = patch_embed_inputs(2, (2, 3), 3, 24, torch.bfloat16, DEVICE)
    assert_equal(ops.patch_embed(*(every_other(tensor) for tensor in inputs)), ops.patch_embed(*inputs))


@pytest.mark.parametrize(
    ("position", "wrong", "words"),
    [
        (0, torch.zeros(2, 32, 48, 3), "pixels must be torch.uint8"),
        (0, torch.zeros(2, 32, 48, dtype=torch.uint8), r"pixels must be \[B, H, W, C\]"),
        (0, torch.zeros(2, 32, 48, 4, dtype=torch.uint8), "with C 1 or 3"),
        (0, torch.zeros(2, 32, 40, 3, dtype=torch.uint8), "multiples of 16, got 32x40"),
        (0, torch.zeros(2, 0, 48, 3, dtype=torch.uint8), "multiples of 16, got 0x48"),
        (0, torch.zeros(2, 48, 32, 3, dtype=torch.uint8), r"positions must be \[3, 2, 8\]"),
        (1, torch.zeros(8, 3, 16, 16, dtype=torch.float64), "got torch.float64"),
        (1, torch.zeros(8, 1, 16, 16), r"weight must be \[D, 3, 16, 16\]"),
        (1, torch.zeros(8, 768), r"weight must be \[D, 3, 16, 16\]"),
        (2, torch.zeros(9), r"bias must be \[8\]"),
        (2, torch.zeros(8, dtype=torch.bfloat16), "bias must be torch.float32 as the weight is"),
        (3, torch.zeros(1, 2, 3, 8), r"positions must be \[2, 3, 8\]"),
        (3, torch.zeros(2, 3, 8, dtype=torch.float16), "positions must be torch.float32"),
        (3, torch.zeros(2, 3, 8, device="meta"), "positions must be on cpu, got meta"),
    ],
)
def test_refuses_wrong_arguments(position, wrong, words):
    inputs = list(patch_embed_inputs(2, (2, 3), 3, 8, torch.float32, CPU))
    inputs[position] = wrong
    with pytest.raises(InputError, match=words):
        ops.patch_embed(*inputs)


@pytest.mark.parametrize("channels", [1, 3])
def test_opcheck(channels):
    inputs = patch_embed_inputs(2, (2, 3), channels, 24, torch.float32, DEVICE)
    torch.library.opcheck(torch.ops.optmem.patch_embed, inputs)


def test_compiles_into_one_graph():
    inputs = patch_embed_inputs(2, (2, 3), 1, 24, torch.float32, DEVICE)
    compiled = torch.compile(ops.patch_embed, fullgraph=True, backend="aot_eager")
    assert_equal(compiled(*inputs), ops.patch_embed(*inputs))


def test_says_who_serves_it(monkeypatch, caplog):
    def rows():
        return {row.device: row.name for row in ops.implementations() if row.operator == "patch_embed"}

    pytest.importorskip("triton")
    assert rows() == {"cpu": "reference", "cuda": "triton"}

    def no_triton(name):
        raise ModuleNotFoundError(f"No module named 'triton', which {name} needs", name="triton")

    registry.triton_module.cache_clear()
    monkeypatch.setattr(registry, "import_module", no_triton)
    try:
        assert rows() == rows() == {"cpu": "reference", "cuda": "reference"}
        inputs = patch_embed_inputs(1, (1, 2), 3, 8, torch.float32, DEVICE)
        assert_equal(vision._patch_embed_cuda(*inputs), reference.patch_embed(*inputs))
        ours = [record.levelname for record in caplog.records if record.getMessage().startswith("patch_embed:")]
        assert ours == ["WARNING"], "once for each operator"
    finally:
        registry.triton_module.cache_clear()


SIDES = (512, 640, 768, 1024, 1280)


@pytest.mark.parametrize("itemsize", [2, 4])
def test_the_chooser_keeps_its_promises(itemsize):
    """Whatever it returns is among those that the gate builds, and divides a patch's 256 pixels."""
    for side, num_pages, width in itertools.product(SIDES, (1, 2, 7, 64), (1, 16, 77, 192, 768)):
        tile = patch_embed_tile(num_pages * (side // 16) ** 2, width, itemsize)
        assert tile in patch_embed_tiles(width, itemsize)
        assert 256 % tile.BLOCK_K == 0


@pytest.mark.parametrize("side", SIDES)
def test_the_chooser_fills_the_device(side):
    """One page of the models: from 1024 px on there is a wide tile for every multiprocessor."""
    assert patch_embed_tile((side // 16) ** 2, 768, 2) == (PATCH_WIDE if side >= 1024 else PATCH_NARROW)
    assert patch_embed_tile((side // 16) ** 2, 16, 2) == PATCH_NARROW
