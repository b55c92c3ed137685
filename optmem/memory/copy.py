"""A copy of a memory while it is written to: one state of it, every file verified on the way."""

from __future__ import annotations

import os
import sqlite3
from pathlib import Path

from optmem.errors import OutputError
from optmem.memory.blobs import BlobDamaged
from optmem.memory.folder import MemoryFolder
from optmem.memory.schema import DATABASE, telling
from optmem.memory.store import Reader, Store


def copy_memory(source: Reader, path: str | os.PathLike[str]) -> list[int]:
    """Copies the memory as it is now to a new folder; numbers of the pages whose files are damaged, which are left out.

    The database comes last: a copy that was cut short has none with anything in it, and is refused when it is opened.
    Raises OutputError where the folder is there already or cannot be written.
    """
    if Path(path).exists():
        raise OutputError(f"a copy goes to a new folder, and {Path(path).name!r} is there already")
    folder = MemoryFolder(path, writes=True, create=True)
    try:
        with source.snapshot() as view:
            damaged = []
            for page in view.pages():
                for blob in view.blobs(page.number):
                    try:
                        folder.blobs.put(view.bytes_of(blob))
                    except BlobDamaged:
                        damaged.append(page.number)
            folder.blobs.sync()
            with telling():
                target = sqlite3.connect(folder.path / DATABASE, isolation_level=None)
                try:
                    target.execute("PRAGMA synchronous=FULL")
                    view.copy_rows(target)
                finally:
                    target.close()
    finally:
        folder.close()
    Store.open(path).close()
    return damaged
