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


# --- attention over grids -------------------------------------------------------------------------------------------------------


class GridTile(NamedTuple):
    """The field names are the kernel's and the launch's own."""

    BLOCK_M: int  # queries
    BLOCK_N: int  # keys of a grid row in one product
    TAIL: int  # keys of the same row in a second product, or 0
    num_warps: int
    num_stages: int


WIDEST_GRID = 96  # patches across; the families have up to 80.  The relative positions of a row are held in registers
WIDEST_GRID_HEAD = 64


def power_of_two(at_least: int) -> int:
    """The least power of two that a product of tiles can have as a side and that is not below this."""
    return max(16, 1 << (at_least - 1).bit_length())


def row_blocks(width: int) -> tuple[int, int]:
    """A row of keys as one tile or two, whichever has fewer columns: 64 and 16 for 80, where one tile would have 128."""
    whole = power_of_two(width)
    main = whole // 2
    if main >= 16 and width > main and main + power_of_two(width - main) < whole:
        return main, power_of_two(width - main)
    return whole, 0


def global_attention_tiles(width: int, itemsize: int) -> tuple[GridTile, ...]:
    """All that global_attention_tile can return, the largest first: what the compile gate builds."""
    main, tail = row_blocks(width)
    if itemsize == 4:  # plain FMAs, which hold whole rows of both operands in registers
        return (GridTile(16, main, tail, num_warps=8, num_stages=1),)
    wide = GridTile(128, main, tail, num_warps=8, num_stages=3)
    return (wide,) if tail else (wide, GridTile(64, main, 0, num_warps=4, num_stages=3))  # with a tail four warps spill


def global_attention_tile(num_heads: int, height: int, width: int, itemsize: int) -> GridTile:
    """The largest tile of which there is one for every multiprocessor: larger ones read keys and values less often.

    num_heads   of all grids together
    """
    tiles = global_attention_tiles(width, itemsize)
    for tile in tiles:
        if cdiv(height * width, tile.BLOCK_M) * num_heads >= STREAMING_MULTIPROCESSORS:
            return tile
    return tiles[-1]


class WindowTile(NamedTuple):
    """The field names are the kernel's and the launch's own."""

    BLOCK_M: int  # queries of one window
    BLOCK_N: int  # keys of a step
    FULL: int  # steps of BLOCK_N keys, all of them the window's
    TAIL: int  # keys of the last step, some of them beyond the window; or 0
    num_warps: int
    num_stages: int


WIDEST_WINDOW = 32


def window_attention_tile(side: int, itemsize: int) -> WindowTile:
    """All keys in steps of 64 and what is left over: 3 x 64 + 16 for the 196 of a window of 14."""
    keys = side * side
    block = 32 if itemsize == 4 else 64
    full, rest = divmod(keys, block)
    tail = power_of_two(rest) if rest else 0
    if itemsize == 4:
        return WindowTile(16, block, full, tail, num_warps=8, num_stages=1)
    return WindowTile(128 if keys > 64 else 64, block, full, tail, num_warps=8 if keys > 64 else 4, num_stages=2)


# --- attention ----------------------------------------------------------------------------------------------------------------


class AttentionTile(NamedTuple):
    """The field names are the kernel's and the launch's own."""

    BLOCK_M: int  # queries
    BLOCK_N: int  # keys of a step
    num_warps: int
    num_stages: int


WIDEST_HEAD = 128
ATTENTION_WIDE = AttentionTile(128, 64, num_warps=8, num_stages=3)
ATTENTION_NARROW = AttentionTile(64, 64, num_warps=4, num_stages=2)
ATTENTION_FP32 = AttentionTile(16, 32, num_warps=8, num_stages=1)  # plain FMAs, which hold whole rows of operands in registers


def attention_tiles(head_dim: int, itemsize: int) -> tuple[AttentionTile, ...]:
    """All that attention_tile can return: what the compile gate builds."""
    if itemsize == 4:
        return (ATTENTION_FP32,)
    return (ATTENTION_NARROW,) if head_dim > 64 else (ATTENTION_WIDE, ATTENTION_NARROW)


def attention_tile(num_queries: int, head_dim: int, itemsize: int) -> AttentionTile:
    """The tile with fewer rows beyond the last query, of equals the larger: 5 x 64 for the 257 of CLIP, where 3 x 128 are 384."""
    tiles = attention_tiles(head_dim, itemsize)
    return min(tiles, key=lambda tile: cdiv(num_queries, tile.BLOCK_M) * tile.BLOCK_M)


# --- layer_norm ---------------------------------------------------------------------------------------------------------------


class RowTile(NamedTuple):
    """The field names are the kernel's and the launch's own."""

    ROWS: int
    BLOCK_D: int  # the whole of a row
    num_warps: int


WIDEST_NORM = 4096


def layer_norm_tile(width: int) -> RowTile:
    """About sixteen numbers a thread, four warps at least: enough loads under way at once, and no spill."""
    block = power_of_two(width)
    rows = max(1, 2048 // block)
    return RowTile(rows, block, num_warps=max(4, block // 512))


# --- compress -----------------------------------------------------------------------------------------------------------------


class ConvolutionTile(NamedTuple):
    """The field names are the kernel's and the launch's own."""

    BLOCK_M: int  # pixels of the output
    BLOCK_N: int  # channels of the output
    BLOCK_K: int  # channels of one neighbour in one step
    num_warps: int
    num_stages: int


CONVOLUTION_WIDE = ConvolutionTile(128, 128, 64, num_warps=8, num_stages=3)
CONVOLUTION_NARROW = ConvolutionTile(64, 64, 64, num_warps=4, num_stages=3)
CONVOLUTION_ODD = ConvolutionTile(64, 32, 16, num_warps=4, num_stages=2)  # for channels that allow no vector loads
CONVOLUTION_FP32 = ConvolutionTile(64, 64, 32, num_warps=8, num_stages=2)


def convolution_tiles(channels: int, width: int, itemsize: int) -> tuple[ConvolutionTile, ...]:
    """All that convolution_tile can return, the largest first: what the compile gate builds."""
    if itemsize == 4:
        return (CONVOLUTION_FP32,)
    if channels % 16 != 0 or width % 16 != 0:  # loads and stores of single values, whose addresses fill the registers
        return (CONVOLUTION_ODD,)
    return (CONVOLUTION_WIDE, CONVOLUTION_NARROW)


def convolution_tile(num_pixels: int, width: int, channels: int, itemsize: int) -> ConvolutionTile:
    """The largest tile of which there is one for every multiprocessor: larger ones read pixels and weight less often."""
    tiles = convolution_tiles(channels, width, itemsize)
    for tile in tiles:
        if cdiv(num_pixels, tile.BLOCK_M) * cdiv(width, tile.BLOCK_N) >= STREAMING_MULTIPROCESSORS:
            return tile
    return tiles[-1]


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
