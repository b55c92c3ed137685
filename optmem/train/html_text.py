"""The text of a page of documentation: paragraphs as one line each, code as it stands, headings, items and cells marked."""

from __future__ import annotations

import re
from html import unescape
from html.parser import HTMLParser

_BEGIN = re.compile(r'<main\b|<section id="main-content"|<div class="body" role="main"|<body\b')
_SKIPPED = {"script", "style", "nav", "header", "footer", "button", "form", "svg", "head", "title"}
_BREAKS = {
    "p",
    "div",
    "section",
    "article",
    "dl",
    "dt",
    "dd",
    "ul",
    "ol",
    "li",
    "table",
    "tr",
    "blockquote",
    "details",
    "summary",
    "br",
}
_HEADINGS = {f"h{level}": "#" * level + " " for level in range(1, 7)}
_SIGNS_OF_LINKS = str.maketrans({"¶": None, "§": None, "🔒": None})
_CHROME = re.compile(  # links to sources and blanket implementations of rustdoc, the menu of sqlite.org
    r'<a class="srclink[^>]*>.*?</a>|<h2 id="synthetic-implementations".*|<div class=nosearch>.*?</script>', re.DOTALL
)
_PROGRAM = re.compile(r'<pre class="rust[^"]*">(.*?)</pre>', re.DOTALL)
_TAG = re.compile(r"<[^>]*>")


class _Reader(HTMLParser):
    """Collects lines; what lies inside a skipped element is dropped."""

    def __init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self.lines: list[str] = []
        self._line: list[str] = []
        self._prefix = ""
        self._skipping = self._verbatim = 0

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:  # noqa: ARG002
        if tag in _SKIPPED:
            self._skipping += 1
        elif tag == "pre":
            self.end_line()
            self._verbatim += 1
        elif tag in _HEADINGS or tag in _BREAKS:
            self.end_line()
            self._prefix = _HEADINGS.get(tag, "- " if tag == "li" else self._prefix)
        elif tag in ("td", "th") and self._line:
            self._line.append(" | ")

    def handle_endtag(self, tag: str) -> None:
        if tag in _SKIPPED:
            self._skipping = max(self._skipping - 1, 0)
        elif tag == "pre":
            self._verbatim = max(self._verbatim - 1, 0)
            self.lines += ["", *"".join(self._line).strip("\n").split("\n"), ""]
            self._line = []
        elif tag in _HEADINGS or tag in _BREAKS:
            self.end_line()
            if tag in _HEADINGS or tag == "p":
                self.lines.append("")

    def handle_data(self, data: str) -> None:
        if not self._skipping:
            self._line.append(data)

    def end_line(self) -> None:
        """A paragraph, an item or a row of a table is over."""
        if self._verbatim:
            return
        said = " ".join("".join(self._line).translate(_SIGNS_OF_LINKS).split())
        if said:
            self.lines.append(self._prefix + said)
            self._prefix = ""
        self._line = []


def read_html(page: str) -> str:
    """The text of an HTML page of documentation."""
    page = _CHROME.sub("", page)
    begin = _BEGIN.search(page)
    reader = _Reader()
    reader.feed(page[begin.start() :] if begin else page)
    reader.close()
    reader.end_line()
    return "\n".join(reader.lines).strip() + "\n"


def read_program(page: str) -> str:
    """The source code that a page of rustdoc shows."""
    found = _PROGRAM.search(page)
    return unescape(_TAG.sub("", found[1])) if found else ""
