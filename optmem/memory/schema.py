"""The database: its tables, its version, and how a connection to it is opened.

Write-ahead log, with exactly one connection that writes and checkpoints.  Measured on ext4 where an fsync takes 0.1 to 0.2 ms: a
message added alone takes 0.3 ms with the log (one fsync), 1.0 ms with journal_mode=TRUNCATE (four); a hundred at once the same;
and with the log a reader's snapshot never holds a writer up, nor a killed writer a reader.
SQLite 3.7.0 to 3.51.2 may corrupt a database in this mode when two connections write or checkpoint at the same instant
(https://www.sqlite.org/wal.html#walresetbug).  Here that cannot be: only the owner of the memory's lock opens a connection that
can write, it opens one, and all others are read-only, which SQLite never lets checkpoint.  So there is nothing to warn of.
"""

from __future__ import annotations

import os
import sqlite3
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import quote

from optmem.errors import DiskFailedError, InputError, OutputError, StoreBusyError, StoreDamagedError, StoreError, StoreVersionError

APPLICATION = 0x6F70746D  # "optm", in the header of the file
VERSION = 1
DATABASE = "index.db"
LOG_LIMIT = 4 << 20  # bytes that the log keeps after a checkpoint
BUSY_SECONDS = 10.0

SCHEMA = """
CREATE TABLE settings(name TEXT PRIMARY KEY, value TEXT NOT NULL) WITHOUT ROWID;

CREATE TABLE messages(
    seq INTEGER PRIMARY KEY AUTOINCREMENT,  -- the order; a number is never given twice
    group_seq INTEGER NOT NULL,             -- seq of the group's first message
    role TEXT NOT NULL, tokens INTEGER NOT NULL, time REAL NOT NULL,
    content TEXT                            -- NULL once only pages show it
);
CREATE INDEX messages_by_group ON messages(group_seq);

CREATE TABLE pages(
    number INTEGER PRIMARY KEY AUTOINCREMENT,
    id TEXT NOT NULL, first INTEGER NOT NULL, last INTEGER NOT NULL,
    tier TEXT NOT NULL, height INTEGER NOT NULL, width INTEGER NOT NULL, cell TEXT NOT NULL,
    tokens INTEGER NOT NULL, text_tokens INTEGER NOT NULL, factsheet TEXT NOT NULL, details TEXT NOT NULL,
    is_pinned INTEGER NOT NULL, weight REAL NOT NULL, hits INTEGER NOT NULL DEFAULT 0, last_hit REAL
);
CREATE INDEX pages_by_id ON pages(id);

CREATE TABLE shown(  -- which page shows which message
    page INTEGER NOT NULL REFERENCES pages ON DELETE CASCADE,
    message INTEGER NOT NULL REFERENCES messages DEFERRABLE INITIALLY DEFERRED,
    PRIMARY KEY(page, message)
) WITHOUT ROWID;
CREATE INDEX shown_by_message ON shown(message);

CREATE TABLE blobs(  -- a file is kept as long as a row names it
    page INTEGER NOT NULL REFERENCES pages ON DELETE CASCADE,
    kind TEXT NOT NULL, name TEXT NOT NULL, size INTEGER NOT NULL, tier TEXT NOT NULL, place INTEGER,
    PRIMARY KEY(page, kind)
) WITHOUT ROWID;
CREATE INDEX blobs_by_name ON blobs(name);
CREATE TABLE garbage(name TEXT PRIMARY KEY) WITHOUT ROWID;  -- files to remove once no reader looks at an older snapshot
-- Not OR IGNORE: within a trigger the outer statement decides about conflicts, and an upsert refuses them.
CREATE TRIGGER blob_dropped AFTER DELETE ON blobs BEGIN
    INSERT INTO garbage SELECT old.name WHERE old.name NOT IN (SELECT name FROM garbage);
END;
CREATE TRIGGER blob_replaced AFTER UPDATE ON blobs BEGIN
    INSERT INTO garbage SELECT old.name WHERE old.name NOT IN (SELECT name FROM garbage);
END;

CREATE TABLE readings(
    page INTEGER NOT NULL REFERENCES pages ON DELETE CASCADE,
    tier TEXT NOT NULL, row INTEGER NOT NULL, text TEXT NOT NULL, confidence REAL NOT NULL,
    PRIMARY KEY(page, tier, row)
) WITHOUT ROWID;

CREATE TABLE receipts(number INTEGER PRIMARY KEY AUTOINCREMENT, time REAL NOT NULL, content TEXT NOT NULL);
CREATE TRIGGER receipt_changed BEFORE UPDATE ON receipts BEGIN SELECT RAISE(ABORT, 'receipts are only added'); END;
CREATE TRIGGER receipt_removed BEFORE DELETE ON receipts BEGIN SELECT RAISE(ABORT, 'receipts are only added'); END;

CREATE TABLE lines(
    line INTEGER PRIMARY KEY,
    page INTEGER REFERENCES pages ON DELETE CASCADE,  -- NULL while only the message's text shows it
    row INTEGER NOT NULL, first INTEGER NOT NULL, last INTEGER NOT NULL, text TEXT NOT NULL,
    spaced TEXT                                       -- as the index cuts it into words, where that differs
);
CREATE INDEX lines_by_page ON lines(page, row);
CREATE INDEX lines_by_message ON lines(first) WHERE page IS NULL;
CREATE VIEW indexed AS SELECT line, coalesce(spaced, text) AS text FROM lines;
-- The index keeps no text of its own, but its words are text all the same: it lives and dies with lines.
CREATE VIRTUAL TABLE words USING fts5(text, content='indexed', content_rowid='line', tokenize='unicode61 remove_diacritics 2');
CREATE TRIGGER line_added AFTER INSERT ON lines BEGIN
    INSERT INTO words(rowid, text) VALUES(new.line, coalesce(new.spaced, new.text));
END;
CREATE TRIGGER line_removed AFTER DELETE ON lines BEGIN
    INSERT INTO words(words, rowid, text) VALUES('delete', old.line, coalesce(old.spaced, old.text));
END;
"""

