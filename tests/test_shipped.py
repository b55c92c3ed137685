"""The checkpoint in the package: it is there, it is small, and it reads text that it was never shown."""

from pathlib import Path
from random import Random

import pytest
import torch

import optmem
from optmem.engine.checkpoint import FIDELITY, find_checkpoint
from optmem.train.scores import likeness

LETTER = """Dear Ines,

the parcel (no. 4471-QX) came on Tuesday, three weeks late and wet on one side. Of the twelve cups nine are whole; the
blue jug lost its handle. I have put 38.50 aside for the carrier, who says that "nothing can be done", and written to
the office in Graz -- no answer yet.

    cups    9 of 12
    jug     1 of 1, broken
    total   38.50

Shall I send the lot back, or will you look at it in June?  Your brother rang twice.
Yours, M.
"""


@pytest.fixture(scope="module")
def engine():
    return optmem.Engine.from_pretrained("nano", device="cpu")


def test_it_is_small_and_measured():
    folder = find_checkpoint("nano")
    assert sum(file.stat().st_size for file in folder.iterdir()) < 40 * 2**20
    assert (folder / FIDELITY).is_file()


def test_it_reads_a_letter(engine):
    pages = optmem.paginate(LETTER)
    done = engine.decode(engine.encode(pages))
    assert likeness(optmem.document_text(done), LETTER) > 0.99
    assert all(page.finish_reason == "stop" and page.confidence > 0.95 for page in done)
    assert likeness(optmem.document_text(engine.glance(engine.encode(pages))), LETTER) > 0.95


def test_verified_drafts_say_what_token_by_token_says(engine):
    tokens = engine.encode(optmem.paginate(LETTER))
    drafted, plain = engine.decode(tokens), engine.decode(tokens, draft=None)
    assert [page.token_ids for page in drafted] == [page.token_ids for page in plain]
    assert [page.logprobs for page in drafted] == [page.logprobs for page in plain]
    tokens_a_pass = sum(len(row.logprobs) for row in drafted[0].rows) / sum(row.passes for row in drafted[0].rows)
    assert tokens_a_pass > 4


def test_some_rows_are_those_of_the_page(engine):
    tokens = engine.encode(optmem.paginate(LETTER))[:1]
    whole, part = engine.decode(tokens)[0], engine.decode(tokens, rows=range(2, 5))[0]
    assert part.row_symbols == whole.row_symbols[2:5]


def test_it_reads_what_no_language_model_can_guess(engine):
    words = Random(7).choices(["zorb", "Quilt", "17", "plinth", "x9", "never", "ohm", "KLM", "drift"], k=300)
    text = " ".join(words)
    done = engine.decode(engine.encode(optmem.paginate(text)))
    assert likeness(optmem.document_text(done), text) > 0.99


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_page_alone_and_among_31_others_says_the_same(dtype):
    """64 pages of other lengths, in any order, with memory so short that texts give way."""
    chance = Random(5)
    words = ["zorb", "Quilt", "17", "plinth", "x9", "never\n", "ohm", "KLM,", "drift\t", "(4711)"]
    texts = [" ".join(chance.choices(words, k=chance.randrange(1, 340))) for _ in range(64)]
    roomy = optmem.Engine.from_pretrained("nano", device="cpu", dtype=dtype)
    tight = optmem.Engine(roomy.model, roomy.temperatures, cache_bytes=24 * 2**20)
    tokens = roomy.encode([optmem.paginate(text)[0] for text in texts])
    alone = [roomy.decode(page)[0] for page in tokens]
    order = list(range(64))
    chance.shuffle(order)
    for first in (0, 32):
        some = order[first : first + 32]
        for draft in ("auto", None):
            for at, done in zip(some, tight.decode([tokens[at] for at in some], draft=draft), strict=True):
                assert (done.token_ids, done.logprobs) == (alone[at].token_ids, alone[at].logprobs)
    assert tight._started().scheduler.preemptions > 0


@pytest.mark.parametrize(("size", "cell", "last"), [(512, "8x16", 31), (512, "8x8", 63), (256, "8x16", 15)])
def test_rows_below_the_page_are_refused(engine, size, cell, last):
    tokens = engine.encode(optmem.paginate(LETTER, size=size, cell=cell))[0]
    for ask in (engine.decode, engine.glance):
        assert ask(tokens, rows=[last])
        with pytest.raises(optmem.OptmemError, match=f"has the rows 0 to {last}, got {last + 1}"):
            ask(tokens, rows=[last + 1])
    with pytest.raises(optmem.OptmemError, match="has the rows 0 to"):
        engine.decode(tokens, rows=[last + 1], draft=None)


def test_the_readme_says_what_its_example_gives(engine, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    example = (Path(optmem.__file__).parent.parent / "README.md").read_text().split("```python\n")[1].split("from optmem.images")[0]
    names = {}
    exec(example, names)
    text, tokens = names["text"], names["tokens"]
    assert optmem.document_text(engine.decode(tokens)) == text
    assert engine.decode(tokens[0], rows=range(12, 15))[0].text == "line 12 of a text\nline 13 of a text\nline 14 of a text\n"
    assert (tmp_path / "page.safetensors").is_file()


INDENTED = "\n".join(" " * (7 * line % 57) + ("}", "return x;", '"k": 1,', "else:")[line % 4] for line in range(60)) + "\n"
TABBED = "\n".join(f"all:\t{line}.o\tlib.a\n\t$(CC) -c -o $@ $<\t# {line * line}\n\t\t@echo '{line}'" for line in range(12)) + "\n"
SIGNED = "„Größere Übungen“ – « où ? » ⇒ ½ ≤ 3 … ‘so’ │ ░▒▓█ ├── src\n" * 6
SCRIPTS = "Съешь ещё этих мягких булок\nπάντα ῥεῖ\n今天天气很好 🙂\n"


@pytest.mark.parametrize("text", [INDENTED, TABBED, "one\n", "two\nlines, and no end", "x\n" * 40], ids=range(5))
def test_it_reads_what_other_texts_are_made_of(engine, text):
    done = engine.decode(engine.encode(optmem.paginate(text)))
    assert optmem.document_text(done) == text


@pytest.mark.parametrize(("text", "least"), [(SIGNED, 0.98), (SCRIPTS, 0.9)], ids=["signs", "scripts"])
def test_it_reads_signs_and_escapes_nearly(engine, text, least):
    done = engine.decode(engine.encode(optmem.paginate(text)))
    assert likeness(optmem.document_text(done), text) > least
