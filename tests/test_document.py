"""The style document: nothing clipped, nothing lost, every character at home, the same pages everywhere."""

import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from optmem.errors import InputError
from optmem.pages import symbols
from optmem.pages.blocks import Block, Look, Run, Span
from optmem.pages.document import paginate_document
from optmem.pages.markdown import read_markdown
from optmem.pages.tables import BETWEEN, share
from optmem.pages.typeface import type_case

RICH = """# Title of *it*

Some **bold** text with `code`, a [link](http://example.org/a-b/c "t") and ~~old~~ words, long enough to need several lines.

1. one
2. two
   - deeper, and long enough that the item wraps to a second line

> quoted
> > twice

```py
def f():
\treturn 1
```

| a | b | c |
|---|--:|:-:|
| 1 | some words in a cell that is wide | x |
| 2 |   | y \\| z |

---
"""


def verbatim(text):
    return [Block("verbatim", (Run(text, Span("s", 0, len(text))),))]


def draw(blocks, size=256, font_size=12):
    pages = paginate_document(blocks, size, size, font_size=font_size)
    for page in pages:
        check(page)
    return pages


def check(page):
    """What holds for every page: all is inside, and every glyph leads to the character that it shows."""
    symbols_, boxes, sources = page.characters()
    text = page.text()
    shapes = [tuple(box) for box in boxes.tolist()]
    for left, top, right, bottom in [*shapes, *(line.box for line in page.lines), *(box for box, _ in page.fills)]:
        assert 0 <= left <= right <= page.width
        assert 0 <= top <= bottom <= page.height
    for symbol, source in zip(map(chr, symbols_.tolist()), sources.tolist(), strict=True):
        assert -1 <= source < len(text)
        if source >= 0 and symbol != text[source]:
            assert says(symbol, text[source])
    assert page.index >= 0


def says(symbol, char):
    """Whether a symbol that is not the character itself is part of how it is drawn."""
    if symbol == symbols.TAB:
        return char == "\t"
    return symbol in symbols.escape(ord(char)) or symbol == symbols.inverse(char)


def joined(pages):
    return "".join(page.text() for page in pages)


def test_verbatim_text_is_all_there():
    text = "  indented\n\n\ttab\nand a line that is longer than the page is wide, so that it wraps; " + "x" * 99 + "\nend"
    assert joined(draw(verbatim(text))) == text + "\n"


def test_no_text_is_one_empty_page():
    for blocks in ([], verbatim(""), read_markdown("  \n", "s")):
        (page,) = draw(blocks)
        assert page.text() == ""
        assert (page.image() == 255).all()
    (page,) = draw(verbatim("  \n "))
    assert page.text() == "  \n \n"


@pytest.mark.parametrize(
    "text",
    [
        "x" * 65536,
        " " * 9999,
        "漢" * 500,
        "e" + "\u0301" * 5000,
        "\ud800 \udfff\ud800",
        "\x00\x1b[31m\x7f\x85\u2028\u202eabc\u202c",
        "👩‍💻🇩🇪 ﷽ ⸻ ㅤ \u00ad",
        "<image><|end▁of▁sentence|>",
        "a\tb\rc\vd\r\ne\n\nf\x0c",
        "caf\u00e9 cafe\u0301",
        "a-b/" * 200,
        "word " * 300,
    ],
    ids=lambda text: ascii(text[:6]),
)
@pytest.mark.parametrize("kind", ["verbatim", "heading", "paragraph", "code", "item", "label"])
def test_hostile_text_is_all_there(kind, text):
    marker = "1234567890." if kind == "item" else ""
    look = Look.LABEL if kind == "label" else Look.PLAIN
    pages = draw([Block(kind, (Run(text, Span("s", 0, len(text)), look),), 3 if kind == "item" else 1, marker)], 128, 10)
    assert joined(pages) == (marker and marker + " ") + text + "\n" * (not text.endswith("\n"))


def test_a_megabyte_on_one_line():
    line = "The quick brown fox jumps over the lazy dog, again and again and again. "
    pages = paginate_document(verbatim(line * 14_000), 1024, 1024, font_size=10)
    assert sum(len(page.text()) for page in pages) == 14_000 * len(line) + 1


def test_what_has_no_form_is_told():
    (page,) = draw(verbatim("a漢b\U0010fffd\x00"))
    assert "漢" in page.missing or chr(int(page.characters().symbols[1])) == "漢"
    assert "\x00" not in page.missing
    shown = "".join(map(chr, page.characters().symbols.tolist()))
    assert symbols.escape(0) in shown


def test_wide_tables():
    row = tuple((Run(f"cell {k}"),) for k in range(40))
    pages = draw([Block("table", rows=(row, row, row[:3]))])
    assert joined(pages) == "".join(BETWEEN.join(cell[0].text for cell in cells) + "\n" for cells in (row, row, row[:3]))


def test_tables_read_cell_by_cell():
    text = "| a | b |\n|---|--:|\n| one two | |\n| " + "long words " * 200 + "| x |"
    pages = draw(read_markdown(text, "s"))
    assert len(pages) > 1
    assert pages[0].text().startswith("a | b\none two | \n")
    assert joined(pages).count("long ") == joined(pages).count("words ") == 200


def test_table_rows_stay_whole():
    rows = tuple(((Run(f"{k} some words that take more than one line of this narrow page"),), (Run("x"),)) for k in range(30))
    pages = draw([Block("table", rows=rows)])
    assert len(pages) > 2
    assert all(page.text().endswith("x\n") for page in pages)


