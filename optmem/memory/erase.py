"""Forgetting for good: free places of the database are overwritten, and a search of every byte says whether anything is left.

What SQLite deletes with secure_delete is overwritten, with two exceptions that were found by looking: when pages of a b-tree are
balanced, copies of rows stay in their gaps (1 to 9 of 17,000 deleted rows could be read in the file, SQLite 3.40), and FTS5 (before
3.42, which has an option for it) only marks words as deleted until it merges its segments.  So the index is merged into one
segment and the database is written anew by VACUUM, through memory and not through a temporary file.
"""

from __future__ import annotations

import json
import os
import re
import sqlite3
from collections.abc import Sequence
from dataclasses import dataclass

from optmem.errors import InputError, StoreError
from optmem.memory.folder import MemoryFolder
from optmem.memory.schema import telling
from optmem.memory.transaction import SCRUB
from optmem.memory.words import phrase

_CHUNK = 4 << 20  # bytes searched at once
_SHORTEST = 3  # bytes: shorter ones are found in any file
_LONG_WORD, _TAIL = 20, 12  # characters


@dataclass(frozen=True, slots=True)
class Trace:
    """Where something that was looked for is still found."""

    needle: int  # its place among those given: messages must not repeat what is to be forgotten
    file: str  # name of the file, or "words" for the lexical index


@dataclass(frozen=True, slots=True)
class Search:
    """What a search for bytes saw."""

    files: int
    bytes: int
    traces: tuple[Trace, ...]


def needs_scrub(connection: sqlite3.Connection) -> bool:
    """Whether something was forgotten whose bytes may still lie in free places."""
    with telling():
        return connection.execute("SELECT 1 FROM settings WHERE name = ?", (SCRUB,)).fetchone() is not None


def scrub(connection: sqlite3.Connection) -> None:
    """Overwrites the free places of the database and empties its log.  Nobody may look at an older state meanwhile."""
    with telling():
        connection.execute("INSERT INTO words(words) VALUES('optimize')")
        connection.execute("VACUUM")
        _empty_log(connection)
        connection.execute("DELETE FROM settings WHERE name = ?", (SCRUB,))
        _empty_log(connection)


def _empty_log(connection: sqlite3.Connection) -> None:
    is_busy = connection.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchone()[0]
    if is_busy:
        raise StoreError("another program has the memory's database open: what was forgotten is still in its log; open it again")


def search(connection: sqlite3.Connection, folder: MemoryFolder, needles: Sequence[str | bytes]) -> Search:
    """Looks for texts or bytes in every file of the memory, raw, and for texts in the lexical index.

    A text is looked for as it stands, as JSON writes it, and in lower case; of its long words also the ends alone, for the index
    keeps only those where neighbouring words begin alike.  Pixels and compressed files show no text: the proof for them is that
    the file is gone.
    """
    forms = [_forms(needle) for needle in needles]
    traces, files, size = [], 0, 0
    for name, file in folder.files():
        found, count = _search_file(file, forms)
        traces += [Trace(number, name) for number in found]
        files, size = files + 1, size + count
    for number, needle in enumerate(needles):
        if isinstance(needle, str) and any(letter.isalnum() for letter in needle) and _is_indexed(connection, needle):
            traces.append(Trace(number, "words"))
    return Search(files, size, tuple(traces))


def _is_indexed(connection: sqlite3.Connection, needle: str) -> bool:
    clean = needle.encode("utf-8", "replace").decode().replace("\0", " ")
    with telling():
        return connection.execute("SELECT 1 FROM words WHERE words MATCH ? LIMIT 1", (phrase(clean),)).fetchone() is not None


def _forms(needle: object) -> list[bytes]:
    if not isinstance(needle, str | bytes) or len(needle) < _SHORTEST:
        raise InputError(f"what is to be searched for is text or bytes of at least {_SHORTEST}, got {type(needle).__name__}")
    if isinstance(needle, bytes):
        return [needle]
    forms = {needle, needle.lower(), json.dumps(needle)[1:-1], json.dumps(needle, ensure_ascii=False)[1:-1]}
    forms |= {word[-_TAIL:] for word in re.findall(r"\w+", needle.lower()) if len(word) >= _LONG_WORD}
    return [form.encode("utf-8", "surrogatepass") for form in sorted(forms)]


def _search_file(file: int, forms: list[list[bytes]]) -> tuple[list[int], int]:
    """Which needles are in an open file, and how many bytes it has."""
    overlap = max((len(form) for group in forms for form in group), default=1) - 1
    found: set[int] = set()
    size, before = 0, b""
    while chunk := os.read(file, _CHUNK):
        size += len(chunk)
        text = before + chunk
        found |= {number for number, group in enumerate(forms) if number not in found and any(form in text for form in group)}
        before = text[-overlap:] if overlap else b""
    return sorted(found), size
