"""What all operators share: the registry, the checks, and how an implementation is found and named."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from importlib import import_module
from itertools import pairwise
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from optmem.errors import InputError
from optmem.native import native

library = torch.library.Library("optmem", "DEF")
log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Implementation:
    """Which code serves an operator on a device, and why that one."""

    operator: str
    device: str
    name: str
    reason: str


def implementations() -> list[Implementation]:
    """One row for every operator and device type, by name."""
    return sorted((describe() for describe in described), key=lambda row: (row.operator, row.device))


described: list[Callable[[], Implementation]] = []


def cpp_or_reference(operator: str, but: str = "") -> Callable[[], Implementation]:
    """How the CPU rows read: C++ where optmem._cpu is built, else the reference, and it says so.

    but   what plain torch does nevertheless
    """

    def describe() -> Implementation:
        cpu = native("_cpu")
        if cpu.module is None:
            return Implementation(operator, "cpu", "reference", f"optmem._cpu: {cpu.reason}")
        return Implementation(operator, "cpu", "cpp", f"optmem._cpu, {cpu.module.isa()}{but}")

    return describe


@cache
def triton_module(operator: str) -> ModuleType | None:
    """kernels/<operator>.py, imported when first needed; None where Triton is not installed, which is logged once."""
    try:
        return import_module(f"optmem.kernels.{operator}")
    except ModuleNotFoundError as error:
        if error.name != "triton":
            raise
        log.warning("%s: triton is not installed, so plain torch serves it on CUDA; pip install 'optmem[gpu]'", operator)
        return None


TRITON_TYPES = (torch.float32, torch.bfloat16, torch.float16)


def triton_for(operator: str, tensor: Tensor) -> ModuleType | None:
    """kernels/<operator>.py, where Triton is installed and the kernels speak the tensor's type."""
    return triton_module(operator) if tensor.dtype in TRITON_TYPES else None


def triton_or_reference(operator: str, module: str | None = None, but: str = "") -> Callable[[], Implementation]:
    """How the CUDA rows read: Triton where it is installed, else the reference, and it says so.

    module   the file, where it serves more than one operator;  but   what plain torch does nevertheless
    """
    file = module or operator

    def describe() -> Implementation:
        if triton_module(file) is None:
            return Implementation(operator, "cuda", "reference", "triton is not installed")
        return Implementation(operator, "cuda", "triton", f"kernels/{file}.py{but}")

    return describe


def check(holds: bool, message: str) -> None:
    if not holds:
        raise InputError(message)


def check_same_kind(operator: str, **tensors: Tensor) -> None:
    """All of one floating type and on one device, those of the first."""
    first, *_ = tensors
    dtype, device = tensors[first].dtype, tensors[first].device
    allowed = (torch.float32, torch.bfloat16, torch.float16)
    check(dtype in allowed, f"{operator}: {first} must be torch.float32, torch.bfloat16 or torch.float16, got {dtype}")
    for name, tensor in tensors.items():
        check(tensor.dtype == dtype, f"{operator}: {name} must be {dtype} as {first} is, got {tensor.dtype}")
        check(tensor.device == device, f"{operator}: {name} must be on {device} as {first} is, got {tensor.device}")


def is_training(*tensors: Tensor | None) -> bool:
    """Whether a gradient is wanted or types are autocast's: plain torch keeps what the one needs, and knows the others."""
    given = [tensor for tensor in tensors if tensor is not None]
    return torch.is_autocast_enabled(given[0].device.type) or (
        torch.is_grad_enabled() and any(tensor.requires_grad for tensor in given)
    )


