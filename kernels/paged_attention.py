"""paged_attention: the last tokens of every sequence over its pages.

    out[i, h] = sum over j of softmax(scale * q[i, h] . k[j, h]) v[j, h]      over keys j <= i with j < prompt or j > i - window

    queries, out   [T, H, D]                    sequence b asks with starts[b] .. starts[b + 1], the last of them at lengths[b] - 1
    keys, values   [pages, page_size, H, D]     fp32, bf16 or fp16, as queries and out; or int8, and then
    key_scales, value_scales   fp32 [pages, page_size, H]   a step of int8: it multiplies logits and weights, not the tiles
    table          int32 [B, max_pages]         page of every page_size tokens
    starts         int64 [B + 1], lengths and prompts int64 [B]

Three kernels.  One for sequences that ask with a few tokens: a program reads a chunk of the keys of one head, all queries of the
sequence at once, and leaves maximum, sum and mixed values; a second puts the chunks together.  Both are a decode step, and drafts.
The third serves longer prompts, a tile of queries a program, over all keys.

Which of them serves a row, and in what order its keys are added, follows from its own place and from how many its sequence asks
with: chunks and blocks lie at fixed places, and what a row does not see adds exactly nothing.  So a draft's row is bit for bit that
of the same token asked alone.  (In a decode step with an empty sequence for each token too many of another one, the first two
kernels serve that one as well.)

The host looks at no length and no page: grids follow from shapes, and a graph may be replayed with others.  A query whose tile must
see a page that is not there, or whose sequence is longer than its table, gets NaN.  Pages that no query sees are not touched,
whatever their entries say.

Assumes contiguous tensors on one device, and tables of fewer than 2^30 tokens.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from optmem.kernels.launch import PAGED_CHUNK, GateCase, PagedPlan, PagedTile, paged_plan, paged_tile, power_of_two

LOG2_E = 1.4426950408889634
ENDLESS = 1 << 30  # a window that hides nothing


@triton.jit
def sequence_at(i_b, starts, lengths, prompts, T, table_tokens) -> tuple[Any, ...]:
    """Where a sequence's queries begin, how many they are, its length and its prompt; inside the tensors whatever is told."""
    first = tl.minimum(tl.maximum(tl.load(starts + i_b), 0), T)
    end = tl.minimum(tl.maximum(tl.load(starts + i_b + 1), first), T)
    told = tl.load(lengths + i_b)
    length = tl.where(told > table_tokens, 0, told).to(tl.int32)  # beyond its pages it has none, and its queries see nothing
    prompt = tl.minimum(tl.load(prompts + i_b), table_tokens).to(tl.int32)
    return first, (end - first).to(tl.int32), length, prompt


