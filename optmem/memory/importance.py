"""How much a page counts: less as it ages, more by every recall, as much more as its user says.

    importance = weight x (sum over its beginning and its recalls of 1 / (1 + groups since then / half_life))

Time is counted in groups of messages, not by a clock: clocks go back, and the same history must age in the same way.  The fall is
slower than exponential, so that of a long history something is left to compare.
"""

from __future__ import annotations

from collections.abc import Iterable
from math import isfinite

from optmem.errors import InputError

MOST = 1e6  # of a weight


def importance(now: int, begun: int, *, recalls: Iterable[int] = (), weight: float = 1.0, half_life: int = 32) -> float:
    """Of a page.

    now, begun, recalls   numbers of groups: the newest, the page's own, and those at which it was recalled
    weight                the user's, 0 and more

    A number that lies ahead counts as now.  Raises InputError for a weight that is none.
    """
    if not (isinstance(weight, int | float) and isfinite(weight) and 0 <= weight <= MOST):
        raise InputError(f"a weight is a number from 0 to {MOST:,.0f}, got {repr(weight)[:80]}")
    total = 0.0
    for number in (begun, *recalls):
        total += half_life / (half_life + max(now - number, 0))
    return weight * total
