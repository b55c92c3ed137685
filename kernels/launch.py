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
    has_small_dots: bool = False  # of fewer than 64 rows, for which Hopper has no HGMMA: HMMA serves there too
    wide_loads: int | None = None  # of 16 bytes, that a thread makes in a step of the innermost loop: where memory is the limit
    most_registers: int = 255  # of a thread on sm_90: what as many programs of a multiprocessor as are meant leave for each
    least_arch: int = 80  # the first that has the types


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


def tile_side(at_least: int) -> int:
    """The least power of two that a product of tiles can have as a side and that is not below this."""
    return max(16, 1 << (at_least - 1).bit_length())


def row_blocks(width: int) -> tuple[int, int]:
    """A row of keys as one tile or two, whichever has fewer columns: 64 and 16 for 80, where one tile would have 128."""
    whole = tile_side(width)
    main = whole // 2
    if main >= 16 and width > main and main + tile_side(width - main) < whole:
        return main, tile_side(width - main)
    return whole, 0


def global_attention_tiles(width: int, itemsize: int) -> tuple[GridTile, ...]:
    """All that global_attention_tile can return, the largest first: what the compile gate builds."""
    main, tail = row_blocks(width)
    if itemsize == 4:  # plain FMAs, which hold whole rows of both operands in registers: for 40 and 48 two tiles would spill
        main, tail = (main, tail) if width > 64 else (tile_side(width), 0)
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
    tail = tile_side(rest) if rest else 0
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
    block = tile_side(width)
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


# --- decoding: paged_attention --------------------------------------------------------------------------------------------------

PAGED_CHUNK = 256  # keys that one program of a decode step reads: 128 KiB of them and their values, at 128 channels of 16 bits
PAGED_FEW = 16  # queries of a sequence, that share one pass over its keys; more are a prompt


class PagedTile(NamedTuple):
    """A function of the type and the head alone: how a row is added up depends neither on batch mates nor on a table's width."""

    BLOCK_M: int  # queries
    BLOCK_N: int  # keys in one step; divides PAGED_CHUNK
    num_warps: int
    num_stages: int


