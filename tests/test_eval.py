"""`optmem eval`: what is read, that readers agree, controls, the files, and the command."""

import io
import json
import sys
import xml.etree.ElementTree as ET
from dataclasses import fields, replace
from itertools import islice

import numpy as np
import pytest
import torch

from optmem.cli import main
from optmem.engine.checkpoint import fingerprint
from optmem.errors import InputError, OutputError
from optmem.inputs import Given, read_input
from optmem.model.model import Model
from optmem.model.nano import Row, embed_prefix
from optmem.pages import read_symbols, symbols
from optmem.pixels import find_mode
from optmem.text.characters import EOL
from optmem.text.count import estimate_tokens
from optmem.train import corpus as corpora
from optmem.train.evaluate import Part, Plan, evaluate
from optmem.train.evaluate_controls import pool, truncate
from optmem.train.evaluate_pages import Sample, form_name, from_text, held_out, mode_of, parse_form, unspoken
from optmem.train.evaluate_reading import (
    Nano,
    choose_rows,
    encode,
    glance_distributions,
    judge,
    read_drafted,
    read_greedily,
    read_samples,
    said_logits,
)
from optmem.train.evaluate_report import rate, save, table
from optmem.train.fidelity import Cell, Tier, write
from optmem.train.sources import SOURCES
from optmem.train.synth import Form

from .test_nano import TOKENIZER, read_rows
from .test_nano import tiny_model as quiet_model

SMALL = Form(128, "8x16")
PLAN = Plan((SMALL, Form(128, "8x8", 64)), ("prose", "characters"), pages=3, rows=2)


def tiny_model(seed=0, loud=20):
    """A reader that says something, and always the same."""
    model = quiet_model(seed)
    with torch.no_grad():
        model.decoder.lm_head.weight.mul_(loud)
        model.decoder.model.embed_tokens.weight.mul_(loud)
    return ending(model)


def ending(model):
    """The same model, with what it says third in a row as the end of the row: without that, rows are as long as they may be."""
    prefix = embed_prefix(model.encoder, model.decoder, torch.zeros(4, 32), find_mode("square 128"), TOKENIZER)
    said = read_rows(model.decoder, prefix, [0], TOKENIZER, max_symbols=8)[0].ids
    token, end = next(token for token in said[2:] if token not in said[:2]), TOKENIZER.special(EOL)
    with torch.no_grad():
        model.decoder.lm_head.weight[[token, end]] = model.decoder.lm_head.weight[[end, token]]
    return model


@pytest.fixture(scope="module")
def corpus():
    python = [source for source in SOURCES if source.name == "python"]
    return corpora.make_corpus([document for source in python for document in islice(source.documents(), 8)])


@pytest.fixture(scope="module")
def nano():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield Nano.of(tiny_model())
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def found(nano, corpus):
    return evaluate(nano.model, PLAN, corpus)


# --- pages


def test_pages_are_held_out_pages_and_one_of_four_ends(corpus):
    samples = held_out(corpus, "prose", SMALL, 0, 8)
    assert [sample.is_ended for sample in samples] == [False, False, False, True] * 2
    for sample in samples:
        assert sample.image.shape == (128, 128)
        assert sample.text == read_symbols("".join(sample.rows))
        assert all(0 < len(row) <= 16 for row in sample.rows)
    assert all(len(sample.rows) == 8 for sample in samples if not sample.is_ended)


def test_more_pages_begin_with_fewer_and_a_tier_shows_the_same_ones(corpus):
    few, many = held_out(corpus, "words", SMALL, 3, 2), held_out(corpus, "words", SMALL, 3, 6)
    lower = held_out(corpus, "words", Form(128, "8x16", 64), 3, 6)
    assert [sample.rows for sample in few] == [sample.rows for sample in many[:2]]
    assert [sample.rows for sample in lower] == [sample.rows for sample in many]
    assert lower[0].image.shape == (64, 64)
    part, smaller = Part(SMALL, "words"), Part(Form(128, "8x16", 64), "words")
    assert part.rows(PLAN, many) == smaller.rows(PLAN, lower)


