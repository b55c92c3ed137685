"""Engine: pictures to vision tokens, vision tokens to text."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterable, Iterator, Sequence
from functools import cached_property
from itertools import islice
from typing import Literal, TypeVar

import torch

from optmem.engine.checkpoint import (
    Temperatures,
    choose_device,
    choose_dtype,
    encoder_fingerprint,
    find_checkpoint,
    read_temperatures,
)
from optmem.engine.modes import choose_mode
from optmem.engine.reading import complete, saw
from optmem.engine.result import Completion, Glanced
from optmem.engine.vision_tokens import VisionTokens
from optmem.errors import CheckpointError, InputError
from optmem.images import as_image, is_whole
from optmem.machine import fast_dtype
from optmem.model.glance import Glance
from optmem.model.model import Model
from optmem.model.nano import MAX_ROW, PageRows, draft_page, embed_prefix, longest_row, read_pages
from optmem.pixels import Mode, Views, make_views
from optmem.text.characters import CharacterTokenizer

log = logging.getLogger(__name__)
PAGES_AT_ONCE = 64  # pictures, or pages to read: what is held of all others is what was given
DraftName = Literal["glance"]
T = TypeVar("T")


class Engine:
    """A model, ready to be used.  It keeps nothing of what it read."""

    def __init__(self, model: Model, temperatures: Temperatures | None = None) -> None:
        """
        model          its weights are shared, not copied
        temperatures   of its calibration, where it has one
        """
        self.model = model
        self.temperatures = temperatures

    @classmethod
    def from_pretrained(
        cls,
        name: str | os.PathLike[str] = "nano",
        *,
        device: torch.device | str = "auto",
        dtype: torch.dtype | str = "auto",
    ) -> Engine:
        """An engine from a checkpoint that is shipped ("nano"), or from a folder in the hub layout.

        device   "auto" is a GPU where there is one
        dtype    "auto" is what is stored, but fp32 on a CPU that multiplies it in software: `optmem env` says which

        Raises SourceNotFoundError where there is no such checkpoint, CheckpointError where it is damaged or of an unknown model.
        """
        folder, place, chosen = find_checkpoint(name), choose_device(device), choose_dtype(dtype)
        model = Model.load(folder, device=place, dtype=chosen)
        if chosen is None and place.type == "cpu" and model.decoder.dtype not in (torch.float32, fast_dtype(place)):
            log.info("%s is stored as %s and held as fp32: this CPU has no products of that type", name, model.decoder.dtype)
            model = Model.load(folder, device=place, dtype=torch.float32)
        return cls(model, read_temperatures(folder, model))

    @property
    def device(self) -> torch.device:
        """Where the weights lie."""
        return self.model.decoder.lm_head.weight.device

    @cached_property
    def encoder_fingerprint(self) -> str:
        """What VisionTokens of this engine carry, and what those it decodes must carry."""
        return encoder_fingerprint(self.model.encoder)

    # --- pictures to vision tokens ------------------------------------------------------------------------------------------

    def encode(self, images: object, mode: Mode | str | None = None) -> list[VisionTokens]:
        """Vision tokens of every picture, views of one size through the encoder together.

        images   one picture or an iterable of them: Page, PIL image, uint8 array, path
        mode     by its name, or "square <pixels>"; None is a picture's own size, which must be that of a view

        Raises ImageError for what cannot be read, InputError for a mode that the model does not have.
        """
        encoded: list[VisionTokens] = []
        for some in _parts(_pictures(images)):
            shown = [self._show(picture, mode) for picture in some]
            features = self.model.encode([views for _, views in shown])
            for (chosen, views), found in zip(shown, features, strict=True):
                encoded.append(VisionTokens(found, chosen, views.grid, self.encoder_fingerprint))
        return encoded

    def _show(self, picture: object, mode: Mode | str | None) -> tuple[Mode, Views]:
        """A picture's mode and views; the picture itself, which may be a hundred times as large, is not held."""
        pixels = as_image(picture)
        chosen = choose_mode(self.model.config, mode, *pixels.shape[:2])
        return chosen, make_views(pixels, chosen)

    # --- vision tokens to text ----------------------------------------------------------------------------------------------

    def decode(
        self,
        tokens: VisionTokens | Iterable[VisionTokens],
        *,
        rows: Iterable[int] | None = None,
        draft: DraftName | None = "glance",
        max_tokens: int | None = None,
    ) -> list[Completion]:
        """What stands on every page, read greedily, rows of all pages together.

        rows         of every page; None is all down to the end of the text.  Rows below it add nothing
        draft        "glance": what a glance sees is verified in a few passes; None: token by token.  The answer is the same
        max_tokens   of a page, ends of rows counted; what lies behind is cut, and finish_reason is "length".  A page never takes
                     more than 128 rows, and a row no more than 256 symbols, or one for every 4 pixels of the page, and its end

        Raises InputError for tokens of another encoder, rows that have no name, and models that do not read by rows.
        """
        tokenizer, glance = self._nano()
        wanted = _row_numbers(rows, len(tokenizer.rows), most=len(tokenizer.rows))
        if draft not in ("glance", None):
            raise InputError(f"draft must be 'glance' or None, got {draft!r}")
        if max_tokens is not None and not (is_whole(max_tokens) and max_tokens >= 1):
            raise InputError(f"max_tokens must be a whole number of at least 1, or None, got {max_tokens!r}")
        temperature = (self.temperatures or Temperatures()).decoder
        done: list[Completion] = []
        for some in _parts(self._checked(tokens)):
            asked = [self._ask(page, wanted, tokenizer, glance if draft else None, max_tokens) for page in some]
            found = read_pages(self.model.decoder, asked, tokenizer, temperature=temperature)
            for page, question, read in zip(some, asked, found, strict=True):
                vision_tokens, side = question.prefix.shape[0], page.mode.size
                done.append(complete(read, tokenizer, vision_tokens=vision_tokens, side=side, most=max_tokens))
        return done

    def glance(self, tokens: VisionTokens | Iterable[VisionTokens], *, rows: Iterable[int] | None = None) -> list[Glanced]:
        """What a glance sees on every page: one pass, no decoder, a probability for every character.

        rows   of every page; None is all down to the end of the text

        Raises InputError as decode does.
        """
        tokenizer, head = self._nano()
        wanted = _row_numbers(rows, len(tokenizer.rows), most=len(tokenizer.rows))
        temperature = (self.temperatures or Temperatures()).glance
        return [saw(head.read(page.features, temperature=temperature), tokenizer, wanted) for page in self._checked(tokens)]

    @torch.inference_mode()
    def _ask(
        self,
        page: VisionTokens,
        rows: Sequence[int] | None,
        tokenizer: CharacterTokenizer,
        glance: Glance | None,
        max_tokens: int | None,
    ) -> PageRows:
        prefix = embed_prefix(self.model.encoder, self.model.decoder, page.features, page.mode, tokenizer)
        most = min(longest_row(page.mode.size), MAX_ROW if max_tokens is None else max_tokens)
        if glance is None:
            return PageRows(prefix, rows, max_symbols=most)
        return draft_page(prefix, glance.read(page.features), tokenizer, rows, most)

    def _nano(self) -> tuple[CharacterTokenizer, Glance]:
        """The parts that only nano has."""
        family = self.model.config.family
        if self.model.glance is None:
            raise InputError(
                f"{family} is encoded here and not decoded yet: optmem.model.decoder.greedy does that, a page at a time"
            )
        if not isinstance(self.model.tokenizer, CharacterTokenizer):
            raise CheckpointError(f"a {family} model needs characters.json beside its weights, and this one came without")
        return self.model.tokenizer, self.model.glance

    def _checked(self, tokens: VisionTokens | Iterable[VisionTokens]) -> Iterator[VisionTokens]:
        """Every page's tokens on the engine's device and in its type."""
        place, dtype = self.device, self.model.decoder.dtype
        pages: Iterable[object] = (tokens,) if isinstance(tokens, VisionTokens) else tokens
        if not isinstance(pages, Iterable):
            raise InputError(f"decode and glance take VisionTokens or an iterable of them, got {type(tokens).__name__}")
        for page in pages:
            if isinstance(page, list | tuple):
                raise InputError("pages that are read together are for the public models; nano reads a list of single pages")
            if not isinstance(page, VisionTokens):
                raise InputError(f"decode and glance take VisionTokens, as encode makes them, got {type(page).__name__}")
            page.check_fits(self.model.config.decoder.hidden, self.encoder_fingerprint)
            if page.tiles:
                raise InputError(f"nano reads pages of one view, got mode {page.mode.name} with {page.tiles} tiles")
            yield VisionTokens(page.features.to(place, dtype), page.mode, page.grid, page.encoder)


