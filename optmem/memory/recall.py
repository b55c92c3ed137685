"""Recall: find lines, by words or by a glance over tokens; read those alone; say what they say, how surely, and from where."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

from optmem.errors import InputError, PageCorrupted
from optmem.memory.details import Details, handle, side_of
from optmem.memory.fit import fit, note, plain, stands_in, worths
from optmem.memory.messages import Message
from optmem.memory.optics import Optics
from optmem.memory.reading import PageReader, Said
from optmem.memory.records import StoredPage
from optmem.memory.settings import Settings
from optmem.memory.view import View
from optmem.memory.words import words
from optmem.pages.chat import is_label

Source = Literal["ocr", "verbatim", "factsheet"]


@dataclass(frozen=True, slots=True)
class Hit:
    """A line that answers."""

    text: str
    confidence: float  # that it is exactly what was said
    source: Source  # "ocr" was read from a page now, "verbatim" is the text as it came, "factsheet" the facts of its rows
    page: str | None  # "p12"; None where it is on no page yet
    lines: tuple[int, int]  # the first row of the page, and the one behind the last; of a message on no page, of its lines
    messages: tuple[int, ...]  # that stand there
    score: float = field(default=0.0, compare=False)  # by which it was found; higher is better
    facts: tuple[str, ...] = ()  # of these rows, exact
    fidelity: float | None = 1.0  # share of lines read without an error at the size at which the page is kept; None of a picture
    note: str = ""  # what should be known of it, such as that it is less sure than was asked
    fit: float = field(default=1.0, compare=False)  # share of the question's words that stand there, the rarest counting most


@dataclass(frozen=True, slots=True)
class Place:
    """Where something was found."""

    page: int | None
    row: int
    first: int  # seq
    last: int
    score: float
    text: str | None = field(default=None, repr=False)  # as it came, where that is kept
    fit: float = 1.0  # as of a hit
    note: str = ""  # where few of the words stand there


def search_lines(view: View, query: str, limit: int, settings: Settings, min_fit: float = 0.0) -> list[Place]:
    """By the lexical index, the best first, every line once, and none that fits less."""
    found: dict[tuple[int | None, int, int], Place] = {}
    worth = worths(*view.often(words(query)))
    asked = {word: plain(word) for word in worth}
    for each in view.search(query, limit * 3):
        line = each.line
        key = line.page, line.row, line.first if line.page is None else 0
        said = plain(line.text)
        held = [word for word, sought in asked.items() if stands_in(sought, said)]
        if key not in found and fit(worth, held) >= min_fit:
            keeps = line.page is None or settings.archive or is_label(line.text) or view.page(line.page).tier == "text"
            text = line.text if keeps else None
            fits, few = fit(worth, held), note(worth, held)
            found[key] = Place(line.page, line.row, line.first, line.last, each.score, text, fits, few)
    return list(found.values())[:limit]


class Answers:
    """Makes hits of places."""

    def __init__(self, optics: Optics, reader: PageReader, settings: Settings) -> None:
        self.optics, self.reader, self.settings = optics, reader, settings

    def hits(self, places: Sequence[Place], pages: dict[int, StoredPage], least: float | None) -> list[Hit]:
        """In their order; what is on a damaged page is said by its facts, or not at all."""
        wanted = [
            (pages[place.page], Details.of(pages[place.page]).line_at(place.row))
            for place in places
            if place.page is not None and place.text is None
        ]
        said = iter(self.reader.rows(wanted)) if wanted else iter(())
        found = []
        for place in places:
            if place.text is not None or place.page is None:
                hit: Hit | None = self._verbatim(place, pages)
            else:
                hit = self._read(place, pages[place.page], next(said), least)
            if hit is not None:
                told = "; ".join(filter(None, (hit.note, place.note)))
                found.append(replace(hit, fit=place.fit, note=told))
        return found

    def _verbatim(self, place: Place, pages: dict[int, StoredPage]) -> Hit:
        text = (place.text or "").rstrip("\n")
        if place.page is None:
            rows, seqs = (place.row, place.row + 1), tuple(sorted({place.first, place.last}))
            return Hit(text, 1.0, "verbatim", None, rows, seqs, place.score)
        details = Details.of(pages[place.page])
        line = details.line_at(place.row)
        seqs = details.messages_at(line)
        facts = facts_on(pages[place.page].factsheet, line)
        return Hit(text, 1.0, "verbatim", handle(place.page), (line.start, line.stop), seqs, place.score, facts)

    def _read(self, place: Place, page: StoredPage, said: Said | None, least: float | None) -> Hit | None:
        details = Details.of(page)
        line = details.line_at(place.row)
        facts = facts_on(page.factsheet, line)
        seqs = details.messages_at(line)
        fidelity = self.fidelity(page)
        if said is None:
            if not facts:
                return None
            damage = f"the picture of page {handle(page.number)} is damaged"
            return Hit(
                "  ".join(facts),
                1.0,
                "factsheet",
                handle(page.number),
                (line.start, line.stop),
                seqs,
                place.score,
                facts,
                fidelity,
                damage,
            )
        told = self._foreign(page)
        if least is not None and min(said.confidence, 1.0 if fidelity is None else fidelity) < least:
            exact = "" if fidelity is None else f": at {side_of(page)} pixels {fidelity:.0%} of lines are read exactly"
            told = f"read with {said.confidence:.3g}, less sure than the {least:g} asked for{exact}"
            if facts:
                told = f"the line itself was {told}; of its facts a text was kept"
                where = (line.start, line.stop)
                return Hit("  ".join(facts), 1.0, "factsheet", handle(page.number), where, seqs, place.score, facts, fidelity, told)
        text = said.text.rstrip("\n")
        where = (line.start, line.stop)
        return Hit(text, said.confidence, "ocr", handle(page.number), where, seqs, place.score, facts, fidelity, told)

    def whole(self, page: StoredPage, text: str | None) -> Hit:
        """All of a page.  Raises PageCorrupted.

        text   that it shows, where that is kept
        """
        details, name = Details.of(page), handle(page.number)
        seqs = tuple(seq for seq, _, _ in details.rows)
        facts = facts_on(page.factsheet, range(1 << 20))
        if text is not None:
            return Hit(text, 1.0, "verbatim", name, (0, len(details.ends)), seqs, facts=facts)
        said = self.reader.page(page)
        if said is None:
            raise PageCorrupted(f"the picture of page {name} is damaged: its facts are {facts or 'none'}", page.number)
        rows, fidelity, note = (0, len(said.rows)), self.fidelity(page), self._foreign(page)
        return Hit(said.text, said.confidence, "ocr", name, rows, seqs, facts=facts, fidelity=fidelity, note=note)

    def _foreign(self, page: StoredPage) -> str:
        """What should be known of a picture that came as one, and of all pages where the weights were never measured."""
        if Details.of(page).kind != "picture" or self.optics.engine.model.config.family != "nano":
            return self.optics.doubt
        return "this page came as a picture, and nano reads only pages that optmem draws"

    def fidelity(self, page: StoredPage) -> float | None:
        """Share of a page's lines that are read without an error from the pixels that are kept of it; None of a picture."""
        if Details.of(page).kind == "picture":
            return None
        ladder = self.optics.ladder
        found = ladder.curve.at(ladder.size, min(side_of(page), ladder.size), ladder.cell, complete=True)
        return found.score if found.exact_lines is None else found.exact_lines


