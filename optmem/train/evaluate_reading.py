"""Pages read as users read them: by rows, greedily, and by a glance; and the distributions behind what was said."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import takewhile

import numpy as np
import torch
from torch import Tensor

from optmem.engine.rows import PageRows, draft_page, read_pages
from optmem.errors import InputError
from optmem.model.cache import Cache
from optmem.model.decoder import Decoder
from optmem.model.glance import Glance, Glimpse, centres
from optmem.model.model import Model
from optmem.model.nano import Row, count_rows, embed_prefix, longest_row
from optmem.ops import PAGE_UNIT
from optmem.pages import read_symbols
from optmem.pixels import PIXELS_PER_TOKEN, Mode
from optmem.text.characters import END, EOL, MAX_ROWS, CharacterTokenizer
from optmem.train.distance import keep
from optmem.train.evaluate_pages import Sample, mode_of
from optmem.train.scores import PageScore, likeness, score_rows

_PIXELS_AT_ONCE = 2**21
_OUTSIDE = "\0"  # stands for a special token among symbols

# What is asked of pages, with what a glance saw of each -> their rows.
Reader = Callable[["Nano", Sequence["Asked"]], list[list[Row]]]
Rows = range | None  # None is the whole page: rows from 0 on until the decoder says that the text ends, of which nothing is told


@dataclass(frozen=True, slots=True)
class Nano:
    """A model of the family nano, whose parts are known to be there."""

    model: Model
    tokenizer: CharacterTokenizer
    glance: Glance

    @classmethod
    def of(cls, model: Model) -> Nano:
        """The same model.  Raises InputError where it does not read by rows or has no glance."""
        if not isinstance(model.tokenizer, CharacterTokenizer) or model.glance is None:
            raise InputError(f"eval measures models of the family nano with their tokenizer, got {model.config.family}")
        return cls(model, model.tokenizer, model.glance)

    @property
    def device(self) -> torch.device:
        """Where it computes."""
        return self.model.decoder.lm_head.weight.device

    def prefix(self, features: Tensor, mode: Mode) -> Tensor:
        """What all rows of a page share, [P, hidden]."""
        return embed_prefix(self.model.encoder, self.model.decoder, features, mode, self.tokenizer)

    def symbols(self, ids: Sequence[int]) -> str:
        """One character for every id."""
        return "".join(self.tokenizer.symbols([token]) or _OUTSIDE for token in ids)


@dataclass(frozen=True, slots=True)
class Asked:
    """A page that is to be read."""

    prefix: Tensor  # [P, hidden]
    rows: Rows
    glimpse: Glimpse  # of the whole page
    most: int  # symbols of a row


@dataclass(frozen=True, slots=True)
class Reading:
    """What was said of some rows of a page."""

    true: tuple[str, ...]  # symbols of those rows which the text reaches
    rows: list[Row]  # up to the one in which the decoder said that the text ends
    said: tuple[str, ...]  # their symbols
    seen: Tensor  # int64 [rows, columns]  what the glance took the same rows' cells for
    cell: tuple[int, int]  # that it took for the page's, in pixels of the picture
    glanced: tuple[str, ...]  # the symbols of the rows that the glance took for part of the text

    def score(self) -> PageScore:
        """How well the decoder read.  Names among symbols say nothing, as for whoever asked."""
        return score_rows([row.replace(_OUTSIDE, "") for row in self.said], self.true)

    def glance_likeness(self) -> float:
        """How well the glance read, by the same measure."""
        said, true = (read_symbols("".join(rows)) for rows in (self.glanced, self.true))
        return likeness(said.replace(_OUTSIDE, ""), true)


def read_drafted(nano: Nano, asked: Sequence[Asked]) -> list[list[Row]]:
    """Greedy decoding with the glance as a draft."""
    drafted = [draft_page(page.prefix, page.glimpse, nano.tokenizer, page.rows, page.most) for page in asked]
    pages = [replace(page, seen=each.glimpse) for page, each in zip(drafted, asked, strict=True)]
    return read_pages(nano.model.decoder, pages, nano.tokenizer)


def read_greedily(nano: Nano, asked: Sequence[Asked]) -> list[list[Row]]:
    """The same answers, token by token."""
    pages = [PageRows(page.prefix, page.rows, max_symbols=page.most, seen=page.glimpse) for page in asked]
    return read_pages(nano.model.decoder, pages, nano.tokenizer)


@torch.inference_mode()
def encode(nano: Nano, samples: Sequence[Sample]) -> list[Tensor]:
    """Vision tokens of pictures of one form, [n, hidden] each."""
    images = torch.from_numpy(np.stack([sample.image for sample in samples])[..., None])
    at_once = max(_PIXELS_AT_ONCE // images[0].numel(), 1)
    parts = torch.split(images, at_once)
    return [features for some in parts for features in nano.model.encoder(some.to(nano.device))]


def choose_rows(sample: Sample, most: int, random: np.random.Generator) -> Rows:
    """A stretch of `most` rows somewhere in the page's text, and where it reaches the end a row below it; 0 is the whole page."""
    if most == 0:
        return None
    used = len(sample.rows)
    start = int(random.integers(max(used - most, 0) + 1))
    stop = start + most if start + most < used else used + 1
    return range(start, min(stop, MAX_ROWS))


@torch.inference_mode()
def read_samples(
    nano: Nano, samples: Sequence[Sample], features: Sequence[Tensor], rows: Sequence[Rows], reader: Reader = read_drafted
) -> list[Reading]:
    """These rows of pages of one form, from their vision tokens or from others that a control puts in their place."""
    mode, glimpses = mode_of(samples[0].form), [nano.glance.read(tokens) for tokens in features]
    pages = zip(features, rows, glimpses, strict=True)
    asked = [Asked(nano.prefix(tokens, mode), wanted, glimpse, longest_row(mode.size)) for tokens, wanted, glimpse in pages]
    answers = reader(nano, asked)
    return [_reading(nano, *page) for page in zip(samples, asked, answers, strict=True)]


