"""The repetition guard: no sequence of ``size`` tokens may come twice within the last ``window`` tokens.

With H the history, the token t may not come next if  H[i : i + size] = H[-(size - 1):] + [t]  for a start i with
max(0, len(H) - window) <= i <= len(H) - size, unless t is in the whitelist.  So only sequences that lie wholly inside the window
count, and a window smaller than the size bans nothing.  This is the rule of the public vLLM and SGLang scripts; the history is
what was generated.  Size 1, on which those two differ, bans every token of the window.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from optmem.errors import InputError


@dataclass(frozen=True, slots=True)
class NgramGuard:
    """What may not repeat."""

    size: int  # tokens in a sequence
    window: int  # tokens looked back
    whitelist: frozenset[int] = frozenset()  # ids that may always come

    def __post_init__(self) -> None:
        for name, value in (("size", self.size), ("window", self.window)):
            if type(value) is not int or value < 1:
                raise InputError(f"ngram guard: {name} must be a whole number of at least 1, got {value!r}")
        if not all(type(token) is int and token >= 0 for token in self.whitelist):
            raise InputError("ngram guard: the whitelist must hold token ids")
        object.__setattr__(self, "whitelist", frozenset(self.whitelist))

    def banned(self, history: Sequence[int]) -> set[int]:
        """The ids that may not come next.  This is the meaning; operators that do the same on a device are compared with it."""
        seen = list(history[-self.window :])
        prefix = seen[len(seen) - (self.size - 1) :]
        starts = range(len(seen) - self.size + 1)
        found = {seen[start + self.size - 1] for start in starts if seen[start : start + self.size - 1] == prefix}
        return found - self.whitelist
