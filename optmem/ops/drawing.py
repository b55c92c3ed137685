"""Operators from text to pixels: draw_text, resample and contact_sheet."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache
from itertools import accumulate
from math import prod
from typing import NamedTuple

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


def _has_cuda() -> bool:
    """Whether the CUDA module is here, and _cpu, which computes the weights."""
    return native("_cuda").module is not None and native("_cpu").module is not None


@torch.library.impl(library, "resample", "CUDA")
def _resample_cuda(images: Tensor, height: int, width: int) -> Tensor:
    if not _has_cuda():
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


def _cuda_or_reference(operator: str) -> Callable[[], Implementation]:
    def describe() -> Implementation:
        for needed in (native("_cuda"), native("_cpu")):
            if needed.module is None:
                return Implementation(operator, "cuda", "reference", f"optmem.{needed.name}: {needed.reason}")
        return Implementation(operator, "cuda", "cuda", "optmem._cuda")

    return describe


described.append(cpp_or_reference("resample"))
described.append(_cuda_or_reference("resample"))


# --- contact_sheet ------------------------------------------------------------------------------------------------------------

library.define("contact_sheet(Tensor[] pages, int[] boxes, int size) -> Tensor")


class SheetBox(NamedTuple):
    """Where a page lies on a sheet, in pixels."""

    top: int
    left: int
    height: int
    width: int


def contact_sheet(pages: Sequence[Tensor], boxes: Sequence[SheetBox], size: int) -> Tensor:
    """Several pages on one white square, each resampled into its box as `resample` does, bit for bit.

    pages   uint8 [H, W, C] each      C is 1 or 3; a grey page among pages in colour is drawn in three equal channels
    boxes   one for every page, inside the sheet; none overlaps another
    -> uint8 [size, size, C]          C is 3 where any page's is

    Raises InputError where a type, a shape, a size or a box is not one of these.
    """
    if len(pages) != len(boxes) or not pages:
        raise InputError(f"contact_sheet: pages and boxes must be as many, and at least one, got {len(pages)} and {len(boxes)}")
    if not 1 <= size <= MAX_SIDE:
        raise InputError(f"contact_sheet: size must be 1 to {MAX_SIDE} pixels, got {size}")
    for page in pages:
        check(page.dtype == torch.uint8, f"contact_sheet: pages must be torch.uint8, got {page.dtype}")
        check(page.device == pages[0].device, f"contact_sheet: pages must be on one device, got {page.device}")
        if page.dim() != 3 or page.shape[2] not in (1, 3) or not all(1 <= side <= MAX_SIDE for side in page.shape[:2]):
            wanted = f"[H, W, C] with C 1 or 3 and sides of 1 to {MAX_SIDE}"
            raise InputError(f"contact_sheet: pages must be {wanted}, got {list(page.shape)}")
    sheet: Tensor = torch.ops.optmem.contact_sheet(list(pages), [side for box in boxes for side in box], size)
    return sheet


def _checked(sides: Sequence[int], size: int) -> list[SheetBox]:
    """As contact_sheet was given them, from what a schema can hold: inside the sheet, and apart.  No graph can sort them."""
    boxes = [SheetBox(*sides[at : at + 4]) for at in range(0, len(sides), 4)]
    above: list[SheetBox] = []  # of those before it, the ones that reach down to this one's top
    for box in sorted(boxes):
        top, left, height, width = box
        if min(top, left) < 0 or min(height, width) < 1 or top + height > size or left + width > size:
            raise InputError(f"contact_sheet: a box must lie inside the sheet of {size}, got {tuple(box)}")
        if height * width * 3 >= 2**31:
            raise InputError(f"contact_sheet: {height}x{width} pixels are too many for one page")
        above = [other for other in above if other.top + other.height > top]
        for other in above:
            if other.left < left + width and left < other.left + other.width:
                raise InputError(f"contact_sheet: boxes must not overlap, got {tuple(other)} and {tuple(box)}")
        above.append(box)
    return boxes


@torch.library.impl(library, "contact_sheet", "CPU")
def _contact_sheet_cpu(pages: list[Tensor], boxes: list[int], size: int) -> Tensor:
    return reference.contact_sheet(pages, _checked(boxes, size), size, _resample_cpu)


@torch.library.impl(library, "contact_sheet", "CUDA")
def _contact_sheet_cuda(pages: list[Tensor], boxes: list[int], size: int) -> Tensor:
    placed = _checked(boxes, size)
    if not _has_cuda():
        return reference.contact_sheet(pages, placed, size)
    sheet: Tensor = _contact_sheet_fake(pages, boxes, size).fill_(reference.PAPER)
    with torch.cuda.device(sheet.device):
        plan = sheet_plan(tuple(page.shape for page in pages), tuple(placed), sheet.device)
        pixels = torch.cat([page.flatten() for page in pages])
        pointers = (tensor.data_ptr() for tensor in (pixels, plan.coefficients, plan.pages, sheet))
        stream = torch.cuda.current_stream().cuda_stream
        cuda = native("_cuda").require()
        cuda.contact_sheet(*pointers, len(pages), size, sheet.shape[2], plan.most_values, stream)
    return sheet


class SheetPlan(NamedTuple):
    """What the kernel is told of a sheet, but for the pixels."""

    coefficients: Tensor  # int32: of every axis its bounds [size, 2], then its weights [size, taps]
    pages: Tensor  # int64 [N, 13], the columns of SheetPage in csrc/contact_sheet_pixel.h
    most_values: int  # of a page on the sheet


@lru_cache(maxsize=64)
def sheet_plan(shapes: tuple[tuple[int, int, int], ...], boxes: tuple[SheetBox, ...], device: torch.device) -> SheetPlan:
    """For pages of these shapes, one behind the other in memory; kept, where a captured graph may read it again."""
    placed = list(zip(shapes, boxes, strict=True))
    axes = dict.fromkeys(axis for (height, width, _), box in placed for axis in ((height, box.height), (width, box.width)))
    tables = [native("_cpu").require().resample_coefficients(*axis) for axis in axes]
    starts = accumulate((bounds.size + weights.size for bounds, weights in tables), initial=0)
    places = {axis: (start, weights.shape[1]) for axis, start, (_, weights) in zip(axes, starts, tables, strict=False)}
    rows, pixels = list[tuple[int, ...]](), 0
    for (height, width, channels), box in placed:
        height_first = reference.resample_order(height, width, box.height, box.width)[0] == 1
        down, across = places[height, box.height], places[width, box.width]
        rows.append((pixels, height, width, channels, *box, int(height_first), *down, *across))
        pixels += height * width * channels
    coefficients = torch.cat([torch.from_numpy(part).flatten() for table in tables for part in table])
    most = max(box.height * box.width * shape[2] for shape, box in placed)
    return SheetPlan(coefficients.to(device), torch.tensor(rows, dtype=torch.int64).to(device), most)


@torch.library.register_fake("optmem::contact_sheet")
def _contact_sheet_fake(pages: list[Tensor], boxes: list[int], size: int) -> Tensor:
    return pages[0].new_empty((size, size, max(page.shape[2] for page in pages)))


described.append(cpp_or_reference("contact_sheet"))
described.append(_cuda_or_reference("contact_sheet"))
