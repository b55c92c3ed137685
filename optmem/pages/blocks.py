"""What every source becomes: blocks of runs, each of which knows where in the source it came from."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Flag, auto
from typing import Literal


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


BlockKind = Literal["verbatim", "label", "heading", "paragraph", "item", "quote", "code", "table", "rule"]
Cell = tuple[Run, ...]
Align = Literal["left", "center", "right"]


@dataclass(frozen=True, slots=True)
class Block:
    """A stretch of a document that is laid out as one."""

    kind: BlockKind
    runs: tuple[Run, ...] = ()
    level: int = 0  # headings 1 to 6; items and quotes: how deep they are nested, outermost 1
    marker: str = ""  # items: the bullet or the number
    rows: tuple[tuple[Cell, ...], ...] = ()  # tables: cells row by row, the first row is the head
    aligns: tuple[Align, ...] = ()  # tables: one for every column
