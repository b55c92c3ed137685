"""What an evaluation found: `fidelity.json`, which lies beside the weights, and which a memory's policy reads.

    model            32 hexadecimal digits over all weights
    corpus, seed     what the pages were made from; with the two numbers below the same file comes again on a CPU
    pages, rows      of each cell of the table; rows of each page that were read, 0 for all of them
    cells            a list, one entry for a form of page and a kind of text: the fields of `Cell`
    fidelity         the short form, one entry for a tier and density: the fields of `Tier`, means over the kinds of text
    controls         the same pages with nothing to read, or not theirs: a score above the floor would be guessing
    baselines        what the same number of tokens says without vision
    calibration      {"decoder_temperature": t, "glance_temperature": t, "decoder": {"before": .., "after": ..}, "glance": {..}}:
                     of pages shown at their own size: fitted on every second, measured on the others; before and after are
                     the fields of `Calibration`.
                     is_held_out is false where there was one page alone, which then was both

A rate that counts nothing, such as the digits of a text without any, is null.  low and high are a 95 % interval over pages.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from optmem.engine.checkpoint import FIDELITY
from optmem.errors import OutputError


@dataclass(frozen=True, slots=True)
class Cell:
    """One form of page and one kind of text."""

    size: int  # pixels of the page's side
    side: int  # of the picture: less than size on a lower tier
    cell: str  # width x height of a character on the page
    kind: str
    pages: int
    characters: int  # that were to be read
    vision_tokens: int  # of a page, as papers count
    fed_tokens: int  # with newlines and separator
    score: float | None  # 1 - edit distance / length of the longer text, mean over pages
    low: float | None
    high: float | None
    exact_lines: float | None
    exact_lines_low: float | None
    exact_lines_high: float | None
    digits: float | None
    digits_low: float | None
    digits_high: float | None
    identifiers: float | None
    identifiers_low: float | None
    identifiers_high: float | None
    glance: float | None  # the score of the glance
    glance_low: float | None
    glance_high: float | None
    silent: float | None  # share of the symbols said that are wrong with a confidence above 0.9, before any temperature
    ratio: float  # estimated text tokens of the whole pages / tokens fed
    quarter_ratio: float  # a quarter of their characters / vision tokens, as some papers count
    characters_per_token: float  # characters / vision tokens
    truncation: float | None  # the score of the first text tokens, as many as are fed


@dataclass(frozen=True, slots=True)
class Tier:
    """What a page keeps at a tier and a density."""

    size: int
    side: int
    cell: str
    vision_tokens: int
    fed_tokens: int
    score: float | None
    exact_lines: float | None
    digits: float | None
    identifiers: float | None
    glance: float | None
    ratio: float | None


@dataclass(frozen=True, slots=True)
class Control:
    """One way to take away what is to be read, or to do without pictures."""

    name: str
    form: str
    kind: str
    pages: int
    score: float | None
    low: float | None
    high: float | None
    exact_lines: float | None
    glance: float | None  # None where no picture was shown


@dataclass(frozen=True, slots=True)
class Fidelity:
    """An evaluation."""

    model: str
    corpus: str | None
    seed: int
    pages: int
    rows: int
    cells: tuple[Cell, ...]
    controls: tuple[Control, ...]
    baselines: tuple[Control, ...]
    calibration: dict[str, Any] = field(default_factory=dict)

    def tiers(self) -> list[Tier]:
        """The short form: means over kinds, in the order of the cells."""
        forms = list(dict.fromkeys((cell.size, cell.side, cell.cell) for cell in self.cells))
        return [_tier([cell for cell in self.cells if (cell.size, cell.side, cell.cell) == form]) for form in forms]

    def summary(self) -> dict[str, Any]:
        """As JSON has it."""
        said = asdict(self)
        return {name: said[name] for name in ("model", "corpus", "seed", "pages", "rows")} | {
            "fidelity": [asdict(tier) for tier in self.tiers()],
            **{name: list(said[name]) for name in ("cells", "controls", "baselines")},
            "calibration": said["calibration"],
        }

    def save(self, folder: Path) -> None:
        """Writes fidelity.json."""
        write(folder / FIDELITY, json.dumps(self.summary(), indent=1, allow_nan=False) + "\n")


def _tier(cells: Sequence[Cell]) -> Tier:
    first = cells[0]
    names = ("score", "exact_lines", "digits", "identifiers", "glance", "ratio")
    means = {name: mean([getattr(cell, name) for cell in cells]) for name in names}
    return Tier(first.size, first.side, first.cell, first.vision_tokens, first.fed_tokens, **means)


def mean(values: Sequence[float | None]) -> float | None:
    """Of those that are there."""
    counted = [value for value in values if value is not None]
    return sum(counted) / len(counted) if counted else None


def write(file: Path, content: str | bytes) -> None:
    """A file, complete or not at all, in a folder that is made where it is missing; half a character is written as "?".

    Raises OutputError where it cannot be written.
    """
    unfinished = file.with_name(f".{file.name}.unfinished")
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        unfinished.write_bytes(content if isinstance(content, bytes) else content.encode("utf-8", errors="replace"))
        unfinished.replace(file)
    except OSError as error:
        raise OutputError(f"cannot write {file.name} to {file.parent}: {error.strerror or error}") from None
    finally:
        with suppress(OSError):
            unfinished.unlink(missing_ok=True)
