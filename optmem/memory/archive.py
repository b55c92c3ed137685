"""A whole memory in one file, and back: a tar of JSON lines, one file a table, and the pages' files by their checksums.

The last member is the manifest, with the checksum of every other one that is not its own.  It is read as what a stranger wrote:
plain names only, no links, no compression, types checked row by row, and at the end the store's own rules.
"""

from __future__ import annotations

import errno
import hashlib
import io
import json
import os
import re
import secrets
import shutil
import tarfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from optmem.errors import InputError, OutputError, SourceNotFoundError
from optmem.items import Watch, unwatched
from optmem.memory.blobs import BlobDamaged, blob_name
from optmem.memory.details import Details
from optmem.memory.settings import NAME, STATE, Settings, State
from optmem.memory.store import Store
from optmem.memory.tables import TABLES, check_row
from optmem.memory.view import View

FORMAT = "optmem memory 1"
MANIFEST = "manifest.json"
MOST_FILE, MOST_LINE, MOST_ALL = 1 << 30, 256 << 20, 1 << 40  # bytes
_NO_LINKS = (errno.EPERM, errno.ENOTSUP, errno.ENOSYS)  # what file systems say that have no hard links, such as a stick's
_BLOB = re.compile(r"blobs/([0-9a-f]{64})")


@dataclass(frozen=True, slots=True)
class Exported:
    """What was written."""

    bytes: int
    messages: int
    pages: int
    damaged: tuple[int, ...]  # numbers of pages that have lost a file: it is left out


def export(view: View, path: str | os.PathLike[str], watch: Watch = unwatched) -> Exported:
    """Writes what a view sees.  Raises OutputError."""
    target = Path(path)
    counts: dict[str, int] = {}
    sums: dict[str, str] = {}
    if os.path.lexists(target):
        raise _there(target)
    try:
        with _appearing(target) as file:
            with tarfile.open(fileobj=file, mode="w", format=tarfile.USTAR_FORMAT) as tar:
                lost = _blobs(view, tar, watch)
                for table in TABLES:
                    sums[table], counts[table] = _table(view, tar, table, lost)
                manifest = {"format": FORMAT, "tables": {table: [counts[table], sums[table]] for table in TABLES}}
                _member(tar, MANIFEST, json.dumps(manifest).encode())
            size = file.tell()
    except FileExistsError:
        raise _there(target) from None
    except OSError as error:
        raise OutputError(f"cannot write {target.name}: {error.strerror or error}") from None
    return Exported(size, counts["messages"], counts["pages"], tuple(sorted({page for page, _ in lost})))


def _there(target: Path) -> OutputError:
    return OutputError(f"{target.name!r} is there already: export to a new file")


