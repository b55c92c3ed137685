"""Going through many things: some at a time, and with a bar where a person watches."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator
from itertools import islice
from typing import Protocol, TypeVar

from tqdm import tqdm

T = TypeVar("T")


def in_parts(items: Iterable[T], count: int) -> Iterator[list[T]]:
    """Lists of so many."""
    rest = iter(items)
    while some := list(islice(rest, count)):
        yield some


def one_ahead(items: Iterable[T]) -> Iterator[T]:
    """Each item once the next one is there; but the first as soon as it comes."""
    rest = iter(items)
    yield from islice(rest, 1)
    for held in islice(rest, 1):
        for following in rest:
            yield held
            held = following
        yield held


class Watch(Protocol):
    """Shows how far something long is."""

    def __call__(self, items: Iterable[T], what: str, *, unit: str = "page", total: int | None = None) -> Iterable[T]:
        """The items, as they are.

        what    is done with them
        unit    what one of them is
        total   how many there are, where `items` does not know
        """


def unwatched(items: Iterable[T], what: str, *, unit: str = "page", total: int | None = None) -> Iterable[T]:
    """The items: nobody watches."""
    del what, unit, total
    return items


def watched(items: Iterable[T], what: str, *, unit: str = "page", total: int | None = None) -> Iterator[T]:
    """The items, counted on a bar on stderr.

    total   how many there are, where `items` does not know
    """
    yield from tqdm(items, total=total, desc=what, unit=unit, file=sys.stderr, disable=not sys.stderr.isatty())
