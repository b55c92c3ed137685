"""The newest messages, which fill no page yet, as pages that are drawn for a context alone.

Their text stays in the store until enough is said after them, so nothing is given up by showing them smaller; what follows is drawn
behind them, and pages that are full do not change.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from optmem.memory.drawing import Group, cut, lay_out, rows_of
from optmem.memory.optics import Optics, as_png
from optmem.memory.policy import Policy
from optmem.memory.tiers import Tier
from optmem.pages import Page, draw_pages


@dataclass(frozen=True, slots=True)
class SketchPage:
    """One of them."""

    run: int  # below 0, -1 the oldest: its pages are text together or not at all
    groups: tuple[Group, ...]  # of its run, as far as they are sketched
    first: int  # seq
    last: int
    group: int  # how many groups were before the newest that is on it
    text_tokens: int  # its part of the text
    page: Page

    def picture(self, tier: Tier, optics: Optics) -> bytes:
        """The file of its picture at a tier."""
        (pixels,) = draw_pages([self.page])
        return as_png(optics.at(pixels, tier))


@dataclass(frozen=True, slots=True)
class Sketched:
    """What was shown of a sketch, so that it stays so."""

    last: int = 0  # seq of the newest message on it; 0 is none
    tiers: tuple[int, ...] = ()  # of its pages


def sketch(groups: Sequence[Group], optics: Optics) -> list[SketchPage]:
    """The pages of groups, in the runs in which they will be drawn."""
    number_of = {each.seq: group.number for group in groups for each in group.stored}
    runs = [run for run in cut(groups, rows_of(optics.ladder.size, optics.ladder.cell)) if isinstance(run, list) and run]
    return [
        SketchPage(-number, tuple(run), min(seqs), max(seqs), max(number_of[seq] for seq in seqs), tokens, page)
        for number, run in enumerate(runs, 1)
        for page, seqs, tokens in lay_out(run, optics)
    ]


def not_yet(runs: Sequence[list[Group] | Group], policy: Policy, limit: int) -> int:
    """How many of the last runs, the open one at their end, are not to be drawn for good: the newest text is kept of them."""
    count, groups, tokens = 1, list(runs[-1]) if isinstance(runs[-1], list) else [], 0
    tokens, most = sum(group.tokens for group in groups), policy.kept_tokens(limit)
    for run in reversed(runs[:-1]):
        is_enough = tokens >= most or (policy.keep is not None and len(groups) >= policy.keep)
        if is_enough or not isinstance(run, list) or len(open_groups(run)) < len(run):
            break
        groups, tokens = [*run, *groups], tokens + sum(group.tokens for group in run)
        count += 1
    return count


def open_groups(groups: Sequence[Group]) -> Sequence[Group]:
    """Of the groups that are on no page the last ones, that may be sketched together."""
    count = 0
    for group in reversed(groups):
        if group.reason is not None or group.is_rest or group.is_pinned or group.attachments:
            break
        count += 1
    return groups[len(groups) - count :]


def drawn_part(groups: Sequence[Group], least: int, page_rows: int, page_tokens: int, policy: Policy, limit: int, room: int) -> int:
    """How many of the groups go on a sketch; the newer ones stay text.

    least       that are on it already
    page_rows   rows of a page, page_tokens   what it costs
    limit       tokens of all that is shown, room   of these, what is left where all else is pages

    Text stay those that the policy keeps for being new, those that there is room for, and of the others as many as cost no more as
    text than the pages that they would need.
    """
    end = _kept(groups, least, policy.kept_tokens(limit), policy.keep)
    if policy.keep and least < end == len(groups) and groups[-1].tokens <= limit:
        end -= 1  # the newest in any case, where any was asked for
    rows = sum(group.rows for group in groups[:end])
    end = min(end, _kept(groups, least, room - _pages(rows, page_rows) * page_tokens, None))
    rows = sum(group.rows for group in groups[:end])
    best, cheapest, text = end, float("inf"), 0
    for at in range(end, least - 1, -1):
        cost = _pages(rows, page_rows) * page_tokens + text
        if cost <= cheapest:
            best, cheapest = at, cost
        if at:
            text += groups[at - 1].tokens
            rows -= groups[at - 1].rows
    return best


def _pages(rows: int, page_rows: int) -> int:
    return -(-rows // page_rows)


def _kept(groups: Sequence[Group], least: int, tokens: int, most: int | None) -> int:
    """The first of the newest groups that fit, so many at most."""
    end = len(groups)
    while end > least and (most is None or len(groups) - end < most) and groups[end - 1].tokens <= tokens:
        end -= 1
        tokens -= groups[end].tokens
    return end
