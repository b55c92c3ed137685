"""Whether a memory is whole: the database, the index, every file, and what must hold between them."""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from optmem.memory.blobs import UNFINISHED, BlobDamaged, BlobFolder
from optmem.memory.erase import Search, needs_scrub, search
from optmem.memory.folder import ENTRIES, MemoryFolder
from optmem.memory.schema import telling

_MOST = 1000  # problems listed

# What must hold between the rows; each query names what breaks it.
_RULES = {
    "group": (
        "SELECT 'message ' || seq FROM messages AS m WHERE group_seq > seq"
        " OR NOT EXISTS(SELECT 1 FROM messages WHERE seq = m.group_seq AND group_seq = m.group_seq)"
        " OR EXISTS(SELECT 1 FROM messages AS n WHERE n.seq BETWEEN m.group_seq AND m.seq AND n.group_seq != m.group_seq)"
    ),
    "page shows nothing": "SELECT 'page ' || number FROM pages WHERE number NOT IN (SELECT page FROM shown)",
    "page's messages": (
        "SELECT 'page ' || number FROM pages JOIN (SELECT page, min(message) AS low, max(message) AS high FROM shown GROUP BY page)"
        " ON page = number WHERE first != low OR last != high"
    ),
    "text lost": "SELECT 'message ' || seq FROM messages WHERE content IS NULL AND seq NOT IN (SELECT message FROM shown)",
    "line of nothing": (
        "SELECT 'line ' || line FROM lines WHERE page IS NULL"
        " AND (first NOT IN (SELECT seq FROM messages) OR first IN (SELECT message FROM shown))"
    ),
    "not JSON": (
        "SELECT 'receipt ' || number FROM receipts WHERE NOT json_valid(content)"
        " UNION ALL SELECT 'setting ' || name FROM settings WHERE NOT json_valid(value)"
    ),
}


@dataclass(frozen=True, slots=True)
class Problem:
    """Something that is not as it must be."""

    kind: str
    what: str
    page: int | None = None


@dataclass(frozen=True, slots=True)
class Verified:
    """What was looked at, and what was found."""

    problems: tuple[Problem, ...]
    blobs: int  # files whose checksum was computed
    search: Search

    @property
    def is_clean(self) -> bool:
        """Nothing is wrong, and nothing that was looked for is there."""
        return not self.problems and not self.search.traces


def verify(connection: sqlite3.Connection, folder: MemoryFolder, needles: Sequence[str | bytes]) -> Verified:
    """Looks at everything.  needles: texts or bytes that must not be anywhere."""
    problems = [*_database(connection), *_rows(connection), *_files(connection, folder)]
    blobs, damaged = _blobs(connection, folder.blobs)
    return Verified(tuple([*problems, *damaged][:_MOST]), blobs, search(connection, folder, needles))


def _ask(connection: sqlite3.Connection, query: str) -> list[str]:
    with telling():
        return [str(row[0]) for row in connection.execute(query)]


def _database(connection: sqlite3.Connection) -> Iterator[Problem]:
    try:
        for said in _ask(connection, "PRAGMA integrity_check(100)"):
            if said != "ok":
                yield Problem("database", said)
        for table in _ask(connection, "PRAGMA foreign_key_check"):
            yield Problem("dangling row", table)
    except sqlite3.Error as error:  # pragma: no cover - integrity_check reports, it does not raise
        yield Problem("database", str(error))
    try:
        connection.execute("INSERT INTO words(words, rank) VALUES('integrity-check', 1)")
    except sqlite3.Error:
        yield Problem("index", "the lexical index and the lines differ")
    if needs_scrub(connection):
        yield Problem("forgotten", "what was forgotten may still lie in free places of the database: open the memory again")


def _rows(connection: sqlite3.Connection) -> Iterator[Problem]:
    for kind, query in _RULES.items():
        for what in _ask(connection, f"{query} LIMIT 100" if "UNION" not in query else query):
            yield Problem(kind, what)


def _files(connection: sqlite3.Connection, folder: MemoryFolder) -> Iterator[Problem]:
    kept = set(_ask(connection, "SELECT name FROM blobs UNION SELECT name FROM garbage"))
    for name, is_blob in folder.blobs.names():
        if UNFINISHED.fullmatch(name) or (is_blob and name not in kept):
            yield Problem("orphan", f"the file {name[:80]} belongs to no page")
        elif not is_blob:
            yield Problem("foreign", f"the file {name[:80]!r} is none of a memory's")
    for name in sorted(folder.entries() - ENTRIES):
        yield Problem("foreign", f"{name[:80]!r} is none of a memory's")
    for name in folder.wide_modes():
        yield Problem("modes", f"{name[:80]!r} can be used by others than the owner")


def _blobs(connection: sqlite3.Connection, blobs: BlobFolder) -> tuple[int, list[Problem]]:
    """How many files were read, and the pages whose file is not what was written."""
    problems, count, last, reason = [], 0, "", ""
    with telling():
        rows = connection.execute("SELECT name, page, kind, size FROM blobs ORDER BY name").fetchall()
    for name, page, kind, size in rows:
        if name != last:
            last, count = name, count + 1
            try:
                reason = "" if len(blobs.read(name)) == size else "is not of the size that was noted"
            except BlobDamaged as damage:
                reason = str(damage)
        if reason:
            problems.append(Problem("page", f"the {kind} of page {page} {reason}", page))
    return count, problems
