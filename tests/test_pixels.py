"""pixels: modes and their counts, fit and tiles as Pillow makes them, the ladder."""

import numpy as np
import PIL
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageOps

from optmem import reference
from optmem.errors import InputError
from optmem.pixels import MODES, Box, Mode, choose_grid, contact_sheet, find_mode, image_id, make_views, to_mode
from optmem.testing import assert_equal, generator


def make_image(seed: str, height: int, width: int, channels: int = 3) -> np.ndarray:
    pixels = torch.randint(0, 256, (height, width, channels), generator=generator(seed), dtype=torch.uint8).numpy()
    return pixels[..., 0].copy() if channels == 1 else pixels


# --- counts -------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "paper", "fed"), [("tiny", 64, 73), ("small", 100, 111), ("base", 256, 273), ("large", 400, 421)])
def test_counts_of_a_single_view(name, paper, fed):
    assert (MODES[name].paper_tokens(), MODES[name].fed_tokens()) == (paper, fed)


@pytest.mark.parametrize(
    ("grid", "paper", "fed"),
    [
        ((1, 1), 256, 273),
        ((1, 2), 456, 493),
        ((2, 1), 456, 483),
        ((2, 2), 656, 693),
        ((2, 3), 856, 903),
        ((3, 2), 856, 893),
        ((1, 6), 856, 933),
        ((6, 1), 856, 883),
        ((3, 3), 1156, 1203),
        ((1, 9), 1156, 1263),
        ((2, 4), 1056, 1113),
        ((4, 2), 1056, 1093),
        ((4, 8), 3456, 3553),
        ((1, 32), 3456, 3793),
    ],
)
def test_counts_of_gundam(grid, paper, fed):
    mode = Mode("gundam of 32", 1024, tile_size=640, max_tiles=32, tile_above=640)
    assert (mode.paper_tokens(grid), mode.fed_tokens(grid)) == (paper, fed)
    columns, rows = grid
    if columns * rows > 1:
        assert fed == 273 + 10 * rows * (10 * columns + 1)


@pytest.mark.parametrize("grid", [(1, 2), (2, 3), (3, 3)])
def test_counts_of_gundam_m(grid):
    columns, rows = grid
    assert MODES["gundam-m"].paper_tokens(grid) == 256 * columns * rows + 400
    assert MODES["gundam-m"].fed_tokens(grid) == 421 + 16 * rows * (16 * columns + 1)


@pytest.mark.parametrize(("grid", "paper", "fed"), [((1, 1), 256, 257), ((1, 2), 544, 545), ((2, 3), 1120, 1121)])
def test_counts_without_newlines(grid, paper, fed):
    assert (MODES["ocr2"].paper_tokens(grid), MODES["ocr2"].fed_tokens(grid)) == (paper, fed)


@pytest.mark.parametrize(
    ("name", "height", "width", "valid"),
    [
        ("tiny", 100, 400, 64),  # stretched: every token counts
        ("small", 1, 9999, 100),
        ("base", 1000, 1000, 256),
        ("base", 1000, 500, 128),
        ("base", 500, 1000, 128),
        ("base", 1000, 333, 86),  # 85.248, up
        ("large", 3508, 2480, 283),
        ("gundam", 2339, 1654, 600 + 182),  # 2x3 tiles of 100 count whole
    ],
)
def test_valid_tokens(name, height, width, valid):
    assert MODES[name].valid_tokens(height, width) == valid


@pytest.mark.parametrize("grid", [(0, 2), (2, 0), (-1, -2), (2, 5), (1, 10)])
def test_refuses_grids_that_a_mode_has_not(grid):
    with pytest.raises(InputError, match="has 2 to 9 tiles"):
        MODES["gundam"].fed_tokens(grid)
    with pytest.raises(InputError):
        MODES["base"].fed_tokens(grid)


def test_modes_by_name():
    assert find_mode("base") is MODES["base"]
    assert find_mode(MODES["tiny"]) is MODES["tiny"]
    assert (find_mode("square 256").paper_tokens(), find_mode("square 384").fed_tokens()) == (16, 43)
    for wrong in ("huge", "square 100", "square 0", "square 064", "square 9024", "square 64 ", "", None, 512):
        with pytest.raises(InputError):
            find_mode(wrong)
    for wrong in ({"size": 0}, {"size": -64}, {"size": 1000}, {"size": 512, "tile_size": 100}, {"size": 512, "tile_size": 640}):
        with pytest.raises(InputError):
            Mode("wrong", **wrong)


