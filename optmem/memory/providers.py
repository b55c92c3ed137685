"""What a model is to see, as the messages of its provider: OpenAI, Anthropic, Gemini, Qwen.

A view is messages and runs of pages.  A run that would cost more as pictures than as text is given as the messages that it shows,
and every choice comes with its price.  Results of tools follow the call that they answer, as all providers want it.
The same items give the same bytes, and items behind them change none of the messages before the last: prompt caches hold.  Only
instructions that come later change what stands first, where a provider has a field of its own for them (Anthropic, Gemini).

What a provider has no place for is said as text: documents for Qwen, references that only another provider can follow.  Thinking
goes back to Anthropic alone, and only where it is signed: others neither take it nor need it.
"""

from __future__ import annotations

import base64
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from optmem.errors import InputError
from optmem.memory.messages import Message
from optmem.memory.parts import Attachment, Call, Other, Part, Reference, Result, TextPart, Thinking
from optmem.memory.pricing import Price, Provider, compare, find_reader

Json = dict[str, Any]
# Parts that one provider knows, and gets as they came; all others get their JSON as text.
_OWN = {
    "openai": ("input_audio",),
    "qwen": ("input_audio", "video_url", "video"),
    "anthropic": (
        "server_tool_use",
        "web_search_tool_result",
        "web_fetch_tool_result",
        "search_result",
        "mcp_tool_use",
        "mcp_tool_result",
    ),
    "gemini": (),
}


@dataclass(frozen=True, slots=True)
class Picture:
    """A page as a picture."""

    page: str  # its id
    png: bytes = field(repr=False)
    width: int
    height: int
    caption: str = ""  # said before it
    facts: str = ""  # said behind it: its factsheet


@dataclass(frozen=True, slots=True)
class Pages:
    """A run of pages."""

    pictures: tuple[Picture, ...]
    messages: tuple[Message, ...] = ()  # that they show, whole; none where the pages alone are there
    text_tokens: int | None = None  # of these for the reader, where that is known


@dataclass(frozen=True, slots=True)
class Rest:
    """A message of a group whose first messages may be on pages: a result in it whose call is not given is said as text."""

    message: Message


Item = Message | Pages | Rest


@dataclass(frozen=True, slots=True)
class Payload:
    """A request's messages."""

    provider: Provider
    body: Json  # "messages", or "contents" for Gemini; "system" or "systemInstruction" where there are instructions
    prices: tuple[Price, ...] = ()  # of every run of pages that could be given as text, in order
    pictured: tuple[bool, ...] = ()  # whether each of these runs is given as pictures here
    tokens: int = 0  # about what all of it costs, where that was counted; texts are estimated
    notes: tuple[str, ...] = ()  # what should be known of it, such as that it costs more than a budget

    @property
    def saved(self) -> int:
        """Tokens that the pictures given here save against text, where there is a choice; below 0 where they cost more."""
        return sum(price.saved for price, is_shown in zip(self.prices, self.pictured, strict=True) if is_shown)

    def to_json(self) -> bytes:
        """The body's bytes."""
        return json.dumps(self.body, ensure_ascii=False, separators=(",", ":")).encode()


def payload(items: Iterable[Item], reader: str = "openai", *, pictures: bool | None = None) -> Payload:
    """The items as the messages of the reader's provider.

    reader     a provider, or one of `pricing.READERS`
    pictures   True gives every page as a picture, False as text wherever its messages are there; None what is cheaper

    Raises InputError for an unknown reader, for what is no item, and for a result whose call is not among the items.
    """
    found = find_reader(reader)
    choices: list[tuple[Price, bool]] = []
    turns = _merge_results(list(_turns(items, found.name, pictures, choices)))
    prices, pictured = tuple(price for price, _ in choices), tuple(is_shown for _, is_shown in choices)
    return Payload(found.provider, _BODIES[found.provider](turns), prices, pictured)


# --- turns: what is common to all providers -----------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Turn:
    role: str  # system, user, assistant, tool
    parts: tuple[Part, ...]
    name: str = ""
    is_rest: bool = False  # the call that it answers may be on a page


