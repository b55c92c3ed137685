"""The store of a memory: one writer, any number of readers in any number of processes, and what is acknowledged is on the disk.

    with Store.open("agent.optmem") as store:
        with store.transaction() as change:          # all of it or nothing
            change.add_messages([...])
        with store.snapshot() as view:               # one state, however long it is looked at
            view.search("where is the key", limit=3)
    with Reader.open("agent.optmem") as reader:      # in any other process
        with reader.snapshot() as view: ...

When a transaction's block is left, its files were written, synced and renamed, their folder was synced, and the database's commit
was synced, in this order.  After a disk failed, nothing more is acknowledged until the memory is opened again, which copies the
log into the database first: a log that was written but could not be synced must not carry later commits.
"""

from __future__ import annotations

import ctypes
import os
import sqlite3
import threading
import weakref
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from functools import partial
from typing import Self

from optmem.errors import DiskFailedError, OptmemError, OutputError, StoreDamagedError, StoreError, StoreVersionError
from optmem.memory.blobs import UNFINISHED, not_written
from optmem.memory.check import Verified, verify
from optmem.memory.erase import needs_scrub, scrub
from optmem.memory.folder import MemoryFolder
from optmem.memory.schema import BUSY_SECONDS, VERSION, connect, migrate, prepare, telling, version
from optmem.memory.transaction import Transaction
from optmem.memory.view import View


class _Opened:
    """What a reader and the writer share: a folder, a connection, and one thread at a time."""

    def __init__(self, folder: MemoryFolder, connection: sqlite3.Connection) -> None:
        self._folder, self._connection = folder, connection
        self._turn = threading.RLock()
        # A child made by fork has a copy of the connection.  Even closing it there could roll back or checkpoint under the parent.
        os.register_at_fork(after_in_child=partial(_keep_in_child, weakref.ref(self)))

    @contextmanager
    def _ready(self) -> Iterator[None]:
        """Inside, it is this thread's turn, and the memory is the one that was opened."""
        self._folder.check()  # before the lock, which a fork may have copied while another thread held it
        with self._turn:
            self._folder.check()
            if self._connection.in_transaction:
                raise StoreError("this thread is inside a snapshot or transaction of the memory already: use that one")
            yield

    def close(self) -> None:
        """Lets go of the memory; a second time does nothing."""
        self._connection.close()
        self._folder.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class Reader(_Opened):
    """Looks at a memory while another process, or this one, writes to it."""

    @classmethod
    def open(cls, path: str | os.PathLike[str]) -> Reader:
        """Raises SourceNotFoundError, InputError where it is no memory, StoreVersionError, StoreDamagedError."""
        folder = MemoryFolder(path, writes=False)
        try:
            connection = connect(folder.path, writes=False)
            try:
                _check_version(connection)
                return cls(folder, connection)
            except BaseException:
                connection.close()
                raise
        except BaseException:
            folder.close()
            raise

    @contextmanager
    def snapshot(self) -> Iterator[View]:
        """One state of the memory, whatever is written meanwhile.  Keep it short: nothing is forgotten under it."""
        with self._ready(), self._folder.reading():
            _check_version(self._connection)
            with telling():
                self._connection.execute("BEGIN")
            view = View(self._connection, self._folder.blobs)
            try:
                view.last_seq()  # the state is that of the first look
                yield view
            finally:
                view.end()
                with suppress(sqlite3.Error):
                    self._connection.execute("ROLLBACK")


