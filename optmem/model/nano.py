"""Nano reads by rows: a compressed page is random-access.

    <bos>, vision rows each with a newline, separator | <row_17> c0 c1 .. <eol> <row_18>     a row, and what comes after it
    <bos>, vision rows each with a newline, separator | <row_99> <end>                       a row below the text

The prefix is one for all rows, so a page is all its rows in parallel over one cache: nothing about the page's layout is told.  Rows
are asked for a block at a time, until the last of a block answers `<end>`; which are asked never depends on a draft.

Rows of many pages share one cache and go through the decoder together, as many as ROWS_AT_ONCE: a step of 128 rows takes four times
as long as a step of one.  A glance of the page is a draft of its rows (draft.py).
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from optmem.errors import InputError
from optmem.model.assembly import assemble
from optmem.model.cache import Cache
from optmem.model.cache import Sequence as Written
from optmem.model.decoder import Decoder
from optmem.model.draft import Draft, Stream, advance
from optmem.model.encoder import Encoder
from optmem.model.glance import Glimpse
from optmem.ops import PAGE_UNIT
from optmem.pages.symbols import TEXT_END
from optmem.pixels import NO_TILES, Mode
from optmem.text.characters import BOS, END, EOL, CharacterTokenizer

NARROWEST = 4  # pixels of a character: no reader tells narrower ones apart
MAX_ROW = 256  # symbols of a row: a page of 1024 px has 204 in the narrowest cells
ROWS_AT_ONCE = 128  # in one pass: on two cores in bf16 136 us a row's token, against 240 with 33 rows and 4,150 with one
LIKELY = 0.5  # that a draft is right as far as it is proposed
BLOCK = 33  # rows that a whole page is asked for at once: those of the default form, and the one below them


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


@dataclass(frozen=True, slots=True)
class PageRows:
    """What is asked of one page."""

    prefix: Tensor  # [P, hidden], as embed_prefix makes it
    rows: Sequence[int] | None = None  # None is the whole page: from row 0 to the end of its text
    draft: Callable[[int], Draft] | None = None  # of a row by its number
    max_symbols: int = MAX_ROW  # of a row, which has one token more: its end, or a symbol too many (`ended_by` is "length")


def embed_prefix(encoder: Encoder, decoder: Decoder, features: Tensor, mode: Mode, tokenizer: CharacterTokenizer) -> Tensor:
    """What all rows of a page share, [1 + mode.fed_tokens(), hidden], from its features [mode.paper_tokens(), hidden]."""
    begin = decoder.embed(torch.tensor([tokenizer.special(BOS)], device=features.device))
    picture = assemble(features, mode, NO_TILES, encoder.image_newline, encoder.view_seperator)
    return torch.cat([begin, picture.to(begin.dtype)])


# --- the glance as a draft ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class CellDraft:
    """A row's cells: what follows a disagreement is proposed again from its own column on."""

    cells: Sequence[int]
    chances: Sequence[float] = ()  # that each is right; what has none is certain

    def propose(self, said: Sequence[int]) -> Sequence[int]:
        """The cells behind those that are said, up to the first with which they are more likely wrong than right."""
        end, chance = len(said), 1.0
        while end < len(self.cells) and chance >= LIKELY:
            chance *= self.chances[end] if end < len(self.chances) else 1.0
            end += 1
        return self.cells[len(said) : end]


def draft_page(
    prefix: Tensor,
    glimpse: Glimpse,
    tokenizer: CharacterTokenizer,
    rows: Sequence[int] | None = None,
    max_symbols: int = MAX_ROW,
) -> PageRows:
    """Rows of a page, or all of it, with the glance of the whole page as their draft."""
    end, eol = tokenizer.special(END), tokenizer.special(EOL)
    cells: list[list[int]] = glimpse.ids.tolist()
    chances: list[list[float]] = glimpse.probabilities.tolist()

    def draft(row: int) -> Draft:
        return CellDraft([*cells[row], eol], chances[row]) if row < len(cells) else CellDraft([end])

    return PageRows(prefix, rows, draft, max_symbols)


# --- reading ------------------------------------------------------------------------------------------------------------------


def read_rows(
    decoder: Decoder, prefix: Tensor, rows: Sequence[int], tokenizer: CharacterTokenizer, *, max_symbols: int = MAX_ROW
) -> list[Row]:
    """These rows of a page, greedily and all at once; on CPU each is what it would be alone, bit for bit.

    prefix   [P, hidden], as embed_prefix makes it

    Raises InputError for a row that the vocabulary has no name for.
    """
    return read_pages(decoder, [PageRows(prefix, rows, max_symbols=max_symbols)], tokenizer)[0]


@torch.inference_mode()
def read_pages(
    decoder: Decoder,
    pages: Sequence[PageRows],
    tokenizer: CharacterTokenizer,
    *,
    temperature: float = 1.0,
    rows_at_once: int = ROWS_AT_ONCE,
) -> list[list[Row]]:
    """Rows of many pages, greedily; a row is on CPU what it would be alone and without a draft, bit for bit.

    temperature    of Row.probabilities, not of the choice of tokens
    rows_at_once   memory is that of so many rows of the longest page, however many are asked for

    Of a whole page the result is its rows up to the one below its text (`count_rows`), or all that have a name: MAX_ROWS.
    Raises InputError for a row that the vocabulary has no name for, and where a page and a row exceed the decoder's positions.
    """
    if not pages:
        return []
    _check(decoder, pages, tokenizer, rows_at_once, temperature)
    asked = [_Page(page, tokenizer) for page in pages]
    cache = _cache_for(decoder, asked, rows_at_once)
    stops = (tokenizer.special(EOL), tokenizer.special(END))
    waiting, streams = deque(page for page in asked if page.waiting), list[Stream]()
    while waiting or streams:
        while waiting and len(streams) < rows_at_once:
            streams.append(waiting[0].begin(decoder, cache))
            if not waiting[0].waiting:
                waiting.popleft()
        advance(decoder, cache, streams, stops, temperature=temperature)
        streams = [stream for stream in streams if not stream.is_over]
        waiting.extendleft(page for page in asked if page.finish_block(stops[1]))  # first, so that few pages are open at once
    return [page.found(tokenizer) for page in asked]


