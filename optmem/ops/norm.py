"""The layer norm of the vision encoders."""

from __future__ import annotations

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
    check_same_kind("layer_norm", x=x)
    check(x.dim() > 0 and x.shape[-1] > 0, f"layer_norm: x must be [..., D] with D at least 1, got {list(x.shape)}")
    width = [x.shape[-1]]
    check_like("layer_norm", x, {"weight": (weight, width), "bias": (bias, width)})
    out: Tensor = torch.ops.optmem.layer_norm(x.contiguous(), weight.contiguous(), bias.contiguous(), eps)
    return out


@torch.library.impl(library, "layer_norm", "CompositeExplicitAutograd")
def _layer_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    return reference.layer_norm(x, weight, bias, eps)


@torch.library.impl(library, "layer_norm", "CUDA")
def _layer_norm_cuda(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    kernel = triton_module("layer_norm")
    if kernel is None or x.shape[-1] > WIDEST_NORM:
        return reference.layer_norm(x, weight, bias, eps)
    out = torch.empty_like(x)
    kernel.layer_norm(x.flatten(0, -2) if x.dim() > 1 else x[None], weight, bias, eps, out.view(-1, x.shape[-1]))
    return out


@torch.library.register_fake("optmem::layer_norm")
def _layer_norm_fake(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    return torch.empty_like(x)


def _layer_norm_served() -> Implementation:
    if triton_module("layer_norm") is None:
        return Implementation("layer_norm", "cuda", "torch", "triton is not installed")
    return Implementation("layer_norm", "cuda", "triton", f"kernels/layer_norm.py: rows up to {WIDEST_NORM}; else torch")


described.append(lambda: Implementation("layer_norm", "cpu", "torch", "its own kernel"))
described.append(_layer_norm_served)
