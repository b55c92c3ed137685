"""Nano's answers: rows of pages, and glances at them, as text."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from math import log

from optmem.engine.result import Completion, FinishReason, Glanced
from optmem.model.glance import Glimpse
from optmem.model.nano import Row, count_rows
from optmem.text.characters import END, EOL, CharacterTokenizer

LOWEST = 8  # pixels: no row of cells is lower


def complete(
    rows: Sequence[Row], tokenizer: CharacterTokenizer, *, vision_tokens: int, side: int, most: int | None = None
) -> Completion:
    """Rows of one page, in order, as what was read of it.

    vision_tokens   what the page's prefix has, its start counted
    side            of the page, in pixels
    most            tokens that are kept

    A row below the text says nothing, and the page ends with it only in so far as no row behind it was asked for.
    """
    kept = list(_first(rows, most))
    ends = {"eol": [tokenizer.special(EOL)], "end": [tokenizer.special(END)], "length": []}
    said = [row.ids + ends[row.ended_by] for row in kept]
    ids = [token for row in kept for token in row.ids]
    return Completion(
        text=tokenizer.text(ids),
        token_ids=tuple(token for tokens in said for token in tokens),
        logprobs=tuple(value for row in kept for value in row.logprobs),
        probabilities=tuple(value for row in kept for value in row.probabilities),
        finish_reason=_reason(rows, kept, tokenizer.num_rows, side),
        prompt_tokens=vision_tokens + len(kept),
        rows=tuple(kept),
        row_symbols=_row_symbols(kept, tokenizer),
    )


def _first(rows: Iterable[Row], most: int | None) -> Iterable[Row]:
    """Rows as long as their tokens, ends counted, are no more than `most`; the first that does not fit is cut."""
    left = most
    for row in rows:
        if left is not None and len(row.logprobs) > left:
            if left > 0:
                yield _cut(row, left)
            return
        yield row
        left = None if left is None else left - len(row.logprobs)


def _cut(row: Row, count: int) -> Row:
    """Its first tokens."""
    ids, logprobs, probabilities = row.ids[:count], row.logprobs[:count], row.probabilities[:count]
    return Row(row.number, ids, logprobs, "length", probabilities, min(row.passes, count), min(row.accepted, count))


def _reason(rows: Sequence[Row], kept: Sequence[Row], names: int, side: int) -> FinishReason:
    """Stopped where every row came to its end and, if the page may have more rows than have names, the text did as well."""
    is_open = side > LOWEST * names and len(kept) == names and not kept[-1].is_below
    return "length" if len(kept) < len(rows) or is_open or any(row.ended_by == "length" for row in kept) else "stop"


def saw(seen: Glimpse, tokenizer: CharacterTokenizer, rows: Sequence[int] | None = None) -> Glanced:
    """A glimpse as text: these rows of it, or all down to the end of the text.

    A cell taken for the end in the middle of a row ends that row, and hides nothing below it: no text ends there.
    """
    found = [_seen_row(number, seen, tokenizer) for number in (range(len(seen.ids)) if rows is None else rows)]
    if rows is None:
        found = found[: count_rows([row.is_below for row in found]) + 1]
    ids = tuple(token for row in found for token in row.ids)
    probabilities = tuple(value for row in found for value in row.probabilities[: len(row.ids)])
    drawn = _row_symbols(found, tokenizer)
    return Glanced(tokenizer.text(ids), ids, probabilities, seen.cell, seen.confidence, tuple(found), drawn)


def _row_symbols(rows: Sequence[Row], tokenizer: CharacterTokenizer) -> tuple[str, ...]:
    """The symbols of every row that stands on the page."""
    return tuple(tokenizer.symbols(row.ids) for row in rows if not row.is_below)


def _seen_row(number: int, seen: Glimpse, tokenizer: CharacterTokenizer) -> Row:
    """One row of cells up to what ends it; below the grid there is no text."""
    if number >= len(seen.ids):
        return Row(number, ended_by="end")
    ends = {tokenizer.special(EOL): "eol", tokenizer.special(END): "end"}
    cells: list[int] = seen.ids[number].tolist()
    stop = next((at for at, token in enumerate(cells) if token in ends), len(cells))
    probabilities = seen.probabilities[number].tolist()[: stop + 1]
    ended_by = ends[cells[stop]] if stop < len(cells) else "eol"
    logprobs = [log(max(value, 1e-30)) for value in probabilities]
    return Row(number, cells[:stop], logprobs, ended_by, probabilities)
