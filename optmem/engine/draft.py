"""Draft and verify: a guess of what the decoder will say is checked in one pass, and the answer stays the decoder's own.

    a pass feeds      pending  d0   d1   d2   d3         pending: what was said last and is not in the cache yet
    the decoder says  d0       d1   x    .    .          each after all that stands before it
    so it has said    d0       d1   x                    the longest prefix that agrees, and one token of its own
    the cache keeps   pending  d0   d1                   x is pending now; what was refused is cut off again

Without a draft a pass feeds one token: plain greedy decoding is this loop with nothing proposed.  So the two say the same by
construction, and on CPU, where a row of every operator has a fixed order of summation, with the same log-probabilities bit for bit
(in fp32 and bf16; fp16 and fp64 run on the reference, whose matrix products choose their order by shape).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

LIKELY = 0.5  # that a draft is right as far as it is proposed


class Draft(Protocol):
    """Whoever has a guess: a glance, n-grams of what was said, a PDF's text layer.  A wrong guess costs time, never correctness."""

    def propose(self, said: Sequence[int]) -> Sequence[int]:
        """The ids that may follow these, what ends the text included; none where nothing is known."""


@dataclass(frozen=True, slots=True)
class Said:
    """The likeliest token behind each of those that a pass fed: log-probabilities, and probabilities at a temperature."""

    ids: list[int]
    logprobs: list[float]
    probabilities: list[float]


def accept(proposed: Sequence[int], said: Sequence[int], first: int = 0) -> int:
    """How many proposed tokens are those that the decoder says from its `first` on."""
    for at, guess in enumerate(proposed):
        if first + at >= len(said) or guess != said[first + at]:
            return at
    return len(proposed)


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


@dataclass(slots=True)
class Lookup:
    """What followed the last tokens where they stood before: in what was said, or in a text that is likely to be said."""

    known: Sequence[int] = ()  # such as a PDF's text layer
    most: int = 8  # tokens proposed
    longest: int = 4  # tokens that must be found again, at first;
    shortest: int = 2  # and at last

    def propose(self, said: Sequence[int]) -> Sequence[int]:
        """The tokens behind the latest place where the end of `said` stands: of its own first, then of what is known."""
        for size in range(min(self.longest, len(said)), self.shortest - 1, -1):
            end = list(said[-size:])
            for source, places in ((said, len(said) - size), (self.known, len(self.known) - size + 1)):
                for at in range(places - 1, -1, -1):
                    if source[at] == end[0] and list(source[at : at + size]) == end:
                        return list(source[at + size : at + size + self.most])
        return self.known[: self.most] if not said else []
