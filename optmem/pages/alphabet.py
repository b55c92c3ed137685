"""The symbols that a reader of ours learns: 511, numbered from 1; 0 is a cell in which nothing is drawn.

    our marks                    3   the end of a line, the end of the text, a tab
    white on black              95   printable ASCII: labels, and the escapes of everything below that is not here
    printable ASCII             95
    Latin-1                     94   without the no-break space and the soft hyphen, which cannot be seen
    box drawing and blocks     160
    typographic marks, signs    64

The order is that of nano's tokenizer, one place on.  Small cells cannot show all of this: a character that would lie nearer to
another one than about the nearest two of ASCII (the comma and the semicolon: one pixel of ink) is drawn as its escape there.
"""

from __future__ import annotations

from functools import cache, cached_property

import numpy as np
from numpy.typing import NDArray

from optmem.config import Cell
from optmem.pages import symbols
from optmem.pages.atlas import CELLS, CellAtlas, CellFont
from optmem.pages.fonts import Ink, shipped_bitmap, shipped_font
from optmem.text.characters import ALPHABET

BLANK = 0
_OURS = symbols.LINE_END + symbols.TEXT_END + symbols.TAB + symbols.inverse(symbols.PRINTABLE_ASCII)
CHARACTERS = ALPHABET[len(_OURS) :]  # what text may hold and be drawn as itself
SYMBOLS = "\0" + ALPHABET  # SYMBOLS[id] is the symbol

_NEAREST = 0.85  # pixels of ink
# Where a cell cannot show two characters apart, those that are used most stay.
_USED_MOST = "’“”–—…•éäöüßñçáíóúàèêåøæÄÖÜÉ°£§©«»·×±µ"


@cache
def code_points() -> NDArray[np.uint32]:
    """The symbol of every id as a code point: [512]."""
    return np.array([ord(symbol) for symbol in SYMBOLS], dtype="<u4")


def spell(ids: NDArray[np.uint16]) -> str:
    """The symbols of these ids, in order, without blanks."""
    shown: NDArray[np.uint32] = code_points()[ids[ids != BLANK]]
    return shown.tobytes().decode("utf-32-le")


class AlphabetFont(CellFont):
    """A cell's font that draws the characters of this alphabet which it can show apart, and no others."""

    @cached_property
    def shown(self) -> frozenset[int]:
        """The characters that this cell draws: each is given its place unless a more used one lies too near."""
        order = dict.fromkeys(symbols.PRINTABLE_ASCII + _USED_MOST + CHARACTERS)
        kept, inks = list[int](), [self.draw_mark(mark) for mark in _OURS]
        for char in order:
            ink = super().draw(ord(char))
            if ink is None or ink.shape != (self.height, self.width):
                continue
            if char in symbols.PRINTABLE_ASCII or _is_apart(ink, inks):
                kept.append(ord(char))
                inks.append(ink)
        return frozenset(kept)

    def draw(self, code: int) -> Ink | None:
        """A character's ink, one cell wide; None where it must be escaped."""
        return super().draw(code) if code in self.shown else None

    def covers(self, code: int) -> bool:
        """Whether it is drawn as itself: a reader says all others by their escapes."""
        return code in self.shown


def _is_apart(ink: Ink, others: list[Ink]) -> bool:
    """Whether the ink differs from all others by at least a pixel."""
    difference = np.abs(np.stack(others).astype(np.int32) - ink).sum(axis=(1, 2))
    return bool(difference.min() >= 255 * _NEAREST)


class Atlas(CellAtlas):
    """An atlas of the alphabet, complete from the start, which knows the id of each of its glyphs."""

    def __init__(self, font: AlphabetFont) -> None:
        super().__init__(font)
        self.lookup(np.array([ord(char) for char in CHARACTERS], dtype=np.int64))
        order = code_points()
        by_code = np.argsort(order)
        drawn = self.store.table().symbols
        found = by_code[np.searchsorted(order, drawn, sorter=by_code).clip(max=len(order) - 1)]
        self.ids: NDArray[np.uint16] = np.where(order[found] == drawn, found, BLANK).astype(np.uint16)  # of every glyph


@cache
def alphabet_atlas(cell: Cell) -> Atlas:
    """The atlas of a cell, from the package's own fonts: the same pixels on every machine with the same FreeType."""
    name, height, width = CELLS[cell]
    return Atlas(AlphabetFont(shipped_bitmap(name), height, width, (shipped_font("DejaVuSansMono"),)))
