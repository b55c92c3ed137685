"""The tiers down which a page ages, as data: text, its sharp page, smaller views of it, a contact sheet, its facts, stored alone.

text        what it says, as text
page        a view of the page in one of the model's modes, with its factsheet beside it or without
sheet       one of several pages on one picture, which is paid for once
facts       its factsheet
stored      nothing in the context: it is in the store, and `recall` finds it
"""

from __future__ import annotations

from dataclasses import dataclass
from math import isqrt
from typing import Literal

from optmem.errors import InputError
from optmem.memory.fidelity import Curve, Fidelity
from optmem.memory.tiers import WITH_FACTS, Choices, Tier
from optmem.model.config import ModelConfig
from optmem.model.modes import modes_of
from optmem.pixels import MIN_CELL, Mode, find_mode

NANO_SIDES = (512, 384, 256)  # drawn at the first; nano reads what is drawn at a side best at that side
Measure = Literal["score", "exact_lines"]  # what a page is to keep: characters, or whole lines without an error
SHEET_PAGES = 16  # pages on a contact sheet


@dataclass(frozen=True, slots=True)
class Ladder:
    """The tiers of a model, the sharpest first."""

    tiers: tuple[Tier, ...]
    curve: Curve
    size: int  # pixels of the side at which pages are drawn
    cell: str  # width x height of a character on them
    sheet_pages: int
    measure: Measure = "exact_lines"

    def find(self, name: str) -> int:
        """The number of a tier.  Raises InputError where there is none of this name."""
        for number, tier in enumerate(self.tiers):
            if tier.name == name:
                return number
        raise InputError(f"a page is shown as {', '.join(tier.name for tier in self.tiers)}, not as {name[:80]!r}")

    @property
    def sharp(self) -> int:
        """The number of the sharpest page without its facts."""
        return next(number for number, tier in enumerate(self.tiers) if tier.kind == "page" and not tier.has_facts)

    def is_named(self, tier: Tier) -> bool:
        """Whether a page is named beside its picture, so that a model can ask for it: not at its sharpest, where it need not."""
        return tier.has_facts or (tier.kind == "page" and tier.side < self.size)

    @property
    def sheet(self) -> int | None:
        """The number of the contact sheet's tier."""
        return next((number for number, tier in enumerate(self.tiers) if tier.kind == "sheet"), None)

    def fidelity(self, tier: Tier, *, kind: str | None = None, text_tokens: int = 0) -> Fidelity | None:
        """Of a page's picture at a tier; None of a tier that is no picture."""
        if tier.kind not in ("page", "sheet"):
            return None
        pages = self.sheet_pages if tier.kind == "sheet" else 1
        return self.curve.at(self.size, tier.side, self.cell, kind, ratio=text_tokens * pages / tier.tokens, complete=True)

    def _measured(self, found: Fidelity) -> float:
        """What is to be kept; where lines were not counted, as in what papers claim, the score."""
        return found.score if self.measure == "score" or found.exact_lines is None else found.exact_lines

    def choices(
        self,
        text_tokens: int | None,
        *,
        facts_tokens: int = 0,
        facts_share: float = 0.0,
        name_tokens: int = 0,
        kind: str | None = None,
        width: int | None = None,
    ) -> Choices:
        """What one page costs and keeps.

        text_tokens    of its text for the reader; None where it has none, as a picture that came without
        facts_tokens   of its factsheet and name, beside its picture or alone; 0 where it has none
        facts_share    of its characters that are on the factsheet: what that adds to a picture is what is misread of them there
        name_tokens    of its name alone, which stands beside views that are not the sharpest
        kind           of its text, where that is known
        width          pixels of the sharpest picture that there still is; None is the size at which pages are drawn
        """
        tokens: list[int | None] = []
        kept: list[float] = []
        measured = True
        for tier in self.tiers:
            found = self.fidelity(tier, kind=kind, text_tokens=text_tokens or 0)
            measured = measured and (found is None or found.basis == "measured")
            score = float(tier.kind == "text") if found is None else self._measured(found)
            if tier.has_facts or tier.kind == "facts":
                is_there, beside = facts_tokens > 0 and facts_share > 0, facts_tokens
                score = min(score + (1 - _of_facts(found)) * facts_share, 1.0)
            else:
                is_there, beside = tier.kind != "text" or text_tokens is not None, name_tokens * self.is_named(tier)
            is_there = is_there and (width is None or tier.side <= width)
            cost = text_tokens if tier.kind == "text" else tier.tokens + beside
            tokens.append(cost if is_there else None)
            kept.append(score)
        return Choices(tuple(tokens), tuple(kept), measured)


