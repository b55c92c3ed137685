"""Where a training stands, on disk: tensors in safetensors, the rest in JSON.  A folder appears complete or not at all."""

from __future__ import annotations

import json
import os
import secrets
import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from optmem.errors import CheckpointError, InputError
from optmem.files import open_inside, read_json
from optmem.model.tensor_file import read_header, read_tensor, write_file
from optmem.train.recipe import Recipe, difference

TENSORS, PLACE, RECIPE = "state.safetensors", "state.json", "recipe.json"
MAX_PLACE, MAX_RECIPE = 1 << 16, 1 << 22  # bytes


@dataclass(frozen=True, slots=True)
class Place:
    """How far a training is.  All chance is drawn from the recipe's seed, the stage and the step: nothing else needs keeping."""

    stage: int = 0
    step: int = 0  # of the stage: the next one
    seconds: float = 0.0  # of the stage, so far
    pages: int = 0  # of the whole training
    taken: int = 0  # steps of the stage's optimiser


def save_state(folder: Path, place: Place, tensors: Mapping[str, Tensor], recipe: Mapping[str, Any]) -> None:
    """Writes a training's state in place of the one before it.

    recipe   its note: by which the training goes on, and no other
    """
    unfinished = folder.parent / f".{folder.name}.{secrets.token_hex(4)}.unfinished"
    unfinished.mkdir(parents=True)
    write_file(unfinished / TENSORS, tensors, {"kind": "optmem training"})
    (unfinished / PLACE).write_text(json.dumps(asdict(place)), encoding="utf-8")
    (unfinished / RECIPE).write_text(json.dumps(recipe), encoding="utf-8")
    old = unfinished.with_suffix(".old")
    if folder.exists():
        folder.rename(old)
    unfinished.rename(folder)
    shutil.rmtree(old, ignore_errors=True)


def load_place(folder: Path) -> Place:
    """How far the training in this folder is."""
    fields = read_json(folder.resolve(), PLACE, limit=MAX_PLACE)
    try:
        return Place(**fields)  # type: ignore[arg-type]  # checked by the next line
    except TypeError as error:
        raise CheckpointError(f"{PLACE} is not the state of a training: {error}") from None


def check_recipe(folder: Path, recipe: Recipe) -> None:
    """Raises InputError where the training in this folder, if there is one, was begun with another recipe."""
    if not (folder / RECIPE).is_file():
        return  # nothing is begun, or before recipes were noted
    place = load_place(folder)
    before = read_json(folder.resolve(), RECIPE, limit=MAX_RECIPE)
    other = difference(before, recipe.note(), place.stage + (place.step > 0))
    if other is not None:
        begun = f"{folder.resolve().parent.name} was begun with another recipe: {other[:200]}"
        raise InputError(f"{begun}; go on with that one, or take another folder")


def load_tensors(folder: str | os.PathLike[str], into: Mapping[str, Tensor]) -> None:
    """Fills these tensors from the state.  Raises CheckpointError where it holds others, changing nothing."""
    with open_inside(Path(folder).resolve(), TENSORS) as descriptor:
        header = read_header(descriptor, TENSORS)
        wrong = header.tensors.keys() ^ into.keys()
        wrong |= {name for name in header.tensors.keys() & into.keys() if header.tensors[name].shape != tuple(into[name].shape)}
        if wrong:
            raise CheckpointError(f"{TENSORS} is of another model or stage: {min(wrong)[:200]!r} and {len(wrong) - 1} more differ")
        with torch.no_grad():
            for name, entry in header.tensors.items():
                read_tensor(descriptor, entry, into[name], f"{TENSORS}: {name}")
