"""Settings as small frozen dataclasses, checked when they are made; the command line takes its defaults from them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

from optmem.errors import InputError

Style = Literal["dense", "packed", "document"]
Cell = Literal["8x16", "8x8", "6x12", "5x8"]  # width x height in pixels
Alphabet = Literal["nano", "any"]  # what nano can say, or whatever a font here has; the rest is drawn as its escape
Kind = Literal["text", "markdown", "code", "chat"]

MIN_SIDE, MAX_SIDE = 64, 8192


def check_choice(name: str, given: object, allowed: object) -> None:
    """Raises InputError unless `given` is one of the values of a Literal."""
    if given not in get_args(allowed):
        raise InputError(f"{name} must be one of {', '.join(map(str, get_args(allowed)))}, got {given!r}")


@dataclass(frozen=True, slots=True)
class PageConfig:
    """How text is drawn.  The default is what the default reader reads best: 512x512, 2,048 cells, 64 vision tokens."""

    style: Style = "dense"
    height: int = 512  # pixels
    width: int = 512
    cell: Cell = "8x16"  # dense and packed
    alphabet: Alphabet = "nano"  # dense and packed
    font_size: int = 13  # document: pixels per em of running text

    def __post_init__(self) -> None:
        check_choice("style", self.style, Style)
        check_choice("cell", self.cell, Cell)
        check_choice("alphabet", self.alphabet, Alphabet)
        for name in ("height", "width", "font_size"):
            if not isinstance(getattr(self, name), int) or isinstance(getattr(self, name), bool):
                raise InputError(f"{name} must be a whole number of pixels, got {getattr(self, name)!r}")
        for side in (self.height, self.width):
            if not MIN_SIDE <= side <= MAX_SIDE:
                raise InputError(f"a side of a page must be {MIN_SIDE} to {MAX_SIDE} pixels, got {side}")
        if not 6 <= self.font_size <= 96:
            raise InputError(f"font_size must be 6 to 96 pixels, got {self.font_size}")
