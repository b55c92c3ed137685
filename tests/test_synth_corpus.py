"""Text to train on: read, split by name, and held out so that nothing held out was seen."""

import gzip
from random import Random

import pytest

from optmem.errors import InputError, SourceNotFoundError
from optmem.train import corpus as corpora
from optmem.train.corpus import WINDOW, Seen, make_corpus, split, split_of, window_hashes, without_seen
from optmem.train.html_text import read_html, read_program
from optmem.train.sources import SOURCES, Document, Source, as_it_is, drop_repeated_lines, read_docstrings, read_words

LINES = [" ".join(f"{Random(97 * k + j).getrandbits(24):x}" for j in range(14)) for k in range(200)]


def windows(text):
    return {text[k : k + WINDOW] for k in range(len(text) - WINDOW + 1)}


def test_equal_windows_have_equal_hashes():
    text = "\n".join(LINES)
    hashes = window_hashes(text + "!" + text)
    assert (hashes[: len(text) - WINDOW + 1] == hashes[len(text) + 1 :]).all()
    assert len(set(window_hashes(text).tolist())) == len(windows(text))
    assert len(window_hashes("x" * (WINDOW - 1))) == 0


def test_windows_that_were_seen_are_found():
    seen = Seen(["\n".join(LINES[:50])])
    assert seen.find(LINES[10]).all()
    assert not seen.find(LINES[60]).any()
    assert not Seen([]).find(LINES[0]).any()


def test_lines_that_were_seen_are_dropped():
    seen = "\n".join(LINES[:50])
    kept = without_seen("\n".join([*LINES[100:105], *LINES[30:32], "short", *LINES[105:107]]), Seen([seen]))
    assert kept == "\n".join([*LINES[100:105], "short", *LINES[105:107]])


def test_windows_that_dropping_makes_are_dropped_too():
    seen = "one line of text that stands alone\nand another that stands below it"
    kept = without_seen(seen.replace("\n", f"\n{LINES[0]}\n"), Seen([seen, LINES[0]]))
    assert not windows(kept) & (windows(seen) | windows(LINES[0]))


def test_the_split_is_frozen():
    names = [f"source/{k}.html" for k in range(2000)]
    held = [name for name in names if split_of(name) == "held-out"]
    assert 50 < len(held) < 110
    assert held[:3] == ["source/53.html", "source/80.html", "source/131.html"]


def test_nothing_held_out_was_seen():
    documents = [Document(f"d/{k}", "prose", "\n".join(LINES[k : k + 40])) for k in range(160)]
    sides = split([*documents, *(Document(f"e/{k}", "prose", f"{LINES[k][::-1]}\n" * 9) for k in range(160))])
    seen = {window for document in sides["train"] for window in windows(document.text)}
    assert sides["held-out"]
    assert not any(windows(document.text) & seen for document in sides["held-out"])


def test_a_corpus_survives_the_disk(tmp_path, monkeypatch):
    documents = [Document(f"d/{k}", "prose", "\n".join(LINES[k : k + 8])) for k in range(0, 160, 8)]
    documents.append(Document("d/words", "prose", "Here are some words, " * 12))
    documents.append(Document("e/held", "prose", "Words of its own é, and then some more of them. " * 10))
    monkeypatch.setattr(corpora, "collect", lambda: documents)
    monkeypatch.setattr(corpora, "read_words", list)
    monkeypatch.setattr(corpora, "split_of", lambda name: "held-out" if name == "e/held" else "train")
    made = corpora.open_corpus(tmp_path)
    assert made == corpora.load(tmp_path)
    assert made.fingerprint != corpora.open_corpus(tmp_path, "held-out").fingerprint
    assert "some" in made.words
    assert made.code == made.prose  # where there is no code


def test_what_is_not_there_is_said(tmp_path):
    with pytest.raises(SourceNotFoundError, match="holds no corpus"):
        corpora.load(tmp_path)
    with pytest.raises(InputError, match="side must be one of"):
        corpora.load(tmp_path, "test")
    assert read_words(tmp_path / "none") == []
    assert list(Source("s", "MIT", "p", tmp_path / "none", ("*",), "prose", as_it_is).documents()) == []


def test_long_lines_are_kept_once():
    footer = "This line stands at the foot of every page."
    documents = [Document(str(k), "prose", f"{LINES[k]}\n{LINES[k + 50]}\nshort\n{footer}") for k in range(3)]
    texts = [document.text for document in drop_repeated_lines(documents)]
    assert "".join(texts).count(footer) == 1
    assert all("short" in text for text in texts)


def test_sources_are_read(tmp_path):
    (tmp_path / "a.txt.gz").write_bytes(gzip.compress(("\r\n".join(LINES[:9])).encode()))
    (tmp_path / "b.txt.gz").write_bytes(gzip.compress(b"too short"))
    source = Source("s", "MIT", "p", tmp_path, ("*.gz",), "prose", as_it_is)
    assert [(document.name, document.text) for document in source.documents()] == [("s/a.txt.gz", "\n".join(LINES[:9]))]


def test_every_source_has_a_licence_that_lets_a_model_be_shipped():
    assert {source.licence for source in SOURCES} <= {"PSF-2.0", "public domain", "PostgreSQL", "MIT or Apache-2.0"}


def test_docstrings_are_prose():
    program = f'"""{LINES[0]} {LINES[1]}\n\n    Indented.\n    """\ndef f():\n    "short"\n    return b"x"\n'
    assert read_docstrings(program) == f"{LINES[0]} {LINES[1]}\n\nIndented."
    assert read_docstrings("not python (") == ""


def test_html_becomes_lines():
    page = """<html><head><title>no</title></head><body><nav>menu</nav><main><h2>Head<a>§</a></h2><p>Some
      <b>bold</b> &amp; plain.</p><ul><li>one<li>two</ul><table><tr><td>a<td>b</table><pre>x  = 1
  y</pre><script>no()</script></main></body></html>"""
    assert read_html(page) == "## Head\n\nSome bold & plain.\n\n- one\n- two\na | b\n\nx  = 1\n  y\n"
    assert read_program('<pre class="rust"><code><span class="kw">fn</span> f(x: &amp;u8) {}</code></pre>') == "fn f(x: &u8) {}"


def test_words_come_from_the_text_where_there_is_no_list():
    assert make_corpus([Document("d", "prose", "some words 12 here")]).words == ("here", "some", "words")
