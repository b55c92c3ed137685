"""The trainer: labels that say what is drawn, losses that fall, and runs that resume as if they had never stopped."""

import json
import signal
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from optmem.cli import main
from optmem.errors import CheckpointError, InputError
from optmem.model.config import GlanceConfig
from optmem.model.model import Model
from optmem.testing import assert_equal
from optmem.text.characters import CHARACTERS, END, EOL
from optmem.train.alignment import TAUGHT, Parts, expert_of, graft
from optmem.train.curves import draw_curves
from optmem.train.feed import SynthFeed, chance_corpus
from optmem.train.labels import NOTHING, NOWHERE, label, sheets
from optmem.train.losses import Weights, score
from optmem.train.muon import Optimizer, Rates, apart, orthogonal, takes_muon
from optmem.train.recipe import Recipe, Stage, parse_recipe, read_recipe
from optmem.train.synth import Form
from optmem.train.train_command import stopped_by_signals
from optmem.train.trainer import Run, Trainer, read_log

from .test_nano import TOKENIZER, tiny_nano

FEED = SynthFeed(chance_corpus(count=200))
MIX = {"words": 0.5, "characters": 0.5}
SMALL = Form(128, "8x16")


def drawn(form=SMALL, count=3, seed=5, **changes):
    batch = FEED.batch(form, count, seed, MIX)
    return batch, label(batch, TOKENIZER, tiny_nano().glance.cells, np.random.default_rng(seed), num_spots=64, **changes)


