"""Checked pixels to what the encoder sees: modes and their token counts, fit and tiles, and the ladder down which pages age."""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from optmem import ops
from optmem.errors import InputError
from optmem.images import Pixels, as_image, is_whole
from optmem.ops import MAX_SIDE
from optmem.pages.page import Box

PIXELS_PER_TOKEN = 64  # along a side: patches of 16 pixels, two convolutions of stride 2
PADDING = 127  # grey, as the family was trained: int(0.5 * 255)
MIN_TILES = 2
STRETCH_UP_TO = 640  # pixels; a larger view keeps the page's proportions and is padded
MIN_CELL = 16  # pixels; less of a page than one patch says nothing

Grid = tuple[int, int]  # columns, rows of tiles; (1, 1) is no tiles
NO_TILES: Grid = (1, 1)


@dataclass(frozen=True, slots=True)
class Mode:
    """How large a page is shown to the encoder.  Token counts follow from it alone, before anything is computed."""

    name: str
    size: int  # side of the global view in pixels
    tile_size: int = 0  # side of a tile in pixels; 0 is never tiled
    max_tiles: int = 0
    tile_above: int = 0  # a page that is no larger than this in both directions is not tiled
    has_newlines: bool = True  # one vector ends each row of tokens; the second generation has none

    def __post_init__(self) -> None:
        for field, side in (("size", self.size), ("tile_size", self.tile_size)):
            if side % PIXELS_PER_TOKEN or not 0 <= side <= 8192 or (field == "size" and side == 0):
                raise InputError(f"{field} of a mode must be a multiple of {PIXELS_PER_TOKEN} pixels up to 8192, got {side}")
        if self.tile_size and self.max_tiles < MIN_TILES:
            raise InputError(f"max_tiles must be at least {MIN_TILES}, got {self.max_tiles}")

    @property
    def is_tiled(self) -> bool:
        return self.tile_size > 0

    @property
    def keeps_proportions(self) -> bool:
        """Whether a page is fitted and padded; a small view is stretched to the square instead."""
        return self.is_tiled or self.size > STRETCH_UP_TO

    def grid(self, height: int, width: int) -> Grid:
        """The tiles that a picture of this size is cut into."""
        if not self.is_tiled or max(height, width) <= self.tile_above:
            return NO_TILES
        return choose_grid(height, width, self.tile_size, self.max_tiles)

    def paper_tokens(self, grid: Grid = NO_TILES) -> int:
        """Vision tokens as the papers count them: one for each 64 x 64 pixels."""
        return (self.size // PIXELS_PER_TOKEN) ** 2 + self._num_tiles(grid) * (self.tile_size // PIXELS_PER_TOKEN) ** 2

    def fed_tokens(self, grid: Grid = NO_TILES) -> int:
        """Vectors that the decoder is given: the vision tokens, a newline for each row of them, and one separator."""
        side, tile_side = self.size // PIXELS_PER_TOKEN, self.tile_size // PIXELS_PER_TOKEN
        newlines = side + (grid[1] * tile_side if self._num_tiles(grid) else 0)  # tiles are stitched before rows are ended
        return self.paper_tokens(grid) + (newlines if self.has_newlines else 0) + 1

    def valid_tokens(self, height: int, width: int) -> int:
        """The paper's count without padding, for a picture of this size; what compression ratios are reported with."""
        grid = self.grid(height, width)
        view = self.paper_tokens()
        tiles = self.paper_tokens(grid) - view
        short, long = sorted((height, width))
        return tiles + (-(-view * short // long) if self.keeps_proportions else view)

    def _num_tiles(self, grid: Grid) -> int:
        columns, rows = grid
        if grid == NO_TILES:
            return 0
        if not (columns >= 1 and rows >= 1 and MIN_TILES <= columns * rows <= self.max_tiles):
            raise InputError(f"mode {self.name} has {MIN_TILES} to {self.max_tiles} tiles or none, got {columns}x{rows}")
        return columns * rows


MODES = {
    mode.name: mode
    for mode in (
        Mode("tiny", 512),
        Mode("small", 640),
        Mode("base", 1024),
        Mode("large", 1280),
        Mode("gundam", 1024, tile_size=640, max_tiles=9, tile_above=640),
        Mode("gundam-m", 1280, tile_size=1024, max_tiles=9, tile_above=640),
        Mode("ocr2", 1024, tile_size=768, max_tiles=6, tile_above=768, has_newlines=False),
    )
}


def find_mode(mode: Mode | str) -> Mode:
    """A mode by its name: one of MODES, or "square 256" for a single view of any multiple of 64 pixels."""
    if isinstance(mode, Mode):
        return mode
    if isinstance(mode, str) and mode in MODES:
        return MODES[mode]
    square = re.fullmatch(r"square ([1-9][0-9]{1,3})", mode) if isinstance(mode, str) else None
    if square is None:
        raise InputError(f"mode must be one of {', '.join(MODES)} or 'square <pixels>', got {mode!r}")
    return Mode(mode, int(square[1]))


def choose_grid(height: int, width: int, tile_size: int, max_tiles: int) -> Grid:
    """The columns and rows nearest to the picture's proportions, as the reference chooses them.

    Among equally near grids the larger one is taken while the picture has over half of its pixels.
    """
    grids = [(c, r) for c in range(1, max_tiles + 1) for r in range(1, max_tiles + 1) if MIN_TILES <= c * r <= max_tiles]
    best, least = NO_TILES, math.inf
    for columns, rows in sorted(grids, key=lambda grid: (grid[0] * grid[1], grid)):
        distance = abs(width / height - columns / rows)
        is_worth_it = height * width > 0.5 * tile_size * tile_size * columns * rows
        if distance < least or (distance == least and is_worth_it):
            best, least = (columns, rows), distance
    return best


@dataclass(frozen=True, slots=True)
class Views:
    """What the encoder sees of one picture.  C is 1 for a grey picture and 3 for one in colour."""

    global_view: Tensor  # uint8 [S, S, C]
    tiles: Tensor  # uint8 [columns * rows, t, t, C], row by row; none where it is not tiled
    grid: Grid


def make_views(image: Pixels, mode: Mode | str) -> Views:
    """A checked picture as the views of a mode, pixel for pixel as the reference prepares them with Pillow."""
    mode = find_mode(mode)
    pixels = _to_tensor(image)
    height, width, channels = pixels.shape
    grid, side = mode.grid(height, width), mode.tile_size
    view = fit(pixels, mode.size) if mode.keeps_proportions else _resize(pixels, mode.size, mode.size)
    if grid == NO_TILES:
        return Views(view, pixels.new_empty((0, side, side, channels)), grid)
    columns, rows = grid
    canvas = _resize(pixels, rows * side, columns * side).view(rows, side, columns, side, channels)
    return Views(view, canvas.transpose(1, 2).reshape(rows * columns, side, side, channels), grid)


def fit(pixels: Tensor, size: int) -> Tensor:
    """A picture [H, W, C] in the middle of a square of padding, its proportions kept and every side rounded as Pillow does."""
    height, width, channels = pixels.shape
    if width > height:
        height, width = round(height / width * size), size
    elif height > width:
        height, width = size, round(width / height * size)
    else:
        height = width = size
    height, width = max(height, 1), max(width, 1)  # a line of 1 x 65535 keeps one pixel
    square = pixels.new_full((size, size, channels), PADDING)
    top, left = round((size - height) * 0.5), round((size - width) * 0.5)  # half to even
    square[top : top + height, left : left + width] = _resize(pixels, height, width)
    return square


# --- the ladder ---------------------------------------------------------------------------------------------------------------


def to_mode(image: object, mode: Mode | str) -> Pixels:
    """A page one or more tiers down: the picture that a mode of one view sees, uint8 [S, S] or [S, S, 3].

    Raises InputError for a tiled mode and where the page is already smaller: a page that was thrown away does not come back.
    """
    mode, page = find_mode(mode), as_image(image)
    if mode.is_tiled:
        raise InputError(f"mode {mode.name} shows a page in tiles; a tier is one of the modes of a single view")
    if max(page.shape[:2]) < mode.size:
        raise InputError(f"a page of {_shown(page)} pixels is smaller than mode {mode.name} ({mode.size}x{mode.size})")
    return _to_pixels(make_views(page, mode).global_view)


@dataclass(frozen=True, slots=True)
class ContactSheet:
    """Several pages on one picture."""

    image: Pixels  # [size, size] or, where any page is in colour, [size, size, 3]
    boxes: tuple[Box, ...]  # where each page lies, in the order given


def contact_sheet(images: Sequence[object], size: int, columns: int | None = None) -> ContactSheet:
    """Pages side by side and row by row on one white square, each as large as its cell allows and never enlarged.

    columns=None takes the number that shows the smallest page largest.  Raises InputError where no page is given, or a page would
    get less than 16 pixels.
    """
    pages = [as_image(image, name=f"page {number}") for number, image in enumerate(images, 1)]
    if not pages:
        raise InputError("a contact sheet needs at least one page")
    if not (is_whole(size) and MIN_CELL <= size <= MAX_SIDE):
        raise InputError(f"the size of a contact sheet must be {MIN_CELL} to {MAX_SIDE} pixels, got {size!r}")
    if columns is not None and not (is_whole(columns) and 1 <= columns <= len(pages)):
        raise InputError(f"columns must be 1 to {len(pages)}, the number of pages, got {columns!r}")
    size = int(size)  # a whole number of NumPy's would make boxes of its kind
    columns = int(columns or max(range(1, len(pages) + 1), key=lambda count: _smallest_scale(pages, size, count)))
    cell_height, cell_width = _cell(size, columns, len(pages))
    if min(cell_height, cell_width) < MIN_CELL:
        raise InputError(
            f"{len(pages)} pages in {columns} columns leave {cell_width}x{cell_height} pixels each on a sheet of {size}; "
            f"at least {MIN_CELL} are needed: take fewer pages or a larger sheet"
        )
    boxes = []
    for number, page in enumerate(pages):
        row, column = divmod(number, columns)
        height, width = _scaled(page, cell_height, cell_width)
        boxes.append(ops.SheetBox(row * cell_height, column * cell_width, height, width))
    sheet = ops.contact_sheet([_to_tensor(page) for page in pages], boxes, size)
    return ContactSheet(_to_pixels(sheet), tuple(Box(left, top, left + w, top + h) for top, left, h, w in boxes))


def _cell(size: int, columns: int, num_pages: int) -> tuple[int, int]:
    return size // -(-num_pages // columns), size // columns


def _scale(page: Pixels, height: int, width: int) -> float:
    scale: float = min(height / page.shape[0], width / page.shape[1], 1.0)
    return scale


def _smallest_scale(pages: Sequence[Pixels], size: int, columns: int) -> float:
    return min(_scale(page, *_cell(size, columns, len(pages))) for page in pages)


def _scaled(page: Pixels, height: int, width: int) -> tuple[int, int]:
    scale = _scale(page, height, width)
    return min(max(round(page.shape[0] * scale), 1), height), min(max(round(page.shape[1] * scale), 1), width)


# --- pixels -------------------------------------------------------------------------------------------------------------------


def resized(image: object, height: int, width: int) -> Pixels:
    """A picture at another size, as `resample` makes it: [height, width] or [height, width, 3]."""
    return _to_pixels(_resize(_to_tensor(as_image(image)), height, width))


def image_id(image: object) -> str:
    """The identity of a picture: a SHA-256 over its shape and its pixels, in hexadecimal."""
    pixels = as_image(image)
    digest = hashlib.sha256(f"uint8 {list(pixels.shape)}\n".encode())
    digest.update(pixels.reshape(-1).data)
    return digest.hexdigest()


def _shown(image: Pixels) -> str:
    return f"{image.shape[1]}x{image.shape[0]}"


def _to_tensor(image: Pixels) -> Tensor:
    """[H, W] or [H, W, 3] -> [H, W, C], without a copy where the array may be written to."""
    writable = image if image.flags.writeable else image.copy()  # torch warns of arrays that it may not write to
    return torch.from_numpy(writable if image.ndim == 3 else writable[..., None])


def _to_pixels(tensor: Tensor) -> Pixels:
    pixels: Pixels = tensor.numpy()
    return np.ascontiguousarray(pixels[..., 0] if pixels.shape[2] == 1 else pixels)


def _resize(pixels: Tensor, height: int, width: int) -> Tensor:
    return ops.resample(pixels[None], height, width)[0]