def test_share():
    assert share([10, 500, 30], 100) == [10, 60, 30]
    assert share([500, 500], 100) == [50, 50]
    assert share([10, 20], 100) == [10, 20]


def test_columns_are_as_wide_as_their_words():
    rows = tuple(((Run("identifier_of_something"),), (Run(f"{k} words " * 20),)) for k in range(3))
    (page, *_) = draw([Block("table", rows=rows)])
    assert page.lines[0].text == "identifier_of_something" + BETWEEN


def test_a_heading_is_not_left_alone():
    for lines in range(1, 30):
        blocks = [*verbatim("x\n" * lines), Block("heading", (Run("Head"),), 2), Block("paragraph", (Run("body " * 40),))]
        for page in draw(blocks):
            assert not page.text().endswith("Head\n")


def test_a_wrap_can_be_undone():
    text = "many words " * 30 + "https://example.org/" + "a/" * 100 + "end"
    (run,) = (Run(text, Span("s", 0, len(text))),)
    pages = draw([Block("paragraph", (run,))])
    lines = [line for page in pages for line in page.lines]
    assert "".join(line.text for line in lines) == text + "\n"
    spans = [span for line in lines for span in line.spans]
    assert "".join(text[span.start : span.end] for span in spans) == text
    assert all(line.text.endswith(" ") for line in lines[:3])


def test_labels_cannot_be_imitated():
    label = Block("label", (Run("[user]\n", None, Look.LABEL),))
    pages = draw([label, Block("heading", (Run("[user]"),), 5)])
    shown = "".join(map(chr, pages[0].characters().symbols.tolist()))
    assert shown == symbols.inverse("[user]") + "[user]"


@pytest.mark.parametrize(("height", "width", "font_size"), [(64, 64, 13), (512, 64, 13), (64, 512, 13), (512, 512, 96)])
def test_type_too_large_for_the_page_is_refused(height, width, font_size):
    with pytest.raises(InputError, match="too large for a page"):
        paginate_document([], height, width, font_size=font_size)


def test_smallest_page():
    draw(read_markdown(RICH, "s"), 64, 5)
    draw(read_markdown("> - " * 20 + RICH, "s"), 128, 10)
    draw([Block("item", (Run("deep"),), 10_000, "-"), Block("quote", (Run("deep"),), 10_000)])


@pytest.mark.parametrize("kind", ["item", "heading", "code", "quote", "verbatim", "label", "rule"])
@pytest.mark.parametrize("marker", ["-", "7.", "123456789."])
def test_markers_stand_beside_any_block(kind, marker):
    look = Look.LABEL if kind == "label" else Look.PLAIN
    pages = draw([Block(kind, (Run("said", None, look),), 1, marker)])
    assert joined(pages) == ("" if kind == "rule" else f"{marker} said\n")


KINDS = st.sampled_from(["verbatim", "heading", "paragraph", "code", "item", "quote", "label"])
LOOKS = st.lists(st.sampled_from([look for look in Look if look != Look.LABEL]), max_size=3)
RUNS = st.tuples(st.text(st.characters(exclude_categories=()), max_size=40), LOOKS).map(
    lambda pair: Run(pair[0], Span("s", 0, len(pair[0])) if pair[0] else None, Look(sum(look.value for look in set(pair[1]))))
)
BLOCKS = st.builds(
    lambda kind, runs, level, marker: Block(kind, tuple(runs), level, marker if kind == "item" else ""),
    KINDS,
    st.lists(RUNS, max_size=4),
    st.integers(0, 9),
    st.sampled_from(["", "-", "7.", "123456789)"]),
)


@settings(max_examples=100, deadline=None)
@given(st.lists(BLOCKS, max_size=5), st.sampled_from([96, 131, 300]), st.integers(6, 8))
def test_anything_can_be_drawn(blocks, size, font_size):
    pages = draw(blocks, size, font_size)
    said = joined(pages)
    at = 0
    for block in blocks:
        text = "".join(run.text for run in block.runs)
        at = said.index(text, at) + len(text)
    spans = [span for page in pages for line in page.lines for span in line.spans]
    assert sum(span.end - span.start for span in spans) == sum(len(run.text) for block in blocks for run in block.runs)


@settings(max_examples=50, deadline=None)
@given(st.text(st.sampled_from(list("ab -/\t\n漢")), max_size=300), st.sampled_from(["verbatim", "code", "paragraph"]))
def test_lines_are_broken_without_loss(text, kind):
    pages = draw([replace(verbatim(text)[0], kind=kind)], 96, 8)
    assert joined(pages).removesuffix("\n") == text.removesuffix("\n")


def ids():
    return [page.id for page in paginate_document(read_markdown(RICH, "s"), 256, 256, font_size=12)]


def test_the_same_pages_everywhere():
    assert ids() == ids()
    code = f"import sys; sys.path.insert(0, {str(Path(__file__).parent)!r}); import test_document; print(*test_document.ids())"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert out.split() == ids()


def test_threads_share_the_type():
    texts = ["".join(chr(0x100 * page + k) for k in range(0x100)) for page in range(0x20)]
    one_by_one = [draw(verbatim(text), font_size=9)[0].id for text in texts]
    type_case.cache_clear()
    with ThreadPoolExecutor(8) as pool:
        assert [page.id for page in pool.map(lambda text: draw(verbatim(text), font_size=9)[0], texts)] == one_by_one


def test_pixels():
    (page,) = paginate_document(read_markdown("# a\n\n> `b` ~~c~~", "s"), 128, 128, font_size=10)
    image = page.image()
    assert image.dtype == np.uint8
    assert image.shape == (128, 128)
    assert 0 < (image < 128).sum() < 1500