def _of_facts(found: Fidelity | None) -> float:
    """Share of the facts that is read without their sheet; where that was not measured, the share of characters."""
    if found is None:
        return 0.0
    return found.score if found.identifiers is None else found.identifiers


def ladder(
    config: ModelConfig,
    curve: Curve,
    *,
    size: int | None = None,
    cell: str = "8x16",
    sheet_pages: int = SHEET_PAGES,
    measure: Measure = "exact_lines",
) -> Ladder:
    """The ladder of a model.

    size          pixels of the side at which pages are drawn; None is what the model's sharpest single view shows
    cell          width x height of a character on a page
    sheet_pages   pages on a contact sheet, a square number; 0 is a ladder without one
    measure       what a page is to keep: "exact_lines", which is what recall gives back, or "score", its characters: with half of
                  them hardly a line is read, and by them a budget goes to pages of which nothing can be recalled

    Raises InputError for a model that sees a page in tiles alone, and a size that none of its views has.
    """
    modes = _views(config, size)
    tiers = [Tier("text", "text"), *(_page(mode, has_facts=facts) for mode in modes for facts in (True, False))]
    if sheet_pages:
        tiers.append(_sheet(modes[0], sheet_pages))
    tiers += [Tier("facts", "facts"), Tier("stored", "stored")]
    return Ladder(tuple(tiers), curve, modes[0].size, cell, sheet_pages, measure)


def _views(config: ModelConfig, size: int | None) -> list[Mode]:
    """The single views of a model from the size of a page down, the largest first."""
    if config.family == "nano":
        drawn = NANO_SIDES[0] if size is None else size
        sides = [drawn, *(drawn * side // NANO_SIDES[0] for side in NANO_SIDES[1:])]
        return [_nano_view(side) for side in sides if side % 64 == 0 and side >= 64]
    modes = sorted((mode for mode in modes_of(config).values() if not mode.is_tiled), key=lambda mode: -mode.size)
    if not modes:
        raise InputError(f"a {config.family} model sees a page in tiles alone: it has no smaller view that a page could age to")
    drawn = modes[0].size if size is None else size
    if drawn not in [mode.size for mode in modes]:
        raise InputError(
            f"pages are drawn at the side of a view, {', '.join(str(mode.size) for mode in modes)} pixels, got {drawn}"
        )
    return [mode for mode in modes if mode.size <= drawn]


def _page(mode: Mode, *, has_facts: bool) -> Tier:
    name = mode.name.replace(" ", "-") + WITH_FACTS * has_facts
    return Tier(name, "page", mode.size, mode.fed_tokens(), mode.name, has_facts)


def _nano_view(side: int) -> Mode:
    return find_mode({512: "tiny", 640: "small", 1024: "base"}.get(side, f"square {side}"))


def _sheet(mode: Mode, pages: int) -> Tier:
    columns = isqrt(pages) if isinstance(pages, int) and pages > 0 else 0
    if columns < 2 or columns * columns != pages or mode.size // columns < MIN_CELL:
        raise InputError(f"a contact sheet holds a square number of pages of at least {MIN_CELL} pixels: 4, 9, 16, got {pages!r}")
    return Tier("sheet", "sheet", mode.size // columns, mode.fed_tokens(), mode.name)


def sheet_of(place: int, sheet_pages: int) -> int:
    """Which contact sheet the page at this place of the history is on, forgotten ones counted: a sheet's pages never change."""
    return place // sheet_pages
