"""What every operator means, in plain torch.  Every implementation is compared with this page; nothing here is meant to be fast."""

from __future__ import annotations

import torch
from torch import Tensor

PAPER = 255


def draw_text(ink: Tensor, glyphs: Tensor, placements: Tensor, starts: Tensor, height: int, width: int) -> Tensor:
    """Draw glyphs black on white; where they overlap the darker pixel wins.  Shapes as in ops.draw_text."""
    num_pages = starts.numel() - 1
    pages = torch.full((num_pages, height, width), PAPER, dtype=torch.uint8)
    for page in range(num_pages):
        for glyph, top, left in placements[starts[page] : starts[page + 1]].tolist():
            offset, h, w = glyphs[glyph].tolist()
            patch = pages[page, top : top + h, left : left + w]
            patch.copy_(torch.minimum(patch, PAPER - ink[offset : offset + h * w].view(h, w)))
    return pages


RESAMPLE_BITS = 22  # fraction bits of a weight


def resample(images: Tensor, height: int, width: int) -> Tensor:
    """Pillow 13's 8-bit antialiased bicubic: one axis, back to bytes, the other axis.  Shapes as in ops.resample."""
    for axis in resample_order(images.shape[1], images.shape[2], height, width):
        images = _resample_axis(images, axis, (height, width)[axis - 1])
    return images


def resample_order(height_in: int, width_in: int, height: int, width: int) -> tuple[int, int]:
    """The axes 1 (height) and 2 (width) in the order of their passes.  Up to Pillow 12 the width always went first."""
    shrinks_height = height_in > height and height_in - height > 2 * (width_in - width)
    return (1, 2) if shrinks_height else (2, 1)


def resample_weights(size_in: int, size_out: int) -> Tensor:
    """The weight of every input pixel in every output pixel, in units of 2^-22: int64 [size_out, size_in]."""
    scale = size_in / size_out
    stretch = max(scale, 1.0)  # when pixels are thrown away the cubic is widened to average over all of them
    center = (torch.arange(size_out, dtype=torch.float64)[:, None] + 0.5) * scale
    first = (center - 2.0 * stretch + 0.5).trunc()
    end = (center + 2.0 * stretch + 0.5).trunc()
    pixel = torch.arange(size_in, dtype=torch.float64)
    weights = _bicubic((pixel - center + 0.5) * (1.0 / stretch)) * ((pixel >= first) & (pixel < end))
    # Summed from left to right: another order would round the sum, and with it a weight, differently.
    weights = weights / weights.cumsum(1)[:, -1:]
    fixed = weights * 2.0**RESAMPLE_BITS
    return (fixed + torch.where(fixed < 0, -0.5, 0.5)).trunc().long()


def _bicubic(x: Tensor) -> Tensor:
    """The cubic of Keys with a = -1/2."""
    x = x.abs()
    near = (1.5 * x - 2.5) * x * x + 1.0
    far = (((x - 5.0) * x + 8.0) * x - 4.0) * -0.5
    return torch.where(x < 1.0, near, torch.where(x < 2.0, far, 0.0))


def _resample_axis(images: Tensor, axis: int, size: int) -> Tensor:
    """One pass, in bytes.  fp64 holds every product and sum here exactly."""
    weights = resample_weights(images.shape[axis], size).to(images.device, torch.float64)
    sums = (images.double().movedim(axis, -1) @ weights.T).movedim(-1, axis).long() + (1 << (RESAMPLE_BITS - 1))
    return (sums >> RESAMPLE_BITS).clamp(0, 255).to(torch.uint8)


def normalise(pixels: Tensor, dtype: torch.dtype) -> Tensor:
    """Bytes 0 .. 255 to -1 .. 1 in fp32, then rounded to dtype: mean and deviation are 0.5 in every checkpoint of the family."""
    return ((pixels.float() / 255 - 0.5) / 0.5).to(dtype)


def patch_embed(pixels: Tensor, weight: Tensor, bias: Tensor, positions: Tensor) -> Tensor:
    """Project 16 x 16 patches and add positions.  Shapes as in ops.patch_embed; a one-channel page is repeated to the weight's."""
    return project_patches(normalise(pixels, weight.dtype), weight, bias, positions)


def project_patches(images: Tensor, weight: Tensor, bias: Tensor, positions: Tensor) -> Tensor:
    """patch_embed of normalised pixels [B, H, W, 1 or C], with weight [D, C, 16, 16]."""
    num_pages, height, width, _ = images.shape
    channels = weight.shape[1]
    images = images.expand(-1, -1, -1, channels)
    patches = images.reshape(num_pages, height // 16, 16, width // 16, 16, channels)
    patches = patches.permute(0, 1, 3, 5, 2, 4).flatten(3)  # [B, H / 16, W / 16, C * 256], the weight's order
    return torch.nn.functional.linear(patches, weight.flatten(1), bias) + positions
