"""Markdown: what is read, that nothing of the source is lost, and that every run knows its place."""

import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from optmem.pages.blocks import Look
from optmem.pages.markdown import read_markdown
from optmem.pages.markdown_inline import MAX_PARSED


def runs_of(blocks):
    return [run for block in blocks for run in (*block.runs, *(run for row in block.rows for cell in row for run in cell))]


def shown(blocks):
    return "".join(run.text for run in runs_of(blocks))


def check_spans(text, blocks):
    for run in runs_of(blocks):
        if run.span is not None:
            assert run.span.source == "s"
            assert 0 <= run.span.start < run.span.end <= len(text)
            if run.span.end - run.span.start == len(run.text):
                assert text[run.span.start : run.span.end] == run.text


def read(text):
    blocks = read_markdown(text, "s")
    check_spans(text, blocks)
    return blocks


def summary(text):
    return [(block.kind, block.level, block.marker, "".join(run.text for run in block.runs)) for block in read(text)]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", []),
        (" \n\t\n", []),
        ("# a *b*", [("heading", 1, "", "a b")]),
        ("a\n=\nb", [("heading", 1, "", "a"), ("paragraph", 0, "", "b")]),
        ("a\nb  \nc\\\nd", [("paragraph", 0, "", "a b\nc\nd")]),
        ("- a\n- b\n\n  c", [("item", 1, "-", "a"), ("item", 1, "-", "b"), ("item", 1, "", "c")]),
        ("3) a\n9) b\n   - c", [("item", 1, "3)", "a"), ("item", 1, "4)", "b"), ("item", 2, "-", "c")]),
        ("- [x] a", [("item", 1, "-", "[x] a")]),
        ("-\n- # a", [("item", 1, "-", ""), ("heading", 1, "-", "a")]),
        ("- > a\n- - b", [("quote", 1, "-", "a"), ("item", 1, "-", ""), ("item", 2, "-", "b")]),
        ("> a\n> > b", [("quote", 1, "", "a"), ("quote", 2, "", "b")]),
        ("```py x\na\n```", [("code", 0, "", "py x\na\n")]),
        ("    a\n\tb", [("code", 0, "", "a\nb\n")]),
        ("<p>\na", [("code", 0, "", "<p>\na")]),
        ("a <b>c</b> ~~d~~", [("paragraph", 0, "", "a <b>c</b> d")]),
        ("---", [("rule", 0, "", "")]),
        ("&amp;&#65;\\*&nope;", [("paragraph", 0, "", "&A*&nope;")]),
        ("[a](b 'c')", [("paragraph", 0, "", 'a <b "c">')]),
        ("[a](a) <http://b>", [("paragraph", 0, "", "a http://b")]),
        ("![a *b*](c)", [("paragraph", 0, "", "[image: a *b* <c>]")]),
        ("[a][b]\n\n[b]: c 'd'", [("paragraph", 0, "", 'a <c "d">'), ("paragraph", 0, "", '[b]: c "d"')]),
        ("[a](javascript:x)", [("paragraph", 0, "", "a <javascript:x>")]),
        ("a\r\nb\rc", [("paragraph", 0, "", "a b c")]),
        ("a\x00b\ud800", [("paragraph", 0, "", "a\x00b\ud800")]),
    ],
)
def test_reads(text, expected):
    assert summary(text) == expected


def test_looks():
    (block,) = read("a **b _c_** `d` ~~e~~ [f](g)")
    looks = {run.text: run.look for run in block.runs}
    assert looks["b "] == Look.BOLD
    assert looks["c"] == Look.BOLD | Look.ITALIC
    assert (looks["d"], looks["e"], looks["f"]) == (Look.CODE, Look.STRIKE, Look.LINK)


def test_tables_keep_every_cell():
    (block,) = read("| a | b |\n|:-:|--:|\n| 1 \\| 2 | `x\\|y` | c | d |\n| e |")
    assert block.aligns == ("center", "right")
    assert [["".join(run.text for run in cell) for cell in row] for row in block.rows] == [
        ["a", "b"],
        ["1 | 2", "x|y", "c | d"],
        ["e", ""],
    ]


