"""e4m3_rows: rows as 8-bit floats with one scale each, in one pass over memory.

    scales[t] = max |x[t]| / 448, 2^-126 at least
    steps[t] = x[t] / scales[t], to the nearest e4m3, of two as near the even one

    x       [T, D]        fp32, bf16 or fp16
    steps   e4m3 [T, D]   448 is its largest number
    scales  fp32 [T]      NaN for a row that holds a NaN, infinite for one that holds an infinity

The largest number is found among the numbers' bits, whose order is theirs and in which a NaN is above an infinity: a maximum of
floats may pass over it.  Quotients are IEEE's, so that the answer is the reference's bit for bit.

Assumes contiguous tensors on one device, and a GPU that has the type: 9.0 or later.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from optmem.kernels.launch import GateCase, NormTile, cdiv, norm_tile


@triton.jit(do_not_specialize=["T"])
def e4m3_rows_kernel(
    x,  # [T, D]
    steps,  # [T, D]
    scales,  # [T]
    T,
    D,
    BLOCK_T: tl.constexpr,
    BLOCK_D: tl.constexpr,
) -> None:
    o_t = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    o_d = tl.arange(0, BLOCK_D)
    m_td = (o_t < T)[:, None] & (o_d < D)[None, :]
    o_td = o_t.to(tl.int64)[:, None] * D + o_d[None, :]
    b_x = tl.load(x + o_td, mask=m_td, other=0.0).to(tl.float32)  # [BLOCK_T, BLOCK_D]
    b_most = tl.max(b_x.to(tl.int32, bitcast=True) & 0x7FFFFFFF, axis=1)  # [BLOCK_T]
    b_scale = tl.div_rn(b_most.to(tl.float32, bitcast=True), 448.0)
    b_scale = tl.where(b_scale < 1.1754943508222875e-38, 1.1754943508222875e-38, b_scale)  # a NaN stays one
    tl.store(scales + o_t, b_scale, mask=o_t < T)
    b_steps = tl.div_rn(b_x, tl.broadcast_to(b_scale[:, None], b_x.shape)).to(tl.float8e4nv)  # what is above 448 becomes 448
    tl.store(steps + o_td, b_steps, mask=m_td)


def e4m3_rows(x: Tensor, steps: Tensor, scales: Tensor) -> None:
    """Fills steps and scales.  ops.e4m3_rows is the checked way in."""
    if x.shape[0] == 0:
        return
    assert all(tensor.is_contiguous() for tensor in (x, steps, scales))
    tile = norm_tile(x.shape[1])
    arguments, options = specialise(x, steps, scales, tile)
    with torch.cuda.device_of(x):
        e4m3_rows_kernel[(cdiv(x.shape[0], tile.BLOCK_T),)](*arguments, **options)


def specialise(x: Tensor, steps: Tensor, scales: Tensor, tile: NormTile) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """What a launch hands to the kernel: arguments in its order, then constexprs and launch options by name."""
    return (x, steps, scales, *x.shape), tile._asdict()


def gate_cases() -> Iterator[GateCase]:
    """What the linear layers of all models take, and a width that allows no vector loads."""
    half = torch.bfloat16
    for dtype, width in (
        *itertools.product((half, torch.float32), (24, 192, 384, 896, 1280, 3072, 4096, 6848)),
        (torch.float16, 77),
    ):
        x, steps = (torch.empty(64, width, dtype=kind, device="meta") for kind in (dtype, torch.float8_e4m3fn))
        launch = specialise(x, steps, torch.empty(64, device="meta"), norm_tile(width))
        name = f"{str(dtype).removeprefix('torch.')}-D{width}"
        yield GateCase(name, e4m3_rows_kernel, *launch, tensor_cores=False, least_arch=90)
