"""Proportional type: one store of glyphs for all looks and sizes of a document, drawn by FreeType.

A glyph is as high as its line and as wide as its advance, or wider where its ink overhangs; so every character's box is known.
Advances are whole pixels, without kerning, in logical order.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import cache
from threading import Lock
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from optmem.pages import symbols
from optmem.pages.atlas import GlyphStore
from optmem.pages.fonts import Ink, ScalableFont, shipped_font, system_fonts

Ints = NDArray[np.int32]

SLANT = 0.22  # pixels to the right for every pixel above the baseline
LEADING = 1.36  # height of a line, in em
WIDEST = 2.0  # em: what is wider is drawn as its escape, so that every character fits in every line
OVERHANG = 0.35  # em: ink beyond the advance, on either side
BULLET = "•"
_ESCAPE_SCALE = 0.8
_ESCAPES_BEGIN = symbols.inverse("U^")  # with a white column, so that one escape is told from the next


class Face(NamedTuple):
    """A way to draw characters."""

    size: int  # pixels per em
    is_mono: bool = False
    is_bold: bool = False
    is_italic: bool = False
    is_inverse: bool = False  # white on black: escapes and labels, which text cannot imitate

    @property
    def line_height(self) -> int:
        """Pixels from the top of a line to the top of the next."""
        return round(self.size * LEADING)

    @property
    def baseline(self) -> int:
        """Pixels from the top of a line to the baseline: DejaVu reaches 0.93 em above and 0.24 em below it."""
        return round((self.line_height + 0.69 * self.size) / 2)

    @property
    def ground(self) -> tuple[int, int]:
        """The rows that are black where type is white on black."""
        return max(self.baseline - round(0.95 * self.size), 0), min(self.baseline + round(0.28 * self.size) + 1, self.line_height)

    def fonts(self) -> tuple[ScalableFont, ...]:
        """The fonts that are asked for a character, in order."""
        names = ["DejaVuSansMono", "DejaVuSans"] if self.is_mono else ["DejaVuSans", "DejaVuSansMono"]
        if self.is_bold and not self.is_mono:
            names.insert(0, "DejaVuSans-Bold")
        return (*map(shipped_font, names), *system_fonts())


class Glyph(NamedTuple):
    """The ink of a character: as high as the line, `left` pixels to the left of the pen, which moves by `advance`."""

    ink: Ink
    left: int
    advance: int


def _slanted(ink: Ink, baseline: int) -> Ink:
    """Every row moved to the right by its height over the baseline, between pixels too: upright hinting survives in the rows."""
    shifts = SLANT * (baseline - 1 - np.arange(ink.shape[0]))
    whole = np.floor(shifts).astype(int)
    rest = (shifts - whole)[:, None]
    columns = np.arange(ink.shape[1]) - whole[:, None]
    padded = np.pad(ink.astype(np.float64), ((0, 0), (1, 1)))
    near = np.take_along_axis(padded, np.clip(columns + 1, 0, ink.shape[1] + 1), axis=1)
    far = np.take_along_axis(padded, np.clip(columns, 0, ink.shape[1] + 1), axis=1)
    slanted: Ink = np.rint(near * (1 - rest) + far * rest).astype(np.uint8)
    return slanted


def _draw(char: str, font: ImageFont.FreeTypeFont, face: Face) -> Glyph | None:
    """A character in a line of `face`; None where its ink does not fit."""
    advance = max(round(font.getlength(char)), 0)
    side = face.size * 3  # room for ink on both sides of the pen
    canvas = Image.new("L", (side * 2 + advance, face.line_height))
    left, top, right, bottom = font.getbbox(char, anchor="ls")
    if face.baseline + top < 0 or face.baseline + bottom > face.line_height or max(-left, right - advance) >= face.size:
        return None
    ImageDraw.Draw(canvas).text((side, face.baseline), char, fill=255, font=font, anchor="ls")
    ink = np.array(canvas)
    if face.is_italic:
        ink = _slanted(ink, face.baseline)
    inked = np.flatnonzero(ink.any(axis=0)) - side
    first, last = (min(0, int(inked[0])), max(advance, int(inked[-1]) + 1)) if len(inked) else (0, advance)
    if advance < 1 or max(-first, last - advance) > OVERHANG * face.size or last - first > WIDEST * face.size:
        return None
    return Glyph(ink[:, side + first : side + last].copy(), -first, advance)


def _inverted(glyph: Glyph, face: Face) -> Glyph:
    """White on a black box as wide as the advance."""
    ink = np.zeros((face.line_height, glyph.advance), dtype=np.uint8)
    box = slice(*face.ground)
    ink[box] = 255 - glyph.ink[box, glyph.left : glyph.left + glyph.advance]
    return Glyph(ink, 0, glyph.advance)


def draw_glyph(code: int, face: Face, size: int) -> Glyph | None:
    """A character in the first font that covers it, at `size` or smaller; None where no font has a visible form that fits."""
    font = next((font for font in face.fonts() if font.covers(code)), None)
    if font is None:
        return None
    for smaller in range(size, size // 2, -1):
        glyph = _draw(chr(code), font.at(smaller), face)
        if glyph is not None:
            is_visible = glyph.ink.any() or code == ord(" ")
            return None if not is_visible else _inverted(glyph, face) if face.is_inverse else glyph
    return None


class TypeCase:
    """All glyphs that documents of one size of type have used, by face and character.  Shared by threads."""

    def __init__(self) -> None:
        self.store = GlyphStore()
        self.missing: set[int] = set()  # sequences drawn because no font has the character
        self._lock = Lock()
        self._advances: list[int] = []
        self._lefts: list[int] = []
        self._metrics = (np.empty(0, dtype=np.int32), np.empty(0, dtype=np.int32))
        self._drawers: dict[Face, dict[str, int]] = {}  # a glyph, or -1 - index into _sequences
        self._escapes: dict[Face, dict[str, int]] = {}
        self._sequences: list[tuple[int, ...]] = []
        self._tabs: dict[tuple[int, int], int] = {}

    def lookup(self, chars: Iterable[str], face: Face) -> list[int]:
        """For every character its glyph, or a negative number that `sequence` knows."""
        drawer = self._drawers.get(face) or self._drawers.setdefault(face, {})
        try:
            return [drawer[char] for char in chars]
        except KeyError:
            with self._lock:
                for char in sorted(set(chars) - drawer.keys()):
                    drawer[char] = self._resolve(char, face)
            return [drawer[char] for char in chars]

    def sequence(self, number: int) -> tuple[int, ...]:
        """The glyphs of a character that is drawn as its escape."""
        return self._sequences[-1 - number]

    def metrics(self) -> tuple[Ints, Ints]:
        """For every glyph how far the pen moves, and how far its ink begins to the left of the pen."""
        with self._lock:
            if len(self._metrics[0]) < len(self._advances):
                self._metrics = (np.array(self._advances, dtype=np.int32), np.array(self._lefts, dtype=np.int32))
            return self._metrics

    def tab(self, advance: int, face: Face) -> int:
        """A blank that stands for a tab."""
        with self._lock:
            key = (advance, face.line_height)
            if key not in self._tabs:
                ink = np.zeros((face.line_height, advance), dtype=np.uint8)
                self._tabs[key] = self._add(symbols.TAB, Glyph(ink, 0, advance))
            return self._tabs[key]

    def bullet(self, face: Face) -> int:
        """What a list is marked with: looks like a bullet, says "-"."""
        with self._lock:
            drawer = self._drawers.setdefault(face, {})
            if "bullet" not in drawer:
                glyph = draw_glyph(ord(BULLET), face, face.size)
                assert glyph is not None, "DejaVu has a bullet"
                drawer["bullet"] = self._add("-", glyph)
            return drawer["bullet"]

    def _resolve(self, char: str, face: Face) -> int:
        code = ord(char)
        is_drawable = char in symbols.PRINTABLE_ASCII if face.is_inverse else symbols.is_drawable(code)
        glyph = draw_glyph(code, face, face.size) if is_drawable else None
        if glyph is not None:
            return self._add(symbols.inverse(char) if face.is_inverse else char, glyph)
        escape = self._add_escape(code, face)
        if is_drawable:
            self.missing.add(escape)
        return escape

    def _add_escape(self, code: int, face: Face) -> int:
        inverse = Face(face.size, is_mono=True, is_inverse=True)
        drawer = self._escapes.setdefault(inverse, {})
        for symbol in symbols.escape(code):
            if symbol not in drawer:
                glyph = draw_glyph(ord(symbols.plain(symbol)), inverse, max(round(face.size * _ESCAPE_SCALE), 5))
                assert glyph is not None, "DejaVu has all of ASCII"
                if symbol in _ESCAPES_BEGIN:
                    glyph.ink[:, 0] = 0
                drawer[symbol] = self._add(symbol, glyph)
        self._sequences.append(tuple(drawer[symbol] for symbol in symbols.escape(code)))
        return -len(self._sequences)

    def _add(self, symbol: str, glyph: Glyph) -> int:
        self._advances.append(glyph.advance)
        self._lefts.append(glyph.left)
        return self.store.add(symbol, glyph.ink)


@cache
def type_case(font_size: int) -> TypeCase:
    """The type case of a size, with the package's fonts and this machine's, shared by all documents of the process."""
    del font_size
    return TypeCase()
