"""Attention over a whole grid with decomposed relative positions; neither logits nor their bias exist in memory.

    out[b, m, n] = sum over keys k of softmax(logit[m, k]) v[b, k, n]
    logit[m, k]  = q[m] . key[k] / sqrt(d) + q[m] . rel_pos_h[y(m) - y(k) + h - 1] + q[m] . rel_pos_w[x(m) - x(k) + w - 1]

    qkv        [B, h, w, 3 * heads * d], rel_pos_h [2 h - 1, d], rel_pos_w [2 w - 1, d], all fp32, bf16 or fp16
    out        [B, h, w, heads * d] of the same type, rounded once from fp32

A step takes one grid row of keys.  The last term is then the same tile in every step: it is made once and stays in registers, with
-inf where a row of keys is padded to a power of two, which is all the masking there is.  The second term is one number a query,
which moves the maximum and costs nothing per logit; the table rows for a tile's few grid rows are multiplied like 16 more keys.
Terms are made in fp32 from the stored q, where torch in 16 bits rounds each of them and their sum.

Assumes contiguous tensors on one device, w of at most 96, d of at most 64, and fewer than 2^31 tiles.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from optmem.kernels.launch import (
    WIDEST_GRID,
    WIDEST_GRID_HEAD,
    GateCase,
    GridTile,
    cdiv,
    global_attention_tile,
    global_attention_tiles,
    tile_side,
)

LOG2_E: tl.constexpr = tl.constexpr(1.4426950408889634)  # the hardware has powers of two


@triton.jit
def exponentials(b_logits, b_top, b_row):
    """exp of logits and their row's term over the maximum, in powers of two; and their sum."""
    b_p = tl.exp2(b_logits - (b_top - b_row)[:, None])
    return b_p, tl.sum(b_p, 1)


@triton.jit
def column_terms(b_q, rel_pos_w, o_x, o_n, W: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_P: tl.constexpr):
    """q . rel_pos_w[x - n + W - 1] in powers of two, -inf beyond the row.

    Products with BLOCK_P rows of the table at a time, of which every query takes the one at its distance from the column.
    """
    o_d = tl.arange(0, BLOCK_D)
    b_row = o_x[:, None] - o_n[None, :] + (W - 1)  # of the table
    b_terms = tl.full([b_row.shape[0], b_row.shape[1]], float("-inf"), dtype=tl.float32)
    for start in range(0, 2 * W - 1, BLOCK_P):
        o_p = start + tl.arange(0, BLOCK_P)
        m_p = (o_d < D)[:, None] & (o_p < 2 * W - 1)[None, :]
        b_table = tl.load(rel_pos_w + o_p[None, :] * D + o_d[:, None], mask=m_p, other=0.0)  # [BLOCK_D, BLOCK_P]
        b_products = tl.dot(b_q, b_table, input_precision="ieee") * LOG2_E  # [len(o_x), BLOCK_P]
        b_at = b_row - start
        m_at = (b_at >= 0) & (b_at < BLOCK_P) & (o_n < W)[None, :]
        b_terms = tl.where(m_at, tl.gather(b_products, tl.where(m_at, b_at, 0), 1), b_terms)
    return b_terms


