"""Ageing as an allocation: for every page a tier, to keep the most of importance x fidelity within a budget of tokens.

Of each page only the tiers on the upper concave hull of (tokens, importance x fidelity) are stepped on, from the fewest tokens up:
there every step gains less per token than the one before it, so that taking steps over all pages in the order of their gain takes
them in the order of the page too, and what is taken is worth as much as anything that costs the same.  The rest of the budget goes
to the best steps that still fit.  The whole is short of the best allocation by less than the one step that did not fit.

What holds besides:
- Nothing changes while what is shown fits the trigger: not by ageing, not by new messages.  A trigger that what is kept, pinned and
  excluded passes alone is none, and the budget is in its place.
- A page is never made sharper than it is shown, unless it was recalled, is pinned, or the budget was raised.
- A contact sheet is paid for once, as soon as one of its pages is shown on it.  Steps onto it are counted by shares; the sheets
  that keep least are then given up, until the others fit at their whole price.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from optmem.errors import InputError
from optmem.memory.policy import Policy
from optmem.memory.receipt import Change, Receipt
from optmem.memory.tiers import Choices, Tier

Ints = NDArray[np.int64]
Floats = NDArray[np.float64]
Flags = NDArray[np.bool_]
NO_SHEET = -1


@dataclass(frozen=True, slots=True)
class Candidate:
    """A page of the history, as an allocation sees it.  Tiers are numbers on the ladder, 0 the sharpest."""

    page: str  # its id
    choices: Choices
    importance: float
    group: int  # of messages, the newest that is on it; numbers rise with time
    held: int | None = None  # the tier it is shown at; None is new, and text
    rises_to: int | None = None  # the tier that it may be raised to
    floor: int | None = None  # the tier that it must not fall below
    reason: str = ""  # why it must not
    sheet: int = 0  # number of the contact sheet that it is on
    is_newest: bool = False  # it is held for being new already: its tokens are of those that the newest may take
    rises_for: str = "recalled"  # why it may be raised
    is_barred: bool = False  # from being text: others of its run cannot be


@dataclass(frozen=True, slots=True)
class Allocation:
    """What every page is shown at."""

    tiers: tuple[int, ...]  # of each candidate, in their order
    worth: float  # sum of importance x fidelity
    receipt: Receipt


def allocate(pages: Sequence[Candidate], tiers: Sequence[Tier], budget: int, policy: Policy, *, sheet_pages: int = 0) -> Allocation:
    """A tier for every page, oldest first.

    tiers         the ladder's
    budget        tokens of all that is shown
    sheet_pages   pages on a contact sheet, by which a step onto it is counted

    The same pages give the same allocation.  Raises InputError where what must not fall does not fit the budget.
    """
    if isinstance(budget, bool) or not isinstance(budget, int) or budget < 0:
        raise InputError(f"a budget is a whole number of tokens, at least 0, got {repr(budget)[:80]}")
    if not tiers or tiers[-1].kind != "stored":
        raise InputError("the last tier of a ladder is 'stored', which costs nothing")
    if not pages:
        return Allocation((), 0.0, Receipt(budget, 0, 0))
    state = _State(pages, tiers, sheet_pages)
    # What is barred from being text may need more as a page than its part of the text did.
    before, limit = max(state.total(state.current), state.total(state.sharpest)), policy.limit(budget)
    if before <= limit:
        return _answer(state, pages, tiers, budget, limit, state.sharpest)
    kept = state.keep(policy, limit, budget)
    least = state.total(state.bottom)
    if least > budget:
        raise InputError(_no_place(state, pages, tiers, least, budget))
    limit = limit if least <= limit else budget
    if before <= limit:
        return _answer(state, pages, tiers, budget, limit, state.sharpest)
    target = max(min(limit, max(before - policy.clear_at_least, limit // 2)), least)
    return _answer(state, pages, tiers, budget, limit, _fill(state, target), kept)


class _State:
    """The pages as arrays: N pages, M tiers."""

    def __init__(self, pages: Sequence[Candidate], tiers: Sequence[Tier], sheet_pages: int) -> None:
        count, last = len(pages), len(tiers) - 1
        self.rows = np.arange(count)
        self.tokens: Floats = np.array([page.choices.tokens for page in pages], dtype=np.float64)  # [N, M], NaN is no such tier
        if self.tokens.shape != (count, last + 1):
            raise InputError(f"every page needs its tokens at each of {last + 1} tiers")
        importance = np.array([page.importance for page in pages])
        self.value: Floats = importance[:, None] * np.array([page.choices.fidelity for page in pages])  # [N, M]
        if not (np.isfinite(self.value).all() and (importance >= 0).all() and not (self.tokens < 0).any()):
            raise InputError("importance and tokens of a page are numbers of at least 0, and its fidelity is a number")
        self.group = np.array([page.group for page in pages])
        self.is_newest = np.array([page.is_newest for page in pages])
        self.sheets = np.array([page.sheet for page in pages])
        self.column = next((number for number, tier in enumerate(tiers) if tier.kind == "sheet"), NO_SHEET)
        self.sheet_tokens = tiers[self.column].tokens if self.column != NO_SHEET else 0
        self.cost = self.tokens.copy()  # in shares
        if self.column != NO_SHEET:
            self.cost[:, self.column] *= 1 / max(sheet_pages, 1)
        self.allowed = self._allowed(pages, last)
        self.current: Ints = np.argmax(self.allowed, axis=1)
        self._bar(np.array([page.is_barred for page in pages]))
        self.sharpest: Ints = np.argmax(self.allowed, axis=1)
        # For a page that is pinned to a sheet, either price of the sheet may be the one that is paid.
        self.bottom = min((self._bottom(prices) for prices in (self.cost, self.tokens)), key=self.total)

    def _allowed(self, pages: Sequence[Candidate], last: int) -> Flags:
        """[N, M]: from where a page is shown down to where it must not fall below."""
        shown = np.array([0 if page.held is None else page.held for page in pages])
        raised = np.array([last if page.rises_to is None else page.rises_to for page in pages])
        floors = np.array([last if page.floor is None else page.floor for page in pages])
        starts = np.minimum(np.minimum(shown, raised), floors)  # a pin raises too
        columns, is_there = np.arange(last + 1), ~np.isnan(self.tokens)
        below = is_there & (columns >= starts[:, None])
        allowed = below & (columns <= floors[:, None])
        lost = ~allowed.any(axis=1)  # what it must not fall below is gone: the next tier that there is
        allowed[lost, np.argmax(below[lost], axis=1)] = True
        return np.asarray(allowed)

    def _bar(self, barred: Flags) -> None:
        """What is barred from being text is something else, where it may be."""
        others = self.allowed.copy()
        others[barred, 0] = False
        self.allowed = np.where(others.any(axis=1, keepdims=True), others, self.allowed)

    def _bottom(self, prices: Floats) -> Ints:
        """The tier with the fewest tokens; of several, the one that keeps most, and of these the sharpest."""
        cost = np.where(self.allowed, prices, np.inf)
        cheapest = cost == cost.min(axis=1, keepdims=True)
        return np.asarray(np.argmax(np.where(cheapest, self.value, -np.inf), axis=1))

    def total(self, chosen: Ints) -> int:
        """Tokens of all that is shown, each contact sheet counted once."""
        found = self.tokens[self.rows, chosen]
        on_sheet = chosen == self.column
        return round(float(found[~on_sheet].sum())) + self.sheet_tokens * len(np.unique(self.sheets[on_sheet]))

    def keep(self, policy: Policy, limit: int, budget: int) -> Ints:
        """Holds the pages of the newest groups where they are, as far as there is place; the rows of all that were to be held."""
        numbers, place = np.unique(self.group, return_inverse=True)
        first = 0 if policy.keep is None else int(np.searchsorted(numbers, numbers[-1] - policy.keep, side="right"))
        bottom = np.where(self.is_newest, 0.0, self.cost[self.rows, self.bottom])
        more = np.bincount(place, weights=self.cost[self.rows, self.sharpest] - bottom)  # tokens that holding each group takes
        oldest = _oldest_kept(more.tolist(), first, policy.kept_tokens(limit), must=policy.keep is not None)
        asked = oldest if policy.keep is None else first
        while oldest < len(numbers):
            held = self.rows[place >= oldest]
            bottom = self.bottom.copy()
            bottom[held] = self.sharpest[held]
            if self.total(bottom) <= budget:
                self.allowed[held] = np.arange(self.allowed.shape[1]) == self.sharpest[held][:, None]
                self.bottom = bottom
                break
            oldest += 1
        return self.rows[place >= asked]


def _oldest_kept(more: Sequence[float], first: int, most: float, *, must: bool) -> int:
    """The oldest group that fits together with all newer ones; the number of groups where none does.

    more   tokens that holding each group takes
    must   the newest in any case, where any is kept
    """
    oldest = max(len(more) - must, first)
    taken = sum(more[oldest:])
    while oldest > first and taken + more[oldest - 1] <= most:
        oldest -= 1
        taken += more[oldest]
    return oldest


# --- steps --------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Steps:
    """Steps up the hulls of all pages, the one that gains most per token first."""

    row: Ints
    start: Ints
    end: Ints
    cost: Floats


def _steps(state: _State) -> _Steps:
    """From each page's last vertex, the step of steepest gain, until none gains: the upper concave hull.  O(N M^2)."""
    at, slopes = state.bottom.copy(), np.full(len(state.rows), np.inf)
    found: list[tuple[Ints, Ints, Ints, Floats, Floats]] = []
    for _ in range(state.value.shape[1] - 1):
        more = state.cost - state.cost[state.rows, at][:, None]
        gain = state.value - state.value[state.rows, at][:, None]
        rises = state.allowed & (more > 0) & (gain > 0)
        slope = np.where(rises, gain / np.where(rises, more, 1.0), 0.0)
        best = slope.max(axis=1)
        # On a straight part of the hull every tier is a vertex: small steps fit where one large one does not.
        end = np.argmin(np.where(rises & (slope >= best[:, None] * (1 - 1e-12)), more, np.inf), axis=1)
        row = state.rows[best > 0]
        if not len(row):
            break
        slopes = np.minimum(slopes, best)  # rounding must not turn two steps of one page around
        found.append((row, at[row], end[row], more[row, end[row]], slopes[row]))
        at[row] = end[row]
    if not found:
        none = np.zeros(0, np.int64)
        return _Steps(none, none, none, np.zeros(0))
    row, start, end, cost, slope = (np.concatenate(parts) for parts in zip(*found, strict=True))
    number = np.repeat(np.arange(len(found)), [len(parts[0]) for parts in found])
    order = np.lexsort((number, -row, -slope))  # of equal gain, the newer page's
    return _Steps(row[order], start[order], end[order], cost[order])


