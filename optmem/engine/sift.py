"""Sifting very many pages for words: what a glance says of them, without what it need not say.

A symbol's probability needs the logits of all symbols at its cell.  With the commonest alone in the sum it comes out too high,
never too low, so what is sure enough with these is looked at again with all: of each word the likeliest PLACES of a page.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from optmem.model.glance import Glance
from optmem.pixels import PIXELS_PER_TOKEN
from optmem.text.characters import END, EOL, CharacterTokenizer

COMMON = " etaoinsrhldcum0123456789"  # in the first sum
PLACES = 4  # of a word on a page that are looked at again


@dataclass(frozen=True, slots=True)
class Sifted:
    """A word on a page."""

    page: int  # its number among those that were given
    word: int
    row: int
    confidence: float  # the geometric mean of its symbols' probabilities


class Sieve:
    """Words to look for, in capitals or not, in any number of pages."""

    def __init__(self, glance: Glance, tokenizer: CharacterTokenizer, words: Sequence[str], *, temperature: float = 1.0) -> None:
        self.glance, self.temperature = glance, temperature
        spelled = [_spellings(word, tokenizer) for word in words]
        common = [*tokenizer.encode(COMMON), tokenizer.special(EOL), tokenizer.special(END)]
        self.ids = torch.tensor(sorted({*common, *(one for word in spelled for symbol in word for one in symbol)}))
        place = {one: at for at, one in enumerate(self.ids.tolist())}
        self.weight, self.bias = glance.symbols.weight.float(), glance.symbols.bias.float()
        self.words = [[[place[one] for one in symbol] for symbol in word] for word in spelled]

    @torch.inference_mode()
    def find(self, tokens: Tensor, least: float) -> list[Sifted]:
        """Where the words are likely to stand on pages of one size, [B, n, D]."""
        found: list[Sifted] = []
        cells = self.glance.vote(tokens).argmax(-1)
        for winner in sorted(set(cells.tolist())):
            pages = (cells == winner).nonzero()[:, 0]
            cell = self.glance.known[winner]
            if PIXELS_PER_TOKEN % cell[0] == 0 and PIXELS_PER_TOKEN % cell[1] == 0:
                found += self._find(tokens[pages], pages.tolist(), cell, least)
        return found

    def _find(self, tokens: Tensor, pages: list[int], cell: tuple[int, int], least: float) -> list[Sifted]:
        side, down, across = _grid(tokens.shape[1], cell)
        weight, bias = self.glance.symbols.weight[self.ids], self.glance.symbols.bias[self.ids][:, None]
        hidden: list[Tensor] = []  # of each page [cells token by token, width]
        # Symbols first: what is looked at along the rows of a page then lies side by side.
        some = torch.empty(len(self.ids), len(tokens), side, down, side, across, device=tokens.device)
        for read in self.glance.hidden(tokens, cell):
            flat = read.flatten(1, 2)
            logits = torch.addmm(bias, weight, flat.flatten(0, 1).T)
            here = some[:, len(hidden) : len(hidden) + len(flat)]
            here.copy_(logits.view(len(weight), len(flat), side, side, down, across).transpose(3, 4))
            hidden += flat
        chances = some.flatten(2).div_(self.temperature).log_softmax(0)  # [ids, B, cells row by row]
        order = _reading_order(tokens.shape[1], cell).to(tokens.device)
        found: list[Sifted] = []
        for number, word in enumerate(self.words):
            scores = _along(chances, word)  # [B, cells]
            likely = (scores.amax(1) >= math.log(least)).nonzero()[:, 0]
            if not len(likely):
                continue
            best, start = scores[likely].topk(min(PLACES, scores.shape[1]), dim=1)
            which, place = (best >= math.log(least)).nonzero().unbind(1)
            page, start = likely[which], start[which, place]
            exact = self._exact(hidden, order, page, start, word)
            rows = (start // (side * across)).tolist()
            for one, row, value in zip(page.tolist(), rows, exact.tolist(), strict=True):
                if value >= least:
                    found.append(Sifted(pages[one], number, row, value))
        return found

    def _exact(self, hidden: Sequence[Tensor], order: Tensor, page: Tensor, start: Tensor, word: Sequence[Sequence[int]]) -> Tensor:
        """With all symbols in the sum, of words that begin at these cells."""
        cells = order[start[:, None] + torch.arange(len(word), device=start.device)]  # [places, symbols of the word]
        at = torch.stack([hidden[one][each] for one, each in zip(page.tolist(), cells, strict=True)])
        logits = torch.nn.functional.linear(at.float(), self.weight, self.bias)  # in fp32, where no new shape takes a new kernel
        chances = (logits / self.temperature).log_softmax(-1)
        total = torch.zeros(len(page), device=start.device)
        for offset, symbol in enumerate(word):
            total += chances[:, offset, self.ids[list(symbol)]].amax(-1)
        return (total / len(word)).exp()


def _grid(squares: int, cell: tuple[int, int]) -> tuple[int, int, int]:
    """Tokens along a page's side, and cells down and across a token."""
    return round(squares**0.5), PIXELS_PER_TOKEN // cell[0], PIXELS_PER_TOKEN // cell[1]


def _reading_order(squares: int, cell: tuple[int, int]) -> Tensor:
    """Where each cell of a page, row by row, stands among the cells of its tokens, token by token."""
    side, down, across = _grid(squares, cell)
    return torch.arange(squares * down * across).view(side, side, down, across).transpose(1, 2).reshape(-1)


def _along(chances: Tensor, word: Sequence[Sequence[int]]) -> Tensor:
    """The mean over the symbols of a word that begins at each cell, [B, cells]; less than nothing where it would leave the page."""
    pages, cells = chances.shape[1:]
    total = torch.full((pages, cells), -math.inf, device=chances.device)
    fits = cells - len(word) + 1
    if fits <= 0:
        return total
    some = torch.zeros(pages, fits, device=chances.device)
    for offset, (first, *others) in enumerate(word):
        best = chances[first, :, offset : offset + fits]
        for other in others:
            best = torch.maximum(best, chances[other, :, offset : offset + fits])
        some += best
    total[:, :fits] = some / len(word)
    return total


def _spellings(word: str, tokenizer: CharacterTokenizer) -> list[list[int]]:
    """For every symbol of a word, the ids that it may have."""
    forms = [tokenizer.encode(form) for form in dict.fromkeys((word, word.lower(), word.upper()))]
    same = [form for form in forms if len(form) == len(forms[0])]
    return [sorted(set(ids)) for ids in zip(*same, strict=True)]
