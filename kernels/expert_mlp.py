"""expert_mlp: every token through its experts.

    inner[p] = silu(gate[e] x[t]) * (up[e] x[t]), rounded      for pair p = t * top_k + slot, which goes to expert e
    out[t] = sum over slots, in their order, of weights[p] * (down[e] inner[p]), in fp32, rounded once

    x        [T, D]            fp32, bf16 or fp16
    gate_up  [E, 2 * F, D]     an expert's gate rows, then its up rows
    down     [E, D, F]
    gate_up_scales, down_scales   None; or fp32 [E, 2 * F] and [E, D], of matrices of e4m3, whose rows they multiply
    weights  fp32 [T, top_k]
    order    int32 [T * top_k], starts int32 [E + 1]      the pairs by expert, as route leaves them
    out      [T, D]

Up to VECTOR_ROWS tokens are matrix-vector products: every pair streams its expert's matrices, and a token's slots meet in one
program.  More are grouped: a tile has pairs of one expert, and reads that expert's matrices once.  Which expert a tile belongs to
is found on the device, in starts; the host knows how many tiles are enough for any.  There the down matrix's product is rounded to
x's type before it is weighed, as the references of the family do, and a last kernel adds the slots up.

Matrices of e4m3 meet rows of e4m3: tokens are rounded by kernels/e4m3_rows.py ahead of the first product, and what stands between
the two, already rounded to x's type, ahead of the second.  Sums of products are kept as kernels/linear_e4m3.py keeps them.

Nothing here trusts order and starts with an address: what lies outside is passed over.

Assumes contiguous tensors on one device, and fewer than 2^30 pairs.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from optmem.kernels.e4m3_rows import e4m3_rows
from optmem.kernels.launch import (
    VECTOR_INTO,
    VECTOR_OUT_OF,
    VECTOR_OUT_OF_FP32,
    VECTOR_ROWS,
    ExpertTile,
    GateCase,
    cdiv,
    expert_blocks,
    expert_tile,
    expert_tiles,
    power_of_two,
)


@triton.jit
def swiglu(b_gate, b_up) -> Any:
    """silu(gate) * up, where nothing overflows."""
    b_decay = tl.exp(-tl.abs(b_gate))
    return b_gate * tl.where(b_gate >= 0.0, 1.0, b_decay) / (1.0 + b_decay) * b_up


@triton.jit
def expert_at(place, starts, E, BLOCK_E: tl.constexpr) -> Any:
    """The expert that owns a place in order."""
    o_e = tl.arange(0, BLOCK_E)
    b_end = tl.load(starts + 1 + o_e, mask=o_e < E, other=1 << 30)  # [BLOCK_E]
    return tl.minimum(tl.sum((b_end <= place).to(tl.int32), axis=0), E - 1)


@triton.jit
def block_at(i_block, starts, P, E, BLOCK_E: tl.constexpr, BLOCK_M: tl.constexpr) -> tuple[Any, ...]:
    """The expert of a block, and its places first .. end in order: none where there are fewer blocks than were launched."""
    o_e = tl.arange(0, BLOCK_E)
    b_first = tl.load(starts + o_e, mask=o_e < E, other=1 << 30) // BLOCK_M + o_e  # [BLOCK_E]
    i_e = tl.maximum(tl.sum((b_first <= i_block).to(tl.int32), axis=0) - 1, 0)
    start = tl.maximum(tl.load(starts + i_e), 0)
    end = tl.minimum(tl.load(starts + i_e + 1), P)
    first = start + (i_block - start // BLOCK_M - i_e) * BLOCK_M
    return i_e.to(tl.int64), first, tl.where(first < start, first, end)


@triton.jit
def tile_at(width, order, starts, P, E, BLOCK_E: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr) -> tuple[Any, ...]:
    """What a program of the grouped kernels has: its expert, its places first .. end, all that a block has, columns, and pairs."""
    tiles_n = tl.cdiv(width, BLOCK_N)
    i_e, first, end = block_at(tl.program_id(0) // tiles_n, starts, P, E, BLOCK_E, BLOCK_M)
    o_m = first + tl.arange(0, BLOCK_M)
    o_n = tl.program_id(0) % tiles_n * BLOCK_N + tl.arange(0, BLOCK_N)
    b_pair = tl.load(order + o_m, mask=o_m < end, other=-1)  # [BLOCK_M]
    return i_e, first, end, o_m, o_n, b_pair


@triton.jit(do_not_specialize=["P"])
def expert_vector_into_kernel(
    x,  # [T, D]
    x_scales,  # [T], may be None, where gate_up's are
    gate_up,  # [E, 2 * F, D]
    gate_up_scales,  # [E, 2 * F], may be None
    order,  # [P]
    starts,  # [E + 1]
    inner,  # [P, F]
    P,
    TOP_K,
    E,
    F: tl.constexpr,
    D: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
) -> None:
    tiles_n = tl.cdiv(F, BLOCK_N)
    i_p = tl.program_id(0) // tiles_n
    i_pair = tl.load(order + i_p)
    if (i_pair < 0) | (i_pair >= P):
        return
    o_n = tl.program_id(0) % tiles_n * BLOCK_N + tl.arange(0, BLOCK_N)
    m_n = o_n < F
    p_x = x + (i_pair // TOP_K).to(tl.int64) * D
    o_row = expert_at(i_p, starts, E, BLOCK_E).to(tl.int64) * 2 * F + o_n
    p_gate = gate_up + o_row[:, None] * D  # [BLOCK_N, 1]
    b_gate = tl.zeros([BLOCK_N, BLOCK_K], dtype=tl.float32)
    b_up = tl.zeros([BLOCK_N, BLOCK_K], dtype=tl.float32)
    for start in range(0, D, BLOCK_K):
        o_k = start + tl.arange(0, BLOCK_K)
        m_nk = m_n[:, None] & (o_k < D)[None, :]
        b_x = tl.load(p_x + o_k, mask=o_k < D, other=0.0).to(tl.float32)[None, :]  # [1, BLOCK_K]
        b_gate += b_x * tl.load(p_gate + o_k[None, :], mask=m_nk, other=0.0).to(tl.float32)  # [BLOCK_N, BLOCK_K]
        b_up += b_x * tl.load(p_gate + F * D + o_k[None, :], mask=m_nk, other=0.0).to(tl.float32)  # [BLOCK_N, BLOCK_K]
    b_gates, b_ups = tl.sum(b_gate, axis=1), tl.sum(b_up, axis=1)  # [BLOCK_N]
    if gate_up_scales is not None:
        b_scale = tl.load(x_scales + i_pair // TOP_K)
        b_gates *= b_scale * tl.load(gate_up_scales + o_row, mask=m_n, other=0.0)
        b_ups *= b_scale * tl.load(gate_up_scales + F + o_row, mask=m_n, other=0.0)
    b_inner = swiglu(b_gates, b_ups)
    tl.store(inner + i_p.to(tl.int64) * F + o_n, b_inner.to(inner.dtype.element_ty), mask=m_n)


@triton.jit(do_not_specialize=["P"])
def expert_vector_out_of_kernel(
    inner,  # [P, F]
    inner_scales,  # [P], may be None, where down's are
    down,  # [E, D, F]
    down_scales,  # [E, D], may be None
    weights,  # [T, TOP_K]
    order,  # [P]
    starts,  # [E + 1]
    out,  # [T, D]
    P,
    TOP_K: tl.constexpr,
    E,
    F: tl.constexpr,
    D: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
) -> None:
    tiles_n = tl.cdiv(D, BLOCK_N)
    i_t = tl.program_id(0) // tiles_n
    o_n = tl.program_id(0) % tiles_n * BLOCK_N + tl.arange(0, BLOCK_N)
    m_n = o_n < D
    o_p = tl.arange(0, BLOCK_P)
    b_pair = tl.load(order + o_p, mask=o_p < P, other=-1)  # [BLOCK_P]
    # One sum for all slots, which is added up across threads once: between the slots' loads nothing waits.
    b_out = tl.zeros([BLOCK_N, BLOCK_K], dtype=tl.float32)
    for slot in tl.static_range(TOP_K):
        i_pair = i_t * TOP_K + slot
        i_p = tl.max(tl.where(b_pair == i_pair, o_p, 0), axis=0)
        b_weight = tl.load(weights + i_pair)
        o_row = expert_at(i_p, starts, E, BLOCK_E).to(tl.int64) * D + o_n
        p_down = down + o_row[:, None] * F  # [BLOCK_N, 1]
        if down_scales is not None:
            b_weight *= tl.load(inner_scales + i_p)
            b_scale = tl.load(down_scales + o_row, mask=m_n, other=0.0)  # [BLOCK_N]
        for start in range(0, F, BLOCK_K):
            o_k = start + tl.arange(0, BLOCK_K)
            b_inner = tl.load(inner + i_p.to(tl.int64) * F + o_k, mask=o_k < F, other=0.0).to(tl.float32)  # [BLOCK_K]
            b_down = tl.load(p_down + o_k[None, :], mask=m_n[:, None] & (o_k < F)[None, :], other=0.0).to(tl.float32)
            if down_scales is not None:
                b_down *= b_scale[:, None]
            b_out += (b_inner * b_weight)[None, :] * b_down  # [BLOCK_N, BLOCK_K]
    tl.store(out + i_t.to(tl.int64) * D + o_n, tl.sum(b_out, axis=1).to(out.dtype.element_ty), mask=m_n)


@triton.jit(do_not_specialize=["P"])
def expert_into_kernel(
    x,  # [T, D]
    x_scales,  # [T], may be None, where gate_up's are
    gate_up,  # [E, 2 * F, D]
    gate_up_scales,  # [E, 2 * F], may be None
    order,  # [P]
    starts,  # [E + 1]
    inner,  # [P, F], by expert
    P,
    TOP_K,
    E,
    F: tl.constexpr,
    D: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
) -> None:
    # Neighbouring programs share pairs and read all of the matrix between them: an expert's tiles have it from DRAM once.
    i_e, first, end, o_m, o_n, b_pair = tile_at(F, order, starts, P, E, BLOCK_E, BLOCK_M, BLOCK_N)
    if first >= end:
        return
    m_m = (b_pair >= 0) & (b_pair < P)
    p_x = x + (b_pair // TOP_K).to(tl.int64)[:, None] * D  # [BLOCK_M, 1]
    o_row = i_e * 2 * F + o_n
    p_gate = gate_up + o_row[None, :] * D  # [1, BLOCK_N]
    b_gate = tl.zeros([BLOCK_M, BLOCK_N], dtype=tl.float32)
    b_up = tl.zeros([BLOCK_M, BLOCK_N], dtype=tl.float32)
    IMPRECISE: tl.constexpr = 0 if gate_up_scales is None else BLOCK_K
    for start in range(0, D, BLOCK_K):
        o_k = start + tl.arange(0, BLOCK_K)
        m_kn = (o_k < D)[:, None] & (o_n < F)[None, :]
        b_x = tl.load(p_x + o_k[None, :], mask=m_m[:, None] & (o_k < D)[None, :], other=0.0)  # [BLOCK_M, BLOCK_K]
        b_w = tl.load(p_gate + o_k[:, None], mask=m_kn, other=0.0)  # [BLOCK_K, BLOCK_N]
        b_gate = tl.dot(b_x, b_w, b_gate, input_precision="ieee", max_num_imprecise_acc=IMPRECISE)
        b_w = tl.load(p_gate + F * D + o_k[:, None], mask=m_kn, other=0.0)  # [BLOCK_K, BLOCK_N]
        b_up = tl.dot(b_x, b_w, b_up, input_precision="ieee", max_num_imprecise_acc=IMPRECISE)
    if gate_up_scales is not None:
        b_scale = tl.load(x_scales + b_pair // TOP_K, mask=m_m, other=0.0)[:, None]  # [BLOCK_M, 1]
        b_gate *= b_scale * tl.load(gate_up_scales + o_row, mask=o_n < F, other=0.0)[None, :]
        b_up *= b_scale * tl.load(gate_up_scales + F + o_row, mask=o_n < F, other=0.0)[None, :]
    b_inner = swiglu(b_gate, b_up).to(inner.dtype.element_ty)
    tl.store(inner + o_m.to(tl.int64)[:, None] * F + o_n[None, :], b_inner, mask=(o_m < end)[:, None] & (o_n < F)[None, :])


@triton.jit(do_not_specialize=["P"])
def expert_out_of_kernel(
    inner,  # [P, F], by expert
    inner_scales,  # [P], may be None, where down's are
    down,  # [E, D, F]
    down_scales,  # [E, D], may be None
    order,  # [P]
    starts,  # [E + 1]
    outputs,  # [P, D], by pair
    P,
    E,
    F: tl.constexpr,
    D: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
) -> None:
    i_e, first, end, o_m, o_n, b_pair = tile_at(D, order, starts, P, E, BLOCK_E, BLOCK_M, BLOCK_N)
    if first >= end:
        return
    m_m = (b_pair >= 0) & (b_pair < P)
    p_inner = inner + o_m.to(tl.int64)[:, None] * F  # [BLOCK_M, 1]
    p_down = down + (i_e * D + o_n)[None, :] * F  # [1, BLOCK_N]
    b_out = tl.zeros([BLOCK_M, BLOCK_N], dtype=tl.float32)
    IMPRECISE: tl.constexpr = 0 if down_scales is None else BLOCK_K
    for start in range(0, F, BLOCK_K):
        o_k = start + tl.arange(0, BLOCK_K)
        b_inner = tl.load(p_inner + o_k[None, :], mask=m_m[:, None] & (o_k < F)[None, :], other=0.0)  # [BLOCK_M, BLOCK_K]
        b_w = tl.load(p_down + o_k[:, None], mask=(o_k < F)[:, None] & (o_n < D)[None, :], other=0.0)  # [BLOCK_K, BLOCK_N]
        b_out = tl.dot(b_inner, b_w, b_out, input_precision="ieee", max_num_imprecise_acc=IMPRECISE)
    if down_scales is not None:
        b_out *= tl.load(inner_scales + o_m, mask=m_m, other=0.0)[:, None]
        b_out *= tl.load(down_scales + i_e * D + o_n, mask=o_n < D, other=0.0)[None, :]
    p_out = outputs + b_pair.to(tl.int64)[:, None] * D + o_n[None, :]
    tl.store(p_out, b_out.to(outputs.dtype.element_ty), mask=m_m[:, None] & (o_n < D)[None, :])


@triton.jit
def expert_sum_kernel(
    outputs,  # [T, TOP_K, D]
    weights,  # [T, TOP_K]
    out,  # [T, D]
    D,
    TOP_K: tl.constexpr,
    BLOCK_D: tl.constexpr,
) -> None:
    i_t = tl.program_id(0).to(tl.int64)
    o_d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    m_d = o_d < D
    b_out = tl.zeros([BLOCK_D], dtype=tl.float32)
    for slot in tl.static_range(TOP_K):
        b_one = tl.load(outputs + (i_t * TOP_K + slot) * D + o_d, mask=m_d, other=0.0).to(tl.float32)  # [BLOCK_D]
        b_out += tl.load(weights + i_t * TOP_K + slot) * b_one
    tl.store(out + i_t * D + o_d, b_out.to(out.dtype.element_ty), mask=m_d)


SUMMED = {"BLOCK_D": 1024, "num_warps": 4}


def expert_mlp(
    x: Tensor,
    gate_up: Tensor,
    down: Tensor,
    weights: Tensor,
    order: Tensor,
    starts: Tensor,
    out: Tensor,
    gate_up_scales: Tensor | None = None,
    down_scales: Tensor | None = None,
) -> None:
    """Fills out.  ops.expert_mlp is the checked way in."""
    if out.numel() == 0:
        return
    given = (x, gate_up, down, weights, order, starts)
    scales = (gate_up_scales, down_scales)
    assert all(tensor is None or tensor.is_contiguous() for tensor in (*given, *scales, out))
    assert order.numel() < 2**30
    with torch.cuda.device_of(out):
        if x.shape[0] <= VECTOR_ROWS:
            _launch_vectors(given, scales, out)
        else:
            _launch_groups(given, scales, out, expert_tile(order.numel(), down.shape[0], down.element_size()))


def _launch_vectors(given: Given, scales: Scales, out: Tensor) -> None:
    x, _, down, _, order, _ = given
    _, hidden, width = down.shape
    inner = x.new_empty((order.numel(), width))
    rows, x_scales = as_held(x, scales[0])
    arguments, options = specialise_vector_into((rows, *given[1:]), inner, (x_scales, scales[0]))
    expert_vector_into_kernel[(order.numel() * cdiv(width, options["BLOCK_N"]),)](*arguments, **options)
    rows, inner_scales = as_held(inner, scales[1])
    arguments, options = specialise_vector_out_of(given, rows, out, (inner_scales, scales[1]))
    expert_vector_out_of_kernel[(x.shape[0] * cdiv(hidden, options["BLOCK_N"]),)](*arguments, **options)


def _launch_groups(given: Given, scales: Scales, out: Tensor, tile: ExpertTile) -> None:
    x, _, down, _, order, _ = given
    experts, hidden, width = down.shape
    blocks = expert_blocks(order.numel(), experts, tile.BLOCK_M)
    inner, outputs = (x.new_empty((order.numel(), size)) for size in (width, hidden))
    rows, x_scales = as_held(x, scales[0])
    arguments, options = specialise_into((rows, *given[1:]), inner, tile, (x_scales, scales[0]))
    expert_into_kernel[(blocks * cdiv(width, options["BLOCK_N"]),)](*arguments, **options)
    rows, inner_scales = as_held(inner, scales[1])
    arguments, options = specialise_out_of(given, rows, outputs, tile, (inner_scales, scales[1]))
    expert_out_of_kernel[(blocks * cdiv(hidden, options["BLOCK_N"]),)](*arguments, **options)
    arguments, options = specialise_sum(given, outputs, out)
    expert_sum_kernel[(x.shape[0], cdiv(hidden, options["BLOCK_D"]))](*arguments, **options)


def as_held(rows: Tensor, scales: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """Rows as matrices with these scales take them: as e4m3 with scales of their own, or as they are."""
    if scales is None:
        return rows, None
    steps = torch.empty_like(rows, dtype=torch.float8_e4m3fn)
    of_rows = torch.empty(len(rows), dtype=torch.float32, device=rows.device)
    e4m3_rows(rows, steps, of_rows)
    return steps, of_rows


Given = tuple[Tensor, ...]  # x, gate_up, down, weights, order, starts
Scales = tuple[Tensor | None, Tensor | None]  # of both matrices; of the rows and the matrix of one product
Launch = tuple[tuple[Any, ...], dict[str, Any]]  # arguments in the kernel's order, then constexprs and launch options by name
NONE: Scales = (None, None)


def _sizes(given: Given) -> dict[str, int]:
    experts, hidden, width = given[2].shape
    return {"F": width, "D": hidden, "BLOCK_E": power_of_two(experts)}


def specialise_vector_into(given: Given, inner: Tensor, scales: Scales = NONE) -> Launch:
    x, gate_up, _, weights, order, starts = given
    tensors = (x, scales[0], gate_up, scales[1], order, starts, inner)
    return (*tensors, order.numel(), weights.shape[1], gate_up.shape[0]), {**_sizes(given), **VECTOR_INTO._asdict()}


def specialise_vector_out_of(given: Given, inner: Tensor, out: Tensor, scales: Scales = NONE) -> Launch:
    _, _, down, weights, order, starts = given
    top_k = weights.shape[1]
    more = {"TOP_K": top_k, "BLOCK_P": power_of_two(VECTOR_ROWS * top_k)}
    arguments = (inner, scales[0], down, scales[1], weights, order, starts, out, order.numel())
    tile = VECTOR_OUT_OF_FP32 if out.element_size() == 4 else VECTOR_OUT_OF
    return arguments, {"E": down.shape[0], **more, **_sizes(given), **tile._asdict()}


def specialise_into(given: Given, inner: Tensor, tile: ExpertTile, scales: Scales = NONE) -> Launch:
    x, gate_up, _, weights, order, starts = given
    tensors = (x, scales[0], gate_up, scales[1], order, starts, inner)
    return (*tensors, order.numel(), weights.shape[1], gate_up.shape[0]), {**_sizes(given), **tile._asdict()}


def specialise_out_of(given: Given, inner: Tensor, outputs: Tensor, tile: ExpertTile, scales: Scales = NONE) -> Launch:
    down, order, starts = given[2], given[4], given[5]
    options = {**_sizes(given), **tile._asdict(), "BLOCK_N": 2 * tile.BLOCK_N}
    return (inner, scales[0], down, scales[1], order, starts, outputs, order.numel(), down.shape[0]), options


def specialise_sum(given: Given, outputs: Tensor, out: Tensor) -> Launch:
    weights = given[3]
    return (outputs, weights, out, out.shape[1]), {"TOP_K": weights.shape[1], **SUMMED}


def gate_cases() -> Iterator[GateCase]:
    """The experts of the decoders, every tile; nano's, with those of its batches; and ones that allow no vector loads."""
    half, wide, odd = torch.bfloat16, torch.float32, (torch.float16, 77, 33, 2, 1)
    plain = ((half, 1280, 896, 6, 3), (wide, 1280, 896, 6, 1), (half, 384, 24, 1, 2), (wide, 384, 24, 1, 0), odd)
    e4m3 = ((half, 1280, 896, 6, 3), (wide, 1280, 896, 6, 3), (half, 384, 24, 1, 2), (wide, 384, 24, 1, 2), odd)
    for dtype, *sizes in plain:
        yield from _cases_of(dtype, dtype, *sizes)
    for dtype, *sizes in e4m3:
        yield from _cases_of(dtype, torch.float8_e4m3fn, *sizes)


