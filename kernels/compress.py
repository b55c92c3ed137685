"""The neck and the two convolutions of stride 2 over pixels whose channels lie side by side; nothing is unfolded in memory.

    out[b, y, x, n] = sum over dy, dx in -1 .. 1 and c of weight[n, dy + 1, dx + 1, c] * in[b, stride y + dy, stride x + dx, c]

    in         [B, H, W, C], zero beyond its borders; weight [N, 3, 3, C], both fp32, bf16 or fp16
    out        [B, ceil(H / stride), ceil(W / stride), N] of the same type, rounded once from fp32

A product of matrices whose left side is read by address: a step takes some channels of one of the nine neighbours of every pixel.
Assumes contiguous tensors on one device, fewer than 2^31 pixels in a batch and 2^31 values in a page or a weight.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from optmem.kernels.launch import ConvolutionTile, GateCase, cdiv, convolution_tile, convolution_tiles
from optmem.kernels.layer_norm import layer_norm
from optmem.reference import NECK_EPS


# Sizes that change with the batch or the page are not specialised; channels are the model's, and make loads wide.
@triton.jit(do_not_specialize=["M", "H", "W"])
def convolve_kernel(
    pixels,  # [B, H, W, C]
    weight,  # [N, 9, C]
    out,  # [M, N]
    M,  # pixels of the output in all
    H,
    W,
    C,
    N,
    STRIDE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
) -> None:
    # Neighbouring programs share pixels: those come from DRAM, the weight stays in the L2 cache.
    tiles_n = tl.cdiv(N, BLOCK_N)
    o_m = tl.program_id(0) // tiles_n * BLOCK_M + tl.arange(0, BLOCK_M)
    o_n = tl.program_id(0) % tiles_n * BLOCK_N + tl.arange(0, BLOCK_N)
    m_m = o_m < M
    m_n = o_n < N
    height = (H + STRIDE - 1) // STRIDE  # of the output
    width = (W + STRIDE - 1) // STRIDE
    o_y = o_m // width % height * STRIDE
    o_x = o_m % width * STRIDE
    o_page = (o_m // width // height).to(tl.int64)
    p_pixel = pixels + ((o_page * H + o_y) * W + o_x) * C  # [BLOCK_M], the middle of the nine
    p_weight = weight + o_n.to(tl.int64) * 9 * C  # [BLOCK_N]

    steps = tl.cdiv(C, BLOCK_K)  # of one neighbour
    b_out = tl.zeros([BLOCK_M, BLOCK_N], dtype=tl.float32)
    for i in range(9 * steps):
        tap = i // steps
        dy = tap // 3 - 1
        dx = tap % 3 - 1
        o_c = i % steps * BLOCK_K + tl.arange(0, BLOCK_K)
        m_c = o_c < C
        m_near = m_m & (o_y + dy >= 0) & (o_y + dy < H) & (o_x + dx >= 0) & (o_x + dx < W)
        p_near = p_pixel[:, None] + ((dy * W + dx) * C + o_c)[None, :]
        b_near = tl.load(p_near, mask=m_near[:, None] & m_c[None, :], other=0.0)  # [BLOCK_M, BLOCK_K]
        b_w = tl.load(
            p_weight[None, :] + (tap * C + o_c)[:, None], mask=m_c[:, None] & m_n[None, :], other=0.0
        )  # [BLOCK_K, BLOCK_N]
        b_out = tl.dot(b_near, b_w, b_out, input_precision="ieee")

    p_out = out + o_m.to(tl.int64)[:, None] * N + o_n[None, :]
    tl.store(p_out, b_out.to(out.dtype.element_ty), mask=m_m[:, None] & m_n[None, :])


def compress(
    patches: Tensor,
    neck_0: Tensor,
    scale_1: Tensor,
    shift_1: Tensor,
    neck_2: Tensor,
    scale_3: Tensor,
    shift_3: Tensor,
    net_2: Tensor,
    net_3: Tensor,
) -> Tensor:
    """All of ops.compress, which is the checked way in."""
    x = normalise(torch.nn.functional.linear(patches, neck_0.flatten(1)), scale_1, shift_1)  # cuBLAS
    x = normalise(convolve(x, neck_2, stride=1), scale_3, shift_3)
    return convolve(convolve(x, net_2, stride=2), net_3, stride=2)


def normalise(x: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    """Over channels, in place: a row is read as a whole before it is written."""
    rows = x.view(-1, x.shape[-1])
    layer_norm(rows, scale, shift, NECK_EPS, rows)
    return x


def convolve(pixels: Tensor, weight: Tensor, stride: int) -> Tensor:
    """A 3 x 3 convolution with padding 1: [B, H, W, C] with weight [N, C, 3, 3] -> [B, H', W', N].

    A weight that is stored channels last is read as it is, any other is copied into that order.
    """
    num_pages, height, width, _ = pixels.shape
    out = pixels.new_empty(num_pages, cdiv(height, stride), cdiv(width, stride), weight.shape[0])
    fill(pixels, weight.permute(0, 2, 3, 1).contiguous(), stride, out)
    return out


def fill(pixels: Tensor, weight: Tensor, stride: int, out: Tensor) -> None:
    """convolve with a weight [N, 3, 3, C] into an output of its shape."""
    if out.numel() == 0:
        return
    assert all(tensor.is_contiguous() for tensor in (pixels, weight, out))
    assert out.shape == (pixels.shape[0], *(cdiv(side, stride) for side in pixels.shape[1:3]), weight.shape[0])
    channels = pixels.shape[3]
    num_pixels = out.shape[:3].numel()
    assert num_pixels < 2**31 - 128
    assert max(pixels[0].numel(), weight.numel()) < 2**31
    tile = convolution_tile(num_pixels, weight.shape[0], channels, pixels.element_size())
    arguments, options = specialise(pixels, weight, out, stride, tile)
    grid = (cdiv(num_pixels, tile.BLOCK_M) * cdiv(weight.shape[0], tile.BLOCK_N),)
    with torch.cuda.device_of(out):
        convolve_kernel[grid](*arguments, **options)


def specialise(
    pixels: Tensor, weight: Tensor, out: Tensor, stride: int, tile: ConvolutionTile
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """What a launch hands to the kernel: arguments in its order, then constexprs and launch options by name."""
    sizes = (out.shape[:3].numel(), *pixels.shape[1:], out.shape[3])
    return (pixels, weight, out, *sizes), {"STRIDE": stride, **tile._asdict()}


def gate_cases() -> Iterator[GateCase]:
    """The families' second convolution in every tile, the neck's, and channels that allow no vector loads."""
    sizes = [(torch.bfloat16, 512, 1024, 2), (torch.bfloat16, 256, 256, 1), (torch.bfloat16, 7, 9, 2)]
    sizes += [(torch.float32, 512, 1024, 2), (torch.float32, 7, 9, 1)]
    for dtype, channels, width, stride in sizes:
        pixels = torch.empty(1, 64, 64, channels, dtype=dtype, device="meta")
        weight = torch.empty(width, 3, 3, channels, dtype=dtype, device="meta")
        out = torch.empty(1, 64 // stride, 64 // stride, width, dtype=dtype, device="meta")
        for tile in convolution_tiles(channels, width, dtype.itemsize):
            arguments, options = specialise(pixels, weight, out, stride, tile)
            name = f"{str(dtype).removeprefix('torch.')}-{channels}-{width}-{stride}-{tile.BLOCK_M}"
            yield GateCase(name, convolve_kernel, arguments, options, tensor_cores=dtype.itemsize == 2)
