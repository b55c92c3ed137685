"""Text to pages: sources to blocks, blocks to lines, lines to pages, pages to uint8."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from operator import index
from typing import Any

from optmem.config import Alphabet, Cell, Kind, PageConfig, Style, check_choice
from optmem.errors import InputError
from optmem.pages.alphabet import alphabet_atlas
from optmem.pages.atlas import cell_atlas
from optmem.pages.blocks import Block, Look, Run, Span
from optmem.pages.cells import paginate_cells
from optmem.pages.chat import read_messages
from optmem.pages.document import paginate_document
from optmem.pages.markdown import read_markdown
from optmem.pages.page import Box, Characters, Line, Page, draw_pages
from optmem.pages.symbols import read_symbols

__all__ = [
    "Block",
    "Box",
    "Characters",
    "Line",
    "Look",
    "Page",
    "Run",
    "Span",
    "draw_pages",
    "lay_out",
    "paginate",
    "read_source",
    "read_symbols",
]

Source = str | Sequence[Mapping[str, Any]]


def read_source(source: Source, kind: Kind | None = None, *, rich: bool, name: str = "text") -> list[Block]:
    """A source as blocks.  Where not `rich`, Markdown and code stay the text they are."""
    if isinstance(source, str):
        kind = "text" if kind is None else kind
        check_choice("kind", kind, Kind)
        if kind == "chat":
            raise InputError("a chat is a list of messages, got a string: parse it first, or choose kind text, markdown or code")
        if kind == "markdown" and rich:
            # A byte-order mark would hide a heading; a space in its place keeps every span right.
            return read_markdown(f" {source[1:]}" if source.startswith("\ufeff") else source, name)
        run = Run(source, Span(name, 0, len(source)))
        return [Block("code" if kind == "code" and rich else "verbatim", (run,))]
    if kind not in (None, "chat"):
        raise InputError(f"a list of messages is of kind chat, not {kind}")
    return read_messages(source, rich=rich)


def lay_out(blocks: Iterable[Block], config: PageConfig) -> list[Page]:
    """Blocks as pages in the style of `config`; what does not fit goes to the next page, and there is at least one."""
    if config.style == "document":
        return paginate_document(blocks, config.height, config.width, font_size=config.font_size)
    atlas = alphabet_atlas(config.cell) if config.alphabet == "nano" else cell_atlas(config.cell)
    return paginate_cells(blocks, config.style, config.height, config.width, atlas)


def _sides(size: object) -> tuple[int, int]:
    """Height and width from one side or from both; NumPy's integers are integers too."""
    sides = size if isinstance(size, tuple | list) else (size, size)
    try:
        height, width = map(index, sides)
    except (TypeError, ValueError):
        raise InputError(f"size must be one side in whole pixels, or (height, width), got {size!r}") from None
    return height, width


def paginate(
    source: Source,
    *,
    style: Style = "dense",
    size: int | tuple[int, int] = 512,
    cell: Cell = "8x16",
    alphabet: Alphabet = "nano",
    font_size: int = 13,
    kind: Kind | None = None,
    name: str = "text",
) -> list[Page]:
    """Draws text, or a list of chat messages, as pages.

    style      "dense" (fixed cells, line ends drawn and obeyed), "packed" (line ends drawn, rows go on) or "document" (for people)
    size       pixels: one side of a square, or (height, width)
    cell       dense and packed: width x height of a character
    alphabet   dense and packed: "nano" draws what the shipped reader can say, "any" what a font here has; the rest as its escape
    font_size  document: pixels per em
    kind       of a string: "text", "markdown" or "code"; the styles dense and packed show all of them as they are
    name       the source id in the spans of lines; messages have their own ids

    In dense and packed, the texts of the pages joined are exactly the string put in, and so are the symbols drawn (`read_symbols`).
    Raises InputError for a source or a setting that cannot be used.
    """
    config = PageConfig(style, *_sides(size), cell, alphabet, font_size)
    return lay_out(read_source(source, kind, rich=style == "document", name=name), config)
