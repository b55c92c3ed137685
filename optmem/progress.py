"""A bar on stderr, where a person watches."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator
from typing import TypeVar

from tqdm import tqdm

T = TypeVar("T")


def watched(items: Iterable[T], what: str, *, unit: str = "page", total: int | None = None) -> Iterator[T]:
    """The items, counted on a bar.

    total   how many there are, where `items` does not know
    """
    yield from tqdm(items, total=total, desc=what, unit=unit, file=sys.stderr, disable=not sys.stderr.isatty())
