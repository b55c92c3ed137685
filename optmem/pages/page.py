"""A page: what it shows, where everything on it came from, and its pixels."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import groupby
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from optmem import ops
from optmem.errors import InputError
from optmem.pages.atlas import GlyphStore
from optmem.pages.blocks import Span


class Box(NamedTuple):
    """Pixels of a page: left and top inside, right and bottom outside."""

    left: int
    top: int
    right: int
    bottom: int


@dataclass(frozen=True, slots=True)
class Line:
    """One row of a page.  text includes what ends the row, so the texts of all lines joined are the text of the page."""

    text: str
    box: Box
    spans: tuple[Span, ...]  # where the text came from, in order; what has no span was said by us


class Characters(NamedTuple):
    """Every cell of a page: the label a trainer needs.  One row per cell, in reading order."""

    symbols: NDArray[np.uint32]  # [n]  code points, and the marks of pages.symbols
    boxes: NDArray[np.int32]  # [n, 4]  left, top, right, bottom
    sources: NDArray[np.int32]  # [n]  index into the page's text; -1 for fillers, the text's length for the end mark


@dataclass(frozen=True, eq=False)
class Page:
    """A page of text.  Equal pages have equal ids: the id is a hash over style, shape, text and pixels."""

    style: str
    index: int  # place in its document, from 0
    height: int
    width: int
    lines: tuple[Line, ...]
    missing: tuple[str, ...]  # characters that the alphabet or the fonts lack, drawn as their escape
    store: GlyphStore = field(repr=False)
    placements: NDArray[np.int32] = field(repr=False)  # [n, 3]: glyph of the store, top, left
    sources: NDArray[np.int32] = field(repr=False)  # [n]: as in Characters
    fills: tuple[tuple[Box, int], ...] = ()  # rectangles and their ink, 255 is black

    def text(self) -> str:
        """The text that the page shows; in the styles dense and packed, exactly the string that was put in.

        In a document a line that wraps keeps the space it wrapped at, every block ends with a line end, bullets read "- ", and the
        rules between the cells of a table read " | ".
        """
        return "".join(line.text for line in self.lines)

    def image(self) -> NDArray[np.uint8]:
        """The page's pixels, uint8 [height, width], 255 is white."""
        return draw_pages([self])[0]

    def characters(self) -> Characters:
        """The label of every cell."""
        table = self.store.table()
        glyph, top, left = self.placements.T
        height, width = table.glyphs[glyph, 1], table.glyphs[glyph, 2]
        boxes = np.stack([left, top, left + width, top + height], axis=1)
        return Characters(table.symbols[glyph], boxes, self.sources)

    def symbol_rows(self) -> list[str]:
        """dense and packed: the symbols on every row of cells that the text reaches, as a reader is to say them.

        Raises InputError for a page of the style document, which has no cells.
        """
        if self.style == "document":
            raise InputError("a page of the style document has no rows of cells: paginate with dense or packed")
        found = self.characters()
        _, row_of = np.unique(found.boxes[:, 1], return_inverse=True)
        rows = np.split(found.symbols.astype("<u4"), np.flatnonzero(np.diff(row_of)) + 1)
        return [row.tobytes().decode("utf-32-le") for row in rows]

    @cached_property
    def id(self) -> str:
        """64 hexadecimal digits."""
        text = self.text().encode("utf-8", "surrogatepass")
        head = f"optmem page 1\0{self.style}\0{self.height}\0{self.width}\0{len(text)}\0"
        return hashlib.sha256(head.encode() + text + self.image().tobytes()).hexdigest()


def _draw_group(pages: Sequence[Page]) -> NDArray[np.uint8]:
    """Pages that share a store and a size, in one call."""
    table = pages[0].store.table()
    starts = np.cumsum([0, *(len(page.placements) for page in pages)], dtype=np.int64)
    placements = np.concatenate([page.placements for page in pages])
    ink, glyphs, places, cuts = map(torch.from_numpy, (table.ink, table.stamps, placements, starts))
    return ops.draw_text(ink, glyphs, places, cuts, pages[0].height, pages[0].width).numpy()


def draw_pages(pages: Sequence[Page]) -> list[NDArray[np.uint8]]:
    """The pixels of many pages, drawn in parallel: uint8 [height, width] each."""
    images: list[NDArray[np.uint8]] = []
    for _, group in groupby(pages, key=lambda page: (id(page.store), page.height, page.width)):
        images.extend(_draw_group(list(group)))
    for page, image in zip(pages, images, strict=True):
        for (left, top, right, bottom), ink in page.fills:
            area = image[top:bottom, left:right]
            np.minimum(area, 255 - ink, out=area)
    return images
