"""Pictures are decoded and cut into views in threads, while the model has those before them."""

from __future__ import annotations

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

T = TypeVar("T")
MOST_THREADS = 8  # of a machine with many cores: decoders and resampling hold no lock of Python's


class Ahead:
    """Threads that do what they are given, in its order.

    They are given nothing that may wait for others, such as a file or an object of a user's: so they end by themselves.
    """

    def __init__(self) -> None:
        self._pool = ThreadPoolExecutor(min(len(os.sched_getaffinity(0)), MOST_THREADS), "optmem pictures")

    def start(self, act: Callable[[], T]) -> Callable[[], T]:
        """Begins something; what is returned waits for its result, or raises what it raised."""
        try:
            return self._pool.submit(act).result
        except RuntimeError:  # the interpreter is ending, and lets no thread begin: then it is done when it is asked for
            return act

    def close(self) -> None:
        """Forgets what has not begun."""
        self._pool.shutdown(wait=False, cancel_futures=True)
