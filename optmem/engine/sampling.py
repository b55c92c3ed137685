"""How a token is picked: what a request asks for, and one call for a whole batch.

A pick is a function of the logits, what was said before, and a number that follows from the request's seed and the token's place.
So a draft is verified under sampling as it is under greedy decoding, and a text that was interrupted goes on as it would have.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from optmem import ops
from optmem.engine.draft import Said
from optmem.errors import InputError
from optmem.text.ngram import NgramGuard

HOTTEST = 100.0
_MASK = (1 << 64) - 1
_GOLDEN = np.uint64(0x9E3779B97F4A7C15)  # splitmix64's: constants and shifts of its finaliser below


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def told(given: object) -> str:
    """A number or a short word as it came, anything else by its type: objects name addresses."""
    if isinstance(given, int | float | str) and len(str(given)) <= 40:
        return repr(given)
    return type(given).__name__


@dataclass(frozen=True, slots=True)
class Sampling:
    """What a request asks of every pick."""

    temperature: float = 0.0  # 0 is greedy
    top_p: float = 1.0  # of the likeliest tokens, as many as have this mass together
    seed: int = 0
    guard: NgramGuard | None = None

    def __post_init__(self) -> None:
        if not (_is_number(self.temperature) and 0 <= self.temperature <= HOTTEST):
            raise InputError(f"temperature must be 0 to {HOTTEST:g}, got {told(self.temperature)}")
        if not (_is_number(self.top_p) and 0 < self.top_p <= 1):
            raise InputError(f"top_p must be above 0 and at most 1, got {told(self.top_p)}")
        if type(self.seed) is not int:
            raise InputError(f"seed must be a whole number, got {told(self.seed)}")
        if self.guard is not None and not isinstance(self.guard, NgramGuard):
            raise InputError(f"ngram_guard must be an NgramGuard or None, got {type(self.guard).__name__}")


GREEDY = Sampling()


@dataclass(frozen=True, slots=True)
class Pick:
    """One row of logits to pick from."""

    sampling: Sampling
    said: Sequence[int]  # before this token,
    proposed: Sequence[int] = ()  # and behind that

    @property
    def place(self) -> int:
        """The number of the token that is picked."""
        return len(self.said) + len(self.proposed)

    def last(self, count: int) -> list[int]:
        """So many tokens before it."""
        return [*self.said[-count:], *self.proposed][-count:]


def chances(seeds: Sequence[int], places: Sequence[int]) -> NDArray[np.float64]:
    """A number in [0, 1) for the n-th token of a request: the finaliser of splitmix64 over both."""
    seed = np.array([value & _MASK for value in seeds], dtype=np.uint64)
    with np.errstate(over="ignore"):
        x = _mixed(seed + _GOLDEN) + _GOLDEN * (np.array(places, dtype=np.uint64) + np.uint64(1))
        bits = _mixed(x) >> np.uint64(11)
    found: NDArray[np.float64] = bits.astype(np.float64) * 2.0**-53
    return found


def _mixed(x: NDArray[np.uint64]) -> NDArray[np.uint64]:
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    mixed: NDArray[np.uint64] = x ^ (x >> np.uint64(31))
    return mixed


def pick(logits: Tensor, picks: Sequence[Pick], *, confidence_temperature: float = 1.0) -> Said:
    """One token for every row of logits, fp32 [N, V]: id, log-probability, and probability at the temperature of confidence.

    A row that holds NaN gives id -1.
    """
    guards = [each.sampling.guard for each in picks]
    most_guard = max((guard.size for guard in guards if guard), default=0)
    is_sampled = any(each.sampling.temperature > 0 for each in picks)
    ids, logprobs = ops.pick_token(logits, *_arguments(picks, guards, logits.device), most_guard=most_guard, is_sampled=is_sampled)
    confidence = logprobs
    if confidence_temperature != 1:
        confidence = (logits / confidence_temperature).log_softmax(-1).gather(1, ids.clamp(min=0)[:, None])[:, 0]
    return Said(ids.tolist(), logprobs.tolist(), confidence.exp().tolist())


def _arguments(picks: Sequence[Pick], guards: Sequence[NgramGuard | None], device: torch.device) -> list[Tensor]:
    """What pick_token wants to know of every row, in its order."""
    histories = [each.last(guard.window) if guard else [] for each, guard in zip(picks, guards, strict=True)]
    settings = [each.sampling for each in picks]
    places = chances([setting.seed for setting in settings], [each.place for each in picks])
    arguments = [
        _padded(histories),
        torch.tensor([guard.size if guard else 0 for guard in guards]),
        torch.tensor([guard.window if guard else 0 for guard in guards]),
        _padded([sorted(guard.whitelist) if guard else [] for guard in guards]),
        torch.tensor([setting.temperature for setting in settings], dtype=torch.float32),
        torch.tensor([setting.top_p for setting in settings], dtype=torch.float32),
        torch.from_numpy(places),
    ]
    return [argument.to(device) for argument in arguments]


def _padded(rows: Sequence[Sequence[int]]) -> Tensor:
    """int64 [N, longest], -1 on the left of shorter ones."""
    longest = max(map(len, rows), default=0)
    table = np.full((len(rows), longest), -1, dtype=np.int64)
    for number, row in enumerate(rows):
        if row:
            table[number, -len(row) :] = row
    return torch.from_numpy(table)
