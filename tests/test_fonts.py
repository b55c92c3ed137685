"""Fonts: what a font covers is read from its character map, and damaged fonts are refused."""

import numpy as np
import pytest
from PIL import Image, ImageDraw, ImageFont

from optmem.errors import InputError
from optmem.pages.atlas import draw_scaled
from optmem.pages.fonts import SHIPPED, ScalableFont, read_bdf, read_coverage, shipped_font


@pytest.mark.parametrize(
    ("name", "width", "height", "glyphs"), [("spleen-8x16", 8, 16, 837), ("spleen-6x12", 6, 12, 472), ("spleen-5x8", 5, 8, 472)]
)
def test_bitmap_fonts(name, width, height, glyphs):
    font = read_bdf(SHIPPED / f"{name}.bdf")
    assert (font.width, font.height, len(font.glyphs)) == (width, height, glyphs)
    assert {ink.shape for ink in font.glyphs.values()} == {(height, width)}
    assert not font.glyphs[ord(" ")].any()


def test_bitmap_fonts_look_as_freetype_draws_them():
    ours = read_bdf(SHIPPED / "spleen-8x16.bdf")
    theirs = ImageFont.truetype(str(SHIPPED / "spleen-8x16.bdf"), 16)
    for char in "Ag|~é":
        image = Image.new("1", (8, 16))
        ImageDraw.Draw(image).text((0, 0), char, fill=1, font=theirs)
        assert (np.asarray(image) == (ours.glyphs[ord(char)] > 0)).all(), char


@pytest.mark.parametrize("name", ["DejaVuSans", "DejaVuSans-Bold", "DejaVuSansMono"])
def test_coverage(name):
    font = shipped_font(name)
    assert all(font.covers(ord(char)) for char in "Aé—Жλ→")
    assert not any(font.covers(ord(char)) for char in "漢\uffff\U0010ffff")


def test_coverage_agrees_with_what_freetype_draws():
    font = shipped_font("DejaVuSansMono")
    nothing = bytes(font.at(24).getmask("\uffff"))
    for code in range(0x20, 0x500):
        if font.covers(code) and chr(code).isprintable() and not chr(code).isspace() and code < 0x300:
            assert bytes(font.at(24).getmask(chr(code))) != nothing, hex(code)


def load_whole(path):
    read_coverage(path)
    ScalableFont(path).at(12)


@pytest.mark.parametrize(
    "data", [b"", b"not a font", b"\x00\x01\x00\x00\xff\xff" + b"\0" * 40, (SHIPPED / "DejaVuSansMono.ttf").read_bytes()[:5000]]
)
def test_damaged_fonts_are_refused(tmp_path, data):
    path = tmp_path / "broken.ttf"
    path.write_bytes(data)
    with pytest.raises(InputError, match=r"^broken\.ttf is not") as caught:
        load_whole(path)
    assert str(tmp_path) not in str(caught.value)


def test_a_damaged_system_font_is_passed_over(tmp_path, caplog):
    path = tmp_path / "unifont.ttf"
    path.write_bytes(b"junk")
    assert not ScalableFont(path).covers(ord("a"))
    assert "unifont.ttf is not a font" in caplog.text
    with pytest.raises(InputError):
        ScalableFont(path, is_shipped=True).covers(ord("a"))


@pytest.mark.parametrize("size", [(16, 8), (8, 8), (12, 6), (8, 5), (16, 16)])
def test_scaled_characters_fit_their_cell(size):
    height, width = size
    for char in "Жйg—√∫│█Ǻ":
        ink = draw_scaled(shipped_font("DejaVuSansMono"), ord(char), height, width)
        assert ink.shape == size
        assert ink.any()