def test_a_text_of_ones_own_comes_back_from_its_pages():
    text = "A line that is longer than a row of sixteen.\n\n\tand 漢字 “quoted”, 12 %\n" * 4
    pages = from_text(Given("mine", text, "text"), SMALL, 100)
    assert "".join(page.text for page in pages) == text
    assert len(pages) > 2
    assert [page.is_ended for page in pages] == [False] * (len(pages) - 1) + [True]
    some = from_text(Given("mine", text, "text"), SMALL, 2)
    assert [page.rows for page in some] == [pages[0].rows, pages[-1].rows]
    assert unspoken(Given("mine", text, "text"), ["8x16", "8x8"]) == "字漢"
    with pytest.raises(InputError, match="mine is empty"):
        from_text(Given("mine", "", "text"), SMALL, 2)


@pytest.mark.parametrize("name", ["512:8x16", "512:8x8:256", "1024:6x12"])
def test_forms_have_names(name):
    assert form_name(parse_form(name)) == name


BAD_FORMS = (
    "",
    "512",
    "512:9x9",
    "512:8x16:512:1",
    "a:8x16",
    "512:8x16:x",
    "500:8x16",
    "512:8x16:100",
    "64000:8x16",
    "-64:8x16",
    f"{'9' * 5000}:8x16",
    "٥١٢:8x16",
)


@pytest.mark.parametrize("name", BAD_FORMS)
def test_what_is_no_form_is_refused(name):
    with pytest.raises(InputError):
        parse_form(name)


@pytest.mark.parametrize(
    "wrong",
    [
        {"pages": 0},
        {"rows": -1},
        {"seed": -1},
        {"forms": ()},
        {"kinds": ()},
        {"forms": (SMALL, SMALL)},
        {"kinds": ("json", "json")},
        {"forms": (SMALL, Form(2048, "8x8", 1024))},  # 256 rows: those without a name would be neither read nor missed
    ],
)
def test_a_plan_that_measures_nothing_is_refused(wrong):
    with pytest.raises(InputError):
        replace(PLAN, **wrong)


# --- reading


def test_readers_agree_bit_for_bit(nano, corpus):
    samples = held_out(corpus, "prose", SMALL, 0, 3)
    features, rows = encode(nano, samples), [range(3), range(2, 4), range(1, 8)]
    one, other = (read_samples(nano, samples, features, rows, reader) for reader in (read_drafted, read_greedily))
    assert [reading.rows for reading in one] == [reading.rows for reading in other]
    assert [reading.said for reading in one] == [reading.said for reading in other]
    assert any(any(reading.said) for reading in one)


def test_one_pass_gives_the_distributions_that_symbols_were_chosen_from(nano, corpus):
    sample = held_out(corpus, "prose", SMALL, 0, 1)[0]
    features = encode(nano, [sample])[0]
    reading = read_samples(nano, [sample], [features], [range(5)])[0]
    prefix = nano.prefix(features, mode_of(SMALL))
    logits = said_logits(nano.model.decoder, prefix, [row for row in reading.rows if row.ids], TOKENIZER)
    logprobs, ids = logits.log_softmax(-1).max(-1)
    assert ids.tolist() == [token for row in reading.rows for token in row.ids]
    assert logprobs.tolist() == pytest.approx(
        [logprob for row in reading.rows for logprob in row.logprobs[: len(row.ids)]], abs=1e-5
    )  # summed in another order


def test_a_stretch_lies_in_the_text_and_reads_its_end(corpus):
    sample = held_out(corpus, "prose", SMALL, 0, 4)[3]
    used = len(sample.rows)
    random = np.random.default_rng(0)
    for most in (1, 2, used, used + 9):
        for _ in range(20):
            rows = choose_rows(sample, most, random)
            assert 0 <= rows.start < used
            assert rows.stop == used + 1 or len(rows) == most
    assert choose_rows(sample, 0, random) is None


def said(number, row):
    """A row said as it stands there."""
    ids = TOKENIZER.ids_of(np.array([*map(ord, row)], dtype=np.uint32)).tolist()
    return Row(number, ids, [-0.01] * (len(ids) + 1), "eol")


def reader_of(answers):
    """A reader that says these rows of every page."""
    return lambda _, asked: [[replace(row, ids=list(row.ids)) for row in answers] for _ in asked]


