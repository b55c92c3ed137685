"""Glyph atlases: every glyph drawn once, kept as ink that `draw_text` stamps onto pages.

An atlas grows as text asks for more characters.  Glyph numbers therefore depend on what was drawn before and mean nothing outside
their atlas; pages are identified by their pixels instead.
"""

from __future__ import annotations

import unicodedata
from dataclasses import dataclass
from functools import cache, cached_property
from threading import Lock
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw

from optmem.pages import symbols
from optmem.pages.fonts import BitmapFont, Ink, ScalableFont, shipped_bitmap, shipped_font, system_fonts

Codes = NDArray[np.int64]


class GlyphTable(NamedTuple):
    """A snapshot of an atlas, in the shapes of ops.draw_text."""

    ink: NDArray[np.uint8]  # [N]
    glyphs: NDArray[np.int32]  # [G, 3]: offset, height, width
    symbols: NDArray[np.uint32]  # [G]: the symbol each glyph shows
    stamps: NDArray[np.int32]  # [G, 3]: the same, but glyphs without ink have no rows, so that nothing is stamped for them


class Sequences(NamedTuple):
    """Glyphs of several keys behind each other: those of i are glyphs[starts[i] : starts[i] + lengths[i]]."""

    glyphs: NDArray[np.int32]
    starts: NDArray[np.int64]
    lengths: NDArray[np.int64]


class GlyphStore:
    """Glyphs in the order in which they were added.  Adding is serialised; snapshots are never changed afterwards."""

    def __init__(self) -> None:
        self._ink = bytearray()
        self._rows: list[tuple[int, int, int]] = []
        self._symbols: list[int] = []
        self._blank: list[bool] = []
        self._table: GlyphTable | None = None
        self._lock = Lock()

    def __getstate__(self) -> dict[str, Any]:
        """A page can be sent to another process: everything but the lock goes with it."""
        return {name: value for name, value in vars(self).items() if name != "_lock"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state, _lock=Lock())

    def add(self, symbol: str, ink: Ink) -> int:
        """Appends a glyph and returns its number."""
        with self._lock:
            self._rows.append((len(self._ink), *ink.shape))
            self._symbols.append(ord(symbol))
            self._blank.append(not ink.any())
            self._ink += ink.tobytes()
            self._table = None
            return len(self._rows) - 1

    def table(self) -> GlyphTable:
        """Everything added so far."""
        with self._lock:
            if self._table is None:
                glyphs = np.array(self._rows, dtype=np.int32).reshape(-1, 3)
                stamps = np.where(np.array(self._blank, dtype=np.bool_)[:, None], np.int32(0), glyphs)
                ink = np.array(self._ink, dtype=np.uint8)
                self._table = GlyphTable(ink, glyphs, np.array(self._symbols, dtype=np.uint32), stamps)
            return self._table


# Pictures of 5x7 that fit in the smallest cell: our marks, and two signs that monospaced fonts draw like others, the no-break
# hyphen and the en dash.
_PICTURES = {
    symbols.LINE_END: ("....#", "....#", "..#.#", ".##.#", "#####", ".##..", "..#.."),
    symbols.TAB: ("#....", "#.#..", "#..#.", "#####", "#..#.", "#.#..", "#...."),
    symbols.FILL: (".....", ".....", "#.#.#", ".....", "#.#.#", ".....", "....."),
    "\u2011": (".....", ".....", "#...#", "#####", "#...#", ".....", "....."),
    "\u2013": (".....", ".....", ".....", "#####", "#####", ".....", "....."),
}


def _centred(picture: tuple[str, ...], height: int, width: int) -> Ink:
    ink = np.zeros((height, width), dtype=np.uint8)
    top, left = (height - len(picture)) // 2, (width - len(picture[0])) // 2
    for y, row in enumerate(picture):
        ink[top + y, left : left + len(row)] = [255 * (dot == "#") for dot in row]
    return ink


def _block(height: int, width: int) -> Ink:
    """The end of the text: a solid block with a rim, so that it differs from every block element of a font."""
    ink = np.zeros((height, width), dtype=np.uint8)
    ink[1:-1, : width - 1] = 255
    return ink


