"""What else the same tokens could hold: the newest text, text that is looked up, smaller pictures, means of tokens.

What keeps pictures here knows on which rows the lines that are asked for stand, as a lexical index would say it; what is read there
is the model's own.
"""

from __future__ import annotations

import math
import sqlite3
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from time import perf_counter
from typing import Protocol

import torch

from optmem.bench.answers import Line, Sure
from optmem.bench.histories import History, Question
from optmem.engine import Completion, Engine, VisionTokens
from optmem.errors import InputError
from optmem.memory.words import phrase, words
from optmem.pages import Page, paginate, read_symbols
from optmem.pixels import find_mode, to_mode
from optmem.text.count import estimate_tokens

SIDE = 512  # pixels of a page
LOWER = (384, 256)  # at which it is shown smaller


class Method(Protocol):
    """A way to keep a history within a budget."""

    def lines(self, question: Question) -> list[Line]:
        """Those that are kept and may answer."""


def told(history: History) -> list[tuple[str, int]]:
    """Its lines with the number of their message, oldest first."""
    return [(line, number) for number, lines in enumerate(history.messages) for line in lines]


def tokens_of(line: str) -> int:
    """As text, its end included."""
    return estimate_tokens(line + "\n")


class Truncation:
    """The newest lines that fit."""

    def __init__(self, history: History, budget: int) -> None:
        self.kept: list[Line] = []
        left = budget
        for line, number in reversed(told(history)):
            left -= tokens_of(line)
            if left < 0:
                break
            self.kept.append(Line(line, number))

    def lines(self, question: Question) -> list[Line]:
        """All of them."""
        del question
        return self.kept


class Retrieval:
    """All text on the disk, and for every question the lines that BM25 ranks first, as many as fit."""

    def __init__(self, history: History, budget: int) -> None:
        self.budget = budget
        self.told = told(history)
        self.index = sqlite3.connect(":memory:")
        self.index.execute("CREATE VIRTUAL TABLE lines USING fts5(line)")
        self.index.executemany("INSERT INTO lines(rowid, line) VALUES (?, ?)", [(k, line) for k, (line, _) in enumerate(self.told)])

    def lines(self, question: Question) -> list[Line]:
        """Those that fit, of equal rank the newest."""
        asked = " OR ".join(phrase(word) for word in words(question.query))
        found = self.index.execute("SELECT rowid FROM lines WHERE lines MATCH ? ORDER BY rank, rowid DESC LIMIT 256", (asked,))
        kept, left = [], self.budget
        for (at,) in found:
            line, number = self.told[at]
            left -= tokens_of(line)
            if left < 0:
                break
            kept.append(Line(line, number))
        return kept


# --- pictures -------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Encoding:
    """How a page is kept."""

    side: int = SIDE  # pixels at which it is shown to the encoder
    pooled: int = 0  # tokens a side to which those of the page are averaged; 0 is none

    @property
    def name(self) -> str:
        """For people."""
        return f"pooled to {self.pooled**2}" if self.pooled else f"shown at {self.side}"

    @property
    def fed_tokens(self) -> int:
        """What a page costs."""
        return find_mode(f"square {self.pooled * 64 or self.side}").fed_tokens()