def _turns(items: Iterable[Item], reader: str, pictures: bool | None, choices: list[tuple[Price, bool]]) -> Iterator[_Turn]:
    for number, item in enumerate(items):
        if isinstance(item, Message):
            yield from _turns_of(item)
        elif isinstance(item, Rest):
            yield from (replace(turn, is_rest=True) for turn in _turns_of(item.message))
        elif isinstance(item, Pages):
            price = _price(item, reader)
            is_shown = not item.messages or (pictures if pictures is not None else price is None or price.is_worth_it)
            if price is not None:
                choices.append((price, is_shown))
            rest = (replace(turn, is_rest=True) for one in item.messages for turn in _turns_of(one))
            yield from [_Turn("user", tuple(_parts_of(item)))] if is_shown else rest
        else:
            raise InputError(f"item {number} of a view must be a Message, Pages or Rest, got {type(item).__name__}")


def _turns_of(message: Message) -> Iterator[_Turn]:
    """A message; results of tools apart from what else is said in it, and before it."""
    name = message.given.get("name")
    rest = tuple(part for part in message.parts if not isinstance(part, Result))
    for result in message.results:
        yield _Turn("tool", (result,))
    if rest or not message.results:
        role = "system" if message.role == "developer" else message.role
        yield _Turn(role, rest, name if isinstance(name, str) else "")


def _parts_of(pages: Pages) -> Iterator[Part]:
    for picture in pages.pictures:
        if picture.caption:
            yield TextPart(picture.caption)
        yield Attachment("image", "image/png", picture.png)
        if picture.facts:
            yield TextPart(picture.facts)


def _price(pages: Pages, reader: str) -> Price | None:
    """Of a run of pages that could be given as text."""
    if not pages.messages or not pages.pictures:
        return None
    text = "".join(message.text() for message in pages.messages)
    around = "".join(picture.caption + picture.facts for picture in pages.pictures)
    first, *others = (compare(reader, picture.width, picture.height, text_tokens=0) for picture in pages.pictures)
    whole = compare(reader, *first.size, text=text, text_tokens=pages.text_tokens)
    beside = compare(reader, *first.size, text=around).text_tokens
    return replace(whole, image_tokens=sum(each.image_tokens for each in (first, *others)) + beside)


def _merge_results(turns: Sequence[_Turn]) -> list[_Turn]:
    """Every result behind its call, in the order of the calls."""
    results = {part.id: part for turn in turns for part in turn.parts if isinstance(part, Result)}
    called = {part.id for turn in turns for part in turn.parts if isinstance(part, Call)}
    ordered: list[_Turn] = []
    for turn in turns:
        if turn.role == "tool":
            if turn.is_rest:
                ordered += [_as_text(part) for part in turn.parts if isinstance(part, Result) and part.id not in called]
            else:
                _check_called(turn.parts, called)
            continue
        ordered.append(turn)
        ordered += [_Turn("tool", (results[part.id],)) for part in turn.parts if isinstance(part, Call) and part.id in results]
    return ordered


def _check_called(parts: Iterable[Part], called: set[str]) -> None:
    for part in parts:
        if isinstance(part, Result) and part.id not in called:
            raise InputError(f"a result in this view answers the call {part.id[:80]!r}, which is not in it: groups stay whole")


def _as_text(result: Result) -> _Turn:
    """Of a call that stands on a page: no provider takes an answer to what it was not told."""
    return _Turn("user", (TextPart(f"[result of the call {result.id}, which is on a page]\n"), *result.parts))


def _data(part: Attachment) -> str:
    return base64.b64encode(part.data).decode()


def _url(part: Attachment) -> str:
    return f"data:{part.media_type};base64,{_data(part)}"


def _is_link(part: Reference) -> bool:
    return part.address[:8].lower().startswith(("http://", "https://"))


def _in_words(part: Part) -> str:
    """A part that the provider has no place for."""
    if isinstance(part, Attachment):
        if part.media_type == "text/plain":
            return part.data.decode("utf-8", "replace")
        return f"[{part.kind} {part.title or part.id[:12]}, {len(part.data):,} bytes of {part.media_type}, not given]"
    if isinstance(part, Reference):
        return f"[{part.kind} at {part.address}]"
    return part.json if isinstance(part, Other) else ""


