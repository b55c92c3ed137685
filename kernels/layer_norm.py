"""Rows to mean 0 and variance 1, then scaled and shifted: one read and one write.

    out[n, c] = (x[n, c] - mean(x[n])) / sqrt(variance(x[n]) + eps) * weight[c] + bias[c]

    x          [N, D], weight and bias [D], all fp32, bf16 or fp16
    out        [N, D] of the same type, rounded once from fp32

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
    weight,  # [D]
    bias,  # [D]
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
    b_x = tl.where(m_d[None, :], b_x - tl.sum(b_x, 1)[:, None] / D, 0.0)
    b_inverse = tl.rsqrt(tl.sum(b_x * b_x, 1) / D + eps)  # [ROWS]
    b_weight = tl.load(weight + o_d, mask=m_d, other=0.0).to(tl.float32)  # [BLOCK_D]
    b_bias = tl.load(bias + o_d, mask=m_d, other=0.0).to(tl.float32)
    b_out = b_x * b_inverse[:, None] * b_weight[None, :] + b_bias[None, :]
    tl.store(out + o_x, b_out.to(out.dtype.element_ty), mask=m_x)


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float, out: Tensor) -> None:
    """Fills out.  ops.layer_norm is the checked way in."""
    if out.numel() == 0:
        return
    assert all(tensor.is_contiguous() for tensor in (x, weight, bias, out))
    assert x.dim() == 2
    assert x.shape == out.shape
    assert x.shape[1] <= WIDEST_NORM
    tile = layer_norm_tile(x.shape[1])
    arguments, options = specialise(x, weight, bias, eps, out, tile)
    with torch.cuda.device_of(out):
        layer_norm_kernel[(cdiv(x.shape[0], tile.ROWS),)](*arguments, **options)


def specialise(
    x: Tensor, weight: Tensor, bias: Tensor, eps: float, out: Tensor, tile: RowTile
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """What a launch hands to the kernel: arguments in its order, then constexprs and launch options by name."""
    return (x, weight, bias, out, x.shape[0], eps), {"D": x.shape[1], **tile._asdict()}


def gate_cases() -> Iterator[GateCase]:
    """The widths of both stages and of the neck, nano's, one that allows no vector loads, and the widest."""
    for dtype, width in itertools.product((torch.bfloat16, torch.float32), (768, 192, 384, 77, WIDEST_NORM)):
        x = torch.empty(4096, width, dtype=dtype, device="meta")
        arguments, options = specialise(x, x[0], x[0], 1e-6, x, layer_norm_tile(width))
        name = f"{str(dtype).removeprefix('torch.')}-D{width}"
        yield GateCase(name, layer_norm_kernel, arguments, options, tensor_cores=False)
