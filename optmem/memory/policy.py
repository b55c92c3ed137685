"""When pages are made smaller, and which are not: the words of context editing."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

from optmem.errors import InputError

FEW, KEPT = 512, 8  # a budget of so many tokens goes to pages alone; of what is above, one part of so many to the newest text
ROLES = ("system", "developer", "user", "assistant", "tool")


@dataclass(frozen=True, slots=True)
class Policy:
    """How a memory ages.  The default ages when the budget is full, and keeps the newest messages and all instructions as text.

    trigger          tokens shown above which pages are made smaller; None is the budget
    keep             the newest groups that stay as they are, text as long as they are text; a tool call and its results are one
                     group.  None: as many as there is place for in an eighth of what the trigger has above 512 tokens, so that a
                     small budget goes to pages, which hold more for the same tokens.  A number: so many, in up to `keep_share` of
                     the trigger, as a strong reader of text may want it.  What it leaves is given out by what each token gains
    keep_share       of the trigger that a number of them may take; beyond it the older of them age too
    clear_at_least   tokens freed whenever anything changes, up to half of the trigger: each change costs a prompt cache
    exclude          tools whose calls and results stay text
    exclude_roles    roles whose messages stay text: instructions are not left to optics
    half_life        groups after which a page counts half
    facts            tokens of a page's factsheet, at most; 0 is none
    """

    trigger: int | None = None
    keep: int | None = None
    keep_share: float = 0.75
    clear_at_least: int = 0
    exclude: tuple[str, ...] = ()
    exclude_roles: tuple[str, ...] = ("system", "developer")
    half_life: int = 32
    facts: int = 64

    def __post_init__(self) -> None:
        for name, least in (("clear_at_least", 0), ("half_life", 1), ("facts", 0)):
            _check_count(name, getattr(self, name), least)
        if self.keep is not None:
            _check_count("keep", self.keep, 0)
        if self.trigger is not None:
            _check_count("trigger", self.trigger, 1)
        share = self.keep_share
        if isinstance(share, bool) or not isinstance(share, int | float) or not 0 <= share <= 1:
            raise InputError(f"keep_share must be from 0 to 1, got {repr(share)[:80]}")
        for name in ("exclude", "exclude_roles"):
            object.__setattr__(self, name, _names(name, getattr(self, name)))
        for role in self.exclude_roles:
            if role not in ROLES:
                raise InputError(f"exclude_roles must be of {', '.join(ROLES)}, got {role[:80]!r}")

    def limit(self, budget: int) -> int:
        """Tokens up to which nothing changes."""
        return budget if self.trigger is None else min(self.trigger, budget)

    def kept_tokens(self, limit: int) -> int:
        """Tokens that the newest groups may take to stay as they are, of so many."""
        if self.keep is None:
            return max(limit - FEW, 0) // KEPT
        return int(self.keep_share * limit)

    def excludes(self, roles: Iterable[str], tools: Iterable[str]) -> str | None:
        """Why what has these roles and calls these tools stays text; None where it does not."""
        for role in roles:
            if role in self.exclude_roles:
                return f"messages of role {role} are excluded"
        for tool in tools:
            if tool in self.exclude:
                return f"the tool {tool} is excluded"
        return None

    def to_json(self) -> dict[str, Any]:
        """As `from_json` takes it."""
        return asdict(self) | {"exclude": list(self.exclude), "exclude_roles": list(self.exclude_roles)}

    @classmethod
    def from_json(cls, given: Mapping[str, Any]) -> Policy:
        """A policy from its words; those that are not there have their defaults.  Raises InputError for an unknown word."""
        known = [each.name for each in fields(cls)]
        unknown = [name for name in given if name not in known]
        if unknown:
            raise InputError(f"a policy has the words {', '.join(known)}, got {str(unknown[0])[:80]!r}")
        return cls(**given)


def _check_count(name: str, value: object, least: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise InputError(f"{name} must be a whole number of at least {least}, got {repr(value)[:80]}")


def _names(name: str, given: object) -> tuple[str, ...]:
    if isinstance(given, str) or not isinstance(given, Iterable):
        raise InputError(f"{name} is a list of names, got {repr(given)[:80]}")
    names = tuple(given)
    wrong = [each for each in names if not isinstance(each, str) or not each]
    if wrong:
        raise InputError(f"{name} is a list of names, got {repr(wrong[0])[:80]} in it")
    return names