def _object(text: str) -> Json:
    """The arguments of a call as an object; what is none is its only member."""
    try:
        found = json.loads(text) if text else {}
    except (ValueError, RecursionError):
        found = text
    return found if isinstance(found, dict) else {"arguments": found}


def _said(parts: Iterable[Part]) -> str:
    return "".join(part.text if isinstance(part, TextPart) else _in_words(part) for part in parts)


# --- OpenAI and Qwen ----------------------------------------------------------------------------------------------------------


def _openai_body(turns: Sequence[_Turn]) -> Json:
    return {"messages": [message for turn in turns for message in _openai(turn, _openai_part)]}


def _qwen_body(turns: Sequence[_Turn]) -> Json:
    return {"messages": [message for turn in turns for message in _openai(turn, _qwen_part)]}


def _openai(turn: _Turn, write: Callable[[Part], Json | None]) -> Iterator[Json]:
    if turn.role == "tool":
        for part in turn.parts:
            assert isinstance(part, Result)
            said = [inner for inner in part.parts if not _is_picture(inner)]
            yield {"role": "tool", "tool_call_id": part.id, "content": _said(said)}
            shown = [inner for inner in part.parts if _is_picture(inner)]  # a tool's message has no pictures
            if shown:
                parts = (TextPart(f"[pictures of the result {part.id}]"), *shown)
                yield {"role": "user", "content": _content(parts, write)}
        return
    message: Json = {"role": turn.role}
    calls = [part for part in turn.parts if isinstance(part, Call)]
    rest = [part for part in turn.parts if not isinstance(part, Call | Thinking)]
    message["content"] = _content(rest, write) if rest or not calls else None
    if turn.name:
        message["name"] = turn.name
    if calls:
        message["tool_calls"] = [
            {"id": call.id, "type": "function", "function": {"name": call.name, "arguments": call.arguments}} for call in calls
        ]
    yield message


def _content(parts: Sequence[Part], write: Callable[[Part], Json | None]) -> str | list[Json]:
    """One text is a string."""
    if all(isinstance(part, TextPart) for part in parts) and len(parts) <= 1:
        return _said(parts)
    return [found for part in parts if (found := write(part)) is not None]


def _is_picture(part: Part) -> bool:
    return isinstance(part, Attachment) and part.kind == "image"


def _openai_part(part: Part) -> Json | None:
    if isinstance(part, Attachment) and part.media_type == "application/pdf":
        return {"type": "file", "file": {"filename": part.title or "document.pdf", "file_data": _url(part)}}
    if isinstance(part, Other) and part.type in _OWN["openai"]:
        return dict(json.loads(part.json))
    return _text_or_picture(part)


def _qwen_part(part: Part) -> Json | None:
    if isinstance(part, Other) and part.type in _OWN["qwen"]:
        return dict(json.loads(part.json))
    return _text_or_picture(part)


def _text_or_picture(part: Part) -> Json | None:
    if isinstance(part, TextPart):
        return {"type": "text", "text": part.text}
    if isinstance(part, Attachment) and part.kind == "image":
        return {"type": "image_url", "image_url": {"url": _url(part)}}
    if isinstance(part, Reference) and part.kind == "image" and _is_link(part):
        return {"type": "image_url", "image_url": {"url": part.address}}
    return {"type": "text", "text": _in_words(part)}


# --- Anthropic ----------------------------------------------------------------------------------------------------------------


def _anthropic_body(turns: Sequence[_Turn]) -> Json:
    system = [{"type": "text", "text": text} for text in _instructions(turns)]
    written = ((_side(turn, "assistant"), _blocks(turn)) for turn in turns if turn.role != "system")
    found = [{"role": role, "content": blocks} for role, blocks in _joined(written)]
    return {"system": system, "messages": found} if system else {"messages": found}


