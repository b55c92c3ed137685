"""Self-made labelled pages: what is drawn is what the label says, and the same arguments give the same bytes."""

import pickle
from dataclasses import replace
from itertools import islice
from random import Random
from typing import get_args

import numpy as np
import pytest

from optmem.errors import InputError
from optmem.pages import Block, Run, symbols
from optmem.pages.alphabet import BLANK, CHARACTERS, SYMBOLS, alphabet_atlas, code_points, spell
from optmem.pages.cells import paginate_cells
from optmem.pixels import to_mode
from optmem.testing import read_pixels
from optmem.text.characters import ALPHABET
from optmem.train import corpus as corpora
from optmem.train.degrade import EVERYTHING, UNMOVED, Blur, Jpeg, Noise, Rotation, Shift, degrade, move_boxes
from optmem.train.kinds import Mix, PageKind, identifier, write
from optmem.train.sources import SOURCES
from optmem.train.synth import Form, SynthConfig, draw_batch, synth, synth_batches, synth_in_parallel

KINDS = get_args(PageKind)
SMALL = SynthConfig((Form(256, "8x16"),), batch=4)


@pytest.fixture(scope="module")
def corpus():
    python = [source for source in SOURCES if source.name == "python"]
    documents = [document for source in python for document in islice(source.documents(), 8)]
    return corpora.make_corpus(documents)


def equal(one, other):
    return one.kinds == other.kinds and all(
        (getattr(one, name) == getattr(other, name)).all() for name in ("images", "ids", "affines")
    )


# --- the alphabet


def test_the_alphabet_is_that_of_the_tokenizer():
    assert SYMBOLS[1:] == ALPHABET
    assert len(SYMBOLS) == len(set(SYMBOLS)) == 512
    assert set(symbols.PRINTABLE_ASCII) < set(CHARACTERS) < set(SYMBOLS)


@pytest.mark.parametrize("cell", ["8x16", "8x8", "6x12", "5x8"])
def test_no_two_glyphs_of_a_cell_look_the_same(cell):
    atlas = alphabet_atlas(cell)
    table = atlas.store.table()
    inks = [table.ink[at : at + height * width].tobytes() for at, height, width in table.glyphs.tolist()]
    assert len(set(inks)) == len(inks)
    assert (code_points()[atlas.ids] == np.where(atlas.ids == BLANK, 0, table.symbols)).all()
    assert set(map(ord, symbols.PRINTABLE_ASCII)) <= atlas.font.shown


# --- pages


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_fills_a_page(corpus, kind):
    for seed in range(8):
        assert len(write(kind, Random(seed), corpus, 900)) >= 900


@pytest.mark.parametrize("cell", ["8x16", "8x8"])
@pytest.mark.parametrize("kind", KINDS)
def test_the_pixels_say_the_label(corpus, kind, cell):
    config = SynthConfig((Form(256, cell),), Mix.only([kind]), batch=6)
    for page in draw_batch(config, corpus, 1, 0).pages():
        assert page.kind == kind
        seen = read_pixels(page.image, alphabet_atlas(cell), break_rows=True)
        assert seen[: len(page.symbols)] == page.symbols
        assert not seen[len(page.symbols) :].strip()


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "chats"])
def test_pages_are_those_of_paginate(corpus, kind):
    config = SynthConfig((Form(256, "8x16"),), Mix.only([kind]), batch=12)
    ended = [page for page in draw_batch(config, corpus, 2, 0).pages() if page.symbols.endswith(symbols.TEXT_END)]
    assert ended
    for page in ended:
        block = Block("verbatim", (Run(page.text),))
        assert (paginate_cells([block], "dense", 256, 256, alphabet_atlas("8x16"))[0].image() == page.image).all()


def test_pages_are_empty_short_full_and_continued(corpus):
    config = SynthConfig((Form(128, "8x16"),), Mix.only(["characters"]), batch=200)
    batch = draw_batch(config, corpus, 0, 0)
    said = [page.symbols for page in batch.pages()]
    ends = [text.endswith(symbols.TEXT_END) for text in said]
    assert 60 < sum(ends) < 140
    assert any(len(text) < 8 for text in said)
    assert any(spell(ids[-1, -1:]) == symbols.TEXT_END for ids in batch.ids)
    assert all(text.count(symbols.TEXT_END) == end for text, end in zip(said, ends, strict=True))


def test_a_seed_fixes_every_byte(corpus):
    config = replace(SMALL, harms=EVERYTHING, forms=(Form(256, "8x16"), Form(256, "8x8", 192)))
    one, two = (list(islice(synth_batches(config, corpus, 7), 4)) for _ in range(2))
    assert all(map(equal, one, two))
    assert not equal(one[0], draw_batch(config, corpus, 8, 0))
    assert not equal(one[0], one[1])
    assert {batch.images.shape[1] for batch in islice(synth_batches(config, corpus, 7), 16)} == {256, 192}
    shown = list(islice(synth(config, corpus, 7), 6))
    assert (shown[5].image == one[1].images[1]).all()


