"""Held-out pages to be read: of each kind from the corpus, or the user's own texts, in the form that nano knows.

Three pages of four run on to their last cell, as the pages of a document do; the fourth ends somewhere.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import count
from typing import get_args

import numpy as np
import torch

from optmem import ops
from optmem.config import Cell, PageConfig
from optmem.errors import InputError
from optmem.inputs import Given
from optmem.pages import draw_pages, lay_out, read_source, read_symbols, symbols
from optmem.pages.alphabet import AlphabetFont, alphabet_atlas, spell
from optmem.pixels import PIXELS_PER_TOKEN, Mode, find_mode
from optmem.train.corpus import Corpus
from optmem.train.degrade import Pixels
from optmem.train.kinds import Mix, PageKind
from optmem.train.synth import Form, LabelledPage, SynthConfig, draw_batch

ENDS_EVERY = 4  # pages
_DRAWN_AT_ONCE = 8
_PIXELS = re.compile(r"[0-9]{1,5}")


@dataclass(frozen=True)
class Sample:
    """A picture, and the symbols of every row that its text reaches."""

    image: Pixels  # [side, side]
    rows: tuple[str, ...]
    form: Form

    @cached_property
    def text(self) -> str:
        """What the whole page says."""
        return read_symbols("".join(self.rows))

    @property
    def is_ended(self) -> bool:
        """Whether the text ends here."""
        return self.rows[-1].endswith(symbols.TEXT_END)


def parse_form(text: str) -> Form:
    """A form by its name: size:cell, or size:cell:side where the page is shown smaller.

    Raises InputError where it is no such name, or the encoder has no tokens for such a picture.
    """
    size, name, side = (*text.strip().split(":"), "", "")[:3]
    cells: dict[str, Cell] = {cell: cell for cell in get_args(Cell)}
    if not _PIXELS.fullmatch(size) or name not in cells or not _PIXELS.fullmatch(side or "0") or text.count(":") > 2:
        allowed = f"size:cell or size:cell:side, such as 512:8x16 or 512:8x8:384, with a cell of {', '.join(cells)}"
        raise InputError(f"a form is {allowed}, got {text[:80]!r}")
    form = Form(int(size), cells[name], int(side or 0))
    if form.side % PIXELS_PER_TOKEN:
        raise InputError(f"the encoder wants pictures of a multiple of {PIXELS_PER_TOKEN} pixels, got {form.side} in {text!r}")
    return form


def form_name(form: Form) -> str:
    """The name that parse_form reads."""
    return f"{form.size}:{form.cell}" + (f":{form.view}" if form.side != form.size else "")


def mode_of(form: Form) -> Mode:
    """How its pictures are shown to the encoder."""
    return find_mode(f"square {form.side}")


def held_out(corpus: Corpus, kind: PageKind, form: Form, seed: int, number: int) -> list[Sample]:
    """The first `number` pages of a kind.  A smaller view shows the same pages, and more pages begin with the same ones."""
    config = SynthConfig((form,), Mix.only([kind]), batch=_DRAWN_AT_ONCE, seasoned=False)
    drawn = (_from_label(page) for n in count() for page in draw_batch(config, corpus, seed, n).pages())
    waiting: dict[bool, list[Sample]] = {True: [], False: []}
    chosen: list[Sample] = []
    while len(chosen) < number:
        wanted = waiting[len(chosen) % ENDS_EVERY == ENDS_EVERY - 1]
        while not wanted:
            sample = next(drawn)
            waiting[sample.is_ended].append(sample)
        chosen.append(wanted.pop(0))
    return chosen


def _from_label(page: LabelledPage) -> Sample:
    rows = [spell(ids) for ids in page.ids]
    used = max(number for number, row in enumerate(rows) if row) + 1
    return Sample(page.image, tuple(rows[:used]), page.form)


# --- the user's own texts -------------------------------------------------------------------------------------------------------


def from_text(given: Given, form: Form, number: int) -> list[Sample]:
    """A text's pages, or `number` of them, spread evenly.  Raises InputError where the text is empty."""
    blocks = read_source(given.source, given.kind, rich=False, name=given.name)
    if not any(run.text for block in blocks for run in block.runs):
        raise InputError(f"{given.name} is empty: give a text with something to read")
    pages = lay_out(blocks, PageConfig(height=form.size, width=form.size, cell=form.cell))
    places = np.linspace(0, len(pages) - 1, min(number, len(pages))).round().astype(int).tolist()
    chosen = [pages[place] for place in places]
    images = [_shown(image, form) for image in draw_pages(chosen)]
    return [Sample(image, tuple(page.symbol_rows()), form) for page, image in zip(chosen, images, strict=True)]


def _shown(image: Pixels, form: Form) -> Pixels:
    """A page at its tier."""
    if form.side == form.size:
        return image
    shown: Pixels = ops.resample(torch.from_numpy(image[None, ..., None]), form.side, form.side)[0, ..., 0].numpy()
    return shown


def unspoken(given: Given, cells: Sequence[Cell]) -> str:
    """The characters of a text that some of these cells cannot draw, each once: they are drawn and read as escapes."""
    blocks = read_source(given.source, given.kind, rich=False, name=given.name)
    used = {ord(char) for block in blocks for run in block.runs for char in run.text} - set(map(ord, "\n\t"))
    drawn = [font.shown for cell in cells if isinstance(font := alphabet_atlas(cell).font, AlphabetFont)]
    return "".join(map(chr, sorted(used.difference(frozenset.intersection(*drawn)))))
