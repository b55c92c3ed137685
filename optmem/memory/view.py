"""Reading the memory: queries over one connection, in the state that it sees."""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Callable, Iterator, Sequence

from optmem.errors import InputError, PageCorrupted, StoreError
from optmem.memory.blobs import BlobDamaged, BlobFolder
from optmem.memory.records import (
    Blob,
    Counts,
    Found,
    Reading,
    StoredLine,
    StoredMessage,
    StoredPage,
    StoredReceipt,
    check_integer,
    check_word,
)
from optmem.memory.schema import telling
from optmem.memory.tables import TABLES
from optmem.memory.words import phrase, words

MANY = 1000  # lines: a word that so many have tells little
LATEST = 300  # lines looked at where a question has frequent words only
RANKED = 4000  # lines that one question ranks; 1,000 take 2 ms
LAST = (1 << 63) - 1  # the largest number that SQLite has
AT_ONCE = 500  # rows fetched by one query: memory stays flat however long the history
_MESSAGE = "seq, group_seq, role, content, tokens, time"
_PAGE = (
    "number, id, first, last, tier, height, width, cell, tokens, text_tokens, factsheet, details, is_pinned, weight, hits, last_hit"
)
_LINE = "page, row, first, last, lines.text"


class View:
    """What the memory holds, as one connection sees it."""

    def __init__(self, connection: sqlite3.Connection, blobs: BlobFolder) -> None:
        self._connection, self._blobs = connection, blobs
        self._is_over = False

    def end(self) -> None:
        """The block that this was given in is left: what is asked from now on would be of another state."""
        self._is_over = True

    def _check_open(self) -> None:
        if self._is_over:
            raise StoreError("this snapshot or transaction is over: ask inside its block")

    def _rows(self, query: str, values: Sequence[object] = ()) -> list[tuple[object, ...]]:
        self._check_open()
        with telling():
            return self._connection.execute(query, values).fetchall()

    def _number(self, query: str, values: Sequence[object] = ()) -> int:
        found = self._rows(query, values)[0][0]
        assert isinstance(found, int)
        return found

    # Messages

    def messages(self, first: int = 1, last: int | None = None) -> Iterator[StoredMessage]:
        """In order of their numbers, from first to last, both counted in."""
        last = LAST if last is None else last
        _check(first, last)
        yield from self._messages("1", first, last)

    def unpaged(self) -> Iterator[StoredMessage]:
        """Those that no page shows, in order."""
        yield from self._messages("NOT EXISTS(SELECT 1 FROM shown WHERE message = seq)", 1, LAST)

    def _messages(self, condition: str, first: int, last: int) -> Iterator[StoredMessage]:
        query = f"SELECT {_MESSAGE} FROM messages WHERE seq BETWEEN ? AND ? AND {condition} ORDER BY seq LIMIT {AT_ONCE}"  # noqa: S608
        while rows := self._rows(query, (first, last)):
            for row in rows:
                yield StoredMessage(*row)  # type: ignore[arg-type]  # the columns are the fields
            first = int(str(rows[-1][0])) + 1

    def last_seq(self) -> int:
        """Number of the newest message, 0 where there is none."""
        return self._number("SELECT coalesce(max(seq), 0) FROM messages")

    # Pages

    def pages(self) -> Iterator[StoredPage]:
        """Oldest first: by the first message that they show."""
        place = (-1, -1)
        query = f"SELECT {_PAGE} FROM pages WHERE (first, number) > (?, ?) ORDER BY first, number LIMIT {AT_ONCE}"  # noqa: S608
        while rows := self._rows(query, place):
            found = [_page(row) for row in rows]
            yield from found
            place = (found[-1].first, found[-1].number)

    def page(self, number: int) -> StoredPage:
        """Raises InputError where there is none of this number."""
        _check(number)
        rows = self._rows(f"SELECT {_PAGE} FROM pages WHERE number = ?", (number,))  # noqa: S608
        if not rows:
            raise InputError(f"the memory has no page {number}; it may have been forgotten")
        return _page(rows[0])

    def pages_with_id(self, page_id: str) -> list[StoredPage]:
        """Oldest first; equal pages have equal ids, so there may be several."""
        if not isinstance(page_id, str) or len(page_id) != 64 or not page_id.isascii():
            return []
        return [_page(row) for row in self._rows(f"SELECT {_PAGE} FROM pages WHERE id = ? ORDER BY first, number", (page_id,))]  # noqa: S608

    def pages_showing(self, first: int, last: int) -> list[int]:
        """Numbers of the pages that show any of these messages."""
        _check(first, last)
        query = "SELECT DISTINCT page FROM shown WHERE message BETWEEN ? AND ? ORDER BY page"
        return [int(str(number)) for (number,) in self._rows(query, (first, last))]

    def messages_on(self, page: int) -> list[int]:
        """Numbers of the messages that a page shows."""
        _check(page)
        return [int(str(seq)) for (seq,) in self._rows("SELECT message FROM shown WHERE page = ? ORDER BY message", (page,))]

    def messages_only_on(self, pages: Sequence[int]) -> list[int]:
        """Numbers of the messages that these pages show and no other page does."""
        _check(*pages)
        query = (
            "SELECT DISTINCT message FROM shown WHERE page IN (SELECT value FROM json_each(?)) AND message NOT IN"
            " (SELECT message FROM shown WHERE page NOT IN (SELECT value FROM json_each(?))) ORDER BY message"
        )
        listed = json.dumps(list(pages))
        return [int(str(seq)) for (seq,) in self._rows(query, (listed, listed))]

    # Lines

    def lines(self, page: int) -> list[StoredLine]:
        """The rows of a page that the index has, from the top."""
        _check(page)
        return [StoredLine(*row) for row in self._rows(f"SELECT {_LINE} FROM lines WHERE page = ? ORDER BY row", (page,))]  # type: ignore[arg-type]  # noqa: S608

    def search(self, question: str, limit: int = 10) -> list[Found]:
        """The lines that answer best, by BM25.  A word is searched as it stands: nothing in it is an operator.

        Words that very many lines have tell little and take long to rank (0.3 s for one in 300,000 lines), so they count only
        where the question has no others.  Then the latest lines with each of them are found, those with most of them first.
        """
        check_integer(limit, "a limit", least=0)
        asked = [phrase(word) for word in words(question)]
        if not asked or not limit:
            return []
        often = {each: self._lines_with(each) for each in asked}
        telling_words = _rarest(often)
        if not telling_words:
            return self._latest([each for each in asked if often[each] == MANY], words(question), limit)
        ranked = "SELECT rowid, -rank FROM words WHERE words MATCH ? ORDER BY rank, rowid DESC LIMIT ?"
        found = self._rows(ranked, (" OR ".join(telling_words), limit))
        return [self._found(int(str(line)), float(str(score))) for line, score in found]

    def _latest(self, asked: list[str], plain: tuple[str, ...], limit: int) -> list[Found]:
        """Of the latest lines with each of these words, those with most of them, the latest of equals first."""
        query = (
            f"SELECT line, {_LINE} FROM words JOIN lines ON line = words.rowid"  # noqa: S608
            " WHERE words MATCH ? ORDER BY words.rowid DESC LIMIT ?"
        )
        lines: dict[int, StoredLine] = {}
        for each in asked:
            rows = self._rows(query, (each, max(limit, LATEST // len(asked))))
            lines |= {int(str(number)): StoredLine(*row) for number, *row in rows}  # type: ignore[arg-type]
        lowered = [word.lower() for word in plain]

        def order(number: int) -> tuple[int, int]:
            text = lines[number].text.lower()
            return -sum(word in text for word in lowered), -number

        return [Found(lines[number], 0.0) for number in sorted(lines, key=order)[:limit]]

    def often(self, asked: Sequence[str]) -> tuple[dict[str, int], int]:
        """How many lines have each of these words, counted up to MANY; and about how many lines there are."""
        lines = self._number("SELECT coalesce(max(line), 0) FROM lines")
        return {word: self._lines_with(phrase(word)) for word in asked}, lines

    def _lines_with(self, asked: str) -> int:
        """How many lines have it, counted up to MANY."""
        query = f"SELECT count(*) FROM (SELECT 1 FROM words WHERE words MATCH ? LIMIT {MANY})"  # noqa: S608
        return self._number(query, (asked,))

    def _found(self, number: int, score: float) -> Found:
        (row,) = self._rows(f"SELECT {_LINE} FROM lines WHERE line = ?", (number,))  # noqa: S608
        return Found(StoredLine(*row), score)  # type: ignore[arg-type]

    # Blobs and readings

    def blobs(self, page: int) -> list[Blob]:
        """The files of a page."""
        _check(page)
        query = "SELECT page, kind, name, size, tier, place FROM blobs WHERE page = ? ORDER BY kind"
        return [Blob(*row) for row in self._rows(query, (page,))]  # type: ignore[arg-type]

    def blob(self, page: int, kind: str) -> bytes:
        """The bytes of a page's file, verified.  Raises InputError where it has none of the kind, PageCorrupted where damaged."""
        _check(page)
        check_word(kind, "a kind of file")
        rows = self._rows("SELECT name FROM blobs WHERE page = ? AND kind = ?", (page, kind))
        if not rows:
            known = ", ".join(blob.kind for blob in self.blobs(self.page(page).number)) or "nothing"
            raise InputError(f"page {page} has no {kind!r}, it has {known}")
        try:
            return self._blobs.read(str(rows[0][0]))
        except BlobDamaged as damage:
            raise PageCorrupted(f"the {kind} of page {page} {damage}: draw and encode it again, or forget it", page) from None

    def bytes_of(self, blob: Blob) -> bytes:
        """The verified bytes of a file.  Raises BlobDamaged."""
        return self._blobs.read(blob.name)

    def copy_rows(self, target: sqlite3.Connection) -> None:
        """The whole database, as this connection sees it, into another."""
        self._connection.backup(target)

    def pages_on(self, name: str) -> list[Blob]:
        """Every page that a file belongs to: the pages of a contact sheet."""
        query = "SELECT page, kind, name, size, tier, place FROM blobs WHERE name = ? ORDER BY place, page"
        return [Blob(*row) for row in self._rows(query, (name,))]  # type: ignore[arg-type]

    def readings(self, page: int, tier: str) -> dict[int, Reading]:
        """What was read of a page at a tier, by row."""
        _check(page)
        check_word(tier, "a tier")
        query = "SELECT row, text, confidence FROM readings WHERE page = ? AND tier = ? ORDER BY row"
        found = [Reading(*row) for row in self._rows(query, (page, tier))]  # type: ignore[arg-type]
        return {reading.row: reading for reading in found}

    # The rest

    def receipts(self, after: int = 0) -> Iterator[StoredReceipt]:
        """Oldest first, those behind the one of this number."""
        check_integer(after, "numbers of receipts", least=0)
        query = f"SELECT number, time, content FROM receipts WHERE number > ? ORDER BY number LIMIT {AT_ONCE}"  # noqa: S608
        while rows := self._rows(query, (after,)):
            found = [StoredReceipt(*row) for row in rows]  # type: ignore[arg-type]
            yield from found
            after = found[-1].number

    def setting(self, name: str) -> str | None:
        """What was set, None where nothing was."""
        rows = self._rows("SELECT value FROM settings WHERE name = ?", (name,))
        return str(rows[0][0]) if rows else None

    def table(self, name: str) -> Iterator[tuple[object, ...]]:
        """All rows of a table, as `tables.TABLES` has its columns."""
        columns = ", ".join(TABLES[name])
        self._check_open()
        with telling():
            yield from self._connection.execute(f"SELECT {columns} FROM {name} ORDER BY 1, 2")  # noqa: S608

    def holds(self, text: str) -> bool:
        """Whether any message, line, factsheet or reading has a text in it, in capitals or not."""
        tables = (("messages", "content"), ("lines", "text"), ("pages", "factsheet"), ("readings", "text"))
        forms = [text.lower(), json.dumps(text, ensure_ascii=False)[1:-1].lower()]
        queries = (f"SELECT EXISTS(SELECT 1 FROM {table} WHERE instr(lower({column}), ?))" for table, column in tables)  # noqa: S608
        return any(self._number(query, (form,)) for query in queries for form in forms)

    def counts(self) -> Counts:
        """How much there is."""
        files, size = self._rows("SELECT count(*), coalesce(sum(size), 0) FROM (SELECT DISTINCT name, size FROM blobs)")[0]
        ask: Callable[[str], int] = self._number
        return Counts(
            messages=ask("SELECT count(*) FROM messages"),
            message_tokens=ask("SELECT coalesce(sum(tokens), 0) FROM messages"),
            unpaged=ask("SELECT count(*) FROM messages WHERE NOT EXISTS(SELECT 1 FROM shown WHERE message = seq)"),
            pages=ask("SELECT count(*) FROM pages"),
            page_tokens=ask("SELECT coalesce(sum(tokens), 0) FROM pages"),
            lines=ask("SELECT count(*) FROM lines"),
            readings=ask("SELECT count(*) FROM readings"),
            receipts=ask("SELECT count(*) FROM receipts"),
            blobs=int(str(files)),
            blob_bytes=int(str(size)),
            database_bytes=ask("PRAGMA page_count") * ask("PRAGMA page_size"),
        )


def _check(*numbers: object) -> None:
    """Raises InputError for what is no number of a page or message: SQLite would take "1" and True for 1."""
    for number in numbers:
        check_integer(number, "numbers of pages and messages", least=0)


def _page(row: tuple[object, ...]) -> StoredPage:
    values = list(row)
    values[12] = bool(values[12])
    return StoredPage(*values)  # type: ignore[arg-type]  # the columns are the fields


def _rarest(often: dict[str, int]) -> list[str]:
    """Those of the words that lines have, but not too many of them; the rarest first, and no more than can be ranked."""
    chosen, lines = [], 0
    for each, count in sorted(often.items(), key=lambda item: item[1]):
        if 0 < count < MANY and lines + count <= RANKED:
            chosen.append(each)
            lines += count
    return chosen
