"""Search in vision tokens: where words are likely to stand, by a glance.  No text is made, and none is needed."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from optmem.engine.sampling import told
from optmem.errors import InputError
from optmem.model.glance import Glance
from optmem.text.characters import CharacterTokenizer

LEAST = 0.5  # a symbol of what is found is as likely as this, in the geometric mean: of ten one may be misread


@dataclass(frozen=True, slots=True)
class Found:
    """Words on a page."""

    page: int  # its number among those that were searched
    row: int
    column: int  # of their first symbol
    confidence: float  # the geometric mean of their symbols' probabilities


class Words:
    """What is looked for: the same in every page."""

    def __init__(self, words: str, tokenizer: CharacterTokenizer, *, ignore_case: bool) -> None:
        """Raises InputError where there is nothing to look for, or more than a line."""
        if not isinstance(words, str) or not words.strip():
            raise InputError(f"what is looked for must be a str that is not blank, got {told(words)}")
        if "\n" in words:
            raise InputError("what is looked for must stand on one line: search for the lines one by one")
        spellings = {words, words.lower(), words.upper()} if ignore_case else {words}
        spelled = [tokenizer.encode(spelling) for spelling in sorted(spellings)]
        if len({len(ids) for ids in spelled}) > 1:  # such as a sharp s, which is two letters in capitals
            spelled = [tokenizer.encode(words)]
        self.ids, places = torch.unique(torch.tensor(spelled), return_inverse=True)
        self.places = places.T  # [symbols, spellings]: which of the ids each symbol may be

    def find(self, glance: Glance, tokens: Tensor, *, temperature: float) -> Tensor:
        """How well they fit at each cell of a page, in the order of reading: geometric means, [rows, columns]."""
        chances = glance.chances(tokens, self.ids.to(tokens.device), temperature=temperature)
        rows, columns = chances.shape[:2]
        flat = torch.nn.functional.pad(chances.flatten(0, 1), (0, 0, 0, len(self.places)), value=-math.inf)
        total = flat.new_zeros(rows * columns)
        for at, spellings in enumerate(self.places.to(tokens.device)):
            total += flat[at : at + rows * columns, spellings].amax(-1)
        return (total / len(self.places)).exp().view(rows, columns)


def found_in(page: int, fits: Tensor, least: float) -> list[Found]:
    """The cells of a page where words fit well enough."""
    places = (fits >= least).nonzero().tolist()
    return [Found(page, row, column, float(fits[row, column])) for row, column in places]
