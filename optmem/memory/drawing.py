"""The text of messages as pages: cut into runs of whole groups, each of which is drawn once and never changes.

A run is closed when what follows does not fit on its last page and that is nearly full; until then its text is kept, whatever it is
shown as.  Where runs are cut depends on the messages alone, not on when they are drawn.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from itertools import groupby, pairwise, takewhile

from optmem.errors import OptmemError
from optmem.images import Pixels, load_images
from optmem.memory.details import NEW, Details, handle
from optmem.memory.factsheet import factsheet
from optmem.memory.messages import Message
from optmem.memory.optics import Optics, as_png
from optmem.memory.parts import Attachment, attachments_of
from optmem.memory.policy import Policy
from optmem.memory.records import NewLine, NewPage, StoredMessage
from optmem.memory.settings import Settings, State
from optmem.memory.transaction import Transaction
from optmem.memory.view import View
from optmem.pages import Line, Page, draw_pages, paginate
from optmem.pages.page import Box

MOST_PAGES = 4  # of a run to which small groups are still added
FREE = 2  # rows of a page that may stay free for the sake of what follows
PIXELS = "pixels"  # kinds of files
AT_ONCE = 32  # runs drawn in one transaction


@dataclass(frozen=True)
class Group:
    """A group of the history that is not on pages yet."""

    stored: tuple[StoredMessage, ...]
    number: int  # how many groups were before it
    is_rest: bool = False  # of a group that is on pages as far as it was there
    reason: str | None = None  # why it stays text
    is_pinned: bool = False  # it is drawn by itself, for it ages by itself

    @cached_property
    def messages(self) -> tuple[Message, ...]:
        """As they came."""
        return tuple(Message.from_json(each.content or "", f"message {each.seq}") for each in self.stored)

    @property
    def tokens(self) -> int:
        """As text."""
        return sum(each.tokens for each in self.stored)

    @cached_property
    def rows(self) -> int:
        """On a page of the size that pages have; its own lines alone."""
        return sum(1 for _, line in _lines(self._drawn) if line.text)

    @property
    def _drawn(self) -> list[tuple[StoredMessage, list[Page]]]:
        pairs = zip(self.stored, self.messages, strict=True)
        return [(each, paginate([message.drawable()])) for each, message in pairs]

    @cached_property
    def attachments(self) -> list[tuple[int, Attachment]]:
        """Pictures and documents, with the number of their message."""
        pairs = zip(self.stored, self.messages, strict=True)
        return [(each.seq, part) for each, message in pairs for part in attachments_of(message.parts)]


@dataclass(frozen=True, slots=True)
class Tail:
    """What is not on pages, in order."""

    groups: tuple[Group, ...]


def read_groups(view: View, state: State, policy: Policy) -> Iterator[Group]:
    """The groups that are not on pages yet, oldest first."""
    number, pinned = state.groups, {seq for seq, _ in state.pins}
    for group, stored in groupby(view.messages(state.drawn + 1), key=lambda each: each.group):
        is_rest = group <= state.drawn
        found = Group(tuple(stored), number - is_rest, is_rest)
        yield replace(found, reason=_excluded(found, policy), is_pinned=any(each.seq in pinned for each in found.stored))
        number += not is_rest


def kept_groups(view: View, state: State) -> Iterator[Group]:
    """Groups that stay text though what is behind them is on pages."""
    for seq, number in state.kept:
        stored = tuple(takewhile(partial(_is_in, seq), view.messages(seq)))
        if stored:
            yield Group(stored, number, reason="its role or tool is excluded")


def _is_in(group: int, message: StoredMessage) -> bool:
    return message.group == group


def _excluded(group: Group, policy: Policy) -> str | None:
    if group.is_rest or not (policy.exclude or any(each.role in policy.exclude_roles for each in group.stored)):
        return None
    tools = [call.name for message in group.messages for call in message.calls]
    return policy.excludes([each.role for each in group.stored], tools)


def cut(groups: Iterable[Group], page_rows: int) -> Iterator[list[Group] | Group]:
    """Runs that are closed, and groups that stay text, in order; the last item is the run that is still open, perhaps empty."""
    run: list[Group] = []
    rows = 0
    for group in groups:
        if group.reason is not None:
            if run:
                yield run
            yield group
            run, rows = [], 0
            continue
        place = -(-(rows + 1) // page_rows) * page_rows - 1  # the end of the text has a row: it would get a page of its own
        is_full = rows + group.rows > place and (place - rows <= FREE or place >= MOST_PAGES * page_rows - 1)
        if run and ((is_full and rows % page_rows) or group.is_pinned):
            yield run
            run, rows = [], 0
        run.append(group)
        rows += group.rows
        if group.attachments or group.is_rest or group.is_pinned:
            yield run
            run, rows = [], 0
    yield run


def behind(state: State, done: list[Group] | Group) -> State:
    """Where the history is once this is on pages, or stays text."""
    groups = [done] if isinstance(done, Group) else done
    last = groups[-1]
    count = max(state.groups, last.number + 1)
    drawn = last.stored[-1].seq
    state = replace(state, drawn=drawn, groups=count)
    if isinstance(done, Group):
        return replace(state, kept=(*state.kept, (done.stored[0].seq, done.number)))
    return replace(state, sketched=0, sketch=()) if state.sketched <= drawn else state


# --- drawing ------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Row:
    """A row of a run: its line and the message that it shows."""

    seq: int
    line: Line


def _lines(drawn: Sequence[tuple[StoredMessage, list[Page]]]) -> Iterator[tuple[int, Line]]:
    for each, pages in drawn:
        for page in pages:
            yield from ((each.seq, line) for line in page.lines)


@dataclass(frozen=True, slots=True)
class Drawn:
    """A page that the store is to have, without the number of its run."""

    page: NewPage
    details: Details
    png: bytes


def draw_runs(runs: Sequence[Sequence[Group]], optics: Optics, settings: Settings) -> tuple[list[list[Drawn]], list[str]]:
    """The pages of every run, and what could not be drawn."""
    laid = [list(lay_out(run, optics)) for run in runs]
    flat = [page for pages in laid for page, _, _ in pages]
    images = iter(draw_pages(flat))
    found: list[list[Drawn]] = []
    notes: list[str] = []
    for run, pages in zip(runs, laid, strict=True):
        drawn = list(_text_pages(run, pages, [next(images) for _ in pages], optics, settings))
        for group in run:
            for seq, part in group.attachments:
                try:
                    drawn += _attached(seq, part, group, optics, settings)
                except OptmemError as error:
                    notes.append(f"a {part.kind} of message {seq} is on no page: {error}")
        found.append(drawn)
    return found, notes


def lay_out(groups: Sequence[Group], optics: Optics) -> Iterator[tuple[Page, list[int], int]]:
    """The pages of groups, with the messages that each shows and its part of their tokens as text.

    The end of a text that fills its last page would have one of its own: it has none.
    """
    pages, seqs = _lay_out(groups, optics)
    if len(pages) > 1 and not any(line.text.strip("\n") for line in pages[-1].lines):
        pages = pages[:-1]
    tokens = _shares(sum(group.tokens for group in groups), [len(page.lines) for page in pages])
    at = 0
    for page, share in zip(pages, tokens, strict=True):
        yield page, seqs[at : at + len(page.lines)], share
        at += len(page.lines)


def _lay_out(run: Sequence[Group], optics: Optics) -> tuple[list[Page], list[int]]:
    """The pages of a run, and for each of their rows the message that stands on it."""
    shown = [message.drawable(str(each.seq)) for group in run for each, message in zip(group.stored, group.messages, strict=True)]
    pages = paginate(shown, size=optics.ladder.size)
    rows = [seq for group in run for seq, line in _lines(group._drawn) if line.text]
    missing = sum(len(page.lines) for page in pages) - len(rows)
    return pages, rows + [rows[-1]] * missing  # the end of the text may have a row of its own


def _text_pages(
    run: Sequence[Group],
    pages: Sequence[tuple[Page, list[int], int]],
    images: Sequence[Pixels],
    optics: Optics,
    settings: Settings,
) -> Iterator[Drawn]:
    number_of = {each.seq: group.number for group in run for each in group.stored}
    is_rest = any(group.is_rest for group in run)
    for (page, seqs, share), image in zip(pages, images, strict=True):
        rows = list(map(_Row, seqs, page.lines))
        spans = tuple(_spans(rows))
        ends = "".join("1" if row.line.text.endswith("\n") else "0" for row in rows)
        details = Details(0, max(number_of[seq] for seq, _, _ in spans), rows=spans, ends=ends)
        facts = ""
        if settings.index == "text":
            sheet = factsheet([row.line.text for row in rows], settings.policy.facts, count=optics.count)
            facts, details = sheet.text(), replace(details, facts_share=sheet.share)
        yield Drawn(
            NewPage(
                page.id,
                tuple(seq for seq, _, _ in spans),
                NEW if is_rest else "text",
                page.height,
                page.width,
                optics.ladder.cell,
                share,
                share,
                facts,
                lines=tuple(index_lines(rows, ends)) if settings.index == "text" else (),
            ),
            details,
            as_png(image),
        )


def _spans(rows: Sequence[_Row]) -> Iterator[tuple[int, int, int]]:
    at = 0
    for seq, some in groupby(rows, key=lambda row: row.seq):
        count = len(list(some))
        yield seq, at, at + count
        at += count


def index_lines(rows: Sequence[_Row], ends: str) -> Iterator[NewLine]:
    """The lines of a page, those that go over several rows in one."""
    first = 0
    for number, end in enumerate(ends):
        if end == "1" or number == len(ends) - 1:
            some = rows[first : number + 1]
            text = "".join(row.line.text for row in some)
            if text.strip():
                yield NewLine(first, text, some[0].seq, some[-1].seq)
            first = number + 1


def _shares(total: int, weights: Sequence[int]) -> list[int]:
    """Whole numbers in these proportions, of this sum."""
    whole, before, edges = max(sum(weights), 1), 0, [0]
    for weight in weights:
        before += weight
        edges.append(total * before // whole)
    return [stop - start for start, stop in pairwise(edges)]


def _attached(seq: int, part: Attachment, group: Group, optics: Optics, settings: Settings) -> Iterator[Drawn]:
    if part.media_type == "text/plain":
        for page in paginate(part.data.decode("utf-8", "replace"), size=optics.ladder.size, name=part.title or "document"):
            rows = [_Row(seq, line) for line in page.lines]
            ends = "".join("1" if row.line.text.endswith("\n") else "0" for row in rows)
            details = Details(0, group.number, "document", ((seq, 0, max(len(rows), 1)),), ends)
            lines = tuple(index_lines(rows, ends)) if settings.index == "text" else ()
            yield _picture(seq, page.image(), details, lines, optics)
        return
    for number, found in enumerate(load_images(part.data), 1):
        name = f"{part.title or part.kind} {number}"
        details = Details(0, group.number, "picture", ((seq, 0, 1 << 10),), was_read=settings.index == "optical")
        yield _picture(seq, optics.page_of(found.image(), name), details, (), optics)


def _picture(seq: int, pixels: Pixels, details: Details, lines: tuple[NewLine, ...], optics: Optics) -> Drawn:
    from optmem.pixels import image_id

    height, width = pixels.shape[:2]
    page = NewPage(image_id(pixels), (seq,), NEW, height, width, optics.ladder.cell, 0, 0, lines=lines)
    return Drawn(page, details, as_png(pixels))


def keep_runs(change: Transaction, runs: Sequence[Sequence[Drawn]], optics: Optics) -> int:
    """Puts the pages of runs into the store; how many of them a sketch showed, which stay at its tiers."""
    state, place = State.of(change), 0
    for run in runs:
        first = 0
        for drawn in run:
            number = change.add_page(drawn.page)
            first = first or number
            beside = handle_text(number, drawn.page.factsheet)
            details = replace(drawn.details, run=first, facts_tokens=optics.count(beside))
            if details.kind == "text" and state.drawn < drawn.page.messages[0] <= state.sketched and place < len(state.sketch):
                details, place = replace(details, sketched=state.sketch[place]), place + 1
            change.change_page(number, details=details.to_json())
            change.put_blob(number, PIXELS, drawn.png, tier="sharp")
            if not details.was_read:
                change.set("unread", "true")
    return place


def handle_text(number: int, facts: str) -> str:
    """What is said beside a page's picture."""
    return f"[{handle(number)}]\n{facts}"


def rows_of(page_height: int, cell: str) -> int:
    """How many rows a page has."""
    return page_height // int(cell.partition("x")[2])


__all__ = ["Box", "Drawn", "Group", "Tail", "cut", "draw_runs", "keep_runs", "read_groups", "rows_of"]
