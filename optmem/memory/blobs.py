"""Files by their content: a blob's name is the SHA-256 of its bytes, so a name is a checksum, and is verified on every read.

A blob appears whole or not at all: temporary name, write, fsync, rename, and fsync of the folder before anything refers to it.
Everything is opened relative to the folder's descriptor and never through a link.
"""

from __future__ import annotations

import errno
import hashlib
import os
import re
import secrets
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress

from optmem.errors import DiskFailedError, InputError, OptmemError, OutputError, StoreError

_NAME = re.compile(r"[0-9a-f]{64}")
UNFINISHED = re.compile(r"\.[0-9a-f]{16}\.unfinished")
LARGEST = 1 << 30  # bytes of one blob; a Gundam page's tokens are 3 MB
_OPENING = os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK
_FOR_NOW = (errno.ENOSPC, errno.EDQUOT, errno.EMFILE, errno.ENFILE, errno.EROFS, errno.EACCES, errno.EPERM)


@contextmanager
def refusing(name: str) -> Iterator[None]:
    """Turns the operating system's refusals to open something of the memory into sentences."""
    try:
        yield
    except FileNotFoundError:
        raise StoreError(f"the memory has no {name!r}: its folder was moved, removed, or is no memory") from None
    except OSError as error:
        if error.errno in (errno.ELOOP, errno.ENOTDIR):
            raise StoreError(f"{name!r} of the memory is a link or no folder, and is not followed") from None
        raise OutputError(f"{name!r} of the memory cannot be opened: {error.strerror}") from None


class BlobDamaged(Exception):  # noqa: N818 - inside this package only: the caller knows the page, and raises PageCorrupted
    """A blob's file is not what its name says."""


def not_written(error: OSError) -> OptmemError:
    """OutputError where a later try may succeed, DiskFailedError where what the disk holds is not known."""
    if error.errno in _FOR_NOW:
        return OutputError(f"the memory could not be written: {error.strerror}; nothing of this call was kept")
    return DiskFailedError(
        f"the disk failed under the memory: {error.strerror}; nothing of this call was acknowledged: open it again"
    )


class BlobFolder:
    """The folder of blobs.  One process writes; any number read."""

    def __init__(self, parent: int, name: str) -> None:
        with refusing(name):
            self._folder = os.open(name, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC | os.O_NOFOLLOW, dir_fd=parent)

    def put(self, content: bytes) -> str:
        """Writes a blob under its name, replacing what is there.  Durable after the next sync().  Raises as not_written."""
        if len(content) > LARGEST:
            raise InputError(f"a page's picture or tokens are at most {LARGEST:,} bytes, got {len(content):,}")
        name = blob_name(content)
        unfinished = f".{secrets.token_hex(8)}.unfinished"
        try:
            flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC | os.O_NOFOLLOW
            file = os.open(unfinished, flags, 0o600, dir_fd=self._folder)
            try:
                os.fchmod(file, 0o600)  # a umask can take away more than it should
                rest = memoryview(content)
                while rest:
                    rest = rest[os.write(file, rest) :]
                os.fsync(file)
            finally:
                os.close(file)
            os.rename(unfinished, name, src_dir_fd=self._folder, dst_dir_fd=self._folder)
        except OSError as error:
            with suppress(OSError):
                os.unlink(unfinished, dir_fd=self._folder)
            raise not_written(error) from None
        return name

    def sync(self) -> None:
        """Makes the names durable.  Raises as not_written; a later success says nothing about names from before a failure."""
        try:
            os.fsync(self._folder)
        except OSError as error:
            raise not_written(error) from None

    def read(self, name: str) -> bytes:
        """The bytes of a blob.  Raises BlobDamaged where they are not there, or not those that the name was made from."""
        assert _NAME.fullmatch(name), "names come from put"
        try:
            file = os.open(name, _OPENING, dir_fd=self._folder)
        except FileNotFoundError:
            raise BlobDamaged("is missing") from None
        except OSError as error:
            if error.errno == errno.ELOOP:
                raise BlobDamaged("is a link") from None
            raise BlobDamaged(f"cannot be opened ({error.strerror})") from None
        try:
            found = os.fstat(file)
            if not stat.S_ISREG(found.st_mode) or found.st_size > LARGEST:
                raise BlobDamaged("is no file of a memory")
            content = _read_all(file, found.st_size)
        except OSError as error:
            raise BlobDamaged(f"cannot be read ({error.strerror})") from None
        finally:
            os.close(file)
        if blob_name(content) != name:
            raise BlobDamaged("is empty" if not content else f"is not what was written ({len(content):,} bytes)")
        return content

    def is_whole(self, name: str) -> bool:
        """Whether a blob is there and undamaged."""
        try:
            self.read(name)
        except BlobDamaged:
            return False
        return True

    def remove(self, name: str, *, wipe: bool = False) -> None:
        """Removes a file if it is there; wipe overwrites it with zeros first, so that its blocks are not handed on as they were.

        What a disk keeps below the file system (journals, copies of a worn block, snapshots) is out of a program's reach.
        """
        with suppress(FileNotFoundError):
            if wipe and _NAME.fullmatch(name):
                self._overwrite(name)
            os.unlink(name, dir_fd=self._folder)

    def _overwrite(self, name: str) -> None:
        try:
            file = os.open(name, os.O_WRONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK, dir_fd=self._folder)
        except OSError as error:
            if error.errno == errno.ELOOP:
                return  # a link's target is not ours to touch
            raise
        try:
            left = min(os.fstat(file).st_size, LARGEST)
            zeros = memoryview(bytes(min(left, 1 << 20)))
            while left:
                left -= os.write(file, zeros[: min(left, len(zeros))])
            os.fsync(file)
        finally:
            os.close(file)

    def names(self) -> Iterator[tuple[str, bool]]:
        """Every entry of the folder, and whether its name is a blob's."""
        with os.scandir(self._folder) as entries:
            for entry in entries:
                yield entry.name, bool(_NAME.fullmatch(entry.name))

    def close(self) -> None:
        """Lets go of the folder; a second time does nothing."""
        folder, self._folder = self._folder, -1
        if folder >= 0:
            os.close(folder)

    def __del__(self) -> None:
        if getattr(self, "_folder", -1) >= 0:
            self.close()


def blob_name(content: bytes) -> str:
    """The name of these bytes."""
    return hashlib.sha256(content).hexdigest()


def _read_all(file: int, size: int) -> bytes:
    parts = []
    while size > 0 and (part := os.read(file, size)):
        parts.append(part)
        size -= len(part)
    return b"".join(parts)