def facts_on(factsheet: str, rows: range) -> tuple[str, ...]:
    """The facts that begin on these rows."""
    found: list[str] = []
    for line in factsheet.splitlines():
        number, _, facts = line.partition(": ")
        if number.isdecimal() and int(number) - 1 in rows:
            found += facts.split("  ")
    return tuple(found)


def check_query(query: object, limit: object, least: object, fits: object = None) -> None:
    """Raises InputError for what cannot be asked."""
    if not isinstance(query, str) or not query.strip():
        raise InputError(f"what is to be recalled is a text that is not blank, got {repr(query)[:80]}")
    if isinstance(limit, bool) or not isinstance(limit, int) or limit < 0:
        raise InputError(f"a limit is a whole number of at least 0, got {repr(limit)[:80]}")
    for name, share in (("min_confidence", least), ("min_fit", fits)):
        if share is not None and not (isinstance(share, int | float) and not isinstance(share, bool) and 0 <= share <= 1):
            raise InputError(f"{name} is from 0 to 1, got {repr(share)[:80]}")


def scan(messages: Iterable[tuple[int, Message]], asked: Sequence[str]) -> list[tuple[Place, frozenset[int]]]:
    """The lines of messages that hold any of these words, and which: for what the index has no lines of."""
    lowered = [word.lower() for word in asked]
    found = []
    for seq, message in messages:
        for row, line in enumerate(message.text().splitlines()):
            low = line.lower()
            held = frozenset(number for number, word in enumerate(lowered) if word in low)
            if held:
                found.append((Place(None, row, seq, seq, 0.0, line), held))
    return found


def rank(found: Sequence[tuple[Place, frozenset[int]]], limit: int, asked: Sequence[str] = (), min_fit: float = 0.0) -> list[Place]:
    """By the words that a line has, each worth the more the fewer lines have it; of equals, the newest.

    asked     the words, where what each line fits is to be told
    min_fit   what fits less is left out
    """
    often: dict[int, int] = {}
    for _, held in found:
        for number in held:
            often[number] = often.get(number, 0) + 1
    worth = {number: math.log(1 + len(found) / count) for number, count in often.items()}

    def score(each: tuple[Place, frozenset[int]]) -> float:
        return each[0].score + sum(worth[number] for number in each[1])

    naming = worths({word: often.get(number, 0) for number, word in enumerate(asked)}, len(found))
    ordered = sorted(found, key=lambda each: (-score(each), -each[0].last, each[0].row))
    best: list[Place] = []
    for place, numbers in ordered:
        there = [asked[number] for number in numbers] if asked else []
        if len(best) < limit and fit(naming, there) >= min_fit:
            best.append(
                replace(place, score=score((place, numbers)), fit=fit(naming, there), note=note(naming, there) if asked else "")
            )
    return best
