"""What a page keeps as it gets smaller, beside means of its tokens; and a needle at every depth of a stack of pages."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import product
from random import Random
from typing import Any

from optmem.bench.answers import Line, Rate, Shape, choose, rate_of
from optmem.bench.histories import History, secret
from optmem.bench.kept import ENCODINGS, LOWER, SIDE, Encoding, Pages
from optmem.engine import Engine, VisionTokens
from optmem.pages import paginate, read_symbols
from optmem.pixels import find_mode, to_mode
from optmem.train.scores import interval, likeness

DEPTHS = (0.0, 0.25, 0.5, 0.75, 1.0)
ROWS = 32  # of a page
LEAST = 0.5  # of a glance: what is less likely is not there


@dataclass(frozen=True, slots=True)
class Faded:
    """One class of text at one encoding."""

    filler: str
    encoding: str
    fed_tokens: int  # a page
    pages: int
    lines: Rate  # rows without an error
    likeness: float  # 1 - edit distance / length, mean over pages
    low: float  # its 95 % interval over pages
    high: float

    def to_json(self) -> dict[str, Any]:
        """As it is published."""
        names = ("filler", "encoding", "fed_tokens", "pages", "likeness", "low", "high")
        return {name: getattr(self, name) for name in names} | {"lines": self.lines.to_json()}


def fade(histories: Sequence[Pages], count: int, encodings: Sequence[Encoding] = ENCODINGS) -> list[Faded]:
    """Whole pages of histories of one class, so many of each, read at every encoding."""
    chosen = [(pages, number) for pages in histories for number in spread(len(pages.drawn), count)]
    return [_faded(chosen, encoding) for encoding in encodings]


def spread(count: int, wanted: int) -> list[int]:
    """Some pages of all, evenly; the last, which is not full, only where there is no other."""
    full = max(count - 1, 1)
    return sorted({full * number // min(wanted, full) for number in range(min(wanted, full))})


def _faded(chosen: Sequence[tuple[Pages, int]], encoding: Encoding) -> Faded:
    likenesses: list[float] = []
    right: list[bool] = []
    for pages, number in chosen:
        true = [line.text for line in pages.drawn[number].lines]
        pages.read(encoding, [(number, row) for row in range(len(true))])
        said = [pages.row(encoding, number, row).text for row in range(len(true))]
        right += [one == other for one, other in zip(said, true, strict=True)]
        likenesses.append(likeness("".join(said), "".join(true)))
    mean = interval(likenesses, [1] * len(likenesses), [0])
    filler = chosen[0][0].history.filler
    return Faded(filler, encoding.name, encoding.fed_tokens, len(chosen), rate_of(right), *(value or 0.0 for value in mean))


# --- a needle in a stack --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Cell:
    """Of the grid: needles at one depth of stacks of one height, at one tier."""

    pages: int
    side: int
    depth: float
    found: Rate  # a glance over all pages puts the name on its page and row
    right: Rate  # and the row that it points to is read as it stands there

    def to_json(self) -> dict[str, Any]:
        """As it is published."""
        return {
            "pages": self.pages,
            "side": self.side,
            "depth": self.depth,
            "found": self.found.to_json(),
            "right": self.right.to_json(),
        }


@dataclass(frozen=True, slots=True)
class Stack:
    """Pages of filler, and what is put on one of them."""

    rows: list[list[str]]  # of every page

    def with_needle(self, chance: Random, count: int, depth: float) -> tuple[int, int, str, str, str]:
        """Page, row, text of the page, name and value of a needle at this depth of the first `count` pages."""
        name = "".join(chance.choice("bdfgklmnprstvz") + chance.choice("aeiou") for _ in range(4))
        value = secret(chance, "hash")
        page, row = divmod(round(depth * (count * ROWS - 1)), ROWS)
        rows = list(self.rows[page])
        rows[row] = f"The passkey of {name} is {value}."
        return page, row, "".join(f"{text}\n" for text in rows), name, value


def make_stack(history: History, pages: int) -> Stack:
    """Pages that are full of the filler of a history, again from its beginning where it is too short."""
    lines = [line for lines in history.messages for line in lines if len(line) < SIDE // 8]
    return Stack([[lines[(page * ROWS + row) % len(lines)] for row in range(ROWS)] for page in range(pages)])


def grid(engine: Engine, stack: Stack, heights: Sequence[int], depths: Sequence[float], trials: int, seed: int) -> Iterator[Cell]:
    """Depth by pages by tier."""
    for side in (SIDE, *LOWER):
        tokens = _encoded(engine, ["".join(f"{text}\n" for text in rows) for rows in stack.rows], side)
        for height, depth in product(heights, depths):
            chance = Random(f"optmem grid {height} {depth} {seed}")  # noqa: S311
            tries = [stack.with_needle(chance, height, depth) for _ in range(trials)]
            shown = _encoded(engine, [text for _, _, text, _, _ in tries], side)
            results = [_try(engine, tokens[:height], needle, each) for needle, each in zip(tries, shown, strict=True)]
            yield Cell(height, side, depth, rate_of(hit for hit, _ in results), rate_of(right for _, right in results))


def _encoded(engine: Engine, texts: Sequence[str], side: int) -> list[VisionTokens]:
    mode = find_mode(f"square {side}")
    return engine.encode([to_mode(paginate(text, size=SIDE)[0].image(), mode) for text in texts], mode)


def _try(
    engine: Engine, tokens: Sequence[VisionTokens], needle: tuple[int, int, str, str, str], shown: VisionTokens
) -> tuple[bool, bool]:
    """Whether the glance finds the row, and whether the passkey is read right where it points."""
    page, row, _, name, value = needle
    stack = [*tokens[:page], shown, *tokens[page + 1 :]]
    hits = engine.search(stack, name, limit=1, least=LEAST)
    if not hits:
        return False, False
    (done,) = engine.decode([stack[hits[0].page]], rows=[hits[0].row])
    text = read_symbols("".join(done.row_symbols)).rstrip("\n")
    given = choose([Line(text, 0)], (name,), Shape.LAST)
    return (hits[0].page, hits[0].row) == (page, row), given.answer == value
