"""Forgetting: messages with their groups, and every page that shows them, for good; what shared a page with them is drawn anew.

Where a page was still shown as text, what is left of its run is drawn from the text.  Where only pixels are left, the rows of what
is forgotten are cut out of them and the rows below move up.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np

from optmem.errors import InputError
from optmem.images import Pixels
from optmem.memory.ageing import SHOWN, draw_sheets, pixels_of
from optmem.memory.check import Verified
from optmem.memory.details import Details, handle
from optmem.memory.drawing import PIXELS, Group, draw_runs, handle_text, keep_runs
from optmem.memory.ladder import sheet_of
from optmem.memory.messages import Message
from optmem.memory.optics import Optics, as_png
from optmem.memory.records import NewLine, NewPage, StoredLine, StoredMessage, StoredPage
from optmem.memory.settings import STATE, Settings, State
from optmem.memory.transaction import Transaction
from optmem.memory.view import View

SHORTEST, NEEDLES = 12, 200  # characters of a text that is searched for afterwards, and how many of them


@dataclass(frozen=True, slots=True)
class Forgotten:
    """What was forgotten, and what a search of every byte said of it."""

    messages: tuple[int, ...]  # more than were asked for where they belong to groups
    pages: tuple[str, ...]
    redrawn: tuple[str, ...]  # pages in place of these, without what was forgotten
    searched: int  # texts and files that were searched for
    verified: Verified | None  # None where no search was asked for

    @property
    def is_proven(self) -> bool:
        """Nothing of it was found, and the memory is whole."""
        return self.verified is not None and self.verified.is_clean


class Forgetting:
    """Of some messages, in one transaction."""

    def __init__(self, change: Transaction, seqs: Iterable[int], optics: Optics, settings: Settings) -> None:
        self.change, self.optics, self.settings = change, optics, settings
        self.seqs = _with_groups(change, seqs)
        gone = set(self.seqs)
        numbers = {number for seq in gone for number in change.pages_showing(seq, seq)}
        hit = [(change.page(number), Details.of(change.page(number))) for number in sorted(numbers)]
        text_runs = {details.run for page, details in hit if details.kind == "text" and page.tier == "text"}
        self.redrawn_runs = {run: list(_run(change, run)) for run in sorted(text_runs)}
        of_runs = {page.number for some in self.redrawn_runs.values() for page, _ in some}
        self.cut = [(page, details) for page, details in hit if page.number not in of_runs]
        self.pages = sorted(numbers | of_runs)

    def needles(self) -> list[str | bytes]:
        """Texts and files that must be nowhere afterwards, if nothing else holds them."""
        texts = dict.fromkeys(text for text in self._texts() if len(text) >= SHORTEST)
        files: list[str | bytes] = []
        for number in self.pages:
            for blob in self.change.blobs(number):
                if all(other.page in self.pages for other in self.change.pages_on(blob.name)):
                    try:
                        files.append(self.change.bytes_of(blob))
                    except Exception:  # noqa: S112 - damaged: what is not there cannot be searched for
                        continue
        return [*list(texts)[:NEEDLES], *files[:NEEDLES]]

    def _texts(self) -> Iterator[str]:
        for seq in self.seqs:
            for each in self.change.messages(seq, seq):
                if each.content is not None:
                    yield from (line.strip() for line in Message.from_json(each.content).text().splitlines())
        gone = set(self.seqs)
        for page, _ in self.cut:
            yield from (line.text.strip() for line in self.change.lines(page.number) if gone & {line.first, line.last})

    def carry_out(self) -> tuple[list[int], list[str]]:
        """Numbers of the pages that are there instead, and what went wrong."""
        change, gone = self.change, set(self.seqs)
        left = [(page, details, self._cut_out(page, details, gone)) for page, details in self.cut]
        groups = [self._left_of(run, pages, gone) for run, pages in self.redrawn_runs.items()]
        drawn, notes = draw_runs([each for each in groups if each], self.optics, self.settings)
        per_sheet = max(self.optics.ladder.sheet_pages, 1)
        sheets = {sheet_of(number - 1, per_sheet) for number in self.pages if self._is_on_sheet(number)}
        before = {page.number for page in change.pages()}
        change.erase(pages=self.pages, messages=self.seqs)
        keep_runs(change, drawn, self.optics)
        for page, details, rest in left:
            if rest is not None:
                self._keep_rest(page, details, rest)
        notes += draw_sheets(change, self.optics, sheets, anew=sheets)
        self._settle_state(gone)
        return [page.number for page in change.pages() if page.number not in before], notes

    def _is_on_sheet(self, number: int) -> bool:
        return any(blob.place is not None for blob in self.change.blobs(number))

    def _left_of(self, run: int, pages: Sequence[tuple[StoredPage, Details]], gone: set[int]) -> list[Group]:
        """The groups of a run without those that are forgotten."""
        stored: dict[int, list[StoredMessage]] = {}
        number = min(details.group for _, details in pages)
        seqs = sorted({seq for _, details in pages for seq, _, _ in details.rows} - gone)
        for seq in seqs:
            for each in self.change.messages(seq, seq):
                if each.content is None:
                    raise InputError(f"message {seq} of run {run} has lost its text")
                stored.setdefault(each.group, []).append(each)
        return [Group(tuple(each), number) for each in stored.values()]

    def _cut_out(self, page: StoredPage, details: Details, gone: set[int]) -> _Rest | None:
        """What is left of a page; None where nothing is."""
        spans = [span for span in details.rows if span[0] not in gone]
        if not spans or details.kind != "text":
            return None
        rows = [row for _, first, stop in spans for row in range(first, stop)]
        height = page.height // max(page.height // int(page.cell.partition("x")[2]), 1)
        height = height * pixels_of(self.change, page).shape[0] // page.height
        return _Rest(
            tuple(rows), cut_rows(pixels_of(self.change, page), rows, height), tuple(self.change.lines(page.number)), tuple(spans)
        )

    def _keep_rest(self, page: StoredPage, details: Details, rest: _Rest) -> None:
        change, place = self.change, {row: at for at, row in enumerate(rest.rows)}
        ends = "".join(details.ends[row] for row in rest.rows if row < len(details.ends))
        spans = tuple((seq, place[first], place[stop - 1] + 1) for seq, first, stop in rest.spans)
        lines = tuple(NewLine(place[line.row], line.text, line.first, line.last) for line in rest.lines if line.row in place)
        facts = _moved(page.factsheet, place)
        share = page.text_tokens * len(rest.rows) // max(len(details.ends), 1)
        seqs = tuple(sorted({seq for seq, _, _ in spans}))
        shape = page.height, page.width, page.cell
        identity = hashlib.sha256(rest.pixels.tobytes()).hexdigest()
        number = change.add_page(
            NewPage(identity, seqs, page.tier, *shape, page.tokens, share, facts, weight=page.weight, lines=lines)
        )
        facts_share = details.facts_share if facts else 0.0
        facts_tokens = self.optics.count(handle_text(number, facts))
        kept = replace(details, rows=spans, ends=ends, facts_tokens=facts_tokens, facts_share=facts_share)
        change.change_page(number, details=kept.to_json())
        change.put_blob(number, PIXELS, as_png(rest.pixels), tier="sharp")
        tier = next((each for each in self.optics.ladder.tiers if each.name == page.tier and each.kind == "page"), None)
        if tier is not None and tier.side < rest.pixels.shape[0]:
            change.put_blob(number, SHOWN, as_png(self.optics.at(rest.pixels, tier)), tier=tier.view)

    def _settle_state(self, gone: set[int]) -> None:
        state = State.of(self.change)
        latest = self.change.last_seq()
        is_open = bool(state.waiting) and not any(seq > latest for seq in gone)
        kept = tuple(pair for pair in state.kept if pair[0] not in gone)
        pins = tuple(pair for pair in state.pins if pair[0] not in gone)
        waiting = state.waiting if is_open else ()
        self.change.set(
            STATE, replace(state, kept=kept, pins=pins, waiting=waiting, waited=state.waited if is_open else 0).to_json()
        )


@dataclass(frozen=True, slots=True)
class _Rest:
    """What is left of a page whose text is gone."""

    rows: tuple[int, ...]
    pixels: Pixels
    lines: tuple[StoredLine, ...]
    spans: tuple[tuple[int, int, int], ...]


def cut_rows(pixels: Pixels, rows: Sequence[int], height: int) -> Pixels:
    """A page that has these rows alone, from the top."""
    found = np.full_like(pixels, 255)
    for at, row in enumerate(rows):
        band = pixels[row * height : (row + 1) * height]
        found[at * height : at * height + len(band)] = band
    return found


def _moved(factsheet: str, place: dict[int, int]) -> str:
    lines = []
    for line in factsheet.splitlines():
        number, _, facts = line.partition(": ")
        if number.isdecimal() and int(number) - 1 in place:
            lines.append(f"{place[int(number) - 1] + 1}: {facts}\n")
    return "".join(lines)


def _with_groups(view: View, seqs: Iterable[int]) -> list[int]:
    """With all that belongs to their groups."""
    found: set[int] = set()
    for seq in seqs:
        if seq in found:
            continue
        (message,) = view.messages(seq, seq)
        for each in view.messages(message.group):
            if each.group != message.group:
                break
            found.add(each.seq)
    return sorted(found)


def _run(view: View, run: int) -> Iterator[tuple[StoredPage, Details]]:
    """The pages of a run."""
    for page in view.pages():
        details = Details.of(page)
        if details.run == run:
            yield page, details


def names(numbers: Iterable[int]) -> tuple[str, ...]:
    """What pages are called."""
    return tuple(map(handle, numbers))
