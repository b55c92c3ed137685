"""Chat messages to blocks: the shapes of OpenAI and Anthropic, with tool calls, tool results, names and timestamps.

What a message says is drawn as text.  Who says it is a label, drawn white on black, which no text inside a message can imitate.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from datetime import UTC, datetime
from typing import Any, Literal

from optmem.errors import InputError
from optmem.pages.blocks import Block, Look, Run, Span
from optmem.pages.markdown import read_markdown

Message = Mapping[str, Any]


_ESCAPED = str.maketrans({char: f"\\x{ord(char):02x}" for char in "[]|"})
# Fields of a message that its label or its body says; every other field that says something is drawn by its name.
_READ = {"role", "content", "name", "id", "tool_call_id", "timestamp", "created_at", "tool_calls"}
_LABEL = re.compile(
    r"\[(?:system|developer|user|assistant|tool|tool call|tool result|thinking|reasoning|field|part of type"
    r"|(?:image|document), not drawn on this page)(?: \| [ -Z\\^-{}~]*)*\]\n?"
)
MAX_DEPTH = 32  # parts inside parts


def label(*words: object) -> Block:
    """A line of ours in brackets.  It holds printable ASCII only; anything else in a name is written as its escape."""
    said = (str(word).encode("unicode_escape").decode("ascii").translate(_ESCAPED) for word in words if word not in (None, ""))
    return Block("label", (Run(f"[{' | '.join(said)}]\n", None, Look.LABEL),))


def is_label(line: str) -> bool:
    """Whether a line is, word for word, one that `label` could have made of a message."""
    return _LABEL.fullmatch(line) is not None


def verbatim(text: str, source: str, kind: Literal["verbatim", "code"] = "verbatim") -> Block:
    """Text as it stands, closed by a line end of ours, so that one of its own stays visible."""
    return Block(kind, (Run(text, Span(source, 0, len(text))), Run("\n")))


def read_messages(messages: object, *, rich: bool) -> list[Block]:
    """Blocks of a conversation, oldest first.  Where `rich`, what people say is read as Markdown, else it is kept verbatim.

    A span's source is the message's id (or "message-<i>"), with "/<k>" for the k-th part of its content and "/tool_calls/<k>" for
    the arguments of its k-th call.  Raises InputError where a message has no usable shape.
    """
    if isinstance(messages, bytes | bytearray) or not isinstance(messages, Sequence):
        raise InputError(f"give text as a string or a list of messages, got {type(messages).__name__}")
    return [block for index, message in enumerate(messages) for block in _read_message(index, message, rich)]


def _read_message(index: int, message: Message, rich: bool) -> Iterator[Block]:
    if not isinstance(message, Mapping):
        raise InputError(f"message {index} must be a mapping with a role and content, got {type(message).__name__}")
    role = message.get("role")
    if not isinstance(role, str) or not role:
        raise InputError(f"message {index} has no role: give a string such as 'user', 'assistant', 'system' or 'tool'")
    given = message.get("id")
    source = f"message-{index}" if given in (None, "") else str(given)
    yield label(role, message.get("name"), message.get("tool_call_id"), _when(message))
    content = message.get("content")
    if isinstance(content, str):
        yield from _say(content, source, rich)
    elif isinstance(content, Sequence):
        yield from _read_parts(content, source, rich, 0)
    elif content is not None:
        raise InputError(f"the content of message {index} must be a string or a list of parts, got {type(content).__name__}")
    yield from _read_calls(message.get("tool_calls") or (), source)
    for field, value in message.items():
        if field not in _READ and value not in (None, "", [], {}):
            yield label("field", field)
            yield _draw_value(value, f"{source}/{field}")


def _when(message: Message) -> str | None:
    stamp = message.get("timestamp", message.get("created_at"))
    if isinstance(stamp, int | float):
        try:
            return datetime.fromtimestamp(stamp, UTC).isoformat(timespec="seconds")
        except (ValueError, OverflowError, OSError):
            return str(stamp)
    return None if stamp is None else str(stamp)


def _say(text: str, source: str, rich: bool) -> Iterable[Block]:
    return read_markdown(text, source) if rich else (verbatim(text, source),)


def _draw_value(value: object, source: str) -> Block:
    """Text as it is, anything else as JSON."""
    return verbatim(value if isinstance(value, str) else _json(value, source), source, "code")


def _read_parts(parts: Sequence[object], source: str, rich: bool, depth: int) -> Iterator[Block]:
    if depth > MAX_DEPTH:
        raise InputError(f"{source} has parts nested deeper than {MAX_DEPTH}")
    for k, part in enumerate(parts):
        yield from _read_part(part, f"{source}/{k}", rich, depth)


def _read_part(part: object, source: str, rich: bool, depth: int) -> Iterator[Block]:
    """One part of a message's content.  A part that is not text is named by a label, so that its absence shows."""
    if isinstance(part, str):
        yield from _say(part, source, rich)
        return
    if not isinstance(part, Mapping) or not isinstance(part.get("type"), str):
        raise InputError(f"part {source} must be a string or a mapping with a type")
    kind = part["type"]
    if kind in ("text", "input_text", "output_text", "refusal"):
        yield from _say(_string(part, "refusal" if kind == "refusal" else "text", source), source, rich)
    elif kind in ("thinking", "reasoning"):
        yield label(kind)
        yield from _say(_string(part, "thinking" if kind == "thinking" else "text", source), source, rich)
    elif kind == "tool_use":
        yield label("tool call", part.get("name"), part.get("id"))
        yield _draw_value(part.get("input"), source)
    elif kind == "tool_result":
        yield label("tool result", part.get("tool_use_id"), "error" if part.get("is_error") else None)
        yield from _read_result(part.get("content"), source, depth)
    elif kind in ("image", "image_url", "input_image"):
        yield label("image, not drawn on this page", part.get("uuid"))
    elif kind in ("document", "file", "input_file"):  # whose bytes are no text
        yield label("document, not drawn on this page", part.get("title"), part.get("uuid"))
    else:
        yield label("part of type", kind)
        yield _draw_value(part, source)


def _read_result(result: object, source: str, depth: int) -> Iterator[Block]:
    if isinstance(result, list | tuple):
        yield from _read_parts(result, source, False, depth + 1)
    elif result is not None:
        yield _draw_value(result, source)


def _read_calls(calls: object, source: str) -> Iterator[Block]:
    if not isinstance(calls, Sequence):
        raise InputError(f"tool_calls of {source} must be a list, got {type(calls).__name__}")
    for k, call in enumerate(calls):
        if not isinstance(call, Mapping):
            raise InputError(f"tool call {k} of {source} must be a mapping, got {type(call).__name__}")
        called = next((call[kind] for kind in ("function", "custom") if isinstance(call.get(kind), Mapping)), None)
        yield label("tool call", called and called.get("name"), call.get("id"))
        arguments = call if called is None else called.get("arguments", called.get("input", ""))
        yield _draw_value(arguments, f"{source}/tool_calls/{k}")


def _string(part: Message, key: str, source: str) -> str:
    text = part.get(key)
    if not isinstance(text, str):
        raise InputError(f"part {source} of type {part['type']!r} must have a string under {key!r}, got {type(text).__name__}")
    return text


def _json(value: object, source: str) -> str:
    try:
        return json.dumps(value, ensure_ascii=False)
    except (TypeError, ValueError, RecursionError) as error:
        raise InputError(f"{source} cannot be written as JSON: {error}") from None
