"""Fonts: bitmap fonts of fixed cells, scalable fonts through FreeType, and which font covers a code point.

Whether a font covers a code point is read from its character map, never guessed from what it draws: a missing glyph looks like any
other.  Fonts are looked up in a fixed order, the package's own first, then what the system has.
"""

from __future__ import annotations

import logging
import os
import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache, cached_property
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import ImageFont

from optmem.errors import InputError

log = logging.getLogger(__name__)
Ink = NDArray[np.uint8]  # coverage, [height, width], 255 is black

SHIPPED = Path(__file__).parent.parent / "fonts"
# Fonts of other scripts that a machine may have, best first; a page's identity does not depend on the ones it does not use.
SYSTEM_FONTS = (
    "NotoSansMonoCJKsc-Regular.otf",
    "NotoSansCJK-Regular.ttc",
    "NotoSansCJKsc-Regular.otf",
    "wqy-microhei.ttc",
    "wqy-zenhei.ttc",
    "DroidSansFallbackFull.ttf",
    "NotoSansMono-Regular.ttf",
    "NotoSansArabic-Regular.ttf",
    "NotoSansHebrew-Regular.ttf",
    "NotoSansDevanagari-Regular.ttf",
    "NotoSansThai-Regular.ttf",
    "NotoSansSymbols2-Regular.ttf",
    "FreeMono.ttf",
    "unifont.otf",
    "unifont.ttf",
)
SYSTEM_FOLDERS = (
    "/usr/share/fonts",
    "/usr/local/share/fonts",
    "~/.local/share/fonts",
    "/Library/Fonts",
    "/System/Library/Fonts",
)


@dataclass(frozen=True)
class BitmapFont:
    """A font of fixed cells read from a BDF file."""

    name: str
    width: int
    height: int
    baseline: int  # rows from the top of a cell to the baseline
    glyphs: Mapping[int, Ink]  # by code point, [height, width]


