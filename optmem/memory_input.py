"""What `optmem memory add` is given: messages as JSON or JSON lines, texts, pictures and PDFs, from files or standard input."""

from __future__ import annotations

import base64
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

from optmem.errors import InputError, SourceNotFoundError
from optmem.images import SUFFIXES as PICTURES
from optmem.inputs import check_name, read_input

Kind = Literal["messages", "text"]
Json = dict[str, Any]
MESSAGES = (".json", ".jsonl", ".ndjson")
_TYPES = {".pdf": "application/pdf", ".png": "image/png", ".webp": "image/webp"}


def read_sources(sources: Sequence[str], role: str, kind: Kind | None = None) -> list[Any]:
    """The messages that files hold, in their order, not checked yet.

    sources   files; "-" is standard input
    role      of what is text, a picture or a PDF: each is one message
    kind      None is by the suffix: messages where it is one of JSON and for standard input, text for what is no picture or PDF

    Raises SourceNotFoundError where one cannot be read, InputError where it is not UTF-8 or not JSON.
    """
    return [message for source in sources for message in _read(source, role, kind)]


def _read(source: str, role: str, kind: Kind | None) -> Iterator[Any]:
    check_name(source)
    suffix = Path(source).suffix.lower()
    if kind is None and suffix in PICTURES:
        yield {"role": role, "content": [_picture(source, suffix)]}
    elif kind == "messages" or (kind is None and (source == "-" or suffix in MESSAGES)):
        yield from parse_messages(_said(source), source)
    else:
        yield {"role": role, "content": _said(source)}


def _said(source: str) -> str:
    text = str(read_input(source, "text").source)
    if not text.strip("\ufeff \t\r\n"):
        raise InputError(f"{source} is empty: there is nothing to add")
    return text


def parse_messages(text: str, name: str) -> list[Any]:
    """One message, a list of them, a request that has them under "messages", or one of these on every line.

    name   for errors

    Raises InputError for what is no JSON.
    """
    text = text.removeprefix("\ufeff")  # a byte-order mark
    try:
        return _messages_of(json.loads(text))
    except (ValueError, RecursionError):
        lines = [(number, line) for number, line in enumerate(text.split("\n"), 1) if line.strip()]
    return [message for number, line in lines for message in _messages_of(_parse_line(line, number, name))]


def _parse_line(line: str, number: int, name: str) -> Any:
    try:
        return json.loads(line)
    except (ValueError, RecursionError) as error:
        why = "it is nested too deeply" if isinstance(error, RecursionError) else str(error)
        hint = "messages are a JSON list, or one on every line; name --kind text to add it as a text"
        raise InputError(f"line {number} of {name} is not JSON that can be read ({why}): {hint}") from None


def _messages_of(found: Any) -> list[Any]:
    """A request's own instructions come first, as a message."""
    if isinstance(found, dict) and "role" not in found and isinstance(found.get("messages"), list):
        system = found.get("system")
        return [*([] if system is None else [{"role": "system", "content": system}]), *found["messages"]]
    return found if isinstance(found, list) else [found]


def _picture(source: str, suffix: str) -> Json:
    """A part of a message with the bytes of a file."""
    file = Path(source)
    try:
        data = base64.b64encode(file.read_bytes()).decode()
    except OSError as error:
        raise SourceNotFoundError(f"cannot read {source}: {error.strerror or error}") from None
    media_type = _TYPES.get(suffix, "image/jpeg")
    held = {"type": "base64", "media_type": media_type, "data": data}
    if suffix == ".pdf":
        return {"type": "document", "title": file.name, "source": held}
    return {"type": "image", "source": held}
