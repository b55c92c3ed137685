"""What `optmem decode` and `ocr` print: texts on stdout, and on stderr a line for a page that was hardly read."""

from __future__ import annotations

import re
import sys
from dataclasses import dataclass, field
from typing import NamedTuple

import click

from optmem.engine import Completion, document_text

# The mean confidence in what is no blank, on 160 pages: on any page the blanks are sure.  Read: whatever text on 256, 512, 640 and
# 1024 px, at .975 and above.  Not read: other sides .86 to .93, document style .36 to .82, cells of 6x12 and 5x8 .49 to .71.
# Random boxes, half misread, .50 to .88.  The glance tells no better: it sees 320 px as they are (.99), the decoder does not.
UNSURE = 0.95
SIDES = (256, 512, 640, 1024)  # pixels: the pages that the shipped reader has learned
READS = "nano reads dense pages of 256, 512, 640 or 1024 px in cells of 8x16 or 8x8, as optmem render draws them"
_DRAWN = re.compile(r"(?P<source>.*-(?P<style>dense|packed))-(?P<number>[0-9]{4,})\.png(?:-[0-9]+\.safetensors)?", re.DOTALL)


class Place(NamedTuple):
    """Where a page stands, by the name that `optmem render` gave it."""

    source: str
    number: int
    style: str

    def follows(self, other: Place | None) -> bool:
        """Whether it is the next page of the same text."""
        return other is not None and self == other._replace(number=other.number + 1)


def place_of(name: str) -> Place | None:
    """The place in a file's name; None for a file of another origin."""
    found = _DRAWN.fullmatch(name)
    return Place(found["source"], int(found["number"]), found["style"]) if found else None


@dataclass(slots=True)
class Texts:
    """Texts of pages on stdout, at the latest when it is closed.

    Consecutive pages of one text are joined, so that the text comes back as it was drawn, be a word or an escape cut by the end of
    a page.  Other texts are lines at least: one that ends without a line end is given one.
    """

    joins: bool
    _pages: list[Completion] = field(default_factory=list)  # of one text, not printed yet
    _place: Place | None = None  # of the last of them
    _is_open: bool = False  # what was printed last has no line end

    def add(self, name: str, done: Completion) -> None:
        """One page more, in order."""
        place = place_of(name) if self.joins else None
        if place is None or not place.follows(self._place):
            self._print()
        if done.error is None:
            self._pages.append(done)
        self._place = place if done.finish_reason == "stop" else None

    def _print(self) -> None:
        if not self._pages:
            return
        text = document_text(self._pages) if len(self._pages) > 1 else self._pages[0].text
        click.echo("\n" * self._is_open + text, nl=False)
        self._is_open = not text.endswith("\n")
        self._pages = []

    def close(self) -> None:
        """Prints what is left."""
        is_drawn = self._place is not None
        self._print()
        if self._is_open and (sys.stdout.isatty() or not is_drawn):
            click.echo()


def doubt(name: str, done: Completion, side: int | None) -> str | None:
    """What speaks against a page of nano having been read.

    Of a packed page only its name tells: what stands behind the line ends in its rows is passed over, with a confidence of .999.

    side   of the page in pixels, where the model is the one that ships: others may have learned other pages
    """
    place = place_of(name)
    if place is not None and place.style == "packed":
        return "packed, so what stands behind a line end in a row is lost"
    if side is not None and side not in SIDES:
        return f"{side} px are not read well"
    chances = _inked(done)
    if not chances:
        return "nothing but blanks was read" if done.text else None
    sure = sum(chances) / len(chances)
    return f"hardly read, with a confidence of {sure:.2f}" if sure < UNSURE else None


def _inked(done: Completion) -> list[float]:
    """The probability of every symbol that is no blank."""
    rows = [row for row in done.rows if not row.is_below]
    every = (
        pair for drawn, row in zip(done.row_symbols, rows, strict=True) for pair in zip(drawn, row.probabilities, strict=False)
    )
    return [chance for symbol, chance in every if symbol != " "]


def warn(name: str, done: Completion, side: int | None) -> None:
    """Says on stderr what speaks against a page."""
    why = doubt(name, done, side)
    if why is not None:
        click.echo(f"optmem: {name}: {why}: {READS}", err=True)
