"""Nano reads by rows: a compressed page is random-access.

    <bos>, vision rows each with a newline, separator | <row_17> c0 c1 .. <eol> <row_18>     a row, and what comes after it
    <bos>, vision rows each with a newline, separator | <row_99> <end>                       a row below the text

The prefix is one for all rows, so a page is all its rows in parallel over one cache (engine/rows.py): nothing about the page's
layout is told.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from optmem.model.assembly import assemble
from optmem.model.decoder import Decoder
from optmem.model.encoder import Encoder
from optmem.pages.symbols import LINE_END, TEXT_END
from optmem.pixels import NO_TILES, Mode
from optmem.text.characters import BOS, CharacterTokenizer

NARROWEST = 4  # pixels of a character: no reader tells narrower ones apart
MAX_ROW = 256  # symbols of a row: a page of 1024 px has 204 in the narrowest cells


@dataclass(slots=True)
class Row:
    """What the decoder said of one row."""

    number: int
    ids: list[int] = field(default_factory=list)  # symbols alone
    logprobs: list[float] = field(default_factory=list)  # of the symbols, and of what ended the row
    ended_by: str = "length"  # "eol", "end", or "length"
    probabilities: list[float] = field(default_factory=list)  # of the same at the temperature of confidence
    passes: int = field(default=0, compare=False)  # through the decoder; how it was read, not what
    accepted: int = field(default=0, compare=False)  # tokens that its draft had right,
    refused: int = field(default=0, compare=False)  # and those that were proposed in vain

    @property
    def is_below(self) -> bool:
        """Whether the text was over before this row.  An end said behind symbols ends the row alone: no text ends there."""
        return self.ended_by == "end" and not self.ids


def embed_prefix(encoder: Encoder, decoder: Decoder, features: Tensor, mode: Mode, tokenizer: CharacterTokenizer) -> Tensor:
    """What all rows of a page share, [1 + mode.fed_tokens(), hidden], from its features [mode.paper_tokens(), hidden]."""
    begin = decoder.embed(torch.tensor([tokenizer.special(BOS)], device=features.device))
    picture = assemble(features, mode, NO_TILES, encoder.image_newline, encoder.view_seperator)
    return torch.cat([begin, picture.to(begin.dtype)])


def until_end(rows: list[Row], tokenizer: CharacterTokenizer) -> list[Row]:
    """Rows up to the mark that ends the text, unless two behind it say something: one may be misread, and so may the mark."""
    said = [tokenizer.symbols(row.ids) for row in rows]
    last = next((at for at, row in enumerate(said) if row.endswith(TEXT_END)), len(said))
    return rows if sum(map(_says_something, said[last + 1 :])) > 1 else rows[: last + 1]


def _says_something(row: str) -> bool:
    """A row below the text may say blanks and a stray sign instead of `<end>`; an empty line says its end."""
    return LINE_END in row or len(row.replace(" ", "")) > 2


def count_rows(are_below: Sequence[bool]) -> int:
    """How many rows of a page its text reaches, from what each row says of itself.

    They may contradict each other: a row inside the text that says it is below, one below that says something.  The end is put
    where the fewest do, so that one misread row takes no others with it.
    """
    below = np.cumsum([0, *are_below])
    contradicting = below + (len(are_below) - np.arange(len(below))) - (below[-1] - below)  # where the text has so many rows
    return int(contradicting.argmin())


def longest_row(side: int) -> int:
    """Symbols that a row of a page of so many pixels can have: a bound on work, not a hint."""
    return min(MAX_ROW, side // NARROWEST)


def join_rows(rows: Iterable[Row], tokenizer: CharacterTokenizer) -> str:
    """The text of rows in order."""
    return tokenizer.text([token for row in rows for token in row.ids])
