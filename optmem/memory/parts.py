"""The parts of a message: text, thinking, pictures and documents, tool calls and results, in the shapes of OpenAI and Anthropic."""

from __future__ import annotations

import base64
import binascii
import hashlib
import json
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Literal

from optmem.errors import InputError

MAX_DEPTH = 8  # parts inside the results of tools
_DATA = re.compile(r"data:([a-z]+/[a-z0-9.+-]+)(?:;[a-z]+=[\w.-]+)?;base64,", re.IGNORECASE)
_IMAGES = ("image/png", "image/jpeg", "image/webp")  # what optmem.images reads
_DOCUMENTS = ("application/pdf", "text/plain")
_TYPES: dict[str, tuple[str, ...]] = {"image": _IMAGES, "document": _DOCUMENTS}
_TEXTS = ("text", "input_text", "output_text", "refusal")
_PICTURES = ("image", "image_url", "input_image")
_FILES = ("document", "file", "input_file")

Kind = Literal["image", "document"]


@dataclass(frozen=True, slots=True)
class TextPart:
    """What is said."""

    text: str


@dataclass(frozen=True, slots=True)
class Thinking:
    """What was thought; empty where the provider hid it."""

    text: str
    signature: str = ""  # without which its provider does not take it back
    hidden: str = ""  # bytes in its place, which only its provider can read


@dataclass(frozen=True)
class Attachment:
    """A picture or a document that came with the message."""

    kind: Kind
    media_type: str
    data: bytes = field(repr=False)
    title: str = ""

    @cached_property
    def id(self) -> str:
        """64 hexadecimal digits, over its type and bytes."""
        return hashlib.sha256(f"{self.media_type}\0".encode() + self.data).hexdigest()


@dataclass(frozen=True, slots=True)
class Reference:
    """A picture or a document that is elsewhere: at an address, or with a provider.  It is never fetched."""

    kind: Kind
    address: str


@dataclass(frozen=True, slots=True)
class Call:
    """A tool is called."""

    id: str
    name: str
    arguments: str  # JSON, as the model said it: it need not be right


@dataclass(frozen=True, slots=True)
class Result:
    """What a tool answered."""

    id: str  # of the call
    parts: tuple[Part, ...]
    is_error: bool = False


@dataclass(frozen=True, slots=True)
class Other:
    """A part of a type that memory does not know.  It is kept, and shown as JSON."""

    type: str
    json: str = field(repr=False)


Part = TextPart | Thinking | Attachment | Reference | Call | Result | Other


def attachments_of(parts: Iterable[Part]) -> Iterator[Attachment]:
    """Pictures and documents that came with them, those in results of tools too."""
    for part in parts:
        if isinstance(part, Attachment):
            yield part
        elif isinstance(part, Result):
            yield from attachments_of(part.parts)


def read_part(part: object, role: str, name: str, depth: int = 0) -> Part:
    """A part of a message's content, from plain values.  Raises InputError for one that lacks what its type must have."""
    if isinstance(part, str):
        return TextPart(part)
    if not isinstance(part, dict) or not isinstance(part.get("type"), str):
        raise InputError(f"{name} must be a string or a mapping with a type, got {repr(part)[:80]}")
    kind = part["type"]
    if kind in _TEXTS:
        return TextPart(_string(part, "refusal" if kind == "refusal" else "text", name))
    if kind in ("thinking", "reasoning"):
        signature = part.get("signature")
        said = _string(part, "thinking" if kind == "thinking" else "text", name)
        return Thinking(said, signature if isinstance(signature, str) else "")
    if kind == "redacted_thinking":
        return Thinking("", hidden=_string(part, "data", name))
    if kind in _PICTURES:
        return _read_picture(part, name)
    if kind in _FILES:
        return _read_document(part, name)
    if kind == "tool_use":
        return _read_call(part, role, name)
    if kind == "tool_result":
        return _read_result(part, role, name, depth)
    return Other(kind, _json(part))


def shown(part: Any) -> Any:
    """A part as pages draw it: what is bytes is named by its id, and of hidden thinking only that it was there."""
    if not isinstance(part, dict):
        return part
    kind = part.get("type")
    if kind == "tool_result" and isinstance(part.get("content"), list):
        return part | {"content": [shown(inner) for inner in part["content"]]}
    if kind == "redacted_thinking":
        return {"type": kind}
    if kind in _PICTURES:
        found = _read_picture(part, "part")
        return {"type": "image", "uuid": _label(found)}
    if kind in _FILES:
        found = _read_document(part, "part")
        return {"type": "document", "uuid": _label(found), "title": found.title if isinstance(found, Attachment) else ""}
    return part


def _label(found: Attachment | Reference) -> str:
    return found.id[:12] if isinstance(found, Attachment) else found.address[:80]