def differentiate(operator: str, meaning: Callable[..., Tensor]) -> None:
    """Gives an operator the gradient of its reference, computed again in the backward pass; only training needs it."""

    def keep(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.save_for_backward(*(value for value in inputs if isinstance(value, Tensor)))
        ctx.others = [None if isinstance(value, Tensor) else value for value in inputs]

    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        wanted = ctx.needs_input_grad
        saved = iter(ctx.saved_tensors)
        inputs = [next(saved).detach() if other is None else other for other in ctx.others]
        leaves = [value.requires_grad_() for value, needed in zip(inputs, wanted, strict=True) if needed]
        with torch.enable_grad():
            gradients = iter(torch.autograd.grad(meaning(*inputs), leaves, gradient))
        return tuple(next(gradients) if needed else None for needed in wanted)

    torch.library.register_autograd(f"optmem::{operator}", backward, setup_context=keep)


CPP_TYPES = (torch.float32, torch.bfloat16)


def cpp_for(tensor: Tensor) -> ModuleType | None:
    """optmem._cpu, where it is built and speaks the tensor's type."""
    return native("_cpu").module if tensor.dtype in CPP_TYPES else None


def as_array(tensor: Tensor) -> Any:
    """The tensor's memory as numpy sees it, which knows no bf16: it becomes uint16.  Contiguous tensors are not copied."""
    if tensor.requires_grad:
        tensor = tensor.detach()
    if not tensor.is_contiguous():
        tensor = tensor.contiguous()
    return (tensor.view(torch.uint16) if tensor.dtype == torch.bfloat16 else tensor).numpy()


Wanted = dict[str, tuple[Tensor, list[int]]]  # name -> a tensor and its shape


def check_like(operator: str, first: Tensor, wanted: Wanted, dtype: torch.dtype | None = None) -> None:
    """Every tensor has the first one's device, its type or the one that is given, and the shape given for it."""
    dtype, device = dtype or first.dtype, first.device
    for name, (tensor, shape) in wanted.items():
        if tensor.dtype == dtype and tensor.device == device and list(tensor.shape) == shape:
            continue  # before any message is made: this runs for every operator of every pass
        check(tensor.dtype == dtype, f"{operator}: {name} must be {dtype}, got {tensor.dtype}")
        check(tensor.device == device, f"{operator}: {name} must be on {device}, got {tensor.device}")
        check(list(tensor.shape) == shape, f"{operator}: {name} must be {shape}, got {list(tensor.shape)}")


def check_weights(operator: str, first: Tensor, weights: Wanted, scales: Wanted, held: torch.dtype = torch.int8) -> None:
    """Weights of the first tensor's type, or of int8 or another type where there are scales, which are fp32."""
    if not scales:
        return check_like(operator, first, weights)
    check_like(operator, first, weights, held)
    return check_like(operator, first, scales, torch.float32)


def check_float(operator: str, name: str, tensor: Tensor, dims: int) -> None:
    if not (tensor.is_floating_point() and tensor.dim() == dims):
        check(tensor.is_floating_point(), f"{operator}: {name} must be floating point, got {tensor.dtype}")
        check(tensor.dim() == dims, f"{operator}: {name} must have {dims} axes, got {list(tensor.shape)}")


def check_index(operator: str, name: str, tensor: Tensor, dtype: torch.dtype, shape: list[int]) -> None:
    if not (tensor.dtype == dtype and list(tensor.shape) == shape):
        check(tensor.dtype == dtype, f"{operator}: {name} must be {dtype}, got {tensor.dtype}")
        check(list(tensor.shape) == shape, f"{operator}: {name} must be {shape}, got {list(tensor.shape)}")


def check_place(operator: str, first: Tensor, **tensors: Tensor) -> None:
    for name, tensor in tensors.items():
        check(tensor.device == first.device, f"{operator}: {name} must be on {first.device}, got {tensor.device}")


def check_starts(operator: str, edges: list[int], count: int, owner: str) -> None:
    ends = f"{edges[0]} to {edges[-1]}"
    check(edges[0] == 0 and edges[-1] == count, f"{operator}: starts must run from 0 to {count}, got {ends}")
    for at, (start, end) in enumerate(pairwise(edges)):
        check(start <= end, f"{operator}: starts must not decrease, but do at {owner} {at}")


@contextmanager
def as_input_error() -> Iterator[None]:
    """What the native code refuses is as much the caller's as what is refused here."""
    try:
        yield
    except InputError:
        raise
    except ValueError as error:
        raise InputError(str(error)) from None
