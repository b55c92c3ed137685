"""Pages of bytes to patch embeddings: normalise, project 16 x 16 patches, add positions; no float image in memory.

    out[b, y, x, d] = bias[d] + positions[y, x, d] + sum over c, i, j of weight[d, c, i, j] * v[b, 16 y + i, 16 x + j, c]
    v = (pixel / 255 - 0.5) / 0.5, computed in fp32 and rounded to the weight's type

    pixels     uint8 [B, H, W, C], C is 1 or 3, H and W multiples of 16
    weight     [D, 3, 16, 16], bias [D], positions [H / 16, W / 16, D], all fp32, bf16 or fp16
    out        [B, H / 16, W / 16, D] of the same type, rounded once from fp32

A one-channel page means the page repeated to three channels.  Its bytes are read once and multiplied by each of the three weight
slices in turn, so the result is bit for bit that of the repeated page.  Summing the weight over its channels first would save two
of the three products (4 us of a 1024 px page's 1.4 ms), but 16 bits cannot hold the sums: all 768 would be rounded once more.

Assumes contiguous tensors on one device, fewer than 2^30 patches, and lines of fewer than 2^27 bytes.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from optmem.kernels.launch import GateCase, PatchTile, cdiv, patch_embed_tile, patch_embed_tiles


# Sizes that change with the batch or the page are not specialised: a new batch size must not compile a new kernel.
@triton.jit(do_not_specialize=["M", "P", "G"])
def patch_embed_kernel(
    pixels,  # [rows of patches of all pages, 16, G, 16, C]
    weight,  # [D, 3, 256]
    bias,  # [D]
    positions,  # [P, D]
    out,  # [M, D]
    M,  # patches in all
    P,  # patches of a page
    G,  # patches across a page
    D,
    C: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_K: tl.constexpr,
) -> None:
    # Neighbouring programs share patches, not channels: pixels come from DRAM, the weight (1.2 MB at D=768) stays in L2.
    tiles_d = tl.cdiv(D, BLOCK_D)
    i_m = tl.program_id(0) // tiles_d
    i_d = tl.program_id(0) % tiles_d
    o_m = i_m * BLOCK_M + tl.arange(0, BLOCK_M)
    o_d = i_d * BLOCK_D + tl.arange(0, BLOCK_D)
    m_m = o_m < M
    m_d = o_d < D

    line = G * 16 * C  # bytes from one line of pixels to the next
    p_patch = pixels + (o_m // G).to(tl.int64) * 16 * line + (o_m % G) * 16 * C  # [BLOCK_M], the top left byte
    p_weight = weight + o_d.to(tl.int64) * 768  # [BLOCK_D]

    b_out = tl.zeros([BLOCK_M, BLOCK_D], dtype=tl.float32)
    for start in range(0, 256, BLOCK_K):
        o_k = start + tl.arange(0, BLOCK_K)  # pixels of a patch, line by line
        o_pixel = (o_k // 16) * line + (o_k % 16) * C
        for c in tl.static_range(3):
            if C == 3 or c == 0:
                b_byte = tl.load(p_patch[:, None] + o_pixel[None, :] + c, mask=m_m[:, None], other=0)  # [BLOCK_M, BLOCK_K]
                # One product where the equation has two divisions; in 16 bits equal for each of the 256 bytes (tested).
                b_x = ((b_byte.to(tl.float32) - 127.5) * (2.0 / 255.0)).to(weight.dtype.element_ty)
            b_w = tl.load(p_weight[None, :] + c * 256 + o_k[:, None], mask=m_d[None, :], other=0.0)  # [BLOCK_K, BLOCK_D]
            b_out = tl.dot(b_x, b_w, b_out, input_precision="ieee")

    m_out = m_m[:, None] & m_d[None, :]
    b_bias = tl.load(bias + o_d, mask=m_d, other=0.0).to(tl.float32)  # [BLOCK_D]
    p_positions = positions + (o_m % P).to(tl.int64)[:, None] * D + o_d[None, :]
    b_positions = tl.load(p_positions, mask=m_out, other=0.0).to(tl.float32)  # [BLOCK_M, BLOCK_D]
    b_out = b_out + b_bias[None, :] + b_positions
    tl.store(out + o_m.to(tl.int64)[:, None] * D + o_d[None, :], b_out.to(out.dtype.element_ty), mask=m_out)


def patch_embed(pixels: Tensor, weight: Tensor, bias: Tensor, positions: Tensor, out: Tensor) -> None:
    """Fills out.  ops.patch_embed is the checked way in."""
    if out.numel() == 0:
        return
    assert all(tensor.is_contiguous() for tensor in (pixels, weight, bias, positions, out))
    assert out.shape == (*pixels.shape[:1], *positions.shape)
    num_patches, width = out.shape[:3].numel(), out.shape[3]
    assert num_patches < 2**30
    assert pixels.shape[2:].numel() < 2**27
    tile = patch_embed_tile(num_patches, width, weight.element_size())
    arguments, options = specialise(pixels, weight, bias, positions, out, tile)
    grid = (cdiv(num_patches, tile.BLOCK_M) * cdiv(width, tile.BLOCK_D),)
    with torch.cuda.device_of(out):
        patch_embed_kernel[grid](*arguments, **options)


def specialise(
    pixels: Tensor, weight: Tensor, bias: Tensor, positions: Tensor, out: Tensor, tile: PatchTile
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """What a launch hands to the kernel: arguments in its order, then constexprs and launch options by name."""
    grid_height, grid_width, width = positions.shape
    sizes = (out.shape[:3].numel(), grid_height * grid_width, grid_width, width)
    return (pixels, weight, bias, positions, out, *sizes), {"C": pixels.shape[3], **tile._asdict()}


def gate_cases() -> Iterator[GateCase]:
    """Every kind of page and tile, at the models' D=768 and at a D that allows no vector stores; fp16 differs in casts alone."""
    sizes = itertools.product((torch.bfloat16, torch.float32), (1, 3), (768, 77))
    for dtype, channels, width in [*sizes, (torch.float16, 3, 77)]:
        pixels = torch.empty(1, 1024, 1024, channels, dtype=torch.uint8, device="meta")
        shapes = ((width, 3, 16, 16), (width,), (64, 64, width), (1, 64, 64, width))
        weight, bias, positions, out = (torch.empty(shape, dtype=dtype, device="meta") for shape in shapes)
        for tile in patch_embed_tiles(width, dtype.itemsize):
            arguments, options = specialise(pixels, weight, bias, positions, out, tile)
            name = f"{str(dtype).removeprefix('torch.')}-C{channels}-D{width}-{tile.BLOCK_M}x{tile.BLOCK_D}"
            yield GateCase(name, patch_embed_kernel, arguments, options, tensor_cores=dtype.itemsize == 2)