def _widened(ink: Ink, width: int) -> Ink:
    """A glyph set in a wider cell, centred."""
    left = (width - ink.shape[1]) // 2
    return np.pad(ink, ((0, 0), (left, width - ink.shape[1] - left)))


def draw_scaled(font: ScalableFont, code: int, height: int, width: int) -> Ink:
    """A character of a scalable font inside a cell, at the largest size whose advance and ink fit it, grey at the edges."""
    char = chr(code)
    for size in range(height, 3, -1):
        face = font.at(size)
        left, top, right, bottom = map(round, face.getbbox(char, anchor="ls"))
        advance = face.getlength(char)
        if right - left <= width and bottom - top <= height and advance <= width + 0.5:
            break
    ascent, descent = face.getmetrics()
    x = min(max(round((width - advance) / 2), -left), width - right)
    y = min(max(round(height * ascent / (ascent + descent)), -top), height - bottom)
    cell = Image.new("L", (width, height))
    ImageDraw.Draw(cell).text((x, y), char, fill=255, font=face, anchor="ls")
    return np.array(cell)


def _must_differ(code: int) -> bool:
    """Latin and letterlike symbols, punctuation, signs.  Letters of other scripts may look alike: their text tells them apart."""
    return code < 0x250 or 0x2100 <= code < 0x2150 or unicodedata.category(chr(code))[0] in "PS"


@dataclass(frozen=True)
class CellFont:
    """What a cell of a page is made of: a bitmap font, and the chain that covers what it lacks."""

    bitmap: BitmapFont
    height: int
    width: int
    fallback: tuple[ScalableFont, ...]

    @cached_property
    def owners(self) -> dict[int, Ink]:
        """The bitmap font's characters that can be told apart: of those that look the same, the lowest code point."""
        by_look: dict[bytes, int] = {}
        for code in sorted(self.bitmap.glyphs):
            by_look.setdefault(self.bitmap.glyphs[code].tobytes(), code)
        return {code: _widened(self.bitmap.glyphs[code], self.width) for code in by_look.values()}

    @cached_property
    def twins(self) -> frozenset[int]:
        """Signs and Latin letters that the chain draws like another one: they would be read as that one."""
        by_look = {ink.tobytes(): code for code, ink in self.owners.items()}
        signs = [code for code in range(0x10000) if _must_differ(code) and code not in self.owners]
        for code in sorted(signs, key=lambda code: (code != ord("—"), code)):
            ink = self._draw_fallback(code)
            if ink is not None:
                by_look.setdefault(ink.tobytes(), code)
        return frozenset(signs) - frozenset(by_look.values())

    def draw(self, code: int) -> Ink | None:
        """A character's ink, one or two cells wide; None where no font has a visible form that is its own."""
        if code in self.owners:
            return self.owners[code]
        if chr(code) in _PICTURES:
            return self.draw_mark(chr(code))
        if _must_differ(code) and code in self.twins:
            return None
        return self._draw_fallback(code)

    def covers(self, code: int) -> bool:
        """Whether any font has this character, even if it is drawn as an escape because it looks like another."""
        return code in self.bitmap.glyphs or any(font.covers(code) for font in self.fallback)

    def _draw_fallback(self, code: int) -> Ink | None:
        width = 2 * self.width if unicodedata.east_asian_width(chr(code)) in "WF" else self.width
        font = next((font for font in self.fallback if font.covers(code)), None)
        ink = None if font is None else draw_scaled(font, code, self.height, width)
        return ink if ink is not None and ink.any() else None

    def draw_mark(self, symbol: str) -> Ink:
        """The ink of one of symbols.MARKS, or of an inverse character."""
        if symbol == symbols.TEXT_END:
            return _block(self.height, self.width)
        if symbol in _PICTURES:
            return _centred(_PICTURES[symbol], self.height, self.width)
        ink: Ink = np.uint8(255) - self.owners[ord(symbols.plain(symbol))]
        if symbol == symbols.inverse(" "):
            ink[[0, -1]] = 0  # a solid cell is the full block, a character of its own
        return ink