def test_a_perfect_reader_scores_one_and_every_fault_counts(nano, corpus):
    samples = held_out(corpus, "code", SMALL, 0, 4)

    pages = [[said(number, row) for number, row in enumerate(sample.rows)] for sample in samples]
    below = [Row(99, [], [0.0], "end"), said(100, "what stands below the end is not read")]

    def perfect(_, asked):
        return [[*page, *below] for page in pages[: len(asked)]]

    cells = evaluate(nano.model, Plan((SMALL,), ("code",), pages=4, rows=0), corpus, reader=perfect).cells
    assert cells[0].score == cells[0].low == cells[0].exact_lines == 1
    assert cells[0].silent == 0
    readings = read_samples(nano, samples, encode(nano, samples), [None] * 4, perfect)
    assert all(judge(reading).is_right.all() for reading in readings)
    silent = read_samples(nano, samples, encode(nano, samples), [None] * 4, reader_of([Row(0, [], [0.0], "end")]))
    assert [reading.score().likeness for reading in silent] == [0, 0, 0, 0]


def test_what_is_said_is_held_against_its_row(nano, corpus):
    sample = held_out(corpus, "characters", SMALL, 0, 1)[0]
    features = encode(nano, [sample])
    true = TOKENIZER.ids_of(np.array([*map(ord, sample.rows[0])], dtype=np.uint32)).tolist()
    wrong = next(token for token in range(TOKENIZER.first_symbol, TOKENIZER.vocab_size) if token not in true)
    said = [*true[:2], wrong, *true[2:], TOKENIZER.rows[5]]
    reading = read_samples(nano, [sample], features, [range(1)], reader_of([Row(0, said, [-0.1] * len(said), "length")]))[0]
    assert judge(reading).is_right.tolist() == [True, True, False, *[True] * (len(true) - 2), False]
    assert np.allclose(judge(reading).confidence, np.exp(-0.1))


def test_the_glance_is_judged_by_its_cells(nano, corpus):
    sample = held_out(corpus, "characters", SMALL, 0, 1)[0]
    features = encode(nano, [sample])
    reading = read_samples(nano, [sample], features, [range(1, 4)])[0]
    found = glance_distributions(nano, reading, features[0], range(1, 4), 10_000, 0)
    glimpse = nano.glance.read(features[0], range(1, 4))
    is_symbol = glimpse.ids.flatten() >= TOKENIZER.first_symbol
    assert len(found.said) == int(is_symbol.sum()) > 0
    assert (found.logits.argmax(-1) == found.said).all()
    assert torch.allclose(found.logits.softmax(-1).amax(-1).sort().values, glimpse.probabilities.flatten()[is_symbol].sort().values)


# --- controls and baselines


def test_truncation_keeps_as_many_text_tokens_as_are_fed(corpus):
    for sample in held_out(corpus, "prose", Form(256, "8x8"), 0, 4):
        kept, budget = "".join(truncate(sample)), mode_of(sample.form).fed_tokens()
        whole = "".join(sample.rows)
        assert whole.startswith(kept)
        assert estimate_tokens(read_symbols(kept)) <= budget
        assert kept == whole or estimate_tokens(read_symbols(whole[: len(kept) + 12])) > budget


def test_pooling_is_the_mean_of_what_is_said(nano):
    sample = Sample(np.full((128, 128), 255, dtype=np.uint8), ("abcd" + symbols.TEXT_END,), SMALL)
    features = torch.zeros(4, 32)
    ids = TOKENIZER.ids_of(np.array([*map(ord, "".join(sample.rows))], dtype=np.uint32))
    embedded = nano.model.decoder.embed(torch.from_numpy(ids))
    assert torch.allclose(pool(nano, sample, features), torch.stack([embedded[:2].mean(0), embedded[2], embedded[3], embedded[4]]))


