"""Locks between processes: flock on files of the memory's folder.

A lock belongs to the open file, so the kernel lets go of it when its owner dies, however it dies: there is no stale lock.  A child
made by fork shares its parent's open files and would go on holding the lock of a dead parent, so it closes its copy at once.
"""

from __future__ import annotations

import errno
import fcntl
import os
import time
import weakref
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import partial

from optmem.errors import StoreBusyError, StoreError
from optmem.memory.blobs import refusing

_PAUSES = (0.001, 0.002, 0.005, 0.01, 0.02)  # seconds between tries; flock itself knows no time limit
_REFUSALS = (errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL)


class FileLock:
    """A lock file that one process holds alone, or several share."""

    def __init__(self, folder: int, name: str, *, create: bool) -> None:
        """folder: descriptor of the folder.  Raises StoreError where the file is a link or cannot be opened."""
        flags = (os.O_RDWR | os.O_CREAT) if create else os.O_RDONLY
        with refusing(name):
            self._file = os.open(name, flags | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600, dir_fd=folder)
        # The registration outlives the lock: a weak reference, some hundred bytes for each memory ever opened.
        os.register_at_fork(after_in_child=partial(_close_in_child, weakref.ref(self)))

    def take(self, *, alone: bool, seconds: float) -> bool:
        """Whether the lock could be had within so many seconds.  Raises StoreError where the file system knows no locks."""
        wanted = (fcntl.LOCK_EX if alone else fcntl.LOCK_SH) | fcntl.LOCK_NB
        until, tries = time.monotonic() + seconds, 0
        while True:
            try:
                fcntl.flock(self._file, wanted)
                return True
            except BlockingIOError:
                if time.monotonic() >= until:
                    return False
            except OSError as error:
                if error.errno in _REFUSALS:
                    raise StoreError("this file system has no locks between processes: keep the memory on a local disk") from None
                raise StoreError(f"the memory cannot be locked: {error.strerror}") from None
            time.sleep(_PAUSES[min(tries, len(_PAUSES) - 1)])
            tries += 1

    def let_go(self) -> None:
        """For others to take."""
        fcntl.flock(self._file, fcntl.LOCK_UN)

    @contextmanager
    def held(self, *, alone: bool, seconds: float, otherwise: str) -> Iterator[None]:
        """Inside, the lock is held.  Raises StoreBusyError with these words where it cannot be had in time."""
        if not self.take(alone=alone, seconds=seconds):
            raise StoreBusyError(otherwise)
        try:
            yield
        finally:
            self.let_go()

    def write_owner(self) -> None:
        """Says in the file which process holds it: for people's eyes and messages, the lock itself needs no words.

        So a disk that is full keeps nobody from opening what may be read and forgotten there.
        """
        with suppress(OSError):
            os.ftruncate(self._file, 0)
            os.pwrite(self._file, f"{os.getpid()}\n".encode(), 0)

    def owner(self) -> str:
        """The number of the process that wrote itself down last, or "unknown"."""
        said = os.pread(self._file, 32, 0).decode("ascii", "replace").strip()
        return said if said.isdigit() else "unknown"

    def close(self) -> None:
        """Lets go of the lock and the file; a second time does nothing."""
        file, self._file = self._file, -1
        if file >= 0:
            os.close(file)

    def __del__(self) -> None:
        if getattr(self, "_file", -1) >= 0:
            self.close()


def _close_in_child(lock: weakref.ref[FileLock]) -> None:
    found = lock()
    if found is not None:
        found.close()  # closes this process's copy; LOCK_UN would take the lock from the parent
