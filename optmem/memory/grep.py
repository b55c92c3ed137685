"""Finding lines in vision tokens: words are looked for by a glance over the pages, with no text kept."""

from __future__ import annotations

from collections.abc import Sequence

from optmem.memory.messages import Message
from optmem.memory.optics import Optics
from optmem.memory.reading import PageReader
from optmem.memory.recall import Place, rank, scan
from optmem.memory.records import StoredPage
from optmem.memory.words import words

LEAST = 0.5


class Grep:
    """Looks into the pages of one memory."""

    def __init__(self, optics: Optics, reader: PageReader) -> None:
        self.optics, self.reader = optics, reader

    def find(self, query: str, told: Sequence[tuple[int, Message]], pages: Sequence[StoredPage], limit: int) -> list[Place]:
        """The lines that hold most of the words of a query, the rarest words counting most.

        told    messages that there is text of
        pages   the others
        """
        asked = [word.strip(".,;:!?\"'()") for word in words(query)]
        asked = [word for word in asked if len(word) > 2]
        found = scan(told, asked)
        tokens = self.reader.tokens(page.number for page in pages)
        rows: dict[tuple[int, int], set[int]] = {}
        kept = [page for page in pages if page.number in tokens]
        for number, word in enumerate(asked):
            for hit in self.optics.engine.search([tokens[page.number] for page in kept], word, least=LEAST, ignore_case=True):
                rows.setdefault((hit.page, hit.row), set()).add(number)
        for (at, row), held in rows.items():
            page = kept[at]
            found.append((Place(page.number, row, page.first, page.last, 0.0), frozenset(held)))
        return rank(found, limit)

    def clear(self) -> None:
        """Nothing is kept of what was looked into."""
