"""Markdown to blocks: CommonMark with tables and strikethrough, nothing of the source lost in silence.

Raw HTML, where links lead, definitions, and cells that a table has too many of are shown as text.  What is nested deeper than
MAX_NESTING, and a paragraph longer than MAX_PARSED, is shown as it stands: time is bounded, and no text is an error.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import cast

from markdown_it.token import Token

from optmem.pages.blocks import Align, Block, BlockKind, Cell, Container, Look, Run, cut_run
from optmem.pages.markdown_inline import MAX_NESTING, Paragraph, Source

_TASK = re.compile(r"\[[ xX]\](?=\s)")


def read_markdown(text: str, source: str) -> list[Block]:
    """The blocks of a Markdown text.  Spans count in `text` as it was given, and name it `source`."""
    return _Reader(Source(text, source)).read()


def _lines(token: Token) -> tuple[int, int]:
    assert token.map is not None, f"{token.type} says which lines it is"
    return token.map[0], token.map[1]


def _align(token: Token) -> Align:
    style = str(token.attrs.get("style", "text-align:left"))
    return cast(Align, style.removeprefix("text-align:"))


def _boxed_task(runs: tuple[Run, ...]) -> tuple[Run, ...]:
    """The box of a task, `[x]`, as a run of its own."""
    if not runs or not _TASK.match(runs[0].text):
        return runs
    box, rest = cut_run(runs[0], 0, 3), cut_run(runs[0], 3, len(runs[0].text))
    return Run(box.text, box.span, Look.CODE), rest, *runs[1:]


class _Reader:
    """Walks the tokens of a document.  Blocks are flat; each knows the containers it stands in."""

    def __init__(self, source: Source) -> None:
        self.source = source
        self.blocks: list[Block] = []
        self._nesting: list[Container] = []
        self._numbers: list[int | None] = []  # of every open list the next number; None where it has bullets
        self._marker = ""  # of the item that has shown nothing yet
        self._rows: list[tuple[Cell, ...]] = []
        self._row: list[Cell] = []
        self._aligns: list[Align] = []
        self._cell_end = 0  # in the source

    def read(self) -> list[Block]:
        """All blocks."""
        tokens = self.source.parse()
        for token, following in zip(tokens, [*tokens[1:], *tokens[-1:]], strict=True):
            if token.type in _READERS:
                _READERS[token.type](self, token)
            elif token.type in _INLINE_READERS:
                _INLINE_READERS[token.type](self, token, following)
        return self.blocks

    def _add(self, kind: BlockKind, runs: Sequence[Run] = (), *, level: int = 0, rows: Sequence[tuple[Cell, ...]] = ()) -> None:
        """Adds a block where we are, with the marker of the item that it begins."""
        marker, self._marker = self._marker, ""
        self.blocks.append(Block(kind, tuple(runs), level, marker, tuple(rows), tuple(self._aligns), tuple(self._nesting)))

    def _add_item(self, runs: tuple[Run, ...] = ()) -> None:
        self._add("item", _boxed_task(runs) if self._marker else runs, level=self._nesting.count("item"))

    def _flush_marker(self) -> None:
        """Shows the marker of an item on a line of its own."""
        if self._marker:
            self._add_item()

    def _open_list(self, token: Token) -> None:
        self._flush_marker()
        self._numbers.append(int(token.attrs.get("start", 1)) if token.tag == "ol" else None)

    def _close_list(self, token: Token) -> None:
        assert token.nesting == -1
        self._numbers.pop()

    def _open_item(self, token: Token) -> None:
        number = self._numbers[-1]
        self._nesting.append("item")
        self._marker = "-" if number is None else f"{number}{token.markup}"
        if number is not None:
            self._numbers[-1] = number + 1
        self._read_too_deep(token)

    def _open_quote(self, token: Token) -> None:
        self._nesting.append("quote")
        self._read_too_deep(token)

    def _close_container(self, token: Token) -> None:
        assert token.nesting == -1
        self._flush_marker()
        self._nesting.pop()

    def _read_too_deep(self, token: Token) -> None:
        """The parser skips what is nested too deep: its lines are shown as they stand."""
        if token.level + 1 >= MAX_NESTING:
            first, last = _lines(token)
            start, end = self.source.starts[first], self.source.ends[last - 1]
            self._add("code", [self.source.run(self.source.text[start:end], start, end)])

    def _read_heading(self, token: Token, inline: Token) -> None:
        self._add("heading", self._paragraph(inline).runs(), level=int(token.tag[1:]))

    def _read_paragraph(self, token: Token, inline: Token) -> None:
        assert token.nesting == 1
        runs = self._paragraph(inline).runs()
        where = self._nesting[-1] if self._nesting else "paragraph"
        if where == "item":
            self._add_item(runs)
        else:
            self._add(where, runs, level=self._nesting.count("quote"))

    def _paragraph(self, inline: Token) -> Paragraph:
        return Paragraph.of_lines(self.source, inline.content, _lines(inline)[0])

    def _read_rule(self, token: Token) -> None:
        assert token.type == "hr"
        self._flush_marker()
        self._add("rule")

    def _read_code(self, token: Token) -> None:
        """A fence, indented code, or HTML.  The info string of a fence is a line in italics above the code."""
        first, last = _lines(token)
        info = token.info.strip()
        runs = [self.source.find(info, (first, last), Look.ITALIC), Run("\n")] if info else []
        self._add("code", runs + self._verbatim(token.content, first + (token.type == "fence")))

    def _verbatim(self, content: str, first_line: int) -> list[Run]:
        """Lines as they stand, from `first_line` of the source on, without what containers put before them."""
        start = self.source.starts[min(first_line, len(self.source.starts) - 1)]
        if self.source.text.startswith(content, start):
            return [self.source.run(content, start, start + len(content))]
        runs = []
        for number, line in enumerate(content.removesuffix("\n").split("\n"), first_line):
            runs += self.source.line(line, number)
            runs.append(self.source.line_end(number))
        return runs

    def _read_definition(self, token: Token) -> None:
        """Where a link leads that is written elsewhere: `[label]: target "title"`."""
        lines = _lines(token)
        label, target, title = (str(token.meta[key]) for key in ("label", "url", "title"))
        runs = [Run("["), self.source.find(label, lines), Run("]: ")]
        runs.append(self.source.find(target, lines))
        if title:
            runs += [Run(' "'), self.source.find(title, lines), Run('"')]
        self._add("paragraph", [run for run in runs if run.text])

    def _open_table(self, token: Token) -> None:
        assert token.nesting == 1
        self._rows, self._aligns = [], []

    def _open_row(self, token: Token) -> None:
        self._row, self._cell_end = [], self.source.starts[_lines(token)[0]]

    def _read_cell(self, token: Token, inline: Token) -> None:
        if token.tag == "th":
            self._aligns.append(_align(token))
        cell = Paragraph.of_cell(self.source, inline.content, self._cell_end, self.source.ends[_lines(inline)[0]])
        self._row.append(cell.runs())
        self._cell_end = cell.end

    def _close_row(self, token: Token) -> None:
        """Ends a row.  The parser drops the cells that the head has no column for: they are shown as one more."""
        assert token.nesting == -1
        rest = self.source.rest_of_line(self._cell_end)
        said = rest.strip(" \t|")
        if said:
            start = self._cell_end + rest.find(said)
            self._row.append((self.source.run(said, start, start + len(said)),))
        self._rows.append(tuple(self._row))

    def _close_table(self, token: Token) -> None:
        assert token.nesting == -1
        self._add("table", rows=self._rows)
        self._aligns = []


_READERS: dict[str, Callable[[_Reader, Token], None]] = {
    "bullet_list_open": _Reader._open_list,
    "ordered_list_open": _Reader._open_list,
    "bullet_list_close": _Reader._close_list,
    "ordered_list_close": _Reader._close_list,
    "list_item_open": _Reader._open_item,
    "list_item_close": _Reader._close_container,
    "blockquote_open": _Reader._open_quote,
    "blockquote_close": _Reader._close_container,
    "hr": _Reader._read_rule,
    "fence": _Reader._read_code,
    "code_block": _Reader._read_code,
    "html_block": _Reader._read_code,
    "definition": _Reader._read_definition,
    "table_open": _Reader._open_table,
    "tr_open": _Reader._open_row,
    "tr_close": _Reader._close_row,
    "table_close": _Reader._close_table,
}
_INLINE_READERS: dict[str, Callable[[_Reader, Token, Token], None]] = {
    "heading_open": _Reader._read_heading,
    "paragraph_open": _Reader._read_paragraph,
    "th_open": _Reader._read_cell,
    "td_open": _Reader._read_cell,
}
