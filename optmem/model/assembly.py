"""Vision tokens of a picture's views to what the decoder is given.

What is stored of a picture is its features alone, [n, hidden]: every tile's, row by row of tiles, then the global view's.

    V1, UL:  tiles stitched into one grid, a newline after each of its rows | global view, a newline after each row | separator
    V2:      tiles one after the other                                      | global view                           | separator
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from optmem.errors import InputError
from optmem.pixels import NO_TILES, PIXELS_PER_TOKEN, Grid, Mode, Views

PIXELS_AT_ONCE = 16 * 1024 * 1024  # of one pass: what the widest layer holds for them stays below a gigabyte


def encode_views(encoder: Callable[[Tensor], Tensor], pictures: Sequence[Views]) -> list[Tensor]:
    """Features of every picture, [n, hidden] each.  Views of one size go through the encoder together, as many as fit a pass."""
    views = [view for picture in pictures for view in (*picture.tiles, picture.global_view)]
    batches: dict[torch.Size, list[int]] = {}
    for place, view in enumerate(views):
        batches.setdefault(view.shape, []).append(place)
    features: dict[int, Tensor] = {}
    for shape, places in batches.items():
        at_once = max(PIXELS_AT_ONCE // (shape[0] * shape[1]), 1)
        for first in range(0, len(places), at_once):
            some = places[first : first + at_once]
            features |= zip(some, encoder(torch.stack([views[place] for place in some])), strict=True)
    encoded, end = [], 0
    for picture in pictures:
        start, end = end, end + picture.tiles.shape[0] + 1
        encoded.append(torch.cat([features[place] for place in range(start, end)]))
    return encoded


def assemble(features: Tensor, mode: Mode, grid: Grid, newline: Tensor | None, separator: Tensor) -> Tensor:
    """Stored features of one picture -> [mode.fed_tokens(grid), hidden].

    features   [mode.paper_tokens(grid), hidden]
    newline    [hidden]; None for a family without
    separator  [hidden]

    Raises InputError where the features are not as many as the mode and grid say.
    """
    if mode.has_newlines != (newline is not None):
        counts = "newlines" if mode.has_newlines else "no newlines"
        raise InputError(f"mode {mode.name} is of another family: it counts {counts}, and this model's rows are otherwise")
    tokens = mode.paper_tokens(grid)
    if features.dim() != 2 or features.shape[0] != tokens:
        raise InputError(f"mode {mode.name} with {grid[0]}x{grid[1]} tiles has {tokens} features, got {list(features.shape)}")
    if newline is None:
        return torch.cat([features, separator[None]])
    side, tile_side = mode.size // PIXELS_PER_TOKEN, mode.tile_size // PIXELS_PER_TOKEN
    tiles, view = features[: -side * side], features[-side * side :]
    parts = [_end_rows(view.reshape(side, side, -1), newline), separator[None]]
    if grid != NO_TILES:
        parts.insert(0, _end_rows(_stitch(tiles, grid, tile_side), newline))
    return torch.cat(parts)


def _stitch(tiles: Tensor, grid: Grid, side: int) -> Tensor:
    """Tiles row by row, [columns * rows * side * side, hidden] -> [rows * side, columns * side, hidden]."""
    columns, rows = grid
    apart = tiles.reshape(rows, columns, side, side, -1)
    return apart.transpose(1, 2).reshape(rows * side, columns * side, -1)


def _end_rows(cells: Tensor, newline: Tensor) -> Tensor:
    """[h, w, hidden] -> [h * (w + 1), hidden]."""
    ends = newline.expand(cells.shape[0], 1, -1)
    return torch.cat([cells, ends], dim=1).flatten(0, 1)


def insert(embeddings: Tensor, is_image: Tensor, sequences: Sequence[Tensor]) -> Tensor:
    """A prompt's embeddings [T, hidden] with assembled pictures in the places that is_image, bool [T], marks, in order.

    Raises InputError where the places are not as many as the vectors.
    """
    places, vectors = int(is_image.sum()), sum(len(sequence) for sequence in sequences)
    if places != vectors:
        raise InputError(f"the prompt has {places} places for vision tokens, but its pictures have {vectors} of them")
    if not sequences:
        return embeddings
    return embeddings.masked_scatter(is_image[:, None], torch.cat(list(sequences)).to(embeddings.dtype))
