"""What `optmem demo` shows: text becoming pages, what the pages cost, and, with a checkpoint, what is read back from them."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from importlib.resources import files
from typing import Any

from optmem.config import Cell, Style
from optmem.engine import Completion, Engine, document_text
from optmem.inputs import Given
from optmem.pages import Page, Source, draw_pages, paginate
from optmem.pixels import MODES
from optmem.text.count import estimate_tokens
from optmem.train.scores import likeness, score_rows

LEGEND = (
    "vision tokens: one for each 64x64 pixels; fed: with the newlines and separators that the decoder gets as well\n"
    "text tokens: an estimate for a vocabulary of 200,000"
)
MOST_READ = 32  # pages of a source: the rest of a book is left to the commands made for it
FORMS: tuple[tuple[Style, Cell], ...] = (("dense", "8x16"), ("packed", "8x16"), ("packed", "8x8"))


def sample_chat() -> list[dict[str, object]]:
    """The conversation that the package carries: tool calls, a table, code, and scripts beyond Latin."""
    chat: list[dict[str, object]] = json.loads(files("optmem").joinpath("samples/chat.json").read_text(encoding="utf-8"))
    return chat


def sample() -> Given:
    """The same as a source."""
    return Given("chat", sample_chat(), "chat")


@dataclass(frozen=True, slots=True)
class Cost:
    """A source drawn in one form: how many pages, and how many vision tokens they are."""

    mode: str
    side: int
    style: Style
    cell: Cell
    pages: int
    vision_tokens: int  # as papers count them
    fed_tokens: int  # as the decoder gets them, with newlines and separators


@dataclass(frozen=True, slots=True)
class Drawn:
    """A source, its pages, and its cost in every form."""

    name: str
    characters: int
    text_tokens: int  # estimated
    pages: list[Page]  # to be looked at: the default form, and the form for people
    costs: list[Cost]

    def summary(self) -> dict[str, Any]:
        """The numbers as plain data."""
        return {
            "source": self.name,
            "characters": self.characters,
            "text_tokens_estimated": self.text_tokens,
            "forms": [asdict(cost) | {"ratio": round(self.text_tokens / cost.fed_tokens, 2)} for cost in self.costs],
            "page_ids": [page.id for page in self.pages],
        }

    def describe(self) -> str:
        """The numbers as a table for a terminal."""
        lines = [f"{self.name}: {self.characters:,} characters, about {self.text_tokens:,} text tokens"]
        lines.append("  mode   page       style   cells  pages  vision tokens    fed  text tokens for one fed")
        for cost in self.costs:
            page = f"{cost.side}x{cost.side}"
            form = f"{cost.mode:6} {page:10} {cost.style:7} {cost.cell:6} {cost.pages:5}"
            lines.append(f"  {form} {cost.vision_tokens:14,} {cost.fed_tokens:6,}  {self.text_tokens / cost.fed_tokens:.1f}")
        return "\n".join(lines)


def _costs(source: Source) -> Iterator[Cost]:
    for name, mode in MODES.items():
        if mode.is_tiled:
            continue  # tiled modes are for scans; a page we draw has one view
        for style, cell in FORMS:
            count = len(paginate(source, style=style, size=mode.size, cell=cell))
            yield Cost(name, mode.size, style, cell, count, count * mode.paper_tokens(), count * mode.fed_tokens())


def _draw(given: Given) -> Drawn:
    dense, packed = (paginate(given.source, style=style, name=given.name) for style in ("dense", "packed"))
    document = paginate(given.source, style="document", size=640, kind=given.kind, name=given.name)
    characters = sum(len(page.text()) for page in dense)
    return Drawn(given.name, characters, given.text_tokens(), [*dense, *packed, *document], list(_costs(given.source)))


def run_demo(given: Sequence[Given]) -> list[Drawn]:
    """The sample chat and everything given, drawn in every form."""
    return [_draw(each) for each in (sample(), *given)]


# --- reading back -------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class ReadBack:
    """Pages of a source, and what was read from their vision tokens alone."""

    name: str
    pages: list[Page]
    drawn: list[list[str]]  # of every page, the symbols that stand on each row
    read: list[Completion]
    left_out: int  # pages of the source that were not read
    text_tokens: int  # estimated, of the pages read
    fed_tokens: int
    encode_seconds: float
    decode_seconds: float

    @property
    def fidelity(self) -> float:
        """1 - edit distance / length of the longer text."""
        return likeness(document_text(self.read), "".join(page.text() for page in self.pages))

    @property
    def lines(self) -> tuple[int, int]:
        """Rows that were read without a mistake, and all rows."""
        scores = [score_rows(done.row_symbols, rows).lines for done, rows in zip(self.read, self.drawn, strict=True)]
        return sum(score.hits for score in scores), sum(score.of for score in scores)

    @property
    def confidence(self) -> float:
        """The share of characters that the reader itself expects to be right."""
        said = sum(done.output_tokens for done in self.read)
        return sum(done.confidence * done.output_tokens for done in self.read) / said if said else 1.0

    @property
    def accepted_length(self) -> float:
        """Tokens that a row said in one pass of the decoder."""
        rows = [row for done in self.read for row in done.rows]
        return sum(len(row.logprobs) for row in rows) / max(sum(row.passes for row in rows), 1)

    def summary(self) -> dict[str, Any]:
        """The numbers as plain data."""
        exact, lines = self.lines
        return {
            "source": self.name,
            "pages": len(self.pages),
            "pages_left_out": self.left_out,
            "text_tokens_estimated": self.text_tokens,
            "fed_tokens": self.fed_tokens,
            "ratio": round(self.text_tokens / self.fed_tokens, 2),
            "characters": sum(len(page.text()) for page in self.pages),
            "fidelity": _share(self.fidelity, 5),
            "exact_lines": exact,
            "lines": lines,
            "confidence": _share(self.confidence, 5),
            "accepted_length": round(self.accepted_length, 2),
            "encode_seconds": round(self.encode_seconds, 3),
            "decode_seconds": round(self.decode_seconds, 3),
        }

    def describe(self) -> str:
        """The numbers in two lines for a terminal."""
        found, pages = self.summary(), f"{len(self.pages)} page{'s' * (len(self.pages) != 1)}"
        first = f" (the first of {len(self.pages) + self.left_out})" if self.left_out else ""
        cost = f"{self.fed_tokens:,} tokens fed for about {self.text_tokens:,} of text ({found['ratio']}x)"
        seconds = f"encoded in {self.encode_seconds:.2f} s, read in {self.decode_seconds:.2f} s"
        lines = f"{found['exact_lines']} of {found['lines']} lines exact"
        return (
            f"  {self.name}: {pages}{first}, {cost}; {seconds}\n"
            f"    fidelity {_share(found['fidelity'], 4):.4f} over {found['characters']:,} characters, {lines}, "
            f"own confidence {_share(found['confidence'], 4):.4f}, {found['accepted_length']:.1f} tokens a pass"
        )


def _share(value: float, digits: int) -> float:
    """Rounded, but what is not all is not rounded to all."""
    return min(round(value, digits), 1 - 10.0**-digits) if value < 1 else value


def read_back(engine: Engine, given: Given) -> ReadBack:
    """A source through the whole sentence: text, pages, pixels, vision tokens, text.  The decoder is given nothing but tokens."""
    pages = paginate(given.source, kind=given.kind, name=given.name)
    kept = pages[:MOST_READ]
    images = draw_pages(kept)
    start = time.perf_counter()
    tokens = engine.encode(images)
    between = time.perf_counter()
    read = engine.decode(tokens)
    end = time.perf_counter()
    text_tokens = estimate_tokens("".join(page.text() for page in kept))
    fed = sum(page.fed_tokens for page in tokens)
    drawn = [page.symbol_rows() for page in kept]
    return ReadBack(given.name, kept, drawn, read, len(pages) - len(kept), text_tokens, fed, between - start, end - between)


def read_all(engine: Engine, given: Sequence[Given]) -> list[ReadBack]:
    """The sample chat and everything given."""
    return [read_back(engine, each) for each in (sample(), *given)]
