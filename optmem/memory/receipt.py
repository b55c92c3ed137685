"""What a memory did to its pages: which went from which tier to which, tokens before and after, and why."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

from optmem.errors import InputError


@dataclass(frozen=True, slots=True)
class Change:
    """One page."""

    page: str
    from_tier: str
    to_tier: str
    tokens_before: float  # on a contact sheet, its share of it
    tokens_after: float
    why: str


@dataclass(frozen=True, slots=True)
class Receipt:
    """All that one call did."""

    budget: int
    tokens_before: int  # of everything shown
    tokens_after: int
    changes: tuple[Change, ...] = ()
    notes: tuple[str, ...] = ()  # what holds for no single page

    @property
    def freed(self) -> int:
        """Tokens; below 0 where pages were made sharper."""
        return self.tokens_before - self.tokens_after

    def to_json(self) -> dict[str, Any]:
        """As `from_json` takes it."""
        return asdict(self) | {"changes": [asdict(change) for change in self.changes], "notes": list(self.notes)}

    @classmethod
    def from_json(cls, given: Mapping[str, Any]) -> Receipt:
        """A receipt from its JSON.  Raises InputError for what is none."""
        _check(given, cls, "a receipt")
        changes = given["changes"]
        if not isinstance(changes, list) or not isinstance(given["notes"], list):
            raise InputError("a receipt has lists of changes and of notes")
        for change in changes:
            _check(change, Change, "a change")
        numbers = {name: given[name] for name in ("budget", "tokens_before", "tokens_after")}
        return cls(**numbers, changes=tuple(Change(**change) for change in changes), notes=tuple(given["notes"]))

    def __str__(self) -> str:
        if not self.changes:
            return "\n".join((f"{self.tokens_after:,} of {self.budget:,} tokens, nothing changed", *self.notes))
        steps = Counter((change.from_tier, change.to_tier) for change in self.changes)
        count = len(self.changes)
        head = (
            f"{self.tokens_before:,} -> {self.tokens_after:,} of {self.budget:,} tokens, {count:,} page{'s' * (count != 1)} changed"
        )
        moved = [f"  {number:,} {start} -> {end}" for (start, end), number in steps.items()]
        return "\n".join([head, *moved, *(f"  {note}" for note in self.notes)])


_NUMBERS = {"int": int, "float": (int, float), "str": str}


def _check(given: object, kind: type, what: str) -> None:
    wanted = {each.name: str(each.type) for each in fields(kind)}
    if not isinstance(given, Mapping) or given.keys() != wanted.keys():
        raise InputError(f"{what} has exactly {', '.join(wanted)}")
    for name, type_name in wanted.items():
        allowed = _NUMBERS.get(type_name, object)
        if isinstance(given[name], bool) or not isinstance(given[name], allowed):  # type: ignore[arg-type]
            raise InputError(f"{what}: {name} must be of type {type_name}, got {repr(given[name])[:80]}")