def _instructions(turns: Sequence[_Turn]) -> list[str]:
    """All of them, in order.  These providers know them in a field of their own alone; as a user's text they could be forged."""
    found = (_said(turn.parts) for turn in turns if turn.role == "system")
    return [text for text in found if text]  # an empty text is refused there


def _side(turn: _Turn, model: str) -> str:
    """These providers know two who speak."""
    return model if turn.role == "assistant" else "user"


def _joined(written: Iterable[tuple[str, list[Json]]]) -> list[tuple[str, list[Json]]]:
    """What one says in a row is one message; nothing said is none."""
    joined: list[tuple[str, list[Json]]] = []
    for role, parts in written:
        if joined and joined[-1][0] == role:
            joined[-1][1].extend(parts)
        elif parts:
            joined.append((role, list(parts)))
    return joined


def _blocks(turn: _Turn) -> list[Json]:
    return [block for part in turn.parts if (block := _block(part)) is not None]


def _block(part: Part) -> Json | None:
    if isinstance(part, TextPart):
        return {"type": "text", "text": part.text} if part.text else None  # an empty text is refused there
    if isinstance(part, Thinking):
        if part.hidden:
            return {"type": "redacted_thinking", "data": part.hidden}
        return {"type": "thinking", "thinking": part.text, "signature": part.signature} if part.signature else None
    if isinstance(part, Call):
        return {"type": "tool_use", "id": part.id, "name": part.name, "input": _object(part.arguments)}
    if isinstance(part, Result):
        content = [block for inner in part.parts if (block := _block(inner)) is not None]
        return {"type": "tool_result", "tool_use_id": part.id, "content": content} | ({"is_error": True} if part.is_error else {})
    if isinstance(part, Attachment) and part.media_type != "text/plain":
        title = {"title": part.title} if part.title and part.kind == "document" else {}
        return {"type": part.kind, "source": {"type": "base64", "media_type": part.media_type, "data": _data(part)}, **title}
    if isinstance(part, Reference) and _is_link(part):
        return {"type": part.kind, "source": {"type": "url", "url": part.address}}
    if isinstance(part, Other) and part.type in _OWN["anthropic"]:
        return dict(json.loads(part.json))
    return {"type": "text", "text": _in_words(part)}


# --- Gemini -------------------------------------------------------------------------------------------------------------------


def _gemini_body(turns: Sequence[_Turn]) -> Json:
    names = {part.id: part.name for turn in turns for part in turn.parts if isinstance(part, Call)}
    system = [{"text": text} for text in _instructions(turns)]
    written = ((_side(turn, "model"), _gemini_parts(turn, names)) for turn in turns if turn.role != "system")
    contents = [{"role": role, "parts": parts} for role, parts in _joined(written)]
    return {"systemInstruction": {"parts": system}, "contents": contents} if system else {"contents": contents}


def _gemini_parts(turn: _Turn, names: Mapping[str, str]) -> list[Json]:
    return [each for part in turn.parts for each in _gemini_part(part, names)]


def _gemini_part(part: Part, names: Mapping[str, str]) -> Iterator[Json]:
    if isinstance(part, TextPart):
        if part.text:
            yield {"text": part.text}
    elif isinstance(part, Call):
        yield {"functionCall": {"id": part.id, "name": part.name, "args": _object(part.arguments)}}
    elif isinstance(part, Result):
        said = _said(inner for inner in part.parts if not _is_picture(inner))
        answer = {"error" if part.is_error else "output": said}
        yield {"functionResponse": {"id": part.id, "name": names.get(part.id, "unknown"), "response": answer}}
        yield from (each for inner in part.parts if _is_picture(inner) for each in _gemini_part(inner, names))
    elif isinstance(part, Attachment) and part.media_type != "text/plain":
        yield {"inlineData": {"mimeType": part.media_type, "data": _data(part)}}
    elif not isinstance(part, Thinking):
        yield {"text": _in_words(part)}


_BODIES: Mapping[Provider, Callable[[Sequence[_Turn]], Json]] = {
    "openai": _openai_body,
    "anthropic": _anthropic_body,
    "gemini": _gemini_body,
    "qwen": _qwen_body,
}
