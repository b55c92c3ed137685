"""Bands: the smallest things that a page break leaves whole, and the sheet they are set for."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field, replace

import numpy as np

from optmem.errors import InputError
from optmem.pages.galley import Fill, Galley, SetLine
from optmem.pages.page import Box, Line
from optmem.pages.typeface import LEADING, Face, Ints

NO_PLACEMENTS: Ints = np.empty((0, 3), dtype=np.int32)
NO_SOURCES: Ints = np.empty(0, dtype=np.int32)


def move_down(box: Box, pixels: int) -> Box:
    """A box further down on the page."""
    return Box(box.left, box.top + pixels, box.right, box.bottom + pixels)


@dataclass(frozen=True, slots=True)
class Sheet:
    """A page that type of a size is set on."""

    height: int
    width: int
    font_size: int  # pixels per em

    def __post_init__(self) -> None:
        if self.inner_width < 8 * self.font_size or self.inner_height < 6 * LEADING * self.font_size:
            raise InputError(
                f"font_size {self.font_size} is too large for a page of {self.height}x{self.width} pixels: "
                "a page must be at least 10 em wide and high; choose a smaller font_size or a larger page"
            )

    @property
    def margin(self) -> int:
        """Blank pixels on every side, where only overhanging ink and rules may go."""
        return max(round(0.04 * min(self.height, self.width)), round(0.7 * self.font_size), 4)

    @property
    def inner_width(self) -> int:
        """Pixels between the margins."""
        return self.width - 2 * self.margin

    @property
    def inner_height(self) -> int:
        """Pixels between the margins."""
        return self.height - 2 * self.margin

    def face(self, scale: float = 1.0, *, is_mono: bool = False, is_bold: bool = False) -> Face:
        """Type of this many em."""
        return Face(round(self.font_size * scale), is_mono=is_mono, is_bold=is_bold)


@dataclass(frozen=True, slots=True)
class Band:
    """Part of a page from margin to margin.  Pixels count from its top and from the left of the page."""

    height: int
    lines: tuple[Line, ...] = ()
    placements: Ints = field(default_factory=NO_PLACEMENTS.copy)
    sources: Ints = field(default_factory=NO_SOURCES.copy)  # index into the text of its lines
    missing: frozenset[str] = frozenset()
    fills: tuple[Fill, ...] = ()
    bars: tuple[int, ...] = ()  # left of the bars of the quotes it stands in; they go on through the gaps between bands
    gap: int = 0  # blank pixels wanted above, but not at the top of a page
    keeps_next: bool = False  # stands on the page of the next band where that is possible

    def moved(self, down: int) -> Band:
        """The band with this many pixels more above."""
        return replace(
            self,
            height=self.height + down,
            lines=tuple(replace(line, box=move_down(line.box, down)) for line in self.lines),
            placements=self.placements + np.array([0, down, 0], dtype=np.int32),
            fills=tuple((move_down(box, down), ink) for box, ink in self.fills),
        )


class Composer:
    """Collects the lines of one band."""

    def __init__(self) -> None:
        self.lines: list[Line] = []
        self.placements: list[Ints] = []
        self.sources: list[Ints] = []
        self.missing: set[str] = set()
        self.fills: list[Fill] = []
        self._length = 0  # of the text so far

    def add(self, galley: Galley, line: SetLine, left: int, top: int, *, after: str = "") -> None:
        """A line of a galley, and text of ours after it that is not drawn."""
        said = galley.text[line.start : line.end]
        self.placements.append(galley.placements(line, left, top))
        self.sources.append(galley.sources[line.first : line.last] - line.start + self._length)
        self.missing |= galley.missing & set(said) if galley.missing else set()
        self.fills.extend(galley.fills(line, left, top))
        self.say(said + after, Box(left, top, left + galley.line_width(line), top + galley.face.line_height), galley, line)

    def say(self, text: str, box: Box, galley: Galley | None = None, line: SetLine | None = None) -> None:
        """Text in a box, traced to where it came from."""
        self.lines.append(Line(text, box, galley.spans(line) if galley and line else ()))
        self._length += len(text)

    def band(self, height: int, fills: Iterable[Fill] = ()) -> Band:
        """All of it."""
        return Band(
            height,
            tuple(self.lines),
            np.concatenate([NO_PLACEMENTS, *self.placements]),
            np.concatenate([NO_SOURCES, *self.sources]),
            frozenset(self.missing),
            (*self.fills, *fills),
        )
