"""From lines to answers, and how right these are.

The one who asks knows a name and looks for the line that holds it.  A line that was read with certainty and holds another name is
another line; in one that was read with doubt, a name that is like the one asked for may be it.  Of several lines the newest counts.
"""

from __future__ import annotations

import ast
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from enum import Enum
from math import sqrt
from typing import Any

from optmem.train.scores import likeness

DOUBT = 0.5  # a confidence below which a name may have been misread
ALIKE = 0.6  # how much of a name must be right for it to be one that was misread
_NORMAL = 1.959964  # 95 % of a normal distribution lie so many deviations around its mean


class Shape(Enum):
    """What of a line is the answer."""

    LAST = "last word"
    REST = "what follows the name"
    JSON = "a value of JSON"
    TABLE = "cells of a row"
    CODE = "a program"

    def read(self, line: str, names: Sequence[str]) -> str | None:
        """The answer in a form in which equal ones are equal; None where the line does not parse."""
        if self is Shape.LAST:
            words = line.split()
            return words[-1].removesuffix(".") if words else None
        if self is Shape.REST:
            return line[len(names[0]) :].strip()
        if self is Shape.JSON:
            return _json(line)
        if self is Shape.TABLE:
            cells = [cell.strip() for cell in line.strip().removeprefix("|").removesuffix("|").split("|")]
            return json.dumps(cells) if len(cells) > 1 else None
        return _program(line)


def _json(line: str) -> str | None:
    try:
        return json.dumps(json.loads(line), sort_keys=True)
    except ValueError:
        return None


def _program(line: str) -> str | None:
    try:
        return ast.dump(ast.parse(line.strip()))
    except (SyntaxError, ValueError):
        return None


@dataclass(frozen=True, slots=True)
class Line:
    """A line that was kept, as it is read now."""

    text: str
    age: int  # of its message, a number that grows: the newest counts
    confidence: float = 1.0
    facts: tuple[str, ...] = ()  # exact ones of this line


@dataclass(frozen=True, slots=True)
class Sure:
    """What was read, how surely, and whether it is exactly what stands there."""

    confidence: float
    is_exact: bool


@dataclass(frozen=True, slots=True)
class Given:
    """What was answered."""

    answer: str | None  # None: nothing is known of it, or it does not parse
    line: str = ""
    is_found: bool = False  # a line was taken for the one that was asked for


def choose(lines: Iterable[Line], names: Sequence[str], shape: Shape) -> Given:
    """The answer of the newest line that holds all names; without one, of a line read with doubt that may hold them."""
    exact: list[Line] = []
    likely: list[tuple[float, Line]] = []
    for line in lines:
        if all(name in line.text for name in names):
            exact.append(line)
        elif line.confidence < DOUBT and (like := min(nearest(name, line.text) for name in names)) >= ALIKE:
            likely.append((like, line))
    if exact:
        found = max(exact, key=lambda line: line.age)
    elif likely:
        found = max(likely, key=lambda each: (each[0], each[1].age))[1]
    else:
        return Given(None)
    answer = shape.read(found.text, names)
    if shape is Shape.LAST and answer is not None and found.facts:
        answer = _mended(answer, found.facts)
    return Given(answer, found.text, True)


def _mended(answer: str, facts: Sequence[str]) -> str:
    """The fact that a misread word is most like."""
    return answer if answer in facts else max(facts, key=lambda fact: likeness(fact, answer))


def nearest(name: str, text: str) -> float:
    """How like the name the words of a text are that are most like it: as many words as the name has."""
    words, count = text.split(), len(name.split())
    spans = [" ".join(words[at : at + count]).strip('.,:;"|') for at in range(max(len(words) - count + 1, 1))]
    return max(likeness(name, span) for span in spans)


# --- counting -------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Rate:
    """So many of so many, with Wilson's 95 % interval: it has a width also where all are right."""

    hits: int
    of: int

    @property
    def value(self) -> float | None:
        """None of nothing."""
        return self.hits / self.of if self.of else None

    @property
    def interval(self) -> tuple[float, float]:
        """Every question counts by itself; those of one history are a little alike, so it is rather too narrow."""
        if not self.of:
            return 0.0, 1.0
        share, weight = self.hits / self.of, _NORMAL**2 / self.of
        middle, width = share + weight / 2, _NORMAL * sqrt(share * (1 - share) / self.of + weight / (4 * self.of))
        low, high = (middle - width) / (1 + weight), (middle + width) / (1 + weight)
        return low if self.hits else 0.0, high if self.hits < self.of else 1.0  # not off by the last digit

    def to_json(self) -> dict[str, Any]:
        """As it is published."""
        low, high = self.interval
        return {"hits": self.hits, "of": self.of, "low": round(low, 4), "high": round(high, 4)}


def rate_of(flags: Iterable[bool]) -> Rate:
    """How many are true."""
    found = list(flags)
    return Rate(sum(found), len(found))
