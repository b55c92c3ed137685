"""Labelled pages to tensors: which symbol stands at which pixel, and rows as the decoder is to say them.

Cells right of a line's end are labelled `<eol>`, and those below the text `<end>`: where nothing is drawn is to be read too.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from optmem.pages.alphabet import BLANK
from optmem.text.characters import END, EOL, MAX_ROWS, PAD, CharacterTokenizer
from optmem.train.synth import Batch, Form

Ints = NDArray[np.int64]
NOTHING = -100  # a target that no loss counts; torch's own number
NOWHERE = -1  # the pixel of what stands nowhere


class Sheet(NamedTuple):
    """A page's labels as a grid of cells."""

    ids: Ints  # [R, C]
    lengths: Ints  # [R]  drawn cells of every row; rows below the text have none
    used: int  # rows that the text reaches
    cell: tuple[int, int]  # height and width, in pixels of the page
    affine: NDArray[np.float64]  # [2, 3]  from the page's pixels to the picture's
    side: int  # of the picture

    def pixels(self, rows: Ints, columns: Ints) -> Ints:
        """The middle of cells in the picture: [..., 2], y and x."""
        height, width = self.cell
        x, y = columns * width + width // 2, rows * height + height // 2
        moved = self.affine @ np.stack([x, y, np.ones_like(x)]).reshape(3, -1)
        places: Ints = np.floor(moved[::-1].T + 1e-6).astype(np.int64).clip(0, self.side - 1)
        return places.reshape(*x.shape, 2)


@dataclass(frozen=True, slots=True)
class Labels:
    """A batch: B pages, N cells of each for the read-outs, K stretches of T tokens of each for the decoder."""

    pixels: Tensor  # uint8 [B, S, S, 1]
    cells: Tensor  # int64 [B]  index of the cell size among those the glance knows; NOTHING for others
    spots: Tensor  # int64 [B, N, 2]  y and x
    symbols: Tensor  # int64 [B, N]
    ids: Tensor  # int64 [B, K, T]  what the decoder is given
    targets: Tensor  # int64 [B, K, T]  what it is to say
    positions: Tensor  # int64 [B, K, T]
    places: Tensor  # int64 [B, K, T, 2]  the pixel of what it is to say; NOWHERE where that stands nowhere

    def to(self, device: torch.device | str) -> Labels:
        """The same on another device."""
        return Labels(*(getattr(self, field.name).to(device, non_blocking=True) for field in fields(self)))


def sheets(batch: Batch, tokenizer: CharacterTokenizer) -> Iterator[Sheet]:
    """The grids of a batch, in the vocabulary of the decoder."""
    for drawn, affine in zip(batch.ids.astype(np.int64), batch.affines, strict=True):
        is_drawn = drawn != BLANK
        lengths = np.where(is_drawn, np.arange(1, drawn.shape[1] + 1), 0).max(1)
        used = int(np.flatnonzero(lengths)[-1]) + 1
        ids = np.full_like(drawn, tokenizer.special(END))
        ids[:used] = tokenizer.special(EOL)
        ids[is_drawn] = drawn[is_drawn] + (tokenizer.first_symbol - 1)
        yield Sheet(ids, lengths, used, batch.form.cell_size, affine, batch.form.side)


def label(
    batch: Batch,
    tokenizer: CharacterTokenizer,
    known: Sequence[tuple[int, int]],
    rng: np.random.Generator,
    *,
    num_spots: int,
    num_stretches: int = 0,
    rows_each: int = 1,
) -> Labels:
    """Tensors of a batch.

    num_stretches   for the decoder, of every page
    rows_each       1: a row by itself, right behind the prefix.  More: that many consecutive rows where they stand in the document
    """
    pages, side = list(sheets(batch, tokenizer)), batch.form.side
    spots = [_spots(page, num_spots, rng) for page in pages]
    first = 2 + side // 64 * (side // 64 + 1)  # tokens of the prefix
    said = [_stretch(page, tokenizer, rng, rows_each, first) for page in pages for _ in range(num_stretches)]
    return Labels(
        torch.from_numpy(batch.images[..., None]),
        torch.full((len(pages),), _shown_cell(batch.form, known)),
        torch.from_numpy(np.stack([pixels for pixels, _ in spots])),
        torch.from_numpy(np.stack([ids for _, ids in spots])),
        *_stack(said, len(pages), num_stretches, tokenizer.special(PAD)),
    )


