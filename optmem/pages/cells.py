"""The styles `dense` and `packed`: text in fixed cells, row by row, wrapped hard at the column limit with no mark.

    dense   a line end is drawn and breaks the row
    packed  a line end is drawn and the row goes on

The end of the text is drawn as a block.  Nothing that a reader must say is invisible: `read_symbols` of the symbols in reading
order gives back the text, and the pixels alone give back the symbols of Latin text and signs.  Letters of two scripts that the
fonts draw alike (Greek and Cyrillic A) are the exception.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from optmem.pages import symbols
from optmem.pages.atlas import CellAtlas
from optmem.pages.blocks import Block, Look, Run, Span, trace
from optmem.pages.page import Box, Line, Page

Ints = NDArray[np.int32]


@dataclass(frozen=True)
class Text:
    """All runs of a document as one string, with the keys of its characters and the place of every run in it."""

    text: str
    keys: NDArray[np.int64]  # [n]  atlas keys
    starts: NDArray[np.int64]  # [runs + 1]  where each run begins
    runs: tuple[Run, ...]


@dataclass(frozen=True)
class Flow:
    """Cells in reading order and where each one stands, rows counted through all pages."""

    glyphs: Ints  # [n]
    sources: Ints  # [n]  index into the text; -1 for fillers, the text's length for the end mark
    rows: Ints  # [n]
    columns: Ints  # [n]


def _code_points(text: str) -> NDArray[np.int64]:
    return np.frombuffer(text.encode("utf-32-le", "surrogatepass"), dtype="<u4").astype(np.int64)


def _keys(run: Run) -> NDArray[np.int64]:
    """Atlas keys of a run: labels are drawn white on black, which no text can be, except for their line ends."""
    codes = _code_points(run.text)
    if Look.LABEL not in run.look:
        return codes
    assert codes.max(initial=0) < 0x7F, "labels are printable ASCII"
    return np.where(codes == ord("\n"), codes, codes + CellAtlas.INVERSE)


def join_runs(blocks: Iterable[Block]) -> Text:
    """The runs of all blocks in one string."""
    runs = tuple(run for block in blocks for run in block.runs if run.text)
    keys = [_keys(run) for run in runs]
    starts = np.cumsum([0, *map(len, keys)], dtype=np.int64)
    return Text("".join(run.text for run in runs), np.concatenate([np.empty(0, dtype=np.int64), *keys]), starts, runs)


def _expand(keys: NDArray[np.int64], atlas: CellAtlas) -> tuple[Ints, Ints]:
    """Cells of all characters, and the character of every cell; the end mark last."""
    cells = atlas.lookup(keys)
    counts = np.ones(len(keys), dtype=np.int32)
    several = cells < 0
    if several.any():
        sequences = atlas.sequences()
        counts[several] = sequences.lengths[-2 - cells[several]]
    glyphs = np.repeat(cells, counts)
    parts = np.flatnonzero(glyphs < 0)
    if len(parts):
        within = parts - np.repeat(np.cumsum(counts) - counts, counts)[parts]
        glyphs[parts] = sequences.glyphs[sequences.starts[-2 - glyphs[parts]] + within]
    sources = np.repeat(np.arange(len(keys), dtype=np.int32), counts)
    return np.append(glyphs, np.int32(atlas.mark(symbols.TEXT_END))), np.append(sources, np.int32(len(keys)))


def _fill_before_wide(glyphs: Ints, breaks: NDArray[np.bool_], columns: int, atlas: CellAtlas) -> NDArray[np.int64]:
    """Where fillers go, so that no wide character is cut by the end of a row: indices into the cells, for np.insert."""
    wide = atlas.wide_starts(glyphs)
    if not wide.any():
        return np.empty(0, dtype=np.int64)
    ends = np.flatnonzero(breaks)
    fillers, row = [], 0  # row: the cell that begins the row
    while row + columns < len(glyphs):
        stop = np.searchsorted(ends, row)
        last = row + columns - 1
        if stop < len(ends) and ends[stop] <= last:
            row = int(ends[stop]) + 1
        elif wide[last]:
            fillers.append(last)
            row = last
        else:
            row = last + 1
    return np.array(fillers, dtype=np.int64)


def flow(keys: NDArray[np.int64], columns: int, atlas: CellAtlas, *, break_rows: bool) -> Flow:
    """Lays characters out in rows of `columns` cells; line ends break the row where `break_rows` says so."""
    glyphs, sources = _expand(keys, atlas)
    breaks = glyphs == atlas.mark(symbols.LINE_END) if break_rows else np.zeros(len(glyphs), dtype=np.bool_)
    fillers = _fill_before_wide(glyphs, breaks, columns, atlas)
    glyphs = np.insert(glyphs, fillers, atlas.mark(symbols.FILL))
    sources = np.insert(sources, fillers, -1)
    breaks = np.insert(breaks, fillers, False)
    paragraph = np.cumsum(breaks) - breaks  # which paragraph each cell is in
    length = np.bincount(paragraph)
    within = np.arange(len(glyphs)) - np.repeat(np.cumsum(length) - length, length)
    rows_of = -(-length // columns)
    rows = np.repeat(np.cumsum(rows_of) - rows_of, length) + within // columns
    return Flow(glyphs, sources, rows.astype(np.int32), (within % columns).astype(np.int32))


def spans_of(text: Text, start: int, end: int) -> tuple[Span, ...]:
    """Where text[start:end] came from."""
    return trace(text.runs, text.starts, start, end)


def _begun(cells: Flow, length: int) -> NDArray[np.int64]:
    """For every cell, and one past the last, how many characters begin before it.  A character belongs where it begins."""
    first = (cells.sources >= 0) & (np.diff(cells.sources, prepend=-1) != 0)
    begun: NDArray[np.int64] = np.minimum(np.append(0, np.cumsum(first)), length)
    return begun


def _lines(text: Text, cells: Flow, begun: NDArray[np.int64], page: slice, atlas: CellAtlas, first_row: int) -> Iterator[Line]:
    """The rows of one page, whose cells are `page`."""
    height, width = atlas.font.height, atlas.font.width
    rows = cells.rows[page]
    cuts = np.flatnonzero(np.diff(rows, prepend=-1, append=-1)) + page.start
    for begin, end in pairwise(cuts.tolist()):
        top = (int(cells.rows[begin]) - first_row) * height
        box = Box(0, top, (int(cells.columns[end - 1]) + 1) * width, top + height)
        start, stop = int(begun[begin]), int(begun[end])
        yield Line(text.text[start:stop], box, spans_of(text, start, stop))


def _missing(shown: NDArray[np.int64], atlas: CellAtlas) -> tuple[str, ...]:
    return tuple(chr(code) for code in np.unique(shown).tolist() if code in atlas.missing)


def paginate_cells(blocks: Iterable[Block], style: str, height: int, width: int, atlas: CellAtlas) -> list[Page]:
    """Pages of fixed cells from blocks, style "dense" or "packed"."""
    text = join_runs(blocks)
    columns, rows = width // atlas.font.width, height // atlas.font.height
    assert columns > 1, "a row holds at least one wide character"
    assert rows > 0, "a page holds at least one row"
    cells = flow(text.keys, columns, atlas, break_rows=style == "dense")
    begun = _begun(cells, len(text.text))
    size = np.array([atlas.font.height, atlas.font.width], dtype=np.int32)
    first_rows = np.arange(0, cells.rows[-1] + 1, rows, dtype=np.int32)
    cuts = [*np.searchsorted(cells.rows, first_rows).tolist(), len(cells.rows)]
    pages = []
    for index, first_row in enumerate(first_rows.tolist()):
        page = slice(cuts[index], cuts[index + 1])
        start, stop = begun[[page.start, page.stop]].tolist()
        places = np.stack([cells.rows[page] - first_row, cells.columns[page]], axis=1) * size
        pages.append(
            Page(
                style=style,
                index=index,
                height=height,
                width=width,
                lines=tuple(_lines(text, cells, begun, page, atlas, first_row)),
                missing=_missing(text.keys[start:stop], atlas),
                store=atlas.store,
                placements=np.concatenate([cells.glyphs[page, None], places], axis=1),
                sources=np.maximum(cells.sources[page] - start, -1),
            )
        )
    return pages
