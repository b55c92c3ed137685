"""Attention inside windows with decomposed relative positions, by addressing: no windows, no padding and no bias in memory.

    out[m] = sum over keys k of m's window of softmax(logit[m, k]) v[k], with the logits of global_attention and the window's tables

    qkv        [B, H, W, 3 * heads * d] of the grid alone, bias [3 * heads * d], rel_pos_h and rel_pos_w [2 S - 1, d],
               all fp32, bf16 or fp16
    out        [B, H, W, heads * d] of the same type, rounded once from fp32

Windows of S x S start in the upper left corner.  Where one goes beyond the grid its keys and values are the projection's bias and
count like any other; its queries there do not exist, and no work is done for them.

A tile takes queries of one window and head.  What its logits have beside q . key are two products with zeros and ones, which tell a
key's row and column: 16 more channels each on the tensor cores, and nothing is added or looked up in registers.
The terms are made in fp32 and rounded to the type once, where torch rounds them, their sum and the logits.

Assumes contiguous tensors on one device, S of at most 32, d of at most 64, and fewer than 2^31 tiles and values of a grid.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from optmem.kernels.launch import (
    WIDEST_GRID_HEAD,
    WIDEST_WINDOW,
    GateCase,
    WindowTile,
    cdiv,
    tile_side,
    window_attention_tile,
)

LOG2_E: tl.constexpr = tl.constexpr(1.4426950408889634)  # the hardware has powers of two


@triton.jit
def side_terms(b_q, table, o_side, scale, S: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_S: tl.constexpr):
    """q . table[own - i + S - 1] / scale for every row (or column) i of the window: [BLOCK_M, BLOCK_S] in the table's type."""
    o_d = tl.arange(0, BLOCK_D)
    o_p = tl.arange(0, 2 * BLOCK_S)
    m_p = (o_d < D)[:, None] & (o_p < 2 * S - 1)[None, :]
    b_table = tl.load(table + o_p[None, :] * D + o_d[:, None], mask=m_p, other=0.0)  # [BLOCK_D, 2 * BLOCK_S]
    b_products = tl.dot(b_q, b_table, input_precision="ieee") / scale  # [BLOCK_M, 2 * BLOCK_S]
    if table.dtype.element_ty == tl.float16:  # times a zero, infinity would be no number
        b_products = tl.minimum(tl.maximum(b_products, -65504.0), 65504.0)
    b_at = tl.maximum(o_side[:, None] - tl.arange(0, BLOCK_S)[None, :] + (S - 1), 0)
    return tl.gather(b_products, tl.minimum(b_at, 2 * S - 2), 1).to(table.dtype.element_ty)


@triton.jit
def take_keys(
    b_top,  # [BLOCK_M], the largest logit so far, in powers of two
    b_sum,  # [BLOCK_M]
    b_out,  # [BLOCK_M, BLOCK_D]
    b_q,
    b_terms_h,
    b_terms_w,
    p_k,  # of the grid and the head
    p_bias,  # of the head's keys
    o_n,  # keys of the window, row by row
    top,  # row and column of the grid in which the window starts
    left,
    H,
    W,
    WIDTH,
    to_log2,
    beyond,  # whether the window goes beyond the grid; where none does, the bias is not looked at
    S: tl.constexpr,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_S: tl.constexpr,
    MASKED: tl.constexpr,  # o_n goes beyond the window
):
    o_d = tl.arange(0, BLOCK_D)
    o_s = tl.arange(0, BLOCK_S)
    m_d = o_d < D
    o_y = o_n // S
    o_x = o_n % S
    m_n = (top + o_y < H) & (left + o_x < W)
    if MASKED:
        m_n = m_n & (o_n < S * S)
    o_k = ((top + o_y) * W + left + o_x) * 3 * WIDTH
    b_no_k = tl.load(p_bias + o_d, mask=m_d & beyond, other=0.0)  # [BLOCK_D]
    b_no_v = tl.load(p_bias + WIDTH + o_d, mask=m_d & beyond, other=0.0)  # [BLOCK_D]

    m_k = m_d[:, None] & m_n[None, :]
    b_k = tl.load(p_k + o_k[None, :] + o_d[:, None], mask=m_k, other=b_no_k[:, None])  # [BLOCK_D, len(o_n)]
    b_in_row = (o_s[:, None] == o_y[None, :]).to(b_terms_h.dtype)  # [BLOCK_S, len(o_n)]
    b_in_column = (o_s[:, None] == o_x[None, :]).to(b_terms_w.dtype)
    b_s = tl.dot(b_terms_h, b_in_row, input_precision="ieee")
    b_s = tl.dot(b_terms_w, b_in_column, b_s, input_precision="ieee")
    b_s = tl.dot(b_q, b_k, b_s, input_precision="ieee") * to_log2  # [BLOCK_M, len(o_n)]
    if MASKED:
        b_s = tl.where((o_n < S * S)[None, :], b_s, float("-inf"))

    b_new = tl.maximum(b_top, tl.max(b_s, 1))
    b_p = tl.exp2(b_s - b_new[:, None])
    b_shrink = tl.exp2(b_top - b_new)
    b_sum = b_sum * b_shrink + tl.sum(b_p, 1)
    m_v = m_n[:, None] & m_d[None, :]
    b_v = tl.load(p_k + WIDTH + o_k[:, None] + o_d[None, :], mask=m_v, other=b_no_v[None, :])  # [len(o_n), BLOCK_D]
    b_out = tl.dot(b_p.to(b_v.dtype), b_v, b_out * b_shrink[:, None], input_precision="ieee")
    return b_new, b_sum, b_out


