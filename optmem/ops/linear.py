"""The linear layers of the vision encoders, with the function that follows them."""

from __future__ import annotations

from typing import Literal, get_args

import torch
from torch import Tensor

from optmem import reference
from optmem.native import native
from optmem.ops.registry import (
    Implementation,
    as_array,
    check,
    check_like,
    check_same_kind,
    cpp_for,
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
