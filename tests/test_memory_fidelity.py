"""The curve of a model: measured, bound to its weights, and guesses that say so; the ladder that is built from it."""

import json
import re
from importlib.resources import files
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from optmem.errors import CheckpointError, InputError, SourceNotFoundError
from optmem.memory.fidelity import ASSUMED, Fidelity, Measured, read_curve
from optmem.memory.ladder import ladder, sheet_of
from optmem.model.config import ModelConfig, QueryConfig
from optmem.pixels import find_mode

SHIPPED = Path(str(files("optmem"))) / "checkpoints" / "nano"
FOUND = json.loads((SHIPPED / "fidelity.json").read_text())
NANO = Measured.from_json(FOUND)
V1 = ModelConfig("deepseek-ocr")


def row(side=256, score=0.5, **other):
    return {"size": 512, "side": side, "cell": "8x16", "score": score} | other


def curve(*rows):
    return Measured.from_json({"model": "m", "fidelity": list(rows)})


def test_shipped_numbers_are_what_the_file_says():
    for found in FOUND["fidelity"]:
        known = NANO.at(found["size"], found["side"], found["cell"])
        assert (known.score, known.exact_lines, known.basis) == (found["score"], found["exact_lines"], "measured")
    for found in FOUND["cells"]:
        known = NANO.at(found["size"], found["side"], found["cell"], found["kind"])
        assert (known.score, known.identifiers, known.low) == (found["score"], found["identifiers"], found["low"])
    assert NANO.at(512, 384, "8x16", "poems") == NANO.at(512, 384, "8x16")


def test_what_was_not_measured_is_an_error_or_a_guess_that_says_so():
    with pytest.raises(InputError, match="nothing was measured of 512-pixel pages of 8x16 shown at 320: there is 512 shown at 512"):
        NANO.at(512, 320, "8x16")
    guess = NANO.at(512, 320, "8x16", complete=True)
    sharp, dull = NANO.at(512, 384, "8x16"), NANO.at(512, 256, "8x16")
    assert guess.basis == "between"
    assert guess.score == pytest.approx((sharp.score + dull.score) / 2)
    least = NANO.at(512, 128, "8x16", complete=True)
    assert least.basis == "below"
    assert least.score == pytest.approx(dull.score / 8)
    with pytest.raises(InputError, match="nothing was measured"):
        NANO.at(512, 512, "6x12", complete=True)


scores = st.lists(st.floats(0, 1), min_size=2, max_size=4)


@given(scores, st.integers(1, 700), st.integers(1, 700))
def test_guesses_rise_with_the_side(values, one, other):
    known = curve(*(row(128 * number, score) for number, score in enumerate(values, 1)))
    low, high = sorted((one, other))
    guesses = [known.at(512, side, "8x16", complete=True) for side in (low, high)]
    if all(guess.basis != "measured" for guess in guesses):
        assert guesses[0].score <= guesses[1].score + 1e-12
    assert all(0 <= guess.score <= 1 for guess in guesses)


def test_what_counts_nothing_is_not_there():
    known = curve(row(256), row(512, None), row(384, 0.9, exact_lines=None))
    assert known.at(512, 384, "8x16") == Fidelity(0.9, "measured")
    with pytest.raises(InputError, match="shown at 512"):
        known.at(512, 512, "8x16")


@pytest.mark.parametrize(
    ("found", "said"),
    [
        ({}, "model must be"),
        ({"model": 3}, "model must be"),
        ({"model": "m"}, "no tier at all"),
        ({"model": "m", "fidelity": {}}, "must be a list"),
        ({"model": "m", "fidelity": [3]}, "must be an object"),
        ({"model": "m", "fidelity": [row(score=1.5)]}, "score must be from 0 to 1"),
        ({"model": "m", "fidelity": [row(score=True)]}, "score must be from 0 to 1"),
        ({"model": "m", "fidelity": [row(score="1")]}, "score must be from 0 to 1"),
        ({"model": "m", "fidelity": [row(side=-1)]}, "number of pixels"),
        ({"model": "m", "fidelity": [row(side=1.5)]}, "number of pixels"),
        ({"model": "m", "fidelity": [row(cell=3)]}, "must be strings"),
        ({"model": "m", "cells": [row(kind=3)]}, "must be strings"),
    ],
)
def test_damaged_curves_are_refused(found, said):
    with pytest.raises(CheckpointError, match=said):
        Measured.from_json(found)


def test_a_curve_is_of_its_weights(tmp_path, monkeypatch):
    monkeypatch.chdir(SHIPPED.parent)
    assert isinstance(read_curve(Path("nano"), FOUND["model"]), Measured)
    assert isinstance(read_curve(SHIPPED, FOUND["model"]), Measured)
    with pytest.raises(CheckpointError, match="other weights"):
        read_curve(SHIPPED, "0" * 32)
    with pytest.raises(SourceNotFoundError, match="run `optmem eval`"):
        read_curve(tmp_path, "0" * 32)
    assert read_curve(tmp_path, "0" * 32, assume=True) is ASSUMED
    (tmp_path / "fidelity.json").write_text('{"model": "m", "fidelity": [{"score": NaN}]}')
    with pytest.raises(CheckpointError, match="NaN"):
        read_curve(tmp_path, "m")


