"""What stands inside a paragraph of Markdown, as runs that know their place in the source.

The parser says which lines a paragraph comes from, not where in them a token lies.  Tokens come in the order of the text, so a
cursor that moves through the paragraph finds each of them.
"""

from __future__ import annotations

import re
from bisect import bisect_right
from collections.abc import Callable, Iterator, Mapping
from functools import cache
from typing import Any

from markdown_it import MarkdownIt
from markdown_it.rules_inline import StateInline, autolink, image, link
from markdown_it.token import Token

from optmem.pages.blocks import Look, Run, Span

MAX_PARSED = 1 << 16  # code points of a paragraph that is parsed; longer ones are shown as they stand.  The worst cost 30 us each
MAX_NESTING = 20  # quotes and lists inside each other, for which the parser recurses

Rule = Callable[[StateInline, bool], bool]


def _noting_its_end(rule: Rule) -> Rule:
    """A rule that also says where in the paragraph it ended: not all that it consumed becomes tokens."""

    def noting(state: StateInline, silent: bool) -> bool:
        matched = rule(state, silent)
        if matched and not silent:
            state.tokens[-1].meta["end"] = state.pos
        return matched

    return noting


class _Parser(MarkdownIt):
    """Links are shown, never followed: all are valid, and written as the source has them."""

    def normalizeLink(self, url: str) -> str:  # noqa: N802
        return url

    def normalizeLinkText(self, link: str) -> str:  # noqa: N802
        return link

    def validateLink(self, url: str) -> bool:  # noqa: ARG002, N802
        return True


@cache
def parser() -> MarkdownIt:
    """CommonMark with tables and strikethrough.  Parses blocks; what is inside a paragraph is parsed where it is shown."""
    parser = _Parser("commonmark", {"inline_definitions": True, "maxNesting": MAX_NESTING}).enable(["table", "strikethrough"])
    parser.core.ruler.enableOnly(["block"])
    for name, rule in (("link", link), ("image", image), ("autolink", autolink)):
        parser.inline.ruler.at(name, _noting_its_end(rule))
    parser.inline.parse("a", parser, {}, parser.parse("a"))  # compiles the rules before threads share them
    return parser


class Source:
    """The text of a document, its lines, and runs of it."""

    def __init__(self, text: str, name: str) -> None:
        self.text, self.name = text, name
        ends = list(re.finditer(r"\r\n?|\n", text))
        self.starts = [0, *(end.end() for end in ends)]
        self.ends = [*(end.start() for end in ends), len(text)]
        self.targets: dict[str, tuple[int, int]] = {}  # where links that are defined elsewhere are defined, as lines

    def parse(self) -> list[Token]:
        """The tokens of all blocks."""
        env: dict[str, Any] = {}
        tokens = parser().parse("\n".join(self.text[slice(*line)] for line in zip(self.starts, self.ends, strict=True)), env)
        self.references: Mapping[str, Any] = env
        self.targets = {target["href"]: tuple(target["map"]) for target in env.get("references", {}).values()}
        return tokens

    def run(self, text: str, start: int, end: int, look: Look = Look.PLAIN) -> Run:
        """What the source says at start:end.  Where the lengths differ it is said there in other characters."""
        said = self.text[start:end]
        is_there = bool(said) and (said == text or len(said) != len(text))
        return Run(text, Span(self.name, start, end) if is_there else None, look)

    def find(self, text: str, lines: tuple[int, int], look: Look = Look.PLAIN, *, after: int = 0) -> Run:
        """Text that stands somewhere in these lines; where it is not found as it is, its span is all of them."""
        start, end = max(self.starts[lines[0]], after), self.ends[lines[1] - 1]
        at = self.text.find(text, start, end)
        return self.run(text, start, end, look) if at < 0 else self.run(text, at, at + len(text), look)

    def line(self, body: str, number: int) -> list[Run]:
        """The end of a line; blanks in front of it may stand for tabs."""
        end = self.ends[number]
        rest = body if self.text.endswith(body, self.starts[number], end) else body.lstrip(" ")
        runs = [Run(" " * (len(body) - len(rest))), self.run(rest, end - len(rest), end)]
        return [run for run in runs if run.text]

    def line_end(self, number: int) -> Run:
        """What ends a line: ours, where the source ends without one."""
        return self.run("\n", self.ends[number], self.starts[number + 1]) if number + 1 < len(self.starts) else Run("\n")

    def rest_of_line(self, start: int) -> str:
        """What follows in the line that start is in."""
        return self.text[start : self.ends[bisect_right(self.starts, start) - 1]]


