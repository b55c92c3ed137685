"""At which tier everything is shown: pages and groups as candidates of an allocation, and what its answer changes in the store.

On the disk a page keeps its sharpest pixels and tokens, however small it is shown: `recall` reads those.  Only where a memory was
made with keep_sharp=False do they age too, to what is shown, and what was read of them goes with them.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from itertools import takewhile

from optmem.errors import InputError, PageCorrupted
from optmem.images import Pixels
from optmem.items import Watch, unwatched
from optmem.memory.allocation import Allocation, Candidate, allocate
from optmem.memory.details import Details, handle
from optmem.memory.drawing import PIXELS, Group, handle_text, rows_of
from optmem.memory.importance import importance
from optmem.memory.ladder import sheet_of
from optmem.memory.optics import Optics, as_png, from_png, sheet_of_pages
from optmem.memory.records import StoredPage
from optmem.memory.settings import Settings, State
from optmem.memory.sketch import Sketched, SketchPage, drawn_part, open_groups, sketch
from optmem.memory.tiers import Choices, Tier
from optmem.memory.transaction import Transaction
from optmem.memory.view import View

SHOWN, SHEET, TOKENS = "shown", "sheet", "tokens"  # kinds of files
FOREIGN = 0.1  # of a picture that came as one, what nano is taken to read of what it reads of its own pages: a guess, and not 0


@dataclass(frozen=True, slots=True)
class Unit:
    """What is shown as one: a page, one of a sketch, or a group that is on none."""

    first: int  # seq, by which the history is ordered
    number: int  # of the page, or its place on a sketch; 0 for a group
    tier: int  # at which it is shown, a number on the ladder
    page: StoredPage | None = None
    details: Details | None = None
    group: Group | None = None
    drawn: SketchPage | None = None

    @property
    def run(self) -> int | None:
        """Of pages that are text together or not at all; None of what is always text, and of what came as a page."""
        if self.drawn is not None:
            return self.drawn.run
        return self.details.run if self.details is not None and self.details.kind == "text" else None


@dataclass(frozen=True, slots=True)
class Plan:
    """What everything is shown at, oldest first."""

    units: tuple[Unit, ...]
    choices: tuple[Choices, ...]
    allocation: Allocation  # of all but the oldest that stay left out
    sketched: Sketched


class Planner:
    """Makes plans.  What a page costs and keeps is computed once."""

    def __init__(self, optics: Optics, settings: Settings) -> None:
        self.optics, self.settings = optics, settings
        self._known: dict[int, Choices] = {}
        self._read: dict[int, tuple[str, Details]] = {}  # what was read of pages, with what it was read of

    def plan(
        self,
        view: View,
        state: State,
        groups: Sequence[Group],
        budget: int,
        *,
        shown: Mapping[int, int] | None = None,
        sketched: Sketched | None = None,
    ) -> Plan:
        """groups    that are on no pages, oldest first
        shown     tiers at which pages were shown with this budget; None is what the store says
        sketched  what was sketched with this budget; None is what the store says

        Where all fits as it is shown, that is the plan.  Raises InputError where what must not fall does not fit.
        """
        if sketched is None:
            sketched = Sketched(state.sketched, tuple(map(self.optics.ladder.find, state.sketch)))
        asked = _Asked(view, state, self._pages(view), groups, budget, shown, sketched)
        ready = open_groups(groups)
        held = sum(group.stored[0].seq <= sketched.last for group in ready)
        limit = self.settings.policy.limit(budget)
        with suppress(InputError):
            found = self._allocated(asked, ready[:held])
            if found.allocation.receipt.tokens_before <= limit:
                return found
        ladder = self.optics.ladder
        page_rows, page_tokens = rows_of(ladder.size, ladder.cell), ladder.tiers[ladder.sharp].tokens
        room = limit - self._as_pages(asked, len(ready))
        split = drawn_part(ready, held, page_rows, page_tokens, self.settings.policy, limit, room)
        try:
            return self._allocated(asked, ready[:split])
        except InputError:
            if split == len(ready):
                raise
        return self._allocated(asked, ready)

    def _pages(self, view: View) -> list[tuple[StoredPage, Details]]:
        """All of them.  Their rows are read anew, for other processes may have written; what is as it was is not parsed again."""
        found, read = [], self._read
        self._read = {}
        for page in view.pages():
            text, details = read.get(page.number, ("", None))
            if details is None or text != page.details:
                details = Details.of(page)
            self._read[page.number] = page.details, details
            found.append((page, details))
        return found

    def _as_pages(self, asked: _Asked, ready: int) -> int:
        """Tokens of all but the last groups, so many, as sharp as pages are, where they have not aged."""
        sharp, total = self.optics.sharp, sum(group.tokens for group in asked.groups[: len(asked.groups) - ready])
        for page, details in asked.pages:
            tokens = self.choices(page, details).tokens
            total += tokens[max(self._held(page, details, asked.shown) or 0, sharp)] or 0
        return total

    def _allocated(self, asked: _Asked, sketched: Sequence[Group]) -> Plan:
        """With these groups on a sketch."""
        newest: dict[int, int] = {}
        for _, details in asked.pages:
            newest[details.run] = max(newest.get(details.run, 0), details.group)
        drawn = sketch(sketched, self.optics)
        first, last = (sketched[0].stored[0].seq, sketched[-1].stored[-1].seq) if sketched else (0, -1)
        now = max([asked.state.groups, *(group.number + 1 for group in asked.groups)])
        pins = _pins(asked.view, asked.state, asked.pages, self.optics.sharp)
        left = list(takewhile(lambda each: self._stays_left_out(*each, pins, asked), asked.pages))
        barred = {each.run for each in drawn if each.first <= asked.sketched.last and not asked.is_larger}
        while True:
            found = []
            for page, details in asked.pages[len(left) :]:
                held = self._held(page, details, asked.shown)
                unit = Unit(page.first, page.number, 0, page, details)
                candidate = self._candidate(unit, self.choices(page, details), held, newest[details.run], now, pins, asked)
                found.append((unit, replace(candidate, is_barred=True) if unit.run in barred else candidate))
            for place, each in enumerate(drawn):
                unit = Unit(each.first, place, 0, drawn=each)
                found.append((unit, self._of_sketch(unit, now, asked, is_barred=each.run in barred)))
            others = [group for group in asked.groups if not first <= group.stored[0].seq <= last]
            found += [(Unit(group.stored[0].seq, 0, 0, group=group), self._of_group(group, now)) for group in others]
            found.sort(key=lambda each: (each[0].first, each[0].number))
            units, candidates = [unit for unit, _ in found], [candidate for _, candidate in found]
            ladder = self.optics.ladder
            done = allocate(candidates, ladder.tiers, asked.budget, self.settings.policy, sheet_pages=ladder.sheet_pages)
            mixed = _mixed(units, done.tiers, barred)
            if not mixed:
                break
            barred |= mixed
        units = [replace(unit, tier=tier) for unit, tier in zip(units, done.tiers, strict=True)]
        choices = [candidate.choices for candidate in candidates]
        lowest = len(ladder.tiers) - 1
        units += [Unit(page.first, page.number, lowest, page, details) for page, details in left]
        choices += [self.choices(page, details) for page, details in left]
        order = sorted(range(len(units)), key=lambda at: (units[at].first, units[at].number))
        units, choices = [units[at] for at in order], [choices[at] for at in order]
        tiers = tuple(unit.tier for unit in units if unit.drawn is not None)
        shown = Sketched(last, tiers) if any(tiers) else Sketched()
        return Plan(tuple(units), tuple(choices), done, shown)

    def _stays_left_out(self, page: StoredPage, details: Details, pins: Mapping[int, int], asked: _Asked) -> bool:
        """Whether a page is shown no more, and nothing could raise it.

        The oldest pages are mostly such.  They cost nothing, gain nothing and are no news, so none of them needs a choice.
        """
        is_raised = asked.is_larger or page.number in pins or (details.raised and asked.shown is None)
        return not is_raised and self._held(page, details, asked.shown) == len(self.optics.ladder.tiers) - 1

    def choices(self, page: StoredPage, details: Details) -> Choices:
        """What a page costs and keeps at every tier."""
        found = self._known.get(page.number)
        if found is None:
            has_text = details.kind == "text" and (page.tier == "text" or (self.settings.archive and page.tier != "new"))
            found = self.optics.ladder.choices(
                page.text_tokens if has_text else None,
                facts_tokens=details.facts_tokens,
                facts_share=details.facts_share,
                name_tokens=self.optics.count(handle_text(page.number, "")),
                width=details.side or page.width,
            )
            if details.kind == "picture" and not self.optics.reads_pictures:
                found = replace(found, fidelity=tuple(share * FOREIGN for share in found.fidelity), is_measured=False)
            self._known[page.number] = found
        return found

    def forget(self, number: int) -> None:
        """What was known of a page that has changed."""
        self._known.pop(number, None)

    def _held(self, page: StoredPage, details: Details, shown: Mapping[int, int] | None) -> int | None:
        if shown is not None and page.number in shown:
            return shown[page.number]
        if page.tier in ("text", "new"):
            return self.optics.ladder.find(details.sketched) if details.sketched else None
        return self.optics.ladder.find(page.tier)

    def _candidate(
        self, unit: Unit, choices: Choices, held: int | None, group: int, now: int, pins: Mapping[int, int], asked: _Asked
    ) -> Candidate:
        page, details = unit.page, unit.details
        assert page is not None
        assert details is not None
        counts = importance(
            now, details.group, recalls=details.recalls, weight=page.weight, half_life=self.settings.policy.half_life
        )
        if details.ends and details.kind != "picture":  # of a page that is hardly begun there is little to keep
            counts *= len(details.ends) / rows_of(self.optics.ladder.size, self.optics.ladder.cell)
        rises = self.optics.sharp if details.raised and asked.shown is None else None
        if asked.is_larger:
            rises = 0 if choices.tokens[0] is not None else self.optics.sharp
        return Candidate(
            handle(page.number),
            choices,
            counts,
            group,
            held,
            rises,
            pins.get(page.number),
            "it is pinned" if page.number in pins else "",
            sheet_of(page.number - 1, max(self.optics.ladder.sheet_pages, 1)),
            rises_for="the budget is larger" if asked.is_larger else "recalled",
        )

    def _of_group(self, group: Group, now: int) -> Candidate:
        width = len(self.optics.ladder.tiers)
        choices = Choices((group.tokens, *[None] * (width - 1)), (1.0, *[0.0] * (width - 1)))
        counts = importance(now, group.number, half_life=self.settings.policy.half_life)
        name = f"m{group.stored[0].seq}"
        return Candidate(
            name, choices, counts, group.number, 0, None, 0, group.reason or "it is new", is_newest=group.reason is None
        )

    def _of_sketch(self, unit: Unit, now: int, asked: _Asked, *, is_barred: bool) -> Candidate:
        """A page that is not in the store: it is shown smaller, or not at all, but never on a contact sheet."""
        page, tiers = unit.drawn, self.optics.ladder.tiers
        assert page is not None
        choices = self.optics.ladder.choices(page.text_tokens)
        tokens = [None if tier.kind == "sheet" else cost for tier, cost in zip(tiers, choices.tokens, strict=True)]
        choices = replace(choices, tokens=tuple(tokens))
        counts = importance(now, page.group, half_life=self.settings.policy.half_life)
        is_known = page.last <= asked.sketched.last and unit.number < len(asked.sketched.tiers)
        held = asked.sketched.tiers[unit.number] if is_known else None  # what is new on it was text
        rises = 0 if asked.is_larger else None
        name, newest = f"m{page.first}", page.groups[-1].number
        return Candidate(name, choices, counts, newest, held, rises, rises_for="the budget is larger", is_barred=is_barred)


@dataclass(frozen=True, slots=True)
class _Asked:
    """What a plan is made of."""

    view: View
    state: State
    pages: Sequence[tuple[StoredPage, Details]]
    groups: Sequence[Group]
    budget: int
    shown: Mapping[int, int] | None
    sketched: Sketched

    @property
    def is_larger(self) -> bool:
        """Whether nothing was shown with this budget and less was with a smaller one: what the store still has may come back."""
        return not self.shown and 0 < self.state.aged_for < self.budget


def _pins(view: View, state: State, pages: Iterable[tuple[StoredPage, Details]], sharp: int) -> dict[int, int]:
    """Tiers that pages must not fall below; 0, text, holds for all pages of a run."""
    found: dict[int, int] = {}
    messages = dict(state.pins)
    showing = {number for seq in messages for number in view.pages_showing(seq, seq)}
    runs: set[int] = set()
    for page, details in pages:
        if details.pin or page.number in showing:
            is_page = details.pin == "page" or page.tier not in ("text", "new") or details.sketched not in ("", "text")
            found[page.number] = sharp if is_page else 0
            if found[page.number] == 0:
                runs.add(details.run)
    for page, details in pages:
        if details.run in runs and details.kind == "text":
            found[page.number] = 0
    return found


def _mixed(units: Sequence[Unit], tiers: Sequence[int], barred: set[int]) -> set[int]:
    """Runs of which some pages would be text and others not."""
    seen: dict[int, set[bool]] = {}
    for unit, tier in zip(units, tiers, strict=True):
        if unit.run is not None:
            seen.setdefault(unit.run, set()).add(tier == 0)
    return {run for run, found in seen.items() if len(found) > 1 and run not in barred}


# --- the store ----------------------------------------------------------------------------------------------------------------


def apply(change: Transaction, plan: Plan, optics: Optics, settings: Settings, watch: Watch = unwatched) -> list[str]:
    """Makes a plan what is; notes of pages whose pixels are damaged."""
    notes: list[str] = []
    left_text: dict[int, None] = {}
    for unit, choices in watch(list(zip(plan.units, plan.choices, strict=True)), "ageing"):
        if unit.page is None or unit.details is None:
            continue
        name = optics.ladder.tiers[unit.tier].name
        if name == unit.page.tier and not unit.details.raised:
            continue
        tokens = choices.tokens[unit.tier] or 0
        details = replace(unit.details, raised=False)
        if unit.tier > 0:
            side, more = _show(change, unit, optics, settings)
            details, notes = replace(details, side=side), notes + more
        change.change_page(unit.number, tier=name, tokens=tokens, details=details.to_json())
        if unit.page.tier in ("text", "new") and unit.details.kind == "text" and unit.tier > 0:
            left_text |= dict.fromkeys(seq for seq, _, _ in unit.details.rows)
    if left_text and not settings.archive:
        change.drop_text(_whole(change, left_text))
    notes += draw_sheets(change, optics)
    return notes


def _whole(view: View, seqs: Iterable[int]) -> list[int]:
    """Messages none of whose pages are text."""
    pages = {seq: view.pages_showing(seq, seq) for seq in seqs}
    return [seq for seq, numbers in pages.items() if all(view.page(number).tier != "text" for number in numbers)]


def _show(change: Transaction, unit: Unit, optics: Optics, settings: Settings) -> tuple[int, list[str]]:
    """Keeps the picture of a page at its tier; the side of the sharpest that is kept, where it aged, and what is wrong."""
    assert unit.page is not None
    assert unit.details is not None
    tier, was = optics.ladder.tiers[unit.tier], unit.details.side or unit.page.width
    notes: list[str] = []
    try:
        if tier.kind == "page" and tier.side < was:
            png, notes = whole_picture(change, unit.page, tier, optics)
            change.put_blob(unit.number, SHOWN, png, tier=tier.view)
        else:
            change.drop_blob(unit.number, SHOWN)
        kept = tier if tier.kind == "page" else _smallest(optics.ladder.tiers, was)
        if not settings.keep_sharp and kept is not None and kept.side < was:
            png, more = whole_picture(change, unit.page, kept, optics)
            change.put_blob(unit.number, PIXELS, png, tier=kept.view)
            change.drop_blob(unit.number, SHOWN)
            change.drop_blob(unit.number, TOKENS)
            change.drop_readings(unit.number)
            return kept.side, notes + more
    except PageCorrupted as damage:
        return unit.details.side, [*notes, str(damage)]
    return unit.details.side, notes


def _smallest(tiers: Sequence[Tier], side: int) -> Tier | None:
    fitting = [tier for tier in tiers if tier.kind == "page" and tier.side <= side]
    return fitting[-1] if fitting else None


def pixels_of(view: View, page: StoredPage) -> Pixels:
    """The sharpest that there is.  Raises PageCorrupted."""
    return from_png(_sharp(view, page))


def _sharp(view: View, page: StoredPage) -> bytes:
    if all(blob.kind != PIXELS for blob in view.blobs(page.number)):  # a copy was made while its file was damaged
        raise PageCorrupted(f"page {handle(page.number)} has no picture any more: forget it", page.number)
    return view.blob(page.number, PIXELS)


def picture(view: View, page: StoredPage, tier: Tier, optics: Optics) -> bytes:
    """The file of a page's picture at a tier, as it is kept.  Raises PageCorrupted."""
    return view.blob(page.number, SHOWN) if is_kept(view, page, tier) else at_tier(_sharp(view, page), tier, optics)