class Store(_Opened):
    """The one writer of a memory."""

    def __init__(self, folder: MemoryFolder, connection: sqlite3.Connection) -> None:
        super().__init__(folder, connection)
        self._failed = False  # the disk did, and what it keeps is not known

    @classmethod
    def open(cls, path: str | os.PathLike[str], *, create: bool = True) -> Store:
        """Opens a memory to write, makes a new one where there is none, and clears up what a killed writer left.

        Raises StoreBusyError while another process writes, StoreVersionError, StoreDamagedError, OutputError, InputError.
        """
        folder = MemoryFolder(path, writes=True, create=create)
        try:
            connection = connect(folder.path, writes=True)
            try:
                _prepare(connection, folder)
                store = cls(folder, connection)
                store._clear_up()
                return store
            except BaseException:
                connection.close()
                raise
        except BaseException:
            folder.close()
            raise

    @contextmanager
    def transaction(self) -> Iterator[Transaction]:
        """Inside, the memory is changed; all of it is durable when the block is left, or nothing has changed where it raises.

        Raises OutputError where the disk is full (a later try may succeed), StoreError where it failed, and what
        Transaction.erase tells of.
        """
        with self._ready():
            self._check_failed()
            with ExitStack() as held:
                stop_readers = partial(held.enter_context, self._folder.without_readers(BUSY_SECONDS))
                change = Transaction(self._connection, self._folder.blobs, stop_readers)
                with telling():
                    self._connection.execute("BEGIN IMMEDIATE")
                try:
                    yield change
                    change.settle()
                except BaseException as error:
                    self._note(error)
                    self._roll_back()
                    change.take_back()
                    raise
                else:
                    self._commit(change)
                finally:
                    change.end()
                if change.erases:
                    self._forget_for_good()
            self._sweep()

    @contextmanager
    def snapshot(self) -> Iterator[View]:
        """The memory as it is; other threads wait meanwhile."""
        with self._ready():
            self._check_failed()
            with telling():
                self._connection.execute("BEGIN")
            view = View(self._connection, self._folder.blobs)
            try:
                yield view
            finally:
                view.end()
                self._roll_back()

    def verify(self, needles: Sequence[str | bytes] = ()) -> Verified:
        """Looks at everything: the database, the index, every checksum, and for texts or bytes that must not be anywhere."""
        with self._ready():
            return verify(self._connection, self._folder, needles)

    def close(self) -> None:
        """Empties the log into the database and lets go; a second time does nothing."""
        with suppress(OptmemError, sqlite3.Error):
            self._folder.check()
            self._connection.execute("PRAGMA busy_timeout=0")  # a reader may still be there: its log stays, and is good
            self._connection.execute("PRAGMA wal_checkpoint(TRUNCATE)")
        super().close()

    # Inside

    def _check_failed(self) -> None:
        if self._failed:
            raise DiskFailedError("the disk failed under the memory, and nothing more is acknowledged: open it again")

    def _note(self, error: BaseException) -> None:
        """What a failed disk said it kept may be lost, and a later sync that succeeds says nothing about it."""
        self._failed = self._failed or isinstance(error, DiskFailedError)

    def _commit(self, change: Transaction) -> None:
        """Where the disk fails, files stay until the memory is opened again: the log may yet be found whole, and name them."""
        try:
            with telling():
                self._connection.execute("COMMIT")
        except BaseException as error:
            self._note(error)
            self._roll_back()
            if isinstance(error, OutputError):  # no space: the log's last page was not written
                change.take_back()
            raise

    def _roll_back(self) -> None:
        with suppress(sqlite3.Error):
            if self._connection.in_transaction:
                self._connection.execute("ROLLBACK")

    def _forget_for_good(self) -> None:
        """Nobody looks at an older state.  Where this is cut short, opening the memory goes on with it."""
        try:
            with _writing():
                self._remove_garbage(wipe=True)
                scrub(self._connection)
        except OptmemError as error:
            self._failed = True
            raise DiskFailedError(f"forgotten, but its bytes are not overwritten yet: open the memory again ({error})") from None

    def _sweep(self) -> None:
        """Removes files that were replaced, unless a reader looks at an older state: then after a later change, or at opening.

        What was asked for is done and durable, so nothing is raised; the files are listed until they are removed.
        """
        try:
            with telling():
                is_empty = self._connection.execute("SELECT NOT EXISTS(SELECT 1 FROM garbage)").fetchone()[0]
            if not is_empty:
                with _writing(), self._folder.without_readers(0):
                    self._remove_garbage(wipe=False)
        except OptmemError as error:
            self._note(error)

    def _remove_garbage(self, *, wipe: bool) -> None:
        with telling():
            query = "SELECT name, EXISTS(SELECT 1 FROM blobs WHERE blobs.name = garbage.name) FROM garbage"
            rows = self._connection.execute(query).fetchall()
        for name, is_used in rows:
            if not is_used:
                self._folder.blobs.remove(name, wipe=wipe)
        if rows:
            self._folder.blobs.sync()
            with telling():
                self._connection.execute("DELETE FROM garbage")

    def _clear_up(self) -> None:
        """After a killed writer.  The lock is ours, so no file here is just being written."""
        is_forgetting = needs_scrub(self._connection)
        with telling():
            kept = {name for (name,) in self._connection.execute("SELECT name FROM blobs UNION SELECT name FROM garbage")}
        for name, is_blob in list(self._folder.blobs.names()):
            if UNFINISHED.fullmatch(name) or (is_blob and name not in kept):
                with _writing():
                    self._folder.blobs.remove(name, wipe=is_forgetting)
        if is_forgetting:
            with _writing(), self._folder.without_readers(BUSY_SECONDS):
                self._remove_garbage(wipe=True)
                scrub(self._connection)
        self._sweep()


def _prepare(connection: sqlite3.Connection, folder: MemoryFolder) -> None:
    """Raises StoreVersionError before anything is touched, StoreDamagedError where an empty database has files."""
    if version(connection) == 0 and any(is_blob for _, is_blob in folder.blobs.names()):
        raise StoreDamagedError("the memory's database is empty but it has files: restore index.db from a copy")
    prepare(connection)
    migrate(connection)
    with telling():
        # What a failed disk left in the log is copied into the database, and synced there, before anything is built on it.
        connection.execute("PRAGMA wal_checkpoint(PASSIVE)")
    folder.sync()  # the log has its name now; SQLite syncs that too, but does not say where it fails


def _check_version(connection: sqlite3.Connection) -> None:
    found = version(connection)
    if found != VERSION:
        made = f"version {found}, this optmem reads {VERSION}" if found else "it was never finished"
        raise StoreVersionError(f"the memory must be opened once to write before it can be read: {made}")


@contextmanager
def _writing() -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise not_written(error) from None


def _keep_in_child(opened: weakref.ref[_Opened]) -> None:
    found = opened()
    if found is not None:
        ctypes.pythonapi.Py_IncRef(ctypes.py_object(found._connection))  # never closed in this process
