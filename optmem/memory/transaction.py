"""Changing the memory: everything inside one transaction happens together or not at all."""

from __future__ import annotations

import hashlib
import json
import sqlite3
import time as clock
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress

from optmem.errors import InputError
from optmem.memory.blobs import BlobFolder, blob_name
from optmem.memory.records import NewLine, NewMessage, NewPage, Reading, check_integer, check_number, check_word
from optmem.memory.schema import as_text, telling
from optmem.memory.tables import TABLES
from optmem.memory.view import View
from optmem.memory.words import spaced

SCRUB = "store.scrub"  # a setting: something was forgotten, and its bytes may still lie in free places of the database


class Transaction(View):
    """Reads as a View does, what it changed itself included, and changes."""

    def __init__(self, connection: sqlite3.Connection, blobs: BlobFolder, stop_readers: Callable[[], object]) -> None:
        super().__init__(connection, blobs)
        self._stop_readers = stop_readers
        self._written: list[str] = []  # names of files that no committed row may name yet
        self._sheets: set[str] = set()  # contact sheets that a forgotten page was on
        self._uncovered: set[int] = set()  # messages that a page showed which is dropped or forgotten
        self._parted: set[int] = set()  # groups of which something was forgotten
        self.erases = False

    def _do(self, statement: str, values: Sequence[object] = ()) -> sqlite3.Cursor:
        self._check_open()
        with telling():
            return self._connection.execute(statement, values)

    def _do_all(self, statement: str, rows: Iterable[Sequence[object]]) -> None:
        self._check_open()
        with telling():
            self._connection.executemany(statement, rows)

    # Adding

    def add_messages(self, messages: Sequence[NewMessage]) -> list[int]:
        """Their numbers.  One that joins belongs to the group of the message before it, where there is one."""
        seq = self._next("messages")
        latest = self._rows("SELECT group_seq FROM messages ORDER BY seq DESC LIMIT 1")
        group = int(str(latest[0][0])) if latest else 0
        rows, lines = [], []
        for number, message in enumerate(messages, seq):
            group = group if message.joins and group else number
            rows.append((number, group, message.role, message.tokens, message.time, as_text(message.content)))
            lines += [(None, row, number, number, *_indexed(text)) for row, text in enumerate(message.lines)]
        self._do_all("INSERT INTO messages VALUES(?, ?, ?, ?, ?, CAST(? AS TEXT))", rows)
        self._add_lines(lines)
        return list(range(seq, seq + len(rows)))

    def add_page(self, page: NewPage) -> int:
        """Its number.  The index forgets the lines of messages that lie within it: it has the page's own lines instead.

        Where a message goes on to the next page, add that in the same transaction, or what it shows cannot be found meanwhile.
        """
        self._check_json(page.details)
        self._check_messages(page.messages)
        first, last = min(page.messages), max(page.messages)
        number = self._next("pages")
        fields = (page.tier, page.height, page.width, page.cell, page.tokens, page.text_tokens)
        texts = (as_text(page.factsheet), page.details, page.is_pinned, page.weight)
        self._do(
            "INSERT INTO pages VALUES(?, ?, ?, ?, ?, ?, ?, ?, ?, ?, CAST(? AS TEXT), ?, ?, ?, 0, NULL)",
            (number, page.id, first, last, *fields, *texts),
        )
        self._do_all("INSERT INTO shown VALUES(?, ?)", ((number, seq) for seq in page.messages))
        self._do_all("DELETE FROM lines WHERE page IS NULL AND first = ?", ((seq,) for seq in page.messages))
        self._add_lines([(number, line.row, line.first, line.last, *_indexed(line.text)) for line in page.lines])
        return number

    def _next(self, table: str) -> int:
        """The next number of a table, whose numbers are never given twice."""
        rows = self._rows("SELECT seq FROM sqlite_sequence WHERE name = ?", (table,))
        return int(str(rows[0][0])) + 1 if rows else 1

    def _add_lines(self, rows: Sequence[tuple[object, ...]]) -> None:
        columns = "page, row, first, last, text, spaced"
        self._do_all(f"INSERT INTO lines({columns}) VALUES(?, ?, ?, ?, CAST(? AS TEXT), CAST(? AS TEXT))", rows)

    def _check_messages(self, messages: Sequence[int]) -> None:
        for seq in messages:
            check_integer(seq, "numbers of messages", least=1)
        query = "SELECT value FROM json_each(?) WHERE value NOT IN (SELECT seq FROM messages) LIMIT 1"
        absent = self._rows(query, (json.dumps(list(messages)),))
        if absent:
            raise InputError(f"the memory has no message {absent[0][0]}; it may have been forgotten")

    def _check_json(self, text: str) -> None:
        try:
            json.loads(as_text(text), parse_constant=_refuse)
        except (ValueError, RecursionError):  # InputError too
            raise InputError("details, settings and receipts are kept as JSON texts") from None

    def add_receipt(self, content: str, time: float) -> int:
        """Its number.  JSON; it is never changed, and survives what it tells of, so it must not quote what can be forgotten."""
        self._check_json(content)
        check_number(time, "a receipt's time")
        number = self._next("receipts")
        self._do("INSERT INTO receipts VALUES(?, ?, ?)", (number, time, content))
        return number

    def set(self, name: str, value: str) -> None:
        """Keeps a JSON text under a name."""
        check_word(name, "a setting's name")
        self._check_json(value)
        self._do("INSERT INTO settings VALUES(?, ?) ON CONFLICT DO UPDATE SET value = excluded.value", (name, value))

    # Pages

    def change_page(
        self,
        number: int,
        *,
        tier: str | None = None,
        tokens: int | None = None,
        is_pinned: bool | None = None,
        weight: float | None = None,
        factsheet: str | None = None,
        details: str | None = None,
    ) -> None:
        """Changes what is given.  Raises InputError where there is no such page."""
        self.page(number)
        if tier is not None:
            check_word(tier, "a tier")
            self._do("UPDATE pages SET tier = ? WHERE number = ?", (tier, number))
        if tokens is not None:
            check_integer(tokens, "a page's tokens", least=0)
            self._do("UPDATE pages SET tokens = ? WHERE number = ?", (tokens, number))
        if is_pinned is not None:
            self._do("UPDATE pages SET is_pinned = ? WHERE number = ?", (bool(is_pinned), number))
        if weight is not None:
            check_number(weight, "a weight")
            self._do("UPDATE pages SET weight = ? WHERE number = ?", (weight, number))
        if factsheet is not None:
            self._do("UPDATE pages SET factsheet = CAST(? AS TEXT) WHERE number = ?", (as_text(factsheet), number))
        if details is not None:
            self._check_json(details)
            self._do("UPDATE pages SET details = ? WHERE number = ?", (details, number))

    def put_lines(self, number: int, lines: Sequence[NewLine]) -> None:
        """Gives the index the lines of a page, instead of those that it has: such as what was read of a picture."""
        self.page(number)
        self._do("DELETE FROM lines WHERE page = ?", (number,))
        self._add_lines([(number, line.row, line.first, line.last, *_indexed(line.text)) for line in lines])

    def drop_page(self, number: int) -> None:
        """Takes a page away, with its files, lines and readings; its messages stay, and must be shown by another page or have text.

        For drawing pages anew, in the same transaction: the index has the lines of new pages only.  What must not be readable
        afterwards is forgotten with erase.
        """
        self.page(number)
        self._uncovered |= set(self.messages_on(number))
        self._do("DELETE FROM pages WHERE number = ?", (number,))

    def count_hit(self, number: int, time: float | None = None) -> None:
        """A page was recalled."""
        self.page(number)
        moment = clock.time() if time is None else time
        check_number(moment, "a hit's time")
        self._do("UPDATE pages SET hits = hits + 1, last_hit = ? WHERE number = ?", (moment, number))

    def drop_text(self, messages: Sequence[int]) -> None:
        """Lets go of the text of messages that pages show.  Raises InputError where no page does: it would be lost."""
        self._check_messages(messages)
        listed = json.dumps(list(messages))
        query = "SELECT value FROM json_each(?) WHERE value NOT IN (SELECT message FROM shown) LIMIT 1"
        bare = self._rows(query, (listed,))
        if bare:
            raise InputError(f"no page shows message {bare[0][0]}: without its text it would be lost; forget it instead")
        self._do("UPDATE messages SET content = NULL WHERE seq IN (SELECT value FROM json_each(?))", (listed,))

    # A whole memory from an archive

    def restore_file(self, content: bytes) -> None:
        """Keeps a file that rows of the archive will name."""
        name = blob_name(content)
        self._written.append(name)
        self._blobs.put(content)

    def restore_table(self, table: str, rows: Iterable[tuple[bytes, Sequence[object]]]) -> tuple[int, str]:
        """Keeps rows as they were, with their numbers; how many, and the checksum of the bytes that they came in.

        rows   each with these bytes, and checked
        """
        columns = list(TABLES[table])
        texts = {name for name in columns if name in ("content", "text", "spaced", "factsheet")}
        marks = ", ".join("CAST(? AS TEXT)" if name in texts else "?" for name in columns)
        insert = f"INSERT INTO {table}({', '.join(columns)}) VALUES({marks})"
        if table == "sqlite_sequence":
            self._do("DELETE FROM sqlite_sequence")
        count, digest = 0, hashlib.sha256()
        for line, row in rows:
            self._do(
                insert,
                [
                    as_text(value) if name in texts and isinstance(value, str) else value
                    for name, value in zip(columns, row, strict=True)
                ],
            )
            count += 1
            digest.update(line)
        return count, digest.hexdigest()

    # Files and readings

    def put_blob(self, page: int, kind: str, content: bytes, *, tier: str, place: int | None = None) -> str:
        """Keeps a file of a page, instead of the one of the same kind; its name.  Pages given the same bytes share one file.

        The old file goes once the transaction is committed and no reader looks at an older state.
        """
        self.page(page)
        check_word(kind, "a kind of file")
        check_word(tier, "a tier")
        if place is not None:
            check_integer(place, "a place on a sheet", least=0)
        if not isinstance(content, bytes):
            raise InputError(f"a file of a page is bytes, got {type(content).__name__}")
        name = blob_name(content)
        # A file that a row names was made durable, unless it was damaged since; any other may be left from a failure.
        if not (self.pages_on(name) and self._blobs.is_whole(name)):
            self._written.append(name)
            self._blobs.put(content)
        self._do(
            "INSERT INTO blobs VALUES(?, ?, ?, ?, ?, ?) ON CONFLICT DO UPDATE SET name = excluded.name, size = excluded.size,"
            " tier = excluded.tier, place = excluded.place",
            (page, kind, name, len(content), tier, place),
        )
        return name

    def drop_blob(self, page: int, kind: str) -> None:
        """Lets go of a page's file of a kind, if it has one."""
        self.page(page)
        check_word(kind, "a kind of file")
        self._do("DELETE FROM blobs WHERE page = ? AND kind = ?", (page, kind))

    def put_readings(self, page: int, tier: str, readings: Sequence[Reading]) -> None:
        """Keeps what was read of a page at a tier, instead of what was read of the same rows before."""
        self.page(page)
        check_word(tier, "a tier")
        rows = ((page, tier, each.row, as_text(each.text), each.confidence) for each in readings)
        self._do_all(
            "INSERT INTO readings VALUES(?, ?, ?, CAST(? AS TEXT), ?)"
            " ON CONFLICT DO UPDATE SET text = excluded.text, confidence = excluded.confidence",
            rows,
        )

    def drop_readings(self, page: int) -> None:
        """Lets go of all that was read of a page."""
        self.page(page)
        self._do("DELETE FROM readings WHERE page = ?", (page,))

    # Forgetting

    def erase(self, *, pages: Sequence[int] = (), messages: Sequence[int] = ()) -> None:
        """Forgets pages with their files, lines and readings, and messages with their text and lines.

        When the transaction is over, the bytes are gone from files, database and log too.  It does not commit where it would part
        a group, leave a page that shows a forgotten message (forget that page too, or add another in its place), leave a message
        that has no text and is on no page, or leave pages on a contact sheet with a forgotten one (put them on another).
        Raises StoreBusyError where a reader keeps looking at an older state; nothing has changed then.
        """
        for number in pages:
            self.page(number)
            self._uncovered |= set(self.messages_on(number))
        self._check_messages(messages)
        if not self.erases:
            self._stop_readers()
        self.erases = True
        sheets = "SELECT DISTINCT name FROM blobs WHERE place IS NOT NULL AND page IN (SELECT value FROM json_each(?))"
        self._sheets |= {str(name) for (name,) in self._rows(sheets, (json.dumps(list(pages)),))}
        listed = json.dumps(list(messages))
        groups = "SELECT DISTINCT group_seq FROM messages WHERE seq IN (SELECT value FROM json_each(?))"
        self._parted |= {int(str(group)) for (group,) in self._rows(groups, (listed,))}
        self._do("DELETE FROM pages WHERE number IN (SELECT value FROM json_each(?))", (json.dumps(list(pages)),))
        self._do("DELETE FROM lines WHERE page IS NULL AND first IN (SELECT value FROM json_each(?))", (listed,))
        self._do("DELETE FROM messages WHERE seq IN (SELECT value FROM json_each(?))", (listed,))
        self._do("INSERT OR REPLACE INTO settings VALUES(?, 'true')", (SCRUB,))

    # The end

    def settle(self) -> None:
        """What must hold before a commit.  Raises InputError where it does not, and as not_written where files are not durable."""
        if self._uncovered:
            self._check_uncovered()
        if self.erases:
            self._check_erased()
        if self._written:
            self._blobs.sync()

    def _check_uncovered(self) -> None:
        query = (
            "SELECT seq FROM messages WHERE seq IN (SELECT value FROM json_each(?)) AND content IS NULL"
            " AND seq NOT IN (SELECT message FROM shown) LIMIT 1"
        )
        for (seq,) in self._rows(query, (json.dumps(sorted(self._uncovered)),)):
            raise InputError(f"message {seq} has no text and would be on no page: add a page that shows it, or forget it too")

    def _check_erased(self) -> None:
        query = "SELECT page, message FROM shown WHERE message NOT IN (SELECT seq FROM messages) LIMIT 1"
        for page, message in self._rows(query):
            raise InputError(f"page {page} still shows message {message}: forget the page too, or draw it again without it")
        query = "SELECT seq, group_seq FROM messages WHERE group_seq IN (SELECT value FROM json_each(?)) LIMIT 1"
        for seq, group in self._rows(query, (json.dumps(sorted(self._parted)),)):
            raise InputError(f"message {seq} belongs to the group of message {group}, a call and its results: forget all of it")
        for name in sorted(self._sheets):
            for blob in self.pages_on(name):
                raise InputError(f"page {blob.page} is on a contact sheet with a forgotten page: put it on another one first")

    def take_back(self) -> None:
        """After a rollback: removes the files that no row names."""
        for name in self._written:
            with suppress(OSError):
                if not self.pages_on(name):
                    self._blobs.remove(name)


def _refuse(constant: str) -> object:
    raise ValueError(f"{constant} is not JSON")


def _indexed(text: str) -> tuple[bytes, bytes | None]:
    """A line's text, and as the index cuts it where that differs."""
    apart = spaced(text)
    return as_text(text), None if apart is None else as_text(apart)
