"""Whether a reader knows when it is wrong: reliability, expected calibration error, silent errors, and a temperature.

The temperature divides the logits.  It changes no choice, only how sure each is said to be, and is fitted so that the probability
of what was chosen is the likeliest chance of being right: the cross entropy of right and wrong under it is least.  An inserted
symbol has no true one beside it, so a fit to the probability of the true symbol would leave the worst errors out.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

Floats = NDArray[np.float64]
Flags = NDArray[np.bool_]
BINS = 15
SURE = 0.9
COOLEST, HOTTEST = 0.2, 5.0
_ALMOST = 1e-7  # no probability is taken for nearer to 0 or 1: single precision cannot tell them apart
_GRID, _HALVINGS = 17, 16


@dataclass(frozen=True, slots=True)
class Bin:
    """Symbols of about the same confidence."""

    confidence: float  # their mean
    right: float  # share
    count: int


@dataclass(frozen=True, slots=True)
class Calibration:
    """What confidence is worth."""

    symbols: int
    error: float | None  # expected calibration error
    silent: float | None  # of all symbols, those that are wrong with a confidence above SURE
    wrong_when_sure: float | None  # of the symbols with a confidence above SURE, those that are wrong
    bins: tuple[Bin, ...]

    def summary(self) -> dict[str, Any]:
        """As JSON has it."""
        return asdict(self)


def reliability(confidence: Floats, is_right: Flags, bins: int = BINS) -> tuple[Bin, ...]:
    """Bins of equal mass, from the least sure to the surest; symbols of one confidence are all as right as their mean.

    So the order of symbols, of pages and thus of kinds of text, does not matter where many are surer than single precision can say.
    """
    _, place = np.unique(confidence, return_inverse=True)
    right = (np.bincount(place, weights=is_right) / np.bincount(place))[place]
    order = np.argsort(confidence, kind="stable")
    parts = [part for part in np.array_split(order, bins) if len(part)]
    return tuple(Bin(float(confidence[part].mean()), float(right[part].mean()), len(part)) for part in parts)


def calibration_error(bins: Sequence[Bin]) -> float | None:
    """The mean distance between confidence and the share that is right, over symbols; None where there are none."""
    total = sum(each.count for each in bins)
    return sum(each.count * abs(each.confidence - each.right) for each in bins) / total if total else None


def silent_errors(confidence: Floats, is_right: Flags) -> tuple[float | None, float | None]:
    """Wrong and sure, as a share of all symbols and of those that it is sure of; None of nothing: that is no good mark."""
    is_sure = confidence > SURE
    silent, sure = int((is_sure & ~is_right).sum()), int(is_sure.sum())
    return silent / len(confidence) if len(confidence) else None, silent / sure if sure else None


def calibrate(confidence: Floats, is_right: Flags) -> Calibration:
    """All of the above."""
    bins = reliability(confidence, is_right)
    return Calibration(len(confidence), calibration_error(bins), *silent_errors(confidence, is_right), bins)


def confidence_at(logits: Tensor, said: Tensor, temperature: float) -> Tensor:
    """The probability of each symbol said: logits fp32 [n, vocabulary], said int64 [n] -> fp32 [n]."""
    return (logits / temperature).log_softmax(-1).gather(1, said[:, None])[:, 0].exp()


def cross_entropy(logits: Tensor, said: Tensor, is_right: Tensor, temperature: float) -> float:
    """Of right and wrong, where the confidence at this temperature is the chance of right."""
    chance = confidence_at(logits, said, temperature).double().clamp(_ALMOST, 1 - _ALMOST)
    return float(-torch.where(is_right, chance.log(), (1 - chance).log()).mean())


def fit_temperature(logits: Tensor, said: Tensor, is_right: Tensor) -> float:
    """The best temperature from 0.2 to 5, to three digits; 1 where all symbols are right, or none: nothing can be learned."""
    if not is_right.any() or is_right.all():
        return 1.0
    grid = np.linspace(np.log(COOLEST), np.log(HOTTEST), _GRID).tolist()
    losses = [cross_entropy(logits, said, is_right, float(np.exp(at))) for at in grid]
    best = int(np.argmin(losses))
    low, high = grid[max(best - 1, 0)], grid[min(best + 1, _GRID - 1)]
    golden = (5**0.5 - 1) / 2
    for _ in range(_HALVINGS):
        left, right = high - golden * (high - low), low + golden * (high - low)
        if cross_entropy(logits, said, is_right, float(np.exp(left))) < cross_entropy(logits, said, is_right, float(np.exp(right))):
            high = right
        else:
            low = left
    return round(float(np.exp((low + high) / 2)), 3)