# The height changes with the page and moves no address's alignment; the width is in every step's tile.
@triton.jit(do_not_specialize=["H"])
def global_attention_kernel(
    qkv,  # [B, H, W, 3 * WIDTH]
    rel_pos_h,  # [2 H - 1, D]
    rel_pos_w,  # [2 W - 1, D]
    out,  # [B, H, W, WIDTH]
    H,
    WIDTH,  # heads * D, whose divisibility the compiler knows: that of a third of 3 * WIDTH it would not, and loads would be narrow
    scale,  # of q . key: D ** -0.5
    W: tl.constexpr,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_P: tl.constexpr,  # rows of rel_pos_w in one product
    BLOCK_S: tl.constexpr,  # grid rows that the queries of a tile can touch
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    TAIL: tl.constexpr,
) -> None:
    # Neighbouring programs share keys and values, which then come from the L2 cache.
    tokens = H * W
    tiles_m = tl.cdiv(tokens, BLOCK_M)
    heads = WIDTH // D
    C = 3 * WIDTH  # from one token to the next
    i_m = tl.program_id(0) % tiles_m
    i_head = (tl.program_id(0) // tiles_m) % heads
    i_grid = (tl.program_id(0) // tiles_m) // heads

    o_m = i_m * BLOCK_M + tl.arange(0, BLOCK_M)
    o_n = tl.arange(0, BLOCK_N)
    o_d = tl.arange(0, BLOCK_D)
    m_d = o_d < D
    m_q = (o_m < tokens)[:, None] & m_d[None, :]
    p_q = qkv + i_grid.to(tl.int64) * tokens * C + i_head * D  # with 32-bit offsets from here on, sm_80 spills
    b_q = tl.load(p_q + o_m.to(tl.int64)[:, None] * C + o_d[None, :], mask=m_q, other=0.0)  # [BLOCK_M, BLOCK_D]

    o_x = o_m % W
    b_column = column_terms(b_q, rel_pos_w, o_x, o_n, W, D, BLOCK_D, BLOCK_P)  # [BLOCK_M, BLOCK_N]
    if TAIL > 0:
        o_t = BLOCK_N + tl.arange(0, TAIL)
        b_column_tail = column_terms(b_q, rel_pos_w, o_x, o_t, W, D, BLOCK_D, BLOCK_P)  # [BLOCK_M, TAIL]

    # The grid rows of this tile's queries, top to bottom.
    i_y = i_m * BLOCK_M // W
    o_s = tl.arange(0, BLOCK_S)
    m_s = m_d[:, None] & (i_y + o_s < H)[None, :]
    m_row = (o_m // W - i_y)[:, None] == o_s[None, :]

    p_k = p_q + WIDTH
    p_v = p_q + 2 * WIDTH
    b_top = tl.full([BLOCK_M], float("-inf"), dtype=tl.float32)
    b_sum = tl.zeros([BLOCK_M], dtype=tl.float32)
    b_out = tl.zeros([BLOCK_M, BLOCK_D], dtype=tl.float32)
    to_log2 = scale * LOG2_E
    for i in range(H):
        p_h = rel_pos_h + (i_y - i + H - 1 + o_s)[None, :] * D + o_d[:, None]
        b_near = tl.load(p_h, mask=m_s, other=0.0)  # [BLOCK_D, BLOCK_S]
        b_rows = tl.dot(b_q, b_near, input_precision="ieee")  # [BLOCK_M, BLOCK_S]
        b_row = tl.sum(tl.where(m_row, b_rows, 0.0), 1) * LOG2_E  # [BLOCK_M]

        o_k = (i * W + o_n).to(tl.int64) * C
        m_k = o_n < W
        b_k = tl.load(p_k + o_k[None, :] + o_d[:, None], mask=m_d[:, None] & m_k[None, :], other=0.0)  # [BLOCK_D, BLOCK_N]
        b_s = tl.dot(b_q, b_k, input_precision="ieee") * to_log2 + b_column  # [BLOCK_M, BLOCK_N]
        b_new = tl.maximum(b_top, tl.max(b_s, 1) + b_row)
        if TAIL > 0:
            o_kt = (i * W + o_t).to(tl.int64) * C
            m_kt = o_t < W
            b_kt = tl.load(p_k + o_kt[None, :] + o_d[:, None], mask=m_d[:, None] & m_kt[None, :], other=0.0)  # [BLOCK_D, TAIL]
            b_st = tl.dot(b_q, b_kt, input_precision="ieee") * to_log2 + b_column_tail  # [BLOCK_M, TAIL]
            b_new = tl.maximum(b_new, tl.max(b_st, 1) + b_row)

        b_shrink = tl.exp2(b_top - b_new)
        b_v = tl.load(p_v + o_k[:, None] + o_d[None, :], mask=m_k[:, None] & m_d[None, :], other=0.0)  # [BLOCK_N, BLOCK_D]
        b_p, b_added = exponentials(b_s, b_new, b_row)
        b_sum = b_sum * b_shrink + b_added
        b_out = tl.dot(b_p.to(qkv.dtype.element_ty), b_v, b_out * b_shrink[:, None], input_precision="ieee")
        if TAIL > 0:
            b_vt = tl.load(p_v + o_kt[:, None] + o_d[None, :], mask=m_kt[:, None] & m_d[None, :], other=0.0)  # [TAIL, BLOCK_D]
            b_p, b_added = exponentials(b_st, b_new, b_row)
            b_sum += b_added
            b_out = tl.dot(b_p.to(qkv.dtype.element_ty), b_vt, b_out, input_precision="ieee")
        b_top = b_new

    p_out = out + i_grid.to(tl.int64) * tokens * WIDTH + i_head * D
    b_out = b_out / b_sum[:, None]
    tl.store(p_out + o_m.to(tl.int64)[:, None] * WIDTH + o_d[None, :], b_out.to(out.dtype.element_ty), mask=m_q)


def global_attention(qkv: Tensor, rel_pos_h: Tensor, rel_pos_w: Tensor, out: Tensor) -> None:
    """Fills out.  ops.global_attention is the checked way in."""
    if out.numel() == 0:
        return
    assert all(tensor.is_contiguous() for tensor in (qkv, rel_pos_h, rel_pos_w, out))
    num_grids, height, width, channels = qkv.shape
    head_dim = rel_pos_h.shape[1]
    assert out.shape == (num_grids, height, width, channels // 3)
    assert width <= WIDEST_GRID
    assert head_dim <= WIDEST_GRID_HEAD
    num_heads = num_grids * (channels // 3 // head_dim)
    tile = global_attention_tile(num_heads, height, width, qkv.element_size())
    arguments, options = specialise(qkv, rel_pos_h, rel_pos_w, out, tile)
    programs = cdiv(height * width, tile.BLOCK_M) * num_heads
    assert programs < 2**31
    with torch.cuda.device_of(out):
        global_attention_kernel[(programs,)](*arguments, **options)


def specialise(
    qkv: Tensor, rel_pos_h: Tensor, rel_pos_w: Tensor, out: Tensor, tile: GridTile
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """What a launch hands to the kernel: arguments in its order, then constexprs and launch options by name."""
    _, height, width, channels = qkv.shape
    head_dim = rel_pos_h.shape[1]
    options = {
        "W": width,
        "D": head_dim,
        "BLOCK_D": tile_side(head_dim),
        "BLOCK_P": min(64, tile_side(2 * width - 1)),
        "BLOCK_S": tile_side((tile.BLOCK_M - 2) // width + 2),
        **tile._asdict(),
    }
    return (qkv, rel_pos_h, rel_pos_w, out, height, channels // 3, head_dim**-0.5), options


def gate_cases() -> Iterator[GateCase]:
    """Every way to cut a row, both sizes of tile; other types and heads where they differ."""
    wide = [(torch.bfloat16, width, 64) for width in (32, 40, 64, 80, 96)]
    wide += [
        (torch.bfloat16, 64, 48),
        (torch.bfloat16, 7, 5),
        (torch.float16, 80, 64),
    ]
    wide += [(torch.float32, width, 64) for width in (32, 64, 80, 96)]
    narrow = [(torch.bfloat16, 32, 64), (torch.bfloat16, 64, 64)]
    for at, (dtype, width, head_dim) in [(0, size) for size in wide] + [(1, size) for size in narrow]:
        qkv = torch.empty(1, width, width, 3 * 12 * head_dim, dtype=dtype, device="meta")
        table = torch.empty(2 * width - 1, head_dim, dtype=dtype, device="meta")
        tile = global_attention_tiles(width, dtype.itemsize)[at]
        arguments, options = specialise(qkv, table, table, qkv[..., : 12 * head_dim], tile)
        name = f"{str(dtype).removeprefix('torch.')}-w{width}-d{head_dim}-{tile.BLOCK_M}"
        yield GateCase(name, global_attention_kernel, arguments, options, tensor_cores=dtype.itemsize == 2)
