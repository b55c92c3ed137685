"""Tiers and what a page costs and keeps at each: the data that a ladder gives to an allocation."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Kind = Literal["text", "page", "sheet", "facts", "stored"]


@dataclass(frozen=True, slots=True)
class Tier:
    """One step."""

    name: str  # a word
    kind: Kind
    side: int = 0  # pixels of a page's side; of one on a contact sheet, its place's
    tokens: int = 0  # that the picture costs, newlines and separator counted; of a text or a factsheet, each page's own
    mode: str = ""  # of a page, the model's mode that shows it, as `pixels.find_mode` takes it; of a sheet, that of the whole sheet


@dataclass(frozen=True, slots=True)
class Choices:
    """What a page costs and keeps at every tier, in the ladder's order; None where it has no such tier."""

    tokens: tuple[int | None, ...]  # of a contact sheet, of the whole sheet
    fidelity: tuple[float, ...]  # share of its characters that can be read
    is_measured: bool = True  # whether every score was
