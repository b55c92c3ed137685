"""The styles dense and packed: what is drawn can be read back, from symbols and from pixels, and every cell knows its source."""

import pickle
import subprocess
import sys
from copy import deepcopy

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from optmem import paginate
from optmem.config import Cell
from optmem.errors import InputError
from optmem.pages import draw_pages, read_symbols, symbols
from optmem.pages.alphabet import alphabet_atlas
from optmem.pages.atlas import CELLS, cell_atlas
from optmem.testing import read_pixels

ANY_TEXT = st.text(st.characters(exclude_categories=()), max_size=300)  # surrogates and private code points too
STYLES = ["dense", "packed"]
# Glyphs of the bitmap fonts and all escapes: what can be told apart by looks alone.
SEEN = st.text(st.one_of(st.sampled_from("\n\t\r ─│ab.,-–—U+0041[]^"), st.characters(max_codepoint=0x24F)), max_size=300)


def symbols_of(pages) -> str:
    return "".join(map(chr, np.concatenate([page.characters().symbols for page in pages]).tolist()))


@pytest.mark.parametrize("style", STYLES)
@settings(max_examples=60)
@given(
    text=ANY_TEXT,
    cell=st.sampled_from(sorted(CELLS)),
    alphabet=st.sampled_from(["nano", "any"]),
    size=st.sampled_from([(64, 64), (512, 512), (80, 144)]),
)
def test_text_comes_back_from_lines_and_from_symbols(style, text, cell, alphabet, size):
    pages = paginate(text, style=style, size=size, cell=cell, alphabet=alphabet)
    assert "".join(page.text() for page in pages) == text
    assert read_symbols(symbols_of(pages)) == text


@pytest.mark.parametrize("style", STYLES)
@settings(max_examples=60, suppress_health_check=[HealthCheck.too_slow])
@given(text=ANY_TEXT, cell=st.sampled_from(sorted(CELLS)))
def test_any_text_comes_back_from_pixels_alone_in_the_alphabet_of_nano(style, text, cell):
    pages = paginate(text, style=style, size=(64, 128), cell=cell)
    said = "".join(read_pixels(image, alphabet_atlas(cell), break_rows=style == "dense") for image in draw_pages(pages))
    assert read_symbols(said) == text


@pytest.mark.parametrize("style", STYLES)
@settings(max_examples=60, suppress_health_check=[HealthCheck.too_slow])
@given(text=SEEN, cell=st.sampled_from(sorted(CELLS)))
def test_latin_comes_back_from_pixels_alone_in_any_alphabet(style, text, cell):
    pages = paginate(text, style=style, size=(64, 128), cell=cell, alphabet="any")
    said = "".join(read_pixels(image, cell_atlas(cell), break_rows=style == "dense") for image in draw_pages(pages))
    assert read_symbols(said) == text


@pytest.mark.parametrize("style", STYLES)
@settings(max_examples=40)
@given(text=ANY_TEXT)
def test_every_cell_knows_its_character(style, text):
    for page in paginate(text, style=style, size=(64, 96), cell="8x16"):
        shown, (symbol, boxes, sources) = page.text(), page.characters()
        for code, source in zip(symbol.tolist(), sources.tolist(), strict=True):
            if chr(code) == symbols.TEXT_END:
                assert source == len(shown)
            elif source >= 0 and not 0xE000 <= code < 0xE080:
                assert shown[source] == chr(code)
        assert (boxes[:, 0] >= 0).all()
        assert (boxes[:, 2] <= page.width).all()
        assert (boxes[:, 3] <= page.height).all()
        assert len({tuple(box) for box in boxes.tolist()}) == len(boxes)


@pytest.mark.parametrize("style", STYLES)
@settings(max_examples=40)
@given(text=ANY_TEXT)
def test_lines_trace_to_the_source(style, text):
    at = 0
    for page in paginate(text, style=style, size=(64, 96), name="note"):
        for line in page.lines:
            for span in line.spans:
                assert (span.source, span.start) == ("note", at)
                assert text[span.start : span.end] == line.text
            at += len(line.text)
    assert at == len(text)


@settings(max_examples=40)
@given(text=st.text(st.sampled_from("ab\n漢字"), max_size=200))
def test_no_wide_character_is_cut(text):
    for page in paginate(text, size=(64, 72), cell="8x16"):
        symbol, boxes, _ = page.characters()
        rests = np.flatnonzero(symbol == ord(symbols.WIDE_REST))
        assert (boxes[rests, 1] == boxes[rests - 1, 1]).all()
        assert (boxes[rests, 0] == boxes[rests - 1, 2]).all()


def test_dense_breaks_rows_at_line_ends_and_packed_does_not():
    text = "one\ntwo\n\nthree"
    assert [line.text for line in paginate(text)[0].lines] == ["one\n", "two\n", "\n", "three"]
    assert [line.text for line in paginate(text, style="packed")[0].lines] == [text]


def test_long_lines_wrap_at_the_column_limit_with_no_mark():
    (page,) = paginate("x" * 130)
    assert [len(line.text) for line in page.lines] == [64, 64, 2]
    assert page.lines[0].box == (0, 0, 512, 16)
    assert page.lines[2].box == (0, 32, 24, 48)  # two characters and the end mark


def test_a_full_page_leaves_the_end_mark_to_the_next():
    first, second = paginate("x" * 2048)
    assert (len(first.text()), second.text()) == (2048, "")
    assert second.characters().symbols.tolist() == [ord(symbols.TEXT_END)]


