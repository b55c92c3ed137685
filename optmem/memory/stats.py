"""How much a memory holds, and how it is shown."""

from __future__ import annotations

from collections import Counter
from dataclasses import asdict, dataclass
from typing import Any

from optmem.memory.records import Counts
from optmem.memory.settings import Settings, State
from optmem.memory.view import View


@dataclass(frozen=True, slots=True)
class Stats:
    """A memory in numbers."""

    counts: Counts
    tiers: dict[str, int]  # pages at each; "text" and "new" are on pages but not shown as pictures yet
    waiting_messages: int  # on no page yet
    budget: int
    index: str
    archive: bool
    keep_sharp: bool

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        return asdict(self)


def stats_of(view: View, settings: Settings) -> Stats:
    """The numbers of one state."""
    tiers = Counter(page.tier for page in view.pages())
    waiting = sum(1 for _ in view.messages(State.of(view).drawn + 1))
    return Stats(view.counts(), dict(tiers), waiting, settings.budget, settings.index, settings.archive, settings.keep_sharp)
