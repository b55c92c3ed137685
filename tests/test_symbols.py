"""Symbols: escapes that can be undone, and private code points that no text can forge."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from optmem.pages import symbols
from optmem.text.characters import ALPHABET


@given(st.integers(0, 0x10FFFF))
def test_an_escape_reads_back_as_its_character(code):
    assert symbols.read_symbols(symbols.escape(code)) == chr(code)


@given(st.lists(st.integers(0, 0x10FFFF)))
def test_escapes_in_a_row_stay_apart(codes):
    assert symbols.read_symbols("".join(map(symbols.escape, codes))) == "".join(map(chr, codes))


@pytest.mark.parametrize(
    ("code", "shown"),
    [
        (0x00, "^@"),
        (0x0D, "^M"),
        (0x1B, "^["),
        (0x7F, "^?"),
        (0x6F22, "U+6F22"),
        (0x1F600, "U+1F600"),
        (0xD800, "U+D800"),
        (0xA0, "U+00A0"),
    ],
)
def test_escape_forms(code, shown):
    assert symbols.plain(symbols.escape(code)) == shown


@pytest.mark.parametrize(
    "char",
    [
        "\x00",
        "\x7f",
        "\x85",
        "\xa0",
        "\xad",
        "\u0301",
        "\u200b",
        "\u200d",
        "\u202e",
        "\u2028",
        "\ufe0f",
        "\ue000",
        "\ud800",
        "\u3000",
    ],
)
def test_what_has_no_visible_form_is_not_drawable(char):
    assert not symbols.is_drawable(ord(char))


@pytest.mark.parametrize("char", [" ", "a", "é", "漢", "—", "😀", "─"])
def test_what_has_a_visible_form_is_drawable(char):
    assert symbols.is_drawable(ord(char))


def test_marks_read_back():
    said = "a" + symbols.TAB + "b" + symbols.LINE_END + symbols.FILL + "漢" + symbols.WIDE_REST + symbols.TEXT_END + "  "
    assert symbols.read_symbols(said) == "a\tb\n漢"


def test_a_misread_end_of_text_hides_nothing():
    assert symbols.read_symbols("a" + symbols.TEXT_END + "b" + symbols.TEXT_END) == "ab"
    assert symbols.read_symbols("a" + symbols.TEXT_END + "b ") == "ab "


def test_a_label_reads_as_its_words_even_where_they_look_like_escapes():
    assert symbols.read_symbols(symbols.inverse("[U+41 ^M]") + "[U+41 ^M]") == "[U+41 ^M][U+41 ^M]"


def test_an_escape_that_names_no_character_stays_what_it_says():
    assert symbols.read_symbols(symbols.inverse("U+110000") + "a") == "U+110000a"
    assert symbols.read_symbols(symbols.inverse("U+" + "F" * 5000)) == "U+" + "F" * 5000


@given(st.text(st.sampled_from(ALPHABET)))
def test_no_symbols_are_too_strange_to_be_read(said):
    assert isinstance(symbols.read_symbols(said), str)


def test_white_on_black_that_means_nothing_is_read_as_plain():
    assert symbols.read_symbols(symbols.inverse("[tool | Ann") + " said " + symbols.inverse("x")) == "[tool | Ann said x"
