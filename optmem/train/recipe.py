"""A training in one file: stages one after the other, each with its pages, its losses and its rates.

seed = 1
[[stages]]
name = "encoder"            a stage ends with its minutes or its steps, whatever comes first
minutes = 10
pages = [{ size = 256, cell = "8x16", share = 0.5 }, ...]
losses = { patches = 0.3 }
rates = { muon = 0.02, adam = 2e-3 }
"""

from __future__ import annotations

import json
import tomllib
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any, TypeVar

from optmem.errors import InputError, SourceNotFoundError
from optmem.train.losses import Weights
from optmem.train.muon import Rates
from optmem.train.synth import Form

T = TypeVar("T")
TRAINED = ("encoder", "decoder", "all")
BEGINNINGS = ("", "graft")
_STEERED = {"minutes", "steps", "rates", "warmup", "cooldown", "coolest"}  # what may change while a stage is trained


@dataclass(frozen=True, slots=True)
class Stage:
    """One part of a training."""

    name: str
    minutes: float = 0.0  # 0: only steps count
    steps: int = 0  # 0: only minutes count
    trains: str = "all"  # "encoder" with the glance and the helpers of both, "decoder" with the cursors, or "all"
    begins: str = ""  # "graft" plants the glance into the experts
    pages: tuple[Form, ...] = (Form(256, "8x16"),)
    batch: int = 32  # pages
    batch_side: int = 0  # pixels: so many pages of this side, and of others in proportion to their rows' length; 0: of all
    spots: int = 256  # cells of a page that the read-outs are asked for
    stretches: int = 0  # of a page, for the decoder
    document: float = 0.0  # share of batches whose stretches are several rows where they stand in the document
    document_rows: int = 3
    losses: Weights = field(default_factory=Weights)
    rates: Rates = field(default_factory=lambda: Rates(muon=0.02, adam=2e-3))
    warmup: int = 10  # steps
    cooldown: float = 0.5  # the last share of the stage, in which the rates fall
    coolest: float = 0.02  # what is left of them at its end
    mix: Mapping[str, float] = field(default_factory=dict)  # kinds of pages and how often; empty is the usual mix

    def __post_init__(self) -> None:
        _check(self.minutes > 0 or self.steps > 0, f"stage {self.name!r} needs minutes or steps")
        _check(self.trains in TRAINED, f"stage {self.name!r}: trains must be one of {', '.join(TRAINED)}, got {self.trains!r}")
        _check(self.begins in BEGINNINGS, f"stage {self.name!r}: begins must be 'graft' or nothing, got {self.begins!r}")
        _check(min(self.batch, self.spots) > 0 and self.stretches >= 0, f"stage {self.name!r}: batch and spots must be positive")
        _check(self.batch_side >= 0, f"stage {self.name!r}: batch_side must be 0 or pixels, got {self.batch_side}")
        _check(sum(form.share for form in self.pages) > 0, f"stage {self.name!r} has no pages")
        _check(0 <= self.cooldown <= 1, f"stage {self.name!r}: cooldown must be 0 to 1, got {self.cooldown}")
        _check(0 <= self.coolest <= 1, f"stage {self.name!r}: coolest must be 0 to 1, got {self.coolest}")

    def pages_at_once(self, form: Form) -> int:
        """How many pages of a form make a batch."""
        return max(1, round(self.batch * self.batch_side / form.side)) if self.batch_side else self.batch

    def pace(self, step: int, progress: float) -> float:
        """The factor on all rates at a step, the share `progress` of the stage being over."""
        warm = min(1.0, (step + 1) / (self.warmup + 1))
        cool = 1.0 if self.cooldown == 0 else min(1.0, (1.0 - progress) / self.cooldown)
        return warm * (self.coolest + (1 - self.coolest) * cool)


@dataclass(frozen=True, slots=True)
class Recipe:
    """A whole training."""

    stages: tuple[Stage, ...]
    seed: int = 1
    clip: float = 1.0  # norm of the gradient
    autocast: bool = True  # bf16, where the device has it
    log_seconds: float = 5.0
    save_minutes: float = 3.0

    def note(self) -> dict[str, Any]:
        """What a training begun with this recipe is known by, as JSON has it.  How long and how fast may be steered."""
        stages = [{name: value for name, value in asdict(stage).items() if name not in _STEERED} for stage in self.stages]
        note: dict[str, Any] = json.loads(json.dumps({"seed": self.seed, "stages": stages}))
        return note

    def scaled(self, minutes: float) -> Recipe:
        """The same stages in so many minutes together; every stage keeps its share."""
        whole = sum(stage.minutes for stage in self.stages)
        _check(minutes > 0 and whole > 0, "--minutes needs a positive number, and a recipe whose stages have minutes")
        return replace(self, stages=tuple(replace(stage, minutes=stage.minutes * minutes / whole) for stage in self.stages))


def read_recipe(path: Path) -> Recipe:
    """A recipe from its file.  Raises InputError for what is unknown or cannot be."""
    try:
        content = tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise SourceNotFoundError(f"there is no recipe {path.name!r}") from None
    except OSError as error:
        raise InputError(f"{path.name} cannot be read as a recipe: {error.strerror}") from None
    except UnicodeDecodeError:
        raise InputError(f"{path.name} is not UTF-8 text, and so no recipe: a recipe is TOML, such as recipes/nano.toml") from None
    except tomllib.TOMLDecodeError as error:
        raise InputError(f"{path.name} is not TOML: {str(error).splitlines()[0]}") from None
    return parse_recipe(content)


def parse_recipe(content: Mapping[str, Any]) -> Recipe:
    """A recipe from what TOML holds."""
    stages = content.get("stages")
    if not isinstance(stages, list) or not stages:
        raise InputError("a recipe needs at least one [[stages]]")
    return _build(Recipe, {**content, "stages": tuple(_stage(stage) for stage in stages)}, "recipe")


def difference(before: Mapping[str, Any], now: Mapping[str, Any], num_stages: int) -> str | None:
    """Where two notes differ in the seed or the first stages; None where they do not."""
    if before["seed"] != now["seed"]:
        return f"seed {before['seed']}, not {now['seed']}"
    for number, stage in enumerate(before["stages"][:num_stages]):
        if number >= len(now["stages"]):
            return f"a stage {stage['name']!r} behind the last of these"
        other = now["stages"][number]
        name = next((name for name in stage if stage[name] != other.get(name)), None)
        if name is not None:
            return f"{name} {stage[name]!r} in stage {stage['name']!r}, not {other.get(name)!r}"
    return None


def _stage(content: Mapping[str, Any]) -> Stage:
    where = f"stage {content.get('name')!r}"
    given = dict(content)
    for name, kind in (("losses", Weights), ("rates", Rates)):
        if name in given:
            given[name] = _build(kind, given[name], f"{where}: {name}")
    if "pages" in given:
        given["pages"] = tuple(_build(Form, form, f"{where}: pages") for form in given["pages"])
    return _build(Stage, given, where)


def _build(kind: type[T], given: Mapping[str, Any], where: str) -> T:
    known = [each.name for each in fields(kind)]  # type: ignore[arg-type]  # every kind here is a dataclass
    unknown = [name for name in given if name not in known]
    if unknown:
        raise InputError(f"{where} has no {unknown[0]!r}; it has {', '.join(known)}")
    try:
        return kind(**given)
    except TypeError as error:
        raise InputError(f"{where}: {error}") from None


def _check(holds: bool, message: str) -> None:
    if not holds:
        raise InputError(message)
