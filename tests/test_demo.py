"""What the demo reads back: pages that nano can say, numbers that follow from what was read, and a report of the difference."""

import json
import re
from dataclasses import replace
from html.parser import HTMLParser

import pytest
import torch

from optmem import paginate
from optmem.cli import main, save_report
from optmem.demo import MOST_READ, ReadBack, read_back, sample
from optmem.demo_report import write_report
from optmem.engine import Engine
from optmem.engine.reading import complete
from optmem.errors import InputError
from optmem.inputs import Given
from optmem.model.nano import Row
from optmem.text.characters import END

from .test_nano import TOKENIZER, tiny_model

HOSTILE = 'tab\t<script>alert("x")</script> 漢 ^M\x07 [user Ada] &amp; </pre>\n' + "é – " * 40


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A checkpoint whose rows end soon, because one direction of the hidden state says so."""
    model = tiny_model(seed=5)
    with torch.no_grad():
        says = model.decoder.lm_head.weight[TOKENIZER.special(END)].clone()
        model.decoder.lm_head.weight.mul_(0)
        model.decoder.lm_head.weight[TOKENIZER.special(END)] = says
    place = tmp_path_factory.mktemp("checkpoints") / "tiny"
    model.save(place)
    return place


def perfect(text, wrong=lambda ids: ids, chance=1.0):
    """A source as if it had been read, with mistakes made on purpose."""
    pages = paginate(text)
    drawn = [page.symbol_rows() for page in pages]
    read = []
    for rows in drawn:
        said = [wrong([int(token) for token in TOKENIZER.ids_of(_codes(row))]) for row in rows]
        found = [Row(at, ids, [0.0] * (len(ids) + 1), "eol", [chance] * (len(ids) + 1)) for at, ids in enumerate(said)]
        read.append(complete([*found, Row(len(rows), [], [0.0], "end", [1.0])], TOKENIZER, vision_tokens=74, side=512))
    return ReadBack("it", pages, drawn, read, 0, 100, 73 * len(pages), 0.1, 0.2)


def _codes(row):
    return torch.tensor([ord(symbol) for symbol in row]).numpy().astype("uint32")


class Page(HTMLParser):
    """Which elements a report has, and what it points to."""

    def __init__(self, html):
        super().__init__()
        self.tags, self.links = [], []
        self.feed(html)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.links += [value for name, value in attrs if name in ("src", "href")]


def test_pages_hold_nothing_that_nano_cannot_say():
    for given in (sample(), Given("t", HOSTILE, "text"), Given("t", "", "text")):
        for page in paginate(given.source, kind=given.kind):
            assert (TOKENIZER.ids_of(page.characters().symbols) >= 0).all()
            assert (page.height, page.width) == (512, 512)


def test_the_rows_of_a_page_are_all_of_its_symbols():
    page = paginate(HOSTILE)[0]
    rows = page.symbol_rows()
    assert TOKENIZER.text(int(token) for row in rows for token in TOKENIZER.ids_of(_codes(row))) == HOSTILE
    assert len(rows) == len(page.lines)
    with pytest.raises(InputError, match="dense or packed"):
        paginate("text", style="document")[0].symbol_rows()


def test_reading_without_fault_is_said_to_be_that():
    read = perfect(HOSTILE)
    assert (read.fidelity, read.confidence) == (1.0, 1.0)
    assert read.lines == (len(read.drawn[0]),) * 2
    html = write_report([read], "<nano>")
    tags = Page(html).tags
    assert (tags.count("u"), tags.count("s"), tags.count("script")) == (1, 1, 0)  # the legend's
    assert "Read back by &lt;nano&gt;" in html


def test_mistakes_are_counted_and_shown():
    a, b = TOKENIZER.encode("a")[0], TOKENIZER.encode("b")[0]
    read = perfect("banana\nxyz\n", lambda ids: [b if token == a else token for token in ids[:5]], chance=0.25)
    assert read.fidelity < 0.8
    assert read.lines == (2, 3)  # xyz, and the row of the end
    html = write_report([read], "nano")
    tags = Page(html).tags
    assert tags.count("u") == 2 + 1  # two letters, and the word of the legend
    assert tags.count("s") == 2 + 2 + 1  # the letters replaced, the two that were lost, and the legend's
    assert "rgba(255,60,0,0.70)" in html
    assert 'title="0.250"' in html


def test_what_is_not_all_is_not_rounded_to_all(monkeypatch):
    read = perfect("one\n", chance=0.9999999)
    monkeypatch.setattr(ReadBack, "fidelity", property(lambda _: 0.999999))
    assert "fidelity 0.9999 over" in read.describe()
    assert "own confidence 0.9999," in read.describe()
    assert read.summary()["fidelity"] == read.summary()["confidence"] == 0.99999


def test_a_source_may_have_any_name_that_a_file_has(tmp_path):
    read = replace(perfect("one"), name="caf\udce9 <b>")  # how Python gives a name that is not UTF-8
    html = save_report([read], tmp_path, "nano").read_text(encoding="utf-8")
    assert "<h2>caf? &lt;b&gt;</h2>" in html


def test_a_report_needs_nothing_else():
    html = write_report([perfect(HOSTILE), perfect("more")], "nano")
    assert all(link.startswith("data:image/png;base64,") for link in Page(html).links)
    assert Page(html).tags.count("img") == 2
    assert not re.search(r"https?:|@import|url\(", html)


def test_names_among_symbols_and_missing_rows_do_not_break_a_report():
    read = perfect("one\ntwo\n", lambda ids: [0, *ids, 3])
    assert read.fidelity == 1.0
    assert write_report([read], "nano")
    lost = replace(read, read=[complete([], TOKENIZER, vision_tokens=74, side=512)])
    assert lost.fidelity == 0
    assert lost.lines == (0, 3)
    assert Page(write_report([lost], "nano")).tags.count("s") > 8


def test_a_book_is_read_in_part_and_that_is_said(folder):
    engine = Engine.from_pretrained(folder, device="cpu")
    read = read_back(engine, Given("book", "word\n" * 32 * (MOST_READ + 3), "text"))
    assert len(read.pages) == len(read.read) == MOST_READ
    assert read.left_out in (3, 4)  # the end mark may take a page of its own
    assert f"the first of {MOST_READ + read.left_out}" in read.describe()


def test_the_command_reads_back_and_writes_a_report(folder, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    main(["demo", "--checkpoint", str(folder), "-o", "out"])
    out = capsys.readouterr().out
    assert f"read back by {folder}, from vision tokens alone:" in out
    assert "chat: 2 pages, 146 tokens fed" in out
    assert "The pages are in out, the report is out/report.html" in out
    html = (tmp_path / "out" / "report.html").read_text(encoding="utf-8")
    assert Page(html).tags.count("img") == 2
    main(["demo", "--checkpoint", str(folder), "-o", "out", "--json"])
    (chat,) = json.loads(capsys.readouterr().out)
    assert 0 <= chat["read_back"]["fidelity"] <= 1
    assert chat["read_back"]["ratio"] == pytest.approx(chat["text_tokens_estimated"] / 146, abs=0.1)


def test_sources_of_one_name_keep_their_pages_apart(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("optmem.engine.checkpoint.files", lambda _: tmp_path)
    for name in ("a/x.md", "b/x.md", "x.md-2", "chat"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(f"words of {name}\n")
    main(["demo", "a/x.md", "b/x.md", "x.md-2", "chat", "--json"])
    names = ["chat", "x.md", "x.md-2", "x.md-2-2", "chat-2"]
    assert [drawn["source"] for drawn in json.loads(capsys.readouterr().out)] == names
    assert all((tmp_path / "demo" / f"{name}-dense-0001.png").is_file() for name in names)


def test_a_checkpoint_that_is_not_there_is_an_error(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as leaving:
        main(["demo", "--checkpoint", "no-such-folder"])
    assert leaving.value.code == 66
    assert "there is no checkpoint 'no-such-folder'" in capsys.readouterr().err


def test_without_the_shipped_checkpoint_the_demo_says_so(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("optmem.engine.checkpoint.files", lambda _: tmp_path)
    main(["demo"])
    out = capsys.readouterr().out
    assert "Nothing was read back: this copy of optmem comes without the checkpoint 'nano'" in out
    assert "The pages are in demo\n" in out
    assert not (tmp_path / "demo" / "report.html").exists()