def paged_tile(head_dim: int, itemsize: int, *, is_prompt: bool, is_8bit: bool = False) -> PagedTile:
    """A single query is a sixteenth of a tile: one head's dots at full bandwidth are 70 TFLOP/s so, of 400 and more.

    Blocks of 8 KiB of keys and as much of values: 128 registers a thread on sm_90, so that four programs of a multiprocessor have
    64 KiB on their way.  More stages or wider blocks took 210 registers and more, and had no more on its way.

    8 bits in one stage: with a pipeline's masks and addresses a step of 32 keys of 128 channels takes 230 registers (245 on sm_80)
    and 739 instructions; without, 125 (128) and 567.  Four programs where two were, and values come 16 bytes at once, not 8.
    """
    row = power_of_two(max(16, head_dim)) * itemsize  # bytes of a query
    if not is_prompt and is_8bit and itemsize == 2:
        return PagedTile(PAGED_FEW, max(16, min(64, 8192 // row)), num_warps=4, num_stages=1)
    if not is_prompt:  # plain FMAs, and heads of 64, spill with more keys
        keys = 16 if itemsize == 4 else max(16, min(32 if row >= 128 else 64, 8192 // row))
        return PagedTile(PAGED_FEW, keys, num_warps=4, num_stages=3)
    return PagedTile(
        64 if itemsize == 2 and row <= 256 else 16,
        max(16, min(32 if is_8bit else 64, 16384 // row)),
        8 if is_8bit or row == 256 else 4,  # 64 keys of 128 channels spill on sm_80 in four
        num_stages=3,
    )


class PagedPlan(NamedTuple):
    """What is launched, from shapes alone: the host looks at no length."""

    few: int  # a sequence of more queries is left to the kernel for prompts
    rows: int  # of partial sums
    chunks: int  # of a sequence, as far as the table reaches
    prompt_tiles: int  # 0 where no sequence can have more than few


def paged_plan(tokens: int, sequences: int, table_tokens: int, prompt_block: int) -> PagedPlan:
    """As many tokens as sequences is a decode step: there one kernel serves all, and no other is launched to find nothing."""
    is_step = tokens <= PAGED_FEW or tokens == sequences
    few = tokens if is_step else PAGED_FEW
    tiles = 0 if is_step else tokens // prompt_block + sequences
    return PagedPlan(few, min(tokens, few * sequences), cdiv(table_tokens, PAGED_CHUNK), tiles)


# --- decoding: route, expert_mlp ------------------------------------------------------------------------------------------------


class RouteTile(NamedTuple):
    """The same for every batch: a token's logits are added up in the same order whatever its batch mates."""

    BLOCK_T: int  # tokens
    BLOCK_E: int  # all experts
    BLOCK_K: int  # channels in one step
    num_warps: int
    num_stages: int  # of 16 KiB of weight and 4 KiB of tokens, at 64 experts of 16 bits: three are on their way


def route_tile(experts: int, itemsize: int) -> RouteTile:
    block_e = power_of_two(max(16, experts))
    return RouteTile(16, block_e, max(16, min(128, 16384 // (block_e * itemsize))), num_warps=4, num_stages=4)


class GroupTile(NamedTuple):
    BLOCK_P: int  # pairs in one step
    num_warps: int


def group_tile(pairs: int) -> GroupTile:
    """Whole numbers: their order does not matter.  Two rounds of 4,096 for the 6,144 pairs of a batch of 1,024."""
    return next(tile for tile in GROUP_TILES if pairs <= tile.BLOCK_P or tile is GROUP_TILES[-1])


GROUP_TILES = (GroupTile(128, 4), GroupTile(1024, 4), GroupTile(4096, 8))

VECTOR_ROWS = 8  # tokens, up to which every one reads its own experts: 48 pairs want 35 different ones of 64


class VectorTile(NamedTuple):
    BLOCK_N: int  # rows of a matrix
    BLOCK_K: int  # channels in one step
    num_warps: int


VECTOR_INTO = VectorTile(BLOCK_N=8, BLOCK_K=256, num_warps=4)  # 672 programs for one token of 6 experts
VECTOR_OUT_OF = VectorTile(BLOCK_N=8, BLOCK_K=1024, num_warps=4)  # 160; an expert's width of 896 at once
VECTOR_OUT_OF_FP32 = VectorTile(BLOCK_N=8, BLOCK_K=512, num_warps=4)  # where the loads of six slots do not fit in registers


class ExpertTile(NamedTuple):
    BLOCK_M: int  # pairs of one expert
    BLOCK_N: int  # rows of the gate and as many of the up matrix; twice as many of the down matrix
    BLOCK_K: int
    num_warps: int
    num_stages: int


EXPERT_FEW = ExpertTile(16, 64, 128, num_warps=4, num_stages=3)  # bound by memory: 72 KiB of weight on their way in a program
EXPERT_SOME = ExpertTile(64, 64, 64, num_warps=4, num_stages=3)
EXPERT_MANY = ExpertTile(128, 64, 64, num_warps=8, num_stages=3)
EXPERT_FP32 = ExpertTile(16, 32, 32, num_warps=4, num_stages=2)
EXPERT_E4M3 = tuple(tile._replace(BLOCK_K=2 * tile.BLOCK_K) for tile in (EXPERT_FEW, EXPERT_SOME, EXPERT_MANY))  # the same bytes


def expert_tiles(itemsize: int) -> tuple[ExpertTile, ...]:
    """All that expert_tile can return, by the size of a matrix's numbers: what the compile gate builds."""
    return (EXPERT_FP32,) if itemsize == 4 else EXPERT_E4M3 if itemsize == 1 else (EXPERT_FEW, EXPERT_SOME, EXPERT_MANY)


def expert_tile(pairs: int, experts: int, itemsize: int) -> ExpertTile:
    """By rows of an expert, were they evenly spread: up to 16 its weight is what takes time, and tiles of 16 read it once."""
    rows = cdiv(pairs, max(1, experts))
    tiles = expert_tiles(itemsize)
    return tiles[0] if itemsize == 4 or rows <= 16 else tiles[1] if rows <= 96 else tiles[2]


def expert_blocks(pairs: int, experts: int, block_m: int) -> int:
    """Expert e begins with block starts[e] // block_m + e: so many are enough for any starts, which only the device knows."""
    return pairs // block_m + experts


# --- linear_e4m3 ----------------------------------------------------------------------------------------------------------------


class E4m3Tile(NamedTuple):
    """The field names are the kernel's and the launch's own."""

    BLOCK_M: int  # rows
    BLOCK_N: int  # columns of the result
    BLOCK_K: int  # channels in one step, whose sum the tensor cores keep
    num_warps: int
    num_stages: int


E4M3_WIDE = E4m3Tile(128, 128, 128, num_warps=8, num_stages=4)  # 32 KiB of both operands a stage
E4M3_NARROW = E4m3Tile(64, 64, 128, num_warps=4, num_stages=4)
E4M3_FEW = E4m3Tile(16, 64, 256, num_warps=4, num_stages=4)  # bound by memory: 64 KiB of weight on their way in a program
E4M3_FEWEST = E4m3Tile(16, 16, 256, num_warps=4, num_stages=4)
E4M3_ODD = E4m3Tile(16, 32, 64, num_warps=4, num_stages=2)  # for widths that allow no vector loads


def e4m3_tiles(width_in: int) -> tuple[E4m3Tile, ...]:
    """All that e4m3_tile can return: what the compile gate builds."""
    return (E4M3_ODD,) if width_in % 16 != 0 else (E4M3_WIDE, E4M3_NARROW, E4M3_FEW, E4M3_FEWEST)


def e4m3_tile(rows: int, width: int, width_in: int) -> E4m3Tile:
    """The largest tile of which there is one for every multiprocessor; up to 16 rows the weight is what takes time."""
    if width_in % 16 != 0:
        return E4M3_ODD
    wide, narrow = (E4M3_FEW, E4M3_FEWEST) if rows <= 16 else (E4M3_WIDE, E4M3_NARROW)
    return wide if cdiv(rows, wide.BLOCK_M) * cdiv(width, wide.BLOCK_N) >= STREAMING_MULTIPROCESSORS else narrow


# --- decoding: pick_token -------------------------------------------------------------------------------------------------------


class PickTile(NamedTuple):
    """Constants: a row is added up in the same order whatever its batch mates, and however long its history is."""

    BLOCK_V: int  # logits of one program, 16 KiB
    BLOCK_L: int  # tokens said before, in one step of the guard
    BLOCK_W: int  # words of 32 tokens that are cleared in one step
    num_warps: int


PICK = PickTile(BLOCK_V=4096, BLOCK_L=1024, BLOCK_W=1024, num_warps=4)