# --- views --------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("width", "height", "by_max_tiles"),
    [
        (1240, 1754, {6: (2, 3), 9: (2, 3), 32: (2, 3)}),
        (1654, 2339, {6: (2, 3), 9: (2, 3), 32: (2, 3)}),
        (2480, 3508, {6: (2, 3), 9: (2, 3), 32: (4, 6)}),
        (1700, 2200, {6: (2, 3), 9: (2, 3), 32: (3, 4)}),
        (1024, 1024, {6: (2, 2), 9: (2, 2), 32: (2, 2)}),
        (1920, 1080, {6: (2, 1), 9: (4, 2), 32: (7, 4)}),
        (2000, 400, {6: (5, 1), 9: (5, 1), 32: (5, 1)}),
    ],
)
def test_grids(width, height, by_max_tiles):
    assert {count: choose_grid(height, width, 640, count) for count in by_max_tiles} == by_max_tiles


@pytest.mark.parametrize(("height", "width", "is_tiled"), [(640, 640, False), (1, 640, False), (641, 640, True), (10, 641, True)])
def test_small_pages_are_not_tiled(height, width, is_tiled):
    assert (MODES["gundam"].grid(height, width) != (1, 1)) is is_tiled
    assert MODES["base"].grid(height, width) == (1, 1)


def resized(picture: Image.Image, width: int, height: int) -> Image.Image:
    """Pillow 13's answer; an older Pillow, which always takes the width first, gives it in two calls."""
    if PIL.__version__ < "13" and reference.resample_order(picture.height, picture.width, height, width) == (1, 2):
        picture = picture.resize((picture.width, height), Image.Resampling.BICUBIC)
    return picture.resize((width, height), Image.Resampling.BICUBIC)


def by_pillow(image: np.ndarray, size: int, *, pad: bool) -> torch.Tensor:
    picture = Image.fromarray(image)
    if pad:
        picture = resized(picture, *ImageOps.contain(picture, (size, size)).size)
        picture = ImageOps.pad(picture, (size, size), color=(127, 127, 127) if image.ndim == 3 else 127)
    else:
        picture = resized(picture, size, size)
    return torch.from_numpy(np.array(picture).reshape(size, size, -1))


SIZES = [(1, 1), (1, 3), (200, 311), (311, 200), (512, 512), (640, 640), (700, 1000), (1131, 800), (1024, 1021), (97, 1500)]


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize(("height", "width"), SIZES)
@pytest.mark.parametrize("name", ["tiny", "small", "base", "large"])
def test_single_views_equal_pillow(name, height, width, channels):
    mode, image = MODES[name], make_image(f"{height} {width}", height, width, channels)
    views = make_views(image, name)
    assert_equal(views.global_view, by_pillow(image, mode.size, pad=name in ("base", "large")))
    assert views.tiles.shape == (0, 0, 0, channels)
    assert views.grid == (1, 1)


@settings(max_examples=40, deadline=None)
@given(height=st.integers(1, 300), width=st.integers(1, 300))
def test_padding_equals_pillow_for_any_proportions(height, width):
    if round(min(height, width) / max(height, width) * 704) == 0:
        return  # Pillow refuses what would be less than a pixel wide
    image = make_image("any", height, width, 1)
    assert_equal(make_views(image, "square 704").global_view, by_pillow(image, 704, pad=True))


def test_a_line_keeps_one_pixel():
    views = make_views(np.zeros((1, 65535), np.uint8), "base")
    assert (views.global_view[512] == 0).all()
    assert (views.global_view != 127).sum() == 1024


@pytest.mark.parametrize(
    ("name", "height", "width"), [("gundam", 1000, 700), ("gundam", 300, 1300), ("gundam-m", 1100, 1500), ("ocr2", 900, 800)]
)
def test_tiled_views_equal_pillow(name, height, width):
    mode, image = MODES[name], make_image(name, height, width)
    views = make_views(image, mode)
    side, (columns, rows) = mode.tile_size, views.grid
    assert_equal(views.global_view, by_pillow(image, mode.size, pad=True))
    canvas = resized(Image.fromarray(image), columns * side, rows * side)
    assert views.tiles.shape == (columns * rows, side, side, 3)
    for k, tile in enumerate(views.tiles):
        left, top = k % columns * side, k // columns * side
        assert_equal(tile, torch.from_numpy(np.array(canvas.crop((left, top, left + side, top + side)))))


def test_untiled_gundam_is_one_padded_view():
    image = make_image("untiled", 600, 400)
    views = make_views(image, "gundam")
    assert views.tiles.shape == (0, 640, 640, 3)
    assert_equal(views.global_view, by_pillow(image, 1024, pad=True))


