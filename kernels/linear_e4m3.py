"""linear_e4m3: a linear layer of 8-bit floats, and the function that follows it.

    out = f(x_scales * scales * (x weight^T) + bias)       f: x, gelu(x) or x * sigmoid(1.702 x); fp32 inside, rounded once

    x         e4m3 [T, in]     x_scales  fp32 [T]
    weight    e4m3 [out, in]   scales    fp32 [out]
    bias      [out] of out's type, may be None
    out       [T, out]         fp32, bf16 or fp16

Tensor cores of sm_90 keep about 14 bits of a sum of e4m3 products.  Every BLOCK_K columns their sum is added to one in fp32
(max_num_imprecise_acc), as public trainers in this type do.

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

from optmem.kernels.launch import E4m3Tile, GateCase, cdiv, e4m3_tile, e4m3_tiles


@triton.jit(do_not_specialize=["T"])
def linear_e4m3_kernel(
    x,  # [T, K]
    x_scales,  # [T]
    weight,  # [N, K]
    scales,  # [N]
    bias,  # [N], may be None
    out,  # [T, N]
    T,
    N: tl.constexpr,
    K: tl.constexpr,
    ACTIVATION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
) -> None:
    # Neighbouring programs share rows, which come from DRAM once so; the weight stays in the second-level cache.
    tiles_n = tl.cdiv(N, BLOCK_N)
    o_t = tl.program_id(0) // tiles_n * BLOCK_M + tl.arange(0, BLOCK_M)
    o_n = tl.program_id(0) % tiles_n * BLOCK_N + tl.arange(0, BLOCK_N)
    m_t, m_n = o_t < T, o_n < N
    p_x = x + o_t.to(tl.int64)[:, None] * K  # [BLOCK_M, 1]
    p_w = weight + o_n.to(tl.int64)[None, :] * K  # [1, BLOCK_N]
    b_out = tl.zeros([BLOCK_M, BLOCK_N], dtype=tl.float32)
    for start in range(0, K, BLOCK_K):
        o_k = start + tl.arange(0, BLOCK_K)
        b_x = tl.load(p_x + o_k[None, :], mask=m_t[:, None] & (o_k < K)[None, :], other=0.0)  # [BLOCK_M, BLOCK_K]
        b_w = tl.load(p_w + o_k[:, None], mask=(o_k < K)[:, None] & m_n[None, :], other=0.0)  # [BLOCK_K, BLOCK_N]
        b_out = tl.dot(b_x, b_w, b_out, max_num_imprecise_acc=BLOCK_K)
    b_out *= tl.load(x_scales + o_t, mask=m_t, other=0.0)[:, None]
    b_out *= tl.load(scales + o_n, mask=m_n, other=0.0)[None, :]
    if bias is not None:
        b_out += tl.load(bias + o_n, mask=m_n, other=0.0).to(tl.float32)[None, :]
    if ACTIVATION == "gelu":
        b_out = 0.5 * b_out * (1.0 + tl.erf(b_out * 0.7071067811865476))
    if ACTIVATION == "quick_gelu":
        b_out = b_out * tl.sigmoid(1.702 * b_out)
    o_tn = o_t.to(tl.int64)[:, None] * N + o_n[None, :]
    tl.store(out + o_tn, b_out.to(out.dtype.element_ty), mask=m_t[:, None] & m_n[None, :])


Given = tuple[Tensor, Tensor, Tensor, Tensor, Tensor | None]  # x, x_scales, weight, scales, bias


def linear_e4m3(given: Given, activation: str, out: Tensor) -> None:
    """Fills out.  ops.linear_e4m3 is the checked way in."""
    if out.numel() == 0:
        return
    assert all(tensor is None or tensor.is_contiguous() for tensor in (*given, out))
    rows, width_in = given[0].shape
    tile = e4m3_tile(rows, out.shape[1], width_in)
    arguments, options = specialise(given, activation, out, tile)
    with torch.cuda.device_of(out):
        linear_e4m3_kernel[(cdiv(rows, tile.BLOCK_M) * cdiv(out.shape[1], tile.BLOCK_N),)](*arguments, **options)


def specialise(given: Given, activation: str, out: Tensor, tile: E4m3Tile) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """What a launch hands to the kernel: arguments in its order, then constexprs and launch options by name."""
    sizes = {"N": out.shape[1], "K": given[0].shape[1], "ACTIVATION": activation}
    return (*given, out, out.shape[0]), {**sizes, **tile._asdict()}


def gate_cases() -> Iterator[GateCase]:
    """Layers of the encoders and of the decoders, nano's experts among them, every tile; and widths that allow no vector loads."""
    layers = ((3072, 768, True, "gelu"), (4096, 1024, True, "quick_gelu"), (768, 3072, True, "none"), (1280, 6848, False, "none"))
    odd = ((384, 24, False, "none"), (331, 77, True, "gelu"))
    for dtype, (width, width_in, has_bias, activation) in itertools.product((torch.bfloat16, torch.float32), (*layers, *odd)):
        x, weight = (torch.empty(rows, width_in, dtype=torch.float8_e4m3fn, device="meta") for rows in (64, width))
        x_scales, scales = (torch.empty(rows, device="meta") for rows in (64, width))
        bias = torch.empty(width, dtype=dtype, device="meta") if has_bias else None
        out = torch.empty(64, width, dtype=dtype, device="meta")
        for tile in e4m3_tiles(width_in):
            launch = specialise((x, x_scales, weight, scales, bias), activation, out, tile)
            name = f"{str(dtype).removeprefix('torch.')}-N{width}-K{width_in}-{activation}-{tile.BLOCK_M}x{tile.BLOCK_N}"
            yield GateCase(name, linear_e4m3_kernel, *launch, tensor_cores=True, has_small_dots=tile.BLOCK_M < 64, least_arch=90)