# --- labels -------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", [SMALL, Form(128, "8x8"), Form(256, "8x16", view=128)])
def test_a_spot_is_the_middle_of_its_cell(form):
    batch, labels = drawn(form)
    height, width = form.cell_size
    scale = form.size // form.side
    for page, grid in enumerate(sheets(batch, TOKENIZER)):
        for (y, x), symbol in zip(labels.spots[page].tolist(), labels.symbols[page].tolist(), strict=True):
            assert grid.ids[y * scale // height, x * scale // width] == symbol
    shown = (height // scale, width // scale)
    assert labels.cells.tolist() == [tiny_nano().glance.cells.index(shown)] * 3


@pytest.mark.parametrize(("view", "cell"), [(384, (12, 6)), (256, (8, 4)), (0, (16, 8)), (320, None), (500, None)])
def test_votes_are_for_cells_as_they_are_shown(view, cell):
    known = tiny_nano().glance.cells
    _, labels = drawn(Form(512, "8x16", view=view), count=1)
    assert labels.cells.tolist() == [known.index(cell) if cell else NOTHING]


def test_rows_that_begin_far_to_the_right_are_asked_more_often():
    wide = FEED.batch(Form(256, "8x16"), 4, 1, {"characters": 1.0})
    (blank,) = TOKENIZER.encode(" ")
    wide.ids[:, :, :] = TOKENIZER.encode("x")[0] - TOKENIZER.first_symbol + 1
    wide.ids[:, 3, :20] = blank - TOKENIZER.first_symbol + 1
    labels = label(wide, TOKENIZER, (), np.random.default_rng(1), num_spots=8, num_stretches=2000)
    share = (labels.ids[:, :, 0] == TOKENIZER.rows[3]).float().mean()
    assert 0.12 < share < 0.25  # of 16 rows


def test_rows_say_what_the_page_says():
    batch, labels = drawn(num_stretches=40)
    eol, end, rows = TOKENIZER.special(EOL), TOKENIZER.special(END), TOKENIZER.rows
    for grid, page, ids, targets in zip(sheets(batch, TOKENIZER), batch.pages(), labels.ids, labels.targets, strict=True):
        lines = [line for line, _ in page.lines()]
        for given, wanted in zip(ids.tolist(), targets.tolist(), strict=True):
            said = [target for target in wanted if target != NOTHING]
            row = rows.index(given[0])
            if row >= grid.used:
                assert said == [end]
                continue
            assert TOKENIZER.symbols(said) == lines[row]
            following = rows[row + 1] if row + 1 < grid.used else end
            assert said[-2:] == [eol, following]
            assert given[1 : len(said)] == said[:-1]


def test_places_are_where_the_next_symbol_stands():
    batch, labels = drawn(num_stretches=10)
    for grid, targets, places in zip(sheets(batch, TOKENIZER), labels.targets, labels.places, strict=True):
        for target, (y, x) in zip(targets.flatten().tolist(), places.flatten(0, 1).tolist(), strict=True):
            if y != NOWHERE:
                assert grid.ids[y // 16, x // 8] == target
    assert (labels.positions[:, :, 0] == 1 + 2 * 3 + 1).all()


def test_stretches_of_a_document_stand_at_their_offsets():
    batch, labels = drawn(num_stretches=8, rows_each=2)
    for grid, ids, positions in zip(sheets(batch, TOKENIZER), labels.ids, labels.positions, strict=True):
        for given, places in zip(ids.tolist(), positions.tolist(), strict=True):
            row = TOKENIZER.rows.index(given[0])
            assert places[0] == 8 + sum(int(length) + 2 for length in grid.lengths[:row])


# --- losses and steps ---------------------------------------------------------------------------------------------------------


def test_every_loss_reaches_the_weights_it_is_for():
    parts = Parts(tiny_nano())
    _, labels = drawn(num_stretches=4)
    found = score(parts, labels, Weights(), bos=0)
    assert {"glance", "patches", "cells", "text", "deep 1", "look 2", "route 1", "x 0", "y 2"} <= found.losses.keys()
    found.total.backward()
    untouched = {name for name, value in parts.named_parameters() if value.grad is None}
    assert all("rel_pos" in name or "patch_embedding" in name for name in untouched), untouched
    assert parts.encoder.sam_model.neck[2].weight.grad[:, :, 0, 1].abs().max() == 0


def test_a_frozen_encoder_gets_no_gradient():
    parts = Parts(tiny_nano())
    _, labels = drawn(num_stretches=4)
    score(parts, labels, Weights(), bos=0, is_encoder_frozen=True).total.backward()
    assert all(value.grad is None for value in parts.encoder.sam_model.parameters())
    assert parts.encoder.image_newline.grad is not None


def test_orthogonal_brings_singular_values_near_one():
    matrices = torch.randn(3, 8, 20, generator=torch.Generator().manual_seed(0))
    for turned in (matrices, matrices.transpose(1, 2)):
        values = torch.linalg.svdvals(orthogonal(turned).float())
        assert values.min() > 0.5
        assert values.max() < 1.4


def test_matrices_are_told_from_tables():
    parts = dict(Parts(tiny_nano()).named_parameters())
    muon = {name for name, value in parts.items() if takes_muon(name, value)}
    assert "decoder.model.layers.1.mlp.experts.down" in muon
    assert "encoder.sam_model.net_3.weight" in muon
    assert muon.isdisjoint({"decoder.lm_head.weight", "decoder.model.layers.1.mlp.gate.weight", "glance.places.weight"})
    for name in muon:
        assert apart(name, parts[name]).numel() == parts[name].numel()


def test_steps_into_the_residual_can_be_smaller():
    parts = Parts(tiny_nano())
    name = "decoder.model.layers.2.self_attn.o_proj.weight"
    moved = []
    for residual in (1.0, 0.25):
        weight = torch.nn.Parameter(dict(parts.named_parameters())[name].detach().clone())
        before = weight.detach().clone()
        weight.grad = torch.ones_like(weight)
        Optimizer({name: weight}, decay=0.0).step(Rates(0.1, 0.1, residual))
        moved.append((weight.detach() - before).norm())
    assert moved[1] / moved[0] == pytest.approx(0.25, rel=0.01)


def test_a_graft_reads_at_the_middle_of_the_expert():
    parts = Parts(tiny_nano())
    graft(parts.decoder, parts.glance)
    place = torch.tensor([20, 44])  # y, x: cell row 2, column 5 of 8 x 8
    expert = int(expert_of(place))
    assert expert == 2 * 8 + 5
    up = parts.decoder.model.layers[1].mlp.experts.gate_up[expert, 8:]
    slot = (20 // 8) * 16 + 44 // 4
    read = parts.glance.places.weight.view(128, 8, 32)[slot].detach()
    torch.testing.assert_close(up.detach(), read - read.mean(1, keepdim=True))  # a new norm has scale 1
    attention = parts.decoder.model.layers[2].self_attn
    assert_equal(attention.v_proj.weight.detach(), torch.eye(32))
    heads = attention.q_proj.weight.detach().view(attention.config.heads, -1, 32)
    for head in range(TAUGHT, len(heads)):
        assert_equal(heads[head], heads[head % TAUGHT])


# --- runs ---------------------------------------------------------------------------------------------------------------------


def tiny_recipe(*stages):
    return Recipe(stages=stages, autocast=False, log_seconds=0.0)


def encoder_stage(**changes):
    rates = Rates(muon=0.02, adam=5e-3)
    usual = Stage("encoder", steps=20, trains="encoder", pages=(SMALL,), batch=8, mix=MIX, rates=rates)
    return replace(usual, **changes)


def test_losses_fall(tmp_path):
    Trainer(Parts(tiny_nano()), tiny_recipe(encoder_stage(stretches=2, trains="all")), FEED, Run(tmp_path)).train()
    lines = list(read_log(tmp_path / "log.jsonl"))
    assert len(lines) == 20
    for name in ("loss", "glance loss", "patches loss", "text loss", "look 1 loss"):
        assert lines[-1][name] < lines[0][name] * 0.95, name
    assert "<polyline" in (tmp_path / "curves.svg").read_text()


def test_a_resumed_run_equals_an_uninterrupted_one(tmp_path):
    first = replace(encoder_stage(), steps=3, batch=2)
    second = replace(first, name="reading", steps=4, trains="all", stretches=3, document=0.5, begins="graft")
    recipe = tiny_recipe(first, second)
    whole = Trainer(Parts(tiny_nano()), recipe, FEED, Run(tmp_path / "whole"))
    whole.train()
    for until in (2, 1, 3, None):
        part = Trainer(Parts(tiny_nano(), seed=0 if until == 2 else 9), recipe, FEED, Run(tmp_path / "part"))
        part.train(until=until)
    assert (part.place.stage, part.place.pages) == (whole.place.stage, whole.place.pages)
    for name, value in whole.parts.weights().items():
        assert_equal(part.parts.weights()[name], value)
    with pytest.raises(CheckpointError):
        Trainer(Parts(replace(tiny_nano(), glance=GlanceConfig(code=4, width=16))), recipe, FEED, Run(tmp_path / "part"))


def text_in(corpus):
    for side in ("train", "held-out"):
        (corpus / side).mkdir(parents=True)
        for name in ("prose", "code", "words"):
            (corpus / side / f"{name}.txt").write_text("some words of a page\n" * 50)
    (corpus / "corpus.json").write_text("{}")


def test_the_command_trains_and_goes_on(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)  # a folder beside us, not from the root
    text_in(tmp_path / "corpus")
    stage = '[[stages]]\nname = "{}"\nsteps = 2\ntrains = "encoder"\nbatch = 2\npages = [{{ size = 128, cell = "8x16" }}]\n'
    Path("short.toml").write_text(stage.format("first"))
    main(["train", "short.toml", "run", "--corpus", "corpus", "--threads", "1"])
    Path("short.toml").write_text(stage.format("first") + stage.format("second"))
    main(["train", "short.toml", "run", "--corpus", "corpus", "--threads", "1"])
    assert "model-second" in capsys.readouterr().out
    assert [line["stage"] for line in read_log(Path("run/log.jsonl"))] == ["first", "second"]
    assert json.loads(Path("run/state/state.json").read_text())["pages"] == 8


OTHERS = {
    "seed": lambda recipe: replace(recipe, seed=7),
    "another stage": lambda recipe: tiny_recipe(replace(recipe.stages[0], name="other"), *recipe.stages[1:]),
    "other pages": lambda recipe: tiny_recipe(replace(recipe.stages[0], pages=(Form(256, "8x8"),)), *recipe.stages[1:]),
    "fewer stages": lambda recipe: tiny_recipe(recipe.stages[0]),
}


@pytest.mark.parametrize("other", OTHERS.values(), ids=OTHERS)
def test_a_folder_takes_one_recipe(tmp_path, other):
    stage = encoder_stage(steps=1, batch=2)
    recipe = tiny_recipe(stage, replace(stage, name="second", steps=3))
    run = Run(tmp_path / "run")
    Trainer(Parts(tiny_nano()), recipe, FEED, run).train(until=2)
    before = (run.state / "state.json").read_text()
    with pytest.raises(InputError, match="run was begun with another recipe"):
        Trainer(Parts(tiny_nano()), other(recipe), FEED, run)
    assert (run.state / "state.json").read_text() == before
    steered = tiny_recipe(*(replace(each, steps=each.steps + 1, rates=Rates(0.01, 0.001)) for each in recipe.stages))
    assert Trainer(Parts(tiny_nano()), steered, FEED, run).place.stage == 1


def test_a_folder_that_cannot_be_written_is_refused_before_text_is_collected(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Path("short.toml").write_text('[[stages]]\nname = "a"\nsteps = 1\npages = [{ size = 128 }]\n')
    with pytest.raises(SystemExit) as leaving:
        main(["train", "short.toml", "/proc/x", "--corpus", "corpus"])
    assert (leaving.value.code, Path("corpus").exists()) == (73, False)
    assert "cannot write to /proc/x" in capsys.readouterr().err


@pytest.fixture
def interruptible():
    """Ctrl-C as usual: the background jobs of a shell begin without it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("interruptible")
def test_a_signal_ends_a_training_after_its_step_and_a_second_one_at_once(tmp_path):
    trainer = Trainer(Parts(tiny_nano()), tiny_recipe(encoder_stage(steps=4, batch=2)), FEED, Run(tmp_path))
    before = signal.getsignal(signal.SIGINT)
    with stopped_by_signals(trainer):
        signal.raise_signal(signal.SIGINT)
        assert trainer.is_stopping
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is before
    with suppress(ZeroDivisionError), stopped_by_signals(trainer):
        _ = 1 / 0
    assert signal.getsignal(signal.SIGINT) is before


def test_a_training_on_a_device_that_is_not_here_is_refused(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Path("short.toml").write_text('[[stages]]\nname = "a"\nsteps = 1\npages = [{ size = 128 }]\n')
    for device, code in (("cuda:99", 69), ("abacus", 65)):
        with pytest.raises(SystemExit) as leaving:
            main(["train", "short.toml", "run", "--device", device])
        assert leaving.value.code == code
        assert device in capsys.readouterr().err


def test_a_training_can_be_stopped_and_goes_on(tmp_path):
    recipe = tiny_recipe(encoder_stage(steps=4, batch=2))
    trainer = Trainer(Parts(tiny_nano()), recipe, FEED, Run(tmp_path), watch=lambda trainer, *_: trainer.stop())
    trainer.train()
    assert json.loads((tmp_path / "state" / "state.json").read_text())["step"] == 1
    again = Trainer(Parts(tiny_nano()), recipe, FEED, Run(tmp_path))
    again.train()
    assert [line["step"] for line in read_log(tmp_path / "log.jsonl")] == [1, 2, 3, 4]


@pytest.mark.usefixtures("interruptible")
def test_a_stopped_command_says_where_and_leaves_with_130(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    text_in(Path("corpus"))
    Path("long.toml").write_text(
        '[[stages]]\nname = "first"\nsteps = 99\nbatch = 2\ntrains = "encoder"\npages = [{ size = 128 }]\n'
    )
    step = Trainer.step

    def stopped(self, *rest):
        signal.raise_signal(signal.SIGINT)
        return step(self, *rest)

    monkeypatch.setattr(Trainer, "step", stopped)
    with pytest.raises(SystemExit) as leaving:
        main(["train", "long.toml", "run", "--corpus", "corpus", "--threads", "1"])
    assert leaving.value.code == 130
    assert "stopped at step 1 of stage first; the same command goes on" in capsys.readouterr().err


def test_a_training_can_start_from_a_model():
    taught, new = Parts(tiny_nano(), seed=3), Parts(tiny_nano(), seed=4)
    new.start_from(Model(tiny_nano(), taught.weights(), TOKENIZER))
    for name, value in taught.weights().items():
        assert_equal(new.weights()[name], value)
    with pytest.raises(InputError, match="another shape"):
        Parts(replace(tiny_nano(), glance=GlanceConfig(code=4, width=16))).start_from(
            Model(tiny_nano(), taught.weights(), TOKENIZER)
        )


def test_a_batch_can_be_so_many_pages_of_one_side():
    stage = encoder_stage(batch=8, batch_side=256)
    assert [stage.pages_at_once(form) for form in (SMALL, Form(256), Form(512, view=128), Form(2048))] == [16, 8, 16, 1]
    assert encoder_stage(batch=8).pages_at_once(SMALL) == 8


def test_every_stage_leaves_a_model_that_loads(tmp_path):
    trainer = Trainer(Parts(tiny_nano()), tiny_recipe(replace(encoder_stage(), steps=1)), FEED, Run(tmp_path))
    trainer.train()
    loaded = Model.load(tmp_path / "model-encoder")
    assert (tmp_path / "model-encoder" / CHARACTERS).exists()
    pixels = torch.from_numpy(FEED.batch(SMALL, 1, 0, MIX).images[..., None])
    assert_equal(loaded.encoder(pixels), trainer.export(torch.bfloat16).encoder(pixels))


def test_no_curves_without_a_log(tmp_path):
    draw_curves(tmp_path / "log.jsonl", tmp_path / "curves.svg")
    assert not (tmp_path / "curves.svg").exists()


# --- recipes ------------------------------------------------------------------------------------------------------------------


def test_a_folder_is_no_recipe(tmp_path):
    with pytest.raises(InputError, match="cannot be read"):
        read_recipe(tmp_path)


def test_the_shipped_recipe_can_be_read(request):
    recipe = read_recipe(request.config.rootpath / "recipes" / "nano.toml")
    assert recipe.stages[0].name == "encoder"
    assert sum(stage.minutes for stage in recipe.scaled(25).stages) == pytest.approx(25)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"stages": []}, "at least one"),
        ({"speed": 3}, "has no 'speed'"),
        ({"stages": [{"name": "a"}]}, "needs minutes or steps"),
        ({"stages": [{"name": "a", "steps": 1, "losses": {"joy": 1}}]}, "has no 'joy'"),
        ({"stages": [{"name": "a", "steps": 1, "trains": "nothing"}]}, "trains must be"),
        ({"stages": [{"name": "a", "steps": 1, "rates": {"muon": 0.1}}]}, "rates"),
        ({"stages": [{"steps": 1}]}, "name"),
    ],
)
def test_bad_recipes_are_refused(changes, message):
    with pytest.raises(InputError, match=message):
        parse_recipe({"stages": [{"name": "a", "steps": 1}], **changes})


def test_rates_warm_up_and_cool_down():
    stage = encoder_stage(warmup=4, cooldown=0.5)
    assert stage.pace(0, 0.0) == pytest.approx(0.2)
    assert stage.pace(9, 0.4) == 1.0
    assert stage.pace(90, 0.75) == pytest.approx(0.51)
    assert stage.pace(99, 1.0) == pytest.approx(0.02)
    assert replace(stage, coolest=0.3).pace(99, 1.0) == pytest.approx(0.3)