def test_read_only_pixels_are_accepted():
    image = make_image("read-only", 20, 30)
    image.flags.writeable = False
    assert make_views(image, "tiny").global_view.shape == (512, 512, 3)


# --- the ladder ---------------------------------------------------------------------------------------------------------------


def test_a_page_goes_down_the_ladder():
    page = make_image("ladder", 1280, 1280, 1)
    for name in ("large", "base", "small", "tiny"):
        page = to_mode(page, name)
        assert page.shape == (MODES[name].size, MODES[name].size)
        assert_equal(make_views(page, name).global_view[..., 0], torch.from_numpy(page))  # the encoder sees just this
    assert to_mode(page, "square 256").shape == (256, 256)


def test_the_ladder_goes_one_way():
    page = make_image("up", 512, 512)
    with pytest.raises(InputError, match="smaller than mode base"):
        to_mode(page, "base")
    with pytest.raises(InputError, match="in tiles"):
        to_mode(make_image("tiled", 1300, 1300), "gundam")


def test_contact_sheet_says_where_every_page_lies():
    pages = [make_image(str(i), 512, 512, 1) for i in range(4)]
    sheet = contact_sheet(pages, 512)
    assert sheet.image.shape == (512, 512)
    assert sheet.boxes == (Box(0, 0, 256, 256), Box(256, 0, 512, 256), Box(0, 256, 256, 512), Box(256, 256, 512, 512))
    for page, box in zip(pages, sheet.boxes, strict=True):
        expected = np.array(resized(Image.fromarray(page), 256, 256))
        assert_equal(torch.from_numpy(sheet.image[box.top : box.bottom, box.left : box.right].copy()), torch.from_numpy(expected))


def test_contact_sheet_of_mixed_pages():
    pages = [make_image("grey", 30, 700, 1), make_image("colour", 600, 200), make_image("tiny", 5, 5, 1)]
    sheet = contact_sheet(pages, 640, columns=2)
    assert sheet.image.shape == (640, 640, 3)
    assert [(box.right - box.left, box.bottom - box.top) for box in sheet.boxes] == [(320, 14), (107, 320), (5, 5)]
    assert sheet.boxes[2][:2] == (0, 320)
    covered = np.zeros((640, 640), int)
    for box in sheet.boxes:
        covered[box.top : box.bottom, box.left : box.right] += 1
    assert covered.max() == 1
    assert (sheet.image[covered == 0] == 255).all()


def test_contact_sheet_of_tall_pages_takes_more_columns():
    pages = [np.zeros((1000, 250), np.uint8)] * 4
    assert [box.left for box in contact_sheet(pages, 400).boxes] == [0, 100, 200, 300]


@pytest.mark.parametrize(
    ("count", "size", "columns", "words"),
    [
        (0, 512, None, "at least one page"),
        (2, 0, None, "must be 16 to"),
        (2, 70_000, None, "must be 16 to"),
        (2, 512, 0, "columns must be 1 to 2"),
        (2, 512, 3, "columns must be 1 to 2"),
        (2, 512, -1, "columns must be 1 to 2"),
        (2, "512", None, "must be 16 to 65535 pixels, got '512'"),
        (2, 512.0, None, "must be 16 to"),
        (2, None, None, "must be 16 to"),
        (2, 512, "1", "columns must be 1 to 2, the number of pages, got '1'"),
        (2, 512, 1.0, "columns must be 1 to 2"),
        (2, 512, True, "columns must be 1 to 2"),
        (200, 64, None, "at least 16 are needed"),
    ],
)
def test_refuses_contact_sheets_without_sense(count, size, columns, words):
    with pytest.raises(InputError, match=words):
        contact_sheet([np.zeros((8, 8), np.uint8)] * count, size, columns)


def test_contact_sheet_of_sizes_of_numpy():
    sheet = contact_sheet([np.zeros((8, 8), np.uint8)] * 2, np.int64(64), np.int64(2))
    assert sheet.boxes == (Box(0, 0, 8, 8), Box(32, 0, 40, 8))
    assert {type(side) for box in sheet.boxes for side in box} == {int}


def test_identity_includes_the_shape():
    flat = np.zeros(3000, np.uint8)
    same = [flat.reshape(30, 100), flat.reshape(100, 30), flat.reshape(10, 100, 3), flat.reshape(100, 10, 3)]
    assert len({image_id(image) for image in same}) == 4
    assert image_id(same[0]) == image_id(np.zeros((60, 100), np.uint8)[::2])
    changed = same[0].copy()
    changed[29, 99] = 1
    assert image_id(changed) != image_id(same[0])
