"""Attention over grids in C++: bf16 with heads of 16 to 64, behind global_attention and window_attention."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from optmem import ops, reference
from optmem.native import native
from optmem.testing import assert_close, assert_equal, fenced, forced_isa, generator, window_attention_inputs

CPU = torch.device("cpu")
cpu = native("_cpu").module
pytestmark = pytest.mark.skipif(
    cpu is None or not cpu.has_grid_attention(64), reason="optmem._cpu multiplies bf16 only where AVX-512 BF16 is"
)


def inputs_of(num_grids, grid, window, heads, head_dim):
    return window_attention_inputs(num_grids, grid, window, heads, head_dim, torch.bfloat16, CPU)


def check_against_reference(inputs):
    out = ops.window_attention(*map(fenced, inputs))
    exact = reference.window_attention(*(tensor.double() for tensor in inputs))
    assert_close(out, reference.window_attention(*inputs), exact=exact, slack=1.0)


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_any_shape_matches_the_reference(data):
    side = st.integers(1, 23)
    grid, window = (data.draw(side), data.draw(side)), data.draw(st.integers(1, 17))
    check_against_reference(inputs_of(data.draw(st.integers(1, 2)), grid, window, 2, data.draw(st.sampled_from([16, 32, 48, 64]))))


@pytest.mark.parametrize("grid", [(32, 32), (40, 40), (1, 300), (300, 1), (5, 61)])
def test_global_views_match_the_reference(grid):
    """More keys than one chunk, more queries than one task, rows of every length beside a register's sixteen."""
    qkv, *_ = inputs_of(1, grid, 1, 2, 64)
    rng = generator(f"tables {grid}")
    tables = [(torch.randn(2 * side - 1, 64, generator=rng) / 8).bfloat16() for side in grid]
    exact = reference.global_attention(*(tensor.double() for tensor in (qkv, *tables)))
    out = ops.global_attention(*map(fenced, (qkv, *tables)))
    assert_close(out, reference.global_attention(qkv, *tables), exact=exact, slack=1.0)


def test_a_view_does_not_know_what_else_is_computed():
    qkv, *rest = inputs_of(5, (20, 17), 14, 2, 64)
    together = ops.window_attention(qkv, *rest)
    threads = torch.get_num_threads()
    for count in (1, 3, 16):
        torch.set_num_threads(count)
        try:
            for view in range(5):
                assert_equal(ops.window_attention(qkv[view : view + 1], *rest), together[view : view + 1])
        finally:
            torch.set_num_threads(threads)


def test_a_nan_stays_in_its_window_and_head():
    qkv, *rest = inputs_of(1, (20, 20), 14, 2, 16)
    before = ops.window_attention(qkv, *rest)
    qkv[0, 3, 5, 16] = torch.nan  # the second head's query; its key follows at 48
    after = ops.window_attention(qkv, *rest)
    assert after[0, 3, 5, 16:].isnan().all()
    after[0, 3, 5, 16:] = before[0, 3, 5, 16:]
    assert_equal(after, before)
    qkv[0, 3, 5, 48] = torch.nan
    after = ops.window_attention(qkv, *rest)
    assert after[0, :14, :14, 16:].isnan().all()
    assert_equal(after[..., :16], before[..., :16])
    assert_equal(after[0, 14:], before[0, 14:])


def test_a_bias_that_no_window_needs_is_not_looked_at():
    qkv, bias, *tables = inputs_of(2, (8, 12), 4, 2, 32)
    expected = ops.window_attention(qkv, bias, *tables)
    assert_equal(ops.window_attention(qkv, torch.full_like(bias, torch.nan), *tables), expected)


@pytest.mark.parametrize("size", [1e-30, 1e3, 1e15])
def test_small_and_large_logits_are_finite(size):
    qkv, *rest = inputs_of(1, (9, 30), 14, 1, 64)
    scaled = qkv.clone()
    scaled[..., :64] = scaled[..., :64] * size
    out = ops.window_attention(scaled, *rest)
    assert out.isfinite().all()
    # A weighted mean of values lies among them, the padding's included.
    values = torch.cat([qkv[..., 128:].reshape(-1, 64), rest[0][None, 128:]])
    assert values.min() <= out.min() <= out.max() <= values.max()


def test_other_instruction_sets_take_the_blocks_of_torch():
    inputs = inputs_of(1, (9, 9), 4, 1, 64)
    with forced_isa("plain"):
        assert not cpu.has_grid_attention(64)
        in_blocks = ops.window_attention(*inputs)
    exact = reference.window_attention(*(tensor.double() for tensor in inputs))
    assert_close(in_blocks, reference.window_attention(*inputs), exact=exact)


@pytest.mark.parametrize("dim", [0, -16, 8, 24, 80, 128])
def test_other_heads_are_not_its_own(dim):
    assert not cpu.has_grid_attention(dim)


def test_the_binding_refuses_what_would_overrun():
    qkv, bias, rel_pos_h, rel_pos_w = (tensor.view(torch.uint16).numpy() for tensor in inputs_of(1, (4, 4), 4, 2, 16))
    out = torch.empty(1, 4, 4, 32, dtype=torch.uint16).numpy()
    for wrong in [
        (qkv[..., :95].copy(), bias, rel_pos_h, rel_pos_w, out, 1),
        (qkv, bias[:-1], rel_pos_h, rel_pos_w, out, 1),
        (qkv, bias, rel_pos_h[:-1], rel_pos_w, out, 1),
        (qkv, bias, rel_pos_h, rel_pos_w[:, :8].copy(), out, 1),
        (qkv, bias, rel_pos_h, rel_pos_w, out[..., :16].copy(), 1),
        (qkv, bias, rel_pos_h, rel_pos_w, out, 0),
    ]:
        with pytest.raises(ValueError, match="must"):
            cpu.grid_attention(*wrong)
