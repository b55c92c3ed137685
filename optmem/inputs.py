"""Files and stdin to sources of pages: text, Markdown, code, or a chat as JSON."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable
from dataclasses import dataclass, replace
from itertools import chain, count
from pathlib import Path
from typing import Any

from optmem.config import Kind
from optmem.errors import InputError, SourceNotFoundError
from optmem.images import SUFFIXES as PICTURES
from optmem.pages import Source, read_source
from optmem.text.count import estimate_tokens

CODE = ".py .pyi .c .h .cc .cpp .hpp .cu .rs .go .java .js .jsx .ts .tsx .sh .sql .toml .yaml .yml .css .html .xml .rb .php .lua"
KINDS: dict[str, Kind] = {".md": "markdown", ".markdown": "markdown", ".json": "chat", **dict.fromkeys(CODE.split(), "code")}


@dataclass(frozen=True, slots=True)
class Given:
    """What a user gave, by name."""

    name: str
    source: Source
    kind: Kind

    def text_tokens(self) -> int:
        """About how many text tokens a model would be given instead of the pages, whatever their style."""
        blocks = read_source(self.source, self.kind, rich=False)
        return estimate_tokens("".join(run.text for block in blocks for run in block.runs))


def read_input(file: str, kind: Kind | None = None) -> Given:
    """A file, or "-" for stdin.  The kind follows from the suffix; stdin and unknown suffixes are text.

    Raises SourceNotFoundError where it cannot be read, InputError where it is not UTF-8 or not of its kind, or has no name.
    """
    check_name(file)
    name = "stdin" if file == "-" else Path(file).name
    kind = kind or KINDS.get(Path(file).suffix.lower(), "text")
    text = _read_text(file)
    return Given(name, _parse_chat(text, file) if kind == "chat" else text, kind)


def read_inputs(files: Iterable[str], taken: Iterable[str] = ()) -> list[Given]:
    """Files with names apart, for what is written under a name: of two x.md the second is x.md-2.  Raises as read_input does.

    taken   names that others have
    """
    given, names = list[Given](), set(taken)
    for each in map(read_input, files):
        name = next(name for name in chain([each.name], (f"{each.name}-{number}" for number in count(2))) if name not in names)
        given.append(replace(each, name=name))
        names.add(name)
    return given


def check_name(name: str) -> None:
    """Raises InputError for the empty name, as a variable that is not set gives: it would be the present folder."""
    if not name:
        raise InputError("the empty name '' is no file: name a file, or . for the present folder")


def _read_text(file: str) -> str:
    if file == "-" and sys.stdin is None:
        raise SourceNotFoundError("cannot read -: stdin is closed")
    try:
        data = sys.stdin.buffer.read() if file == "-" else Path(file).read_bytes()
    except OSError as error:
        raise SourceNotFoundError(f"cannot read {file}: {error.strerror}") from None
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        if Path(file).suffix.lower() in PICTURES:
            raise InputError(f"{file} is a picture or PDF already; pages are drawn from text") from None
        raise InputError(f"{file} is not UTF-8 text (byte {error.start}); convert it first") from None


def _parse_chat(text: str, file: str) -> Any:
    """A list of messages, or what an object has under "messages"."""
    try:
        found = json.loads(text.removeprefix("\ufeff"))  # a byte-order mark
    except (ValueError, RecursionError) as error:
        raise InputError(f"{file} is not JSON that can be read ({error}); name another --kind to draw it as text") from None
    messages = found["messages"] if isinstance(found, dict) and "messages" in found else found
    if not isinstance(messages, list):
        raise InputError(f"{file} is JSON but not a list of messages; draw it as text with --kind text")
    return messages
