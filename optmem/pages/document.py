"""The style `document`: pages for people, with headings, lists, tables and code in proportional type.

Blocks become bands, and bands are stacked on pages.  What a page cannot hold goes to the next one, and nothing is clipped.  What is
ours and no text can imitate is white on black: labels, and the escapes of what has no form of its own.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from itertools import chain, islice

import numpy as np

from optmem.pages.bands import NO_PLACEMENTS, NO_SOURCES, Band, Composer, Sheet, move_down
from optmem.pages.blocks import Block, BlockKind, Container, Look, Run
from optmem.pages.galley import CODE_FILL, RULE_INK, Fill, Galley, SetLine, split_lines
from optmem.pages.page import Box, Line, Page
from optmem.pages.tables import set_table
from optmem.pages.typeface import LEADING, Face, TypeCase, type_case

HEADINGS = (1.7, 1.4, 1.2, 1.08, 1.0, 1.0)  # sizes by level, in em
CODE_SIZE, LABEL_SIZE = 0.92, 0.85
STEP = 2.0  # em that a list or a quote is set in by
MAX_DEPTH = 12  # steps that are shown
BAR_INK = 96
SPACE: dict[BlockKind, tuple[float, float]] = {  # em wanted above and below; between two blocks the larger one counts
    "verbatim": (0.3, 0.3),
    "label": (1.0, 0.35),
    "heading": (1.1, 0.4),
    "paragraph": (0.6, 0.6),
    "item": (0.25, 0.25),
    "quote": (0.6, 0.6),
    "code": (0.6, 0.6),
    "table": (0.7, 0.7),
    "rule": (0.4, 0.4),
}


@dataclass(frozen=True, slots=True)
class _Column:
    """Where a block stands."""

    left: int
    marker_right: int  # left edge of the innermost item
    bars: tuple[int, ...]  # left edges of the bars of the quotes


def _nesting(block: Block) -> tuple[Container, ...]:
    """What a block stands in; where it does not say, its kind and its level do."""
    if block.nesting or block.kind not in ("item", "quote"):
        return block.nesting
    kind: Container = "item" if block.kind == "item" else "quote"
    return (kind,) * block.level


def _column(block: Block, sheet: Sheet, marker_width: int = 0) -> _Column:
    nesting = _nesting(block)[:MAX_DEPTH]
    if marker_width and "item" not in nesting:
        nesting = (*nesting, "item")
    step = min(STEP * sheet.font_size, 0.4 * sheet.inner_width / max(len(nesting), 1))
    edges = [sheet.margin + round(step * k) for k in range(len(nesting) + 1)]
    bars = tuple(edges[k] + round(0.25 * step) for k, kind in enumerate(nesting) if kind == "quote")
    marker_right = max((edges[k + 1] for k, kind in enumerate(nesting) if kind == "item"), default=sheet.margin)
    wider = max(marker_width - round(step), 0)  # a marker too wide to hang moves the block
    return _Column(edges[-1] + wider, marker_right + wider, bars)


class _Setter:
    """Sets blocks as bands."""

    def __init__(self, sheet: Sheet, case: TypeCase) -> None:
        self.sheet, self.case = sheet, case
        self.right = sheet.margin + sheet.inner_width

    def set(self, block: Block) -> Iterator[Band]:
        """The bands of a block, with the marker of its item and the bars of its quotes."""
        bands, column = self._set_item(block) if block.marker else self._set_plain(block, _column(block, self.sheet))
        for band in bands:
            yield replace(band, bars=column.bars) if column.bars else band

    def _set_plain(self, block: Block, column: _Column) -> tuple[Iterator[Band], _Column]:
        return _SETTERS[block.kind](self, block, column.left), column

    def _set_item(self, block: Block) -> tuple[Iterator[Band], _Column]:
        """A block with its marker beside its first line, or where there is no room, in it."""
        runs = (Run(block.marker + " "),)
        marker = Galley(runs, self.sheet.face(), self.case)
        column = _column(block, self.sheet, marker.width)
        if self.right - column.left < 0.5 * self.sheet.inner_width or block.kind == "rule":
            return self._set_plain(replace(block, runs=(*runs, *block.runs)), _column(block, self.sheet))
        bands, _ = self._set_plain(block, column)
        first = [self._marked(band, marker, column.marker_right) for band in islice(bands, 1)]
        return chain(first, bands), column

    def _marked(self, band: Band, marker: Galley, right: int) -> Band:
        """A band whose first line has a marker hanging to the left of it, on the same baseline."""
        face, first = self.sheet.face(), band.lines[0]
        line_face = Face(round((first.box.bottom - first.box.top) / LEADING))
        top = max(first.box.top + line_face.baseline - face.baseline, 0)
        shown, left = SetLine(0, len(marker.glyphs) - 1, 0, 0), right - marker.width
        placements = marker.placements(shown, left, top)
        if marker.text == "- ":
            placements = np.array([[self.case.bullet(face), top, right - face.size]], dtype=np.int32)
        return replace(
            band,
            height=max(band.height, top + face.line_height),
            lines=(Line(marker.text + first.text, first.box._replace(left=left), first.spans), *band.lines[1:]),
            placements=np.concatenate([placements, band.placements]),
            sources=np.concatenate([marker.sources[: len(placements)], band.sources + np.int32(len(marker.text))]),
        )

    def _lines(self, runs: tuple[Run, ...], face: Face, left: int, *, is_hard: bool = False) -> Iterator[Band]:
        """One band for every line, as wide as the page allows."""
        for line_runs in split_lines(_closed(runs)):
            galley = Galley(line_runs, face, self.case)
            for line in galley.lines(self.right - left, is_hard=is_hard):
                composer = Composer()
                composer.add(galley, line, left, 0)
                yield composer.band(face.line_height)

    def _set_text(self, block: Block, left: int) -> Iterator[Band]:
        """Running text.  Its first two and its last two lines stay together."""
        bands = list(self._lines(block.runs, self.sheet.face(), left))
        for k, band in enumerate(bands):
            yield replace(band, keeps_next=len(bands) > 1 and k in (0, len(bands) - 2))

    def _set_verbatim(self, block: Block, left: int) -> Iterator[Band]:
        return self._lines(block.runs, self.sheet.face(), left) if any(run.text for run in block.runs) else iter(())

    def _set_heading(self, block: Block, left: int) -> Iterator[Band]:
        face = self.sheet.face(HEADINGS[min(max(block.level, 1), 6) - 1], is_bold=True)
        for band in self._lines(block.runs, face, left):
            yield replace(band, keeps_next=True)

    def _set_label(self, block: Block, left: int) -> Iterator[Band]:
        """What we say: white on black, on a rule across the page."""
        face, pad = self.sheet.face(LABEL_SIZE, is_bold=True), round(0.3 * self.sheet.font_size)
        top, bottom = face.ground
        for band in self._lines(block.runs, face, left + pad):
            end = band.lines[0].box.right
            edges = Box(left, top, left + pad, bottom), Box(end, top, end + pad, bottom)
            rule = Box(left, bottom, self.right, bottom + 1)
            yield replace(band, fills=(*band.fills, *((box, 255) for box in (*edges, rule))), keeps_next=True)

    def _set_code(self, block: Block, left: int) -> Iterator[Band]:
        """Lines of equal columns on a light ground; what is said about the code stays with its first line."""
        face, pad = self.sheet.face(CODE_SIZE, is_mono=True), round(0.4 * self.sheet.font_size)
        bands = list(self._lines(block.runs, face, left + pad, is_hard=True))
        for k, band in enumerate(bands):
            above, below = (pad if k == 0 else 0), (pad if k == len(bands) - 1 else 0)
            ground = Box(left, 0, self.right, above + band.height + below), CODE_FILL
            is_told = k == 0 and bool(block.runs) and Look.ITALIC in block.runs[0].look
            padded = band.moved(above)
            yield replace(padded, height=padded.height + below, fills=(*padded.fills, ground), keeps_next=is_told)

    def _set_table(self, block: Block, left: int) -> Iterator[Band]:
        return set_table(block, self.sheet, self.case, left)

    def _set_rule(self, block: Block, left: int) -> Iterator[Band]:
        assert block.kind == "rule"
        middle = self.sheet.font_size // 2
        yield Band(2 * middle + 1, fills=((Box(left, middle, self.right, middle + 1), RULE_INK),))


_SETTERS: dict[BlockKind, Callable[[_Setter, Block, int], Iterator[Band]]] = {
    "verbatim": _Setter._set_verbatim,
    "label": _Setter._set_label,
    "heading": _Setter._set_heading,
    "paragraph": _Setter._set_text,
    "item": _Setter._set_text,
    "quote": _Setter._set_text,
    "code": _Setter._set_code,
    "table": _Setter._set_table,
    "rule": _Setter._set_rule,
}


def _closed(runs: tuple[Run, ...]) -> tuple[Run, ...]:
    """Runs that end with a line end."""
    return runs if runs and runs[-1].text.endswith("\n") else (*runs, Run("\n"))


def _bands(blocks: Iterable[Block], sheet: Sheet, case: TypeCase) -> Iterator[Band]:
    """The bands of all blocks, with the space between blocks."""
    setter, below = _Setter(sheet, case), 0.0
    for block in blocks:
        above, below_next = SPACE[block.kind]
        gap = round(max(below, above) * sheet.font_size)
        for band in setter.set(block):
            yield replace(band, gap=gap) if gap else band
            gap, below = 0, below_next


class _Stack:
    """Pages under construction."""

    def __init__(self, sheet: Sheet, case: TypeCase) -> None:
        self.sheet, self.case = sheet, case
        self.pages: list[Page] = []
        self._bands: list[tuple[int, Band]] = []  # of the page in the making, with their tops
        self._top = sheet.margin

    def add(self, bands: list[Band]) -> None:
        """Bands that should share a page, and do unless they are more than a page."""
        height = sum(band.gap + band.height for band in bands) - bands[0].gap
        if self._bands and self._top + bands[0].gap + height > self._limit and height <= self.sheet.inner_height:
            self.finish_page()
        for band in bands:
            if self._bands and self._top + band.gap + band.height > self._limit:
                self.finish_page()
            self._top += band.gap if self._bands else 0
            self._bands.append((self._top, band))
            self._top += band.height
            assert self._top <= self._limit, f"a band of {band.height} pixels fits on an empty page"

    @property
    def _limit(self) -> int:
        return self.sheet.height - self.sheet.margin

    def finish_page(self) -> None:
        """Ends the page in the making, even if it is empty."""
        lines: list[Line] = []
        placements, sources, said, missing = [NO_PLACEMENTS], [NO_SOURCES], 0, set[str]()
        for top, band in self._bands:
            lines += [replace(line, box=move_down(line.box, top)) for line in band.lines]
            placements.append(band.placements + np.array([0, top, 0], dtype=np.int32))
            sources.append(np.maximum(band.sources + np.int32(said), -1))
            said += sum(len(line.text) for line in band.lines)
            missing |= band.missing
        self.pages.append(
            Page(
                style="document",
                index=len(self.pages),
                height=self.sheet.height,
                width=self.sheet.width,
                lines=tuple(lines),
                missing=tuple(sorted(missing)),
                store=self.case.store,
                placements=np.concatenate(placements),
                sources=np.concatenate(sources),
                fills=tuple(self._fills()),
            )
        )
        self._bands, self._top = [], self.sheet.margin

    def _fills(self) -> Iterator[Fill]:
        end, bars = 0, frozenset[int]()  # of the band before
        for top, band in self._bands:
            yield from ((move_down(box, top), ink) for box, ink in band.fills)
            for left in band.bars:
                yield Box(left, end if left in bars else top, left + 3, top + band.height), BAR_INK
            end, bars = top + band.height, frozenset(band.bars)


def paginate_document(blocks: Iterable[Block], height: int, width: int, *, font_size: int) -> list[Page]:
    """Pages of type from blocks, at least one.  Raises InputError where the type is too large for the page."""
    sheet, case = Sheet(height, width, font_size), type_case(font_size)
    stack, together, length = _Stack(sheet, case), list[Band](), 0
    for band in _bands(blocks, sheet, case):
        together.append(band)
        length += band.gap + band.height
        if not band.keeps_next or length > sheet.inner_height:
            stack.add(together)
            together, length = [], 0
    if together:
        stack.add(together)
    stack.finish_page()
    return stack.pages
