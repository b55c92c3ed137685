"""Linear layers: those of the vision encoders with the function that follows them, and the decoder's, row by row."""

from __future__ import annotations

from typing import Literal, get_args

import torch
from torch import Tensor

from optmem import reference
from optmem.errors import InputError
from optmem.native import native
from optmem.ops.registry import (
    Implementation,
    as_array,
    check,
    check_float,
    check_like,
    check_same_kind,
    check_weights,
    cpp_for,
    cpp_or_reference,
    described,
    is_training,
    library,
    triton_module,
)

Activation = Literal["none", "gelu", "quick_gelu"]

library.define("linear(Tensor x, Tensor weight, Tensor? bias, str activation) -> Tensor")


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None, activation: Activation = "none") -> Tensor:
    """x weight^T + bias, then a function; the sums are fp32.

    x           [..., in]     fp32, bf16 or fp16; so are weight and bias
    weight      [out, in]
    bias        [out], or None
    activation  "gelu" is the exact one, "quick_gelu" x * sigmoid(1.702 x)
    -> [..., out]

    Raises InputError where shapes, types or devices do not fit together.
    """
    if is_training(x, weight, bias):
        return reference.linear(x, weight, bias, activation)
    check_same_kind("linear", x=x)
    check(x.dim() > 0 and x.shape[-1] > 0, f"linear: x must be [..., in] with in at least 1, got {list(x.shape)}")
    check(
        weight.dim() == 2 and weight.shape[1] == x.shape[-1],
        f"linear: weight must be [out, {x.shape[-1]}], got {list(weight.shape)}",
    )
    shapes = {"weight": (weight, list(weight.shape))} | ({} if bias is None else {"bias": (bias, [weight.shape[0]])})
    check_like("linear", x, shapes)
    check(activation in get_args(Activation), f"linear: activation must be one of {get_args(Activation)}, got {activation!r}")
    out: Tensor = torch.ops.optmem.linear(x, weight, bias, activation)
    return out


@torch.library.impl(library, "linear", "CPU")
def _linear_cpu(x: Tensor, weight: Tensor, bias: Tensor | None, activation: Activation) -> Tensor:
    cpu = cpp_for(x) if x.dtype == torch.bfloat16 else None
    if cpu is None or not cpu.has_linear(x.shape[-1]):
        return reference.linear(x, weight, bias, activation)
    rows = x.reshape(x.shape[:-1].numel(), x.shape[-1])
    out = x.new_empty(rows.shape[0], weight.shape[0])
    added = None if bias is None else as_array(bias)
    cpu.linear(as_array(rows), as_array(weight), added, as_array(out), activation, torch.get_num_threads())
    return out.view(*x.shape[:-1], weight.shape[0])


@torch.library.impl(library, "linear", "CUDA")
def _linear_cuda(x: Tensor, weight: Tensor, bias: Tensor | None, activation: Activation) -> Tensor:
    kernel = triton_module("linear") if activation != "none" else None
    if kernel is None:
        return reference.linear(x, weight, bias, activation)
    out = torch.nn.functional.linear(x, weight, bias).contiguous()  # cuBLAS
    kernel.activate(out, activation)
    return out


@torch.library.register_fake("optmem::linear")
def _linear_fake(x: Tensor, weight: Tensor, bias: Tensor | None, activation: Activation) -> Tensor:
    return x.new_empty((*x.shape[:-1], weight.shape[0]))


def _served() -> Implementation:
    cpu = native("_cpu").module
    if cpu is not None and cpu.has_linear(2):
        return Implementation("linear", "cpu", "cpp", "bf16; else plain torch")
    return Implementation("linear", "cpu", "torch", "oneDNN")


described.append(_served)


def _served_on_cuda() -> Implementation:
    if triton_module("linear") is None:
        return Implementation("linear", "cuda", "torch", "cuBLAS; triton is not installed")
    return Implementation("linear", "cuda", "torch", "cuBLAS, then kernels/linear.py where a function follows")


described.append(_served_on_cuda)


# --- linear_rows ----------------------------------------------------------------------------------------------------------------

library.define("linear_rows(Tensor x, Tensor weight, ScalarType dtype, Tensor? scales=None) -> Tensor")


def linear_rows(x: Tensor, weight: Tensor, dtype: torch.dtype | None = None, scales: Tensor | None = None) -> Tensor:
    """x weight^T, summed in fp32; on CPU a row's result does not depend on the other rows, bit for bit.

    x       [T, in]     weight  [out, in] of the same type, or of int8 with scales
    dtype               of the result: x's own, or torch.float32
    scales  fp32 [out]  what a row of int8 is multiplied by
    -> [T, out]

    On a CPU with products of 16-bit integers, bf16 tokens meet int8 as such: up to 8,192 columns what is smaller than a 128th of a
    row's largest number is rounded to 2^-14 of it or less, and a row that holds an infinity gives NaN.
    """
    check_float("linear_rows", "x", x, 2)
    if weight.dim() != 2:
        raise InputError(f"linear_rows: weight must be [out, {x.shape[1]}], got {list(weight.shape)}")
    shape = [weight.shape[0], x.shape[1]]
    check_weights("linear_rows", x, {"weight": (weight, shape)}, {} if scales is None else {"scales": (scales, shape[:1])})
    dtype = dtype or x.dtype
    if dtype not in (x.dtype, torch.float32):
        raise InputError(f"linear_rows: dtype must be {x.dtype} or torch.float32, got {dtype}")
    rows: Tensor = torch.ops.optmem.linear_rows(x, weight, dtype, scales)
    return rows


@torch.library.impl(library, "linear_rows", "CPU")
def linear_rows_cpu(x: Tensor, weight: Tensor, dtype: torch.dtype, scales: Tensor | None = None) -> Tensor:
    cpu = cpp_for(x)
    if cpu is None:
        return reference.linear_rows(x, weight, dtype, scales)
    out: Tensor = _linear_rows_fake(x, weight, dtype, scales)
    matrix = (weight,) if scales is None else (weight, scales)
    cpu.linear_rows(as_array(x), *map(as_array, matrix), as_array(out), torch.get_num_threads())
    return out


@torch.library.register_fake("optmem::linear_rows")
def _linear_rows_fake(x: Tensor, weight: Tensor, dtype: torch.dtype, scales: Tensor | None = None) -> Tensor:
    return x.new_empty((x.shape[0], weight.shape[0]), dtype=dtype)


torch.library.impl(library, "linear_rows", "CUDA")(reference.linear_rows)
described.append(cpp_or_reference("linear_rows"))
described.append(lambda: Implementation("linear_rows", "cuda", "reference", "cuBLAS is already good"))
