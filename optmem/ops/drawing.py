"""Operators from text to pixels: draw_text and resample."""

from __future__ import annotations

from functools import lru_cache
from math import prod

import torch
from torch import Tensor

from optmem import reference
from optmem.errors import InputError
from optmem.native import native
from optmem.ops.registry import (
    Implementation,
    check,
    cpp_or_reference,
    described,
    library,
)

# --- draw_text ----------------------------------------------------------------------------------------------------------------

library.define("draw_text(Tensor ink, Tensor glyphs, Tensor placements, Tensor starts, int height, int width) -> Tensor")


def draw_text(ink: Tensor, glyphs: Tensor, placements: Tensor, starts: Tensor, height: int, width: int) -> Tensor:
    """Draw glyphs on white pages, many pages in parallel; where glyphs overlap the darker pixel wins.

    ink         uint8 [N]      coverage of all glyphs, each row by row; 255 is black
    glyphs      int32 [G, 3]   offset into ink, height, width
    placements  int32 [M, 3]   glyph, top, left; in the order of pages
    starts      int64 [P + 1]  page p owns placements starts[p] .. starts[p + 1]
    -> uint8 [P, height, width]

    Raises InputError where a glyph lies outside the ink or a placement outside its page.
    """
    for name, tensor, dtype in (("ink", ink, torch.uint8), ("glyphs", glyphs, torch.int32)):
        check(tensor.dtype == dtype, f"draw_text: {name} must be {dtype}, got {tensor.dtype}")
    check(placements.dtype == torch.int32, f"draw_text: placements must be torch.int32, got {placements.dtype}")
    check(starts.dtype == torch.int64, f"draw_text: starts must be torch.int64, got {starts.dtype}")
    check(ink.dim() == 1, f"draw_text: ink must be [N], got {list(ink.shape)}")
    check(glyphs.dim() == 2 and glyphs.shape[1] == 3, f"draw_text: glyphs must be [G, 3], got {list(glyphs.shape)}")
    check(placements.dim() == 2 and placements.shape[1] == 3, f"draw_text: placements must be [M, 3], got {list(placements.shape)}")
    check(starts.dim() == 1 and starts.numel() > 0, f"draw_text: starts must be [P + 1], got {list(starts.shape)}")
    if height <= 0 or width <= 0:  # no message of numbers that a graph may not know
        raise InputError(f"draw_text: a page must have at least one pixel, got {height}x{width}")
    try:
        pages: Tensor = torch.ops.optmem.draw_text(ink, glyphs, placements, starts, height, width)
    except ValueError as error:
        raise InputError(str(error)) from None
    return pages


@torch.library.impl(library, "draw_text", "CPU")
def _draw_text_cpu(ink: Tensor, glyphs: Tensor, placements: Tensor, starts: Tensor, height: int, width: int) -> Tensor:
    cpu = native("_cpu").module
    if cpu is None:
        return reference.draw_text(ink, glyphs, placements, starts, height, width)
    pages = torch.empty((starts.numel() - 1, height, width), dtype=torch.uint8)
    arrays = (t.contiguous().numpy() for t in (ink, glyphs, placements, starts))
    cpu.draw_text(*arrays, pages.numpy(), torch.get_num_threads())
    return pages


@torch.library.register_fake("optmem::draw_text")
def _draw_text_fake(ink: Tensor, glyphs: Tensor, placements: Tensor, starts: Tensor, height: int, width: int) -> Tensor:
    return ink.new_empty((starts.shape[0] - 1, height, width))


described.append(cpp_or_reference("draw_text"))


# --- resample -----------------------------------------------------------------------------------------------------------------

library.define("resample(Tensor images, int height, int width) -> Tensor")

MAX_SIDE = 65_535  # pixels


