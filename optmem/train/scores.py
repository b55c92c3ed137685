"""How well a text was read: by characters, by lines, and by what no reader can guess.

likeness      1 - edit distance / length of the longer text, on the raw text: spaces, case and punctuation count
lines         rows of the page of which every symbol is right
digits        runs of digits that came back whole, neither cut nor lengthened, where the alignment of both texts puts them
identifiers   the same of hashes, paths, numbers, addresses and names with underscores

Intervals are over pages: a page's characters are not independent, pages are.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from optmem.pages import read_symbols
from optmem.train.distance import distance, keep

DRAWS = 2000  # of the bootstrap
_DIGITS = re.compile(r"[0-9]+")
_TOKEN = re.compile(r"[\w./\\:@%+#~=&?-]+")
_AROUND = ".:?&=#-+~%"  # what a sentence puts around an identifier
_TELLS = re.compile(r"[0-9_/\\@]")
_SHORTEST = 4


class Hits(NamedTuple):
    """How many of how many."""

    hits: int
    of: int


@dataclass(frozen=True, slots=True)
class PageScore:
    """One page, or some rows of it."""

    likeness: float
    lines: Hits
    digits: Hits
    identifiers: Hits


Span = tuple[int, int]


def likeness(a: str, b: str) -> float:
    """1 - edit distance / length of the longer text; 1 for two empty ones."""
    longer = max(len(a), len(b))
    return 1.0 - distance(a, b) / longer if longer else 1.0


def digit_runs(text: str) -> Iterator[Span]:
    """Where the runs of digits stand."""
    return (found.span() for found in _DIGITS.finditer(text))


def identifiers(text: str) -> Iterator[Span]:
    """Where hashes, paths, numbers, addresses and names with underscores stand: at least four characters without blanks."""
    for found in _TOKEN.finditer(text):
        token = found.group()
        start = found.start() + len(token) - len(token.lstrip(_AROUND))
        token = token.strip(_AROUND)
        if len(token) >= _SHORTEST and _TELLS.search(token):
            yield start, start + len(token)


def score_rows(said: Sequence[str], true: Sequence[str]) -> PageScore:
    """The symbols of rows as they were read, against those that stand there.  Rows said beyond the true ones are text too much."""
    exact = sum(row == said[number] for number, row in enumerate(true[: len(said)]))
    said_text, true_text = read_symbols("".join(said)), read_symbols("".join(true))
    places = keep(true_text, said_text)
    runs = _whole(places, digit_runs(true_text), set(digit_runs(said_text)))
    names = _whole(places, identifiers(true_text), set(identifiers(said_text)))
    return PageScore(likeness(said_text, true_text), Hits(exact, len(true)), runs, names)


def _whole(places: Sequence[int], true: Iterator[Span], said: set[Span]) -> Hits:
    """How many spans were kept in one piece and are spans of what was said too."""
    found = [_is_whole(places[start:end]) and (places[start], places[end - 1] + 1) in said for start, end in true]
    return Hits(sum(found), len(found))


def _is_whole(places: Sequence[int]) -> bool:
    return places[0] >= 0 and list(places) == list(range(places[0], places[0] + len(places)))


class Interval(NamedTuple):
    """A rate and its 95 % interval; None where there was nothing to count."""

    value: float | None
    low: float | None
    high: float | None


NOTHING_COUNTED = Interval(None, None, None)


def interval(hits: Sequence[float], of: Sequence[float], seed: Sequence[int]) -> Interval:
    """The sum of hits over the sum of `of`, and percentiles of the same over pages drawn again with replacement.

    Where all pages are alike, as when all are perfect, the interval has no width: it cannot tell what no page has shown.
    """
    top, bottom = np.asarray(hits, dtype=np.float64), np.asarray(of, dtype=np.float64)
    if not bottom.sum():
        return NOTHING_COUNTED
    drawn = np.random.default_rng(list(seed)).integers(len(top), size=(DRAWS, len(top)))
    tops, bottoms = top[drawn].sum(axis=1), bottom[drawn].sum(axis=1)
    low, high = np.percentile(tops[bottoms > 0] / bottoms[bottoms > 0], [2.5, 97.5])
    return Interval(float(top.sum() / bottom.sum()), float(low), float(high))