@pytest.mark.parametrize(("ratio", "score"), [(0, 0.97), (10, 0.97), (15, 0.785), (20, 0.6), (28, 0.3), (36, 0), (1000, 0)])
def test_what_papers_claim(ratio, score):
    found = ASSUMED.at(1280, 512, "8x16", ratio=ratio, complete=True)
    assert found.score == pytest.approx(score)
    assert found.basis == "assumed"
    with pytest.raises(InputError, match="was not measured"):
        ASSUMED.at(1280, 512, "8x16", ratio=ratio)


# --- ladders ------------------------------------------------------------------------------------------------------------------


def steps(found):
    return [(tier.name, tier.side, tier.tokens) for tier in found.tiers]


def nano_config():
    return ModelConfig("nano")


def test_nano_goes_down_by_the_views_that_were_measured():
    assert steps(ladder(nano_config(), NANO)) == [
        ("text", 0, 0), ("tiny-facts", 512, 73), ("tiny", 512, 73), ("square-384-facts", 384, 43), ("square-384", 384, 43),
        ("square-256-facts", 256, 21), ("square-256", 256, 21), ("sheet", 128, 73), ("facts", 0, 0), ("stored", 0, 0),
    ]  # fmt: skip


def test_v1_goes_down_by_its_modes():
    bare = [(tier.name, tier.side, tier.tokens) for tier in ladder(V1, ASSUMED).tiers if not tier.has_facts]
    assert bare == [
        ("text", 0, 0), ("large", 1280, 421), ("base", 1024, 273), ("small", 640, 111), ("tiny", 512, 73), ("sheet", 320, 421),
        ("facts", 0, 0), ("stored", 0, 0),
    ]  # fmt: skip
    assert [name for name, _, _ in steps(ladder(V1, ASSUMED, size=640, sheet_pages=0))] == [
        "text",
        "small-facts",
        "small",
        "tiny-facts",
        "tiny",
        "facts",
        "stored",
    ]


@pytest.mark.parametrize("config", [nano_config(), V1], ids=["nano", "v1"])
def test_tokens_are_those_of_the_modes(config):
    for tier in ladder(config, ASSUMED).tiers:
        if tier.kind in ("page", "sheet"):
            mode = find_mode(tier.mode)
            assert tier.tokens == mode.fed_tokens()
            assert tier.side == mode.size // (4 if tier.kind == "sheet" else 1)
        assert re.fullmatch("[a-z][a-z0-9-]*", tier.name)


def test_choices_of_a_page():
    nano = ladder(nano_config(), NANO, measure="score")
    found = nano.choices(400, facts_tokens=9, facts_share=0.1, name_tokens=5)
    views = [NANO.at(512, side, "8x16") for side in (512, 384, 256)]
    assert found.tokens == (400, 82, 73, 52, 48, 30, 26, 73, 9, 0), "at its sharpest it has no name beside it"
    with_facts = [min(view.score + (1 - view.identifiers) * 0.1, 1) for view in views]
    pairs = [value for view, facts in zip(views, with_facts, strict=True) for value in (facts, view.score)]
    assert found.fidelity == pytest.approx((1, *pairs, views[2].score / 8, 0.1, 0))
    assert pairs[0] - pairs[1] < 0.001, "facts add next to nothing to what is read right"
    assert not found.is_measured  # the sheet is a guess
    assert ladder(nano_config(), NANO, sheet_pages=0).choices(400).is_measured


def test_lines_are_what_counts_where_they_were_counted():
    found = ladder(nano_config(), NANO, sheet_pages=0).choices(400)
    assert found.fidelity[2:7:2] == tuple(NANO.at(512, side, "8x16").exact_lines for side in (512, 384, 256))
    assert found.tokens[1:7:2] == (None, None, None), "it has no facts"
    assert ladder(V1, ASSUMED).choices(600) == ladder(V1, ASSUMED, measure="score").choices(600)


def test_a_page_that_lost_its_pixels_has_no_sharper_view():
    nano = ladder(nano_config(), NANO)
    assert nano.choices(None, width=384).tokens == (None, None, None, None, 43, None, 21, 73, None, 0)


def test_the_assumed_score_falls_with_density():
    v1 = ladder(V1, ASSUMED)
    thin, thick = v1.choices(600).fidelity, v1.choices(4000).fidelity
    tiny = v1.find("tiny")
    assert thin[v1.sharp] == thick[v1.sharp] == 0.97
    assert thin[tiny] > thick[tiny] == 0.0


@pytest.mark.parametrize("pages", [1, 2, 15, -4, 10_000, 4.0])
def test_sheets_are_square(pages):
    with pytest.raises(InputError, match="square number"):
        ladder(V1, ASSUMED, sheet_pages=pages)


def test_ladders_that_are_none_are_refused():
    with pytest.raises(InputError, match="tiles alone"):
        ladder(ModelConfig("deepseek-ocr-2", clip=None, query=QueryConfig()), ASSUMED)
    with pytest.raises(InputError, match="drawn at the side of a view"):
        ladder(V1, ASSUMED, size=700)
    with pytest.raises(InputError, match="not as 'huge'"):
        ladder(V1, ASSUMED).find("huge")


def test_places_on_sheets_never_change():
    assert [sheet_of(place, 16) for place in (0, 15, 16, 31, 32)] == [0, 0, 1, 1, 2]
