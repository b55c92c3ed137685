"""An engine that does not encode or read the same page twice: one history is asked under many budgets.

What is read of a page does not depend on what is read beside it, so that the answers are those of the engine itself.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any, cast

from optmem.engine import Completion, Engine, VisionTokens
from optmem.errors import InputError
from optmem.images import Pixels

Key = tuple[str, tuple[int, ...]]


class Reader:
    """Stands where a memory wants its engine."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._encoded: dict[str, VisionTokens] = {}
        self._read: dict[Key, Completion | InputError] = {}
        self.spared = 0  # pages and readings that were there already

    def __getattr__(self, name: str) -> Any:
        return getattr(self._engine, name)

    def encode(self, images: Sequence[Pixels]) -> list[VisionTokens]:
        """Square pages at their own size."""
        keys = [f"{pixels.shape} {hashlib.sha256(pixels.tobytes()).hexdigest()}" for pixels in images]
        new = {key: pixels for key, pixels in zip(keys, images, strict=True) if key not in self._encoded}
        self.spared += len(images) - len(new)
        self._encoded |= zip(new, self._engine.encode(list(new.values())), strict=True) if new else ()
        return [self._encoded[key] for key in keys]

    def decode(self, tokens: Sequence[VisionTokens], rows: Sequence[int] = ()) -> list[Completion]:
        """Of one page, all of it or these rows.  Raises InputError where it has no such rows."""
        (page,) = tokens
        key = hashlib.sha256(page.to_bytes()).hexdigest(), tuple(rows)
        self.spared += key in self._read
        if key not in self._read:
            try:
                (self._read[key],) = self._engine.decode([page], rows=rows) if rows else self._engine.decode([page])
            except InputError as refusal:
                self._read[key] = refusal
        found = self._read[key]
        if isinstance(found, InputError):
            raise found
        return [found]

    def as_engine(self) -> Engine:
        """For whoever asks by type."""
        return cast(Engine, self)
