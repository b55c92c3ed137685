"""The same calls for programs with an event loop: each runs in a thread, and the loop goes on meanwhile."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from functools import wraps
from typing import Any, ParamSpec, TypeVar

Given = ParamSpec("Given")
Found = TypeVar("Found")


def twin(call: Callable[Given, Found]) -> Callable[Given, Coroutine[Any, Any, Found]]:
    """`await memory.aadd(...)` is `memory.add(...)`, and so on."""

    @wraps(call)
    async def awaited(*args: Given.args, **kwargs: Given.kwargs) -> Found:
        return await asyncio.to_thread(call, *args, **kwargs)

    return awaited