MIGRATIONS: Sequence[str] = ()  # the i-th takes a database from version i + 1 to i + 2


@contextmanager
def telling() -> Iterator[None]:
    """SQLite's errors, as ours."""
    try:
        yield
    except sqlite3.Error as error:
        raise _told(error) from None
    except UnicodeEncodeError:
        raise InputError("half a surrogate pair cannot be kept in names, details, settings and receipts") from None


def _told(error: sqlite3.Error) -> Exception:
    # Errors of Python's own module, such as for a closed connection, carry no code.
    name = getattr(error, "sqlite_errorname", "")
    if name.startswith(("SQLITE_CORRUPT", "SQLITE_NOTADB", "SQLITE_FORMAT")):
        return StoreDamagedError("the memory's database is damaged, or is none: restore index.db from a copy")
    if name.startswith(("SQLITE_BUSY", "SQLITE_LOCKED")):
        return StoreBusyError("the memory is in use by another process: try again")
    if name == "SQLITE_FULL":
        return OutputError("there is no space left for the memory; nothing of this call was kept")
    if name.startswith("SQLITE_READONLY"):
        return OutputError("the memory cannot be written: its folder or files are read-only")
    if name.startswith("SQLITE_CANTOPEN"):
        return StoreError("the memory's database cannot be opened: its files are missing, or its folder cannot be written")
    if name.startswith("SQLITE_IOERR"):
        return DiskFailedError("the disk failed under the memory; nothing of this call was acknowledged: open the memory again")
    return StoreError(f"the memory's database refused: {str(error)[:120]}")


def connect(folder: Path, *, writes: bool) -> sqlite3.Connection:
    """A connection without transactions of its own making.  Raises StoreVersionError, StoreDamagedError.

    A reader that may not write to the folder cannot make the log's index there.  Where there is no log either, nothing is being
    written and the file is read as it is.
    """
    mode = "mode=rw" if writes else "mode=ro"
    log = folder / f"{DATABASE}-wal"
    if not writes and not os.access(folder, os.W_OK) and not (log.exists() and log.stat().st_size):
        mode += "&immutable=1"
    with telling():
        uri = f"file:{quote(str(folder / DATABASE))}?{mode}"
        connection = sqlite3.connect(uri, uri=True, timeout=BUSY_SECONDS, isolation_level=None, check_same_thread=False)
        try:
            connection.text_factory = _text  # half a surrogate pair comes back as it went in
            for pragma in ("foreign_keys=ON", "cell_size_check=ON", "temp_store=MEMORY", "cache_size=-8000"):
                connection.execute(f"PRAGMA {pragma}")
            if not writes:
                connection.execute("PRAGMA query_only=ON")
        except BaseException:
            connection.close()
            raise
    return connection


def _text(content: bytes) -> str:
    return content.decode("utf-8", "surrogatepass")


def as_text(text: str) -> bytes:
    """For CAST(? AS TEXT): SQLite's own strings cannot hold half a surrogate pair."""
    if not isinstance(text, str):
        raise InputError(f"a memory keeps text, got {type(text).__name__}")
    return text.encode("utf-8", "surrogatepass")


def version(connection: sqlite3.Connection) -> int:
    """The database's version, 0 for an empty one.  Raises StoreVersionError for a newer one, StoreDamagedError for another's."""
    with telling():
        found = int(connection.execute("PRAGMA user_version").fetchone()[0])
        application = int(connection.execute("PRAGMA application_id").fetchone()[0])
        is_empty = connection.execute("SELECT NOT EXISTS(SELECT 1 FROM sqlite_schema)").fetchone()[0]
    if is_empty and found == 0:
        return 0
    if application != APPLICATION:
        raise StoreDamagedError("index.db in this folder is a database, but not that of an optmem memory")
    if found > VERSION:
        raise StoreVersionError(f"a newer optmem made this memory (version {found}, this one knows up to {VERSION}): update optmem")
    return found


def prepare(connection: sqlite3.Connection) -> None:
    """How the one writing connection works."""
    with telling():
        # FULL: a commit is on the disk when it returns.  secure_delete: what is deleted is overwritten.
        for pragma in ("auto_vacuum=NONE", "journal_mode=WAL", "synchronous=FULL", "secure_delete=ON"):
            connection.execute(f"PRAGMA {pragma}")
        connection.execute(f"PRAGMA journal_size_limit={LOG_LIMIT}")


def migrate(connection: sqlite3.Connection, migrations: Sequence[str] = MIGRATIONS) -> None:
    """Brings a database of an older version, or an empty one, to this version, in one transaction."""
    found, wanted = version(connection), len(migrations) + 1
    if found == wanted:
        return
    with telling():
        steps = [SCHEMA] if found == 0 else list(migrations[found - 1 :])
        connection.executescript(
            "\n".join(
                ["BEGIN IMMEDIATE;", *steps, f"PRAGMA application_id={APPLICATION};", f"PRAGMA user_version={wanted};", "COMMIT;"]
            )
        )