# --- tools --------------------------------------------------------------------------------------------------------------------


def _read_call(part: dict[str, Any], role: str, name: str) -> Call:
    if role != "assistant":
        raise InputError(f"{name}: only an assistant calls tools, this message is of role {role}")
    if not isinstance(part.get("input"), dict):
        raise InputError(f"{name}: the input of a tool_use is a mapping, got {repr(part.get('input'))[:80]}")
    return Call(_string(part, "id", name, least=1), _string(part, "name", name, least=1), _json(part["input"]))


def _read_result(part: dict[str, Any], role: str, name: str, depth: int) -> Result:
    if role != "user":
        raise InputError(f"{name}: a tool_result comes in a message of role user, this one is of role {role}")
    if depth >= MAX_DEPTH:
        raise InputError(f"{name} has results nested deeper than {MAX_DEPTH}")
    content = part.get("content")
    if content is None:
        inner: tuple[Part, ...] = ()
    elif isinstance(content, str):
        inner = (TextPart(content),)
    elif isinstance(content, list):
        inner = tuple(read_part(one, role, f"{name}.{number}", depth + 1) for number, one in enumerate(content))
    else:
        raise InputError(f"{name}: the content of a tool_result is a string or a list of parts, got {type(content).__name__}")
    return Result(_string(part, "tool_use_id", name, least=1), inner, part.get("is_error") is True)


# --- pictures and documents ---------------------------------------------------------------------------------------------------


def _read_picture(part: dict[str, Any], name: str) -> Attachment | Reference:
    source = part.get("source")
    if part["type"] == "image" and isinstance(source, dict):
        return _read_source("image", source, "", name)
    link = part.get("image_url")
    url = link.get("url") if isinstance(link, dict) else link
    if isinstance(url, str):
        return _read_url("image", url, "", name)
    return _elsewhere("image", part, name)


def _read_document(part: dict[str, Any], name: str) -> Attachment | Reference:
    source, inner = part.get("source"), part.get("file")
    fields = inner if isinstance(inner, dict) else part
    title = next((fields[key] for key in ("title", "filename") if isinstance(fields.get(key), str)), "")
    if isinstance(source, dict):
        return _read_source("document", source, title, name)
    data = fields.get("file_data", fields.get("file_url"))
    if isinstance(data, str):
        return _read_url("document", data, title, name)
    return _elsewhere("document", fields, name)


def _read_source(kind: Kind, source: dict[str, Any], title: str, name: str) -> Attachment | Reference:
    """Anthropic's."""
    if source.get("type") == "base64":
        return _decoded(kind, _string(source, "media_type", name), _string(source, "data", name), title, name)
    if source.get("type") == "text" and kind == "document":
        return Attachment(kind, "text/plain", _string(source, "data", name).encode(), title)
    if source.get("type") == "url":
        return _read_url(kind, _string(source, "url", name), title, name)
    if source.get("type") == "file":
        return Reference(kind, _string(source, "file_id", name, least=1))
    raise InputError(f"{name}: a source is of type base64, url or file, got {repr(source.get('type'))[:80]}")


def _read_url(kind: Kind, url: str, title: str, name: str) -> Attachment | Reference:
    if url[:8].lower().startswith(("http://", "https://")):
        return Reference(kind, url)
    found = _DATA.match(url)
    if found is None:
        raise InputError(f"{name}: a {kind} is given as data:<type>;base64,<bytes> or at an http address, got {url[:40]!r}")
    return _decoded(kind, found[1].lower(), url[found.end() :], title, name)


def _decoded(kind: Kind, media_type: str, data: str, title: str, name: str) -> Attachment:
    if media_type not in _TYPES[kind]:
        raise InputError(f"{name}: a {kind} is of type {', '.join(_TYPES[kind])}, got {media_type[:80]!r}")
    try:
        return Attachment(kind, media_type, base64.b64decode(data, validate=True), title)
    except (binascii.Error, ValueError):
        raise InputError(f"{name}: the bytes of the {kind} are not base64") from None


def _elsewhere(kind: Kind, fields: dict[str, Any], name: str) -> Reference:
    address = next((fields[key] for key in ("file_id", "uuid") if isinstance(fields.get(key), str) and fields[key]), None)
    if address is None:
        raise InputError(f"{name} names a {kind} and holds none: give its bytes, its address or its id")
    return Reference(kind, address)


def _json(value: object) -> str:
    return json.dumps(value, ensure_ascii=False, sort_keys=True, separators=(",", ":"))


def _string(part: dict[str, Any], key: str, name: str, least: int = 0) -> str:
    text = part.get(key)
    if not isinstance(text, str) or len(text) < least:
        raise InputError(f"{name} must have a string under {key!r}, got {repr(text)[:80]}")
    return text
