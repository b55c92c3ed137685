"""What `optmem demo` shows: text becoming pages, and what the pages cost."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from importlib.resources import files
from typing import Any

from optmem.config import Cell, Style
from optmem.inputs import Given
from optmem.pages import Page, Source, paginate
from optmem.pixels import MODES

LEGEND = (
    "vision tokens: one for each 64x64 pixels; fed: with the newlines and separators that the decoder gets as well\n"
    "text tokens: an estimate for a vocabulary of 200,000"
)
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


def _draw(given: Given) -> Drawn:
    dense, packed = (paginate(given.source, style=style, name=given.name) for style in ("dense", "packed"))
    document = paginate(given.source, style="document", size=640, kind=given.kind, name=given.name)
    characters = sum(len(page.text()) for page in dense)
    return Drawn(given.name, characters, given.text_tokens(), [*dense, *packed, *document], list(_costs(given.source)))


def run_demo(given: Sequence[Given]) -> list[Drawn]:
    """The sample chat and everything given, drawn in every form."""
    return [_draw(each) for each in (Given("chat", sample_chat(), "chat"), *given)]
