"""assembly: order, newlines and counts, on features that say where they come from."""

import pytest
import torch

from optmem.errors import InputError
from optmem.model.assembly import assemble, encode_views, insert
from optmem.pixels import MODES, NO_TILES, Mode, Views
from optmem.testing import assert_equal

NEWLINE, SEPARATOR = torch.tensor([-1.0]), torch.tensor([-2.0])


def numbered(mode, grid):
    """Every feature is its own place: [n, 1]."""
    return torch.arange(mode.paper_tokens(grid), dtype=torch.float32)[:, None]


def assembled(mode, grid):
    newline = NEWLINE if mode.has_newlines else None
    return assemble(numbered(mode, grid), mode, grid, newline, SEPARATOR)[:, 0].int().tolist()


def test_one_view():
    assert assembled(Mode("two", 128), NO_TILES) == [0, 1, -1, 2, 3, -1, -2]


def test_tiles_are_stitched_before_the_global_view():
    """Two columns and one row of tiles of 2 x 2, then a view of 1 x 1."""
    mode = Mode("tiled", 64, tile_size=128, max_tiles=9)
    assert assembled(mode, (2, 1)) == [0, 1, 4, 5, -1, 2, 3, 6, 7, -1, 8, -1, -2]
    assert assembled(mode, (1, 2)) == [0, 1, -1, 2, 3, -1, 4, 5, -1, 6, 7, -1, 8, -1, -2]
    assert assembled(mode, NO_TILES) == [0, -1, -2]


def test_the_second_generation_keeps_tiles_apart_and_has_no_newlines():
    mode = Mode("queries", 64, tile_size=128, max_tiles=6, has_newlines=False)
    assert assembled(mode, (2, 1)) == [*range(9), -2]


@pytest.mark.parametrize(("mode", "count"), [("tiny", 73), ("small", 111), ("base", 273), ("large", 421), ("ocr2", 257)])
def test_counts_of_one_view(mode, count):
    assert len(assembled(MODES[mode], NO_TILES)) == MODES[mode].fed_tokens() == count


GUNDAM = {
    (1, 2): 493, (2, 1): 483, (2, 2): 693, (2, 3): 903, (3, 2): 893, (1, 6): 933, (6, 1): 883,
    (3, 3): 1203, (1, 9): 1263, (2, 4): 1113, (4, 2): 1093, (4, 8): 3553, (1, 32): 3793,
}  # fmt: skip


@pytest.mark.parametrize(("grid", "count"), GUNDAM.items(), ids=str)
def test_counts_of_tiles(grid, count):
    mode = Mode("gundam", 1024, tile_size=640, max_tiles=32)
    assert len(assembled(mode, grid)) == mode.fed_tokens(grid) == count


@pytest.mark.parametrize("grid", [(1, 1), (1, 2), (3, 2)], ids=str)
def test_counts_of_the_second_generation(grid):
    tiles = grid[0] * grid[1] if grid != NO_TILES else 0
    assert len(assembled(MODES["ocr2"], grid)) == MODES["ocr2"].fed_tokens(grid) == 144 * tiles + 257


@pytest.mark.parametrize("shape", [(272, 8), (257, 8), (1, 256, 8), (0, 8)], ids=str)
def test_refuses_features_of_another_mode(shape):
    with pytest.raises(InputError, match="mode base with 1x1 tiles has 256 features"):
        assemble(torch.zeros(shape), MODES["base"], NO_TILES, torch.zeros(8), torch.zeros(8))


def test_refuses_a_grid_that_the_mode_does_not_have():
    with pytest.raises(InputError, match="2 to 9 tiles or none, got 5x2"):
        assemble(torch.zeros(1256, 8), MODES["gundam"], (5, 2), torch.zeros(8), torch.zeros(8))


def test_stored_features_are_not_changed_nor_shared():
    features = numbered(MODES["tiny"], NO_TILES)
    sequence = assemble(features, MODES["tiny"], NO_TILES, NEWLINE, SEPARATOR)
    sequence.zero_()
    assert_equal(features, numbered(MODES["tiny"], NO_TILES))
    assert NEWLINE.item() == -1
    assert SEPARATOR.item() == -2


def first_pixels(calls):
    """An encoder of one token a view, which is its first pixel, and a list of the batches that it saw."""

    def encode(pixels):
        calls.append(tuple(pixels.shape))
        return pixels[:, 0, 0, :1].float()[:, None]

    return encode


def picture(tiles, view, *, tile_side=2, channels=1):
    """Views whose pixels are these numbers."""
    as_view = [torch.full((tile_side, tile_side, channels), value, dtype=torch.uint8) for value in tiles]
    none = torch.empty(0, tile_side, tile_side, channels, dtype=torch.uint8)
    return Views(
        torch.full((3, 3, channels), view, dtype=torch.uint8), torch.stack(as_view) if tiles else none, (len(tiles) or 1, 1)
    )


def test_views_of_one_size_are_encoded_together_and_come_back_in_order():
    calls = []
    pictures = [picture([1, 2], 3), picture([], 4), picture([5, 6, 7], 8), picture([], 9, channels=3)]
    encoded = encode_views(first_pixels(calls), pictures)
    assert [features[:, 0].int().tolist() for features in encoded] == [[1, 2, 3], [4], [5, 6, 7, 8], [9]]
    assert sorted(calls) == [(1, 3, 3, 3), (3, 3, 3, 1), (5, 2, 2, 1)]


def test_no_pictures():
    assert encode_views(first_pixels([]), []) == []
    embeddings = torch.ones(3, 2)
    assert_equal(insert(embeddings, torch.zeros(3, dtype=torch.bool), []), embeddings)


def test_pictures_take_the_marked_places_in_order():
    embeddings = torch.zeros(6, 2, dtype=torch.bfloat16)
    is_image = torch.tensor([False, True, True, False, True, False])
    merged = insert(embeddings, is_image, [torch.tensor([[1.0, 2], [3, 4]]), torch.tensor([[5.0, 6]])])
    assert merged.tolist() == [[0, 0], [1, 2], [3, 4], [0, 0], [5, 6], [0, 0]]
    assert not embeddings.any()


def test_refuses_more_or_fewer_pictures_than_places():
    is_image = torch.tensor([False, True, True])
    with pytest.raises(InputError, match="2 places for vision tokens, but its pictures have 3"):
        insert(torch.zeros(3, 2), is_image, [torch.zeros(3, 2)])
    with pytest.raises(InputError, match="2 places for vision tokens, but its pictures have 0"):
        insert(torch.zeros(3, 2), is_image, [])
