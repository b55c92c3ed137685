"""global_attention: every implementation against the reference, what it refuses, and the choice of tiles.

The Triton kernel runs on the GPU, or in the interpreter where there is none: a step for every row of keys, so grids are low.
"""

import itertools
from importlib import import_module

import pytest
import torch

from optmem import blockwise, ops, reference
from optmem.errors import InputError
from optmem.kernels.launch import (
    STREAMING_MULTIPROCESSORS,
    WIDEST_GRID,
    GridTile,
    cdiv,
    global_attention_tile,
    global_attention_tiles,
    row_blocks,
)
from optmem.native import native
from optmem.ops import vision
from optmem.testing import assert_close, assert_equal, every_other, fenced, generator, global_attention_inputs, guarded

CPU = torch.device("cpu")
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def triton_kernel():
    pytest.importorskip("triton")
    return import_module("optmem.kernels.global_attention")


def run_triton(qkv, *tables):
    """The launcher itself, on inputs and an output between guard bands."""
    kernel = triton_kernel()
    with guarded((*qkv.shape[:3], qkv.shape[3] // 3), qkv.dtype, qkv.device) as out:
        kernel.global_attention(*map(fenced, (qkv, *tables)), out)
    return out


IMPLEMENTATIONS = {"triton": (run_triton, DEVICE), "cpu": (ops.global_attention, CPU)}
if DEVICE.type == "cuda":
    IMPLEMENTATIONS["cuda"] = (ops.global_attention, DEVICE)


def exact(*inputs):
    return reference.global_attention(*(tensor.double() for tensor in inputs))


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("num_grids", "grid", "heads", "head_dim"),
    [
        (1, (1, 1), 1, 1),  # one patch sees itself
        (2, (1, 7), 3, 5),  # a single row
        (3, (7, 1), 1, 8),  # a single column
        (2, (5, 11), 2, 17),
        (1, (16, 16), 2, 64),
    ],
)
def test_matches_reference(implementation, dtype, num_grids, grid, heads, head_dim):
    run, device = IMPLEMENTATIONS[implementation]
    inputs = global_attention_inputs(num_grids, grid, heads, head_dim, dtype, device)
    fences = [fenced(tensor) for tensor in inputs]
    assert_close(run(*fences), reference.global_attention(*inputs), exact=exact(*inputs))


TILES = [GridTile(128, 32, 16, 8, 2), GridTile(64, 32, 16, 4, 2), GridTile(16, 32, 16, 8, 1)]


@pytest.mark.parametrize("tile", TILES, ids=lambda tile: str(tile.BLOCK_M))
@pytest.mark.parametrize("grid", [(3, 33), (2, 40), (5, 48)])
def test_triton_tiles(grid, tile, monkeypatch):
    """Rows in two products, tiles that begin and end inside a row, more than one of them."""
    monkeypatch.setattr(triton_kernel(), "global_attention_tile", lambda *_: tile)
    inputs = global_attention_inputs(1, grid, 2, 24, torch.bfloat16, DEVICE)
    assert_close(run_triton(*inputs), reference.global_attention(*inputs), exact=exact(*inputs))


def test_triton_tables_of_several_products():
    """Relative rows are multiplied 64 at a time: a row of 80 takes three products, of 96 the last is one short of full."""
    for width in (80, 96):
        inputs = global_attention_inputs(1, (2, width), 1, 16, torch.float16, DEVICE)
        assert_close(run_triton(*inputs), reference.global_attention(*inputs), exact=exact(*inputs))


def test_grids_that_are_too_wide_and_heads_too_large_are_taken_in_blocks():
    for grid, head_dim in (((1, WIDEST_GRID + 1), 8), ((2, 3), 80)):
        inputs = global_attention_inputs(1, grid, 1, head_dim, torch.float32, DEVICE)
        assert_equal(vision._global_attention_cuda(*inputs), blockwise.global_attention(*inputs))


def test_cuda_takes_the_kernel(monkeypatch):
    asked = []
    kernel = triton_kernel()
    monkeypatch.setattr(kernel, "global_attention", lambda *tensors: asked.append(tensors))
    inputs = global_attention_inputs(2, (3, 5), 2, 8, torch.float32, DEVICE)
    out = vision._global_attention_cuda(*inputs)
    ((*given, target),) = asked
    assert all(a is b for a, b in zip(given, inputs, strict=True))
    assert target is out


@pytest.mark.parametrize("block", [1, 100, 1700, 10_000])
def test_blocks_of_any_size_give_the_same_answer(block, monkeypatch):
    """Rows of one head, a whole head, several heads, with a smaller block at the end."""
    inputs = global_attention_inputs(3, (5, 6), 3, 8, torch.float32, CPU)
    monkeypatch.setattr(blockwise, "BLOCK", block)
    covered = torch.zeros(9, 5, dtype=torch.int64)
    for heads, rows in blockwise._blocks(9, 5, 6):
        covered[heads, rows] += 1
    assert covered.eq(1).all()
    assert_close(ops.global_attention(*inputs), reference.global_attention(*inputs), exact=exact(*inputs))


def test_means_what_it_says():
    """One query, by hand: q.k scaled, plus q with the rows of both tables at its distance from the key."""
    (height, width), head_dim = (3, 4), 8
    qkv, rel_pos_h, rel_pos_w = global_attention_inputs(1, (height, width), 2, head_dim, torch.float32, CPU)
    actual = ops.global_attention(qkv, rel_pos_h, rel_pos_w)
    head, row, column = 1, 2, 1
    q, k, v = qkv[0].unflatten(-1, (3, 2, head_dim))[:, :, :, head].unbind(2)
    query = q[row, column]
    logits = torch.stack(
        [
            query @ k[i, j] / head_dim**0.5 + query @ rel_pos_h[row - i + height - 1] + query @ rel_pos_w[column - j + width - 1]
            for i in range(height)
            for j in range(width)
        ]
    )
    expected = logits.softmax(0) @ v.flatten(0, 1)
    torch.testing.assert_close(actual[0, row, column].view(2, head_dim)[head], expected)


def test_large_logits_do_not_overflow():
    qkv, rel_pos_h, rel_pos_w = global_attention_inputs(1, (4, 4), 1, 16, torch.float32, DEVICE)
    out = ops.global_attention(qkv * 1000, rel_pos_h, rel_pos_w)
    assert out.isfinite().all()


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_nan_stays_in_its_grid_and_head(implementation):
    _, device = IMPLEMENTATIONS[implementation]
    run = triton_kernel().global_attention if implementation == "triton" else None
    qkv, *tables = global_attention_inputs(3, (4, 4), 2, 8, torch.float32, device)

    def answer():
        if run is None:
            return ops.global_attention(qkv, *tables)
        out = torch.empty(3, 4, 4, 16, device=device)
        run(qkv, *tables, out)
        return out

    expected = answer()
    qkv[1, 0, 0, 16] = torch.nan  # a key of the first head
    actual = answer()
    assert actual[1, ..., :8].isnan().all()
    actual[1, ..., :8] = expected[1, ..., :8]
    assert_equal(actual, expected)


def test_accepts_strided_inputs_and_an_empty_batch():
    inputs = global_attention_inputs(2, (3, 5), 2, 8, torch.bfloat16, DEVICE)
    assert_equal(ops.global_attention(*map(every_other, inputs)), ops.global_attention(*inputs))
    assert ops.global_attention(inputs[0][:0], *inputs[1:]).shape == (0, 3, 5, 16)


@pytest.mark.parametrize(
    ("position", "wrong", "words"),
    [
        (0, torch.zeros(2, 3, 48), r"qkv must be \[B, h, w, 3 D\]"),
        (0, torch.zeros(2, 0, 5, 48), "with h and w at least 1"),
        (0, torch.zeros(2, 3, 5, 40), r"channels of qkv must be a multiple of 3 \* 8, got 40"),
        (0, torch.zeros(2, 3, 5, 48, dtype=torch.float64), "got torch.float64"),
        (1, torch.zeros(7, 8), r"rel_pos_h must be \[5, 8\], got \[7, 8\]"),
        (1, torch.zeros(5), r"rel_pos_h must be \[2 side - 1, d\]"),
        (2, torch.zeros(9, 4), r"rel_pos_w must be \[9, 8\]"),
        (2, torch.zeros(9, 8, dtype=torch.bfloat16), "rel_pos_w must be torch.float32 as qkv is"),
        (2, torch.zeros(9, 8, device="meta"), "rel_pos_w must be on cpu as qkv is, got meta"),
    ],
)
def test_refuses_wrong_arguments(position, wrong, words):
    inputs = list(global_attention_inputs(2, (3, 5), 2, 8, torch.float32, CPU))
    inputs[position] = wrong
    with pytest.raises(InputError, match=words):
        ops.global_attention(*inputs)


def test_opcheck():
    inputs = global_attention_inputs(2, (3, 5), 2, 8, torch.float32, DEVICE)
    torch.library.opcheck(torch.ops.optmem.global_attention, inputs)
    leaves = tuple(tensor.requires_grad_() for tensor in inputs)  # traced with gradients in test_encoder.py
    torch.library.opcheck(torch.ops.optmem.global_attention, leaves, test_utils=("test_autograd_registration", "test_faketensor"))


def test_gradient_is_that_of_the_reference():
    inputs = [tensor.requires_grad_() for tensor in global_attention_inputs(2, (3, 5), 2, 8, torch.float32, DEVICE)]
    weight = torch.randn(2, 3, 5, 16, generator=generator("gradient")).to(DEVICE)
    ours, theirs = (
        torch.autograd.grad((run(*inputs) * weight).sum(), inputs) for run in (ops.global_attention, reference.global_attention)
    )
    for actual, expected in zip(ours, theirs, strict=True):
        torch.testing.assert_close(actual, expected)


def test_compiles_into_one_graph():
    inputs = global_attention_inputs(2, (3, 5), 2, 8, torch.float32, DEVICE)
    compiled = torch.compile(ops.global_attention, fullgraph=True, backend="aot_eager")
    assert_equal(compiled(*inputs), ops.global_attention(*inputs))


def test_says_who_serves_it():
    rows = {row.device: row.name for row in ops.implementations() if row.operator == "global_attention"}
    with_bf16 = native("_cpu").require().has_grid_attention(64)
    pytest.importorskip("triton")
    assert rows == {"cpu": "cpp" if with_bf16 else "torch", "cuda": "triton"}


SIDES = (512, 640, 768, 1024, 1280)


@pytest.mark.parametrize("width", range(1, WIDEST_GRID + 1))
def test_a_row_is_covered_and_little_more(width):
    main, tail = row_blocks(width)
    assert main + tail >= width
    assert main <= 64, "the gate builds no wider tile"
    assert main + tail - width < max(16, main // 2)
    assert tail == 0 or main < width


@pytest.mark.parametrize("itemsize", [2, 4])
def test_the_chooser_keeps_its_promises(itemsize):
    """Whatever it returns is among those that the gate builds, and a narrower tile is taken only to fill the device."""
    for side, num_grids, heads in itertools.product(SIDES, (1, 2, 7, 64), (1, 4, 12)):
        grid = side // 16
        tiles = global_attention_tiles(grid, itemsize)
        tile = global_attention_tile(num_grids * heads, grid, grid, itemsize)
        assert tile in tiles
        fills = cdiv(grid * grid, tiles[0].BLOCK_M) * num_grids * heads >= STREAMING_MULTIPROCESSORS
        assert tile == (tiles[0] if fills else tiles[-1])


def test_one_page_of_the_families():
    """Twelve heads: from 640 px on there is a wide tile for every multiprocessor."""
    chosen = {side: global_attention_tile(12, side // 16, side // 16, 2) for side in SIDES}
    assert {side: tile.BLOCK_M for side, tile in chosen.items()} == {512: 64, 640: 128, 768: 128, 1024: 128, 1280: 128}
    columns = {side: (tile.BLOCK_N, tile.TAIL) for side, tile in chosen.items()}
    assert columns == {512: (32, 0), 640: (32, 16), 768: (32, 16), 1024: (64, 0), 1280: (64, 16)}
