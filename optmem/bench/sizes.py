"""Bytes beside tokens: what a history weighs as text, zipped, as pictures and as vision tokens."""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from optmem.bench.kept import Encoding, Pages
from optmem.memory.optics import as_png
from optmem.text.count import estimate_tokens


@dataclass(frozen=True, slots=True)
class Sizes:
    """Of all pages of some histories of one class, together."""

    filler: str
    pages: int
    text_tokens: int
    fed_tokens: int  # of the pages at their own size
    text: int  # bytes
    zipped: int  # at level 9, a history in one piece
    pictures: int  # PNG
    tokens: int  # bf16
    int8_tokens: int  # as a memory keeps them, headers included

    def to_json(self) -> dict[str, Any]:
        """As it is published."""
        return asdict(self)


def weigh(histories: Sequence[Pages]) -> Sizes:
    """Sums over histories of one class."""
    texts = ["".join(line.text for page in each.drawn for line in page.lines) for each in histories]
    tokens = [found for each in histories for found in each.tokens(Encoding())]
    return Sizes(
        histories[0].history.filler,
        len(tokens),
        sum(map(estimate_tokens, texts)),
        len(tokens) * Encoding().fed_tokens,
        sum(len(text.encode()) for text in texts),
        sum(len(zlib.compress(text.encode(), 9)) for text in texts),
        sum(len(as_png(page.image())) for each in histories for page in each.drawn),
        sum(2 * found.features.numel() for found in tokens),
        sum(len(found.to_bytes(int8=True)) for found in tokens),
    )