class _Page:
    """One page while its rows are read."""

    def __init__(self, asked: PageRows, tokenizer: CharacterTokenizer) -> None:
        self.asked, self.names = asked, tokenizer.rows
        self.waiting = deque(range(min(BLOCK, len(self.names))) if asked.rows is None else asked.rows)
        self.at_once = len(self.waiting)
        self.shared: Written | None = None  # the prefix, while the page is open
        self.streams: list[tuple[int, Stream]] = []  # by row, in the order in which they were asked for

    def begin(self, decoder: Decoder, cache: Cache) -> Stream:
        """The next row, behind the prefix, which is written when the first row is asked for."""
        prefix = self.asked.prefix
        if self.shared is None:
            self.shared = cache.new_sequence(prompt=prefix.shape[0])
            decoder(prefix, cache.batch([self.shared], [prefix.shape[0]]), cache)
        row = self.waiting.popleft()
        draft = None if self.asked.draft is None else self.asked.draft(row)
        stream = Stream(self.shared.fork(), self.names[row], self.asked.max_symbols + 1, draft)
        self.streams.append((row, stream))
        return stream

    def finish_block(self, end: int) -> bool:
        """Where all rows asked for are read: whether there are more to ask for; if not, the prefix is given back."""
        if self.shared is None or self.waiting or not all(stream.is_over for _, stream in self.streams):
            return False
        if self.asked.rows is None and self.streams[-1][1].ids != [end]:
            first = len(self.streams)
            self.waiting.extend(range(first, min(first + BLOCK, len(self.names))))
        if not self.waiting:
            self.shared.close()
            self.shared = None
        return bool(self.waiting)

    def found(self, tokenizer: CharacterTokenizer) -> list[Row]:
        """The rows that were asked for; of a whole page up to the one below its text."""
        rows = [_row(number, stream, tokenizer) for number, stream in self.streams]
        if self.asked.rows is not None:
            return rows
        return _until_end(rows[: count_rows([row.is_below for row in rows]) + 1], tokenizer)


def _until_end(rows: list[Row], tokenizer: CharacterTokenizer) -> list[Row]:
    """Rows up to the mark that ends the text where only blanks are behind it: a row below may say those instead of `<end>`."""
    said = [tokenizer.symbols(row.ids) for row in rows]
    last = next((at for at, row in enumerate(said) if row.endswith(TEXT_END)), len(said))
    return rows if "".join(said[last + 1 :]).strip(" ") else rows[: last + 1]


def _row(number: int, stream: Stream, tokenizer: CharacterTokenizer) -> Row:
    ended_by = "length"
    if stream.is_ended:
        ended_by = "end" if stream.ids[-1] == tokenizer.special(END) else "eol"
    ids = stream.ids[:-1] if stream.is_ended else stream.ids
    return Row(number, ids, stream.logprobs, ended_by, stream.probabilities, stream.passes, stream.accepted, stream.refused)


def _check(
    decoder: Decoder, pages: Sequence[PageRows], tokenizer: CharacterTokenizer, rows_at_once: int, temperature: float
) -> None:
    if rows_at_once < 1 or not temperature > 0:
        raise InputError(f"rows_at_once must be 1 or more, temperature above 0, got {rows_at_once} and {temperature}")
    last, most = len(tokenizer.rows) - 1, decoder.config.max_positions
    for page in pages:
        outside = [row for row in page.rows or () if not 0 <= row <= last]
        if outside:
            raise InputError(f"rows are 0 to {last}, got {outside[0]}")
        if page.max_symbols < 0:
            raise InputError(f"max_symbols must be 0 or more, got {page.max_symbols}")
        if page.prefix.shape[0] + page.max_symbols + 1 > most:
            given = f"{page.prefix.shape[0]} and {page.max_symbols}"
            raise InputError(f"a page and max_symbols must be below {most} together, got {given}")


def _cache_for(decoder: Decoder, asked: Sequence[_Page], rows_at_once: int) -> Cache:
    """Room for so many rows, and the prefixes of the pages that they can be of: a page is opened when its first row begins."""
    pages = [page.asked for page in asked]
    shared = max(-(-page.prefix.shape[0] // PAGE_UNIT) for page in pages)
    own = max(_own_pages(page.prefix.shape[0], page.max_symbols) for page in pages)
    num_rows = max(min(rows_at_once, sum(page.at_once for page in asked)), 1)
    num_pages = min(len(asked), num_rows) * shared + num_rows * own
    return Cache(decoder.config, num_pages, dtype=decoder.dtype, device=decoder.lm_head.weight.device)


def _own_pages(prefix: int, max_symbols: int) -> int:
    """Pages of the cache that a row alone holds: that in which the prefix ends is copied."""
    return -(-(prefix + max_symbols + 1) // PAGE_UNIT) - prefix // PAGE_UNIT


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
