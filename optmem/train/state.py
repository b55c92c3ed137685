"""Where a training stands, on disk: tensors in safetensors, the rest in JSON.  A folder appears complete or not at all."""

from __future__ import annotations

import json
import os
import secrets
import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor

from optmem.errors import CheckpointError
from optmem.files import open_inside, read_json
from optmem.model.tensor_file import read_header, read_tensor, write_file

TENSORS, PLACE = "state.safetensors", "state.json"
MAX_PLACE = 1 << 16  # bytes


@dataclass(frozen=True, slots=True)
class Place:
    """How far a training is.  All chance is drawn from the recipe's seed, the stage and the step: nothing else needs keeping."""

    stage: int = 0
    step: int = 0  # of the stage: the next one
    seconds: float = 0.0  # of the stage, so far
    pages: int = 0  # of the whole training
    taken: int = 0  # steps of the stage's optimiser


def save_state(folder: Path, place: Place, tensors: Mapping[str, Tensor]) -> None:
    """Writes a training's state in place of the one before it."""
    unfinished = folder.parent / f".{folder.name}.{secrets.token_hex(4)}.unfinished"
    unfinished.mkdir(parents=True)
    write_file(unfinished / TENSORS, tensors, {"kind": "optmem training"})
    (unfinished / PLACE).write_text(json.dumps(asdict(place)), encoding="utf-8")
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