def _fill(state: _State, target: int) -> Ints:
    """The tier of every page within so many tokens."""
    steps = _steps(state)
    left = target - state.total(state.bottom)
    taken = int(np.searchsorted(np.cumsum(steps.cost), left + 1e-6, side="right"))
    chosen = _take(state, steps, taken, target)
    if state.total(chosen) > target:  # sheets that must not be given up cost more than their shares
        least = 0
        while taken - least > 1:
            half = (least + taken) // 2
            least, taken = (half, taken) if state.total(_take(state, steps, half, target)) <= target else (least, half)
        chosen = _take(state, steps, least, target)
    _take_free_places(state, chosen)
    _take_what_fits(state, chosen, steps, target)
    _take_free_places(state, chosen)
    assert state.total(chosen) <= target
    return chosen


def _take(state: _State, steps: _Steps, count: int, target: int) -> Ints:
    """The first steps."""
    chosen = state.bottom.copy()
    chosen[steps.row[:count]] = steps.end[:count]  # of several steps of a page, the last one stands
    if state.column != NO_SHEET:
        _give_up_sheets(state, chosen, target)
    return chosen


def _give_up_sheets(state: _State, chosen: Ints, target: int) -> None:
    """Those that keep least, until the whole price of the others fits."""
    over = state.total(chosen) - target
    if over <= 0:
        return
    on_sheet = state.rows[chosen == state.column]
    loss = state.value[on_sheet, state.column] - state.value[on_sheet, state.bottom[on_sheet]]
    needed = state.cost[on_sheet, state.bottom[on_sheet]]
    numbers, place = np.unique(state.sheets[on_sheet], return_inverse=True)
    fixed = np.bincount(place, weights=state.bottom[on_sheet] == state.column, minlength=len(numbers)) > 0
    freed = state.sheet_tokens - np.bincount(place, weights=needed, minlength=len(numbers))
    price = np.bincount(place, weights=loss, minlength=len(numbers)) / np.maximum(freed, 1e-9)
    gone: list[int] = []
    for sheet in np.lexsort((numbers, price)):
        if over > 0 and not fixed[sheet] and freed[sheet] > 0:
            over -= round(float(freed[sheet]))
            gone.append(int(sheet))
    rows = on_sheet[np.isin(place, gone)]
    chosen[rows] = state.bottom[rows]


