"""A memory as one state of it is: its ladder and what each step holds, pages as they are shown, recalls, and what changed when."""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from heapq import nlargest

from optmem.errors import InputError, OptmemError
from optmem.memory.ageing import SHEET, picture, pixels_of
from optmem.memory.details import handle, side_of
from optmem.memory.fidelity import Fidelity
from optmem.memory.ladder import sheet_of
from optmem.memory.optics import Optics, as_png, from_png
from optmem.memory.reading import END, tier_of_side
from optmem.memory.receipt import Receipt
from optmem.memory.records import StoredPage
from optmem.memory.settings import NAME, Settings, State
from optmem.memory.stats import Stats, stats_of
from optmem.memory.store import Reader
from optmem.memory.tiers import Tier
from optmem.memory.view import View
from optmem.pages import read_symbols
from optmem.pixels import contact_sheet

MOST_RECALLED = 20  # pages
MOST_LINES = 4  # that were read of one of them
MOST_CHARACTERS = 160  # of one line
POINTS = 30  # of a series over the history
Watch = Callable[[list[StoredPage]], Iterable[StoredPage]]
SMALL = 128  # pixels of the side of a page that is shown as no picture


@dataclass(frozen=True, slots=True)
class Step:
    """A tier, and what is there now."""

    name: str
    tier: Tier | None  # None of pages that were never shown, and of tiers that another model had
    fidelity: Fidelity | None  # of what is no picture, None
    pages: int
    tokens: int  # that they cost in the context


@dataclass(frozen=True, slots=True)
class Shown:
    """A page as it is shown now."""

    page: StoredPage
    side: int  # pixels of the picture that the model sees; 0 where it sees none
    png: bytes | None = field(repr=False)  # None where its file is damaged
    is_pinned: bool = False
    damage: str = ""


@dataclass(frozen=True, slots=True)
class Recalled:
    """A page that was recalled."""

    page: StoredPage
    lines: tuple[str, ...] = field(repr=False)  # of those that were read


@dataclass(frozen=True, slots=True)
class Dated:
    """A receipt, and when."""

    number: int
    time: float
    receipt: Receipt
    message: int  # the newest one that a page changed by it or before it shows
    text_tokens: int  # of the history up to there


@dataclass(frozen=True, slots=True)
class Overview:
    """All of it."""

    stats: Stats
    steps: tuple[Step, ...]
    text_messages: int  # that are on no page, or stay text
    text_tokens: int  # of these
    pages: tuple[Shown, ...]  # the newest, oldest first
    older: tuple[tuple[str, int], ...]  # pages before these, by tier
    recalled: tuple[Recalled, ...]  # most often first
    receipts: tuple[Dated, ...]  # oldest first
    history: tuple[tuple[int, int], ...]  # number of a message, tokens of all up to it as text

    @property
    def tokens(self) -> int:
        """About what a context costs now."""
        return self.text_tokens + sum(step.tokens for step in self.steps)


def read_overview(path: str | os.PathLike[str], optics: Optics, most: int, watch: Watch = iter) -> Overview:
    """Of a memory as it is now, beside whoever writes to it.

    most    pages whose pictures are taken, the newest
    watch   goes through these, and may count them

    Raises as Reader.open does.
    """
    with Reader.open(path) as opened:
        _ = optics.ladder  # loads the model: before the snapshot, under which nothing can be forgotten
        with opened.snapshot() as view:
            made = view.setting(NAME)
            return overview(view, Settings() if made is None else Settings.from_json(made), optics, most, watch)


def overview(view: View, settings: Settings, optics: Optics, most: int, watch: Watch = iter) -> Overview:
    """Of one state, as `read_overview` has it."""
    every = list(view.pages())
    newest, older = every[max(len(every) - most, 0) :], every[: max(len(every) - most, 0)]
    unpaged = [each.tokens for each in view.unpaged()]
    kept = [each.tokens for seq, _ in State.of(view).kept for each in view.messages(seq, seq) if view.pages_showing(seq, seq)]
    pinned = {number for seq, _ in State.of(view).pins for number in view.pages_showing(seq, seq)}
    sums = _sums(view)
    return Overview(
        stats_of(view, settings),
        tuple(_steps(every, optics)),
        len(unpaged) + len(kept),
        sum(unpaged) + sum(kept),
        tuple(_shown(view, page, optics, is_pinned=page.is_pinned or page.number in pinned) for page in watch(newest)),
        tuple(Counter(page.tier for page in older).items()),
        tuple(_recalled(view, every, optics)),
        tuple(_receipts(view, {page.number: page.last for page in every}, sums)),
        tuple(_thinned(list(sums.items()))),
    )


