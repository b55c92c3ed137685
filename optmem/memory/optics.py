"""The reader of a memory: its engine, loaded when it is first needed; the ladder of its tiers; and how it counts texts."""

from __future__ import annotations

import io
import threading
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image

from optmem.errors import CheckpointError, InputError
from optmem.images import Pixels, as_image
from optmem.memory.fidelity import ASSUMED, Assumed, Curve, read_curve
from optmem.memory.ladder import Ladder, ladder
from optmem.memory.pricing import best_size, image_tokens
from optmem.memory.tiers import Tier
from optmem.pixels import PIXELS_PER_TOKEN, contact_sheet, find_mode, to_mode
from optmem.text.count import estimate_tokens

if TYPE_CHECKING:  # it loads torch's decoder, which adding does not need
    from optmem.engine import Engine, VisionTokens

LARGEST = 1024  # pixels of the side of a picture that nano keeps


class Optics:
    """What a memory sees with."""

    def __init__(self, engine: Engine | None = None, count: Callable[[str], int] | None = None, reader: str = "") -> None:
        """
        engine   None is nano, which is loaded when it is first needed
        count    tokens of a text for the model that is to read it; None is the engine's own vocabulary where that is one of
                 words, and an estimate of a common one (`text.count`) for nano, which reads characters
        reader   that is billed for pictures by its own formula, one of `pricing.READERS`; "" is the engine
        """
        self._given, self._count, self.reader = engine, count, reader
        self._lock = threading.Lock()

    @cached_property
    def engine(self) -> Engine:
        """The model."""
        if self._given is not None:
            return self._given
        from optmem.engine import Engine

        with self._lock:
            if self._given is None:
                self._given = Engine.from_pretrained("nano")
        return self._given

    @cached_property
    def ladder(self) -> Ladder:
        """The tiers of the model's pages."""
        found = ladder(self.engine.model.config, self._curve())
        tiers = tuple(_priced(tier, found.size, self.reader) for tier in found.tiers) if self.reader else found.tiers
        return replace(found, tiers=tiers)

    def counted_by(self, reader: str) -> Optics:
        """The same eyes, where another reader is billed.  Its texts are estimated, where no count was given."""
        return self if reader == self.reader else Optics(self.engine, self._count or estimate_tokens, reader)

    def _curve(self) -> Curve:
        from optmem.engine.checkpoint import FIDELITY, fingerprint
        from optmem.files import read_json

        engine = self.engine
        if engine.folder is None or not (engine.folder / FIDELITY).is_file():
            return ASSUMED
        if engine.temperatures is None:
            return read_curve(engine.folder, fingerprint(engine.model.weights()))
        # These weights were compared when the temperatures were read; those of int8 could not be any more.
        return read_curve(engine.folder, str(read_json(engine.folder, FIDELITY, limit=1 << 24).get("model")))

    @property
    def doubt(self) -> str:
        """What should be known of everything that the model reads; "" where it was measured."""
        if not isinstance(self.ladder.curve, Assumed):
            return ""
        return "how well these weights read was never measured, and what they say may be junk: run `optmem eval` on them"

    @property
    def reads_pictures(self) -> bool:
        """Whether the reader sees more than pages that optmem draws: nano does not."""
        return bool(self.reader) or self.engine.model.config.family != "nano"

    @property
    def sharp(self) -> int:
        """The number of the sharpest tier of pages, without their facts."""
        return self.ladder.sharp

    def count(self, text: str) -> int:
        """Tokens of a text."""
        if self._count is not None:
            return self._count(text)
        if self._given is not None and self._given.model.config.family != "nano":
            return len(self._tokenizer(text))
        return estimate_tokens(text)

    def _tokenizer(self, text: str) -> Sequence[int]:
        tokenizer = self.engine.model.tokenizer
        if tokenizer is None:
            raise CheckpointError("texts are counted with the model's tokenizer, and this model came without one: give count=")
        return tokenizer.encode(text)

    # Pictures

    def page_of(self, picture: object, name: str) -> Pixels:
        """A picture that came with a message as a square page, never enlarged: what the model is shown of it at its sharpest.

        Raises ImageError where it cannot be read.
        """
        pixels = as_image(picture, name=name)
        longest = max(pixels.shape[:2])
        if self.ladder.size < longest and self.engine.model.config.family == "nano":
            side = min(-(-longest // PIXELS_PER_TOKEN) * PIXELS_PER_TOKEN, LARGEST)
        else:
            side = self.ladder.size
        return contact_sheet([pixels], side).image

    def tokens(self, pictures: Sequence[Pixels]) -> list[VisionTokens]:
        """The vision tokens of square pages, each at its own size."""
        return self.engine.encode(list(pictures))

    def at(self, pixels: Pixels, tier: Tier) -> Pixels:
        """A page as a tier shows it."""
        return pixels if pixels.shape[0] == tier.side else to_mode(pixels, find_mode(tier.mode))


def _priced(tier: Tier, size: int, reader: str) -> Tier:
    """A tier as a provider bills it."""
    if tier.kind not in ("page", "sheet"):
        return tier
    side = tier.side if tier.kind == "page" else size
    return replace(tier, tokens=image_tokens(reader, *best_size(reader, side, side)))


def as_png(pixels: Pixels) -> bytes:
    """A picture's file: the same pixels give the same bytes."""
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


def from_png(content: bytes) -> Pixels:
    """The pixels of a page's file.  Raises ImageError."""
    return as_image(content, name="a page's picture")


def blank(side: int) -> Pixels:
    """Paper."""
    return np.full((side, side), 255, dtype=np.uint8)


def sheet_of_pages(pages: Sequence[Pixels | None], tier: Tier, size: int) -> Pixels:
    """Pages on one picture, every one at its place; None is a place that stays white."""
    if not pages:
        raise InputError("a contact sheet needs at least one page")
    found = [blank(tier.side) if page is None else page for page in pages]
    return contact_sheet(found, size, columns=round(len(found) ** 0.5)).image