def resample(images: Tensor, height: int, width: int) -> Tensor:
    """Resize images as the antialiased bicubic of Pillow 13 does, equal to it bit for bit.

    images  uint8 [N, H, W, C]   C is 1 or 3, a side 1 to 65,535 pixels
    -> uint8 [N, height, width, C]

    Raises InputError where a type, a shape or a size is not one of these.
    """
    check(images.dtype == torch.uint8, f"resample: images must be torch.uint8, got {images.dtype}")
    check(
        images.dim() == 4 and images.shape[3] in (1, 3),
        f"resample: images must be [N, H, W, C] with C 1 or 3, got {list(images.shape)}",
    )
    for name, rows, columns in (("images", images.shape[1], images.shape[2]), ("the result", height, width)):
        if not (1 <= rows <= MAX_SIDE and 1 <= columns <= MAX_SIDE):
            raise InputError(f"resample: a side of {name} must be 1 to {MAX_SIDE} pixels, got {rows}x{columns}")
    if height * width * images.shape[3] >= 2**31:
        raise InputError(f"resample: {height}x{width} pixels are too many for one image")
    resized: Tensor = torch.ops.optmem.resample(images, height, width)
    return resized


@torch.library.impl(library, "resample", "CPU")
def _resample_cpu(images: Tensor, height: int, width: int) -> Tensor:
    cpu = native("_cpu").module
    if cpu is None:
        return reference.resample(images, height, width)
    out = images.new_empty((images.shape[0], height, width, images.shape[3]))
    cpu.resample(images.contiguous().numpy(), out.numpy(), torch.get_num_threads())
    return out


@torch.library.impl(library, "resample", "CUDA")
def _resample_cuda(images: Tensor, height: int, width: int) -> Tensor:
    if native("_cuda").module is None or native("_cpu").module is None:  # the weights are computed by _cpu
        return reference.resample(images, height, width)
    height_in, width_in = images.shape[1:3]
    if (height, width) == (height_in, width_in):
        return images.clone(memory_format=torch.contiguous_format)  # an operator may not return its input
    for axis in reference.resample_order(height_in, width_in, height, width):
        images = _resample_axis_cuda(images, axis, (height, width)[axis - 1])
    return images


def _resample_axis_cuda(images: Tensor, axis: int, size: int) -> Tensor:
    """One pass on the device: axis 1 is the height, axis 2 the width."""
    if images.shape[axis] == size:
        return images
    images = images.contiguous()
    out = images.new_empty((*images.shape[:axis], size, *images.shape[axis + 1 :]))
    with torch.cuda.device(images.device):
        bounds, weights = _resample_coefficients(images.shape[axis], size, images.device)
        pointers = (tensor.data_ptr() for tensor in (images, bounds, weights, out))
        outer, inner = prod(images.shape[:axis]), prod(images.shape[axis + 1 :])
        stream = torch.cuda.current_stream().cuda_stream
        cuda = native("_cuda").require()
        cuda.resample_pass(*pointers, outer, images.shape[axis], size, inner, weights.shape[1], stream)
    return out


@lru_cache(maxsize=256)
def _resample_coefficients(size_in: int, size_out: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Bounds int32 [out, 2] and weights int32 [out, taps]; kept on the device, where a captured graph may read them again."""
    bounds, weights = native("_cpu").require().resample_coefficients(size_in, size_out)
    return torch.from_numpy(bounds).to(device), torch.from_numpy(weights).to(device)


@torch.library.register_fake("optmem::resample")
def _resample_fake(images: Tensor, height: int, width: int) -> Tensor:
    return images.new_empty((images.shape[0], height, width, images.shape[3]))


def _describe_resample_cuda() -> Implementation:
    for needed in (native("_cuda"), native("_cpu")):
        if needed.module is None:
            return Implementation("resample", "cuda", "reference", f"optmem.{needed.name}: {needed.reason}")
    return Implementation("resample", "cuda", "cuda", "optmem._cuda")


described.append(cpp_or_reference("resample"))
described.append(_describe_resample_cuda)
