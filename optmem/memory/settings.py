"""What a memory was made with, kept beside it: so that whoever opens it again need not say it again."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Literal

from optmem.errors import InputError
from optmem.memory.policy import Policy
from optmem.memory.pricing import reader_name
from optmem.memory.store import Reader, Store
from optmem.memory.view import View

Index = Literal["text", "optical"]
NAME, STATE = "memory", "state"  # of the store's settings


@dataclass(frozen=True, slots=True)
class Settings:
    """How a memory works."""

    budget: int = 2048  # tokens of a context
    archive: bool = False  # keep the messages as they came, beside their pages
    index: Index = "text"  # "optical" keeps no text of what is on pages: they are found by a glance over their tokens
    keep_sharp: bool = True  # keep the sharpest pixels of a page on the disk, however small it is shown; False lets them age too
    policy: Policy = field(default_factory=Policy)
    reader: str = ""  # whose tokens the budget counts, one of `pricing.READERS`; "" is the model that reads the pages

    def __post_init__(self) -> None:
        if isinstance(self.budget, bool) or not isinstance(self.budget, int) or self.budget < 0:
            raise InputError(f"a budget is a whole number of tokens, at least 0, got {repr(self.budget)[:80]}")
        if self.index not in ("text", "optical"):
            raise InputError(f"the index must be 'text' or 'optical', got {repr(self.index)[:80]}")
        for name in ("archive", "keep_sharp"):
            if not isinstance(getattr(self, name), bool):
                raise InputError(f"{name} must be True or False, got {repr(getattr(self, name))[:80]}")
        if not isinstance(self.policy, Policy):
            raise InputError(f"policy must be a Policy, got {type(self.policy).__name__}")
        if not isinstance(self.reader, str):
            raise InputError(f"reader must be the name of a provider or of a reader, got {repr(self.reader)[:80]}")
        object.__setattr__(self, "reader", reader_name(self.reader))
        if self.archive and self.index == "optical":
            raise InputError("archive=True keeps every message as text, and index='optical' keeps none: choose one")

    def changed(self, given: Mapping[str, Any]) -> Settings:
        """With what is given in its place; None is what it was.  Raises InputError for another index: pages were made for one."""
        said = {name: value for name, value in given.items() if value is not None}
        return replace(self, **said)

    def to_json(self) -> str:
        """As `from_json` takes it."""
        return json.dumps(asdict(self) | {"policy": self.policy.to_json()})

    @classmethod
    def from_json(cls, text: str) -> Settings:
        """Raises InputError for what is none."""
        found = json.loads(text)
        if not isinstance(found, dict) or found.keys() | {"reader"} != cls.__dataclass_fields__.keys():
            raise InputError(f"the settings of a memory are {', '.join(cls.__dataclass_fields__)}: it was made by another optmem")
        return cls(**found | {"policy": Policy.from_json(found["policy"])})


@dataclass(frozen=True, slots=True)
class State:
    """Where a memory is in its history."""

    waiting: tuple[str, ...] = ()  # calls without a result
    waited: int = 0  # messages since they were called
    drawn: int = 0  # messages up to this one are on pages, or stay text
    groups: int = 0  # so many groups are
    kept: tuple[tuple[int, int], ...] = ()  # groups that stay text: the seq of each, and how many there were before it
    pins: tuple[tuple[int, str], ...] = ()  # messages that are pinned, and to what
    sketched: int = 0  # messages up to this one are shown as pages though they fill none yet
    sketch: tuple[str, ...] = ()  # the tiers of these pages
    aged_for: int = 0  # the budget for which pages were last made smaller or sharper; 0 is none

    def to_json(self) -> str:
        """As `from_json` takes it."""
        return json.dumps(asdict(self))

    @classmethod
    def of(cls, view: View) -> State:
        """What the store has."""
        text = view.setting(STATE)
        return cls() if text is None else cls.from_json(text)

    @classmethod
    def from_json(cls, text: str) -> State:
        """Raises InputError for what is none."""
        found = json.loads(text)
        if not isinstance(found, dict) or not found.keys() <= cls.__dataclass_fields__.keys():
            raise InputError("the state of a memory is not such as this optmem keeps")
        pairs = {name: tuple((one, other) for one, other in found.get(name, ())) for name in ("kept", "pins")}
        return cls(**found | pairs | {name: tuple(found.get(name, ())) for name in ("waiting", "sketch")})


def kept_settings(opened: Store | Reader, given: Mapping[str, Any]) -> Settings:
    """As the memory was made, with what is said now.  A writer keeps that."""
    with opened.snapshot() as view:
        text = view.setting(NAME)
    made = Settings() if text is None else Settings.from_json(text)
    found = made.changed(given)
    if text is not None and found.index != made.index:
        raise InputError(f"this memory was made with index={made.index!r}, which cannot be changed")
    if isinstance(opened, Store) and (text is None or found != made):
        with opened.transaction() as change:
            change.set(NAME, found.to_json())
    return found
