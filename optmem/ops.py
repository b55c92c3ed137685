"""Every operator by its name: schema, checks, fake, and which implementation serves it.

A function here checks what a caller can get wrong and calls ``torch.ops.optmem.<name>``, which eager mode, torch.compile and CUDA
graphs all understand.  What the operator means is written in reference.py; the C++ is in csrc/, the Triton in kernels/.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from optmem import reference
from optmem.errors import InputError
from optmem.native import native

library = torch.library.Library("optmem", "DEF")


@dataclass(frozen=True, slots=True)
class Implementation:
    """Which code serves an operator on a device, and why that one."""

    operator: str
    device: str
    name: str
    reason: str


def implementations() -> list[Implementation]:
    """One row for every operator and device type, in the order of this file."""
    return [describe() for describe in _described]


_described: list[Callable[[], Implementation]] = []


def _cpp_or_reference(operator: str) -> Callable[[], Implementation]:
    """How the CPU rows read: C++ where optmem._cpu is built, else the reference, and it says so."""

    def describe() -> Implementation:
        cpu = native("_cpu")
        if cpu.module is None:
            return Implementation(operator, "cpu", "reference", f"optmem._cpu: {cpu.reason}")
        return Implementation(operator, "cpu", "cpp", f"optmem._cpu, {cpu.module.isa()}")

    return describe


def _check(holds: bool, message: str) -> None:
    if not holds:
        raise InputError(message)


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
        _check(tensor.dtype == dtype, f"draw_text: {name} must be {dtype}, got {tensor.dtype}")
    _check(placements.dtype == torch.int32, f"draw_text: placements must be torch.int32, got {placements.dtype}")
    _check(starts.dtype == torch.int64, f"draw_text: starts must be torch.int64, got {starts.dtype}")
    _check(ink.dim() == 1, f"draw_text: ink must be [N], got {list(ink.shape)}")
    _check(glyphs.dim() == 2 and glyphs.shape[1] == 3, f"draw_text: glyphs must be [G, 3], got {list(glyphs.shape)}")
    _check(
        placements.dim() == 2 and placements.shape[1] == 3, f"draw_text: placements must be [M, 3], got {list(placements.shape)}"
    )
    _check(starts.dim() == 1 and starts.numel() > 0, f"draw_text: starts must be [P + 1], got {list(starts.shape)}")
    _check(height > 0 and width > 0, f"draw_text: a page must have at least one pixel, got {height}x{width}")
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


_described.append(_cpp_or_reference("draw_text"))