def _shown_cell(form: Form, known: Sequence[tuple[int, int]]) -> int:
    """Which of the known cells a form shows, or NOTHING where it is none."""
    sides = [side * form.side / form.size for side in form.cell_size]
    return next((number for number, cell in enumerate(known) if list(cell) == sides), NOTHING)


def _spots(page: Sheet, count: int, rng: np.random.Generator) -> tuple[Ints, Ints]:
    """Cells of a page: a quarter where nothing is drawn, of these half right behind a line's end."""
    _, columns = page.ids.shape
    row_of = np.repeat(np.arange(len(page.lengths)), page.lengths)
    column_of = np.arange(len(row_of)) - np.repeat(np.cumsum(page.lengths) - page.lengths, page.lengths)
    drawn = rng.integers(len(row_of), size=count)
    rows, at = row_of[drawn], column_of[drawn]
    blank, behind = count // 8, count // 4
    rows[:behind] = rng.integers(len(page.ids), size=behind)
    at[:blank] = rng.integers(columns, size=blank)
    at[blank:behind] = np.minimum(page.lengths[rows[blank:behind]], columns - 1)
    return page.pixels(rows, at), page.ids[rows, at]


class _Stretch(NamedTuple):
    """Consecutive rows: inputs, targets, positions and places."""

    ids: list[int]
    targets: list[int]
    first: int
    places: Ints  # [T, 2]


def _stretch(page: Sheet, tokenizer: CharacterTokenizer, rng: np.random.Generator, rows_each: int, first: int) -> _Stretch:
    """Some rows of a page, or one below its text."""
    end = tokenizer.special(END)
    if rows_each == 1 and rng.random() < _BELOW:
        row = page.used + min(int(rng.exponential(8)), MAX_ROWS - 1 - page.used) if page.used < MAX_ROWS else MAX_ROWS - 1
        if row >= page.used:
            return _Stretch([tokenizer.rows[row]], [end], first, np.full((1, 2), NOWHERE))
    begin = int(rng.integers(max(1, page.used - rows_each + 1)))
    if rng.random() < _INDENTED:
        (blank,) = tokenizer.encode(" ")
        far = np.flatnonzero((page.ids[: page.used, :_FAR] == blank).all(1))
        begin = int(rng.choice(far)) if len(far) else begin
    ids: list[int] = []
    places: list[Ints] = []
    for row in range(begin, min(begin + rows_each, page.used)):
        ids += [tokenizer.rows[row], *_said(page, row, tokenizer)]
        places += [_row_places(page, row), np.full((1, 2), NOWHERE)]
    after = begin + rows_each
    last = tokenizer.rows[after] if after < min(page.used, MAX_ROWS) else end
    if rows_each > 1:
        first += int(page.lengths[:begin].sum()) + 2 * begin
    return _Stretch(ids, [*ids[1:], last], first, np.concatenate(places))


_BELOW = 0.1  # share of rows asked below the text
_INDENTED = 0.1  # and of those that begin with blanks, which look like rows below the text,
_FAR = 10  # so many at least


def _said(page: Sheet, row: int, tokenizer: CharacterTokenizer) -> list[int]:
    ids: list[int] = page.ids[row, : page.lengths[row]].tolist()
    return [*ids, tokenizer.special(EOL)]


def _row_places(page: Sheet, row: int) -> Ints:
    """The pixels of a row's cells and of the one behind them, which is where `<eol>` can be seen."""
    columns = np.arange(page.lengths[row] + 1)
    pixels = page.pixels(np.full_like(columns, row), columns)
    if columns[-1] >= page.ids.shape[1]:
        pixels[-1] = NOWHERE
    return pixels


def _stack(said: Sequence[_Stretch], pages: int, each: int, pad: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    length = max((len(stretch.ids) for stretch in said), default=0)
    ids, targets = np.full((len(said), length), pad), np.full((len(said), length), NOTHING)
    places = np.full((len(said), length, 2), NOWHERE)
    positions = np.arange(length) + np.array([stretch.first for stretch in said], dtype=np.int64)[:, None]
    for i, stretch in enumerate(said):
        taken = len(stretch.ids)
        ids[i, :taken], targets[i, :taken], places[i, :taken] = stretch.ids, stretch.targets, stretch.places
    shape = (pages, each, length)
    flat = (torch.from_numpy(array) for array in (ids, targets, positions))
    ids_, targets_, positions_ = (tensor.view(shape) for tensor in flat)
    return ids_, targets_, positions_, torch.from_numpy(places).view(*shape, 2)