class Paragraph:
    """The text of one paragraph or table cell, without what its containers put around it, and where in the source it stands."""

    def __init__(self, source: Source, content: str, starts: list[int], places: list[int]) -> None:
        self.source, self.content = source, content
        self._starts, self._places = starts, places  # pieces that map one to one: where each begins in the content, in the source
        self._cursor = 0
        self._looks: list[Look] = []
        self._links: list[tuple[Token, int]] = []  # links that are open, and how many runs were there before them
        self._runs: list[Run] = []

    @classmethod
    def of_lines(cls, source: Source, content: str, first_line: int) -> Paragraph:
        """Content whose lines end the lines of the source from `first_line` on, but for blanks and closing marks."""
        starts, places, at = [], [], 0
        for number, line in enumerate(content.split("\n"), first_line):
            said = line.strip(" \t")
            found = source.text.rfind(said, source.starts[number], source.ends[number])
            starts.append(at)
            places.append(found - line.find(said))
            at += len(line) + 1
        return cls(source, content, starts, places)

    @classmethod
    def of_cell(cls, source: Source, content: str, start: int, end: int) -> Paragraph:
        """A table cell somewhere in start:end of the source, where its pipes are escaped."""
        pieces = content.split("|")
        written = re.compile(r"\\\|".join(map(re.escape, pieces))).search(source.text, start, end)
        place = start if written is None else written.start()
        starts, places, at = [], [], 0
        for piece in pieces:
            starts.append(at)
            places.append(place)
            at += len(piece) + 1
            place += len(piece) + 2
            starts.append(at - 1)
            places.append(place - 1)
        return cls(source, content, starts, places)

    @property
    def end(self) -> int:
        """Where it ends in the source."""
        return self._place(len(self.content) - 1) + 1 if self.content else self._places[0]

    def runs(self) -> tuple[Run, ...]:
        """Everything it says, in its looks."""
        if len(self.content) > MAX_PARSED:
            return tuple(self._say(0, len(self.content), Look.PLAIN))
        tokens: list[Token] = []
        parser().inline.parse(self.content, parser(), dict(self.source.references), tokens)
        for token in tokens:
            self._read(token)
        return tuple(run for run in self._runs if run.text)

    def _place(self, at: int) -> int:
        piece = bisect_right(self._starts, at) - 1
        return self._places[piece] + at - self._starts[piece]

    def _say(self, start: int, end: int, look: Look) -> Iterator[Run]:
        """content[start:end] as it stands; a line end is a space."""
        for k, line in enumerate(self.content[start:end].split("\n")):
            if k:
                yield Run(" ", None, look)
            said = line.strip(" \t") if k else line
            at = start + line.find(said)
            yield self.source.run(said, self._place(at), self._place(at + len(said) - 1) + 1, look) if said else Run("")
            start += len(line) + 1

    def _say_next(self, text: str, look: Look) -> None:
        """The next place in the paragraph that says `text`, and the cursor behind it."""
        at = self.content.find(text, self._cursor)
        if at < 0:
            self._runs.append(Run(text.replace("\n", " "), None, look))
            return
        self._cursor = at + len(text)
        self._runs.extend(self._say(at, self._cursor, look))

    @property
    def _look(self) -> Look:
        look = Look.LINK if self._links else Look.PLAIN
        for each in self._looks:
            look |= each
        return look

    def _read(self, token: Token) -> None:
        kind, _, edge = token.type.rpartition("_")
        if kind in _LOOKS:
            self._looks.append(_LOOKS[kind]) if edge == "open" else self._looks.pop()
        else:
            _READERS[token.type](self, token)

    def _read_text(self, token: Token) -> None:
        self._say_next(token.content, self._look)

    def _read_special(self, token: Token) -> None:
        """An entity or an escape: one thing is written, another is shown."""
        at = self.content.find(token.markup, self._cursor)
        self._cursor = at + len(token.markup)
        self._runs.append(self.source.run(token.content, self._place(at), self._place(self._cursor - 1) + 1, self._look))

    def _read_html(self, token: Token) -> None:
        self._say_next(token.content, self._look | Look.CODE)

    def _read_code(self, token: Token) -> None:
        start = self.content.find(token.markup, self._cursor) + len(token.markup)
        size = len(token.content)
        start += not self.content.startswith(token.markup, start + size)  # a blank on either side belongs to the marks
        self._runs.extend(self._say(start, start + size, self._look | Look.CODE))
        self._cursor = self.content.find(token.markup, start + size) + len(token.markup)

    def _read_break(self, token: Token) -> None:
        at = self.content.find("\n", self._cursor)
        self._cursor = at + 1
        place = self._place(at)
        self._runs.append(self.source.run("\n", place, place + 1) if token.type == "hardbreak" else Run(" ", None, self._look))

    def _open_link(self, token: Token) -> None:
        self._links.append((token, len(self._runs)))

    def _close_link(self, token: Token) -> None:
        opening, before = self._links.pop()
        shown = "".join(run.text for run in self._runs[before:])
        title = str(opening.attrs.get("title", ""))
        if opening.markup != "autolink" and (shown != opening.attrs["href"] or title):
            self._say_target(str(opening.attrs["href"]), title, token.meta["end"])
        self._cursor = token.meta["end"]

    def _read_image(self, token: Token) -> None:
        self._runs.append(Run("[image: ", None, self._look))
        self._say_next(token.content, self._look | Look.ITALIC)
        self._say_target(str(token.attrs["src"]), str(token.attrs.get("title", "")), token.meta["end"])
        self._runs.append(Run("]", None, self._look))
        self._cursor = token.meta["end"]

    def _say_target(self, target: str, title: str, end: int) -> None:
        """Where a link leads, in angle brackets of ours, from the paragraph itself or from where it is defined."""
        self._runs.append(Run(" <"))
        self._runs.append(self._find_said(target, target, end))
        if title:
            self._runs += [Run(' "'), self._find_said(title, target, end), Run('"')]
        self._runs.append(Run(">"))

    def _find_said(self, text: str, target: str, end: int) -> Run:
        at = self.content.find(text, self._cursor, end)
        shown = text.replace("\n", " ")
        if text and at >= 0:
            self._cursor = at + len(text)
            return self.source.run(shown, self._place(at), self._place(self._cursor - 1) + 1)
        if target in self.source.targets:
            return self.source.find(shown, self.source.targets[target])
        return self.source.run(shown, self._place(self._cursor), self._place(end - 1) + 1)


_LOOKS = {"em": Look.ITALIC, "strong": Look.BOLD, "s": Look.STRIKE}
_READERS: dict[str, Callable[[Paragraph, Token], None]] = {
    "text": Paragraph._read_text,
    "text_special": Paragraph._read_special,
    "html_inline": Paragraph._read_html,
    "code_inline": Paragraph._read_code,
    "softbreak": Paragraph._read_break,
    "hardbreak": Paragraph._read_break,
    "link_open": Paragraph._open_link,
    "link_close": Paragraph._close_link,
    "image": Paragraph._read_image,
}
