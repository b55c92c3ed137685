"""What comes back from the engine."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Literal

from optmem.errors import InputError
from optmem.model.nano import Row
from optmem.pages import read_symbols
from optmem.text.parse import Box

FinishReason = Literal["stop", "length", "loop", "cancelled", "error"]


@dataclass(frozen=True, slots=True)
class Attempt:
    """One try at a page, and why there was another one."""

    mode: str
    reason: str  # "" for the last


@dataclass(frozen=True, slots=True)
class Completion:
    """What a decoder read from one page, or from rows of it."""

    text: str
    token_ids: tuple[int, ...]  # as the decoder said them, what ended each row included
    logprobs: tuple[float, ...]  # of each of them
    probabilities: tuple[float, ...]  # that each is right: calibrated where the checkpoint says how
    finish_reason: FinishReason
    prompt_tokens: int  # start, vision tokens as fed, and words or row names
    boxes: tuple[Box, ...] = ()  # where the model grounds, in pixels of the page
    attempts: tuple[Attempt, ...] = ()
    error: Exception | None = field(default=None, compare=False)  # of `ocr`, where this page could not be read
    rows: tuple[Row, ...] = field(default=(), repr=False)  # of nano: what was said of each row
    row_symbols: tuple[str, ...] = field(default=(), repr=False)  # of nano: the rows as drawn, marks and escapes not read yet

    @property
    def symbols(self) -> str:
        """Of nano: the text as it is drawn."""
        return "".join(self.row_symbols)

    @property
    def output_tokens(self) -> int:
        """How many tokens were said."""
        return len(self.token_ids)

    @property
    def confidence(self) -> float:
        """The share of tokens that is expected to be right; 1 where nothing was said."""
        return mean(self.probabilities)

    @property
    def accepted_length(self) -> float:
        """Of nano: tokens that a row said in one pass of the decoder, on average.  Without a draft it is 1."""
        return sum(len(row.logprobs) for row in self.rows) / max(sum(row.passes for row in self.rows), 1)


@dataclass(frozen=True, slots=True)
class Glanced:
    """What a glance saw on one page, or on rows of it: a guess for every cell, made in one pass."""

    text: str
    token_ids: tuple[int, ...]  # the symbols
    probabilities: tuple[float, ...]  # of each, calibrated where the checkpoint says how
    cell: tuple[int, int]  # height and width in pixels
    cell_confidence: float  # that the cells are this large
    rows: tuple[Row, ...] = field(default=(), repr=False)
    row_symbols: tuple[str, ...] = field(default=(), repr=False)

    @property
    def symbols(self) -> str:
        """The text as it is drawn."""
        return "".join(self.row_symbols)

    @property
    def confidence(self) -> float:
        """The share of symbols that is expected to be right."""
        return mean(self.probabilities)


def failed(error: Exception, attempts: tuple[Attempt, ...] = ()) -> Completion:
    """What `ocr` says of a picture that could not be read."""
    return Completion("", (), (), (), "error", 0, attempts=attempts, error=error)


def mean(values: tuple[float, ...]) -> float:
    """1 where there are none."""
    return sum(values) / len(values) if values else 1.0


def document_text(pages: Iterable[Completion | Glanced]) -> str:
    """The text of consecutive pages of one document.

    Not always the texts of the pages joined: an escape (U+6F22) or a label may begin on one page and end on the next.
    Raises InputError for what is no list of pages, one page alone included.
    """
    if not isinstance(pages, Iterable):
        raise InputError(
            f"document_text takes the pages of a document in order, as decode gives them, got one {type(pages).__name__}"
        )
    return read_symbols("".join(_symbols(page) for page in pages))


def _symbols(page: object) -> str:
    if not isinstance(page, Completion | Glanced):
        raise InputError(f"document_text takes pages as decode or glance gives them, got {type(page).__name__}")
    return page.symbols
