"""Reading pages back: their vision tokens, encoded once and kept, and the rows that a model reads of them, kept as well."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager, suppress
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from optmem.errors import InputError, PageCorrupted
from optmem.items import in_parts
from optmem.memory.ageing import TOKENS, pixels_of
from optmem.memory.details import Details, side_of
from optmem.memory.optics import Optics
from optmem.memory.records import NewLine, Reading, StoredPage
from optmem.memory.transaction import Transaction
from optmem.memory.view import View
from optmem.pages import read_symbols
from optmem.pages.chat import is_label

if TYPE_CHECKING:
    from optmem.engine import Completion, VisionTokens

ENCODED_AT_ONCE = 32  # pages


@dataclass(frozen=True, slots=True)
class Said:
    """What was read of rows of a page."""

    text: str
    confidence: float  # that all of it is right
    rows: tuple[int, ...]


class PageReader:
    """Reads pages of one memory.  Where it may write, what it encodes and reads is kept."""

    def __init__(
        self,
        optics: Optics,
        snapshot: Callable[[], AbstractContextManager[View]],
        transaction: Callable[[], AbstractContextManager[Transaction]] | None,
    ) -> None:
        self.optics, self._snapshot, self._transaction = optics, snapshot, transaction

    def tokens(self, numbers: Iterable[int]) -> dict[int, VisionTokens]:
        """The tokens of pages; those whose files are damaged are not among them."""
        from optmem.engine import VisionTokens

        found: dict[int, VisionTokens] = {}
        missing: list[StoredPage] = []
        encoder = self.optics.engine.encoder_fingerprint
        with self._snapshot() as view:
            for number in numbers:
                page = view.page(number)
                try:
                    tokens = VisionTokens.from_bytes(view.blob(number, TOKENS), name=f"the tokens of page {number}")
                except (InputError, PageCorrupted):  # none yet, or damaged: they can be made again
                    missing.append(page)
                    continue
                if tokens.encoder == encoder:
                    found[number] = tokens
                else:
                    missing.append(page)
        return found | self._encode(missing)

    def encode_all(self) -> int:
        """Encodes every page that has no tokens; how many these were."""
        with self._snapshot() as view:
            missing = [page for page in view.pages() if all(blob.kind != TOKENS for blob in view.blobs(page.number))]
        return len(self._encode(missing))

    def _encode(self, pages: Sequence[StoredPage]) -> dict[int, VisionTokens]:
        found: dict[int, VisionTokens] = {}
        for some in in_parts(pages, ENCODED_AT_ONCE):
            pictures = []
            with self._snapshot() as view:
                for page in some:
                    try:
                        pictures.append((page.number, pixels_of(view, page)))
                    except (PageCorrupted, InputError):
                        continue
            made = self.optics.tokens([pixels for _, pixels in pictures])
            numbered = {number: tokens for (number, _), tokens in zip(pictures, made, strict=True)}
            if self._transaction is not None and numbered:
                with self._transaction() as change:
                    for number, tokens in numbered.items():
                        change.put_blob(number, TOKENS, tokens.to_bytes(int8=True), tier=tier_of_side(tokens.mode.size))
            found |= numbered
        return found

    def rows(self, wanted: Sequence[tuple[StoredPage, range]]) -> list[Said | None]:
        """Rows of pages, those that were not read before together; None where a page is damaged.

        A model that does not read by rows reads the whole page, and its lines are the rows.
        """
        known = [self._known(page, rows) for page, rows in wanted]
        ours = self._labels(dict.fromkeys(page.number for page, _ in wanted)) if self._by_rows else {}
        unread = [number for number, readings in enumerate(known) if readings is None]
        tokens = self.tokens(dict.fromkeys(wanted[number][0].number for number in unread))
        for number in unread:
            page, rows = wanted[number]
            if page.number in tokens:
                known[number] = self._read(page, rows, tokens[page.number])
        return [
            None if readings is None else _said(readings | ours.get(page.number, {}), rows, by_rows=self._by_rows)
            for readings, (page, rows) in zip(known, wanted, strict=True)
        ]

    def _labels(self, pages: Iterable[int]) -> dict[int, dict[int, Reading]]:
        """What optmem itself wrote on pages, as far as their lines are kept: it is known, and need not be read."""
        found: dict[int, dict[int, Reading]] = {}
        with self._snapshot() as view:
            for number in pages:
                labels = [line for line in view.lines(number) if is_label(line.text)]
                details = Details.of(view.page(number))
                for line in labels:
                    rows = details.line_at(line.row)
                    texts = [line.text, *[""] * (len(rows) - 1)]
                    found.setdefault(number, {}).update(
                        (row, Reading(row, text, 1.0)) for row, text in zip(rows, texts, strict=True)
                    )
        return found

    def page(self, page: StoredPage) -> Said | None:
        """All rows of a page."""
        (found,) = self.rows([(page, range(0))])
        return found

    def index(self, page: StoredPage) -> None:
        """Reads a page that came as a picture, and gives the index its lines."""
        assert self._transaction is not None
        said = self.page(page)
        details = Details.of(page)
        lines = []
        if said is not None:
            ends = "".join("1" for _ in said.text.splitlines())
            details = replace(details, ends=ends)
            texts = enumerate(said.text.splitlines(keepends=True))
            lines = [NewLine(row, text, page.first, page.last) for row, text in texts if text.strip()]
        with self._transaction() as change:
            change.put_lines(page.number, lines)
            change.change_page(page.number, details=replace(details, was_read=True).to_json())

    @property
    def _by_rows(self) -> bool:
        return self.optics.engine.model.config.family == "nano"

    def _known(self, page: StoredPage, rows: range) -> dict[int, Reading] | None:
        with self._snapshot() as view:
            readings = view.readings(page.number, tier_of_side(side_of(page)))
        if self._by_rows and rows:
            return readings if all(row in readings for row in rows) else None
        return readings if -1 in _whole(readings) else None

    def _read(self, page: StoredPage, rows: range, tokens: VisionTokens) -> dict[int, Reading]:
        """Reads rows, or the whole page where there are none, and keeps what was read."""
        done = self._decode(tokens, rows)
        if self._by_rows:
            said = [*done.row_symbols, *[""] * len(done.rows)]  # a row below the text says nothing
            pairs = zip(done.rows, said, strict=False)
            readings = [Reading(row.number, symbols, _all_right(row.probabilities)) for row, symbols in pairs]
            read = {reading.row for reading in readings}
            readings += [Reading(row, "", 0.0) for row in rows if row not in read]
        else:
            share = done.confidence
            readings = [Reading(number, line, share) for number, line in enumerate(done.text.splitlines(keepends=True))]
        if not rows or not self._by_rows:
            readings.append(Reading(END, "", 1.0))
        if self._transaction is not None:
            with self._transaction() as change:
                change.put_readings(page.number, tier_of_side(side_of(page)), readings)
        return {reading.row: reading for reading in readings}

    def _decode(self, tokens: VisionTokens, rows: range) -> Completion:
        """The rows; or all of the page, where a glance is sure that it has fewer, as of a small picture it wrongly may be."""
        engine = self.optics.engine
        if rows and self._by_rows:
            with suppress(InputError):
                return engine.decode([tokens], rows=list(rows))[0]
        return engine.decode([tokens])[0]


END = 1 << 20  # a row that says that a page was read to its end


def _whole(readings: dict[int, Reading]) -> set[int]:
    return {-1} if END in readings else set()


def tier_of_side(side: int) -> str:
    return f"side-{side}"


def _all_right(probabilities: Iterable[float]) -> float:
    """That every token is right, errors taken to be independent."""
    return math.exp(sum(math.log(max(each, 1e-9)) for each in probabilities))


def _said(readings: dict[int, Reading], rows: range, *, by_rows: bool) -> Said:
    numbers = list(rows) if rows and by_rows else sorted(number for number in readings if number != END)
    some = [readings[number] for number in numbers]
    text = "".join(reading.text for reading in some)
    confidence = math.prod(reading.confidence for reading in some)
    return Said(read_symbols(text) if by_rows else text, confidence, tuple(numbers))
