"""Tables in the style `document`: ruled, columns as wide as what they hold where that fits the page."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate

from optmem.pages.bands import Band, Composer, Sheet
from optmem.pages.blocks import Align, Block, Cell, Run
from optmem.pages.galley import CODE_FILL, RULE_INK, Fill, Galley, SetLine, split_lines
from optmem.pages.page import Box
from optmem.pages.typeface import WIDEST, TypeCase

BETWEEN = " | "  # what the text of a page has between two cells

Row = list[list[Galley]]  # for every cell its source lines
SetCell = list[tuple[Galley, SetLine]]


@dataclass(frozen=True, slots=True)
class _Grid:
    """The columns of a table."""

    edges: tuple[int, ...]  # where each begins, and where the last one ends
    pad: int  # blank pixels to both sides of the text
    aligns: tuple[Align, ...]

    @property
    def pad_above(self) -> int:
        """Blank pixels above and below the text of a row."""
        return self.pad // 2 + 1

    def width(self, column: int) -> int:
        """Pixels for text."""
        return self.edges[column + 1] - self.edges[column] - 2 * self.pad

    def left(self, column: int, text_width: int) -> int:
        """Where text of this width begins."""
        room = self.width(column) - text_width
        align = self.aligns[column] if column < len(self.aligns) else "left"
        return self.edges[column] + self.pad + {"left": 0, "center": room // 2, "right": room}[align]


def share(wanted: Sequence[int], room: int) -> list[int]:
    """Widths of columns that want so much: the narrow ones get it, the wide ones share what is left."""
    given, left = [0] * len(wanted), room
    for k, i in enumerate(sorted(range(len(wanted)), key=lambda i: wanted[i])):
        given[i] = min(wanted[i], left // (len(wanted) - k))
        left -= given[i]
    return given


def _widths(rows: Sequence[Row], narrowest: int, pad: int, room: int) -> list[int]:
    """Widths of all columns: what they hold where that fits the page, else at least their words where those fit."""
    columns = range(len(rows[0]))
    wanted = [max([narrowest, *(galley.width + 2 * pad for row in rows for galley in row[c])]) for c in columns]
    if sum(wanted) <= room:
        return wanted
    words = [max([narrowest, *(galley.widest_word + 2 * pad for row in rows for galley in row[c])]) for c in columns]
    if sum(words) > room:
        return share(wanted, room)
    more = share([most - least for most, least in zip(wanted, words, strict=True)], room - sum(words))
    return [least + extra for least, extra in zip(words, more, strict=True)]


def set_table(block: Block, sheet: Sheet, case: TypeCase, left: int) -> Iterator[Band]:
    """The bands of a table.  One with too many columns for the page is set as lines of text, a rule below every row."""
    columns = max((len(row) for row in block.rows), default=0)
    pad, room = round(0.45 * sheet.font_size), sheet.margin + sheet.inner_width - left
    narrowest = round(2 * WIDEST * sheet.font_size) + 2 * pad
    if columns > 1 and columns * narrowest > room:
        yield from _set_as_text(block, sheet, case, left)
    elif columns:
        rows = [_set_cells(row, columns, sheet, case, is_head=k == 0) for k, row in enumerate(block.rows)]
        edges = tuple(accumulate(_widths(rows, narrowest, pad, room), initial=left))
        yield from _set_rows(rows, _Grid(edges, pad, block.aligns), sheet)


def _set_cells(row: Sequence[Cell], columns: int, sheet: Sheet, case: TypeCase, *, is_head: bool) -> Row:
    face = sheet.face(is_bold=is_head)
    cells = [[Galley(runs, face, case) for runs in split_lines(cell)] for cell in row]
    return cells + [[] for _ in range(columns - len(cells))]


def _set_rows(rows: Sequence[Row], grid: _Grid, sheet: Sheet) -> Iterator[Band]:
    """Bands of rows.  A row that is higher than a page is cut between lines."""
    line_height = sheet.face().line_height
    most = (sheet.inner_height - 2 * grid.pad_above) // line_height
    for k, row in enumerate(rows):
        cells = [[(galley, line) for galley in cell for line in galley.lines(grid.width(c))] for c, cell in enumerate(row)]
        count = max(1, *map(len, cells))
        for first in range(0, count, most):
            part = [cell[first : first + most] for cell in cells]
            band = _set_part(part, grid, line_height, min(most, count - first), is_head=k == 0)
            yield replace(band, keeps_next=k == 0 and len(rows) > 1)


def _set_part(cells: Sequence[SetCell], grid: _Grid, line_height: int, count: int, *, is_head: bool) -> Band:
    """Some lines of a row, cell by cell."""
    composer = Composer()
    height = count * line_height + 2 * grid.pad_above
    for c, cell in enumerate(cells):
        end = BETWEEN if c < len(cells) - 1 else "\n"
        for k, (galley, line) in enumerate(cell):
            place = grid.left(c, galley.line_width(line)), grid.pad_above + k * line_height
            composer.add(galley, line, *place, after=end if k == len(cell) - 1 else "")
        if not cell:
            at = grid.left(c, 0)
            composer.say(end, Box(at, grid.pad_above, at, grid.pad_above + line_height))
    return composer.band(height, _rules(grid, height, is_head=is_head))


def _rules(grid: _Grid, height: int, *, is_head: bool) -> Iterator[Fill]:
    """Lines on all sides of all cells; the ones below lie on the band that follows."""
    left, right = grid.edges[0], grid.edges[-1]
    if is_head:
        yield Box(left, 0, right, height), CODE_FILL
    for top in (0, height):
        yield Box(left, top, right + 1, top + 1), RULE_INK
    for edge in grid.edges:
        yield Box(edge, 0, edge + 1, height), RULE_INK


def _set_as_text(block: Block, sheet: Sheet, case: TypeCase, left: int) -> Iterator[Band]:
    room = sheet.margin + sheet.inner_width - left
    for k, row in enumerate(block.rows):
        face = sheet.face(is_bold=k == 0)
        runs = tuple(run for cell in row for run in (*cell, Run(BETWEEN)))[:-1]
        galleys = [Galley(line_runs, face, case) for line_runs in split_lines((*runs, Run("\n")))]
        for galley in galleys:
            for line in galley.lines(room):
                composer = Composer()
                composer.add(galley, line, left, 0)
                is_last = galley is galleys[-1] and line.end == len(galley.text)
                rule = Box(left, face.line_height, left + room, face.line_height + 1), RULE_INK
                yield composer.band(face.line_height + 3 * is_last, [rule] if is_last else [])
