"""route: which experts every token goes to, and the pairs grouped by expert.

    scores = softmax over e of sum over d of x[t, d] * weight[e, d], in fp32
    ids, weights: the top_k highest scores, greedily, of equals the lower id; not renormalised
    order: the pairs token * top_k + slot sorted by expert, of one expert by pair; e's are order[starts[e]] .. order[starts[e + 1]]

    x        [T, D]           fp32, bf16 or fp16
    weight   [E, D]           of the same type
    ids      int32 [T, top_k], weights fp32 [T, top_k]
    order    int32 [T * top_k], starts int32 [E + 1]

Two kernels: scores and choice for 16 tokens a program; then a program for every expert, which counts the pairs of those before it
and writes its own behind them.  Nothing waits for the host, and nothing is added up in an order that changes.

A token whose scores are NaN goes to the first experts with weights of NaN.

Assumes contiguous tensors on one device.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from optmem.kernels.launch import GROUP_TILES, GateCase, GroupTile, cdiv, group_tile, route_tile


@triton.jit(do_not_specialize=["T"])
def route_choose_kernel(
    x,  # [T, D]
    weight,  # [E, D]
    ids,  # [T, TOP_K]
    weights,  # [T, TOP_K]
    T,
    E,
    D,
    TOP_K: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_K: tl.constexpr,
) -> None:
    o_t = (tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)).to(tl.int64)
    o_e = tl.arange(0, BLOCK_E)
    m_t = o_t < T
    m_e = o_e < E
    b_score = tl.zeros([BLOCK_T, BLOCK_E], dtype=tl.float32)
    for start in range(0, D, BLOCK_K):
        o_k = start + tl.arange(0, BLOCK_K)
        m_k = o_k < D
        b_x = tl.load(x + o_t[:, None] * D + o_k[None, :], mask=m_t[:, None] & m_k[None, :], other=0.0)  # [BLOCK_T, BLOCK_K]
        b_w = tl.load(weight + o_e[None, :] * D + o_k[:, None], mask=m_e[None, :] & m_k[:, None], other=0.0)  # [BLOCK_K, BLOCK_E]
        b_score = tl.dot(b_x, b_w, b_score, input_precision="ieee")

    b_score = tl.where(m_e[None, :], b_score, -float("inf"))
    b_highest = tl.max(b_score, axis=1)
    b_score = tl.exp(b_score - tl.where(b_highest == -float("inf"), 0.0, b_highest)[:, None])
    b_score = b_score / tl.sum(b_score, axis=1)[:, None]
    b_total = tl.sum(b_score, axis=1)  # [BLOCK_T], NaN where one is
    b_score = tl.where(b_score == b_score, b_score, 0.0)
    b_score = tl.where(m_e[None, :], b_score, -1.0)
    for slot in tl.static_range(TOP_K):
        b_best, b_id = tl.max(b_score, axis=1, return_indices=True, return_indices_tie_break_left=True)
        b_best = tl.where(b_total == b_total, b_best, float("nan"))
        tl.store(ids + o_t * TOP_K + slot, b_id, mask=m_t)
        tl.store(weights + o_t * TOP_K + slot, b_best, mask=m_t)
        b_score = tl.where(o_e[None, :] == b_id[:, None], -1.0, b_score)


@triton.jit(do_not_specialize=["P", "E"])
def route_group_kernel(
    ids,  # [P]
    order,  # [P]
    starts,  # [E + 1]
    P,
    E,
    BLOCK_P: tl.constexpr,
) -> None:
    i_e = tl.program_id(0)
    b_before = tl.zeros([BLOCK_P], dtype=tl.int32)
    for first in range(0, P, BLOCK_P):
        o_p = first + tl.arange(0, BLOCK_P)
        b_before += (tl.load(ids + o_p, mask=o_p < P, other=E) < i_e).to(tl.int32)
    place = tl.sum(b_before, axis=0)
    tl.store(starts + i_e, place)
    if i_e < E:  # one program more than experts: it writes the end
        for first in range(0, P, BLOCK_P):
            o_p = first + tl.arange(0, BLOCK_P)
            b_mine = (tl.load(ids + o_p, mask=o_p < P, other=E) == i_e).to(tl.int32)  # [BLOCK_P]
            tl.store(order + place + tl.cumsum(b_mine, axis=0) - 1, o_p, mask=b_mine > 0)
            place += tl.sum(b_mine, axis=0)


def route(x: Tensor, weight: Tensor, ids: Tensor, weights: Tensor, order: Tensor, starts: Tensor) -> None:
    """Fills ids, weights, order and starts.  ops.route is the checked way in."""
    assert all(tensor.is_contiguous() for tensor in (x, weight, ids, weights, order, starts))
    assert order.numel() < 2**30
    with torch.cuda.device_of(x):
        if x.shape[0]:
            arguments, options = specialise_choose(x, weight, ids, weights)
            route_choose_kernel[(cdiv(x.shape[0], options["BLOCK_T"]),)](*arguments, **options)
        arguments, options = specialise_group(ids, order, starts, group_tile(order.numel()))
        route_group_kernel[(starts.numel(),)](*arguments, **options)


Launch = tuple[tuple[Any, ...], dict[str, Any]]  # arguments in the kernel's order, then constexprs and launch options by name


def specialise_choose(x: Tensor, weight: Tensor, ids: Tensor, weights: Tensor) -> Launch:
    sizes = (x.shape[0], *weight.shape)
    return (x, weight, ids, weights, *sizes), {"TOP_K": ids.shape[1], **route_tile(weight.shape[0], x.element_size())._asdict()}


def specialise_group(ids: Tensor, order: Tensor, starts: Tensor, tile: GroupTile) -> Launch:
    return (ids, order, starts, order.numel(), starts.numel() - 1), tile._asdict()


def gate_cases() -> Iterator[GateCase]:
    """The routers of the decoders, one of an odd width, and every way to group."""
    for dtype, width, top_k in (
        (torch.bfloat16, 1280, 6),
        (torch.bfloat16, 384, 1),
        (torch.float16, 77, 6),
        (torch.float32, 1280, 6),
    ):
        x, weight = (torch.empty(rows, width, dtype=dtype, device="meta") for rows in (32, 64))
        ids = torch.empty(32, top_k, dtype=torch.int32, device="meta")
        name, is_half = f"choose-{str(dtype).removeprefix('torch.')}-D{width}-K{top_k}", dtype.itemsize == 2
        choose = specialise_choose(x, weight, ids, torch.empty(32, top_k, device="meta"))
        yield GateCase(name, route_choose_kernel, *choose, tensor_cores=is_half, has_small_dots=True)
    for tile in GROUP_TILES:
        pairs, starts = (torch.empty(size, dtype=torch.int32, device="meta") for size in (6144, 65))
        yield GateCase(
            f"group-{tile.BLOCK_P}", route_group_kernel, *specialise_group(pairs, pairs, starts, tile), tensor_cores=False
        )