def test_spans_lead_to_what_was_written():
    text = '> - a &lt; `b\n>   c` [d](</e f> "g")\r\n>   h'
    said = [(run.text, text[run.span.start : run.span.end]) for run in runs_of(read(text)) if run.span]
    assert said == [
        *((same, same) for same in ("a ",)),
        ("<", "&lt;"),
        *((same, same) for same in (" ", "b", "c", " ", "d", "/e f", "g", "h")),
    ]


def test_too_deep_is_shown_as_it_stands():
    for mark in ("> ", "- ", "1. "):
        text = mark * 10_000 + "deep\n\nafter"
        said = shown(read(text))
        assert "deep" in said
        assert "after" in said


@pytest.mark.parametrize(
    "piece", ["[", "![", "`a``", "*a ", "_a_", "[a](", "<a ", "&amp;", "|", "a|b\n-|-\n", "- - a\n", "[a]: b\n", ">", "\\", "a "]
)
def test_hostile_text_takes_bounded_time(piece):
    text = (piece * 20_000)[:20_000]
    start = time.monotonic()
    read(text)
    assert time.monotonic() - start < 10


def test_a_huge_paragraph_is_shown_as_it_stands():
    text = "*a* [b](c) " * 100_000
    assert len(text) > 1_000_000 > MAX_PARSED
    assert summary(text) == [("paragraph", 0, "", text.strip())]


WORDS = st.text("abcXYZ012éß漢 ", min_size=1, max_size=12).map(str.strip).filter(bool)
INLINES = st.one_of(
    WORDS,
    WORDS.map(lambda word: f"*{word}*"),
    WORDS.map(lambda word: f"**{word}**"),
    WORDS.map(lambda word: f"~~{word}~~"),
    WORDS.map(lambda word: f"`{word}`"),
    st.tuples(WORDS, WORDS).map(lambda pair: f'[{pair[0]}](<{pair[1]}> "{pair[0]}")'),
    WORDS.map(lambda word: f"![{word}](u{word[0]})"),
    WORDS.map(lambda word: f"<i{word[0]}>"),
)
TEXTS = st.lists(INLINES, min_size=1, max_size=5).map(" ".join)
LEAVES = st.one_of(
    TEXTS,
    TEXTS.map(lambda text: f"## {text} ##"),
    st.tuples(TEXTS, TEXTS).map("\n".join),
    st.tuples(WORDS, TEXTS).map(lambda pair: f"```{pair[0]}\n{pair[1]}\n\n  x\n```"),
    st.tuples(WORDS, TEXTS).map(lambda pair: f"| {pair[0]} | b |\n|---|:-:|\n| {pair[1]} | c | {pair[0]} |"),
    TEXTS.map(lambda text: f"<div>\n{text}\n</div>"),
    WORDS.map(lambda word: f"[{word}]: /{word[0]} '{word}'"),
    st.just("---"),
)
BLOCKS = st.recursive(
    LEAVES,
    lambda inner: st.one_of(
        inner.map(lambda text: "> " + text.replace("\n", "\n> ")),
        inner.map(lambda text: "- " + text.replace("\n", "\n  ")),
        st.lists(inner, min_size=1, max_size=3).map("\n\n".join),
    ),
    max_leaves=6,
)


def alphanumerics(text):
    counts = {}
    for char in text:
        if char.isalnum():
            counts[char] = counts.get(char, 0) + 1
    return counts


@settings(max_examples=150, deadline=None)
@given(st.lists(BLOCKS, max_size=4).map("\n\n".join))
def test_nothing_is_lost(text):
    said = alphanumerics(shown(read(text)))
    for char, count in alphanumerics(text).items():
        assert said.get(char, 0) >= count, char


MARKS = st.sampled_from(list("[]()<>*_`~#|-:!&;\\\"' \t\n\r\x000ab.>"))


@settings(max_examples=300, deadline=None)
@given(st.text(st.one_of(MARKS, st.characters(exclude_categories=())), max_size=60))
def test_no_text_is_an_error(text):
    read(text)
