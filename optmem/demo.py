"""What `optmem demo` shows: text becoming pages, and what the pages cost."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

from optmem.config import Cell, Kind, Style
from optmem.pages import Page, Source, paginate
from optmem.pixels import MODES
from optmem.text.count import estimate_tokens

FORMS: tuple[tuple[Style, Cell], ...] = (("dense", "8x16"), ("packed", "8x16"), ("packed", "8x8"))


def sample_chat() -> list[dict[str, object]]:
    """The conversation that the package carries: tool calls, a table, code, and scripts beyond Latin."""
    chat: list[dict[str, object]] = json.loads(files("optmem").joinpath("samples/chat.json").read_text(encoding="utf-8"))
    return chat


@dataclass(frozen=True, slots=True)
class Cost:
    """A source drawn in one form: how many pages, and how many vision tokens they are."""

    mode: str
    side: int
    style: Style
    cell: Cell
    pages: int
    vision_tokens: int  # as papers count them
    fed_tokens: int  # as the decoder gets them, with newlines and separators


@dataclass(frozen=True, slots=True)
class Drawn:
    """A source, its pages, and its cost in every form."""

    name: str
    stem: str
    characters: int
    text_tokens: int  # estimated
    pages: list[Page]  # to be looked at: the default form, and the form for people
    costs: list[Cost]

    def summary(self) -> dict[str, Any]:
        """The numbers as plain data."""
        return {
            "source": self.name,
            "characters": self.characters,
            "text_tokens_estimated": self.text_tokens,
            "forms": [asdict(cost) | {"ratio": round(self.text_tokens / cost.fed_tokens, 2)} for cost in self.costs],
            "page_ids": [page.id for page in self.pages],
        }

    def describe(self) -> str:
        """The numbers as a table for a terminal."""
        lines = [f"{self.name}: {self.characters:,} characters, about {self.text_tokens:,} text tokens"]
        lines.append("  mode   page       style   cells  pages  vision tokens    fed  text tokens for one fed")
        for cost in self.costs:
            page = f"{cost.side}x{cost.side}"
            form = f"{cost.mode:6} {page:10} {cost.style:7} {cost.cell:6} {cost.pages:5}"
            lines.append(f"  {form} {cost.vision_tokens:14,} {cost.fed_tokens:6,}  {self.text_tokens / cost.fed_tokens:.1f}")
        return "\n".join(lines)


def _costs(source: Source) -> Iterator[Cost]:
    for name, mode in MODES.items():
        if mode.is_tiled:
            continue  # tiled modes are for scans; a page we draw has one view
        for style, cell in FORMS:
            count = len(paginate(source, style=style, size=mode.size, cell=cell))
            yield Cost(name, mode.size, style, cell, count, count * mode.paper_tokens(), count * mode.fed_tokens())


def _draw(name: str, stem: str, source: Source, kind: Kind) -> Drawn:
    dense = paginate(source, name=name)
    text = "".join(page.text() for page in dense)
    document = paginate(source, style="document", size=640, kind=kind, name=name)
    return Drawn(name, stem, len(text), estimate_tokens(text), [*dense, *document], list(_costs(source)))


def run_demo(texts: Mapping[str, str]) -> list[Drawn]:
    """The sample chat and every text (Markdown, by its name) drawn in every form."""
    drawn = [_draw("a sample chat", "chat", sample_chat(), "chat")]
    for number, (name, text) in enumerate(texts.items(), start=1):
        drawn.append(_draw(name, f"{number}-{Path(name).stem}", text, "markdown"))
    return drawn
