"""Output parsing: both tag forms, pages, boxes in pixels; and whatever else a model may write."""

import time

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from optmem.errors import InputError
from optmem.text.parse import MAX_BOXES, Box, Region, clean, parse_output, plain_text
from optmem.text.tokenizer import DET, DET_END, EOS, REF, REF_END

SIZE = (1000, 2000)


def v1(label, boxes, text=""):
    return f"{REF}{label}{REF_END}{DET}{boxes}{DET_END}\n{text}"


def ul(label, box, text=""):
    return f"{DET}{label} {box}{DET_END}{text}"


def regions(text, size=SIZE):
    return parse_output(text, [size]).regions


def test_blocks_of_v1():
    answer = (
        v1("title", "[[0, 0, 999, 500]]", "# Heading\n\n")
        + v1("image", "[[10, 20, 30, 40], [1,2,3,4]]")
        + v1("text", "[[5, 6, 7, 8]]", "Body.")
    )
    reading = parse_output(answer, [SIZE])
    assert reading.regions == (
        Region("title", (Box(0, 0, 1000, 1001),), "# Heading"),
        Region("image", (Box(10, 40, 30, 80), Box(1, 4, 3, 8)), ""),
        Region("text", (Box(5, 12, 7, 16),), "Body."),
    )
    assert reading.text == "# Heading\n\nBody."
    assert (reading.num_pages, reading.num_malformed) == (1, 0)


def test_blocks_of_ul():
    answer = (
        "<PAGE>"
        + ul("title", "[0, 0, 999, 999]", "One")
        + "\n"
        + ul("text block", "[1, 2, 3, 4]", "Two\n")
        + "<PAGE>"
        + ul("text", "[0,0,1,1]", "Three")
    )
    reading = parse_output(answer, [SIZE, (100, 100)], has_pages=True)
    assert reading.regions == (
        Region("title", (Box(0, 0, *SIZE),), "One", 0),
        Region("text block", (Box(1, 4, 3, 8),), "Two", 0),
        Region("text", (Box(0, 0, 0, 0),), "Three", 1),
    )
    assert (reading.text, reading.num_pages, reading.num_malformed) == ("One\n\nTwo\n\nThree", 2, 0)


@pytest.mark.parametrize(
    "text", ["", "   \n", "plain text", "# Markdown\n\n- a\n- b [1, 2, 3, 4]", "a < b | c > d", "2 \\[ x^2 \\]"]
)
def test_words_without_tags_are_kept(text):
    assert plain_text(text) == (text if text.strip() else "")
    assert all(region.label == "" and region.boxes == () for region in regions(text))


@pytest.mark.parametrize(
    "table", ["<table><tr><td>1</td><td></td></tr></table>", "| a | b |\n|---|---|\n| 1 | 2 |", "```py\n    x = [1, 2]\n```"]
)
def test_tables_and_code_are_kept(table):
    assert plain_text(v1("table", "[[0, 0, 9, 9]]", table)) == table


def test_a_page_mark_is_a_word_to_the_other_families():
    text = "UL writes <PAGE> before every page.<PAGE>"
    reading = parse_output(text, [SIZE])
    assert (reading.text, reading.num_pages) == (text, 1)
    assert plain_text(text) == text
    assert plain_text(text, has_pages=True) == "UL writes \n\n before every page."


@pytest.mark.parametrize(
    ("answer", "num_pages"),
    [
        ("", 1), ("<PAGE>", 1), ("one", 1), ("<PAGE>one", 1), ("<PAGE>one<PAGE>", 1), ("<PAGE>one<PAGE>\n" + EOS, 1),
        ("<PAGE>one<PAGE>two", 2), ("<PAGE>one<PAGE>two<PAGE>", 2), ("<PAGE>one<PAGE><PAGE>three", 3),
        ("<PAGE>one" + "<PAGE>" * 9, 1), ("<PAGE>one<PAGE>" + DET + "image [1, 2, 3, 4]" + DET_END, 2),
    ],
)  # fmt: skip
def test_behind_a_page_mark_stands_a_page_or_nothing(answer, num_pages):
    reading = parse_output(answer, [SIZE], has_pages=True)
    assert reading.num_pages == num_pages
    assert all(region.page < num_pages for region in reading.regions)


CODE = "```py\na = 1\n\n\n\nb = 2 \\coloneqq\n```"