class CellAtlas:
    """The glyphs of fixed cells: keys to the one or more cells that draw them.

    A key is a code point, or INVERSE plus the code of a printable ASCII character, which is drawn white on black.
    """

    INVERSE = 0x110000
    _UNKNOWN = -1

    def __init__(self, font: CellFont) -> None:
        self.font = font
        self.store = GlyphStore()
        self.missing: set[int] = set()  # code points drawn as escapes because no font has them
        self._lock = Lock()
        self._cells = np.full(self.INVERSE + 0x80, self._UNKNOWN, dtype=np.int32)  # a glyph, or -2 - index into _sequences
        self._sequences: list[NDArray[np.int32]] = []
        self._wide: set[int] = set()  # glyphs that are left halves
        marks = (symbols.LINE_END, symbols.TEXT_END, symbols.TAB, symbols.FILL, *symbols.inverse(symbols.PRINTABLE_ASCII))
        self._ours = {symbol: self.store.add(symbol, font.draw_mark(symbol)) for symbol in marks}
        self._cells[ord("\t")] = self._ours[symbols.TAB]
        self._cells[ord("\n")] = self._ours[symbols.LINE_END]

    def mark(self, symbol: str) -> int:
        """The glyph of a mark or an inverse character."""
        return self._ours[symbol]

    def lookup(self, keys: Codes) -> NDArray[np.int32]:
        """For every key its glyph, or a negative number that `sequences` knows."""
        cells = self._cells[keys]
        unknown = cells == self._UNKNOWN
        if unknown.any():
            with self._lock:
                for key in np.unique(keys[unknown]).tolist():
                    if self._cells[key] == self._UNKNOWN:
                        self._cells[key] = self._resolve(key)
            cells = self._cells[keys]
        return cells

    def sequences(self) -> Sequences:
        """The glyphs of all keys that take several cells; the negative number -2 - i stands for the i-th."""
        with self._lock:
            lengths = np.array([len(sequence) for sequence in self._sequences], dtype=np.int64)
            glyphs = np.concatenate([np.empty(0, dtype=np.int32), *self._sequences])
        return Sequences(glyphs, np.cumsum(lengths) - lengths, lengths)

    def wide_starts(self, glyphs: NDArray[np.int32]) -> NDArray[np.bool_]:
        """Which glyphs are left halves of wide characters."""
        return np.isin(glyphs, list(self._wide))

    def _resolve(self, key: int) -> int:
        if key >= self.INVERSE:
            return self._ours[symbols.inverse(chr(key - self.INVERSE))]
        ink = self.font.draw(key) if symbols.is_drawable(key) else None
        if ink is not None:
            return self._add_character(chr(key), ink)
        if symbols.is_drawable(key) and not self.font.covers(key):
            self.missing.add(key)
        return self._add_sequence([self._ours[symbol] for symbol in symbols.escape(key)])

    def _add_character(self, char: str, ink: Ink) -> int:
        width = self.font.width
        if ink.shape[1] == width:
            return self.store.add(char, ink)
        left = self.store.add(char, ink[:, :width].copy())
        self._wide.add(left)
        return self._add_sequence([left, self.store.add(symbols.WIDE_REST, ink[:, width:].copy())])

    def _add_sequence(self, glyphs: list[int]) -> int:
        self._sequences.append(np.array(glyphs, dtype=np.int32))
        return -1 - len(self._sequences)


# Cells by name: the bitmap font, and the cell it is set in.  8x8 sets the 5x8 font with air, so that four cells fill a patch.
CELLS = {
    "8x16": ("spleen-8x16", 16, 8),
    "8x8": ("spleen-5x8", 8, 8),
    "6x12": ("spleen-6x12", 12, 6),
    "5x8": ("spleen-5x8", 8, 5),
}


@cache
def cell_atlas(cell: str) -> CellAtlas:
    """The atlas of a cell of CELLS with the package's fonts and this machine's, shared by all pages of the process."""
    name, height, width = CELLS[cell]
    return CellAtlas(CellFont(shipped_bitmap(name), height, width, (shipped_font("DejaVuSansMono"), *system_fonts())))
