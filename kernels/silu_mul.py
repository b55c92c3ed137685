"""silu_mul: the gate of a SwiGLU, in one pass over memory.

    out = gate / (1 + e^-gate) * up, in fp32, rounded once

    gate, up, out  any one shape     fp32, bf16 or fp16

Assumes contiguous tensors on one device.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from optmem.kernels.launch import SWIGLU, GateCase, cdiv


@triton.jit
def silu_mul_kernel(gate, up, out, N, BLOCK: tl.constexpr) -> None:
    o_n = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    m_n = o_n < N
    b_gate = tl.load(gate + o_n, mask=m_n, other=0.0).to(tl.float32)  # [BLOCK]
    b_up = tl.load(up + o_n, mask=m_n, other=0.0).to(tl.float32)  # [BLOCK]
    b_decay = tl.exp(-tl.abs(b_gate))  # at most 1: nothing overflows
    b_out = b_gate * tl.where(b_gate >= 0.0, 1.0, b_decay) / (1.0 + b_decay) * b_up
    tl.store(out + o_n, b_out.to(out.dtype.element_ty), mask=m_n)


def silu_mul(gate: Tensor, up: Tensor, out: Tensor) -> None:
    """Fills out.  ops.silu_mul is the checked way in."""
    if out.numel() == 0:
        return
    assert all(tensor.is_contiguous() for tensor in (gate, up, out))
    arguments, options = specialise(gate, up, out)
    with torch.cuda.device_of(out):
        silu_mul_kernel[(cdiv(out.numel(), SWIGLU.BLOCK),)](*arguments, **options)


def specialise(gate: Tensor, up: Tensor, out: Tensor) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """What a launch hands to the kernel: arguments in its order, then constexprs and launch options by name."""
    return (gate, up, out, out.numel()), SWIGLU._asdict()


def gate_cases() -> Iterator[GateCase]:
    """Both widths of a number, and a size that allows no vector loads."""
    for dtype, width in ((torch.bfloat16, 6848), (torch.float32, 6848), (torch.bfloat16, 77)):
        tensors = [torch.empty(1, width, dtype=dtype, device="meta") for _ in range(3)]
        arguments, options = specialise(*tensors)
        name = f"{str(dtype).removeprefix('torch.')}-N{width}"
        yield GateCase(name, silu_mul_kernel, arguments, options, tensor_cores=False)