def read_bdf(path: Path) -> BitmapFont:
    """Reads a BDF file whose glyphs all fill the font's bounding box."""
    glyphs: dict[int, Ink] = {}
    width = height = descent = code = 0
    lines = iter(path.read_text(encoding="ascii").splitlines())
    for line in lines:
        word, _, rest = line.partition(" ")
        if word == "FONTBOUNDINGBOX":
            width, height, _, descent = map(int, rest.split())
        elif word == "ENCODING":
            code = int(rest)
        elif word == "BBX":
            assert rest.split() == [str(width), str(height), "0", str(descent)], f"{path.name}: glyph {code} does not fill its cell"
        elif word == "BITMAP":
            rows = [int(next(lines), 16) << 8 * (4 - (width + 7) // 8) for _ in range(height)]
            bits = np.array(rows, dtype=">u4").view(np.uint8).reshape(height, 4)
            glyphs[code] = np.unpackbits(bits, axis=1)[:, :width] * np.uint8(255)
    return BitmapFont(path.stem, width, height, height + descent, glyphs)


@cache
def shipped_bitmap(name: str) -> BitmapFont:
    """A bitmap font of the package, read once."""
    return read_bdf(SHIPPED / f"{name}.bdf")


def _tables(data: bytes) -> dict[bytes, int]:
    """Offsets of the tables of a TrueType or OpenType font; of a collection, those of its first font."""
    start = struct.unpack_from(">I", data, 12)[0] if data[:4] == b"ttcf" else 0
    count = struct.unpack_from(">H", data, start + 4)[0]
    records = (struct.unpack_from(">4sIII", data, start + 12 + 16 * i) for i in range(count))
    return {tag: offset for tag, _, offset, _ in records}


def _segments(data: bytes, cmap: int) -> Iterator[tuple[int, int]]:
    """Inclusive ranges of code points that a Unicode subtable of a character map maps to a glyph (formats 4 and 12)."""
    count = struct.unpack_from(">H", data, cmap + 2)[0]
    for i in range(count):
        platform, _, offset = struct.unpack_from(">HHI", data, cmap + 4 + 8 * i)
        table = cmap + offset
        kind = struct.unpack_from(">H", data, table)[0]
        if platform not in (0, 3):
            continue
        if kind == 12:
            groups = struct.unpack_from(">I", data, table + 12)[0]
            for g in range(groups):
                first, last, _ = struct.unpack_from(">III", data, table + 16 + 12 * g)
                yield first, last
        elif kind == 4:
            yield from _format4(data, table)


def _format4(data: bytes, table: int) -> Iterator[tuple[int, int]]:
    n = struct.unpack_from(">H", data, table + 6)[0] // 2
    ends = struct.unpack_from(f">{n}H", data, table + 14)
    starts = struct.unpack_from(f">{n}H", data, table + 16 + 2 * n)
    deltas = struct.unpack_from(f">{n}H", data, table + 16 + 4 * n)
    offsets_at = table + 16 + 6 * n
    offsets = struct.unpack_from(f">{n}H", data, offsets_at)
    for i in range(n):
        first, last = starts[i], min(ends[i], 0xFFFE)
        if offsets[i] == 0:  # glyph = code + delta modulo 65536, and glyph 0 means that the code point is not there
            missing = -deltas[i] % 65536
            if first <= missing <= last:
                yield first, missing - 1
                first = missing + 1
            yield first, last
            continue
        for code in range(first, last + 1):
            at = offsets_at + 2 * i + offsets[i] + 2 * (code - first)
            if struct.unpack_from(">H", data, at)[0]:
                yield code, code


def read_coverage(path: Path) -> NDArray[np.bool_]:
    """For every code point whether the font has a glyph for it, read from its character map."""
    covered = np.zeros(0x110000, dtype=np.bool_)
    try:
        data = path.read_bytes()
        for first, last in _segments(data, _tables(data)[b"cmap"]):
            covered[first : last + 1] = True
    except (struct.error, KeyError, OSError):
        raise InputError(
            f"{path.name} is not a TrueType or OpenType font with a readable character map; remove it or replace it"
        ) from None
    return covered


@dataclass(frozen=True)
class ScalableFont:
    """A TrueType or OpenType font.  Basic layout is pinned: pages must not depend on which shaping library is installed."""

    path: Path
    is_shipped: bool = False

    @cached_property
    def coverage(self) -> NDArray[np.bool_]:
        """For every code point whether the font has a glyph for it.  A damaged font of the system has none; ours raises."""
        try:
            _load(self.path, 16)
            return read_coverage(self.path)
        except InputError as error:
            if self.is_shipped:
                raise
            log.warning("%s; it is passed over", error)
            return np.zeros(0x110000, dtype=np.bool_)

    def covers(self, code: int) -> bool:
        """Whether the font has a glyph for this code point."""
        return bool(self.coverage[code])

    def at(self, size: int) -> ImageFont.FreeTypeFont:
        """The font at a size in pixels per em."""
        return _load(self.path, size)


@cache
def _load(path: Path, size: int) -> ImageFont.FreeTypeFont:
    try:
        return ImageFont.truetype(str(path), size, layout_engine=ImageFont.Layout.BASIC)
    except OSError:
        raise InputError(f"{path.name} is not a font that FreeType can read; remove it or replace it") from None


@cache
def shipped_font(name: str) -> ScalableFont:
    """A scalable font of the package: DejaVuSans, DejaVuSans-Bold or DejaVuSansMono."""
    return ScalableFont(SHIPPED / f"{name}.ttf", is_shipped=True)


@cache
def system_fonts() -> tuple[ScalableFont, ...]:
    """The fonts of SYSTEM_FONTS that this machine has, in that order."""
    found: dict[str, Path] = {}
    home = os.environ.get("HOME", "")
    for folder in SYSTEM_FOLDERS:
        for path in sorted(Path(folder.replace("~", home)).rglob("*.[ot]t[fc]")):
            found.setdefault(path.name, path)
    return tuple(ScalableFont(found[name]) for name in SYSTEM_FONTS if name in found)
