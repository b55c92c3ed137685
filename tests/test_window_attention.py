"""window_attention: every implementation against the reference, how padding counts, and what it refuses.

The Triton kernel runs on the GPU, or in the interpreter where there is none: four steps for a window of 14, and few windows.
"""

from importlib import import_module

import pytest
import torch

from optmem import blockwise, ops, reference
from optmem.errors import InputError
from optmem.kernels.launch import WIDEST_WINDOW, window_attention_tile
from optmem.native import native
from optmem.ops import vision
from optmem.testing import assert_close, assert_equal, every_other, fenced, generator, guarded, window_attention_inputs

CPU = torch.device("cpu")
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def triton_kernel():
    pytest.importorskip("triton")
    return import_module("optmem.kernels.window_attention")


def run_triton(qkv, *others):
    """The launcher itself, on inputs and an output between guard bands."""
    kernel = triton_kernel()
    with guarded((*qkv.shape[:3], qkv.shape[3] // 3), qkv.dtype, qkv.device) as out:
        kernel.window_attention(*map(fenced, (qkv, *others)), out)
    return out


IMPLEMENTATIONS = {"triton": (run_triton, DEVICE), "cpu": (ops.window_attention, CPU)}
if DEVICE.type == "cuda":
    IMPLEMENTATIONS["cuda"] = (ops.window_attention, DEVICE)


def exact(*inputs):
    return reference.window_attention(*(tensor.double() for tensor in inputs))


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("num_grids", "grid", "window", "heads", "head_dim"),
    [
        (1, (1, 1), 1, 1, 1),  # a window of one patch
        (2, (1, 1), 4, 2, 8),  # fifteen of sixteen keys are padding
        (1, (14, 14), 14, 2, 16),  # one window exactly
        (2, (13, 13), 14, 1, 16),  # padding of one
        (1, (15, 15), 14, 1, 16),  # one past a window: the last ones are all but padding
        (2, (5, 11), 4, 3, 5),  # odd grid
        (1, (3, 8), 4, 1, 8),  # padding below only
        (1, (8, 3), 4, 1, 8),  # padding to the right only
        (1, (16, 15), 14, 1, 64),  # heads and windows of the families
        (1, (17, 9), 17, 1, 20),  # a side above sixteen
    ],
)
def test_matches_reference(implementation, dtype, num_grids, grid, window, heads, head_dim):
    run, device = IMPLEMENTATIONS[implementation]
    inputs = window_attention_inputs(num_grids, grid, window, heads, head_dim, dtype, device)
    fences = [fenced(tensor) for tensor in inputs]
    assert_close(run(*fences), reference.window_attention(*inputs), exact=exact(*inputs))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_view_of_512_pixels(dtype):
    inputs = window_attention_inputs(1, (32, 32), 14, 3, 64, dtype, DEVICE)
    assert_close(ops.window_attention(*map(fenced, inputs)), reference.window_attention(*inputs), exact=exact(*inputs))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_triton_does_not_look_at_a_bias_that_no_window_needs(dtype):
    qkv, bias, *tables = window_attention_inputs(1, (8, 12), 4, 2, 8, dtype, DEVICE)
    expected = run_triton(qkv, bias, *tables)
    assert_equal(run_triton(qkv, torch.full_like(bias, torch.nan), *tables), expected)


def test_triton_keeps_a_nan_in_its_window_and_head():
    qkv, *others = window_attention_inputs(1, (9, 9), 5, 2, 16, torch.bfloat16, DEVICE)
    before = run_triton(qkv, *others)
    qkv[0, 3, 1, 48] = torch.nan  # a key of the second head
    after = torch.empty_like(before)
    triton_kernel().window_attention(qkv, *others, after)
    assert after[0, :5, :5, 16:].isnan().all()
    after[0, :5, :5, 16:] = before[0, :5, :5, 16:]
    assert_equal(after, before)


@pytest.mark.parametrize("size", [1e3, 1e15])
def test_triton_large_logits_are_finite(size):
    qkv, *others = window_attention_inputs(1, (5, 7), 5, 1, 16, torch.bfloat16, DEVICE)
    qkv[..., :16] = qkv[..., :16] * size
    assert run_triton(qkv, *others).isfinite().all()


def test_triton_terms_beyond_fp16_are_the_largest_there_are():
    """A term of infinity times a zero would be no number."""
    qkv, bias, *tables = window_attention_inputs(1, (5, 7), 5, 1, 16, torch.float16, DEVICE)
    qkv[..., :32] = 0.0
    qkv[..., :16] = 1000.0
    tables[0][:] = torch.linspace(-60, 60, 9, device=DEVICE)[:, None]
    assert run_triton(qkv, bias, *tables).isfinite().all()


def test_windows_that_are_too_wide_and_heads_too_large_are_taken_in_blocks():
    for window, head_dim in ((WIDEST_WINDOW + 1, 8), (3, 80)):
        inputs = window_attention_inputs(1, (4, 5), window, 1, head_dim, torch.float32, DEVICE)
        assert_equal(vision._window_attention_cuda(*inputs), blockwise.window_attention(*inputs))


def test_cuda_takes_the_kernel(monkeypatch):
    asked = []
    monkeypatch.setattr(triton_kernel(), "window_attention", lambda *tensors: asked.append(tensors))
    inputs = window_attention_inputs(2, (3, 5), 4, 2, 8, torch.float32, DEVICE)
    out = vision._window_attention_cuda(*inputs)
    ((*given, target),) = asked
    assert all(a is b for a, b in zip(given, inputs, strict=True))
    assert target is out


@pytest.mark.parametrize("itemsize", [2, 4])
@pytest.mark.parametrize("side", range(1, WIDEST_WINDOW + 1))
def test_the_steps_cover_a_window(side, itemsize):
    tile = window_attention_tile(side, itemsize)
    in_full_steps = tile.FULL * tile.BLOCK_N
    assert in_full_steps <= side * side <= in_full_steps + tile.TAIL, "a full step has no key beyond the window"
    assert tile.TAIL <= tile.BLOCK_N
    assert (tile.TAIL == 0) == (in_full_steps == side * side)


def test_a_grid_of_one_window_is_global():
    qkv, bias, rel_pos_h, rel_pos_w = window_attention_inputs(2, (6, 6), 6, 2, 8, torch.float32, DEVICE)
    torch.testing.assert_close(
        ops.window_attention(qkv, bias, rel_pos_h, rel_pos_w), ops.global_attention(qkv, rel_pos_h, rel_pos_w)
    )


def test_windows_do_not_see_each_other():
    qkv, *others = window_attention_inputs(1, (8, 8), 4, 2, 8, torch.float32, DEVICE)
    before = ops.window_attention(qkv, *others)
    qkv[:, :4, :4] += 1
    after = ops.window_attention(qkv, *others)
    changed = (after != before).any(-1)[0]
    assert changed[:4, :4].all()
    assert not changed[4:].any()
    assert not changed[:, 4:].any()


def test_padding_takes_part_as_the_bias():
    """The padded grid written out, with the bias where the projection of a zero would be, gives the same answer."""
    qkv, bias, *tables = window_attention_inputs(2, (5, 6), 4, 2, 8, torch.float32, DEVICE)
    padded = bias.expand(2, 8, 8, 48).clone()
    padded[:, :5, :6] = qkv
    unused = torch.full_like(bias, torch.nan)  # nothing is beyond the grid any more
    torch.testing.assert_close(ops.window_attention(qkv, bias, *tables), ops.window_attention(padded, unused, *tables)[:, :5, :6])


def test_padding_that_is_masked_would_be_another_answer():
    qkv, bias, *tables = window_attention_inputs(1, (5, 6), 4, 2, 8, torch.float32, DEVICE)
    far_away = bias.clone()
    far_away[16:32] = 0  # keys that no query likes or dislikes
    far_away[32:] = 0
    difference = ops.window_attention(qkv, bias, *tables) - ops.window_attention(qkv, far_away, *tables)
    assert difference[:, :4, :4].abs().max() < 1e-5
    assert difference[:, 4:, 4:].abs().max() > 0.1


def test_accepts_strided_inputs_and_an_empty_batch():
    inputs = window_attention_inputs(2, (3, 5), 4, 2, 8, torch.bfloat16, DEVICE)
    assert_equal(ops.window_attention(*map(every_other, inputs)), ops.window_attention(*inputs))
    assert ops.window_attention(inputs[0][:0], *inputs[1:]).shape == (0, 3, 5, 16)


@pytest.mark.parametrize(
    ("position", "wrong", "words"),
    [
        (0, torch.zeros(2, 3, 48), r"qkv must be \[B, h, w, 3 D\]"),
        (0, torch.zeros(2, 3, 5, 50), r"a multiple of 3 \* 8, got 50"),
        (1, torch.zeros(16), r"bias must be \[48\], got \[16\]"),
        (1, torch.zeros(48, dtype=torch.float16), "bias must be torch.float32 as qkv is"),
        (2, torch.zeros(9, 8), r"rel_pos_w must be \[9, 8\] as rel_pos_h is, got \[7, 8\]"),
        (3, torch.zeros(7), r"rel_pos_w must be \[2 side - 1, d\]"),
        (3, torch.zeros(7, 4), r"rel_pos_w must be \[7, 8\] as rel_pos_h is, got \[7, 4\]"),
    ],
)
def test_refuses_wrong_arguments(position, wrong, words):
    inputs = list(window_attention_inputs(2, (3, 5), 4, 2, 8, torch.float32, CPU))
    inputs[position] = wrong
    with pytest.raises(InputError, match=words):
        ops.window_attention(*inputs)


def test_refuses_tables_of_no_window():
    qkv, bias, _, _ = window_attention_inputs(2, (3, 5), 4, 2, 8, torch.float32, CPU)
    with pytest.raises(InputError, match="rel_pos_h must have 2 side - 1 rows, got 6"):
        ops.window_attention(qkv, bias, torch.zeros(6, 8), torch.zeros(6, 8))


def test_opcheck():
    inputs = window_attention_inputs(2, (3, 5), 4, 2, 8, torch.float32, DEVICE)
    torch.library.opcheck(torch.ops.optmem.window_attention, inputs)
    leaves = tuple(tensor.requires_grad_() for tensor in inputs)  # traced with gradients in test_encoder.py
    torch.library.opcheck(torch.ops.optmem.window_attention, leaves, test_utils=("test_autograd_registration", "test_faketensor"))


def test_gradient_is_that_of_the_reference():
    inputs = [tensor.requires_grad_() for tensor in window_attention_inputs(2, (3, 5), 4, 2, 8, torch.float32, DEVICE)]
    weight = torch.randn(2, 3, 5, 16, generator=generator("gradient")).to(DEVICE)
    ours, theirs = (
        torch.autograd.grad((run(*inputs) * weight).sum(), inputs) for run in (ops.window_attention, reference.window_attention)
    )
    for actual, expected in zip(ours, theirs, strict=True):
        torch.testing.assert_close(actual, expected)


def test_compiles_into_one_graph():
    inputs = window_attention_inputs(2, (3, 5), 4, 2, 8, torch.float32, DEVICE)
    compiled = torch.compile(ops.window_attention, fullgraph=True, backend="aot_eager")
    assert_equal(compiled(*inputs), ops.window_attention(*inputs))


def test_says_who_serves_it():
    rows = {row.device: row.name for row in ops.implementations() if row.operator == "window_attention"}
    with_bf16 = native("_cpu").require().has_grid_attention(64)
    pytest.importorskip("triton")
    assert rows == {"cpu": "cpp" if with_bf16 else "torch", "cuda": "triton"}
