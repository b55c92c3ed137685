"""Nano's pages as requests: all rows of a page behind one prefix, a block at a time.

    <bos>, vision rows each with a newline, separator | <row_17> c0 c1 .. <eol> <row_18>     a row, and what comes after it
    <bos>, vision rows each with a newline, separator | <row_99> <end>                       a row below the text

Rows are asked for a block at a time, until the last of a block answers `<end>`; which are asked never depends on a draft.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from optmem.engine.draft import CellDraft, Draft, Lookup
from optmem.engine.loop import Loop
from optmem.engine.options import Options
from optmem.engine.reading import LOWEST, complete, saw
from optmem.engine.requests import Answer, Request
from optmem.engine.result import Completion, Glanced
from optmem.engine.runner import Runner
from optmem.engine.sampling import GREEDY, Sampling
from optmem.engine.scheduler import Limits, Scheduler
from optmem.engine.search import Words
from optmem.engine.speech import Prefix, Speech
from optmem.engine.vision_tokens import VisionTokens
from optmem.errors import CheckpointError, InputError
from optmem.model.cache import Cache
from optmem.model.decoder import Decoder
from optmem.model.glance import Glimpse
from optmem.model.model import Model
from optmem.model.nano import MAX_ROW, Row, count_rows, embed_prefix, longest_row, until_end
from optmem.ops import PAGE_UNIT
from optmem.text.characters import END, EOL, CharacterTokenizer

ROW_SEED = 1 << 40  # between the seeds of two rows
SURE = 0.9  # of the size of a page's cells: pages that are read have .99
SEEN = 0.9  # symbols that a glance expects in a row of which the decoder says that it is below the text
BLOCK = 33  # rows that a whole page is asked for at once: those of the default form, and the one below them


@dataclass(frozen=True, slots=True)
class PageRows:
    """What is asked of one page."""

    prefix: Tensor  # [P, hidden], as embed_prefix makes it
    rows: Sequence[int] | None = None  # None is the whole page: from row 0 to the end of its text
    draft: Callable[[int], Draft] | None = None  # of a row by its number
    max_symbols: int = MAX_ROW  # of a row, which has one token more: its end, or a symbol too many (`ended_by` is "length")
    seen: Glimpse | None = None  # where given, a row that says it is below the text and is seen to hold some is asked again


@dataclass(frozen=True, slots=True)
class _Ask:
    """A row by its number; the second time with the symbol that it begins with, and how sure the glance is of that row."""

    number: int
    first: int | None = None
    chance: float = 1.0


class RowsRequest(Request):
    """Rows of one page, or all of them down to the end of the text."""

    def __init__(
        self,
        asked: PageRows,
        decoder: Decoder,
        tokenizer: CharacterTokenizer,
        sampling: Sampling = GREEDY,
        deadline: float | None = None,
    ) -> None:
        """Raises InputError for a row that the vocabulary has no name for."""
        super().__init__(deadline=deadline)
        self.asked, self.decoder, self.tokenizer, self.sampling = asked, decoder, tokenizer, sampling
        self.prefix = Prefix(asked.prefix)
        self.asks: list[_Ask] = []  # one for each of the speeches
        self.stops = (tokenizer.special(EOL), tokenizer.special(END))
        _check(asked, len(tokenizer.rows))

    def begin(self) -> Sequence[Speech]:
        """The rows that are asked for, or the first block."""
        return self._rows(range(min(BLOCK, len(self.tokenizer.rows))) if self.asked.rows is None else self.asked.rows)

    def follow(self) -> Sequence[Speech]:
        """Rows that are asked again; then the next block of a whole page, if the last row of this one is still text."""
        if again := self._doubted():
            return self._speeches(again)
        rows = self._said()
        if self.asked.rows is not None or rows[-1].is_below:
            return ()
        first = len(rows)
        return self._rows(range(first, min(first + BLOCK, len(self.tokenizer.rows))))

    def _doubted(self) -> list[_Ask]:
        """Rows that said at once that the text is over, where the glance sees text.  Once each."""
        if self.asked.seen is None:
            return []
        twice = {ask.number for ask in self.asks if ask.first is not None}
        below = [ask.number for ask, speech in zip(self.asks, self.speeches, strict=True) if speech.ids == [self.stops[1]]]
        seen = (_first_seen(self.asked.seen, number, self.tokenizer) for number in below if number not in twice)
        return [ask for ask in seen if ask is not None]

    def _rows(self, numbers: Sequence[int]) -> list[Speech]:
        return self._speeches([_Ask(number) for number in numbers])

    def _speeches(self, asks: Sequence[_Ask]) -> list[Speech]:
        self.asks += asks
        known = [[self.tokenizer.rows[ask.number], *(() if ask.first is None else (ask.first,))] for ask in asks]
        ids = torch.tensor([token for tokens in known for token in tokens], dtype=torch.int64, device=self.asked.prefix.device)
        owns = self.decoder.embed(ids).split_with_sizes([len(tokens) for tokens in known])  # all in one call: a page has 32 rows
        return [self._speech(ask, own) for ask, own in zip(asks, owns, strict=True)]

    def _speech(self, ask: _Ask, own: Tensor) -> Speech:
        sampling = self.sampling
        if sampling.temperature > 0:
            sampling = replace(sampling, seed=sampling.seed + ask.number * ROW_SEED)  # rows do not draw alike
        draft = None if self.asked.draft is None or ask.first is not None else self.asked.draft(ask.number)
        most = max(self.asked.max_symbols + 2 - own.shape[0], 1)
        return Speech(self.prefix, own, most, self.stops, sampling, draft)

    def _said(self) -> list[Row]:
        """The rows in the order in which they were asked for, each as it was said last."""
        said = [(ask, _row(ask, speech, self.stops[1])) for ask, speech in zip(self.asks, self.speeches, strict=True)]
        again = {ask.number: row for ask, row in said if ask.first is not None and not self._is_nothing(row)}
        return [again.get(ask.number, row) for ask, row in said if ask.first is None]

    def _is_nothing(self, row: Row) -> bool:
        """Whether a row that was asked again says a second time that the text is over."""
        return row.ended_by == "end" and not self.tokenizer.symbols(row.ids).strip(" ")

    def found(self) -> list[Row]:
        """The rows that were asked for; of a whole page up to the one below its text."""
        rows = self._said()
        if self.asked.rows is not None:
            return rows
        return until_end(rows[: count_rows([row.is_below for row in rows]) + 1], self.tokenizer)


def _first_seen(seen: Glimpse, number: int, tokenizer: CharacterTokenizer) -> _Ask | None:
    """A row asked behind its first symbol, if the glance sees anything but blanks in it.

    A row that begins with blanks looks like one below the text, to the decoder too: what stands far to the right says which it is.
    """
    if number >= len(seen.ids):
        return None
    (blank,) = tokenizer.encode(" ")
    cells, chances = seen.ids[number], seen.probabilities[number]
    is_drawn = (cells >= tokenizer.first_symbol) & (cells != blank)
    chance = float((chances * is_drawn).sum())
    if chance < SEEN:
        return None
    first = int(cells[0])
    return _Ask(number, first if first >= tokenizer.first_symbol else blank, min(chance, float(chances[is_drawn].max())))


def _row(ask: _Ask, speech: Speech, end: int) -> Row:
    ended_by = "length"
    if speech.is_ended:
        ended_by = "end" if speech.ids[-1] == end else "eol"
    ids = speech.ids[:-1] if speech.is_ended else speech.ids
    counts = (speech.passes, speech.accepted, speech.refused)
    if ask.first is None:
        return Row(ask.number, ids, speech.logprobs, ended_by, speech.probabilities, *counts)
    logprobs, probabilities = [math.log(ask.chance), *speech.logprobs], [ask.chance, *speech.probabilities]
    return Row(ask.number, [ask.first, *ids], logprobs, ended_by, probabilities, *counts)


def _check(page: PageRows, names: int) -> None:
    outside = [row for row in page.rows or () if not 0 <= row < names]
    if outside:
        raise InputError(f"rows are 0 to {names - 1}, got {outside[0]}")
    if page.max_symbols < 0:
        raise InputError(f"max_symbols must be 0 or more, got {page.max_symbols}")


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


# --- for the engine -----------------------------------------------------------------------------------------------------------


class PageRequest(RowsRequest, Answer):
    """Rows of one page of vision tokens, and what was read of them."""

    def __init__(self, page: VisionTokens, asked: PageRows, reader: RowsReader, options: Options) -> None:
        super().__init__(asked, reader.model.decoder, reader.tokenizer, options.sampling, options.deadline)
        self.page, self.most = page, options.max_tokens

    def completion(self) -> Completion:
        """What was read."""
        side, most = self.page.mode.size, self.most
        done = complete(self.found(), self.tokenizer, vision_tokens=self.prefix.length, side=side, most=most)
        return replace(done, finish_reason="cancelled") if self.is_late else done


class RowsReader:
    """Makes requests of nano."""

    def __init__(self, model: Model) -> None:
        """Raises CheckpointError where the model came without its characters."""
        if not isinstance(model.tokenizer, CharacterTokenizer) or model.glance is None:
            raise CheckpointError("a nano model needs characters.json beside its weights, and this one came without")
        self.model, self.tokenizer, self.head = model, model.tokenizer, model.glance

    def check(self, options: Options) -> None:
        """Raises InputError for what nano has no words for."""
        if options.prompts != (None,) or options.stops:
            what = "a stop" if options.stops else "a prompt"
            raise InputError(f"nano reads rows and takes no {what[2:]}: {what} is for the public models")
        outside = [row for row in options.rows or () if row >= len(self.tokenizer.rows)]
        if outside:
            raise InputError(f"rows are whole numbers from 0 to {len(self.tokenizer.rows) - 1}, got {outside[0]}")

    def requests(
        self,
        pages: Sequence[VisionTokens],
        options: Options,
        *,
        tell: Callable[[str], None] | None = None,  # noqa: ARG002 - rows are read together: nothing to tell before the end
    ) -> list[PageRequest]:
        """One request for a page."""
        page = self._one(pages)
        self._check_rows(page, options.rows)
        return [PageRequest(page, self._asked(page, options), self, options)]

    @torch.inference_mode()
    def _asked(self, page: VisionTokens, options: Options) -> PageRows:
        prefix = embed_prefix(self.model.encoder, self.model.decoder, page.features, page.mode, self.tokenizer)
        most = min(longest_row(page.mode.size), MAX_ROW if options.max_tokens is None else options.max_tokens)
        seen, own = self.head.read(page.features), options.draft
        if own in ("auto", "glance"):
            return replace(draft_page(prefix, seen, self.tokenizer, options.rows, most), seen=seen)
        draft = None if own is None else lambda _: Lookup() if isinstance(own, str) else own
        return PageRows(prefix, options.rows, draft, most, seen)

    def _check_rows(self, page: VisionTokens, rows: Sequence[int] | None) -> None:
        """Raises InputError for rows that the page has no room for, by the cells that the glance is sure of, or by the least."""
        if not rows:
            return
        seen = self.head.read(page.features, rows=range(0))
        height = seen.cell[0] if seen.confidence > SURE else LOWEST
        last = page.mode.size // height - 1
        outside = [row for row in rows if row > last]
        if outside:
            cells = f"{page.mode.size} pixels in cells of {height}" if height == seen.cell[0] else f"{page.mode.size} pixels"
            raise InputError(f"a page of {cells} has the rows 0 to {last}, got {outside[0]}")

    def _one(self, pages: Sequence[VisionTokens]) -> VisionTokens:
        """The page.  Raises InputError for several, and for one of several views."""
        if len(pages) > 1:
            raise InputError("pages that are read together are for the public models; nano reads a list of single pages")
        if pages[0].tiles:
            raise InputError(f"nano reads pages of one view, got mode {pages[0].mode.name} with {pages[0].tiles} tiles")
        return pages[0]

    def glance(self, pages: Sequence[VisionTokens], rows: Sequence[int] | None, temperature: float) -> Glanced:
        """What a glance sees on a page."""
        page = self._one(pages)
        self._check_rows(page, rows)
        return saw(self.head.read(page.features, temperature=temperature), self.tokenizer, rows)

    def fits(self, pages: Sequence[VisionTokens], words: Words, temperature: float) -> Tensor:
        """How well words fit at each cell of a page: [rows, columns]."""
        return words.find(self.head, self._one(pages).features, temperature=temperature)


# --- without an engine --------------------------------------------------------------------------------------------------------


def read_pages(
    decoder: Decoder,
    pages: Sequence[PageRows],
    tokenizer: CharacterTokenizer,
    *,
    temperature: float = 1.0,
    limits: Limits | None = None,
) -> list[list[Row]]:
    """Rows of many pages, greedily; a row is on CPU what it would be alone and without a draft, bit for bit.

    temperature   of Row.probabilities, not of the choice of tokens

    Of a whole page the result is its rows up to the one below its text (`count_rows`), or all that have a name: MAX_ROWS.
    Raises InputError for a row that the vocabulary has no name for, and where a page and a row exceed the decoder's positions.
    """
    if not temperature > 0:
        raise InputError(f"temperature must be above 0, got {temperature}")
    requests = [RowsRequest(page, decoder, tokenizer) for page in pages]
    if not requests:
        return []
    limits = limits or Limits()
    cache = Cache(decoder.config, _pages_for(pages, limits), dtype=decoder.dtype, device=decoder.lm_head.weight.device)
    scheduler = Scheduler(cache, decoder.config.vocab_size, decoder.config.max_positions, limits)
    loop = Loop(scheduler, Runner(decoder, cache, temperature=temperature))
    for request in requests:
        loop.submit(request)
    while loop.step():
        pass
    for request in requests:
        request.wait()
    return [request.found() for request in requests]


def _pages_for(pages: Sequence[PageRows], limits: Limits) -> int:
    """Room for as many rows as a pass takes, and the prefixes that they can be of."""
    shared = max(-(-page.prefix.shape[0] // PAGE_UNIT) for page in pages)
    own = max(_own_pages(page.prefix.shape[0], page.max_symbols) for page in pages)
    num_rows = max(min(limits.texts, sum(BLOCK if page.rows is None else len(page.rows) for page in pages)), 1)
    return min(len(pages), num_rows) * shared + num_rows * (own + 1)


def _own_pages(prefix: int, max_symbols: int) -> int:
    """Pages of the cache that a row alone holds: that in which the prefix ends is copied."""
    return -(-(prefix + max_symbols + 1) // PAGE_UNIT) - prefix // PAGE_UNIT
