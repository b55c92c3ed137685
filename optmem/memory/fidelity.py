"""How much of a page a model reads at a tier: measured where it was measured, and said to be a guess where it was not.

The numbers are those of `fidelity.json`, which `optmem eval` writes beside a model's weights; they are of these weights alone.
A public checkpoint has none: what its papers claim stands in ASSUMED, as a guess, for whoever asks for it by name.
"""

from __future__ import annotations

import json
from bisect import bisect_right
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from math import inf
from pathlib import Path
from typing import Any, Literal, Protocol

from optmem.engine.checkpoint import FIDELITY, MAX_FIDELITY
from optmem.errors import CheckpointError, InputError, SourceNotFoundError
from optmem.files import checkpoint_folder, read_json

# Measured; between two sides that were; below the least that was; claimed by papers for natural text.
Basis = Literal["measured", "between", "below", "assumed"]
BELOW = 3  # how fast a score falls with the side where nothing was measured: nano's falls by 1.2 to 1.6 where it was


@dataclass(frozen=True, slots=True)
class Fidelity:
    """What a page keeps.  score is 1 - edit distance / length; what was not measured is None."""

    score: float
    basis: Basis
    exact_lines: float | None = None  # share of the lines
    identifiers: float | None = None  # share of hashes, paths, numbers
    glance: float | None = None  # score of the glance
    low: float | None = None  # end of the score's 95 % interval


class Curve(Protocol):
    """What a ladder asks."""

    def at(
        self, size: int, side: int, cell: str, kind: str | None = None, *, ratio: float = 0.0, complete: bool = False
    ) -> Fidelity:
        """Of a page drawn at `size` pixels in cells of `cell`, shown at `side`.

        kind       of text; None is the mean over kinds
        ratio      text tokens of the page / tokens that it costs
        complete   guess where nothing was measured, and say so in `basis`
        """


@dataclass(frozen=True, slots=True)
class Measured:
    """The curve of one model."""

    model: str  # fingerprint of its weights
    table: Mapping[tuple[int, int, str, str | None], Fidelity]  # size, side, cell, kind; None is the mean over kinds

    @classmethod
    def from_json(cls, found: Mapping[str, Any]) -> Measured:
        """From what `fidelity.json` holds.  Raises CheckpointError where that is damaged."""
        model = found.get("model")
        if not isinstance(model, str) or not model:
            raise CheckpointError(f"{FIDELITY}: model must be the fingerprint of weights, got {str(model)[:80]!r}")
        table = dict(_rows(found, "fidelity")) | dict(_rows(found, "cells"))
        if not table:
            raise CheckpointError(f"{FIDELITY} holds no tier at all: run `optmem eval` on this model again")
        return cls(model, table)

    def at(
        self, size: int, side: int, cell: str, kind: str | None = None, *, ratio: float = 0.0, complete: bool = False
    ) -> Fidelity:
        """As `Curve` has it.  A kind that was not measured takes the mean; ratio is not needed.

        Raises InputError where nothing was measured, unless `complete`.
        """
        del ratio  # the size of a cell says how dense the page is
        kinds = (kind, None) if kind is not None else (None,)
        for each in kinds:
            known = self.table.get((size, side, cell, each))
            if known is not None:
                return known
        sides = next((sides for each in kinds if (sides := self._sides(size, cell, each))), {})
        if not complete or not sides:
            raise InputError(f"nothing was measured of {size}-pixel pages of {cell} shown at {side}: there is {self._known()}")
        return _between(sides, side)

    def _sides(self, size: int, cell: str, kind: str | None) -> dict[int, Fidelity]:
        found = {key[1]: known for key, known in self.table.items() if (key[0], key[2], key[3]) == (size, cell, kind)}
        return dict(sorted(found.items()))

    def _known(self) -> str:
        return ", ".join(f"{size} shown at {side} ({cell})" for size, side, cell, kind in self.table if kind is None)


@dataclass(frozen=True, slots=True)
class Assumed:
    """What papers claim, for a model that was not measured: natural text only, and every answer says "assumed".

    points   text tokens for each token fed, and the score there
    """

    points: tuple[tuple[float, float], ...]

    def at(
        self, size: int, side: int, cell: str, kind: str | None = None, *, ratio: float = 0.0, complete: bool = False
    ) -> Fidelity:
        """As `Curve` has it; `complete` must be asked for, since it is always a guess.  Raises InputError otherwise."""
        if not complete:
            raise InputError(f"this model was not measured ({size} shown at {side}, {cell}, {kind}): run `optmem eval` on it")
        place = bisect_right(self.points, (ratio, inf))
        (start, from_score), (end, to_score) = self.points[max(place - 1, 0)], self.points[min(place, len(self.points) - 1)]
        part = (ratio - start) / (end - start) if end > start else 0.0
        return Fidelity(from_score + (to_score - from_score) * part, "assumed")