ENCODINGS = (Encoding(), *(Encoding(side) for side in LOWER), *(Encoding(pooled=side // 64) for side in LOWER))


def pool(tokens: VisionTokens, side: int) -> VisionTokens:
    """Means over squares of a page's tokens: [n, hidden] -> [side * side, hidden], as a smaller picture has them.

    From 8 to 4 a side they are means of two by two; from 8 to 6 of the squares that overlap, as `adaptive_avg_pool2d` has it.
    """
    width = math.isqrt(len(tokens.features))
    assert width * width == len(tokens.features), "one square view"
    square = tokens.features.float().T.reshape(1, tokens.hidden, width, width)
    means = torch.nn.functional.adaptive_avg_pool2d(square, side).reshape(tokens.hidden, side * side).T
    return VisionTokens(means.to(tokens.features.dtype).contiguous(), find_mode(f"square {side * 64}"), tokens.grid, tokens.encoder)


@dataclass(slots=True)
class Timing:
    """Seconds and how often."""

    seconds: float = 0.0
    count: int = 0

    def add(self, seconds: float, count: int) -> None:
        """Some more."""
        self.seconds += seconds
        self.count += count

    @property
    def milliseconds(self) -> float:
        """Of one."""
        return 1000 * self.seconds / self.count if self.count else 0.0


@dataclass(frozen=True, slots=True)
class Row:
    """A row of a page as it was read."""

    text: str
    confidence: float


@dataclass
class Pages:
    """A history on pages, and what is read of them at every encoding: each row once."""

    history: History
    engine: Engine
    drawn: list[Page] = field(init=False)
    encoding: Timing = field(default_factory=Timing)
    reading: Timing = field(default_factory=Timing)
    refused: int = 0  # times that rows of a small page were said not to be there

    def __post_init__(self) -> None:
        self.drawn = paginate([{**message, "id": str(at)} for at, message in enumerate(self.history.chat())], size=SIDE)
        self._tokens: dict[Encoding, list[VisionTokens]] = {}
        self._rows: dict[tuple[Encoding, int], dict[int, Row]] = {}
        self._places = dict(self._placed())

    def _placed(self) -> Iterator[tuple[tuple[int, str], tuple[tuple[int, int], ...]]]:
        """Message and text of every line, and the page and the row of each of its rows."""
        said, places, number = "", [], -1
        for page in self.drawn:
            for row, line in enumerate(page.lines):
                number = next((int(span.source) for span in line.spans if span.source.isdecimal()), number)
                said += line.text
                places.append((page.index, row))
                if line.text.endswith("\n"):
                    yield (number, said.removesuffix("\n")), tuple(places)
                    said, places = "", []

    def places(self, question: Question) -> tuple[tuple[int, int], ...]:
        """The pages and rows on which the answer stands."""
        return self._places[question.message, question.line]

    def tokens(self, encoding: Encoding) -> list[VisionTokens]:
        """Of all pages."""
        if encoding not in self._tokens:
            if encoding.pooled:
                self._tokens[encoding] = [pool(tokens, encoding.pooled) for tokens in self.tokens(Encoding())]
            else:
                start = perf_counter()
                shown = [to_mode(page.image(), find_mode(f"square {encoding.side}")) for page in self.drawn]
                self._tokens[encoding] = self.engine.encode(shown, f"square {encoding.side}")
                self.encoding.add(perf_counter() - start, len(shown))
        return self._tokens[encoding]

    def read(self, encoding: Encoding, wanted: Iterable[tuple[int, int]]) -> None:
        """Reads these rows of pages, those of a page together."""
        by_page: dict[int, set[int]] = {}
        for page, row in wanted:
            if row not in self._rows.get((encoding, page), {}):
                by_page.setdefault(page, set()).add(row)
        for page, rows in by_page.items():
            start = perf_counter()
            done = self._decode(self.tokens(encoding)[page], sorted(rows))
            known = self._rows.setdefault((encoding, page), {row: Row("", 0.0) for row in rows})
            for row in rows:
                known.setdefault(row, Row("", 0.0))  # taken to be below the text
            for said, symbols in zip(done.rows, done.row_symbols, strict=False):
                chance = math.exp(sum(math.log(max(each, 1e-9)) for each in said.probabilities))
                known[said.number] = Row(read_symbols(symbols), chance)
            self.reading.add(perf_counter() - start, len(rows))

    def _decode(self, tokens: VisionTokens, rows: list[int]) -> Completion:
        """Where the engine takes a small page for one that has no such rows, all of it is read, as anyone would then."""
        try:
            (done,) = self.engine.decode([tokens], rows=rows)
        except InputError:
            self.refused += 1
            (done,) = self.engine.decode([tokens])
        return done

    def sure(self, encoding: Encoding) -> list[Sure]:
        """Every row that was read at an encoding, and how surely."""
        return [
            Sure(row.confidence, row.text == self.drawn[page].lines[number].text)
            for (found, page), rows in self._rows.items()
            if found == encoding
            for number, row in rows.items()
        ]

    def row(self, encoding: Encoding, page: int, row: int) -> Row:
        """As it was read."""
        return self._rows[encoding, page][row]


class KeptPages:
    """The newest pages that fit, all in one encoding."""

    def __init__(self, pages: Pages, encoding: Encoding, budget: int) -> None:
        self.pages, self.encoding = pages, encoding
        self.first = max(len(pages.drawn) - budget // encoding.fed_tokens, 0)

    def lines(self, question: Question) -> list[Line]:
        """The line that answers, where all of it is on pages that are kept."""
        places = self.pages.places(question)
        if places[0][0] < self.first:
            return []
        self.pages.read(self.encoding, places)
        rows = [self.pages.row(self.encoding, *place) for place in places]
        text = "".join(row.text for row in rows).rstrip("\n")
        return [Line(text, question.message, math.prod(row.confidence for row in rows))]


def read_ahead(pages: Pages, encoding: Encoding, questions: Sequence[Question]) -> None:
    """All rows that questions ask for, page by page: together they are read sooner than one by one."""
    pages.read(encoding, [place for question in questions if question.answer is not None for place in pages.places(question)])
