"""Files that strangers wrote: opened without leaving their folder, JSON read within limits and strictly.  Folders to write to."""

from __future__ import annotations

import json
import os
import stat
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryFile

from optmem.errors import CheckpointError, OutputError, SourceNotFoundError


def checkpoint_folder(folder: str | os.PathLike[str]) -> Path:
    """The folder of a checkpoint, as an absolute path without links.  Raises where it is not a folder."""
    path = Path(folder)
    if path.is_file():
        raise CheckpointError(f"a checkpoint is a folder with config.json and safetensors files, not the file {path.name!r}")
    if not path.is_dir():
        raise SourceNotFoundError(f"there is no folder {path.name!r}")
    return path.resolve()


def is_there(name: str) -> bool:
    """Whether a name is that of a file or folder; the empty one, which would be the present folder, is not."""
    try:
        return bool(name) and Path(name).exists()
    except (OSError, ValueError):  # too long for any file, or with a zero byte
        return False


@contextmanager
def open_inside(folder: Path, name: str) -> Iterator[int]:
    """A file descriptor of the regular file ``name`` in ``folder``.

    A name with a separator, and a link that leads out of the folder, are refused.  The hub's cache is made of links from
    models--x/snapshots/<revision> to models--x/blobs: there, and only there, the blobs are inside too.
    """
    path = folder / name
    if name in ("", ".", "..") or "\0" in name or path.name != name or "\\" in name:
        raise CheckpointError(f"{name!r} is not the plain name of a file in this folder")
    inside = [folder, folder.parents[1] / "blobs"] if folder.parent.name == "snapshots" else [folder]
    try:
        target = path.resolve(strict=True)
        if target.parent not in inside:
            raise CheckpointError(f"{name!r} is a link that leads out of its folder")
        # Not following: the last component is no link any more.  Not blocking: a named pipe would wait for a writer.
        descriptor = os.open(target, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK)
    except FileNotFoundError:
        if path.is_symlink():
            raise CheckpointError(f"{name!r} is a link to a file that is not there") from None
        raise SourceNotFoundError(f"{name!r} is not in the folder {folder.name!r}") from None
    except (OSError, RuntimeError) as error:  # RuntimeError: a loop of links
        reason = error.strerror if isinstance(error, OSError) else "its links form a loop"
        raise CheckpointError(f"{name!r} cannot be opened: {reason}") from None
    try:
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            raise CheckpointError(f"{name!r} is not a regular file")
        yield descriptor
    finally:
        os.close(descriptor)


def read_inside(folder: Path, name: str, *, limit: int) -> bytes:
    """All bytes of a file in the folder, at most ``limit``."""
    with open_inside(folder, name) as descriptor, os.fdopen(os.dup(descriptor), "rb") as file:
        content = file.read(limit + 1)
    if len(content) > limit:
        raise CheckpointError(f"{name!r} is larger than {limit:,} bytes, which no {Path(name).suffix} file of a model is")
    return content


def read_json(folder: Path, name: str, *, limit: int) -> dict[str, object]:
    """The object in a JSON file of the folder."""
    return parse_json(read_inside(folder, name, limit=limit), name)


def parse_json(content: bytes, where: str) -> dict[str, object]:
    """A JSON object, strictly: UTF-8, no name twice in an object, no NaN or Infinity.  ``where`` names it in messages."""
    try:
        # UTF-8 with a byte-order mark or without, not json's own guess: that would also take UTF-16, and lone surrogates
        parsed = json.loads(content.decode("utf-8-sig"), object_pairs_hook=_without_duplicates, parse_constant=_refuse_constant)
    except (ValueError, RecursionError) as error:
        reason = "it is nested too deeply" if isinstance(error, RecursionError) else _first_sentence(error)
        raise CheckpointError(f"{where} cannot be read as JSON: {reason}") from None
    if not isinstance(parsed, dict):
        raise CheckpointError(f"{where} must hold a JSON object, got {type(parsed).__name__}")
    return parsed


def _without_duplicates(pairs: list[tuple[str, object]]) -> dict[str, object]:
    seen = dict(pairs)
    if len(seen) < len(pairs):
        twice = Counter(name for name, _ in pairs).most_common(1)[0][0]
        raise ValueError(f"the name {twice[:80]!r} stands twice in one object")
    return seen


def _refuse_constant(constant: str) -> float:
    raise ValueError(f"{constant} is not a JSON number")


def _first_sentence(error: ValueError) -> str:
    """What went wrong, without the bytes it went wrong in."""
    return "it is not UTF-8" if isinstance(error, UnicodeDecodeError) else str(error).split(";")[0]


def check_writable(folder: Path) -> None:
    """Makes a folder where it is missing.  Raises OutputError where nothing could be written to it, before the work of hours."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise OutputError(f"cannot write to {folder}: {error.strerror or error}") from None
