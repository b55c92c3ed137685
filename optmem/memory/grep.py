"""Finding lines in vision tokens: words are looked for by a glance over all pages, with no text kept and none made."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch

from optmem.engine.sift import Sieve
from optmem.errors import InputError
from optmem.items import Watch, in_parts, unwatched
from optmem.memory.details import Details
from optmem.memory.messages import Message
from optmem.memory.optics import Optics
from optmem.memory.reading import PageReader
from optmem.memory.recall import Place, rank, scan
from optmem.memory.records import StoredMessage, StoredPage
from optmem.memory.settings import State
from optmem.memory.view import View
from optmem.memory.words import words

LEAST = 0.5  # a symbol of what is found is as likely as this
SHORTEST = 3  # letters of a word: shorter ones stand inside all others
AT_ONCE = 32  # pages: what they need besides is 64 MiB
_MARKS = ".,;:!?\"'()[]{}<>"


class Grep:
    """Looks into the pages of one memory."""

    def __init__(self, optics: Optics, reader: PageReader, watch: Watch = unwatched) -> None:
        self.optics, self.reader, self.watch = optics, reader, watch

    def find(
        self, query: str, told: Sequence[tuple[int, Message]], pages: Sequence[StoredPage], limit: int, min_fit: float = 0.0
    ) -> list[Place]:
        """The lines that hold most of the words of a query, the rarest words counting most.

        told    messages that there is text of
        pages   the others
        """
        asked = words_of(query)
        found = scan(told, asked)
        if asked and pages:
            by_number = {page.number: page for page in pages}
            sieve = self.optics.engine.sieve(asked)
            lines: dict[tuple[int, int], set[int]] = {}
            for number, row, word in self._sift(sieve, list(by_number)):
                line = Details.of(by_number[number]).line_at(row)
                lines.setdefault((number, line.start), set()).add(word)
            for (number, row), held in lines.items():
                page = by_number[number]
                found.append((Place(number, row, page.first, page.last, 0.0), frozenset(held)))
        return rank(found, limit, asked, min_fit)

    def _sift(self, sieve: Sieve, numbers: Sequence[int]) -> Iterator[tuple[int, int, int]]:
        """Page, row and word."""
        for some in in_parts(self.watch(numbers, "looking"), AT_ONCE):
            tokens = self.reader.tokens(some)
            sides: dict[int, list[int]] = {}
            for number, each in tokens.items():
                sides.setdefault(each.mode.size, []).append(number)
            for same in sides.values():
                features = torch.stack([tokens[number].features for number in same])
                model = self.optics.engine.model.decoder
                features = features.to(self.optics.engine.device, model.dtype)
                for found in sieve.find(features, LEAST):
                    yield same[found.page], found.row, found.word


def words_of(query: str) -> list[str]:
    """What is looked for: the words of a question, without the marks around them; the whole where all are short."""
    asked = [word.strip(_MARKS) for word in words(query)]
    long = [word for word in asked if len(word) >= SHORTEST]
    found = long or [word for word in asked if word]
    if not found:
        raise InputError(f"there is no word to look for in {query[:80]!r}")
    return list(dict.fromkeys(found))


def with_text(view: View, state: State) -> Iterator[StoredMessage]:
    """Messages that are on no page, or on pages that are shown as text."""
    seen: set[int] = set()
    for page in view.pages():
        if page.tier == "text":
            for each in view.messages(page.first, page.last):
                if each.content is not None and each.seq not in seen:
                    seen.add(each.seq)
                    yield each
    for seq, _ in state.kept:
        yield from (each for each in view.messages(seq, seq) if each.content is not None and each.seq not in seen)
    yield from (each for each in view.messages(state.drawn + 1) if each.content is not None)
