"""How a token is picked: what a request asks for, and one call for a whole batch.

A pick is a function of the logits, what was said before, and a number that follows from the request's seed and the token's place.
So a draft is verified under sampling as it is under greedy decoding, and a text that was interrupted goes on as it would have.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import lru_cache

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from optmem import ops
from optmem.engine.draft import Said
from optmem.errors import InputError
from optmem.machine import to_device
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
    is_plain: bool = field(init=False, repr=False)  # whether the likeliest token is picked, whatever was said before

    def __post_init__(self) -> None:
        if not (_is_number(self.temperature) and 0 <= self.temperature <= HOTTEST):
            raise InputError(f"temperature must be 0 to {HOTTEST:g}, got {told(self.temperature)}")
        if not (_is_number(self.top_p) and 0 < self.top_p <= 1):
            raise InputError(f"top_p must be above 0 and at most 1, got {told(self.top_p)}")
        if type(self.seed) is not int:
            raise InputError(f"seed must be a whole number, got {told(self.seed)}")
        if self.guard is not None and not isinstance(self.guard, NgramGuard):
            raise InputError(f"ngram_guard must be an NgramGuard or None, got {type(self.guard).__name__}")
        object.__setattr__(self, "is_plain", self.temperature == 0 and self.guard is None)


GREEDY = Sampling()


@dataclass(frozen=True, slots=True)
class Pick:
    """Some rows of logits to pick from, one behind the other: of one text."""

    sampling: Sampling
    said: Sequence[int]  # before the first of them,
    proposed: Sequence[int] = ()  # and behind that, one more before each
    count: int = 1

    def places(self) -> range:
        """The numbers of the tokens that are picked."""
        return range(len(self.said), len(self.said) + self.count)

    def histories(self) -> list[list[int]]:
        """What the guard looks at, before each token."""
        window = self.sampling.guard.window if self.sampling.guard else 0
        if window == 0:
            return [[]] * self.count
        known = [*self.said[-window:], *self.proposed]
        ends = range(len(known) - len(self.proposed), len(known) - len(self.proposed) + self.count)
        return [known[max(end - window, 0) : end] for end in ends]


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

    picks   of all rows, in their order; none where every row takes the likeliest token

    A row that holds NaN gives id -1.
    """
    arguments = _arguments(picks, logits.shape[0]) if picks else plain_arguments(logits.shape[0])
    most_guard = max((each.sampling.guard.size for each in picks if each.sampling.guard), default=0)
    is_sampled = any(each.sampling.temperature > 0 for each in picks)
    placed = [to_device(argument, logits.device) for argument in arguments]
    ids, logprobs, confidence = ops.pick_token(
        logits, *placed, most_guard=most_guard, is_sampled=is_sampled, confidence_temperature=confidence_temperature
    )
    if logits.device.type == "cpu":
        return Said(ids.tolist(), logprobs.tolist(), confidence.tolist())
    return unpacked(packed(ids, logprobs, confidence).cpu())


def packed(ids: Tensor, logprobs: Tensor, confidence: Tensor) -> Tensor:
    """One tensor for one copy to the host: fp64 [3, N], which holds all of them exactly."""
    return torch.stack([ids.double(), logprobs.double(), confidence.double()])


def unpacked(picked: Tensor) -> Said:
    """What `packed` made, on the host."""
    ids, logprobs, confidence = picked
    return Said(ids.long().tolist(), logprobs.tolist(), confidence.tolist())


@lru_cache(maxsize=16)
def plain_arguments(rows: int) -> tuple[Tensor, ...]:
    """What pick_token wants to know of rows that ask for nothing, on the host.  It reads them only."""
    with torch.device("cpu"):  # whatever the caller's default is: they are kept
        nothing, zeros = torch.empty((rows, 0), dtype=torch.int64), torch.zeros(rows, dtype=torch.int64)
        numbers, ones = torch.zeros(rows, dtype=torch.float32), torch.ones(rows, dtype=torch.float32)
        return nothing, zeros, zeros, nothing, numbers, ones, numbers.double()


def _arguments(picks: Sequence[Pick], rows: int) -> list[Tensor]:
    """What pick_token wants to know of every row, in its order."""
    settings = [each.sampling for each in picks for _ in range(each.count)]
    assert len(settings) == rows, "rows of logits and picks differ in number"
    guards = [setting.guard for setting in settings]
    drawn = chances([setting.seed for setting in settings], [place for each in picks for place in each.places()])
    return [
        _padded([history for each in picks for history in each.histories()]),
        torch.tensor([guard.size if guard else 0 for guard in guards]),
        torch.tensor([guard.window if guard else 0 for guard in guards]),
        _padded([sorted(guard.whitelist) if guard else [] for guard in guards]),
        torch.tensor([setting.temperature for setting in settings], dtype=torch.float32),
        torch.tensor([setting.top_p for setting in settings], dtype=torch.float32),
        torch.from_numpy(drawn),
    ]


def _padded(rows: Sequence[Sequence[int]]) -> Tensor:
    """int64 [N, longest], -1 on the left of shorter ones."""
    longest = max(map(len, rows), default=0)
    table = np.full((len(rows), longest), -1, dtype=np.int64)
    for number, row in enumerate(rows):
        if row:
            table[number, -len(row) :] = row
    return torch.from_numpy(table)