def _take_free_places(state: _State, chosen: Ints) -> None:
    """A sheet that is shown has all its pages on it, at no price."""
    if state.column == NO_SHEET:
        return
    shown = np.unique(state.sheets[chosen == state.column])
    gains = state.value[:, state.column] > state.value[state.rows, chosen]
    chosen[gains & state.allowed[:, state.column] & np.isin(state.sheets, shown)] = state.column


def _take_what_fits(state: _State, chosen: Ints, steps: _Steps, target: int) -> None:
    """The rest of the budget, step by step."""
    left = target - state.total(chosen)
    paid = {int(sheet) for sheet in state.sheets[chosen == state.column]}
    with_sheet = (steps.end == state.column) | (steps.start == state.column)
    possible = np.flatnonzero(with_sheet | (steps.cost <= left))
    least = 1.0 if with_sheet.any() else float(steps.cost[possible].min(initial=np.inf))
    each = zip(steps.row[possible].tolist(), steps.start[possible].tolist(), steps.end[possible].tolist(), strict=True)
    for row, start, end in each:
        if left < least:
            break
        if chosen[row] != start:
            continue
        price = _price(state, row, end, paid) - _price(state, row, start, paid)
        if price <= left:
            chosen[row] = end
            left -= price
            if end == state.column:
                paid.add(int(state.sheets[row]))


