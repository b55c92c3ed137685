"""The same calls for programs with an event loop: each runs in a thread, and the loop goes on meanwhile."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from optmem.memory.memory import Memory


class AsyncTwins:
    """`await memory.aadd(...)` is `memory.add(...)`, and so on."""

    async def aadd(self: Memory, *args: Any, **kwargs: Any) -> Any:  # type: ignore[misc]
        """As `add`."""
        return await asyncio.to_thread(self.add, *args, **kwargs)

    async def acontext(self: Memory, *args: Any, **kwargs: Any) -> Any:  # type: ignore[misc]
        """As `context`."""
        return await asyncio.to_thread(self.context, *args, **kwargs)

    async def arecall(self: Memory, *args: Any, **kwargs: Any) -> Any:  # type: ignore[misc]
        """As `recall`."""
        return await asyncio.to_thread(self.recall, *args, **kwargs)

    async def aread(self: Memory, *args: Any, **kwargs: Any) -> Any:  # type: ignore[misc]
        """As `read`."""
        return await asyncio.to_thread(self.read, *args, **kwargs)

    async def apin(self: Memory, *args: Any, **kwargs: Any) -> Any:  # type: ignore[misc]
        """As `pin`."""
        return await asyncio.to_thread(self.pin, *args, **kwargs)

    async def aforget(self: Memory, *args: Any, **kwargs: Any) -> Any:  # type: ignore[misc]
        """As `forget`."""
        return await asyncio.to_thread(self.forget, *args, **kwargs)

    async def aage(self: Memory, *args: Any, **kwargs: Any) -> Any:  # type: ignore[misc]
        """As `age`."""
        return await asyncio.to_thread(self.age, *args, **kwargs)

    async def astats(self: Memory) -> Any:  # type: ignore[misc]
        """As `stats`."""
        return await asyncio.to_thread(self.stats)

    async def averify(self: Memory, *args: Any, **kwargs: Any) -> Any:  # type: ignore[misc]
        """As `verify`."""
        return await asyncio.to_thread(self.verify, *args, **kwargs)
