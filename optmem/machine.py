"""What the processor and its memory can do."""

from __future__ import annotations

import math
import mmap
from collections.abc import Sequence
from contextlib import suppress
from functools import cache

import torch

from optmem.errors import BackendError

# Names of torch's own list.  A processor with none of these multiplies bf16 in software: here 50 times slower than fp32.
_BF16 = ("avx512_bf16", "amx_bf16", "avx10_2", "bf16")


@cache
def cpu_multiplies_bf16() -> bool:
    """Whether the CPU has instructions for products of bf16."""
    capabilities = torch.cpu.get_capabilities()
    return any(capabilities.get(name) for name in _BF16)


def fast_dtype(device: torch.device) -> torch.dtype:
    """The narrowest type whose products are fast on a device: bf16, or fp32 on a CPU that lacks it."""
    return torch.float32 if device.type == "cpu" and not cpu_multiplies_bf16() else torch.bfloat16


E4M3_CAPABILITY = (9, 0)  # of a GPU: its tensor cores multiply 8-bit floats, and the compile gate builds for it


def require_e4m3(device: torch.device) -> None:
    """Raises BackendError where a GPU has no products of e4m3.  A CPU has plain torch."""
    if device.type != "cuda":
        return
    capability = torch.cuda.get_device_capability(device)
    if capability < E4M3_CAPABILITY:
        needed, found = (".".join(map(str, pair)) for pair in (E4M3_CAPABILITY, capability))
        raise BackendError(
            f"8-bit floats (fp8) need a GPU of compute capability {needed} or later, such as an H100, and {device} has {found}: "
            "use dtype='bfloat16'"
        )


HUGE_PAGE = 2 << 20  # bytes


def empty_weight(shape: Sequence[int], dtype: torch.dtype, device: torch.device | str = "cpu") -> torch.Tensor:
    """Room for a weight that is read again and again, in huge pages where a CPU has them.

    A step of the decoder reads a gigabyte of weights, row after row: with pages of 4 KB a core looks up an address for every
    row and a half, and reads 17 to 19 GB/s of the 22 to 30 that it could.
    """
    size = math.prod(shape) * dtype.itemsize
    if torch.device(device).type != "cpu" or size < HUGE_PAGE or not hasattr(mmap, "MADV_HUGEPAGE"):
        return torch.empty(tuple(shape), dtype=dtype, device=device)
    memory = mmap.mmap(-1, size + HUGE_PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    start = -torch.frombuffer(memory, dtype=torch.uint8).data_ptr() % HUGE_PAGE
    with suppress(OSError):  # a kernel without them has said no, and loses only speed
        memory.madvise(mmap.MADV_HUGEPAGE, start, size // HUGE_PAGE * HUGE_PAGE)
    return torch.frombuffer(memory, dtype=dtype, count=math.prod(shape), offset=start).view(tuple(shape))


def to_device(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """A tensor of the host on a device, without waiting for what a GPU is doing: torch keeps the pinned copy until it is read."""
    if device.type != "cuda" or tensor.numel() == 0:
        return tensor.to(device)
    return tensor.pin_memory().to(device, non_blocking=True)