def test_batches_travel_between_processes(corpus):
    config = replace(SMALL, harms=EVERYTHING)
    batch = draw_batch(pickle.loads(pickle.dumps(config)), corpus, 1, 0)
    assert equal(pickle.loads(pickle.dumps(batch)), draw_batch(config, corpus, 1, 0))


def test_workers_share_one_stream(corpus):
    whole = [batch.number for batch in islice(synth_batches(SMALL, corpus, 0, start=3), 4)]
    shares = [islice(synth_batches(SMALL, corpus, 0, start=3, worker=worker, workers=2), 2) for worker in range(2)]
    assert sorted(batch.number for share in shares for batch in share) == whole == [3, 4, 5, 6]


@pytest.mark.slow
def test_spawned_workers_draw_what_one_would(corpus, tmp_path):
    (tmp_path / "train").mkdir()
    for name in ("prose", "code"):
        (tmp_path / "train" / f"{name}.txt").write_bytes(getattr(corpus, name))
    (tmp_path / "train" / "words.txt").write_text("\n".join(corpus.words), encoding="utf-8")
    (tmp_path / "corpus.json").write_text("{}")
    batches = synth_in_parallel(SMALL, tmp_path, 5, workers=1, start=2, ahead=2)
    drawn = list(islice(batches, 3))
    batches.close()
    assert [batch.number for batch in drawn] == [2, 3, 4]
    assert all(equal(batch, draw_batch(SMALL, corpus, 5, batch.number)) for batch in drawn)


def test_a_lower_tier_is_the_page_resampled(corpus):
    full = draw_batch(SMALL, corpus, 3, 0)
    tier = draw_batch(replace(SMALL, forms=(Form(256, "8x16", 128),)), corpus, 3, 0)
    assert all((to_mode(page, "square 128") == shown).all() for page, shown in zip(full.images, tier.images, strict=True))
    page, shown = next(full.pages()), next(tier.pages())
    assert shown.symbols == page.symbols
    assert (shown.boxes() == page.boxes() / 2).all()


def test_lines_are_rows_and_their_boxes(corpus):
    page = next(draw_batch(SMALL, corpus, 4, 0).pages())
    lines = page.lines()
    assert "".join(said for said, _ in lines) == page.symbols
    for said, box in lines:
        assert (box.right - box.left, box.bottom - box.top) == (8 * len(said), 16)


# --- harms


@pytest.mark.parametrize("harm", [Shift(1.0), Rotation(1.0), Rotation(1.0, 3.0)])
def test_boxes_follow_what_moves_ink(harm):
    page = np.full((96, 96), 255, dtype=np.uint8)
    page[30:46, 40:72] = 0
    box = np.array([40.0, 30.0, 72.0, 46.0])
    random = np.random.default_rng(1)
    for _ in range(20):
        image, affine = harm.apply(page, random)
        left, top, right, bottom = move_boxes(box, affine)
        rows, columns = np.nonzero(image < 128)
        seen = np.array([columns.min(), rows.min(), columns.max() + 1, rows.max() + 1])
        assert np.abs(seen - [left, top, right, bottom]).max() <= 1.0


@pytest.mark.parametrize("harm", [Blur(1.0), Noise(1.0), Jpeg(1.0)])
def test_other_harms_change_pixels_and_move_nothing(corpus, harm):
    page = draw_batch(SMALL, corpus, 0, 0).images[0]
    image, affine = harm.apply(page, np.random.default_rng(2))
    assert image.shape == page.shape
    assert image.dtype == np.uint8
    assert 0 < np.abs(image.astype(int) - page).mean() < 40
    assert (affine == UNMOVED).all()


def test_harms_happen_to_their_share():
    page, random = np.full((16, 16), 255, dtype=np.uint8), np.random.default_rng(0)
    moved = [(degrade(page, (Shift(0.25),), random).affine != UNMOVED).any() for _ in range(400)]
    assert 60 < sum(moved) < 140


# --- what users give


@pytest.mark.parametrize(
    "wrong",
    [
        lambda: Form(32),
        lambda: Form(512, "9x9"),
        lambda: Form(512, view=1024),
        lambda: Form(share=-1),
        lambda: SynthConfig(()),
        lambda: SynthConfig(batch=0),
        lambda: Mix(prose=-1),
        lambda: Mix.only([]),
        lambda: Mix.only(["poems"]),
        lambda: Blur(2.0),
        lambda: corpora.make_corpus([]),
    ],
)
def test_what_cannot_be_drawn_is_refused(wrong):
    with pytest.raises(InputError):
        wrong()


def test_identifiers_differ(corpus):
    chance = Random(0)
    assert len({identifier(chance, corpus) for _ in range(500)}) > 480
