"""The optical memory: a history kept as text, pages, pixels and tokens inside a budget, and nothing lost that was acknowledged.

The durable half, from below: locks (who may write), blobs (files by their content), schema (tables and versions), records (what
goes in and comes out), words (the lexical index's text), view (reading), store (writing, in transactions), erase (forgetting, and
the search for what should be gone), check (verify).  None of these needs torch: bytes in, bytes out.
"""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from optmem.memory.context import Context
    from optmem.memory.memory import Memory
    from optmem.memory.policy import Policy
    from optmem.memory.recall import Hit
    from optmem.memory.receipt import Receipt
else:
    _HOMES = {"Context": "context", "Hit": "recall", "Memory": "memory", "Policy": "policy", "Receipt": "receipt"}

    def __getattr__(name: str) -> object:
        """What a user of memories names, imported when it is first asked for: the durable half needs no torch."""
        if name not in _HOMES:
            raise AttributeError(f"module 'optmem.memory' has no attribute {name!r}")
        return getattr(import_module(f"optmem.memory.{_HOMES[name]}"), name)

    def __dir__() -> list[str]:
        return sorted({*globals(), *_HOMES})


__all__ = ["Context", "Hit", "Memory", "Policy", "Receipt"]