def whole_picture(view: View, page: StoredPage, tier: Tier, optics: Optics) -> tuple[bytes, list[str]]:
    """The same, and a note where the file that is kept is damaged: it is made anew of the sharpest.

    Raises PageCorrupted where that is damaged too.
    """
    try:
        return picture(view, page, tier, optics), []
    except PageCorrupted:
        png = at_tier(_sharp(view, page), tier, optics)
    return png, [f"the small picture of page {handle(page.number)} was damaged, and was made anew from the sharp one"]


def is_kept(view: View, page: StoredPage, tier: Tier) -> bool:
    """Whether there is a file of a page as small as it is at a tier."""
    return any(blob.kind == SHOWN and blob.tier == tier.view for blob in view.blobs(page.number))


def at_tier(content: bytes, tier: Tier, optics: Optics) -> bytes:
    """The file of a page's picture at a tier, made of a sharper one."""
    pixels = from_png(content)
    return content if pixels.shape[0] <= tier.side else as_png(optics.at(pixels, tier))


# --- contact sheets -----------------------------------------------------------------------------------------------------------


def draw_sheets(change: Transaction, optics: Optics, numbers: Iterable[int] = (), *, anew: Iterable[int] = ()) -> list[str]:
    """Draws the contact sheets that are shown and are not as they should be, and those of these numbers.

    A sheet shows all pages of its numbers that there are, at whatever tier they are shown: it changes as seldom as can be.
    """
    at = optics.ladder.sheet
    if at is None:
        return []
    pages: dict[int, list[StoredPage]] = {}
    shown = set(numbers)
    for page in change.pages():
        number = sheet_of(page.number - 1, optics.ladder.sheet_pages)
        pages.setdefault(number, []).append(page)
        if page.tier == optics.ladder.tiers[at].name:
            shown.add(number)
    notes: list[str] = []
    for number in sorted(shown & pages.keys()):
        if number in anew or not _is_drawn(change, pages[number]):
            notes += _draw_sheet(change, pages[number], optics)
    return notes


def _is_drawn(view: View, pages: Sequence[StoredPage]) -> bool:
    names = {blob.name for page in pages for blob in view.blobs(page.number) if blob.kind == SHEET}
    return len(names) == 1 and {blob.page for blob in view.pages_on(names.pop())} == {page.number for page in pages}


def _draw_sheet(change: Transaction, pages: Sequence[StoredPage], optics: Optics) -> list[str]:
    assert optics.ladder.sheet is not None
    tier, count = optics.ladder.tiers[optics.ladder.sheet], optics.ladder.sheet_pages
    places: list[Pixels | None] = [None] * count
    notes = []
    for page in pages:
        try:
            places[(page.number - 1) % count] = pixels_of(change, page)
        except PageCorrupted as damage:
            notes.append(str(damage))
    content = as_png(sheet_of_pages(places, tier, optics.ladder.size))
    for page in pages:
        change.put_blob(page.number, SHEET, content, tier=tier.name, place=(page.number - 1) % count)
    return notes


def check_budget(budget: object) -> int:
    """Raises InputError for what is none."""
    if isinstance(budget, bool) or not isinstance(budget, int) or budget < 0:
        raise InputError(f"a budget is a whole number of tokens, at least 0, got {repr(budget)[:80]}")
    return budget
