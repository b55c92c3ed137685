"""Labelled pages without end: `synth(config, corpus, seed)`.

Batch n of a seed is a function of the configuration, the corpus, the seed and n alone.  Workers share a stream by taking every n-th
batch, a run resumes by starting at its next one, and neither changes what is drawn.

A page is drawn from atlas keys through the same layout as `paginate(style="dense")`, without its lines and spans.
"""

from __future__ import annotations

import multiprocessing
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from dataclasses import dataclass, field
from functools import cache, cached_property
from itertools import count, islice
from pathlib import Path
from random import Random

import numpy as np
import torch
from numpy.typing import NDArray

from optmem import ops
from optmem.config import Cell, check_choice
from optmem.errors import InputError
from optmem.pages import Box, read_symbols, symbols
from optmem.pages.alphabet import BLANK, Atlas, alphabet_atlas, spell
from optmem.pages.atlas import CELLS
from optmem.pages.cells import flow
from optmem.train.corpus import Corpus, Split, load
from optmem.train.degrade import Affine, Degradation, Pixels, degrade, move_boxes, scaling, then
from optmem.train.kinds import Keys, Mix, PageKind, write

Ids = NDArray[np.uint16]
MAX_SIDE = 2048
# Shares of pages by where their text ends; all others end anywhere.
RUNS_ON, FULL, NEARLY_EMPTY, NEARLY_FULL = 0.45, 0.05, 0.1, 0.1


@dataclass(frozen=True, slots=True)
class Form:
    """How pages look: their side and cell, and for a lower tier the side at which they are shown."""

    size: int = 512  # pixels
    cell: Cell = "8x16"
    view: int = 0  # pixels; 0 is the page's own size
    share: float = 1.0

    def __post_init__(self) -> None:
        check_choice("cell", self.cell, Cell)
        if not 64 <= self.size <= MAX_SIDE:
            raise InputError(f"the size of a page to train on must be 64 to {MAX_SIDE} pixels, got {self.size}")
        if self.view and not 64 <= self.view <= self.size:
            raise InputError(f"a lower tier must be 64 to {self.size} pixels, the page's own size, got {self.view}")
        if self.share < 0:
            raise InputError(f"the share of a form must be 0 or more, got {self.share}")

    @property
    def cell_size(self) -> tuple[int, int]:
        """Height and width of a cell in pixels of the page."""
        _, height, width = CELLS[self.cell]
        return height, width

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns."""
        height, width = self.cell_size
        return self.size // height, self.size // width

    @property
    def side(self) -> int:
        """Pixels of the picture."""
        return self.view or self.size


@dataclass(frozen=True, slots=True)
class SynthConfig:
    """What is drawn.  A batch has one form, so its pictures have one size."""

    forms: tuple[Form, ...] = (Form(),)
    mix: Mix = field(default_factory=Mix)
    harms: tuple[Degradation, ...] = ()
    batch: int = 32  # pages
    seasoned: bool = True  # three texts in ten with some letters changed to rarer characters; else all as written

    def __post_init__(self) -> None:
        if not self.forms or not sum(form.share for form in self.forms):
            raise InputError("give at least one form of page with a share above 0")
        if not 1 <= self.batch <= 4096:
            raise InputError(f"a batch must be 1 to 4096 pages, got {self.batch}")


@dataclass(frozen=True)
class LabelledPage:
    """A picture and everything that stands on it."""

    image: Pixels  # [side, side]
    ids: Ids  # [rows, columns]: into alphabet.SYMBOLS, 0 where nothing stands
    affine: Affine  # [2, 3]: from the page's pixels to the picture's
    kind: PageKind
    form: Form

    @cached_property
    def symbols(self) -> str:
        """What a reader must say, in reading order."""
        return spell(self.ids)

    @property
    def text(self) -> str:
        """The text that these symbols say."""
        return read_symbols(self.symbols)

    def boxes(self) -> NDArray[np.float64]:
        """Where each cell lies in the picture: [rows, columns, 4] left, top, right, bottom, inside of it."""
        (rows, columns), (height, width) = self.form.grid, self.form.cell_size
        top, left = np.mgrid[:rows, :columns] * np.array([height, width], dtype=np.float64)[:, None, None]
        boxes = np.stack([left, top, left + width, top + height], axis=-1)
        return np.clip(move_boxes(boxes, self.affine), 0, self.form.side)

    def lines(self) -> list[tuple[str, Box]]:
        """The symbols and the place of each row on which something stands."""
        height, width = self.form.cell_size
        used = self.ids != BLANK
        shown = np.flatnonzero(used.any(axis=1))
        first, last = used[shown].argmax(axis=1), self.form.grid[1] - used[shown, ::-1].argmax(axis=1)
        boxes = np.stack([first * width, shown * height, last * width, (shown + 1) * height], axis=1).astype(np.float64)
        moved = np.clip(move_boxes(boxes, self.affine), 0, self.form.side)
        whole = np.concatenate([np.floor(moved[:, :2]), np.ceil(moved[:, 2:])], axis=1).astype(int).tolist()
        return [(spell(self.ids[row]), Box(*box)) for row, box in zip(shown.tolist(), whole, strict=True)]


@dataclass(frozen=True)
class Batch:
    """Pages of one form."""

    number: int
    form: Form
    images: Pixels  # [pages, side, side]
    ids: Ids  # [pages, rows, columns]
    affines: Affine  # [pages, 2, 3]
    kinds: tuple[PageKind, ...]

    def pages(self) -> Iterator[LabelledPage]:
        """One after the other."""
        for image, ids, affine, kind in zip(self.images, self.ids, self.affines, self.kinds, strict=True):
            yield LabelledPage(image, ids, affine, kind, self.form)


# --- one page -------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Cells:
    """What stands on a page."""

    glyphs: NDArray[np.int32]
    rows: NDArray[np.int32]
    columns: NDArray[np.int32]


def _end(chance: Random, length: int) -> int | None:
    """Which of a page's cells the end mark takes, or None where the text runs on behind the page."""
    draw = chance.random()
    if draw < RUNS_ON:
        return None
    if draw < RUNS_ON + FULL:
        return length - 1
    if draw < RUNS_ON + FULL + NEARLY_EMPTY:
        return chance.randrange(min(length, 40))
    if draw < RUNS_ON + FULL + NEARLY_EMPTY + NEARLY_FULL:
        return chance.randrange(max(length - 96, 0), length)
    return chance.randrange(length)


