"""The layer norm of the vision encoders, with and without the sum that comes before it."""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType

import torch
from torch import Tensor

from optmem import reference
from optmem.kernels.launch import WIDEST_NORM
from optmem.ops.registry import (
    Implementation,
    check,
    check_like,
    check_same_kind,
    described,
    is_training,
    library,
    triton_module,
)

library.define("layer_norm(Tensor x, Tensor weight, Tensor bias, float eps) -> Tensor")
library.define("add_layer_norm(Tensor x, Tensor residual, Tensor weight, Tensor bias, float eps) -> (Tensor, Tensor)")


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    """Rows to mean 0 and variance 1, then scaled and shifted; sums are fp32.

    x      [..., D]     fp32, bf16 or fp16; so are weight and bias
    weight [D], bias [D]
    eps    is added to the variance
    -> [..., D]

    Raises InputError where shapes, types or devices do not fit together.
    """
    if is_training(x, weight, bias):
        return reference.layer_norm(x, weight, bias, eps)
    _check_norm("layer_norm", x, weight, bias)
    out: Tensor = torch.ops.optmem.layer_norm(x.contiguous(), weight.contiguous(), bias.contiguous(), eps)
    return out


def add_layer_norm(x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """layer_norm of x + residual: the sum, rounded to x's type, and its norm.

    x, residual  [..., D]     fp32, bf16 or fp16; so are weight and bias
    weight [D], bias [D]
    eps          is added to the variance
    -> [..., D], [..., D]

    Raises InputError where shapes, types or devices do not fit together.
    """
    if is_training(x, residual, weight, bias):
        return reference.add_layer_norm(x, residual, weight, bias, eps)
    _check_norm("add_layer_norm", x, weight, bias)
    check_like("add_layer_norm", x, {"residual": (residual, list(x.shape))})
    inputs = [tensor.contiguous() for tensor in (x, residual, weight, bias)]
    both: tuple[Tensor, Tensor] = torch.ops.optmem.add_layer_norm(*inputs, eps)
    return both


def _check_norm(operator: str, x: Tensor, weight: Tensor, bias: Tensor) -> None:
    check_same_kind(operator, x=x)
    check(x.dim() > 0 and x.shape[-1] > 0, f"{operator}: x must be [..., D] with D at least 1, got {list(x.shape)}")
    width = [x.shape[-1]]
    check_like(operator, x, {"weight": (weight, width), "bias": (bias, width)})


@torch.library.impl(library, "layer_norm", "CompositeExplicitAutograd")
def _layer_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    return reference.layer_norm(x, weight, bias, eps)


@torch.library.impl(library, "add_layer_norm", "CompositeExplicitAutograd")
def _add_layer_norm(x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    return reference.add_layer_norm(x, residual, weight, bias, eps)


@torch.library.impl(library, "layer_norm", "CUDA")
def _layer_norm_cuda(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    kernel = _kernel_for(x)
    if kernel is None:
        return reference.layer_norm(x, weight, bias, eps)
    out = torch.empty_like(x)
    kernel.layer_norm(_rows(x), weight, bias, eps, _rows(out))
    return out


@torch.library.impl(library, "add_layer_norm", "CUDA")
def _add_layer_norm_cuda(x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    kernel = _kernel_for(x)
    if kernel is None:
        return reference.add_layer_norm(x, residual, weight, bias, eps)
    total, out = torch.empty_like(x), torch.empty_like(x)
    kernel.add_layer_norm(_rows(x), _rows(residual), weight, bias, eps, _rows(total), _rows(out))
    return total, out


def _kernel_for(x: Tensor) -> ModuleType | None:
    """The kernel, where Triton is installed and rows fit in registers."""
    return triton_module("layer_norm") if x.shape[-1] <= WIDEST_NORM else None


def _rows(x: Tensor) -> Tensor:
    """[..., D] -> [N, D], the same memory."""
    return x.view(-1, x.shape[-1])


@torch.library.register_fake("optmem::layer_norm")
def _layer_norm_fake(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    return torch.empty_like(x)


@torch.library.register_fake("optmem::add_layer_norm")
def _add_layer_norm_fake(x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    return torch.empty_like(x), torch.empty_like(x)


def _served_on_cpu(operator: str) -> Callable[[], Implementation]:
    return lambda: Implementation(operator, "cpu", "torch", "its own kernel")


def _served_on_cuda(operator: str) -> Callable[[], Implementation]:
    def describe() -> Implementation:
        if triton_module("layer_norm") is None:
            return Implementation(operator, "cuda", "torch", "triton is not installed")
        return Implementation(operator, "cuda", "triton", f"kernels/layer_norm.py: rows up to {WIDEST_NORM}; else torch")

    return describe


for _name in ("layer_norm", "add_layer_norm"):
    described.append(_served_on_cpu(_name))
    described.append(_served_on_cuda(_name))
