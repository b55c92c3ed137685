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


def paged_tile(head_dim: int, itemsize: int, *, is_prompt: bool) -> PagedTile:
    """A single query is a sixteenth of a tile: one head's dots at full bandwidth are 70 TFLOP/s so, of 400 and more.

    Blocks of 8 KiB of keys and as much of values: 128 registers a thread on sm_90, so that four programs of a multiprocessor have
    64 KiB on their way.  More stages or wider blocks took 210 registers and more, and had no more on its way.
    """
    row = power_of_two(max(16, head_dim)) * itemsize  # bytes
    if not is_prompt:
        return PagedTile(PAGED_FEW, max(16, min(64, 8192 // row)), num_warps=4, num_stages=3)
    return PagedTile(64 if itemsize == 2 and row <= 256 else 16, max(16, min(64, 16384 // row)), num_warps=4, num_stages=3)


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


def expert_tiles(itemsize: int) -> tuple[ExpertTile, ...]:
    """All that expert_tile can return: what the compile gate builds."""
    return (EXPERT_FP32,) if itemsize == 4 else (EXPERT_FEW, EXPERT_SOME, EXPERT_MANY)


def expert_tile(pairs: int, experts: int, itemsize: int) -> ExpertTile:
    """By rows of an expert, were they evenly spread: up to 16 its weight is what takes time, and tiles of 16 read it once."""
    rows = cdiv(pairs, max(1, experts))
    if itemsize == 4:
        return EXPERT_FP32
    return EXPERT_FEW if rows <= 16 else EXPERT_SOME if rows <= 96 else EXPERT_MANY


def expert_blocks(pairs: int, experts: int, block_m: int) -> int:
    """Expert e begins with block starts[e] // block_m + e: so many are enough for any starts, which only the device knows."""
    return pairs // block_m + experts


# --- decoding: pick_token -------------------------------------------------------------------------------------------------------


class PickTile(NamedTuple):
    """Constants: a row is added up in the same order whatever its batch mates, and however long its history is."""

    BLOCK_V: int  # logits of one program, 16 KiB
    BLOCK_L: int  # tokens said before, in one step of the guard
    BLOCK_W: int  # words of 32 tokens that are cleared in one step
    num_warps: int


PICK = PickTile(BLOCK_V=4096, BLOCK_L=1024, BLOCK_W=1024, num_warps=4)