@pytest.mark.parametrize(
    ("text", "cleaned"),
    [
        (CODE, CODE),
        (f"a\n\n\n\n{CODE}\n\n\n\nb\n\n\n", f"a\n\n{CODE}\n\nb\n\n"),
        (f"{CODE}\n\n\n\n{CODE}", f"{CODE}\n\n{CODE}"),
        ("- a\n\n  ~~~ `\n\n\n  ~~~", "- a\n\n  ~~~ `\n\n  ~~~"),  # no fence: an info string has no backtick
        ("  ~~~~ c\n```\n\n\n\n~~~\n~~~~~ \n\n\n", "  ~~~~ c\n```\n\n\n\n~~~\n~~~~~ \n\n"),  # ends with as many, or more
        ("```\na\n\n\n\nb", "```\na\n\n\n\nb"),  # cut: what follows would have been code
        ("```a```\n\n\nb", "```a```\n\nb"),  # code in a line
        ("``\n\n\n``", "``\n\n``"),
    ],
)
def test_code_is_kept_as_it_stands(text, cleaned):
    assert clean(text) == cleaned
    assert plain_text(text) == cleaned.strip("\n")


def test_clean_ups():
    assert plain_text("a \\coloneqq b \\eqqcolon c") == "a := b =: c"
    assert plain_text("a\n\n\n\nb\n\nc\nd" + EOS) == "a\n\nb\n\nc\nd"


@pytest.mark.parametrize("side", [1, 2, 640, 999, 1000, 1024, 1653, 65535])
def test_boxes_are_scaled_as_the_public_scripts_do(side):
    for value in range(1000):
        [region] = regions(ul("text", f"[0, 0, {value}, {value}]"), (side, 3))
        assert region.boxes == (Box(0, 0, int(value / 999 * side), int(value / 999 * 3)),)


@pytest.mark.parametrize(
    ("box", "pixels"),
    [
        ("[999, 999, 999, 999]", (1000, 2000, 1000, 2000)),
        ("[1000, 1000, 1000, 1000]", (1000, 2000, 1000, 2000)),
        ("[ 1 ,\n2 ,3 , 4 ]", (1, 4, 3, 8)),
        ("[1.9, 2., 3.5, 4.000001]", (1, 4, 3, 8)),
        ("[0001, 02, 3, 4]", (1, 4, 3, 8)),
        ("[1, 2, 3, 4", (1, 4, 3, 8)),  # of the two brackets around it one is enough
        ("1, 2, 3, 4]", (1, 4, 3, 8)),
    ],
)
def test_boxes_that_are_read(box, pixels):
    [region] = regions(v1("text", f"[{box}]"))
    assert region.boxes == (Box(*pixels),)


@pytest.mark.parametrize(
    "box",
    [
        "[]", "[1, 2, 3]", "[1, 2, 3, 4, 5]", "[1001, 1, 1002, 2]", "[99999, 1, 2, 3]", "[-1, 2, 3, 4]",
        "[NaN, 1, 2, 3]", "[nan, inf, 1, 2]",
        "[5, 2, 3, 4]", "[1, 5, 3, 4]", "[1e2, 1, 200, 2]", "[1 2 3 4]", "[a, b, c, d]", "[1, 2, 3, ]", "[0x1, 2, 3, 4]",
        "[١, ٢, ٣, ٤]", "[²,2,3,4]", "[__import__('os').system('x'), 1, 2, 3]", "[" + "9" * 10_000 + ", 1, 2, 3]",
        "[1, 2, 3, 4.12345678901]", "[None]",
    ],
    ids=lambda box: box[:24],
)  # fmt: skip
def test_boxes_that_are_none(box):
    reading = parse_output(v1("text", f"[{box}]", "kept"), [SIZE])
    assert [(region.label, region.boxes, region.text) for region in reading.regions] == [("text", (), "kept")]
    assert reading.num_malformed > 0


def test_good_boxes_beside_bad_ones():
    reading = parse_output(v1("text", "[[1, 2, 3, 4], [x], [5, 6, 7, 8]]"), [SIZE])
    assert reading.regions[0].boxes == (Box(1, 4, 3, 8), Box(5, 12, 7, 16))
    assert reading.num_malformed == 1