@triton.jit(do_not_specialize=["H", "W"])
def window_attention_kernel(
    qkv,  # [B, H, W, 3 * WIDTH]
    bias,  # [3 * WIDTH]
    rel_pos_h,  # [2 S - 1, D]
    rel_pos_w,  # [2 S - 1, D]
    out,  # [B, H, W, WIDTH]
    H,
    W,
    WIDTH,  # heads * D
    scale,  # of q . key: D ** -0.5
    S: tl.constexpr,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_S: tl.constexpr,  # rows or columns of a window
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    FULL: tl.constexpr,
    TAIL: tl.constexpr,
) -> None:
    # Neighbouring programs share a window's keys and values, and then the lines of memory that its heads share.
    tiles_m = tl.cdiv(S * S, BLOCK_M)
    heads = WIDTH // D
    columns = tl.cdiv(W, S)
    windows = tl.cdiv(H, S) * columns
    i_m = tl.program_id(0) % tiles_m
    i_head = (tl.program_id(0) // tiles_m) % heads
    i_window = (tl.program_id(0) // tiles_m // heads) % windows
    i_grid = tl.program_id(0) // tiles_m // heads // windows
    top = i_window // columns * S
    left = i_window % columns * S
    across = tl.minimum(W - left, S)  # queries of the window that exist
    queries = tl.minimum(H - top, S) * across
    if i_m * BLOCK_M >= queries:
        return

    o_m = i_m * BLOCK_M + tl.arange(0, BLOCK_M)
    o_d = tl.arange(0, BLOCK_D)
    o_y = o_m // across
    o_x = o_m % across
    o_token = (top + o_y) * W + left + o_x
    m_q = (o_m < queries)[:, None] & (o_d < D)[None, :]
    p_q = qkv + i_grid.to(tl.int64) * H * W * 3 * WIDTH + i_head * D
    b_q = tl.load(p_q + o_token[:, None] * 3 * WIDTH + o_d[None, :], mask=m_q, other=0.0)  # [BLOCK_M, BLOCK_D]
    b_terms_h = side_terms(b_q, rel_pos_h, o_y, scale, S, D, BLOCK_D, BLOCK_S)  # [BLOCK_M, BLOCK_S]
    b_terms_w = side_terms(b_q, rel_pos_w, o_x, scale, S, D, BLOCK_D, BLOCK_S)

    p_k = p_q + WIDTH
    p_bias = bias + WIDTH + i_head * D
    beyond = (top + S > H) | (left + S > W)
    to_log2 = scale * LOG2_E
    b_top = tl.full([BLOCK_M], float("-inf"), dtype=tl.float32)
    b_sum = tl.zeros([BLOCK_M], dtype=tl.float32)
    b_out = tl.zeros([BLOCK_M, BLOCK_D], dtype=tl.float32)
    for start in range(0, FULL * BLOCK_N, BLOCK_N):
        o_n = start + tl.arange(0, BLOCK_N)
        b_top, b_sum, b_out = take_keys(
            b_top, b_sum, b_out, b_q, b_terms_h, b_terms_w, p_k, p_bias, o_n, top, left, H, W, WIDTH, to_log2, beyond,
            S, D, BLOCK_D, BLOCK_S, False,
        )  # fmt: skip
    if TAIL > 0:
        o_t = FULL * BLOCK_N + tl.arange(0, TAIL)
        b_top, b_sum, b_out = take_keys(
            b_top, b_sum, b_out, b_q, b_terms_h, b_terms_w, p_k, p_bias, o_t, top, left, H, W, WIDTH, to_log2, beyond,
            S, D, BLOCK_D, BLOCK_S, True,
        )  # fmt: skip

    p_out = out + i_grid.to(tl.int64) * H * W * WIDTH + i_head * D
    b_out = b_out / b_sum[:, None]
    tl.store(p_out + o_token[:, None] * WIDTH + o_d[None, :], b_out.to(out.dtype.element_ty), mask=m_q)


def window_attention(qkv: Tensor, bias: Tensor, rel_pos_h: Tensor, rel_pos_w: Tensor, out: Tensor) -> None:
    """Fills out.  ops.window_attention is the checked way in."""
    if out.numel() == 0:
        return
    assert all(tensor.is_contiguous() for tensor in (qkv, bias, rel_pos_h, rel_pos_w, out))
    num_grids, height, width, channels = qkv.shape
    head_dim, side = rel_pos_h.shape[1], (rel_pos_h.shape[0] + 1) // 2
    assert out.shape == (num_grids, height, width, channels // 3)
    assert qkv[0].numel() < 2**31
    assert side <= WIDEST_WINDOW
    assert head_dim <= WIDEST_GRID_HEAD
    tile = window_attention_tile(side, qkv.element_size())
    arguments, options = specialise(qkv, bias, rel_pos_h, rel_pos_w, out, tile)
    windows = num_grids * cdiv(height, side) * cdiv(width, side)
    programs = cdiv(side * side, tile.BLOCK_M) * windows * (channels // 3 // head_dim)
    assert programs < 2**31
    with torch.cuda.device_of(out):
        window_attention_kernel[(programs,)](*arguments, **options)


def specialise(
    qkv: Tensor, bias: Tensor, rel_pos_h: Tensor, rel_pos_w: Tensor, out: Tensor, tile: WindowTile
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """What a launch hands to the kernel: arguments in its order, then constexprs and launch options by name."""
    head_dim, side = rel_pos_h.shape[1], (rel_pos_h.shape[0] + 1) // 2
    sizes = (*qkv.shape[1:3], qkv.shape[3] // 3, head_dim**-0.5)
    options = {"S": side, "D": head_dim, "BLOCK_D": tile_side(head_dim), "BLOCK_S": tile_side(side), **tile._asdict()}
    return (qkv, bias, rel_pos_h, rel_pos_w, out, *sizes), options


def gate_cases() -> Iterator[GateCase]:
    """The windows of the families and of nano; a window that is all tail, the largest one, other types."""
    sizes = [(torch.bfloat16, 14, 64), (torch.bfloat16, 8, 48), (torch.bfloat16, 5, 5), (torch.bfloat16, WIDEST_WINDOW, 64)]
    sizes += [(torch.float16, 14, 64), (torch.float32, 14, 64), (torch.float32, 8, 48)]
    for dtype, side, head_dim in sizes:
        qkv = torch.empty(1, 64, 64, 3 * 12 * head_dim, dtype=dtype, device="meta")
        table = torch.empty(2 * side - 1, head_dim, dtype=dtype, device="meta")
        tile = window_attention_tile(side, dtype.itemsize)
        arguments, options = specialise(qkv, qkv[0, 0, 0], table, table, qkv[..., : 12 * head_dim], tile)
        name = f"{str(dtype).removeprefix('torch.')}-s{side}-d{head_dim}"
        yield GateCase(name, window_attention_kernel, arguments, options, tensor_cores=dtype.itemsize == 2)
