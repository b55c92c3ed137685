"""Tiers and what a page costs and keeps at each: the data that a ladder gives to an allocation."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

WITH_FACTS = "-facts"  # ends the names of pages that have their factsheet beside them
Kind = Literal["text", "page", "sheet", "facts", "stored"]


@dataclass(frozen=True, slots=True)
class Tier:
    """One step."""

    name: str  # a word
    kind: Kind
    side: int = 0  # pixels of a page's side; of one on a contact sheet, its place's
    tokens: int = 0  # that the picture costs, newlines and separator counted; of a text or a factsheet, each page's own
    mode: str = ""  # of a page, the model's mode that shows it, as `pixels.find_mode` takes it; of a sheet, that of the whole sheet
    has_facts: bool = False  # of a page, whether its factsheet stands beside the picture

    @property
    def view(self) -> str:
        """What its picture is called, the same with facts and without."""
        return self.name.removesuffix(WITH_FACTS)


@dataclass(frozen=True, slots=True)
class Choices:
    """What a page costs and keeps at every tier, in the ladder's order; None where it has no such tier."""

    tokens: tuple[int | None, ...]  # of a contact sheet, of the whole sheet
    fidelity: tuple[float, ...]  # share of its characters that can be read
    is_measured: bool = True  # whether every score was