@pytest.mark.parametrize(
    ("answer", "text"),
    [
        (f"{REF}title with no end. Text", "title with no end. Text"),
        (f"{REF}one{REF}two{REF_END}three", "onetwothree"),
        (f"{DET}[[1, 2, 3, 4]] text", "text"),
        (f"{DET}[[1, 2, 3, 4]] 12 items", "12 items"),
        (f"{DET}[[1, 2, 3, 4 items", "items"),
        (f"{DET}[1 of 3] items", "[1 of 3] items"),
        (f"{DET}12, 13 and 14 items", "12, 13 and 14 items"),
        (f"{DET}1, 2, 3", "1, 2, 3"),
        (f"{DET}text [1, 2, 3, 4] Words", "text [1, 2, 3, 4] Words"),
        (f"{DET}[[1, 2, 3", ""),
        (f"before{REF_END}after", "beforeafter"),
        (f"before{DET_END}after", "beforeafter"),
        (f"the {REF}word{REF_END} without a box", "the word without a box"),
        (f"the {REF}word{REF_END}", "the word"),
        (f"{REF}a{REF_END} b {DET}c [1, 2, 3, 4]{DET_END}d", "a b \n\nd"),
        (f"{REF}a{REF_END}\n{DET}[[1,2,3,4]]{DET_END}text", "text"),
        (f"{REF}a{REF_END}{DET}[[1, 2", ""),
        (f"{REF}a{DET}[[1,2,3,4]]{DET_END}text", "a\n\ntext"),
        (f"{REF}a{REF_END}{REF_END}{DET_END}text{DET}", "atext"),
        (f"{REF}{REF_END}{DET}{DET_END}", ""),
        (f"a{DET}{DET}{DET}b", "ab"),
        (f"<PAGE><PAGE>{REF}", ""),
        (f"{REF}2024 was{EOS}", "2024 was"),
    ],
)
def test_unbalanced_tags_are_removed_and_words_kept(answer, text):
    assert plain_text(answer, has_pages=True) == text


def test_a_box_without_an_end_leaves_the_next_its_own():
    found = regions(f"{REF}title{REF_END}{DET}[[1, 2{DET}text [1, 2, 3, 4]{DET_END}words")
    assert found == (Region("title", (), ""), Region("text", (Box(1, 4, 3, 8),), "words"))


def test_a_hundred_thousand_boxes():
    start = time.perf_counter()
    [region] = regions(v1("text", "[" + "[1, 2, 3, 4], " * 100_000 + "]", "kept"))
    assert (len(region.boxes), region.text) == (MAX_BOXES, "kept")
    assert len(regions(ul("text", "[1, 2, 3, 4]", "x") * 50_000)) == 50_000
    assert time.perf_counter() - start < 10


@pytest.mark.parametrize(
    "filler", ["[", "]", "[[", "<|", "[1,", "[1" + " " * 50, "<PAGE>", REF, DET, DET_END, " ", "\n", "\\", "[ [", "1" * 9,
               "~", "`", "~~~ ", "```\n", "~~~a\n", REF_END + " "]
)  # fmt: skip
@pytest.mark.parametrize("around", ["{}", DET + "{}", DET + "{}" + DET_END, REF + "{}" + REF_END])
def test_long_nonsense_takes_linear_time(filler, around):
    start = time.perf_counter()
    for end in ("", "`"):
        parse_output(around.format(filler * (200_000 // len(filler))) + end, [SIZE], has_pages=True)
    assert time.perf_counter() - start < 3


@pytest.mark.parametrize("sizes", [[], [(0, 1)], [(1, -1)]])
def test_pictures_without_pixels_are_refused(sizes):
    with pytest.raises(InputError):
        parse_output("", sizes)


PIECES = st.one_of(
    st.sampled_from(
        [
            REF,
            REF_END,
            DET,
            DET_END,
            "<PAGE>",
            EOS,
            "[",
            "]",
            "[[",
            "]]",
            ", ",
            "999",
            "1000",
            "-1",
            "NaN",
            "1e400",
            "title",
            "\n",
            "<td>",
        ]
    ),
    st.text(max_size=6),
    st.lists(st.integers(-5, 1005), max_size=5).map(str),
)


@given(st.lists(PIECES, max_size=40).map("".join), st.integers(1, 70_000), st.integers(1, 70_000))
@example("\ud800" + DET + "[[\udfff]]" + DET_END, 1, 1)
def test_anything_is_parsed(text, width, height):
    reading = parse_output(text, [(width, height)], has_pages=True)
    for region in reading.regions:
        assert 0 <= region.page < reading.num_pages
        for box in region.boxes:
            assert 0 <= box.left <= box.right <= width
            assert 0 <= box.top <= box.bottom <= height


@given(
    st.lists(
        st.tuples(
            st.sampled_from(["title", "text", "image"]),
            st.lists(st.tuples(*[st.integers(0, 499)] * 4), min_size=1, max_size=3),
            st.text("ab c.", max_size=9),
        )
    )
)
def test_what_is_written_well_is_read_back(blocks):
    spans = [[[x, y, x + w, y + h] for x, y, w, h in boxes] for _, boxes, _ in blocks]
    answer = "".join(v1(label, boxes, text + "\n") for (label, _, text), boxes in zip(blocks, spans, strict=True))
    reading = parse_output(answer, [(999, 999)])
    assert reading.num_malformed == 0
    assert [region.label for region in reading.regions] == [label for label, _, _ in blocks]
    assert [region.text for region in reading.regions] == [text for _, _, text in blocks]
    assert [[[b.left, b.top, b.right, b.bottom] for b in region.boxes] for region in reading.regions] == [
        [[int(v / 999 * 999) for v in box] for box in boxes] for boxes in spans
    ]
