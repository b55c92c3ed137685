"""The function that follows a linear layer, in place, where cuBLAS made the product: one read and one write.

    gelu         x / 2 * (1 + erf(x / sqrt(2)))
    quick_gelu   x * sigmoid(1.702 x)

    x            [N], fp32, bf16 or fp16, what the product and its bias were rounded to; the function is in fp32, rounded once

cuBLAS has an epilogue for the other GELU alone, that of the hyperbolic tangent, whose error is beyond fp32's and bf16's.
Assumes a contiguous tensor of fewer than 2^31 blocks.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from optmem.kernels.launch import GateCase, cdiv

BLOCK = 2048  # numbers of a program: sixteen a thread, two loads of 16 bytes in 16-bit types


@triton.jit
def linear_activation_kernel(x, N, IS_QUICK: tl.constexpr, BLOCK_N: tl.constexpr) -> None:
    o_n = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    b_x = tl.load(x + o_n, mask=o_n < N, other=0.0).to(tl.float32)  # [BLOCK_N]
    b_y = b_x * tl.sigmoid(1.702 * b_x) if IS_QUICK else 0.5 * b_x * (1.0 + tl.erf(b_x * 0.7071067811865476))
    tl.store(x + o_n, b_y.to(x.dtype.element_ty), mask=o_n < N)


def activate(x: Tensor, activation: str) -> None:
    """Changes x in place.  ops.linear is the checked way in."""
    if x.numel() == 0:
        return
    assert x.is_contiguous()
    assert activation in ("gelu", "quick_gelu")
    with torch.cuda.device_of(x):
        linear_activation_kernel[(cdiv(x.numel(), BLOCK),)](x, x.numel(), IS_QUICK=activation == "quick_gelu", BLOCK_N=BLOCK)


def gate_cases() -> Iterator[GateCase]:
    for dtype, is_quick in itertools.product((torch.bfloat16, torch.float32), (False, True)):
        x = torch.empty(4096, 3072, dtype=dtype, device="meta")
        name = f"{str(dtype).removeprefix('torch.')}-{'quick_gelu' if is_quick else 'gelu'}"
        yield GateCase(name, linear_activation_kernel, (x, x.numel()), {"IS_QUICK": is_quick, "BLOCK_N": BLOCK}, tensor_cores=False)
