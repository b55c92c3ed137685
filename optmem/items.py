"""Going through many things: some at a time, a few of them ahead in threads, and with a bar where a person watches."""

from __future__ import annotations

import os
import sys
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import islice
from typing import TypeVar

from tqdm import tqdm

MOST_THREADS = 8
T = TypeVar("T")
R = TypeVar("R")


def in_parts(items: Iterable[T], count: int) -> Iterator[list[T]]:
    """Lists of so many."""
    rest = iter(items)
    while some := list(islice(rest, count)):
        yield some


def mapped(act: Callable[[T], R], items: Iterable[T], *, ahead: int) -> Iterator[R]:
    """act(item) of every item, in their order, computed in threads; what it raises comes at its place.

    ahead   items that are taken and not given: at most so many, and no more than were given before, so that the first result
            waits for no second item

    The items are taken in the caller's thread.
    """
    given = 0
    waiting: deque[Future[R]] = deque()
    with ThreadPoolExecutor(min(MOST_THREADS, len(os.sched_getaffinity(0))), "optmem items") as pool:
        try:
            for item in items:
                waiting.append(pool.submit(act, item))
                del item  # or it would be held until the next one is asked for
                while len(waiting) > min(ahead, given):
                    given += 1
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            for left in waiting:
                left.cancel()


def watched(items: Iterable[T], what: str, *, unit: str = "page", total: int | None = None) -> Iterator[T]:
    """The items, counted on a bar on stderr.

    total   how many there are, where `items` does not know
    """
    yield from tqdm(items, total=total, desc=what, unit=unit, file=sys.stderr, disable=not sys.stderr.isatty())
