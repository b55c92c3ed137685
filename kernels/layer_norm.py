"""layer_norm and add_layer_norm: rows to mean 0 and variance 1, then scaled and shifted, in one pass over memory.

    total = x + residual, rounded; without a residual it is x
    out[n, c] = (total[n, c] - mean(total[n])) / sqrt(variance(total[n]) + eps) * weight[c] + bias[c]

    x, residual, total  [N, D], weight and bias [D], all fp32, bf16 or fp16
    out                 [N, D] of the same type, rounded once from fp32

A program holds whole rows in registers, so that the variance is that of the differences from the mean, as torch has it.
Assumes contiguous tensors on one device, D of at most 4096 and fewer than 2^31 rows.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from optmem.kernels.launch import WIDEST_NORM, GateCase, RowTile, cdiv, layer_norm_tile


@triton.jit(do_not_specialize=["N", "eps"])
def layer_norm_kernel(
    x,  # [N, D]
    residual,  # [N, D], may be None
    weight,  # [D]
    bias,  # [D]
    total,  # [N, D], None where residual is
    out,  # [N, D]
    N,
    eps,
    D: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_D: tl.constexpr,
) -> None:
    o_n = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    o_d = tl.arange(0, BLOCK_D)
    m_d = o_d < D
    m_x = (o_n < N)[:, None] & m_d[None, :]
    o_x = o_n[:, None] * D + o_d[None, :]
    b_x = tl.load(x + o_x, mask=m_x, other=0.0).to(tl.float32)  # [ROWS, BLOCK_D]
    if residual is not None:
        b_residual = tl.load(residual + o_x, mask=m_x, other=0.0).to(tl.float32)  # [ROWS, BLOCK_D]
        b_total = (b_x + b_residual).to(total.dtype.element_ty)
        tl.store(total + o_x, b_total, mask=m_x)
        b_x = b_total.to(tl.float32)
    b_x = tl.where(m_d[None, :], b_x - tl.sum(b_x, 1)[:, None] / D, 0.0)
    b_inverse = tl.rsqrt(tl.sum(b_x * b_x, 1) / D + eps)  # [ROWS]
    b_weight = tl.load(weight + o_d, mask=m_d, other=0.0).to(tl.float32)  # [BLOCK_D]
    b_bias = tl.load(bias + o_d, mask=m_d, other=0.0).to(tl.float32)
    b_out = b_x * b_inverse[:, None] * b_weight[None, :] + b_bias[None, :]
    tl.store(out + o_x, b_out.to(out.dtype.element_ty), mask=m_x)


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float, out: Tensor) -> None:
    """Fills out.  ops.layer_norm is the checked way in."""
    _launch(x, None, weight, bias, eps, None, out)


def add_layer_norm(x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor, eps: float, total: Tensor, out: Tensor) -> None:
    """Fills total and out.  ops.add_layer_norm is the checked way in."""
    _launch(x, residual, weight, bias, eps, total, out)


def _launch(
    x: Tensor, residual: Tensor | None, weight: Tensor, bias: Tensor, eps: float, total: Tensor | None, out: Tensor
) -> None:
    if out.numel() == 0:
        return
    assert all(tensor is None or tensor.is_contiguous() for tensor in (x, residual, weight, bias, total, out))
    assert x.dim() == 2
    assert all(tensor is None or tensor.shape == x.shape for tensor in (residual, total, out))
    assert x.shape[1] <= WIDEST_NORM
    tile = layer_norm_tile(x.shape[1])
    arguments, options = specialise(x, residual, weight, bias, eps, total, out, tile)
    with torch.cuda.device_of(out):
        layer_norm_kernel[(cdiv(x.shape[0], tile.ROWS),)](*arguments, **options)


def specialise(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor,
    bias: Tensor,
    eps: float,
    total: Tensor | None,
    out: Tensor,
    tile: RowTile,
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """What a launch hands to the kernel: arguments in its order, then constexprs and launch options by name."""
    return (x, residual, weight, bias, total, out, x.shape[0], eps), {"D": x.shape[1], **tile._asdict()}


def gate_cases() -> Iterator[GateCase]:
    """The widths of both stages and of the neck, nano's, one that allows no vector loads, and the widest."""
    widths = (768, 192, 384, 77, WIDEST_NORM)
    for dtype, width, adds in itertools.product((torch.bfloat16, torch.float32), widths, (False, True)):
        x = torch.empty(4096, width, dtype=dtype, device="meta")
        arguments, options = specialise(x, x if adds else None, x[0], x[0], 1e-6, x if adds else None, x, layer_norm_tile(width))
        name = f"{str(dtype).removeprefix('torch.')}-D{width}{'-add' if adds else ''}"
        yield GateCase(name, layer_norm_kernel, arguments, options, tensor_cores=False)