# --- the ladder ---------------------------------------------------------------------------------------------------------------


def _steps(pages: list[StoredPage], optics: Optics) -> Iterator[Step]:
    ladder = optics.ladder
    there: dict[str, list[StoredPage]] = {}
    for page in pages:
        there.setdefault(page.tier, []).append(page)
    for tier in ladder.tiers:
        some = there.pop(tier.name, [])
        yield Step(tier.name, tier, ladder.fidelity(tier), len(some), _cost(tier, some, optics))
    for name, some in there.items():
        yield Step(name, None, None, len(some), sum(page.tokens for page in some))


def _cost(tier: Tier, pages: list[StoredPage], optics: Optics) -> int:
    """A contact sheet is paid for once."""
    if tier.kind == "sheet":
        return tier.tokens * len({sheet_of(page.number - 1, optics.ladder.sheet_pages) for page in pages})
    return sum(page.text_tokens if tier.kind == "text" else page.tokens for page in pages)


# --- pages --------------------------------------------------------------------------------------------------------------------


def _shown(view: View, page: StoredPage, optics: Optics, *, is_pinned: bool) -> Shown:
    """As the model sees it; what it sees no picture of is there as a small one.  A damaged one is told of, and hides no other."""
    tier = next((tier for tier in optics.ladder.tiers if tier.name == page.tier), None)
    side = min(tier.side, side_of(page)) if tier is not None and tier.kind in ("page", "sheet") else 0
    try:
        return Shown(page, side, _png(view, page, tier, optics), is_pinned)
    except OptmemError as damage:
        return Shown(page, side, None, is_pinned, str(damage))


def _png(view: View, page: StoredPage, tier: Tier | None, optics: Optics) -> bytes:
    if tier is not None and tier.kind == "page":
        return picture(view, page, tier, optics)
    if tier is not None and tier.kind == "sheet":
        return _cut(view, page, tier)
    pixels = pixels_of(view, page)
    is_text = tier is None or tier.kind == "text"
    return as_png(pixels if is_text else contact_sheet([pixels], SMALL).image)


def _cut(view: View, page: StoredPage, tier: Tier) -> bytes:
    """Its place on the contact sheet."""
    place = next((blob.place for blob in view.blobs(page.number) if blob.kind == SHEET), None)
    if place is None:
        raise InputError(f"page {handle(page.number)} is on no contact sheet")
    sheet = from_png(view.blob(page.number, SHEET))
    columns = sheet.shape[1] // tier.side
    top, left = place // columns * tier.side, place % columns * tier.side
    return as_png(sheet[top : top + tier.side, left : left + tier.side].copy())


def _recalled(view: View, pages: list[StoredPage], optics: Optics) -> Iterator[Recalled]:
    by_rows = optics.engine.model.config.family == "nano"
    for page in nlargest(MOST_RECALLED, (page for page in pages if page.hits), key=lambda page: (page.hits, page.last_hit or 0)):
        found = view.readings(page.number, tier_of_side(side_of(page)))
        text = "".join(reading.text for row, reading in sorted(found.items()) if row != END)
        lines = (read_symbols(text) if by_rows else text).splitlines()
        yield Recalled(page, tuple([line[:MOST_CHARACTERS] for line in lines if line.strip()][:MOST_LINES]))


# --- the history --------------------------------------------------------------------------------------------------------------


def _sums(view: View) -> dict[int, int]:
    """Tokens of all messages up to each."""
    total, sums = 0, {}
    for each in view.messages():
        total += each.tokens
        sums[each.seq] = total
    return sums


def _thinned(points: list[tuple[int, int]]) -> list[tuple[int, int]]:
    """So many of them, the last one among them."""
    step = -(-len(points) // POINTS) or 1
    return points[::-1][::step][::-1]


def _receipts(view: View, last: dict[int, int], sums: dict[int, int]) -> Iterator[Dated]:
    """The clocks of messages are their callers', so that a receipt is placed by the pages that it changed."""
    names = {handle(number): seq for number, seq in last.items()}
    message = tokens = 0
    for each in view.receipts():
        receipt = Receipt.from_json(json.loads(each.content))
        message = max([message, *(names.get(change.page, 0) for change in receipt.changes)])
        tokens = sums.get(message, tokens)
        yield Dated(each.number, each.time, receipt, message, tokens)
