"""Messages as they are added: checked, counted, cut into the lines that the index finds them by, and grouped.

While a call waits for its result, everything that is said belongs to the call's group.  A call that nobody answered within WAITING
messages is given up: what comes after it begins a group of its own.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

from optmem.errors import InputError
from optmem.images import check_file
from optmem.memory.messages import Message, groups
from optmem.memory.parts import attachments_of
from optmem.memory.records import NewMessage
from optmem.memory.settings import State

WAITING = 16


def _check_said(message: Message, name: str) -> None:
    """Before anything is kept.  Pictures are not decoded here: what is damaged further on is found when it is drawn."""
    if not message.parts:
        raise InputError(f"{name} has no content: give what the {message.role} said, or leave it out")
    for number, part in enumerate(attachments_of(message.parts), 1):
        called = f"{part.kind} {number} of {name}"
        if part.media_type != "text/plain":
            check_file(part.data, called)
        elif not part.data.strip():
            raise InputError(f"{called} is empty: leave it out")


def new_messages(
    messages: Sequence[Message], state: State, count: Callable[[str], int], time: float, *, indexed: bool
) -> tuple[list[NewMessage], State]:
    """What the store is to keep, and where the history is then.

    Raises InputError for a result without a call, a call answered twice, an id called twice, and a message that says nothing;
    ImageError for what came as a picture or a PDF and does not begin as one.
    """
    groups(messages, state.waiting)
    for number, message in enumerate(messages):
        _check_said(message, f"message {number}")
    waiting, waited = list(state.waiting), state.waited
    found: list[NewMessage] = []
    for message in messages:
        text = message.text()
        joins = bool(waiting)
        lines = tuple(line for line in text.splitlines() if line.strip()) if indexed else ()
        found.append(NewMessage(message.role, message.json, count(text), time, joins, lines))
        answered = {result.id for result in message.results}
        waiting = [call for call in waiting if call not in answered] + [call.id for call in message.calls]
        waited = waited + 1 if joins and waiting else 0
        if waited > WAITING:
            waiting, waited = [], 0
    return found, replace(state, waiting=tuple(waiting), waited=waited)
