"""What every source becomes: blocks of runs, each of which knows where in the source it came from."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import Flag, auto
from typing import Literal

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True, slots=True)
class Span:
    """A stretch of a source: its id, and start and end counted in code points of its text."""

    source: str
    start: int
    end: int


class Look(Flag):
    """How a run is set, where the style can show it."""

    PLAIN = 0
    BOLD = auto()
    ITALIC = auto()
    CODE = auto()
    STRIKE = auto()
    LINK = auto()
    LABEL = auto()  # said by us, not by the source: roles, tool names


@dataclass(frozen=True, slots=True)
class Run:
    """Text of one look and one origin.  span is None where the text is ours; where lengths are equal, characters map one to one."""

    text: str
    span: Span | None = None
    look: Look = Look.PLAIN


def cut_run(run: Run, start: int, end: int) -> Run:
    """run.text[start:end].  Where characters do not map one to one, every part comes from the whole span."""
    span = run.span
    if span is not None and span.end - span.start == len(run.text):
        span = Span(span.source, span.start + start, span.start + end)
    return Run(run.text[start:end], span, run.look)


def trace(runs: Sequence[Run], starts: NDArray[np.int64], start: int, end: int) -> tuple[Span, ...]:
    """Where [start:end] of the joined runs came from; run i begins at starts[i]."""
    spans = []
    for i in range(int(np.searchsorted(starts, start, side="right")) - 1, len(runs)):
        at = int(starts[i])
        if at >= end:
            break
        span = cut_run(runs[i], max(start - at, 0), min(end - at, len(runs[i].text))).span
        if span is not None:
            spans.append(span)
    return tuple(spans)


BlockKind = Literal["verbatim", "label", "heading", "paragraph", "item", "quote", "code", "table", "rule"]
Cell = tuple[Run, ...]
Align = Literal["left", "center", "right"]
Container = Literal["item", "quote"]


@dataclass(frozen=True, slots=True)
class Block:
    """A stretch of a document that is laid out as one."""

    kind: BlockKind
    runs: tuple[Run, ...] = ()
    level: int = 0  # headings 1 to 6; items and quotes: how deep they are nested, outermost 1
    marker: str = ""  # the bullet or the number of the item that the block begins
    rows: tuple[tuple[Cell, ...], ...] = ()  # tables: cells row by row, the first row is the head
    aligns: tuple[Align, ...] = ()  # tables: one for every column
    nesting: tuple[Container, ...] = ()  # what it stands in, outermost first; an item stands in itself