def _cases_of(dtype: torch.dtype, held: torch.dtype, hidden: int, width: int, top_k: int, num_tiles: int) -> Iterator[GateCase]:
    """One decoder's experts, with matrices that are held as this type."""
    shapes = ((40, hidden), (64, 2 * width, hidden), (64, hidden, width), (40 * top_k, width), (40 * top_k, hidden))
    x, gate_up, down, inner, outputs = (torch.empty(shape, device="meta") for shape in shapes)
    x, inner, outputs = (tensor.to(dtype) for tensor in (x, inner, outputs))
    weights = torch.empty(40, top_k, device="meta")
    order, starts = (torch.empty(size, dtype=torch.int32, device="meta") for size in (40 * top_k, 65))
    given = (x.to(held), gate_up.to(held), down.to(held), weights, order, starts)
    is_e4m3 = held != dtype
    into, out_of = (
        (torch.empty(rows, device="meta"), torch.empty(64, columns, device="meta")) if is_e4m3 else NONE
        for rows, columns in ((40, 2 * width), (40 * top_k, hidden))
    )
    name = f"{'e4m3-' if is_e4m3 else ''}{str(dtype).removeprefix('torch.')}-D{hidden}-F{width}"
    least = 90 if is_e4m3 else 80
    launch = specialise_vector_into(given, inner, into)
    yield GateCase(f"vector-into-{name}", expert_vector_into_kernel, *launch, tensor_cores=False, least_arch=least)
    launch = specialise_vector_out_of(given, inner.to(held), x, out_of)
    yield GateCase(f"vector-out-of-{name}", expert_vector_out_of_kernel, *launch, tensor_cores=False, least_arch=least)
    if not is_e4m3:
        yield GateCase(f"sum-{name}", expert_sum_kernel, *specialise_sum(given, outputs, x), tensor_cores=False)
    for tile in expert_tiles(held.itemsize)[:num_tiles]:
        is_half, is_small = held.itemsize < 4, tile.BLOCK_M < 64
        launch = specialise_into(given, inner, tile, into)
        yield GateCase(f"into-{name}-{tile.BLOCK_M}", expert_into_kernel, *launch, is_half, is_small, least_arch=least)
        launch = specialise_out_of(given, inner.to(held), outputs, tile, out_of)
        yield GateCase(f"out-of-{name}-{tile.BLOCK_M}", expert_out_of_kernel, *launch, is_half, is_small, least_arch=least)
