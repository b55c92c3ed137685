"""The folder of a memory: what belongs in it, who may use it, and whether it is still the one that was opened.

    index.db        SQLite, with its log index.db-wal and index.db-shm while it is open
    blobs/          files by their content
    lock            held alone by the one process that writes
    readers         shared by everyone who looks at a snapshot; held alone while files are removed
    gate            every reader passes it before it shares readers; who forgets closes it, so that readers cannot starve it

All of it is of the owner alone, 0700 and 0600, whatever the umask.  Nothing in it may be a link.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from optmem.errors import InputError, OutputError, SourceNotFoundError, StoreBusyError, StoreError
from optmem.memory.blobs import BlobFolder, not_written, refusing
from optmem.memory.locks import FileLock
from optmem.memory.schema import BUSY_SECONDS, DATABASE

BLOBS = "blobs"
DATABASE_FILES = (DATABASE, f"{DATABASE}-wal", f"{DATABASE}-shm", f"{DATABASE}-journal")
LOCKS = ("lock", "readers", "gate")
ENTRIES = {*DATABASE_FILES, *LOCKS, BLOBS}


class MemoryFolder:
    """An open folder of a memory."""

    def __init__(self, path: str | os.PathLike[str], *, writes: bool, create: bool = False) -> None:
        """Raises SourceNotFoundError, InputError where the folder is no memory, StoreBusyError where another process writes."""
        self.path = _checked(path)
        self._process = os.getpid()
        self._descriptor = -1
        if create:
            _make(self.path)
        elif not self.path.is_dir():
            raise SourceNotFoundError(f"there is no memory at {self.path.name!r}")
        with refusing(self.path.name):
            self._descriptor = os.open(self.path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            self._open(writes)
        except BaseException:
            self.close()
            raise

    def _open(self, writes: bool) -> None:
        entries = self.entries()
        is_new = DATABASE not in entries
        if (is_new and not writes) or (is_new and entries - ENTRIES):
            raise InputError(f"the folder {self.path.name!r} is no memory: it has no {DATABASE}")
        self.lock, self.readers, self.gate = (FileLock(self._descriptor, name, create=writes) for name in LOCKS)
        if writes:
            if not self.lock.take(alone=True, seconds=0):
                raise StoreBusyError(
                    f"process {self.lock.owner()} writes to this memory: one writer at a time, any number of readers"
                )
            self.lock.write_owner()
            self._make_parts()
        self._check_kinds()
        self.blobs = BlobFolder(self._descriptor, BLOBS)
        # The database's own file: a copy put in its place while it is open would be another memory.
        self._database = self._status(DATABASE)

    def _make_parts(self) -> None:
        with refusing(BLOBS), suppress(FileExistsError):
            os.mkdir(BLOBS, 0o700, dir_fd=self._descriptor)
        with refusing(DATABASE), suppress(FileExistsError):
            # SQLite would make it readable for everyone; its log gets the modes that this has.
            os.close(os.open(DATABASE, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600, dir_fd=self._descriptor))
        self._check_kinds()
        with refusing(self.path.name):
            os.fchmod(self._descriptor, 0o700)
            for name in ENTRIES & self.entries():
                os.chmod(name, 0o700 if name == BLOBS else 0o600, dir_fd=self._descriptor)

    def _check_kinds(self) -> None:
        for name in ENTRIES:
            with suppress(FileNotFoundError):
                mode = os.stat(name, dir_fd=self._descriptor, follow_symlinks=False).st_mode
                if not (stat.S_ISDIR if name == BLOBS else stat.S_ISREG)(mode):
                    raise StoreError(f"{name!r} of the memory is a link, or not what it should be, and is not followed")

    def _status(self, name: str) -> tuple[int, int]:
        with refusing(name):
            found = os.stat(name, dir_fd=self._descriptor, follow_symlinks=False)
        return found.st_dev, found.st_ino

    def check(self) -> None:
        """Raises StoreError where this process is not the one that opened it, or the folder is not what was opened.

        Writing to a folder that was removed succeeds and keeps nothing: what is acknowledged must be there.
        """
        if self._descriptor < 0:
            raise StoreError("the memory was closed: open it again")
        if os.getpid() != self._process:
            raise StoreError("the memory was opened before this process was forked from its parent: open it again in this one")
        try:
            found, ours = self.path.stat(), os.fstat(self._descriptor)
        except FileNotFoundError:
            raise StoreError("the memory's folder was moved or removed while it was open") from None
        if (found.st_dev, found.st_ino) != (ours.st_dev, ours.st_ino) or self._status(DATABASE) != self._database:
            raise StoreError("the memory's folder or database was replaced while it was open: open it again")

    @contextmanager
    def reading(self) -> Iterator[None]:
        """Inside, no file that a snapshot from now on refers to is removed.  Raises StoreBusyError."""
        otherwise = "the memory is forgetting something: try again"
        with self.gate.held(alone=False, seconds=3 * BUSY_SECONDS, otherwise=otherwise):
            if not self.readers.take(alone=False, seconds=BUSY_SECONDS):
                raise StoreBusyError(otherwise)
        try:
            yield
        finally:
            self.readers.let_go()

    @contextmanager
    def without_readers(self, seconds: float) -> Iterator[None]:
        """Inside, nobody looks at a snapshot.  Raises StoreBusyError where one is looked at for longer than this."""
        otherwise = (
            "somebody reads an older state of the memory, which cannot be forgotten under them: try again when they are done"
        )
        with (
            self.gate.held(alone=True, seconds=seconds, otherwise=otherwise),
            self.readers.held(alone=True, seconds=seconds, otherwise=otherwise),
        ):
            yield

    def sync(self) -> None:
        """Makes the names in the folder durable.  Raises as not_written."""
        try:
            os.fsync(self._descriptor)
        except OSError as error:
            raise not_written(error) from None

    def entries(self) -> set[str]:
        """Names of what is in the folder."""
        return set(os.listdir(self._descriptor))  # noqa: PTH208 - of a descriptor

    def files(self) -> Iterator[tuple[str, int]]:
        """Every regular file, its name and a descriptor that is open until the next one is asked for; links are passed over."""
        yield from _files(self._descriptor, "")
        with refusing(BLOBS):
            blobs = os.open(BLOBS, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC | os.O_NOFOLLOW, dir_fd=self._descriptor)
        try:
            yield from _files(blobs, f"{BLOBS}/")
        finally:
            os.close(blobs)

    def wide_modes(self) -> list[str]:
        """Names of what others than the owner may use."""
        names = sorted(ENTRIES & self.entries())
        wide = [name for name in names if os.stat(name, dir_fd=self._descriptor, follow_symlinks=False).st_mode & 0o077]
        return wide + ([self.path.name] if os.fstat(self._descriptor).st_mode & 0o077 else [])

    def close(self) -> None:
        """Lets go of everything; a second time does nothing."""
        for name in ("blobs", "gate", "readers", "lock"):
            if hasattr(self, name):
                getattr(self, name).close()
        descriptor, self._descriptor = self._descriptor, -1
        if descriptor >= 0:
            os.close(descriptor)

    def __del__(self) -> None:
        if getattr(self, "_descriptor", -1) >= 0:
            self.close()


def _files(folder: int, prefix: str) -> Iterator[tuple[str, int]]:
    for name in sorted(os.listdir(folder)):
        with suppress(FileNotFoundError):  # removed since
            if not stat.S_ISREG(os.stat(name, dir_fd=folder, follow_symlinks=False).st_mode):
                continue
            file = os.open(name, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK, dir_fd=folder)
            try:
                yield prefix + name, file
            finally:
                os.close(file)


def _checked(path: object) -> Path:
    """The folder's path without links.  Raises InputError for what is no path."""
    if not isinstance(path, str | os.PathLike):
        raise InputError(f"a memory is a folder, whose name is a str or a Path, got {type(path).__name__}")
    try:
        found = Path(os.fsdecode(path))
        if not str(path) or "\0" in str(found):
            raise ValueError
        resolved = found.resolve()
        if resolved.exists() and not resolved.is_dir():
            raise InputError(f"a memory is a folder, {resolved.name!r} is none")
    except InputError:
        raise
    except (OSError, ValueError, RuntimeError):  # too long, with a zero byte, a loop of links
        raise InputError(f"{str(path)[:80]!r} is no name for a memory's folder") from None
    return resolved


def _make(path: Path) -> None:
    try:
        path.mkdir(0o700, parents=True, exist_ok=True)
        # The name of a new folder is durable once its parent is.
        parent = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            os.fsync(parent)
        finally:
            os.close(parent)
    except OSError as error:
        raise OutputError(f"a memory cannot be made at {path.name!r}: {error.strerror}") from None