def set_page(keys: Keys, chance: Random, form: Form, atlas: Atlas) -> _Cells:
    """Lays a text out on one page: to its last cell, or to an end that chance chooses."""
    cells = flow(keys, form.grid[1], atlas, break_rows=True)
    shown = int(np.searchsorted(cells.rows, form.grid[0]))
    glyphs, rows, columns = cells.glyphs[:shown], cells.rows[:shown], cells.columns[:shown]
    end = _end(chance, shown)
    if end is None:
        return _Cells(glyphs, rows, columns)
    end = int(np.searchsorted(cells.sources, cells.sources[end]))  # where its character begins
    ended = np.append(glyphs[:end], np.int32(atlas.mark(symbols.TEXT_END)))  # layout does not look ahead: the mark stands where
    return _Cells(ended, rows[: end + 1], columns[: end + 1])  # the character would


def _begin(keys: Keys, chance: Random, columns: int) -> Keys:
    """A page may begin inside a line, as the second page of a document does."""
    return keys[chance.randrange(columns) :] if chance.random() < 0.4 else keys


def _page(config: SynthConfig, corpus: Corpus, form: Form, chance: Random, atlas: Atlas) -> tuple[PageKind, _Cells]:
    kind, (rows, columns) = config.mix.draw(chance), form.grid
    said = write(kind, chance, corpus, (rows + 1) * columns, seasoned=config.seasoned)
    keys = _begin(said, chance, columns)
    return kind, set_page(keys, chance, form, atlas)


