"""Attention with relative positions on the CPU, in blocks of logits that stay in the cache.  Plain torch.

Over a grid of 64 x 64 patches the bias alone is 4096 x 4096 numbers a head: written and read again it costs more than the
attention does.  Here a block of logits is made, biased, normalised and used before the next one; nothing larger exists.
CPU-milliseconds on one Zen 5 core, one page of 1024 px, 12 heads of 64, bf16 (of that, the two products alone are 246):

    blocks 558, torch's attention without any bias 643, with the bias a block at a time 843, transformers with all of it about 1200

torch's attention with queries and keys widened by the positions, which needs no bias, was slower than transformers.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from optmem.reference import relative_rows, to_windows

BLOCK = 1 << 19  # logits: 2 MB in fp32, what two cores hold in their second-level caches


def window_attention(qkv: Tensor, bias: Tensor, rel_pos_h: Tensor, rel_pos_w: Tensor) -> Tensor:
    """Shapes as in ops.window_attention; the one copy of the windows is the gather that attention over them needs anyway."""
    num_grids, height, width, channels = qkv.shape
    window = (rel_pos_h.shape[0] + 1) // 2
    windows = to_windows(qkv, bias, window)
    rows, columns = windows.shape[1:3]
    mixed = global_attention(windows.flatten(0, 2), rel_pos_h, rel_pos_w)
    mixed = mixed.view(num_grids, rows, columns, window, window, channels // 3).transpose(2, 3)
    return mixed.reshape(num_grids, rows * window, columns * window, channels // 3)[:, :height, :width].contiguous()


def global_attention(qkv: Tensor, rel_pos_h: Tensor, rel_pos_w: Tensor) -> Tensor:
    """Shapes as in ops.global_attention."""
    num_grids, height, width, channels = qkv.shape
    head_dim = rel_pos_h.shape[1]
    q, k, v = _split(qkv, head_dim)
    toward_rows = relative_rows(rel_pos_h).transpose(1, 2)  # [h, d, h]
    toward_columns = relative_rows(rel_pos_w).transpose(1, 2)  # [w, d, w]
    mixed = torch.empty_like(q)
    for heads, rows in _blocks(q.shape[0], height, width):
        on_grid = q[heads, rows]  # [heads, rows, w, d], or of one head [rows, w, d]
        by_row = on_grid @ toward_rows[rows]  # [..., rows, w, h]
        by_column = (on_grid.transpose(-3, -2) @ toward_columns).transpose(-3, -2)  # [..., rows, w, w]
        logits = by_row.float()[..., None] + by_column.float()[..., None, :]  # [..., rows, w, h, w]
        logits = logits.flatten(-2).flatten(-3, -2)  # [..., rows * w, h * w]
        keys, values = k[heads].flatten(-3, -2), v[heads].flatten(-3, -2)
        logits += (on_grid.flatten(-3, -2) * head_dim**-0.5) @ keys.transpose(-1, -2)
        weights = logits.softmax(-1).to(qkv.dtype)
        mixed[heads, rows] = (weights @ values).view_as(on_grid)
    mixed = mixed.view(num_grids, channels // 3 // head_dim, height, width, head_dim).permute(0, 2, 3, 1, 4)
    return mixed.reshape(num_grids, height, width, channels // 3)


def _split(qkv: Tensor, head_dim: int) -> tuple[Tensor, Tensor, Tensor]:
    """[B, h, w, 3 D] -> three of [B * heads, h, w, d]."""
    num_grids, height, width, channels = qkv.shape
    apart = qkv.view(num_grids, height, width, 3, channels // 3 // head_dim, head_dim).permute(3, 0, 4, 1, 2, 5).contiguous()
    q, k, v = apart.flatten(1, 2)
    return q, k, v


def _blocks(num_heads: int, height: int, width: int) -> Iterator[tuple[int | slice, slice]]:
    """Heads and rows of queries, so that a block has about BLOCK logits: several whole heads, or some rows of one.

    One head is a number: products of matrices are a tenth faster than those of a batch of one.
    """
    num_keys = height * width
    heads = max(1, BLOCK // num_keys**2)
    rows = max(1, min(height, BLOCK // (width * num_keys)))
    for head in range(0, num_heads, heads):
        for row in range(0, height, rows):
            yield slice(head, head + heads) if heads > 1 else head, slice(row, row + rows)
