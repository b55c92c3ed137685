"""Does it read?  Greedy decoding of fresh pages, as users will have it, and the glance beside it."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from optmem.model.model import Model
from optmem.model.nano import embed_prefix, join_rows, read_rows
from optmem.pixels import find_mode
from optmem.text.characters import CharacterTokenizer
from optmem.train.labels import sheets
from optmem.train.synth import Batch


@dataclass(frozen=True, slots=True)
class Read:
    """How well one page was read."""

    greedy: float  # 1 - edit distance / length of the longer one
    glance: float  # share of cells, blank ones too
    cell: tuple[int, int]  # that the glance took the page's cells for
    said: str


@torch.inference_mode()
def read_pages(model: Model, batch: Batch, *, extra_rows: int = 1, max_symbols: int = 160) -> list[Read]:
    """Every page read by rows, all at once: as many as its grid holds and some more, of which nothing is told to the decoder."""
    tokenizer = model.tokenizer
    assert isinstance(tokenizer, CharacterTokenizer), "only nano reads by rows"
    assert model.glance is not None, "nano has a glance"
    mode = find_mode(f"square {batch.form.side}")
    rows = range(min(batch.form.grid[0] + extra_rows, len(tokenizer.rows)))
    found = []
    for image, page, grid in zip(batch.images, batch.pages(), sheets(batch, tokenizer), strict=True):
        features = model.encoder(torch.from_numpy(image[None, ..., None]))[0]
        prefix = embed_prefix(model.encoder, model.decoder, features, mode, tokenizer)
        said = join_rows(read_rows(model.decoder, prefix, rows, tokenizer, max_symbols=max_symbols), tokenizer)
        glimpse = model.glance.read(features)
        is_same = glimpse.ids.numpy() == grid.ids if glimpse.ids.shape == grid.ids.shape else np.zeros(1)
        found.append(Read(likeness(said, page.text), float(is_same.mean()), glimpse.cell, said))
    return found


def likeness(a: str, b: str) -> float:
    """1 - edit distance / length of the longer text; 1 for two empty ones."""
    if not a or not b:
        return float(a == b)
    codes = np.array([ord(char) for char in b])
    steps = np.arange(len(b) + 1)
    before = steps.copy()
    for char in a:
        row = np.empty_like(before)
        row[0] = before[0] + 1
        row[1:] = np.minimum(before[:-1] + (codes != ord(char)), before[1:] + 1)
        before = np.minimum.accumulate(row - steps) + steps  # insertions, all at once
    return 1.0 - float(before[-1]) / max(len(a), len(b))
