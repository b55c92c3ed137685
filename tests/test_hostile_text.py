"""Text that breaks renderers: each kind has a defined result in every style, and none is lost, clipped or refused."""

import unicodedata

import numpy as np
import pytest

from optmem import paginate
from optmem.pages import read_symbols, symbols

HOSTILE = {
    "empty": "",
    "white space only": " \t\n\n   \t",
    "one long word": "w" * 65_536,
    "lone surrogates": "a\ud800b\udfffc",
    "controls and ANSI": "\x00\x01\x1b[31mred\x1b[0m\x07\x7f\x9b",
    "bidi overrides": "user\u202etxt.exe\u2066x\u2069 שלום مرحبا",
    "combining run": "e" + "\u0301" * 5_000,
    "emoji and joiners": "👩‍👩‍👧‍👦 🏳️‍🌈 🇩🇪 ☺️",
    "no font": "\U00013000\U0001f9ff\u0b85",
    "composed and decomposed": unicodedata.normalize("NFC", "é") + unicodedata.normalize("NFD", "é"),
    "prompt tokens": "<image> <｜end▁of▁sentence｜> <|ref|>x<|/ref|> <row_3>",
    "mixed newlines": "a\r\nb\rc\vd\fe\u2028f\x85g\n",
    "private use and noncharacters": "\ue000\ue041\uf8ff\ufffe\uffff\U0010ffff",
    "blanks that are not spaces": "a\u00a0b\u2003c\u3000d\u200be\ufefff\u2800g",
    "wide at the edge": "x" * 63 + "漢字" * 100,
    "markdown bomb": "> " * 3_000 + "x" + "*_`[" * 500,
}


@pytest.mark.parametrize("name", HOSTILE)
@pytest.mark.parametrize("style", ["dense", "packed"])
def test_cells_lose_nothing(style, name):
    text = HOSTILE[name]
    pages = paginate(text, style=style)
    assert "".join(page.text() for page in pages) == text
    said = "".join(map(chr, np.concatenate([page.characters().symbols for page in pages]).tolist()))
    assert read_symbols(said) == text
    assert said.count(symbols.TEXT_END) == 1


@pytest.mark.parametrize("kind", ["text", "markdown", "code"])
@pytest.mark.parametrize("name", HOSTILE)
def test_documents_draw_it(kind, name):
    text = HOSTILE[name]
    pages = paginate(text, style="document", kind=kind)
    shown = "".join(page.text() for page in pages)
    for page in pages:
        boxes = page.characters().boxes
        assert page.image().shape == (512, 512)
        assert ((boxes >= 0) & (boxes <= 512)).all(), "nothing is drawn outside its page"
    if kind == "markdown":
        assert {char for char in text if char.isalpha()} <= set(shown), "no letter is lost"
    else:
        assert "".join(shown.split()) == "".join(text.split()), "every character that is not white space is shown"


def test_characters_that_nano_cannot_say_are_named():
    (page,) = paginate("a漢é\x00\u0301Ж")
    assert page.missing == ("Ж", "漢")
    assert page.text() == "a漢é\x00\u0301Ж"


def test_missing_characters_are_named_and_others_are_not():
    (page,) = paginate("a漢é\x00\u0301\U00013000", alphabet="any")
    assert "\U00013000" in page.missing
    assert not {"a", "é", "\x00", "\u0301"} & set(page.missing)


def test_ten_megabytes():
    text = "The quick brown fox.\n" * 480_000
    pages = paginate(text, cell="8x8", style="packed")
    assert len(text) > 10_000_000
    assert "".join(page.text() for page in pages) == text
    assert max(span.end for line in pages[-2].lines + pages[-1].lines for span in line.spans) == len(text)
