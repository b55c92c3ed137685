"""The sizes of recorded passes: over all that can come, enough, few, and little of them wasted."""

import pytest

from optmem.engine.buckets import table_bucket, text_bucket, view_buckets
from optmem.model.assembly import PIXELS_AT_ONCE


@pytest.mark.parametrize("most", [1, 2, 3, 5, 8, 13, 128, 1000, 1024, 2048])
def test_texts_go_in_few_sizes_that_waste_little(most):
    sizes = [text_bucket(count, most) for count in range(1, most + 1)]
    assert all(count <= size <= most for count, size in enumerate(sizes, 1))
    assert sizes == sorted(sizes)
    assert sizes[-1] == most
    assert all(text_bucket(size, most) == size for size in sizes)
    assert all(size - count <= max(7, count / 16) for count, size in enumerate(sizes, 1))
    assert len(set(sizes)) <= 4 + 31 + 16 * max((most - 1).bit_length() - 8, 0)


def test_the_first_sizes_of_texts():
    assert sorted({text_bucket(count, 1024) for count in range(1, 60)}) == [1, 2, 4, 8, 16, 24, 32, 40, 48, 56, 64]
    assert [text_bucket(count, 1024) for count in (256, 257, 272, 273, 512, 513)] == [256, 272, 272, 288, 512, 544]
    assert [text_bucket(count, 20) for count in (16, 17, 20)] == [16, 20, 20]


@pytest.mark.parametrize("most", [1, 5, 16, 17, 512, 2048])
def test_tables_are_wide_enough_and_of_few_widths(most):
    widths = [table_bucket(pages, most) for pages in range(1, most + 1)]
    assert all(pages <= width <= most for pages, width in enumerate(widths, 1))
    assert widths == sorted(widths)
    assert all(width < 2 * max(pages, 16) for pages, width in enumerate(widths, 1))
    assert len(set(widths)) <= max(most.bit_length() - 3, 1)


@pytest.mark.parametrize("count", [0, -1, 9])
def test_no_more_texts_than_there_may_be(count):
    with pytest.raises(AssertionError, match="1 to 8"):
        text_bucket(count, 8)


@pytest.mark.parametrize("most", [1, 2, 3, 7, 16, 40, 64])
def test_views_go_in_passes_that_are_nearly_full(most):
    for count in range(3 * most + 2):
        passes = view_buckets(count, most)
        assert sum(real for _, real in passes) == count
        assert all(size & (size - 1) == 0 and size <= most for size, _ in passes)
        assert all(0.75 * size <= real <= size for size, real in passes)
        assert all(size == real for size, real in passes[:-1])
        assert len(passes) <= count // most + most.bit_length() + 1


def test_the_first_passes_of_views():
    found = {count: view_buckets(count, 16) for count in (1, 3, 5, 6, 9, 11, 12, 13, 17, 40)}
    assert found == {
        1: [(1, 1)],
        3: [(4, 3)],
        5: [(4, 4), (1, 1)],
        6: [(8, 6)],
        9: [(8, 8), (1, 1)],
        11: [(8, 8), (4, 3)],
        12: [(16, 12)],
        13: [(16, 13)],
        17: [(16, 16), (1, 1)],
        40: [(16, 16), (16, 16), (8, 8)],
    }


def test_views_of_every_size_have_passes():
    for side in range(64, 8193, 64):
        most = max(PIXELS_AT_ONCE // side**2, 1)
        assert sum(real for _, real in view_buckets(most, most)) == most
