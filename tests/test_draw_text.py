"""draw_text: the C++ under every instruction set against the reference, and what it refuses."""

import pytest
import torch

from optmem import ops, reference
from optmem.errors import InputError
from optmem.testing import assert_equal, available_isas, forced_isa, generator


def make_job(seed: str, num_pages: int, height: int, width: int, num_placements: int):
    """Random glyphs (0 to 20 px, the 8 and 16 px fast paths among them) placed at random, overlapping."""
    rng = generator(seed)
    sizes = torch.tensor([[0, 0], [1, 1], [16, 8], [8, 8], [16, 16], [12, 6], [5, 20], [17, 3]], dtype=torch.int32)
    sizes = sizes[(sizes[:, 0] <= height) & (sizes[:, 1] <= width)]
    area = (sizes[:, 0] * sizes[:, 1]).cumsum(0, dtype=torch.int32)
    offsets = torch.cat([torch.zeros(1, dtype=torch.int32), area[:-1]])
    ink = torch.randint(0, 256, (int(area[-1]),), generator=rng, dtype=torch.uint8)
    glyphs = torch.cat([offsets[:, None], sizes], dim=1)
    glyph = torch.randint(0, len(sizes), (num_placements,), generator=rng, dtype=torch.int32)
    room = torch.tensor([height, width]) - sizes[glyph.long()]
    corner = (torch.rand(num_placements, 2, generator=rng) * (room + 1)).floor().to(torch.int32)
    cuts = torch.randint(0, num_placements + 1, (max(num_pages - 1, 0),), generator=rng).sort().values
    starts = torch.cat([torch.tensor([0]), cuts, torch.tensor([num_placements])])
    return ink, glyphs, torch.cat([glyph[:, None], corner], dim=1), starts, height, width


@pytest.mark.parametrize("isa", available_isas())
@pytest.mark.parametrize(
    ("num_pages", "height", "width", "num_placements"),
    [(1, 1, 1, 0), (1, 1, 1, 3), (3, 16, 8, 40), (2, 33, 47, 100), (5, 64, 512, 300)],
)
def test_matches_reference(isa, num_pages, height, width, num_placements):
    job = make_job(f"{num_pages} {height} {width}", num_pages, height, width, num_placements)
    with forced_isa(isa):
        assert_equal(ops.draw_text(*job), reference.draw_text(*job))


def test_accepts_strided_inputs():
    ink, glyphs, placements, starts, height, width = make_job("strided", 2, 40, 40, 50)
    wide = torch.full((len(placements), 6), 2**31 - 1, dtype=torch.int32)
    wide[:, ::2] = placements
    assert_equal(
        ops.draw_text(ink, glyphs, wide[:, ::2], starts, height, width),
        reference.draw_text(ink, glyphs, placements, starts, height, width),
    )


def set_at(tensor, index, value):
    changed = tensor.clone()
    changed[index] = value
    return changed


@pytest.mark.parametrize(
    ("position", "index", "value", "words"),
    [
        (1, (2, 0), 10**6, "lies outside"),
        (1, (2, 0), -1, "lies outside"),
        (1, (2, 1), -5, "lies outside"),
        (2, (0, 0), 99, "names glyph 99"),
        (2, (0, 0), -1, "names glyph -1"),
        (2, (0, 1), -1, "does not fit"),
        (2, (0, 1), 2**31 - 1, "does not fit"),
        (2, (0, 2), 41, "does not fit"),
        (3, 1, 10**9, "must not decrease"),
        (3, -1, 7, "must run from 0"),
    ],
)
def test_refuses_what_would_touch_foreign_memory(position, index, value, words):
    job = list(make_job("hostile", 2, 40, 40, 50))
    job[position] = set_at(job[position], index, value)
    with pytest.raises(InputError, match=words):
        ops.draw_text(*job)


@pytest.mark.parametrize(
    ("position", "wrong", "words"),
    [
        (0, torch.zeros(4, dtype=torch.int32), "ink must be torch.uint8"),
        (0, torch.zeros(2, 2, dtype=torch.uint8), r"ink must be \[N\]"),
        (1, torch.zeros(3, 2, dtype=torch.int32), r"glyphs must be \[G, 3\]"),
        (2, torch.zeros(3, dtype=torch.int32), r"placements must be \[M, 3\]"),
        (2, torch.zeros(3, 3), "placements must be torch.int32"),
        (3, torch.zeros(0, dtype=torch.int64), r"starts must be \[P \+ 1\]"),
        (3, torch.zeros(3, dtype=torch.int32), "starts must be torch.int64"),
        (4, 0, "at least one pixel"),
    ],
)
def test_refuses_wrong_arguments(position, wrong, words):
    job = list(make_job("wrong", 2, 40, 40, 50))
    job[position] = wrong
    with pytest.raises(InputError, match=words):
        ops.draw_text(*job)


def test_opcheck():
    torch.library.opcheck(torch.ops.optmem.draw_text, make_job("opcheck", 2, 40, 40, 30))
