"""Safetensors files: a strict reader of their headers, reads straight into tensors, and a writer that streams.

    8 bytes   length N of the header, little-endian
    N bytes   JSON: {"name": {"dtype": "BF16", "shape": [2, 3], "data_offsets": [0, 12]}, ..., "__metadata__": {...}}
    the rest  the tensors' bytes, where the offsets say

The data is read, not mapped: a mapped file that shrinks while it is in use kills the process (SIGBUS), a short read is an error
that can be reported; and pages of a map count as memory beside the tensors they are copied to.
Format: https://github.com/huggingface/safetensors#format
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from optmem.errors import CheckpointError
from optmem.files import parse_json

MAX_HEADER = 16 << 20  # bytes; the 2,710 tensors of DeepSeek-OCR take 0.3 MB
MAX_DIMENSIONS = 8
CHUNK = 1 << 20  # bytes read at once: they are still in the cache when they are checked

_DTYPES = {
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "I8": torch.int8,
    "I16": torch.int16,
    "I32": torch.int32,
    "I64": torch.int64,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F32": torch.float32,
    "F64": torch.float64,
}
_NAMES = {dtype: name for name, dtype in _DTYPES.items()}
# Bits without the sign, and the exponent: a value whose bits without the sign reach the exponent's is an infinity or NaN.
_FINITE = {
    torch.bfloat16: (np.int16, 0x7FFF, 0x7F80),
    torch.float16: (np.int16, 0x7FFF, 0x7C00),
    torch.float32: (np.int32, 0x7FFFFFFF, 0x7F800000),
    torch.float64: (np.int64, 0x7FFFFFFFFFFFFFFF, 0x7FF0000000000000),
}


@dataclass(frozen=True, slots=True)
class Entry:
    """Where one tensor lies in its file."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int  # bytes from the beginning of the file
    size: int  # bytes


@dataclass(frozen=True, slots=True)
class Header:
    """What a file says it holds: tensors in the order of their bytes, which fill the file without a gap."""

    tensors: dict[str, Entry]
    metadata: dict[str, str]


def read_header(descriptor: int, where: str) -> Header:
    """The header of an open file, checked against the file's size.  Raises CheckpointError; nothing is allocated for tensors."""
    file_size = os.fstat(descriptor).st_size
    if file_size < 8:
        raise CheckpointError(f"{where} is no safetensors file: {file_size} bytes are too few")
    length = int.from_bytes(os.pread(descriptor, 8, 0), "little")
    if length > min(MAX_HEADER, file_size - 8):
        raise CheckpointError(
            f"{where} is damaged or no safetensors file: its header would take {length:,} bytes{_hint(descriptor)}"
        )
    content = os.pread(descriptor, length, 8)
    if not content.startswith(b"{"):
        raise CheckpointError(f"{where} is damaged or no safetensors file: its header does not begin with a brace")
    fields = parse_json(content, f"the header of {where}")
    metadata = _metadata(fields.pop("__metadata__", {}), where)
    entries = {name: _entry(fields[name], 8 + length, f"{where}: tensor {name[:200]!r}") for name in fields}
    tensors = dict(sorted(entries.items(), key=lambda item: item[1].start))
    _check_coverage(tensors, 8 + length, file_size, where)
    return Header(tensors, metadata)