# --- a batch --------------------------------------------------------------------------------------------------------------------


def draw_batch(config: SynthConfig, corpus: Corpus, seed: int, number: int) -> Batch:
    """Batch `number` of a seed's stream."""
    chance = Random(f"{seed}/{number}")  # noqa: S311
    form = chance.choices(config.forms, [form.share for form in config.forms])[0]
    atlas = alphabet_atlas(form.cell)
    kinds, cells = zip(*(_page(config, corpus, form, chance, atlas) for _ in range(config.batch)), strict=True)
    images, affines = _pictures(cells, form, atlas), np.repeat(scaling(form.side / form.size)[None], len(cells), axis=0)
    if config.harms:
        random = np.random.default_rng([seed % 2**64, number])
        for k, image in enumerate(images):
            images[k], moved = degrade(image, config.harms, random)
            affines[k] = then(affines[k], moved)
    return Batch(number, form, images, _label(cells, form, atlas), affines, kinds)


def _pictures(pages: tuple[_Cells, ...], form: Form, atlas: Atlas) -> Pixels:
    """The pages drawn in one call and brought to their tier: uint8 [pages, side, side]."""
    height, width = form.cell_size
    places = [np.stack([page.glyphs, page.rows * height, page.columns * width], axis=1, dtype=np.int32) for page in pages]
    starts = np.cumsum([0, *map(len, places)], dtype=np.int64)
    table = atlas.store.table()
    ink, glyphs, placements, cuts = map(torch.from_numpy, (table.ink, table.stamps, np.concatenate(places), starts))
    images = ops.draw_text(ink, glyphs, placements, cuts, form.size, form.size)
    if form.side != form.size:
        images = ops.resample(images[..., None], form.side, form.side)[..., 0]
    pixels: Pixels = images.numpy()
    return pixels


def _label(pages: tuple[_Cells, ...], form: Form, atlas: Atlas) -> Ids:
    ids = np.full((len(pages), *form.grid), BLANK, dtype=np.uint16)
    for grid, page in zip(ids, pages, strict=True):
        grid[page.rows, page.columns] = atlas.ids[page.glyphs]
    return ids


# --- streams --------------------------------------------------------------------------------------------------------------------


def synth_batches(
    config: SynthConfig, corpus: Corpus, seed: int, *, start: int = 0, worker: int = 0, workers: int = 1
) -> Iterator[Batch]:
    """Batches start + worker, start + worker + workers, ... of a seed, without end."""
    return (draw_batch(config, corpus, seed, number) for number in count(start + worker, workers))


def synth(config: SynthConfig, corpus: Corpus, seed: int) -> Iterator[LabelledPage]:
    """Labelled pages without end; the same arguments give the same bytes."""
    return (page for batch in synth_batches(config, corpus, seed) for page in batch.pages())


_load = cache(load)  # a worker reads its corpus once


def _prepare() -> None:
    torch.set_num_threads(1)


def _draw(config: SynthConfig, folder: Path, split: Split, seed: int, number: int) -> Batch:
    return draw_batch(config, _load(folder, split), seed, number)


def synth_in_parallel(
    config: SynthConfig, folder: Path, seed: int, *, workers: int, split: Split = "train", start: int = 0, ahead: int = 4
) -> Iterator[Batch]:
    """The same batches in the same order, drawn by processes of their own from the corpus in a folder, `ahead` for each in waiting.

    Processes are spawned, never forked: a fork copies locks that threads of torch hold.  Closing the iterator ends them.
    """
    pool = ProcessPoolExecutor(workers, multiprocessing.get_context("spawn"), _prepare)
    try:
        waiting = deque[Future[Batch]]()
        numbers = count(start)
        while True:
            for number in islice(numbers, workers * ahead - len(waiting)):
                waiting.append(pool.submit(_draw, config, folder, split, seed, number))
            yield waiting.popleft().result()
    finally:
        pool.shutdown(cancel_futures=True)
