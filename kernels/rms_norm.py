"""rms_norm and add_rms_norm: rows divided by the root of their mean square, in one pass over memory.

    total = x + residual, rounded; without a residual it is x
    out = round(total / sqrt(mean(total^2) + eps)) * weight

    x, residual, total, out  [T, D]     fp32, bf16 or fp16; all inside is fp32
    weight                   [D]

Assumes contiguous tensors on one device.
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
def rms_norm_kernel(
    x,  # [T, D]
    residual,  # [T, D], may be None
    weight,  # [D]
    total,  # [T, D], None where residual is
    out,  # [T, D]
    T,
    D,
    eps,
    BLOCK_T: tl.constexpr,
    BLOCK_D: tl.constexpr,
) -> None:
    o_t = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    o_d = tl.arange(0, BLOCK_D)
    m_d = o_d < D
    m_td = (o_t < T)[:, None] & m_d[None, :]
    o_td = o_t.to(tl.int64)[:, None] * D + o_d[None, :]
    b_x = tl.load(x + o_td, mask=m_td, other=0.0).to(tl.float32)  # [BLOCK_T, BLOCK_D]
    if residual is not None:
        b_residual = tl.load(residual + o_td, mask=m_td, other=0.0).to(tl.float32)  # [BLOCK_T, BLOCK_D]
        b_total = (b_x + b_residual).to(total.dtype.element_ty)
        tl.store(total + o_td, b_total, mask=m_td)
        b_x = b_total.to(tl.float32)
    b_mean = tl.sum(b_x * b_x, axis=1) / D  # [BLOCK_T]
    b_normed = (b_x * tl.rsqrt(b_mean + eps)[:, None]).to(out.dtype.element_ty).to(tl.float32)
    b_weight = tl.load(weight + o_d, mask=m_d, other=0.0).to(tl.float32)  # [BLOCK_D]
    tl.store(out + o_td, (b_normed * b_weight[None, :]).to(out.dtype.element_ty), mask=m_td)


def rms_norm(x: Tensor, weight: Tensor, eps: float, out: Tensor) -> None:
    """Fills out.  ops.rms_norm is the checked way in."""
    _launch(x, None, weight, None, out, eps)


def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float, total: Tensor, out: Tensor) -> None:
    """Fills total and out.  ops.add_rms_norm is the checked way in."""
    _launch(x, residual, weight, total, out, eps)


def _launch(x: Tensor, residual: Tensor | None, weight: Tensor, total: Tensor | None, out: Tensor, eps: float) -> None:
    if out.numel() == 0:
        return
    assert all(tensor is None or tensor.is_contiguous() for tensor in (x, residual, weight, total, out))
    tile = norm_tile(x.shape[1])
    arguments, options = specialise(x, residual, weight, total, out, eps, tile)
    with torch.cuda.device_of(out):
        rms_norm_kernel[(cdiv(x.shape[0], tile.BLOCK_T),)](*arguments, **options)


def specialise(
    x: Tensor, residual: Tensor | None, weight: Tensor, total: Tensor | None, out: Tensor, eps: float, tile: NormTile
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """What a launch hands to the kernel: arguments in its order, then constexprs and launch options by name."""
    return (x, residual, weight, total, out, *x.shape, eps), tile._asdict()


def gate_cases() -> Iterator[GateCase]:
    """The widths of the decoders, of the second generation's queries and of nano, and one that allows no vector loads."""
    half = torch.bfloat16
    for dtype, width, adds in (
        *itertools.product((half, torch.float32), (1280, 384), (False, True)),
        (half, 896, False),
        (torch.float32, 896, False),
        (torch.float16, 77, True),
    ):
        x, out = (torch.empty(64, width, dtype=dtype, device="meta") for _ in range(2))
        weight = torch.empty(width, dtype=dtype, device="meta")
        arguments, options = specialise(x, x if adds else None, weight, x if adds else None, out, 1e-6, norm_tile(width))
        name = f"{str(dtype).removeprefix('torch.')}-D{width}{'-add' if adds else ''}"
        yield GateCase(name, rms_norm_kernel, arguments, options, tensor_cores=False)
