"""rope_cache: rotate queries and keys by their positions; keys and values go to their cells of the cache.

    left'  = left * cos - right * sin        of every head's halves, in fp32, rounded once
    right' = right * cos + left * sin

    queries, keys, values   [T, H, D]                  fp32, bf16 or fp16; queries are rotated in place
    cos, sin                [T, D / 2]
    slots                   int64 [T]                  cell of every token; a negative one is nowhere
    key_cache, value_cache  [pages, page_size, H, D]   of the same type; or int8, and then
    key_scales, value_scales   fp32 [pages, page_size, H]   what a head's 127 steps are: its largest number is one of 127

The host does not wait to look at the slots.  A token whose cell lies behind the cache is written nowhere, and its query becomes
NaN, so that it is seen in that row alone.

Assumes contiguous tensors on one device.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from optmem.kernels.launch import GateCase, cdiv, rope_tile


@triton.jit
def write(b_left, b_right, cache, scales, i_slot, o_h, o_left, o_right, m_cache, H, D) -> None:
    """A token's heads to their cell; as int8 where there are scales for them."""
    p_cell = cache + i_slot * H * D
    if scales is None:
        tl.store(p_cell + o_left, b_left, mask=m_cache)
        tl.store(p_cell + o_right, b_right, mask=m_cache)
    else:
        b_left = tl.where(m_cache, b_left.to(tl.float32), 0.0)
        b_right = tl.where(m_cache, b_right.to(tl.float32), 0.0)
        b_most = tl.maximum(tl.max(tl.abs(b_left), axis=1), tl.max(tl.abs(b_right), axis=1))  # [BLOCK_H]
        b_scale = tl.div_rn(b_most, 127.0)
        tl.store(scales + i_slot * H + o_h, b_scale, mask=(o_h < H) & (tl.max(m_cache.to(tl.int32), axis=1) > 0))
        b_divisor = tl.maximum(b_scale, 1.1754943508222875e-38)[:, None]  # of zeros, the smallest normal number
        tl.store(p_cell + o_left, step(b_left, b_divisor), mask=m_cache)
        tl.store(p_cell + o_right, step(b_right, b_divisor), mask=m_cache)


@triton.jit
def step(b_x, b_divisor) -> Any:
    """The nearest whole number, of two the even one: beyond 1.5 * 2^23 the numbers of fp32 are whole."""
    b_y = tl.div_rn(b_x, tl.broadcast_to(b_divisor, b_x.shape))
    return ((b_y + 12582912.0) - 12582912.0).to(tl.int8)


@triton.jit(do_not_specialize=["cells"])
def rope_cache_kernel(
    queries,  # [T, H, D], in place
    keys,  # [T, H, D]
    values,  # [T, H, D]
    cos,  # [T, D / 2]
    sin,  # [T, D / 2]
    slots,  # [T]
    key_cache,  # [cells, H, D]
    value_cache,  # [cells, H, D]
    key_scales,  # fp32 [cells, H], or None
    value_scales,  # fp32 [cells, H], or None
    cells,
    H,
    D: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_D: tl.constexpr,
) -> None:
    half: tl.constexpr = D // 2
    i_t = tl.program_id(0).to(tl.int64)
    o_h = tl.program_id(1) * BLOCK_H + tl.arange(0, BLOCK_H)
    o_d = tl.arange(0, BLOCK_D)
    m_d = o_d < half
    m_hd = (o_h < H)[:, None] & m_d[None, :]
    o_left = o_h[:, None] * D + o_d[None, :]
    o_right = o_left + half
    i_slot = tl.load(slots + i_t)
    is_outside = i_slot >= cells
    b_cos = tl.load(cos + i_t * half + o_d, mask=m_d, other=0.0).to(tl.float32)[None, :]  # [1, BLOCK_D]
    b_sin = tl.load(sin + i_t * half + o_d, mask=m_d, other=0.0).to(tl.float32)[None, :]  # [1, BLOCK_D]

    p_query = queries + i_t * H * D
    b_left = tl.load(p_query + o_left, mask=m_hd, other=0.0).to(tl.float32)  # [BLOCK_H, BLOCK_D]
    b_right = tl.load(p_query + o_right, mask=m_hd, other=0.0).to(tl.float32)  # [BLOCK_H, BLOCK_D]
    b_new_left = tl.where(is_outside, float("nan"), b_left * b_cos - b_right * b_sin)
    b_new_right = tl.where(is_outside, float("nan"), b_right * b_cos + b_left * b_sin)
    tl.store(p_query + o_left, b_new_left.to(queries.dtype.element_ty), mask=m_hd)
    tl.store(p_query + o_right, b_new_right.to(queries.dtype.element_ty), mask=m_hd)

    m_cache = m_hd & (i_slot >= 0) & (i_slot < cells)
    p_key = keys + i_t * H * D
    b_left = tl.load(p_key + o_left, mask=m_cache, other=0.0).to(tl.float32)  # [BLOCK_H, BLOCK_D]
    b_right = tl.load(p_key + o_right, mask=m_cache, other=0.0).to(tl.float32)  # [BLOCK_H, BLOCK_D]
    b_new_left = (b_left * b_cos - b_right * b_sin).to(keys.dtype.element_ty)
    b_new_right = (b_right * b_cos + b_left * b_sin).to(keys.dtype.element_ty)
    write(b_new_left, b_new_right, key_cache, key_scales, i_slot, o_h, o_left, o_right, m_cache, H, D)
    p_value = values + i_t * H * D
    b_left = tl.load(p_value + o_left, mask=m_cache)  # [BLOCK_H, BLOCK_D]
    b_right = tl.load(p_value + o_right, mask=m_cache)  # [BLOCK_H, BLOCK_D]
    write(b_left, b_right, value_cache, value_scales, i_slot, o_h, o_left, o_right, m_cache, H, D)


