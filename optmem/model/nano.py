"""Nano reads by rows: a compressed page is random-access.

    <bos>, vision rows each with a newline, separator | <row_17> c0 c1 .. <eol> <row_18>     a row, and what comes after it
    <bos>, vision rows each with a newline, separator | <row_99> <end>                       a row below the text

The prefix is one for all rows, so a page is all its rows in parallel over one cache: nothing about the page's layout is told, rows
are asked for until one answers `<end>`.  A row after another, with its own `<row_n>` emitted, is the stream of the document.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from optmem.errors import InputError
from optmem.model.assembly import assemble
from optmem.model.cache import Cache
from optmem.model.cache import Sequence as Written
from optmem.model.decoder import Decoder
from optmem.model.encoder import Encoder
from optmem.ops import PAGE_UNIT
from optmem.pixels import NO_TILES, Mode
from optmem.text.characters import BOS, END, EOL, CharacterTokenizer


@dataclass(slots=True)
class Row:
    """What the decoder said of one row."""

    number: int
    ids: list[int] = field(default_factory=list)  # symbols alone
    logprobs: list[float] = field(default_factory=list)  # of the symbols, and of what ended the row
    ended_by: str = "length"  # "eol", "end" where the text is over before this row, or "length"


def embed_prefix(encoder: Encoder, decoder: Decoder, features: Tensor, mode: Mode, tokenizer: CharacterTokenizer) -> Tensor:
    """What all rows of a page share, [1 + mode.fed_tokens(), hidden], from its features [mode.paper_tokens(), hidden]."""
    begin = decoder.embed(torch.tensor([tokenizer.special(BOS)], device=features.device))
    picture = assemble(features, mode, NO_TILES, encoder.image_newline, encoder.view_seperator)
    return torch.cat([begin, picture.to(begin.dtype)])


@torch.inference_mode()
def read_rows(
    decoder: Decoder, prefix: Tensor, rows: Sequence[int], tokenizer: CharacterTokenizer, *, max_symbols: int = 256
) -> list[Row]:
    """These rows of a page, greedily and all at once; on CPU each is what it would be alone, bit for bit.

    prefix   [P, hidden], as embed_prefix makes it

    Raises InputError for a row that the vocabulary has no name for.
    """
    names = tokenizer.rows
    outside = [row for row in rows if not 0 <= row < len(names)]
    if outside:
        raise InputError(f"rows are 0 to {len(names) - 1}, got {outside[0]}")
    cache = _cache_for(decoder, prefix, len(rows), max_symbols)
    page = cache.new_sequence(prompt=prefix.shape[0])
    decoder(prefix, cache.batch([page], [prefix.shape[0]]), cache)
    found = [Row(row) for row in rows]
    asked = [(row, page.fork(), names[row.number]) for row in found]
    for _ in range(max_symbols + 1):
        if asked:
            asked = list(_step(decoder, cache, asked, tokenizer))
    return found


Asked = tuple[Row, Written, int]  # a row, its part of the cache, and the token to be written next


def _step(decoder: Decoder, cache: Cache, asked: Sequence[Asked], tokenizer: CharacterTokenizer) -> Iterator[Asked]:
    """One token more for every row; those that go on."""
    tokens = torch.tensor([token for _, _, token in asked], device=cache.keys.device)
    hidden = decoder(decoder.embed(tokens), cache.batch([written for _, written, _ in asked], [1] * len(asked)), cache)
    logprobs, ids = decoder.logits(hidden).log_softmax(-1).max(-1)
    ends = {tokenizer.special(EOL): "eol", tokenizer.special(END): "end"}
    for (row, written, _), token, logprob in zip(asked, ids.tolist(), logprobs.tolist(), strict=True):
        row.logprobs.append(logprob)
        if token in ends:
            row.ended_by = ends[token]
            written.close()
        else:
            row.ids.append(token)
            yield row, written, token


def _cache_for(decoder: Decoder, prefix: Tensor, num_rows: int, max_symbols: int) -> Cache:
    shared = -(-prefix.shape[0] // PAGE_UNIT)
    own = -(-(prefix.shape[0] + max_symbols + 1) // PAGE_UNIT) - shared + 1  # one copy of the page in which the prefix ends
    return Cache(decoder.config, shared + num_rows * own, dtype=decoder.dtype, device=prefix.device)


def join_rows(rows: Iterable[Row], tokenizer: CharacterTokenizer) -> str:
    """The text of rows in order, up to the first that the text does not reach."""
    ids: list[int] = []
    for row in rows:
        if row.ended_by == "end":
            break
        ids += row.ids
    return tokenizer.text(ids)