def _price(state: _State, row: int, tier: int, paid: set[int]) -> int:
    if tier == state.column:
        return 0 if int(state.sheets[row]) in paid else state.sheet_tokens
    return round(float(state.tokens[row, tier]))


# --- what is said of it -------------------------------------------------------------------------------------------------------


def _answer(
    state: _State,
    pages: Sequence[Candidate],
    tiers: Sequence[Tier],
    budget: int,
    limit: int,
    chosen: Ints,
    kept: Ints | None = None,
) -> Allocation:
    held = np.array([-1 if page.held is None else page.held for page in pages])
    shown = np.where(held < 0, state.current, held)
    before, after = state.total(state.current), state.total(chosen)
    over = f"{before - limit:,} tokens over the {'budget' if limit == budget else 'trigger'}"
    if before <= limit:
        over = "it cannot be text where others of its run are pages"
    rows = np.flatnonzero(shown != chosen)
    each = [found[rows].tolist() for found in (shown, chosen, _shares(state, shown), _shares(state, chosen))]
    names = [tier.name for tier in tiers]
    said: dict[tuple[int, int, int], str] = {}  # pages of one kind share most of their reason
    changes = []
    for row, start, end, was, now in zip(rows.tolist(), *each, strict=True):
        page = pages[row]
        key = id(page.choices), start, end
        if key not in said:
            said[key] = _read_after(page.choices, start, end, over)
        changes.append(Change(page.page, names[start], names[end], was, now, _why(page, start, end, said[key])))
    missed = 0 if kept is None else len(np.unique(state.group[kept[shown[kept] != chosen[kept]]]))
    total = 0 if kept is None else len(np.unique(state.group[kept]))
    notes = (f"{missed} of the {total} newest groups could not stay as they were: there is no place",) if missed else ()
    receipt = Receipt(budget, before, after, tuple(changes), notes)
    worth = float(state.value[state.rows, chosen].sum())
    return Allocation(tuple(chosen.tolist()), worth, receipt)


def _shares(state: _State, chosen: Ints) -> Floats:
    """Tokens of each page; on a contact sheet, its part of the sheet."""
    found = np.nan_to_num(state.tokens[state.rows, chosen])
    on_sheet = chosen == state.column
    _, place, count = np.unique(state.sheets[on_sheet], return_inverse=True, return_counts=True)
    found[on_sheet] = np.round(state.sheet_tokens / count[place], 2) if on_sheet.any() else 0.0
    return found


def _read_after(choices: Choices, start: int, end: int, over: str) -> str:
    if choices.tokens[start] is None:
        return "the tier that it had is no longer there"
    return f"{over}: {choices.fidelity[start]:.0%} can be read before and {choices.fidelity[end]:.0%} after, of importance "


def _why(page: Candidate, start: int, end: int, said: str) -> str:
    if end < start:
        return page.reason if page.rises_to is None or (page.floor is not None and end <= page.floor) else page.rises_for
    if said[-1] == " ":
        said += f"{page.importance:.3g}"
    return f"{said}; not below, for {page.reason}" if page.floor == end and page.reason else said


def _no_place(state: _State, pages: Sequence[Candidate], tiers: Sequence[Tier], least: int, budget: int) -> str:
    costs = state.tokens[state.rows, state.bottom]
    worst = int(np.argmax(costs))
    held = f"page {pages[worst].page[:16]} as {tiers[int(state.bottom[worst])].name} alone needs {costs[worst]:,.0f}"
    return f"what is pinned or excluded needs {least:,} tokens ({held}), the budget is {budget:,}: raise it, or unpin pages"
