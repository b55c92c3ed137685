"""The sizes that passes are recorded in.  A recorded pass has one size for ever, so what comes is put into one of a few.

texts  1  2  4  8  16  24 .. 128  136 .. 256  272 .. 512  544 ..     one pass, filled up: beyond 16 at most 7 rows, or a 16th
pages  16  32  64 ..                                                 of a table: attention is launched for all of it
views  1  2  4  8  16  32 ..                                         several passes: 11 views go as 8 and 3 of 4
"""

from __future__ import annotations

FEWEST_PAGES = 16  # 256 tokens: the least that a program of paged_attention takes
STEP = 8  # texts, up to 256; a 16th of the power of two below from there on
FILLED = 0.75  # of a pass of views: its work is all compute, and of a smaller one the device is not full


def text_bucket(count: int, most: int) -> int:
    """How many texts a pass for `count` of them has: at least as many, and at most `most`."""
    assert 1 <= count <= most, f"a pass takes 1 to {most} texts, got {count}"
    below = 1 << max((count - 1).bit_length() - 1, 0)  # the largest power of two below the count, 1 for one text
    step = below if count <= STEP else max(STEP, below // 16)
    return min(-(-count // step) * step, most)


def table_bucket(pages: int, most: int) -> int:
    """How wide a table is for texts of so many pages at most: a power of two, or `most`."""
    assert 1 <= pages <= most, f"a text has 1 to {most} pages, got {pages}"
    return min(max(1 << (pages - 1).bit_length(), FEWEST_PAGES), most)


def view_buckets(count: int, most: int) -> list[tuple[int, int]]:
    """Passes that `count` views go through, in their order: how many views each has, and how many of them are real."""
    assert most >= 1, "a pass takes at least one view"
    largest = 1 << (most.bit_length() - 1)
    passes: list[tuple[int, int]] = []
    while count > 0:
        size = min(1 << (count - 1).bit_length(), largest)
        if count < FILLED * size:
            size //= 2
        passes.append((size, min(count, size)))
        count -= min(count, size)
    return passes