def _pictures(images: object) -> Iterator[object]:
    """One picture after another.  What can itself be read as a picture is one, though it may be iterable."""
    is_one = isinstance(images, str | bytes | bytearray | os.PathLike) or hasattr(images, "shape") or hasattr(images, "read")
    if is_one or not isinstance(images, Iterable):
        yield images
    else:
        yield from images


def _parts(items: Iterable[T]) -> Iterator[list[T]]:
    """Lists of PAGES_AT_ONCE."""
    rest = iter(items)
    while some := list(islice(rest, PAGES_AT_ONCE)):
        yield some


def _row_numbers(rows: Iterable[int] | None, names: int, *, most: int) -> list[int] | None:
    """Rows as a list; more than the model has names for are refused before a long range is listed."""
    if rows is None:
        return None
    if not isinstance(rows, Iterable):
        raise InputError(f"rows are an iterable of numbers, such as range(12, 15), or None, got {rows!r}")
    wanted = list(islice(rows, most + 1))
    wrong = [row for row in wanted if not (is_whole(row) and 0 <= row < names)]
    if wrong or len(wanted) > most:
        given = f"{wrong[0]!r}" if wrong else f"more than {most} of them"
        raise InputError(f"rows are whole numbers from 0 to {names - 1}, got {given}")
    return [int(row) for row in wanted]