@contextmanager
def _appearing(target: Path) -> Iterator[IO[bytes]]:
    """A new file that gets its name when all of it is on the disk, and replaces none.  Raises FileExistsError, OSError.

    What is unfinished has a name of its own, so that two exports to one folder never touch each other's.
    """
    unfinished = target.with_name(f".{secrets.token_hex(8)}.unfinished")
    folder = os.open(target.parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        descriptor = os.open(unfinished, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        try:
            with os.fdopen(descriptor, "w+b") as file:
                yield file
                file.flush()
                os.fsync(file.fileno())
            _give_name(unfinished, target)
        finally:
            unfinished.unlink(missing_ok=True)
        os.fsync(folder)
    finally:
        os.close(folder)


def _give_name(unfinished: Path, target: Path) -> None:
    """As a rename, but it refuses a name that was taken meanwhile."""
    try:
        os.link(unfinished, target)
    except OSError as error:
        if error.errno not in _NO_LINKS:
            raise
        os.close(os.open(target, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600))  # what the rename replaces is ours
        unfinished.rename(target)


def _member(tar: tarfile.TarFile, name: str, content: bytes) -> None:
    info = tarfile.TarInfo(name)
    info.size, info.mode = len(content), 0o600
    tar.addfile(info, io.BytesIO(content))


def _blobs(view: View, tar: tarfile.TarFile, watch: Watch) -> set[tuple[int, str]]:
    """Writes every file once; pages and kinds of those that are damaged."""
    written: set[str] = set()
    lost: set[tuple[int, str]] = set()
    for page in watch(view.pages(), "exporting", total=view.counts().pages):
        for blob in view.blobs(page.number):
            if blob.name in written:
                continue
            try:
                _member(tar, f"blobs/{blob.name}", view.bytes_of(blob))
                written.add(blob.name)
            except BlobDamaged:
                lost.add((page.number, blob.kind))
    return lost


def _table(view: View, tar: tarfile.TarFile, table: str, lost: set[tuple[int, str]]) -> tuple[str, int]:
    """Writes a table through a file beside, row by row: a history may be larger than memory."""
    import tempfile

    digest, count = hashlib.sha256(), 0
    with tempfile.TemporaryFile(dir=Path(tar.name).parent if tar.name else None) as file:  # type: ignore[arg-type]
        for row in view.table(table):
            if table == "blobs" and (row[0], row[1]) in lost:
                continue
            line = json.dumps(row, separators=(",", ":")).encode() + b"\n"
            file.write(line)
            digest.update(line)
            count += 1
        info = tarfile.TarInfo(f"{table}.jsonl")
        info.size, info.mode = file.tell(), 0o600
        file.seek(0)
        tar.addfile(info, file)
    return digest.hexdigest(), count


# --- back ---------------------------------------------------------------------------------------------------------------------


def restore(archive: str | os.PathLike[str], path: str | os.PathLike[str], watch: Watch = unwatched) -> None:
    """Makes a new memory of a file.  Raises as `Memory.import_` tells."""
    target = Path(path)
    if target.exists():
        raise OutputError(f"a memory is imported to a new folder, and {target.name!r} is there already")
    try:
        file = Path(archive).open("rb")  # noqa: SIM115 - its with is below: what fails in it has other reasons
    except OSError as error:
        raise SourceNotFoundError(f"{Path(archive).name} cannot be opened: {error.strerror}") from None
    with file:
        try:
            with Store.open(path) as store:
                with tarfile.open(fileobj=file, mode="r:") as tar:
                    _Restoring(store, tar).run(watch)
                report = store.verify()
            if not report.is_clean:
                raise InputError(f"the archive does not hold a whole memory: {report.problems[0].kind}, {report.problems[0].what}")
        except BaseException as error:
            shutil.rmtree(target, ignore_errors=True)
            if isinstance(error, tarfile.TarError | EOFError | OSError | ValueError | KeyError | TypeError) and not isinstance(
                error, InputError | OutputError
            ):
                raise InputError(f"this is no archive of a memory, or a damaged one: {type(error).__name__}") from None
            raise


class _Restoring:
    def __init__(self, store: Store, tar: tarfile.TarFile) -> None:
        self.store, self.tar = store, tar
        self.seen: set[str] = set()
        self.sums: dict[str, tuple[int, str]] = {}
        self.files: dict[str, int] = {}
        self.manifest: Any = None

    def run(self, watch: Watch) -> None:
        """All of it in one transaction."""
        with self.store.transaction() as change:
            for member in watch(self.tar, "importing", unit="file"):
                file = self._checked(member)
                blob = _BLOB.fullmatch(member.name)
                if blob is not None:
                    content = file.read(MOST_FILE)
                    if blob_name(content) != blob[1]:
                        raise InputError(f"the archive is damaged: {member.name[:20]} is not what its name says")
                    change.restore_file(content)
                    self.files[blob[1]] = len(content)
                elif member.name == MANIFEST:
                    self.manifest = json.loads(file.read(1 << 20))
                else:
                    table = member.name.removesuffix(".jsonl")
                    self.sums[table] = change.restore_table(table, self._rows(table, file))
            self._check_manifest()

    def _checked(self, member: tarfile.TarInfo) -> IO[bytes]:
        is_known = _BLOB.fullmatch(member.name) or member.name in (MANIFEST, *(f"{table}.jsonl" for table in TABLES))
        if not member.isreg() or not is_known or member.name in self.seen:
            raise InputError(f"the archive of a memory has no member {member.name[:80]!r}, or only one")
        if self.manifest is not None:
            raise InputError("behind the manifest there is nothing in the archive of a memory")
        most = MOST_ALL if member.name.endswith(".jsonl") else MOST_FILE
        if member.size > most:
            raise InputError(f"{member.name[:80]} has {member.size:,} bytes, at most {most:,} are read")
        self.seen.add(member.name)
        file = self.tar.extractfile(member)
        assert file is not None, "it is a regular file"
        return file

    def _rows(self, table: str, file: IO[bytes]) -> Iterator[tuple[bytes, Sequence[Any]]]:
        while line := file.readline(MOST_LINE):
            row = check_row(table, json.loads(line))
            self._check_meaning(table, row)
            yield line, row

    def _check_meaning(self, table: str, row: Sequence[Any]) -> None:
        """What the store keeps as JSON and the memory has to understand."""
        if table == "pages":
            Details.from_json(row[11])
        elif table == "settings" and row[0] == NAME:
            Settings.from_json(row[1])
        elif table == "settings" and row[0] == STATE:
            State.from_json(row[1])
        elif table == "blobs" and self.files.get(row[2]) != row[3]:
            raise InputError("the archive names a file that it does not hold")

    def _check_manifest(self) -> None:
        wanted = {table: list(found) for table, found in self.sums.items()}
        if not isinstance(self.manifest, dict) or self.manifest.get("format") != FORMAT:
            raise InputError("the archive has no manifest of a memory, or one of another version")
        if self.manifest.get("tables") != wanted or wanted.keys() != set(TABLES):
            raise InputError("the archive is damaged: its tables are not those of its manifest")
