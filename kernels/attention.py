"""Scaled dot-product attention of strided inputs: non-causal, causal, or a prefix that all see and an order behind it.

    out[b, i, h] = sum over the keys j that i sees of softmax(query[b, i, h] . key[b, j, g] / sqrt(d)) value[b, j, g]
    seen are     j < prefix, and j <= S - T + i
    g            = h // (H / K): neighbouring heads of queries share one of keys

    query      [B, T, H, d], key and value [B, S, K, d], all fp32, bf16 or fp16, of any strides but that of d, which is 1
    out        [B, T, H, d], contiguous, of the same type, rounded once from fp32

Steps whose keys all queries of a tile see ask for no mask; the last ones do.  Keys that no query of the tile sees are not read.
Assumes d of at most 128, fewer than 2^31 tiles, and less than 2^31 from the first to the last value of one sequence.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from optmem.kernels.launch import WIDEST_HEAD, AttentionTile, GateCase, attention_tile, attention_tiles, cdiv, tile_side

LOG2_E: tl.constexpr = tl.constexpr(1.4426950408889634)  # the hardware has powers of two


@triton.jit
def take_keys(
    b_top,  # [BLOCK_M], the largest logit so far, in powers of two
    b_sum,  # [BLOCK_M]
    b_out,  # [BLOCK_M, BLOCK_D]
    b_q,
    p_k,  # [BLOCK_D, 1]
    p_v,  # [1, BLOCK_D]
    o_n,
    o_place,  # of the queries among the keys
    S,
    prefix,
    step_k,
    step_v,
    to_log2,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    MASKED: tl.constexpr,
):
    m_d = tl.arange(0, BLOCK_D) < D
    m_k = m_d[:, None] & (o_n < S)[None, :]
    b_k = tl.load(p_k + o_n[None, :] * step_k, mask=m_k, other=0.0)  # [BLOCK_D, BLOCK_N]
    b_s = tl.dot(b_q, b_k, input_precision="ieee") * to_log2  # [BLOCK_M, BLOCK_N]
    if MASKED:
        is_seen = (o_n[None, :] < prefix) | (o_n[None, :] <= o_place[:, None])
        b_s = tl.where(is_seen & (o_n < S)[None, :], b_s, float("-inf"))
    b_new = tl.maximum(b_top, tl.max(b_s, 1))
    b_p = tl.exp2(b_s - b_new[:, None])
    b_shrink = tl.exp2(b_top - b_new)
    b_sum = b_sum * b_shrink + tl.sum(b_p, 1)
    b_v = tl.load(p_v + o_n[:, None] * step_v, mask=(o_n < S)[:, None] & m_d[None, :], other=0.0)  # [BLOCK_N, BLOCK_D]
    b_out = tl.dot(b_p.to(b_v.dtype), b_v, b_out * b_shrink[:, None], input_precision="ieee")
    return b_new, b_sum, b_out


# Lengths change with every call; strides are the model's, and their divisibility is what makes loads wide.
@triton.jit(do_not_specialize=["T", "S", "H", "prefix"])
def attention_kernel(
    query,
    key,
    value,
    out,  # [B, T, H, D]
    T,
    S,
    H,
    prefix,
    scale,  # D ** -0.5
    stride_qb,
    stride_qt,
    stride_qh,
    stride_kb,
    stride_ks,
    stride_kh,
    stride_vb,
    stride_vs,
    stride_vh,
    GROUP: tl.constexpr,  # heads of queries that share one of keys
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
) -> None:
    # Neighbouring programs share keys and values.
    tiles_m = tl.cdiv(T, BLOCK_M)
    i_m = tl.program_id(0) % tiles_m
    i_h = (tl.program_id(0) // tiles_m) % H
    i_b = (tl.program_id(0) // tiles_m // H).to(tl.int64)

    o_m = i_m * BLOCK_M + tl.arange(0, BLOCK_M)
    o_d = tl.arange(0, BLOCK_D)
    m_q = (o_m < T)[:, None] & (o_d < D)[None, :]
    p_q = query + i_b * stride_qb + i_h * stride_qh
    b_q = tl.load(p_q + o_m[:, None] * stride_qt + o_d[None, :], mask=m_q, other=0.0)  # [BLOCK_M, BLOCK_D]
    p_k = key + i_b * stride_kb + i_h // GROUP * stride_kh + o_d[:, None]
    p_v = value + i_b * stride_vb + i_h // GROUP * stride_vh + o_d[None, :]

    # The first query sees the fewest keys, the last one the most.
    o_place = S - T + o_m
    first = S - T + i_m * BLOCK_M
    unmasked = tl.minimum(tl.maximum(prefix, first + 1), S) // BLOCK_N * BLOCK_N
    end = tl.minimum(tl.maximum(prefix, first + BLOCK_M), S)
    to_log2 = scale * LOG2_E
    b_top = tl.full([BLOCK_M], float("-inf"), dtype=tl.float32)
    b_sum = tl.zeros([BLOCK_M], dtype=tl.float32)
    b_out = tl.zeros([BLOCK_M, BLOCK_D], dtype=tl.float32)
    for start in range(0, unmasked, BLOCK_N):
        o_n = start + tl.arange(0, BLOCK_N)
        b_top, b_sum, b_out = take_keys(
            b_top, b_sum, b_out, b_q, p_k, p_v, o_n, o_place, S, prefix, stride_ks, stride_vs, to_log2, D, BLOCK_D, False
        )
    for start in range(unmasked, end, BLOCK_N):
        o_n = start + tl.arange(0, BLOCK_N)
        b_top, b_sum, b_out = take_keys(
            b_top, b_sum, b_out, b_q, p_k, p_v, o_n, o_place, S, prefix, stride_ks, stride_vs, to_log2, D, BLOCK_D, True
        )

    p_out = out + (i_b * T * H + i_h) * D
    b_out = b_out / b_sum[:, None]
    tl.store(p_out + o_m[:, None] * (H * D) + o_d[None, :], b_out.to(out.dtype.element_ty), mask=m_q)


def attention(query: Tensor, key: Tensor, value: Tensor, prefix: int, out: Tensor) -> None:
    """Fills out.  ops.attention is the checked way in."""
    if out.numel() == 0:
        return
    batch, num_queries, heads, head_dim = query.shape
    assert out.is_contiguous()
    assert out.shape == query.shape
    assert head_dim <= WIDEST_HEAD
    for tensor in (query, key, value):
        assert tensor.stride(3) == 1 or head_dim == 1
        assert tensor.shape[1] * max(tensor.stride(1), heads * head_dim) < 2**31
    tile = attention_tile(num_queries, head_dim, query.element_size())
    arguments, options = specialise(query, key, value, prefix, out, tile)
    programs = cdiv(num_queries, tile.BLOCK_M) * heads * batch
    assert programs < 2**31
    with torch.cuda.device_of(out):
        attention_kernel[(programs,)](*arguments, **options)


def specialise(
    query: Tensor, key: Tensor, value: Tensor, prefix: int, out: Tensor, tile: AttentionTile
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """What a launch hands to the kernel: arguments in its order, then constexprs and launch options by name."""
    _, num_queries, heads, head_dim = query.shape
    sizes = (num_queries, key.shape[1], heads, prefix, head_dim**-0.5)
    strides = [tensor.stride(axis) for tensor in (query, key, value) for axis in range(3)]
    options = {"GROUP": heads // key.shape[2], "D": head_dim, "BLOCK_D": tile_side(head_dim), **tile._asdict()}
    return (query, key, value, out, *sizes, *strides), options


def gate_cases() -> Iterator[GateCase]:
    """The heads of CLIP and of the second generation, nano's wider ones, odd ones; fp32."""
    sizes = [(torch.bfloat16, 64, 7), (torch.bfloat16, 96, 1), (torch.bfloat16, 5, 1)]
    sizes += [(torch.float32, 64, 7), (torch.float32, WIDEST_HEAD, 1)]
    for dtype, head_dim, group in sizes:
        qkv = torch.empty(2, 257, 3, 14, head_dim, dtype=dtype, device="meta")
        query, key, value = qkv.unbind(2)
        for tile in attention_tiles(head_dim, dtype.itemsize):
            arguments, options = specialise(query, key[:, :, ::group], value[:, :, ::group], 0, query, tile)
            name = f"{str(dtype).removeprefix('torch.')}-d{head_dim}-{group}-{tile.BLOCK_M}"
            yield GateCase(name, attention_kernel, arguments, options, tensor_cores=dtype.itemsize == 2)
