"""Repairs of Triton's interpreter, which runs kernels where there is no GPU: TRITON_INTERPRET=1, set before Triton is imported.

The stock interpreter keeps bfloat16 as raw uint16 bits that only casts decode, and they truncate.  Dots, arithmetic, comparisons
and reductions work on the bit patterns and return garbage without an error (triton-lang/triton issue 11585).  Repaired:

    casts        decoded and encoded exactly, rounded to nearest even, from integers too
    tl.dot       decodes bf16 operands
    all else     on raw bf16 raises a TypeError: cast the load to tl.float32 first
    int(tensor)  works with numpy 2.4 and later, as do loops over tl.cdiv(n, BLOCK)

Checked with triton 3.6.0 and numpy 2.4.6; tests/test_interpreter.py says when a repair is no longer needed or no longer holds.
For tests and benches only: the runtime never interprets a kernel.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import triton.language as tl
from numpy.typing import NDArray
from triton.runtime import interpreter

Builder = interpreter.InterpreterBuilder
Handle = interpreter.TensorHandle


def encode_bf16(values: Any) -> NDArray[np.uint16]:
    """fp32 to the bits of the nearest bf16, ties to even; every NaN becomes the quiet one."""
    floats = np.atleast_1d(np.asarray(values, dtype=np.float32))
    bits = floats.view(np.uint32)
    # Adding just under half of the last kept bit, or half where that bit is set, carries into the exponent where it must.
    rounded = (bits + (0x7FFF + ((bits >> 16) & 1))) >> 16
    return np.where(np.isnan(floats), 0x7FC0, rounded).astype(np.uint16).reshape(np.shape(values))


def decode_bf16(bits: Any) -> NDArray[np.float32]:
    """The bits of bf16 to fp32, exactly."""
    wide = np.atleast_1d(bits).view(np.uint16).astype(np.uint32) << 16
    return wide.view(np.float32).reshape(np.shape(bits))


def install() -> None:
    """Once per process; afterwards it does nothing."""
    if getattr(interpreter, "repaired_by_optmem", False):
        return
    interpreter.repaired_by_optmem = True
    _repair_casts()
    _repair_dot()
    _refuse_raw_arithmetic()
    _repair_index()


def _is_bf16(handle: Any) -> bool:
    return isinstance(handle, Handle) and handle.dtype.scalar == tl.bfloat16


def _refuse(handles: Any, what: str) -> None:
    if any(_is_bf16(handle) for handle in handles):
        raise TypeError(f"{what} of bfloat16 is garbage in Triton's interpreter: cast the load with .to(tl.float32) first")


def _wrap(owner: Any, name: str, around: Callable[..., Any]) -> None:
    """Replaces owner.name with around(stock, *arguments); a name that is gone means that this file is out of date."""
    stock = getattr(owner, name)
    setattr(owner, name, lambda *arguments, **options: around(stock, *arguments, **options))


def _repair_casts() -> None:
    def cast(stock: Any, self: Any, handle: Any, dst_type: Any) -> Any:
        if _is_bf16(handle):
            handle = Handle(decode_bf16(handle.data), tl.float32)
        if dst_type.scalar == tl.bfloat16:
            return Handle(encode_bf16(handle.data), tl.bfloat16)
        return handle if handle.dtype.scalar == dst_type.scalar else stock(self, handle, dst_type)

    def cast_float(stock: Any, self: Any, handle: Any, dst_type: Any, rounding_mode: Any) -> Any:
        """Chopping on request is the stock conversion's, and right; rounding is what it gets wrong."""
        chops = rounding_mode == interpreter._ir.ROUNDING_MODE.RTZ
        if chops or tl.bfloat16 not in (handle.dtype.scalar, dst_type.scalar):
            return stock(self, handle, dst_type, rounding_mode)
        return self.cast_impl(handle, dst_type)

    _wrap(Builder, "cast_impl", cast)
    _wrap(Builder, "create_fp_to_fp", cast_float)
    if not hasattr(Builder, "get_bf16"):  # triton 3.6: tl.full(..., dtype=tl.bfloat16)
        Builder.get_bf16 = lambda _self, value: Handle(encode_bf16([value]), tl.bfloat16)


def _repair_dot() -> None:
    def dot(stock: Any, self: Any, a: Any, b: Any, *rest: Any) -> Any:
        a, b = (Handle(decode_bf16(x.data), tl.float32) if _is_bf16(x) else x for x in (a, b))
        return stock(self, a, b, *rest)

    _wrap(Builder, "create_dot", dot)


def _refuse_raw_arithmetic() -> None:
    def elementwise(stock: Any, self: Any, *arguments: Any) -> Any:
        if arguments[-1] is not np.where:  # which moves bits, whatever they mean
            _refuse(arguments, "arithmetic")
        return stock(self, *arguments)

    def reduction(stock: Any, self: Any, tensors: Any) -> Any:
        _refuse([tensor.handle for tensor in tensors if isinstance(tensor, tl.tensor)], "a reduction")
        return stock(self, tensors)

    for name in ("unary_op", "binary_op", "ternary_op", "create_fma", "create_erf", "create_rsqrt"):
        _wrap(Builder, name, elementwise)

    def atomic(stock: Any, self: Any, kind: Any, pointer: Any, value: Any, *rest: Any) -> Any:
        _refuse([value], "an atomic")
        return stock(self, kind, pointer, value, *rest)

    _wrap(Builder, "create_atomic_rmw", atomic)
    _wrap(interpreter.ReduceScanOpInterface, "check_tensor", reduction)


def _repair_index() -> None:
    def patch(stock: Any, tensor: Any, *scope: Any) -> None:
        stock(tensor, *scope)
        tensor.__index__ = lambda self: int(self.handle.data.item())  # stock: int(array of one element), which numpy 2.4 refuses

    _wrap(interpreter, "_patch_lang_tensor", patch)
