"""Type that is set but not yet on a page: the glyphs of a text one after the other, and where its lines may break."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache, cached_property
from itertools import accumulate

import numpy as np
from numpy.typing import NDArray

from optmem.pages.blocks import Look, Run, Span, cut_run, trace
from optmem.pages.page import Box
from optmem.pages.typeface import Face, Ints, TypeCase

TAB_COLUMNS = 4
CODE_FILL, RULE_INK, LABEL_INK = 16, 112, 255

_DECORATIONS = Look.CODE | Look.LINK | Look.STRIKE

Fill = tuple[Box, int]
Places = NDArray[np.int64]  # indices of glyphs


@dataclass(frozen=True)
class SetLine:
    """A line of a galley: its glyphs, and its text including what ends it."""

    first: int
    last: int  # glyph after the last one that is shown
    start: int
    end: int  # character after the last one, the blanks at a break included


@cache
def face_of(look: Look, base: Face) -> Face:
    """How a run is drawn in a block of this face."""
    return base._replace(
        is_mono=Look.CODE in look or (base.is_mono and look == Look.PLAIN),
        is_bold=base.is_bold or Look.BOLD in look,
        is_italic=Look.ITALIC in look,
        is_inverse=Look.LABEL in look,
    )


def split_lines(runs: tuple[Run, ...]) -> Iterator[tuple[Run, ...]]:
    """The runs of every source line, its line end included."""
    line: list[Run] = []
    for run in runs:
        at = 0
        while (end := run.text.find("\n", at)) >= 0:
            yield (*line, cut_run(run, at, end + 1))
            line, at = [], end + 1
        if at < len(run.text):
            line.append(cut_run(run, at, len(run.text)))
    if line:
        yield tuple(line)


class Galley:
    """One source line of text in glyphs.  A line end at its end is text but has no glyph."""

    def __init__(self, runs: tuple[Run, ...], base: Face, case: TypeCase) -> None:
        self.runs, self.face, self.case = runs, base, case
        self.text = "".join(run.text for run in runs)
        self.starts = np.fromiter(accumulate((len(run.text) for run in runs), initial=0), dtype=np.int64)
        cells: list[int] = []
        for run in runs:
            cells += case.lookup(run.text.removesuffix("\n"), face_of(run.look, base))
        if "\t" in self.text:
            self._set_tabs(cells)
        self.missing: set[str] = set()  # characters that no font has
        self.glyphs, self.sources = self._expand(cells)
        self.pens = np.concatenate([[0], np.cumsum(case.metrics()[0][self.glyphs])])  # [n + 1]  where each glyph begins

    @cached_property
    def _decorated(self) -> list[int]:
        """Runs that are shown by more than their glyphs."""
        return [k for k, run in enumerate(self.runs) if run.look is not Look.PLAIN and run.look & _DECORATIONS]

    def _set_tabs(self, cells: list[int]) -> None:
        """Tabs reach to the next multiple of four columns, a column being a character."""
        (space,) = self.case.lookup(" ", self.face)
        blank = int(self.case.metrics()[0][space])
        column = 0
        for i, char in enumerate(self.text[: len(cells)]):
            step = 1
            if char == "\t":
                step = TAB_COLUMNS - column % TAB_COLUMNS
                cells[i] = self.case.tab(step * blank, self.face)
            column += step

    def _expand(self, cells: list[int]) -> tuple[Ints, Ints]:
        """The glyphs of all characters, and the character of every glyph."""
        if not cells or min(cells) >= 0:
            return np.array(cells, dtype=np.int32), np.arange(len(cells), dtype=np.int32)
        self.missing = {self.text[i] for i, cell in enumerate(cells) if cell in self.case.missing}
        sequences = [(cell,) if cell >= 0 else self.case.sequence(cell) for cell in cells]
        glyphs = np.array([glyph for sequence in sequences for glyph in sequence], dtype=np.int32)
        return glyphs, np.repeat(np.arange(len(cells), dtype=np.int32), [len(sequence) for sequence in sequences])

    @property
    def width(self) -> int:
        """Pixels, unbroken."""
        return int(self.pens[-1])

    @property
    def widest_word(self) -> int:
        """Pixels of the widest stretch that lines are not broken in if there is another way."""
        if not len(self.glyphs):
            return 0
        ends, nexts = self._breaks[0]
        return int((self.pens[np.append(ends, -1)] - self.pens[np.append(0, nexts)]).max())

    @cached_property
    def _codes(self) -> NDArray[np.uint32]:
        """The code point that every glyph shows."""
        codes = np.frombuffer(self.text.encode("utf-32-le", "surrogatepass"), dtype="<u4")
        return codes[self.sources]

    @cached_property
    def _breaks(self) -> tuple[tuple[Places, Places], ...]:
        """Where lines may break, best first: the glyph after the last that is shown, and the glyph that begins the next line."""
        codes, begins = self._codes, np.diff(self.sources, prepend=-1) != 0
        is_blank = (codes == 0x20) | (codes == 0x09)
        inked = np.maximum.accumulate(np.where(is_blank, -1, np.arange(len(codes))))  # the last glyph with ink so far
        inside: Places = np.flatnonzero(begins[1:]) + 1
        words: Places = inside[is_blank[inside - 1] & ~is_blank[inside]]
        if is_blank[-1]:
            words = np.append(words, len(codes))
        stands_alone = (codes >= 0x2E80) | ~begins | (np.diff(self.sources, append=len(codes)) == 0)  # East Asian, or an escape
        free = inside[(stands_alone[inside - 1] | stands_alone[inside]) & ~is_blank[inside] & ~is_blank[inside - 1]]
        ends: Places = np.concatenate([inked[words - 1] + 1, free])
        nexts: Places = np.concatenate([words, free])
        order = np.argsort(ends, kind="stable")
        joints: Places = inside[np.isin(codes[inside - 1], (ord("-"), ord("/")))]
        return (ends[order], nexts[order]), (joints, joints), (inside, inside)

    def lines(self, width: int, *, is_hard: bool = False) -> Iterator[SetLine]:
        """Breaks the text greedily at blanks; within words that do not fit, after - and /; `is_hard`: anywhere."""
        count, first, start = len(self.glyphs), 0, 0
        while count and self.pens[count] - self.pens[first] > width:
            limit = int(np.searchsorted(self.pens, self.pens[first] + width, side="right")) - 1
            last, following = self._break(first, limit, is_hard=is_hard)
            if following == count:
                yield SetLine(first, last, start, len(self.text))
                return
            end = int(self.sources[following]) + (self.sources[following] == self.sources[following - 1])
            yield SetLine(first, last, start, int(end))
            first, start = following, int(end)
        yield SetLine(first, count, start, len(self.text))

    def _break(self, first: int, limit: int, *, is_hard: bool) -> tuple[int, int]:
        for ends, nexts in self._breaks[2:] if is_hard else self._breaks:
            k = int(np.searchsorted(ends, limit, side="right")) - 1
            if k >= 0 and ends[k] > first:
                return int(ends[k]), int(nexts[k])
        cut = max(limit, first + 1)
        return cut, cut

    def placements(self, line: SetLine, left: int, top: int) -> Ints:
        """[n, 3]  The glyphs of a line whose pen begins at `left`."""
        glyphs = self.glyphs[line.first : line.last]
        lefts = self.pens[line.first : line.last] - self.pens[line.first] + left - self.case.metrics()[1][glyphs]
        return np.stack([glyphs, np.full_like(glyphs, top), lefts.astype(np.int32)], axis=1)

    def spans(self, line: SetLine) -> tuple[Span, ...]:
        """Where a line came from."""
        return trace(self.runs, self.starts, line.start, line.end)

    def line_width(self, line: SetLine) -> int:
        """Pixels of what is shown."""
        return int(self.pens[line.last] - self.pens[line.first])

    def fills(self, line: SetLine, left: int, top: int) -> Iterator[Fill]:
        """What a line's looks draw besides glyphs: the background of code, lines under links and through what is struck."""
        base, size = top + self.face.baseline, self.face.size
        first_run = int(np.searchsorted(self.starts, line.start, side="right")) - 1
        for k in self._decorated[bisect_left(self._decorated, first_run) :]:
            run = self.runs[k]
            if self.starts[k] >= line.end:
                break
            edges = np.searchsorted(self.sources[line.first : line.last], self.starts[k : k + 2]) + line.first
            start, end = (self.pens[edges] - self.pens[line.first] + left).tolist()
            if start == end:
                continue
            if Look.CODE in run.look and not self.face.is_mono:
                yield Box(start - 1, base - size, end + 1, base + round(0.3 * size)), CODE_FILL
            if Look.LINK in run.look:
                yield Box(start, base + 2, end, base + 2 + max(size // 16, 1)), RULE_INK
            if Look.STRIKE in run.look:
                middle = base - round(0.28 * size)
                yield Box(start, middle, end, middle + max(size // 14, 1)), 255