def rope_cache(
    queries: Tensor,
    keys: Tensor,
    values: Tensor,
    cos: Tensor,
    sin: Tensor,
    slots: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    key_scales: Tensor | None = None,
    value_scales: Tensor | None = None,
) -> None:
    """Rotates in place and writes to the caches.  ops.rope_cache is the checked way in."""
    if queries.numel() == 0:
        return
    tensors = (queries, keys, values, cos, sin, slots, key_cache, value_cache, key_scales, value_scales)
    assert all(tensor is None or tensor.is_contiguous() for tensor in tensors)
    arguments, options = specialise(*tensors)
    grid = (queries.shape[0], cdiv(queries.shape[1], options["BLOCK_H"]))
    with torch.cuda.device_of(queries):
        rope_cache_kernel[grid](*arguments, **options)


def specialise(*tensors: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """What a launch hands to the kernel: arguments in its order, then constexprs and launch options by name."""
    queries, key_cache = tensors[0], tensors[6]
    _, heads, dim = queries.shape
    cells = key_cache.shape[0] * key_cache.shape[1]
    return (*tensors, cells, heads), {"D": dim, **rope_tile(heads, dim)._asdict()}


def gate_cases() -> Iterator[GateCase]:
    """The heads of the decoders and of nano, and ones that allow no vector loads."""
    shapes = (
        (torch.bfloat16, 10, 128),
        (torch.float32, 10, 128),
        (torch.bfloat16, 6, 64),
        (torch.float32, 6, 64),
        (torch.bfloat16, 3, 34),
    )
    eight = [(*shape, True) for shape in shapes[::2]]
    for dtype, heads, dim, is_eight in [*((*shape, False) for shape in shapes), *eight]:
        token, half, cache = (4, heads, dim), (4, dim // 2), (8, 16, heads, dim)
        made = [torch.empty(shape, dtype=dtype, device="meta") for shape in (token, token, token, half, half, cache, cache)]
        slots = torch.empty(4, dtype=torch.int64, device="meta")
        caches, scales = made[5:], list[Any]([None, None])
        if is_eight:
            caches = [torch.empty(cache, dtype=torch.int8, device="meta") for _ in range(2)]
            scales = [torch.empty(cache[:3], device="meta") for _ in range(2)]
        arguments, options = specialise(*made[:5], slots, *caches, *scales)
        name = f"{str(dtype).removeprefix('torch.')}-H{heads}-D{dim}{'-8bit' if is_eight else ''}"
        yield GateCase(name, rope_cache_kernel, arguments, options, tensor_cores=False)