# DeepSeek-OCR (arXiv 2510.18234, abstract): about 97 % below 10x and about 60 % at 20x, on Fox pages of 600 to 1,300 text tokens.
# Beyond, the line goes on to nothing.  Text without any prior is read far worse (arXiv 2601.03714: about 20 %).
ASSUMED = Assumed(((0.0, 0.97), (10.0, 0.97), (20.0, 0.60), (36.0, 0.0)))


def read_curve(folder: Path, weights: str, *, assume: bool = False) -> Curve:
    """The curve of the model in a folder.

    weights   their fingerprint, as `optmem.engine.checkpoint.fingerprint` has it
    assume    where nothing was measured, take what papers claim

    Raises SourceNotFoundError where nothing was measured, CheckpointError where it is damaged or was measured on other weights.
    """
    folder = checkpoint_folder(folder)
    if not (folder / FIDELITY).is_file():
        if assume:
            return ASSUMED
        raise SourceNotFoundError(
            f"{folder.name} has no {FIDELITY}: run `optmem eval` on it, or ask for what papers claim (assume=True)"
        )
    curve = Measured.from_json(read_json(folder, FIDELITY, limit=MAX_FIDELITY))
    if curve.model != weights:
        raise CheckpointError(f"{FIDELITY} was measured on other weights: run `optmem eval` on these, or remove it")
    return curve


def _rows(found: Mapping[str, Any], name: str) -> Iterable[tuple[tuple[int, int, str, str | None], Fidelity]]:
    rows = found.get(name, [])
    if not isinstance(rows, list):
        raise CheckpointError(f"{FIDELITY}: {name} must be a list, got {type(rows).__name__}")
    for number, row in enumerate(rows):
        where = f"{FIDELITY}: {name} {number}"
        if not isinstance(row, dict):
            raise CheckpointError(f"{where} must be an object, got {type(row).__name__}")
        key = (_side(row, "size", where), _side(row, "side", where), row.get("cell"), row.get("kind"))
        if not isinstance(key[2], str) or not isinstance(key[3], str | None):
            raise CheckpointError(f"{where}: cell and kind must be strings, got {str(key[2:])[:80]}")
        score = _share(row, "score", where)
        if score is not None:  # None counts nothing: no page of this kind was there
            parts = {part: _share(row, part, where) for part in ("exact_lines", "identifiers", "glance", "low")}
            yield key, Fidelity(score, "measured", **parts)  # type: ignore[misc]


def _side(row: Mapping[str, Any], name: str, where: str) -> int:
    value = row.get(name)
    if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= 8192:
        raise CheckpointError(f"{where}: {name} must be a number of pixels, got {json.dumps(value)[:80]}")
    return value


def _share(row: Mapping[str, Any], name: str, where: str) -> float | None:
    value = row.get(name)
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= 1:
        raise CheckpointError(f"{where}: {name} must be from 0 to 1 or null, got {json.dumps(value)[:80]}")
    return float(value)


def _between(sides: Mapping[int, Fidelity], side: int) -> Fidelity:
    """A guess from the sides measured, never above the next larger of them: more pixels are taken to be no worse."""
    known = sorted(sides)
    above = [each for each in known if each > side]
    below = [each for each in known if each < side]
    if not above:  # shown larger than any that was measured: no better than the largest
        return replace(_least(sides, known[-1:]), basis="between")
    upper = _least(sides, above)
    if not below:
        return _scaled(upper, (side / above[0]) ** BELOW, "below")
    lower = _least(sides, [below[-1], *above])
    return _mixed(lower, upper, (side - below[-1]) / (above[0] - below[-1]))


_SCORES = ("score", "exact_lines", "identifiers", "glance", "low")


def _least(sides: Mapping[int, Fidelity], among: Sequence[int]) -> Fidelity:
    found = {name: [value for side in among if (value := getattr(sides[side], name)) is not None] for name in _SCORES}
    return Fidelity(basis="between", **{name: min(values, default=None) for name, values in found.items()})  # type: ignore[arg-type]


def _scaled(known: Fidelity, by: float, basis: Basis) -> Fidelity:
    found = {name: None if (value := getattr(known, name)) is None else value * by for name in _SCORES}
    return Fidelity(basis=basis, **found)  # type: ignore[arg-type]


def _mixed(lower: Fidelity, upper: Fidelity, part: float) -> Fidelity:
    found: dict[str, float | None] = {}
    for name in _SCORES:
        low, high = getattr(lower, name), getattr(upper, name)
        found[name] = None if low is None or high is None else low + (high - low) * part
    return Fidelity(basis="between", **found)  # type: ignore[arg-type]