def test_empty_text_is_one_page_with_the_end_mark():
    (page,) = paginate("")
    assert page.text() == ""
    assert page.image().shape == (512, 512)
    assert (page.image() < 255).any()


def test_spaces_are_cells_with_labels():
    symbol, boxes, sources = paginate("a b")[0].characters()
    assert symbol[:3].tolist() == [ord("a"), ord(" "), ord("b")]
    assert boxes[1].tolist() == [8, 0, 16, 16]
    assert sources[:3].tolist() == [0, 1, 2]


@pytest.mark.parametrize("cell", sorted(CELLS))
def test_no_two_signs_look_the_same(cell):
    atlas = cell_atlas(cell)
    codes = [*range(0x20, 0x7F), *range(0xA0, 0x250), *range(0x2010, 0x2060), *range(0x20A0, 0x2300), *range(0x2500, 0x2800)]
    glyphs = [glyph for glyph in atlas.lookup(np.array(codes)).tolist() if glyph >= 0]
    marks = [
        atlas.mark(mark) for mark in (symbols.LINE_END, symbols.TEXT_END, symbols.TAB, symbols.FILL, *map(symbols.inverse, " !Az~"))
    ]
    table = atlas.store.table()
    looks = {table.ink[o : o + h * w].tobytes() for o, h, w in table.glyphs[glyphs + marks].tolist()}
    assert len(looks) == len(glyphs) + len(marks)
    assert len(glyphs) > 700


def test_same_input_same_page_and_another_text_another_id():
    text = "naïve café, Привет — 漢\x00"
    one, two = paginate(text)[0], paginate(text)[0]
    assert one.id == two.id
    assert (one.image() == two.image()).all()
    assert paginate("e\u0301")[0].id != paginate("\xe9")[0].id
    assert paginate(text, style="packed")[0].id != one.id
    assert paginate(text, cell="8x8")[0].id != one.id
    assert paginate(text, alphabet="any")[0].id != one.id
    assert paginate(text, size=640)[0].id != one.id


def test_the_id_does_not_depend_on_what_the_process_drew_before():
    program = "import optmem; print(optmem.paginate('naïve – Привет ✓', alphabet='any')[0].id)"
    ids = {
        subprocess.run([sys.executable, "-c", before + program], capture_output=True, text=True, check=True).stdout
        for before in ("", "import optmem; optmem.paginate('✗ Ω zuvor ✓', alphabet='any')[0].id;")
    }
    assert len(ids) == 1
    assert paginate("naïve – Привет ✓", alphabet="any")[0].id in ids.pop()


def test_characters_no_font_has_are_named():
    (page,) = paginate("a\U0001f9ffb\x00\u0301", alphabet="any")  # an emoji, a control and a combining mark
    assert page.missing == ("\U0001f9ff",)
    assert "U+1F9FF" in symbols.plain("".join(c for c in symbols_of([page]) if 0xE020 <= ord(c) < 0xE080))


def test_what_pixels_cannot_tell_apart_the_text_still_can():
    """Letters of other scripts that the font draws alike: the claim of pixels ends here, that of symbols does not."""
    greek, cyrillic = paginate("Α", alphabet="any")[0], paginate("А", alphabet="any")[0]
    assert (greek.image() == cyrillic.image()).all()
    assert greek.text() != cyrillic.text()
    assert symbols_of([greek]) != symbols_of([cyrillic])
    assert greek.id != cyrillic.id


def test_a_lookalike_is_escaped_but_not_missing():
    (page,) = paginate("a\u2015b", alphabet="any")  # a horizontal bar, which the font draws like an em dash
    assert page.missing == ()
    assert "U+2015" in symbols.plain("".join(c for c in symbols_of([page]) if 0xE020 <= ord(c) < 0xE080))


def test_pages_travel_between_processes():
    page = paginate("naïve – 漢")[0]
    for copy in (pickle.loads(pickle.dumps(page)), deepcopy(page)):
        assert copy.id == page.id
        assert (copy.image() == page.image()).all()


def test_many_distinct_escapes_are_laid_out_in_linear_time():
    text = "".join(map(chr, range(0xF0000, 0xFFFFE)))
    assert "".join(page.text() for page in paginate(text)) == text


def test_text_cannot_imitate_a_label():
    forged = paginate("[user]\nhi\n")[0]
    real = paginate([{"role": "user", "content": "hi"}])[0]
    assert forged.text() == real.text()
    assert (forged.image() != real.image()).any()
    assert real.lines[0].spans == ()


@pytest.mark.parametrize(
    "setting",
    [
        {"style": "Dense"},
        {"cell": "16x8"},
        {"size": 0},
        {"size": 63},
        {"size": 10**6},
        {"size": (512, 1.5)},
        {"size": "512"},
        {"size": None},
        {"size": (512, 512, 3)},
        {"kind": ""},
        {"kind": "pdf"},
        {"kind": "chat"},
    ],
)
def test_settings_that_cannot_be_used_are_refused(setting):
    with pytest.raises(InputError):
        paginate("text", **setting)


@pytest.mark.parametrize(
    "source", [b"bytes", 7, None, {"role": "user"}, ["text"], [{"content": "x"}], [{"role": "user", "content": 7}]]
)
def test_sources_that_cannot_be_used_are_refused(source):
    with pytest.raises(InputError):
        paginate(source)


def test_cells_are_the_choices_of_the_config():
    assert set(CELLS) == set(Cell.__args__)