def test_controls_and_baselines_are_on_the_first_form(found):
    names = [control.name for control in found.controls]
    assert names == ["as it is", "blank page", "tokens shuffled", "tokens of another page", "tokens zeroed"]
    assert [baseline.name for baseline in found.baselines] == ["truncated text", "text of another page", "mean-pooled embeddings"]
    assert {control.form for control in (*found.controls, *found.baselines)} == {"128:8x16"}
    assert all(0 <= control.low <= control.score <= control.high <= 1 for control in (*found.controls, *found.baselines))
    first = next(cell for cell in found.cells if cell.kind == "prose")
    assert found.controls[0].score == pytest.approx(first.score)


# --- the result


def test_the_same_seed_gives_the_same_numbers(nano, corpus, found):
    plan = replace(PLAN, forms=PLAN.forms[1:], kinds=("characters",))
    again, other = evaluate(nano.model, plan, corpus), evaluate(nano.model, replace(plan, seed=1), corpus)
    assert again.cells == found.cells[3:]
    assert again.cells != other.cells
    assert again == evaluate(nano.model, plan, corpus)


def test_the_file_is_what_its_schema_says(found, tmp_path):
    files = save(found, tmp_path / "new" / "folder")
    said = json.loads((tmp_path / "new" / "folder" / "fidelity.json").read_text())
    assert list(said) == ["model", "corpus", "seed", "pages", "rows", "fidelity", "cells", "controls", "baselines", "calibration"]
    assert [set(cell) for cell in said["cells"]] == [{field.name for field in fields(Cell)}] * 4
    assert [set(tier) for tier in said["fidelity"]] == [{field.name for field in fields(Tier)}] * 2
    assert {(cell["size"], cell["side"], cell["cell"], cell["kind"]) for cell in said["cells"]} == {
        (128, side, cell, kind) for side, cell in ((128, "8x16"), (64, "8x8")) for kind in PLAN.kinds
    }
    assert all(cell["pages"] == 3 and 0 <= cell["score"] <= 1 for cell in said["cells"])
    assert said["cells"][0]["fed_tokens"] == 2 * 3 + 1
    assert said["fidelity"][0]["score"] == pytest.approx(np.mean([cell["score"] for cell in said["cells"][:2]]))
    assert {"decoder_temperature", "glance_temperature", "decoder", "glance"} == set(said["calibration"])
    assert said["calibration"]["glance"]["is_held_out"]
    assert all(0.2 <= said["calibration"][f"{part}_temperature"] <= 5 for part in ("decoder", "glance"))
    assert all(file.is_file() for file in files)


def test_charts_and_reports_name_what_they_show(found, tmp_path):
    written = {file.name: file.read_text() for file in save(found, tmp_path)}
    assert set(written) == {"fidelity.json", "report.md", "fidelity.svg", "reliability.svg"}
    for name, content in written.items():
        if name.endswith(".svg"):
            ET.fromstring(content)
    assert "prose" in written["fidelity.svg"]
    for said in (written["report.md"], table(found)):
        assert all(name in said for name in ("128 px, 8x8, shown at 64", "characters", "blank page", "decoder, after"))
    assert found.model in written["report.md"]


def test_nothing_is_rounded_to_all_or_to_nothing():
    values = (None, 0, 0.00001, 0.5, 0.99999, 1)
    assert [rate(value) for value in values] == ["–", ".0000", ".0001", ".5000", ".9999", "1.000"]


def test_an_interval_without_width_is_not_shown_as_one(found):
    perfect = replace(found, cells=tuple(replace(cell, score=1.0, low=1.0, high=1.0) for cell in found.cells))
    assert "1.000 [3 alike]" in table(perfect)
    assert "[1.000, 1.000]" not in table(perfect)


def test_a_file_appears_complete_and_takes_any_name_of_a_text(tmp_path):
    write(tmp_path / "new" / "report.md", "caf\udce9")  # how Python gives the name of a file that is not UTF-8
    assert (tmp_path / "new" / "report.md").read_text() == "caf?"
    assert [file.name for file in (tmp_path / "new").iterdir()] == ["report.md"]
    with pytest.raises(OutputError, match=r"cannot write x\.json"):
        write(tmp_path / "new" / "report.md" / "x.json", "")


def test_a_perfect_reader_has_charts_too(found, tmp_path):
    perfect = replace(found, cells=tuple(replace(cell, score=1.0) for cell in found.cells))
    save(perfect, tmp_path)
    chart = ET.parse(tmp_path / "fidelity.svg")
    said = [node.text for node in chart.iter() if node.get("text-anchor") == "end"]
    assert len(said) == len(set(said)) > 1


