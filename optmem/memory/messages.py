"""Chat messages as they are kept: the shapes of OpenAI and Anthropic, read strictly, as canonical JSON and as parts.

Nothing of a message is lost: `Message.json` holds every field that it came with, the unknown ones too, as bytes that depend on the
values alone.  The parts are what memory has to understand of it: text, thinking, pictures, documents, tool calls and their results.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from optmem.errors import InputError
from optmem.memory.parts import Call, Part, Result, TextPart, Thinking, read_part, shown
from optmem.pages.blocks import Block
from optmem.pages.chat import read_messages as read_blocks

ROLES = ("system", "developer", "user", "assistant", "tool")
MAX_DEPTH = 100  # of values inside values: tools nest deeply, attackers deeper
MAX_VALUES = 1_000_000  # of one message
MAX_BYTES = 64 << 20  # of one message's JSON, pictures included


@dataclass(frozen=True)
class Message:
    """One message.  Equal messages have equal JSON."""

    json: str  # canonical: sorted names, no blanks, not escaped
    role: str = field(compare=False)
    parts: tuple[Part, ...] = field(compare=False, repr=False)

    @classmethod
    def read(cls, given: object, name: str = "message") -> Message:
        """A message from a mapping in the shape of OpenAI or Anthropic.

        name   for errors

        Raises InputError for what is no message: an unknown role, no content, half a surrogate pair, NaN, values nested too deeply.
        """
        plain = _Plain(name).copy(given)
        if not isinstance(plain, dict):
            hint = "; of a client's own object give its dictionary, as model_dump() has it" if _is_object(given) else ""
            raise InputError(f"{name} must be a mapping with a role and content, got {type(given).__name__}{hint}")
        role = plain.get("role")
        if role not in ROLES:
            raise InputError(f"{name}: the role must be one of {', '.join(ROLES)}, got {_told(role)}")
        parts = tuple(_read_parts(plain, role, name))
        text = canonical(plain, name)
        if len(text) > MAX_BYTES:
            raise InputError(f"{name} is larger than {MAX_BYTES:,} bytes: give pictures smaller, or texts in parts")
        return cls(text, role, parts)

    @classmethod
    def from_json(cls, text: str | bytes, name: str = "message") -> Message:
        """A message from its JSON.  Raises InputError as `read` does."""
        return cls.read(parse(text, name), name)

    @cached_property
    def given(self) -> dict[str, Any]:
        """The message as it came, in plain values."""
        found: dict[str, Any] = json.loads(self.json)
        return found

    @property
    def calls(self) -> list[Call]:
        """The tools that it calls."""
        return [part for part in self.parts if isinstance(part, Call)]

    @property
    def results(self) -> list[Result]:
        """What it answers to calls."""
        return [part for part in self.parts if isinstance(part, Result)]

    def drawable(self, source: str | None = None) -> dict[str, Any]:
        """The message as `paginate` draws it: pictures and documents named by their id instead of their bytes.

        source   what the spans of its lines are to name, in place of the id that it came with
        """
        drawn = dict(self.given)
        if isinstance(drawn.get("content"), list):
            drawn["content"] = [shown(part) for part in drawn["content"]]
        if source is not None:
            drawn["id"] = source
        return drawn

    def text(self) -> str:
        """What pages show of it, its labels included: who speaks is a label there, which no text can forge."""
        return _text_of(read_blocks([self.drawable()], rich=False))


def read_messages(given: object, first: int = 0) -> list[Message]:
    """All messages of a list.  Raises InputError as `Message.read` does, naming the message by its number.

    first   the number of the first of them, for errors
    """
    if isinstance(given, str | bytes | bytearray | Mapping) or not isinstance(given, Iterable):
        raise InputError(f"messages are a list of mappings, got {type(given).__name__}")
    return [Message.read(one, f"message {number}") for number, one in enumerate(given, first)]


@dataclass(frozen=True, slots=True)
class Group:
    """Messages that belong together: a tool call, its results and all that was said between them."""

    start: int  # of the list
    stop: int
    unanswered: tuple[str, ...] = ()  # calls whose results are not there yet
    earlier: tuple[str, ...] = ()  # calls from before the list that are answered here


def groups(messages: Sequence[Message], open_calls: Iterable[str] = ()) -> list[Group]:
    """The shortest runs of messages that part no call from its results, in order; most are of one message.

    open_calls   ids called before these messages and not answered yet

    Raises InputError for a result without a call, a call answered twice, and an id called twice.
    """
    called: dict[str, int] = dict.fromkeys(open_calls, -1)
    ends = list(range(len(messages)))  # for each message, the last one that it must be together with
    answered: set[str] = set()
    earlier: list[list[str]] = [[] for _ in messages]
    for number, message in enumerate(messages):
        for part in message.parts:
            if isinstance(part, Call):
                if part.id in called:
                    raise InputError(
                        f"message {number}: the id {_told(part.id)} is called twice; every call needs an id of its own"
                    )
                called[part.id] = number
            elif isinstance(part, Result):
                start = _answer(part.id, number, called, answered)
                if start < 0:
                    earlier[number].append(part.id)
                else:
                    ends[start] = number
    return _merge(messages, ends, answered, earlier)


def _answer(name: str, number: int, called: dict[str, int], answered: set[str]) -> int:
    """Where the call stands that is answered."""
    if name not in called:
        raise InputError(f"message {number}: a result for {_told(name)}, which no message before it calls")
    if name in answered:
        raise InputError(f"message {number}: the call {_told(name)} is answered twice")
    answered.add(name)
    return called[name]


def _merge(messages: Sequence[Message], ends: list[int], answered: set[str], earlier: list[list[str]]) -> list[Group]:
    found: list[Group] = []
    start = 0
    while start < len(messages):
        stop, number = ends[start] + 1, start + 1
        while number < stop:
            stop = max(stop, ends[number] + 1)
            number += 1
        calls = (call.id for message in messages[start:stop] for call in message.calls)
        waiting = tuple(name for name in calls if name not in answered)
        found.append(Group(start, stop, waiting, tuple(name for names in earlier[start:stop] for name in names)))
        start = stop
    return found


# --- JSON ---------------------------------------------------------------------------------------------------------------------


def canonical(value: object, name: str = "value") -> str:
    """JSON whose bytes depend on the values alone.  Raises InputError for what JSON cannot say."""
    try:
        return json.dumps(value, ensure_ascii=False, sort_keys=True, separators=(",", ":"), allow_nan=False)
    except (TypeError, ValueError, RecursionError) as error:
        raise InputError(f"{name} cannot be written as JSON: {error}") from None


def parse(text: str | bytes, name: str = "value") -> Any:
    """A value from its JSON.  Raises InputError for what is none, or is nested too deeply."""
    try:
        return json.loads(text)
    except RecursionError:
        raise InputError(f"{name} is nested too deeply") from None
    except ValueError as error:
        raise InputError(f"{name} is not JSON: {str(error)[:120]}") from None


class _Plain:
    """A copy in dictionaries, lists, strings and numbers alone, with every limit checked."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.left = MAX_VALUES

    def copy(self, value: object, depth: int = 0) -> Any:
        self.left -= 1
        if depth > MAX_DEPTH:
            raise InputError(f"{self.name} has values nested deeper than {MAX_DEPTH}")
        if self.left < 0:
            raise InputError(f"{self.name} has more than {MAX_VALUES:,} values")
        if value is None or isinstance(value, bool):
            return value
        if isinstance(value, str):
            return self._text(str.__str__(value))
        if isinstance(value, int):
            return int(value)
        if isinstance(value, float):
            return self._number(float(value))
        if isinstance(value, Mapping):
            return {self._key(key): self.copy(inner, depth + 1) for key, inner in value.items()}
        if isinstance(value, list | tuple):
            return [self.copy(inner, depth + 1) for inner in value]
        # At the top it is said by the caller, who knows what was wanted.
        if depth == 0:
            return value
        raise InputError(f"{self.name} holds a {type(value).__name__}, which JSON cannot say")

    def _key(self, key: object) -> str:
        if not isinstance(key, str):
            raise InputError(f"{self.name} has a name that is no string but {type(key).__name__}")
        return self._text(str.__str__(key))

    def _text(self, text: str) -> str:
        if not text.isascii():
            try:
                text.encode()
            except UnicodeEncodeError as error:
                code = ord(text[error.start])
                raise InputError(f"{self.name} holds half a surrogate pair (U+{code:04X}), which is no character") from None
        return text

    def _number(self, number: float) -> float:
        if not math.isfinite(number):
            raise InputError(f"{self.name} holds {number}, which is no number in JSON")
        return number


