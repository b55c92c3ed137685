"""Linear layers of 8-bit floats (e4m3): rows are rounded to a scale of their own, products are summed in fp32."""

from __future__ import annotations

from functools import partial
from typing import NamedTuple, get_args

import torch
from torch import Tensor

from optmem import reference
from optmem.machine import require_e4m3
from optmem.ops.linear import Activation
from optmem.ops.registry import (
    TRITON_TYPES,
    Implementation,
    check,
    check_like,
    check_same_kind,
    described,
    library,
    triton_module,
    triton_or_reference,
)

E4M3 = torch.float8_e4m3fn
WIDEST_ROW = 1 << 15  # numbers of a row that a program of the kernel holds

# --- e4m3_rows ------------------------------------------------------------------------------------------------------------------

library.define("e4m3_rows(Tensor x) -> (Tensor, Tensor)")


class E4m3Rows(NamedTuple):
    """Rows of a tensor as 8-bit floats, and what a step of each is worth."""

    steps: Tensor  # e4m3 [..., D]
    scales: Tensor  # fp32 [...]
    dtype: torch.dtype  # that they came in


def e4m3_rows(x: Tensor) -> E4m3Rows:
    """Every row's largest number becomes 448, the others the nearest e4m3 beside it.

    x   [..., D]   fp32, bf16 or fp16

    A row that holds a NaN or an infinity has a scale that is none either, and spoils what is made of it, and no other row.
    """
    check_same_kind("e4m3_rows", x=x)
    check(x.dim() > 0 and x.shape[-1] > 0, f"e4m3_rows: x must be [..., D] with D at least 1, got {list(x.shape)}")
    steps, scales = torch.ops.optmem.e4m3_rows(x)
    return E4m3Rows(steps, scales, x.dtype)


torch.library.impl(library, "e4m3_rows", "CPU")(reference.e4m3_rows)


@torch.library.impl(library, "e4m3_rows", "CUDA")
def _e4m3_rows_cuda(x: Tensor) -> tuple[Tensor, Tensor]:
    kernel = triton_module("e4m3_rows")
    if kernel is None:
        return reference.e4m3_rows(x)
    require_e4m3(x.device)
    width = x.shape[-1]
    check(width <= WIDEST_ROW, f"e4m3_rows: on a GPU a row has at most {WIDEST_ROW} numbers, got {width}")
    steps, scales = _e4m3_rows_fake(x)
    rows = x.shape[:-1].numel()
    kernel.e4m3_rows(x.reshape(rows, width).contiguous(), steps.view(rows, width), scales.view(rows))
    return steps, scales


@torch.library.register_fake("optmem::e4m3_rows")
def _e4m3_rows_fake(x: Tensor) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape, dtype=E4M3), x.new_empty(x.shape[:-1], dtype=torch.float32)


# --- linear_e4m3 ----------------------------------------------------------------------------------------------------------------

library.define(
    "linear_e4m3(Tensor x, Tensor x_scales, Tensor weight, Tensor scales, Tensor? bias, str activation, ScalarType dtype) -> Tensor"
)


def linear_e4m3(x: E4m3Rows, weight: Tensor, scales: Tensor, bias: Tensor | None = None, activation: Activation = "none") -> Tensor:
    """x weight^T + bias of what the 8-bit floats stand for, then a function; all in fp32, rounded once to x's own type.

    x        rows of `in` numbers, as e4m3_rows makes them
    weight   e4m3 [out, in]
    scales   fp32 [out]     what a row of the weight is multiplied by
    bias     [out] of the type that x came in, or None
    -> [..., out]

    Raises InputError where shapes, types or devices do not fit together, BackendError on a GPU that has no such products.
    """
    check_like("linear_e4m3", x.steps, {"x": (x.steps, list(x.steps.shape))}, E4M3)
    check(x.dtype in TRITON_TYPES, f"linear_e4m3: x must have come as {', '.join(map(str, TRITON_TYPES))}, got {x.dtype}")
    width = x.steps.shape[-1]
    check(weight.dim() == 2 and weight.shape[1] == width, f"linear_e4m3: weight must be [out, {width}], got {list(weight.shape)}")
    check_like("linear_e4m3", x.steps, {"weight": (weight, list(weight.shape))})
    out = [weight.shape[0]]
    check_like("linear_e4m3", x.steps, {"x's scales": (x.scales, list(x.steps.shape[:-1])), "scales": (scales, out)}, torch.float32)
    check_like("linear_e4m3", x.steps, {} if bias is None else {"bias": (bias, out)}, x.dtype)
    allowed = get_args(Activation)
    check(activation in allowed, f"linear_e4m3: activation must be one of {allowed}, got {activation!r}")
    product: Tensor = torch.ops.optmem.linear_e4m3(x.steps, x.scales, weight, scales, bias, activation, x.dtype)
    return product


torch.library.impl(library, "linear_e4m3", "CPU")(reference.linear_e4m3)


@torch.library.impl(library, "linear_e4m3", "CUDA")
def _linear_e4m3_cuda(
    x: Tensor, x_scales: Tensor, weight: Tensor, scales: Tensor, bias: Tensor | None, activation: Activation, dtype: torch.dtype
) -> Tensor:
    kernel = triton_module("linear_e4m3")
    if kernel is None:
        return reference.linear_e4m3(x, x_scales, weight, scales, bias, activation, dtype)
    require_e4m3(x.device)
    out: Tensor = _linear_e4m3_fake(x, x_scales, weight, scales, bias, activation, dtype)
    rows = x.shape[:-1].numel()
    added = None if bias is None else bias.contiguous()
    given = (x.reshape(rows, x.shape[-1]), x_scales.reshape(rows), weight, scales)
    kernel.linear_e4m3((*(tensor.contiguous() for tensor in given), added), activation, out.view(rows, weight.shape[0]))
    return out


@torch.library.register_fake("optmem::linear_e4m3")
def _linear_e4m3_fake(
    x: Tensor, x_scales: Tensor, weight: Tensor, scales: Tensor, bias: Tensor | None, activation: Activation, dtype: torch.dtype
) -> Tensor:
    return x.new_empty((*x.shape[:-1], weight.shape[0]), dtype=dtype)


def _on_a_cpu(operator: str) -> Implementation:
    return Implementation(operator, "cpu", "reference", "dtype='fp8' on a CPU: for proof, not for speed")


for _operator in ("e4m3_rows", "linear_e4m3"):
    described.append(partial(_on_a_cpu, _operator))
    described.append(triton_or_reference(_operator, but=", dtype='fp8' from compute capability 9.0 on"))