def test_a_fingerprint_is_of_the_weights(nano):
    assert fingerprint(nano.model.weights()) == fingerprint(tiny_model().weights()) != fingerprint(tiny_model(1).weights())


# --- the command


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("checkpoints") / "tiny"
    tiny_model().save(folder)
    return folder


@pytest.fixture
def run(capfd, monkeypatch, tmp_path):
    """Runs a command in a folder of its own; returns exit code, stdout and stderr."""
    monkeypatch.chdir(tmp_path)

    def run_command(*arguments):
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"")))
        code = 0
        try:
            main(["eval", *map(str, arguments)])
        except SystemExit as leaving:
            code = leaving.code
        return code, *capfd.readouterr()

    return run_command


def test_a_text_of_ones_own_is_measured(run, folder, tmp_path):
    (tmp_path / "mine.txt").write_text("Some text of 12 lines: 漢.\n" * 12, encoding="utf-8")
    code, out, err = run(folder, "--text", "mine.txt", "--forms", "128:8x16", "--pages", 1, "--out", "r", "--json")
    assert code == 0
    said = json.loads(out)
    assert [cell["kind"] for cell in said["cells"]] == ["mine.txt"]
    assert "tokens of another page" not in {control["name"] for control in said["controls"]}
    assert said["corpus"] is None
    assert said["calibration"]["decoder"]["is_held_out"] is False
    assert "1 characters" in err
    assert "漢" in err
    assert "128:8x16:128 mine.txt " in err
    assert [json.loads(line) for line in (tmp_path / "r" / "cells.jsonl").read_text().splitlines()] == said["cells"]
    assert json.loads((tmp_path / "r" / "fidelity.json").read_text()) == said


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        (["nowhere"], 66, "no checkpoint 'nowhere'"),
        (["{folder}", "--kinds", "prose,poetry"], 65, "kind must be one of prose"),
        (["{folder}", "--pages", "0"], 2, "0 is not in the range"),
        (["{folder}", "--rows", "-1"], 2, "-1 is not in the range"),
        (["{folder}", "--forms", "512:4x4"], 65, "a form is size:cell"),
        (["{folder}", "--forms", "512:8x8,512:8x8"], 65, "named twice"),
        (["{folder}", "--text", "missing.txt"], 66, "cannot read missing.txt"),
        (["{folder}", "--text", "bytes.txt"], 65, "not UTF-8"),
        (["{folder}", "--text", "empty.txt", "--forms", "128:8x16"], 65, "is empty"),
        (["{folder}", "--text", "bytes.json"], 65, "not UTF-8"),
        (["{folder}", "--out", "bytes.txt/there"], 73, "cannot write to"),
    ],
)
def test_mistakes_are_one_sentence(run, folder, tmp_path, arguments, code, said):
    for name in ("bytes.txt", "bytes.json"):
        (tmp_path / name).write_bytes(b"\xff\xfe\xfa")
    (tmp_path / "empty.txt").write_text("")
    left, out, err = run(*(argument.format(folder=folder) for argument in arguments))
    assert (left, out) == (code, "")
    assert said in err
    assert "Traceback" not in err


def test_models_that_do_not_read_by_rows_are_refused(run, tmp_path):
    Model.random("deepseek-ocr", scale=0.01).save(tmp_path / "other")
    code, _, err = run("other")
    assert code == 65
    assert "family nano" in err


def test_a_text_is_read_as_it_is(tmp_path):
    (tmp_path / "a.md").write_text("# Title\n")
    page = from_text(read_input(str(tmp_path / "a.md")), SMALL, 1)[0]
    assert page.text == "# Title\n"


def test_confidence_is_fitted_on_pages_at_their_own_size():
    own, smaller = Form(128, "8x8"), Form(128, "8x8", 64)
    assert [replace(PLAN, forms=(own, smaller)).calibrates(form) for form in (own, smaller)] == [True, False]
    assert replace(PLAN, forms=(smaller,)).calibrates(smaller)
