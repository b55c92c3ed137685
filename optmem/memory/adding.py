"""Messages as they are added: checked, counted, cut into the lines that the index finds them by, and grouped.

While a call waits for its result, everything that is said belongs to the call's group.  A call that nobody answered within WAITING
messages is given up: what comes after it begins a group of its own.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

from optmem.memory.messages import Message, groups
from optmem.memory.records import NewMessage
from optmem.memory.settings import State

WAITING = 16


def new_messages(
    messages: Sequence[Message], state: State, count: Callable[[str], int], time: float, *, indexed: bool
) -> tuple[list[NewMessage], State]:
    """What the store is to keep, and where the history is then.

    Raises InputError for a result without a call, a call answered twice, and an id called twice.
    """
    groups(messages, state.waiting)
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