# --- parts --------------------------------------------------------------------------------------------------------------------


def _read_parts(given: dict[str, Any], role: str, name: str) -> Iterable[Part]:
    thought = given.get("reasoning_content")
    if isinstance(thought, str) and thought:
        yield Thinking(thought)
    said = list(_read_content(given, role, name))
    if role == "tool":
        called = given.get("tool_call_id")
        if not isinstance(called, str) or not called:
            raise InputError(f"{name}: a message of role tool needs the tool_call_id that it answers, got {_told(called)}")
        yield Result(called, tuple(said))
        return
    yield from said
    yield from _read_calls(given, role, name)


def _read_content(given: dict[str, Any], role: str, name: str) -> Iterable[Part]:
    content = given.get("content")
    if isinstance(content, str):
        yield TextPart(content)
    elif isinstance(content, list):
        yield from (read_part(part, role, f"{name}, part {number}") for number, part in enumerate(content))
    elif content is not None:
        raise InputError(f"{name}: content must be a string or a list of parts, got {type(content).__name__}")
    elif role != "assistant":
        raise InputError(f"{name} has no content; only an assistant may say nothing, where it calls a tool")
    refusal = given.get("refusal")
    if isinstance(refusal, str) and refusal:
        yield TextPart(refusal)


def _read_calls(given: dict[str, Any], role: str, name: str) -> Iterable[Part]:
    calls = given.get("tool_calls")
    if calls is None:
        return
    if role != "assistant":
        raise InputError(f"{name}: only an assistant calls tools, this message is of role {role}")
    if not isinstance(calls, list):
        raise InputError(f"{name}: tool_calls must be a list, got {type(calls).__name__}")
    for number, call in enumerate(calls):
        yield _read_call(call, f"{name}, tool call {number}")


def _read_call(call: object, name: str) -> Call:
    kind = next((kind for kind in ("function", "custom") if isinstance(call, dict) and isinstance(call.get(kind), dict)), None)
    if not isinstance(call, dict) or kind is None:
        raise InputError(f"{name} must be a mapping with an id and a function, got {_told(call)}")
    called = call[kind]
    arguments = called.get("arguments", called.get("input", ""))
    if not isinstance(call.get("id"), str) or not call["id"]:
        raise InputError(f"{name} needs an id, a string, got {_told(call.get('id'))}")
    if not isinstance(called.get("name"), str) or not called["name"]:
        raise InputError(f"{name} needs the name of a function, got {_told(called.get('name'))}")
    if not isinstance(arguments, str):
        raise InputError(f"{name}: arguments are JSON in a string, got {type(arguments).__name__}")
    return Call(call["id"], called["name"], arguments)


def _text_of(blocks: Iterable[Block]) -> str:
    return "".join(run.text for block in blocks for run in block.runs)


def _is_object(given: object) -> bool:
    return hasattr(given, "role") and not isinstance(given, Mapping)


def _told(value: object) -> str:
    return repr(value)[:80]
