"""Repairs of Triton's interpreter, which runs kernels where there is no GPU: TRITON_INTERPRET=1, set before Triton is imported.

The stock interpreter keeps bfloat16 as raw uint16 bits that only casts decode, and they truncate.  Dots, arithmetic, comparisons
and reductions work on the bit patterns and return garbage without an error (triton-lang/triton issue 11585).  Repaired:

    casts        decoded and encoded exactly, rounded to nearest even, from integers too
    tl.dot       decodes bf16 operands
    all else     on raw bf16 raises a TypeError: cast the load to tl.float32 first
    e4m3         the same, whose stock casts lose carries, NaN and what is below 2^-6; what is too large becomes 448, as on sm_90
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


E4M3_NAN = 0x7F
_CODES = np.arange(E4M3_NAN)
_LESSER = _CODES % 8 / 8 * 2.0**-6  # below the codes with an exponent, whose first is 2^-6
E4M3 = np.where(_CODES < 8, _LESSER, (1 + _CODES % 8 / 8) * 2.0 ** (_CODES // 8 - 7)).astype(np.float32)  # 0 to 448, by code


def encode_e4m3(values: Any) -> NDArray[np.uint8]:
    """Numbers to the bits of the nearest e4m3, ties to even; beyond 448 is 448, and NaN stays one."""
    floats = np.atleast_1d(np.asarray(values, dtype=np.float32))
    size = np.abs(floats)
    halfway = (E4M3[:-1] + E4M3[1:]) / 2  # exact
    code = np.searchsorted(halfway, size)  # of a tie the lower one
    is_tie = size == halfway[np.minimum(code, len(halfway) - 1)]
    code = np.where(np.isnan(floats), E4M3_NAN, code + (is_tie & (code % 2 == 1)))
    return (code | np.signbit(floats) << 7).astype(np.uint8).reshape(np.shape(values))


def decode_e4m3(bits: Any) -> NDArray[np.float32]:
    """The bits of e4m3 to fp32, exactly."""
    code = np.asarray(bits).view(np.uint8)
    size = np.append(E4M3, np.float32(np.nan))[code & 0x7F]
    found: NDArray[np.float32] = np.where(code & 0x80, -size, size).astype(np.float32)
    return found


def install() -> None:
    """Once per process; afterwards it does nothing."""
    if getattr(interpreter, "repaired_by_optmem", False):
        return
    interpreter.repaired_by_optmem = True
    _repair_casts()
    _repair_dot()
    _refuse_raw_arithmetic()
    _repair_index()


_DECODERS = {tl.bfloat16: decode_bf16, tl.float8e4nv: decode_e4m3}
_ENCODERS = {tl.bfloat16: encode_bf16, tl.float8e4nv: encode_e4m3}


def _is_raw(handle: Any) -> bool:
    return isinstance(handle, Handle) and handle.dtype.scalar in _DECODERS


def _decoded(handle: Any) -> Any:
    return Handle(_DECODERS[handle.dtype.scalar](handle.data), tl.float32) if _is_raw(handle) else handle


def _refuse(handles: Any, what: str) -> None:
    for handle in handles:
        if _is_raw(handle):
            name = {tl.bfloat16: "bfloat16", tl.float8e4nv: "e4m3"}[handle.dtype.scalar]
            raise TypeError(f"{what} of {name} is garbage in Triton's interpreter: cast the load with .to(tl.float32) first")


def _wrap(owner: Any, name: str, around: Callable[..., Any]) -> None:
    """Replaces owner.name with around(stock, *arguments); a name that is gone means that this file is out of date."""
    stock = getattr(owner, name)
    setattr(owner, name, lambda *arguments, **options: around(stock, *arguments, **options))


def _repair_casts() -> None:
    def cast(stock: Any, self: Any, handle: Any, dst_type: Any) -> Any:
        handle, wanted = _decoded(handle), dst_type.scalar
        if wanted in _ENCODERS:
            return Handle(_ENCODERS[wanted](handle.data), wanted)
        return handle if handle.dtype.scalar == wanted else stock(self, handle, dst_type)

    def cast_float(stock: Any, self: Any, handle: Any, dst_type: Any, rounding_mode: Any) -> Any:
        """Chopping on request is the stock conversion's, and right; rounding is what it gets wrong."""
        chops = rounding_mode == interpreter._ir.ROUNDING_MODE.RTZ
        if chops or not _DECODERS.keys() & {handle.dtype.scalar, dst_type.scalar}:
            return stock(self, handle, dst_type, rounding_mode)
        return self.cast_impl(handle, dst_type)

    _wrap(Builder, "cast_impl", cast)
    _wrap(Builder, "create_fp_to_fp", cast_float)
    if not hasattr(Builder, "get_bf16"):  # triton 3.6: tl.full(..., dtype=tl.bfloat16)
        Builder.get_bf16 = lambda _self, value: Handle(encode_bf16([value]), tl.bfloat16)


def _repair_dot() -> None:
    def dot(stock: Any, self: Any, a: Any, b: Any, *rest: Any) -> Any:
        return stock(self, _decoded(a), _decoded(b), *rest)

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
