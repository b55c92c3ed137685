"""What the processor can do."""

from __future__ import annotations

from functools import cache

import torch

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