def _reading(nano: Nano, sample: Sample, asked: Asked, answers: Sequence[Row]) -> Reading:
    wanted = slice(None) if asked.rows is None else slice(asked.rows.start, asked.rows.stop)
    rows = list(answers[: count_rows([row.is_below for row in answers])])
    seen = asked.glimpse.ids[wanted].cpu()
    said = tuple(nano.symbols(row.ids) for row in rows)
    return Reading(sample.rows[wanted], rows, said, seen, asked.glimpse.cell, _glanced(nano, seen))


def _glanced(nano: Nano, seen: Tensor) -> tuple[str, ...]:
    """Rows of the text, each up to the end of its line."""
    end, line_end = nano.tokenizer.special(END), nano.tokenizer.special(EOL)
    cells = seen.tolist()
    reached = cells[: count_rows([ids[0] == end for ids in cells])]
    return tuple(nano.symbols(list(takewhile(lambda token: token not in (end, line_end), ids))) for ids in reached)


# --- confidence -----------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Judged:
    """Symbols that were said, how sure the reader was of each, and whether it stands there."""

    confidence: np.ndarray[tuple[int], np.dtype[np.float64]]
    is_right: np.ndarray[tuple[int], np.dtype[np.bool_]]


def judge(reading: Reading) -> Judged:
    """Every symbol that the decoder said.  It was asked for a row, so it is held against that row, by their best alignment."""
    right: list[bool] = []
    for number, said in enumerate(reading.said):
        right += _right(reading, number, said)
    logprobs = [logprob for row in reading.rows for logprob in row.logprobs[: len(row.ids)]]
    return Judged(np.exp(np.array(logprobs, dtype=np.float64)), np.array(right, dtype=np.bool_))


def _right(reading: Reading, number: int, said: str) -> list[bool]:
    true = reading.true[number] if number < len(reading.true) else ""
    kept = set(keep(true, said))
    return [place in kept for place in range(len(said))]


@dataclass(frozen=True, slots=True)
class Distributions:
    """The logits behind symbols that were said: what a temperature is fitted on."""

    logits: Tensor  # fp32 [n, vocabulary]
    said: Tensor  # int64 [n]
    is_right: Tensor  # bool [n]


@torch.inference_mode()
def decoder_distributions(nano: Nano, reading: Reading, features: Tensor, mode: Mode, numbers: Sequence[int]) -> Distributions:
    """Of these rows of a reading: one pass over what was said gives the logits that every symbol was chosen from."""
    chosen = [number for number in numbers if number < len(reading.rows) and reading.rows[number].ids]
    rows = [reading.rows[number] for number in chosen]
    right = [right for number in chosen for right in _right(reading, number, reading.said[number])]
    logits = said_logits(nano.model.decoder, nano.prefix(features, mode), rows, nano.tokenizer)
    said = [token for row in rows for token in row.ids]
    return Distributions(logits, torch.tensor(said, dtype=torch.int64), torch.tensor(right, dtype=torch.bool))


def said_logits(decoder: Decoder, prefix: Tensor, rows: Sequence[Row], tokenizer: CharacterTokenizer) -> Tensor:
    """The logits behind every symbol of rows that were read, fp32 [symbols, vocabulary]; on CPU the very same, bit for bit."""
    if not rows:
        return torch.empty(0, decoder.config.vocab_size)
    longest = prefix.shape[0] + max(len(row.ids) for row in rows)
    pages = len(rows) * (longest // PAGE_UNIT + 1) + prefix.shape[0] // PAGE_UNIT + 1
    cache = Cache(decoder.config, pages, dtype=decoder.dtype, device=prefix.device)
    page = cache.new_sequence(prompt=prefix.shape[0])
    decoder(prefix, cache.batch([page], [prefix.shape[0]]), cache)
    given = [[tokenizer.rows[row.number], *row.ids[:-1]] for row in rows]
    tokens = torch.tensor([token for ids in given for token in ids], device=prefix.device)
    batch = cache.batch([page.fork() for _ in rows], [len(ids) for ids in given])
    return decoder.logits(decoder(decoder.embed(tokens), batch, cache)).cpu()


@torch.inference_mode()
def glance_distributions(nano: Nano, reading: Reading, features: Tensor, rows: Rows, most: int, seed: int) -> Distributions:
    """Of some of the cells that the glance took for symbols, at most so many."""
    pixels, _ = centres(round(features.shape[0] ** 0.5) * PIXELS_PER_TOKEN, reading.cell, rows)
    ids = reading.seen.flatten()
    symbols = (ids >= nano.tokenizer.first_symbol).nonzero()[:, 0]
    cells = symbols[torch.randperm(len(symbols), generator=torch.Generator().manual_seed(seed))[:most]]
    logits = nano.glance(features[None], pixels[cells][None].to(features.device))[0].float().cpu()
    width = reading.seen.shape[1]
    true = [_symbol_at(reading.true, cell // width, cell % width) for cell in cells.tolist()]
    right = [nano.symbols([token]) == symbol for token, symbol in zip(ids[cells].tolist(), true, strict=True)]
    return Distributions(logits, ids[cells], torch.tensor(right, dtype=torch.bool))


def _symbol_at(rows: Sequence[str], row: int, column: int) -> str:
    return rows[row][column] if row < len(rows) and column < len(rows[row]) else ""
