"""What launchers share: block sizes as pure functions of shapes, and the cases that the compile gate builds.

Nothing here imports Triton, so every choice can be tested on any machine.
"""

from __future__ import annotations

from typing import Any, NamedTuple

STREAMING_MULTIPROCESSORS = 132  # of an H100 or H200; an A100 has 108


def cdiv(items: int, block: int) -> int:
    return -(-items // block)


class GateCase(NamedTuple):
    """One specialisation of a kernel.  tests/test_gate.py compiles it for GPUs that are not there and reads the machine code."""

    name: str
    kernel: Any  # what @triton.jit returned
    arguments: tuple[Any, ...]  # as they are launched; tensors on the meta device
    options: dict[str, Any]  # constexprs, num_warps, num_stages
    tensor_cores: bool  # a dot of 16-bit operands: without HMMA or HGMMA it would run many times slower


# --- patch_embed --------------------------------------------------------------------------------------------------------------


class PatchTile(NamedTuple):
    """The field names are the kernel's and the launch's own."""

    BLOCK_M: int  # patches
    BLOCK_D: int  # output channels
    BLOCK_K: int  # pixels of a patch's 256 in one step; 64 of three channels would take 220 registers and more
    num_warps: int
    num_stages: int  # of three weight slices each: 128 x 32 x 2 bytes x 3 = 24 KiB of shared memory in a wide tile


PATCH_WIDE = PatchTile(BLOCK_M=128, BLOCK_D=128, BLOCK_K=32, num_warps=8, num_stages=3)
PATCH_NARROW = PatchTile(BLOCK_M=64, BLOCK_D=64, BLOCK_K=32, num_warps=4, num_stages=3)
PATCH_FP32 = PatchTile(BLOCK_M=64, BLOCK_D=64, BLOCK_K=32, num_warps=8, num_stages=2)  # four warps spill: the dots are plain FMAs


def patch_embed_tiles(width: int, itemsize: int) -> tuple[PatchTile, ...]:
    """All that patch_embed_tile can return, the largest first: what the compile gate builds."""
    if itemsize == 4:
        return (PATCH_FP32,)
    if width % 16 != 0:  # stores of single values, whose 64-bit addresses do not fit beside the sums of a wide tile
        return (PATCH_NARROW,)
    return (PATCH_WIDE, PATCH_NARROW)


def patch_embed_tile(num_patches: int, width: int, itemsize: int) -> PatchTile:
    """The largest tile of which there is one for every multiprocessor: larger ones read pixels and weight less often."""
    tiles = patch_embed_tiles(width, itemsize)
    for tile in tiles:
        if cdiv(num_patches, tile.BLOCK_M) * cdiv(width, tile.BLOCK_D) >= STREAMING_MULTIPROCESSORS:
            return tile
    return tiles[-1]


# --- decoding: rms_norm, silu_mul, rope_cache -----------------------------------------------------------------------------------


def power_of_two(size: int) -> int:
    """The least that is not below size."""
    return 1 << max(0, size - 1).bit_length()


class NormTile(NamedTuple):
    """A function of the width alone: a row's sum is added up in the same order whatever its batch mates."""

    BLOCK_T: int  # rows
    BLOCK_D: int  # a whole row
    num_warps: int


def norm_tile(width: int) -> NormTile:
    """16 values a thread, which are two loads of 16 bytes in 16 bits; narrow rows share a program."""
    block_d = power_of_two(width)
    block_t = max(1, 2048 // block_d)
    return NormTile(block_t, block_d, num_warps=min(32, max(4, block_t * block_d // 512)))


class SwigluTile(NamedTuple):
    BLOCK: int
    num_warps: int


SWIGLU = SwigluTile(BLOCK=1024, num_warps=4)  # a load of 16 bytes a thread from either; 7 programs for one row of a dense MLP


class RopeTile(NamedTuple):
    BLOCK_H: int  # heads
    BLOCK_D: int  # half a head
    num_warps: int


def rope_tile(heads: int, head_dim: int) -> RopeTile:
    """A token's heads in one program, up to 2,048 values of each half: 16 heads of 128 are 8 values a thread, one load."""
    block_d = power_of_two(head_dim // 2)
    block_h = min(power_of_two(heads), max(1, 2048 // block_d))
    return RopeTile(block_h, block_d, num_warps=min(8, max(1, block_h * block_d // 256)))