@triton.jit
def block_step(
    b_q,  # [BLOCK_M, BLOCK_D]
    i_m,  # [BLOCK_M] places of the queries
    b_max,  # [BLOCK_M]
    b_sum,  # [BLOCK_M]
    b_out,  # [BLOCK_M, BLOCK_D]
    b_lost,  # [BLOCK_N] whether a page was not there
    o_n,  # [BLOCK_N] places of the keys
    i_first,  # place of the tile's first query
    i_last,  # and of its last
    prompt,
    window,
    p_table,
    p_keys,  # of the head
    p_values,
    key_scales,  # fp32 [pages, PAGE, H], or None
    value_scales,
    i_h,
    max_pages,
    pages,
    scale,
    H: tl.constexpr,
    D: tl.constexpr,
    PAGE: tl.constexpr,
    BLOCK_D: tl.constexpr,
) -> tuple[Any, ...]:
    """One block of keys: maximum, sum and mixed values of every query, with these keys in them."""
    o_d = tl.arange(0, BLOCK_D)
    m_n = (o_n <= i_last) & ((o_n < prompt) | (o_n > i_first - window))
    b_page = tl.load(p_table + o_n // PAGE, mask=m_n & (o_n // PAGE < max_pages), other=-1)  # [BLOCK_N]
    m_page = (b_page >= 0) & (b_page < pages)
    m_nd = (m_n & m_page)[:, None] & (o_d < D)[None, :]
    o_nd = ((b_page.to(tl.int64) * PAGE + o_n % PAGE) * H * D)[:, None] + o_d[None, :]
    b_k = tl.load(p_keys + o_nd, mask=m_nd, other=0)  # [BLOCK_N, BLOCK_D]
    b_v = tl.load(p_values + o_nd, mask=m_nd, other=0)  # [BLOCK_N, BLOCK_D]
    if key_scales is not None:  # steps of int8 are exact in any of the types; their scales are on the way with them
        o_scale = (b_page.to(tl.int64) * PAGE + o_n % PAGE) * H + i_h
        b_key_scale = tl.load(key_scales + o_scale, mask=m_n & m_page, other=0.0)  # [BLOCK_N]
        b_value_scale = tl.load(value_scales + o_scale, mask=m_n & m_page, other=0.0)  # [BLOCK_N]
        b_k = b_k.to(tl.float32).to(b_q.dtype)
        b_v = b_v.to(tl.float32).to(b_q.dtype)
    m_sees = (o_n[None, :] <= i_m[:, None]) & ((o_n < prompt)[None, :] | (o_n[None, :] > i_m[:, None] - window))
    b_score = tl.dot(b_q, tl.trans(b_k), input_precision="ieee") * scale
    if key_scales is not None:
        b_score *= b_key_scale[None, :]
    b_score = tl.where(m_sees, b_score, -float("inf"))  # [BLOCK_M, BLOCK_N]
    b_new = tl.maximum(b_max, tl.max(b_score, axis=1))
    b_base = tl.where(b_new == -float("inf"), 0.0, b_new)  # rows that have seen nothing yet
    b_p = tl.exp2(b_score - b_base[:, None])
    b_decay = tl.exp2(b_max - b_base)
    b_new_sum = b_sum * b_decay + tl.sum(b_p, axis=1)
    if key_scales is not None:
        b_p *= b_value_scale[None, :]
    b_out = tl.dot(b_p.to(b_v.dtype), b_v, b_out * b_decay[:, None], input_precision="ieee")
    return b_new, b_new_sum, b_out, b_lost | (m_n & (m_page == 0))


@triton.jit(do_not_specialize=["T", "chunks", "few", "max_pages", "pages", "window"])
def paged_chunk_kernel(
    queries,  # [T, H, D]
    keys,  # [pages, PAGE, H, D]
    values,  # [pages, PAGE, H, D]
    table,  # [B, max_pages]
    starts,  # [B + 1]
    lengths,  # [B]
    prompts,  # [B]
    key_scales,  # fp32 [pages, PAGE, H], or None where keys and values are not int8
    value_scales,
    mixed,  # fp32 [rows, chunks, H, D], not yet divided by their sums
    stats,  # fp32 [rows, chunks, H, 2]: maximum, as a power of two, and sum
    T,
    chunks,
    few,
    max_pages,
    pages,
    window,
    scale,
    H: tl.constexpr,
    D: tl.constexpr,
    PAGE: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
) -> None:
    # Neighbouring programs read neighbouring heads of the same tokens.
    i_h = tl.program_id(0) % H
    i_c = tl.program_id(0) // H % chunks
    i_b = (tl.program_id(0) // H // chunks).to(tl.int64)
    start, count, length, prompt = sequence_at(i_b, starts, lengths, prompts, T, max_pages * PAGE)
    if (count == 0) | (count > few):
        return
    i_row = tl.minimum(start, i_b * few)  # rows of partial sums: those of sequences do not overlap
    i_key = i_c * CHUNK
    o_d = tl.arange(0, BLOCK_D)
    p_table = table + i_b * max_pages
    p_keys = keys + i_h * D
    p_values = values + i_h * D
    for first in range(0, count, BLOCK_M):
        o_m = first + tl.arange(0, BLOCK_M)
        m_md = (o_m < count)[:, None] & (o_d < D)[None, :]
        i_m = length - count + o_m
        i_first = length - count + first
        i_last = tl.minimum(i_first + BLOCK_M, length) - 1
        if (i_key <= i_last) & ((i_key < prompt) | (i_key + CHUNK - 1 > i_first - window)):
            b_q = tl.load(
                queries + ((start + o_m) * H + i_h)[:, None] * D + o_d[None, :], mask=m_md, other=0.0
            )  # [BLOCK_M, BLOCK_D]
            b_max = tl.full([BLOCK_M], -float("inf"), dtype=tl.float32)
            b_sum = tl.zeros([BLOCK_M], dtype=tl.float32)
            b_out = tl.zeros([BLOCK_M, BLOCK_D], dtype=tl.float32)
            b_lost = tl.zeros([BLOCK_N], dtype=tl.int1)
            for n in range(i_key, tl.minimum(i_key + CHUNK, i_last + 1), BLOCK_N):
                b_max, b_sum, b_out, b_lost = block_step(
                    b_q, i_m, b_max, b_sum, b_out, b_lost, n + tl.arange(0, BLOCK_N), i_first, i_last, prompt, window,
                    p_table, p_keys, p_values, key_scales, value_scales, i_h, max_pages, pages, scale, H, D, PAGE, BLOCK_D,
                )  # fmt: skip
            o_part = ((i_row + o_m) * chunks + i_c) * H + i_h  # [BLOCK_M]
            tl.store(mixed + o_part[:, None] * D + o_d[None, :], b_out, mask=m_md)
            tl.store(stats + o_part * 2, b_max, mask=o_m < count)
            b_sum = tl.where(tl.max(b_lost.to(tl.int32), axis=0) > 0, float("nan"), b_sum)
            tl.store(stats + o_part * 2 + 1, b_sum, mask=o_m < count)


@triton.jit(do_not_specialize=["T", "chunks", "few", "max_pages", "window"])
def paged_combine_kernel(
    mixed,  # fp32 [rows, chunks, H, D]
    stats,  # fp32 [rows, chunks, H, 2]
    starts,  # [B + 1]
    lengths,  # [B]
    prompts,  # [B]
    out,  # [T, H, D]
    T,
    chunks,
    few,
    max_pages,
    window,
    H: tl.constexpr,
    D: tl.constexpr,
    PAGE: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_D: tl.constexpr,
) -> None:
    i_h = tl.program_id(0) % H
    i_b = (tl.program_id(0) // H).to(tl.int64)
    start, count, length, prompt = sequence_at(i_b, starts, lengths, prompts, T, max_pages * PAGE)
    if count > few:
        return
    i_row = tl.minimum(start, i_b * few)
    o_d = tl.arange(0, BLOCK_D)
    m_d = o_d < D
    for row in range(count):
        i_m = length - count + row
        seen = (i_m + CHUNK) // CHUNK  # chunks up to the query's own
        b_max = -float("inf")
        b_sum = 0.0
        b_out = tl.zeros([BLOCK_D], dtype=tl.float32)
        for first in range(0, seen, BLOCK_C):
            o_c = first + tl.arange(0, BLOCK_C)
            m_c = (o_c < seen) & ((o_c * CHUNK < prompt) | (o_c * CHUNK + CHUNK - 1 > i_m - window))
            o_part = ((i_row + row) * chunks + o_c) * H + i_h  # [BLOCK_C]
            b_chunk_max = tl.load(stats + o_part * 2, mask=m_c, other=-float("inf"))  # [BLOCK_C]
            b_chunk_sum = tl.load(stats + o_part * 2 + 1, mask=m_c, other=0.0)  # [BLOCK_C]
            b_mixed = tl.load(
                mixed + o_part[:, None] * D + o_d[None, :], mask=m_c[:, None] & m_d[None, :], other=0.0
            )  # [BLOCK_C, BLOCK_D]
            b_new = tl.maximum(b_max, tl.max(b_chunk_max, axis=0))
            b_base = tl.where(b_new == -float("inf"), 0.0, b_new)
            b_share = tl.exp2(b_chunk_max - b_base)  # [BLOCK_C]
            b_decay = tl.exp2(b_max - b_base)
            b_sum = b_sum * b_decay + tl.sum(b_share * b_chunk_sum, axis=0)
            b_out = b_out * b_decay + tl.sum(b_share[:, None] * b_mixed, axis=0)
            b_max = b_new
        b_out = tl.where(b_sum > 0.0, b_out / tl.where(b_sum > 0.0, b_sum, 1.0), float("nan"))
        tl.store(out + ((start + row) * H + i_h) * D + o_d, b_out.to(out.dtype.element_ty), mask=m_d)


@triton.jit(do_not_specialize=["T", "B", "few", "max_pages", "pages", "window"])
def paged_prompt_kernel(
    queries,  # [T, H, D]
    keys,  # [pages, PAGE, H, D]
    values,  # [pages, PAGE, H, D]
    table,  # [B, max_pages]
    starts,  # [B + 1]
    lengths,  # [B]
    prompts,  # [B]
    key_scales,  # fp32 [pages, PAGE, H], or None
    value_scales,
    out,  # [T, H, D]
    T,
    B,
    few,
    max_pages,
    pages,
    window,
    scale,
    H: tl.constexpr,
    D: tl.constexpr,
    PAGE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
) -> None:
    i_h = tl.program_id(0) % H
    i_tile = tl.program_id(0) // H
    # A sequence begins with tile starts[b] // BLOCK_M + b: it has as many as it needs, and one or two that find nothing to do.
    i_b = tl.full([], 0, dtype=tl.int32)
    end = B
    while end - i_b > 1:
        middle = (i_b + end) // 2
        is_behind = tl.load(starts + middle) // BLOCK_M + middle <= i_tile
        i_b = tl.where(is_behind, middle, i_b)
        end = tl.where(is_behind, end, middle)
    start, count, length, prompt = sequence_at(i_b, starts, lengths, prompts, T, max_pages * PAGE)
    first = (i_tile - i_b - start // BLOCK_M).to(tl.int32) * BLOCK_M
    if (first < 0) | (first >= count) | (count <= few):
        return
    p_table = table + i_b.to(tl.int64) * max_pages
    p_keys = keys + i_h * D
    p_values = values + i_h * D
    o_d = tl.arange(0, BLOCK_D)
    o_m = first + tl.arange(0, BLOCK_M)
    m_md = (o_m < count)[:, None] & (o_d < D)[None, :]
    i_m = length - count + o_m
    i_first = length - count + first
    i_last = tl.minimum(i_first + BLOCK_M, length) - 1
    o_query = ((start + o_m) * H + i_h)[:, None] * D + o_d[None, :]
    b_q = tl.load(queries + o_query, mask=m_md, other=0.0)  # [BLOCK_M, BLOCK_D]
    b_max = tl.full([BLOCK_M], -float("inf"), dtype=tl.float32)
    b_sum = tl.zeros([BLOCK_M], dtype=tl.float32)
    b_out = tl.zeros([BLOCK_M, BLOCK_D], dtype=tl.float32)
    b_lost = tl.zeros([BLOCK_N], dtype=tl.int1)
    # Blocks of the prompt, then those of the window: what lies between is not visited.
    behind = tl.cdiv(tl.maximum(tl.minimum(prompt, i_last + 1), 0), BLOCK_N)
    recent = tl.maximum(behind, tl.maximum(i_first - window + 1, 0) // BLOCK_N)
    blocks = behind + tl.maximum(tl.cdiv(tl.maximum(i_last + 1, 0), BLOCK_N) - recent, 0)
    for block in range(blocks):
        n = tl.where(block < behind, block, block - behind + recent) * BLOCK_N
        b_max, b_sum, b_out, b_lost = block_step(
            b_q, i_m, b_max, b_sum, b_out, b_lost, n + tl.arange(0, BLOCK_N), i_first, i_last, prompt, window,
            p_table, p_keys, p_values, key_scales, value_scales, i_h, max_pages, pages, scale, H, D, PAGE, BLOCK_D,
        )  # fmt: skip
    b_sum = tl.where(tl.max(b_lost.to(tl.int32), axis=0) > 0, float("nan"), b_sum)[:, None]
    b_out = tl.where(b_sum > 0.0, b_out / tl.where(b_sum > 0.0, b_sum, 1.0), float("nan"))
    tl.store(out + o_query, b_out.to(out.dtype.element_ty), mask=m_md)


COMBINED = {"CHUNK": PAGED_CHUNK, "BLOCK_C": 8, "num_warps": 4}  # 2,048 tokens in one round of loads


def paged_attention(
    queries: Tensor,
    keys: Tensor,
    values: Tensor,
    table: Tensor,
    starts: Tensor,
    lengths: Tensor,
    prompts: Tensor,
    window: int,
    scale: float,
    out: Tensor,
    key_scales: Tensor | None = None,
    value_scales: Tensor | None = None,
) -> None:
    """Fills out; a window of 0 hides nothing.  ops.paged_attention is the checked way in."""
    if out.numel() == 0:
        return
    inputs = (queries, keys, values, table, starts, lengths, prompts, key_scales, value_scales)
    assert all(tensor is None or tensor.is_contiguous() for tensor in (*inputs, out))
    (tokens, heads, dim), (sequences, max_pages) = queries.shape, table.shape
    assert max_pages * keys.shape[1] < ENDLESS
    prompt_tile = paged_tile(dim, queries.element_size(), is_prompt=True, is_8bit=key_scales is not None)
    plan = paged_plan(tokens, sequences, max_pages * keys.shape[1], prompt_tile.BLOCK_M)
    mixed = queries.new_empty((plan.rows, plan.chunks, heads, dim), dtype=torch.float32)
    stats = queries.new_empty((plan.rows, plan.chunks, heads, 2), dtype=torch.float32)
    with torch.cuda.device_of(out):
        arguments, options = specialise_chunk(inputs, mixed, stats, plan, window, scale)
        paged_chunk_kernel[(sequences * plan.chunks * heads,)](*arguments, **options)
        arguments, options = specialise_combine(inputs, mixed, stats, out, plan, window)
        paged_combine_kernel[(sequences * heads,)](*arguments, **options)
        if plan.prompt_tiles:
            arguments, options = specialise_prompt(inputs, out, plan, window, scale, prompt_tile)
            paged_prompt_kernel[(plan.prompt_tiles * heads,)](*arguments, **options)


Inputs = tuple[Any, ...]  # queries, keys, values, table, starts, lengths, prompts, and two scales or None
Launch = tuple[tuple[Any, ...], dict[str, Any]]  # arguments in the kernel's order, then constexprs and launch options by name


def _sizes(inputs: Inputs) -> dict[str, int]:
    queries, keys = inputs[:2]
    return {"H": queries.shape[1], "D": queries.shape[2], "PAGE": keys.shape[1], "BLOCK_D": power_of_two(max(16, queries.shape[2]))}


def specialise_chunk(inputs: Inputs, mixed: Tensor, stats: Tensor, plan: PagedPlan, window: int, scale: float) -> Launch:
    queries, keys, _, table = inputs[:4]
    tokens, _, dim = queries.shape
    sizes = (tokens, plan.chunks, plan.few, table.shape[1], keys.shape[0], min(window or ENDLESS, ENDLESS))
    tile = paged_tile(dim, queries.element_size(), is_prompt=False, is_8bit=inputs[7] is not None)
    options = {"CHUNK": PAGED_CHUNK, **_sizes(inputs), **tile._asdict()}
    return (*inputs, mixed, stats, *sizes, scale * LOG2_E), options


def specialise_combine(inputs: Inputs, mixed: Tensor, stats: Tensor, out: Tensor, plan: PagedPlan, window: int) -> Launch:
    tokens = inputs[0].shape[0]
    sizes = (tokens, plan.chunks, plan.few, inputs[3].shape[1], min(window or ENDLESS, ENDLESS))
    return (mixed, stats, *inputs[4:7], out, *sizes), {**COMBINED, **_sizes(inputs)}


def specialise_prompt(inputs: Inputs, out: Tensor, plan: PagedPlan, window: int, scale: float, tile: PagedTile) -> Launch:
    queries, keys, _, table = inputs[:4]
    tokens = queries.shape[0]
    sizes = (tokens, table.shape[0], plan.few, table.shape[1], keys.shape[0], min(window or ENDLESS, ENDLESS))
    return (*inputs, out, *sizes, scale * LOG2_E), {**_sizes(inputs), **tile._asdict()}


def _wide_loads(keys: Tensor, launch: Launch) -> int:
    """Of a thread in a step, when keys and values come 16 bytes at once."""
    options = launch[1]
    moved = 2 * options["BLOCK_N"] * options["BLOCK_D"] * keys.element_size()
    loads: int = moved // (16 * 32 * options["num_warps"])
    return loads


def gate_cases() -> Iterator[GateCase]:
    """The heads of the decoders and of nano, and ones that allow no vector loads."""
    sizes = [(dtype, heads, dim) for dtype in (torch.bfloat16, torch.float32) for heads, dim in ((10, 128), (6, 64))]
    eight = [(dtype, heads, dim, True) for dtype, heads, dim in [*sizes, (torch.float16, 3, 31)] if dtype.itemsize == 2]
    for dtype, heads, dim, is_eight in [*((*size, False) for size in sizes), (torch.float16, 3, 31, False), *eight]:
        query, cache = ((80, heads, dim), (64, 16, heads, dim))
        queries, keys, values, out = (torch.empty(shape, dtype=dtype, device="meta") for shape in (query, cache, cache, query))
        table = torch.empty(4, 20, dtype=torch.int32, device="meta")
        told = [torch.empty(size, dtype=torch.int64, device="meta") for size in (5, 4, 4)]
        inputs = (queries, keys, values, table, *told, None, None)
        if is_eight:
            keys, scales = torch.empty(cache, dtype=torch.int8, device="meta"), torch.empty(cache[:3], device="meta")
            inputs = (queries, keys, keys, table, *told, scales, scales)
        tile = paged_tile(dim, dtype.itemsize, is_prompt=True, is_8bit=is_eight)
        plan = paged_plan(80, 4, 320, tile.BLOCK_M)
        mixed = torch.empty(plan.rows, plan.chunks, heads, dim, device="meta")
        stats = torch.empty(plan.rows, plan.chunks, heads, 2, device="meta")
        name, is_half = f"{str(dtype).removeprefix('torch.')}-H{heads}-D{dim}{'-8bit' * is_eight}", dtype.itemsize == 2
        chunk = specialise_chunk(inputs, mixed, stats, plan, 0, dim**-0.5)
        is_wide = dim % 16 == 0  # else single values are loaded
        yield GateCase(
            f"chunk-{name}",
            paged_chunk_kernel,
            *chunk,
            tensor_cores=is_half,
            has_small_dots=True,
            wide_loads=_wide_loads(keys, chunk) if is_wide else None,
            most_registers=128 if is_wide else 255,  # four programs
        )
        combine = specialise_combine(inputs, mixed, stats, out, plan, 0)
        if not is_eight:  # it reads neither keys nor values
            yield GateCase(f"combine-{name}", paged_combine_kernel, *combine, tensor_cores=False)
        prompt = specialise_prompt(inputs, out, plan, 0, dim**-0.5, tile)
        yield GateCase(
            f"prompt-{name}",
            paged_prompt_kernel,
            *prompt,
            tensor_cores=is_half,
            has_small_dots=tile.BLOCK_M < 64,
            wide_loads=_wide_loads(keys, prompt) if is_wide and not is_eight else None,
        )