def _hint(descriptor: int) -> str:
    """What the file is instead, where that is plain to see."""
    first = os.pread(descriptor, 6, 0)
    if first.startswith((b"PK\x03\x04", b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05", b"\x93NUMPY")):
        return "; it looks like a pickle or an array file, which optmem never opens: convert it to safetensors"
    return ""


def _metadata(value: object, where: str) -> dict[str, str]:
    if not isinstance(value, dict) or not all(isinstance(text, str) for text in value.values()):
        raise CheckpointError(f"{where}: __metadata__ must map names to texts")
    return value


def _entry(value: object, data_start: int, where: str) -> Entry:
    if not isinstance(value, dict) or value.keys() != {"dtype", "shape", "data_offsets"}:
        raise CheckpointError(f"{where} must have exactly dtype, shape and data_offsets")
    dtype = _DTYPES.get(value["dtype"]) if isinstance(value["dtype"], str) else None
    if dtype is None:
        raise CheckpointError(f"{where} has the unknown type {str(value['dtype'])[:40]!r}")
    shape = _whole_numbers(value["shape"], f"{where}: shape")
    offsets = _whole_numbers(value["data_offsets"], f"{where}: data_offsets")
    if len(shape) > MAX_DIMENSIONS or 0 in shape:
        raise CheckpointError(f"{where} has the shape {list(shape)[:9]}; at most {MAX_DIMENSIONS} dimensions, none of them 0")
    if len(offsets) != 2 or offsets[1] - offsets[0] != prod(shape) * dtype.itemsize:
        raise CheckpointError(f"{where} has offsets {list(offsets)[:3]}, which do not fit {list(shape)} of {value['dtype']}")
    return Entry(dtype, shape, data_start + offsets[0], offsets[1] - offsets[0])


def _whole_numbers(value: object, where: str) -> tuple[int, ...]:
    """Whole numbers below 2**63; True, 1.0 and -1 are none."""
    if not isinstance(value, list) or not all(type(number) is int and 0 <= number < 2**63 for number in value):
        raise CheckpointError(f"{where} must be a list of whole numbers from 0 to 2**63")
    return tuple(value)


def _check_coverage(tensors: dict[str, Entry], data_start: int, file_size: int, where: str) -> None:
    """Every byte behind the header belongs to exactly one tensor."""
    end = data_start
    for name, entry in tensors.items():
        if entry.start != end:
            what = "overlaps the tensor before it" if entry.start < end else "leaves a hole before it"
            raise CheckpointError(f"{where}: tensor {name[:200]!r} {what}")
        end = entry.start + entry.size
    if end > file_size:
        raise CheckpointError(f"{where} is truncated: {end - file_size:,} bytes are missing")
    if end < file_size:
        raise CheckpointError(f"{where} has {file_size - end:,} bytes too many")


def read_tensor(descriptor: int, entry: Entry, out: Tensor, where: str) -> None:
    """Copy a tensor from its file to ``out``: contiguous, of the entry's shape, of any floating type, on any device.

    Raises CheckpointError where a value is NaN or infinite (in either type), or the file ends early.
    """
    assert out.is_contiguous(), "weights are contiguous"
    assert tuple(out.shape) == entry.shape, f"{list(out.shape)} is not {list(entry.shape)}"
    flat, step = out.view(-1), CHUNK // entry.dtype.itemsize
    is_direct = out.device.type == "cpu" and out.dtype == entry.dtype
    staging = None if is_direct else torch.empty(min(step, flat.numel()), dtype=entry.dtype)
    for first in range(0, flat.numel(), step):
        part = flat[first : first + step]
        stored = part if staging is None else staging[: part.numel()]
        _read_bytes(descriptor, stored, entry.start + first * entry.dtype.itemsize, where)
        converted = stored.to(out.dtype)
        if not _chunk_is_finite(converted):
            raise CheckpointError(f"{where} holds NaN or infinite values as {str(out.dtype).removeprefix('torch.')}")
        if converted is not part:
            part.copy_(converted)


def _read_bytes(descriptor: int, out: Tensor, offset: int, where: str) -> None:
    buffer = out.view(torch.uint8).numpy().data
    while buffer:
        count = os.preadv(descriptor, [buffer], offset)
        if count == 0:
            raise CheckpointError(f"{where}: the file became shorter while it was read")
        buffer, offset = buffer[count:], offset + count


def all_finite(tensor: Tensor) -> bool:
    """Whether no value of a floating tensor is NaN or infinite."""
    if tensor.device.type != "cpu":
        return bool(torch.isfinite(tensor).all())
    flat, step = tensor.detach().contiguous().view(-1), CHUNK // tensor.element_size()
    return all(_chunk_is_finite(flat[first : first + step]) for first in range(0, flat.numel(), step))


def _chunk_is_finite(values: Tensor) -> bool:
    """Integer comparison of the bits: 5 GB/s on one core where torch.isfinite has 0.03 (torch 2.13, bf16)."""
    integer, magnitude, exponent = _FINITE[values.dtype]
    bits = values.view(torch.uint8).numpy().view(integer)
    return bool((bits & integer(magnitude)).max() < exponent)


def write_file(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Write tensors in the order given, one at a time; durable when it returns.  The file must not exist yet."""
    with path.open("xb", buffering=0) as file:
        _write_all(file.fileno(), _parts(tensors, metadata))
        os.fsync(file.fileno())


def file_bytes(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> bytes:
    """What `write_file` writes."""
    return b"".join(_parts(tensors, metadata))


def _parts(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> Iterator[bytes | memoryview]:
    """The bytes of a file, a tensor at a time."""
    header: dict[str, object] = {"__metadata__": dict(metadata)}
    offset = 0
    for name, tensor in tensors.items():
        size = tensor.numel() * tensor.element_size()
        header[name] = {"dtype": _NAMES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [offset, offset + size]}
        offset += size
    content = json.dumps(header, separators=(",", ":")).encode()
    content += b" " * (-len(content) % 8)  # the data begins at a multiple of 8 bytes
    yield from (len(content).to_bytes(8, "little"), content)
    for tensor in tensors.values():
        yield _bytes(tensor)


def _bytes(tensor: Tensor) -> memoryview:
    """The bytes of a tensor; copied only where it is strided or on another device."""
    return tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data


def _write_all(descriptor: int, parts: Iterable[bytes | memoryview]) -> None:
    for part in parts:
        rest = memoryview(part)
        while rest:
            rest = rest[os.write(descriptor, rest) :]
