"""What may be asked of a page, checked before anything is computed."""

from __future__ import annotations

import math
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Literal, TypedDict, get_args

from optmem.engine.draft import Draft
from optmem.engine.sampling import GREEDY, Sampling, told
from optmem.errors import InputError
from optmem.images import is_whole
from optmem.text.characters import MAX_ROWS
from optmem.text.ngram import NgramGuard

MOST_STOPS = 16  # strings
LONGEST_STOP = 256  # characters
MOST_PROMPTS = 64  # on one page

DraftName = Literal["auto", "glance", "ngrams", "text"]
GuardName = Literal["auto"]
DRAFTS: tuple[str, ...] = get_args(DraftName)


class Asked(TypedDict, total=False):
    """What decode, stream and ocr may be asked for: the arguments of `options`, which says what they mean."""

    prompt: str | Sequence[str] | None
    rows: Iterable[int] | None
    draft: DraftName | Draft | None
    max_tokens: int | None
    temperature: float
    top_p: float
    seed: int
    ngram_guard: NgramGuard | GuardName | None
    stop: str | Sequence[str] | None
    timeout: float | None


def check_names(asked: Iterable[str]) -> None:
    """Raises InputError for an argument that there is not."""
    known = Asked.__annotations__
    unknown = next((name for name in asked if name not in known), None)
    if unknown is not None:
        raise InputError(f"there is nothing called {unknown!r} to ask for: there is {', '.join(known)}")


@dataclass(frozen=True, slots=True)
class Options:
    """How pages are read.  What a family does not have is refused by its reader (rows.py, texts.py)."""

    prompts: tuple[str | None, ...] = (None,)
    rows: tuple[int, ...] | None = None
    draft: DraftName | Draft | None = "auto"
    max_tokens: int | None = None
    sampling: Sampling = GREEDY
    has_own_guard: bool = False  # sampling.guard was asked for, be it None; otherwise it is the family's
    stops: tuple[str, ...] = ()
    timeout: float | None = None  # seconds

    @property
    def deadline(self) -> float | None:
        """When a page that is asked for now is given up: time.monotonic."""
        return None if self.timeout is None else time.monotonic() + self.timeout


def options(
    *,
    prompt: str | Sequence[str] | None = None,
    rows: Iterable[int] | None = None,
    draft: DraftName | Draft | None = "auto",
    max_tokens: int | None = None,
    temperature: float = 0.0,
    top_p: float = 1.0,
    seed: int = 0,
    ngram_guard: NgramGuard | GuardName | None = "auto",
    stop: str | Sequence[str] | None = None,
    timeout: float | None = None,
) -> Options:
    """The arguments of decode, ocr and stream.

    prompt        a task by its name, or words; several are asked of every page, which is written once.  None: the family's own
    rows          of every page, for nano; None is all down to the end of the text.  Rows below it add nothing,
                  rows below the page are refused
    draft         a guess to be verified, which changes no answer: "glance" is nano's own, "ngrams" what followed before, "text",
                  for ocr, what a PDF says of its page, or any object with `propose` (Engine.text_draft makes one of a text);
                  "auto" is nano's glance and nothing for the others; None: token by token
    max_tokens    of a page, ends of rows counted; finish_reason is "length" where more was to be said
    temperature   0 is greedy; above, tokens are drawn, from the likeliest of mass top_p, the same ones for the same seed
    ngram_guard   what may not repeat; "auto" is what the family's public scripts use
    stop          texts that end an answer and are no part of it
    timeout       seconds of a page from when it is asked for (64 are at once), time in the queue counted; what was read until then
                  comes back as "cancelled"

    Raises InputError for what cannot be.
    """
    if max_tokens is not None and not (is_whole(max_tokens) and max_tokens >= 1):
        raise InputError(f"max_tokens must be a whole number of at least 1, or None, got {told(max_tokens)}")
    if timeout is not None and not (isinstance(timeout, int | float) and math.isfinite(timeout) and timeout > 0):
        raise InputError(f"timeout must be seconds above 0, or None, got {told(timeout)}")
    if draft is not None and not hasattr(draft, "propose") and draft not in DRAFTS:
        raise InputError(f"draft must be {', '.join(map(repr, DRAFTS))}, None or an object that proposes, got {told(draft)}")
    if isinstance(ngram_guard, str) and ngram_guard != "auto":
        raise InputError(f"ngram_guard must be an NgramGuard, 'auto' or None, got {told(ngram_guard)}")
    guard = None if isinstance(ngram_guard, str) else ngram_guard
    return Options(
        _prompts(prompt),
        _rows(rows),
        draft,
        None if max_tokens is None else int(max_tokens),
        Sampling(temperature, top_p, seed, guard),
        ngram_guard != "auto",
        _stops(stop),
        timeout,
    )


def _prompts(prompt: str | Sequence[str] | None) -> tuple[str | None, ...]:
    if prompt is None or isinstance(prompt, str):
        return (prompt,)
    given = tuple(prompt) if isinstance(prompt, Sequence) else ()
    if not 1 <= len(given) <= MOST_PROMPTS or not all(isinstance(each, str) for each in given):
        raise InputError(f"prompt must be a text, 1 to {MOST_PROMPTS} of them, or None, got {_counted(prompt)}")
    return given


def _stops(stop: str | Sequence[str] | None) -> tuple[str, ...]:
    given = () if stop is None else (stop,) if isinstance(stop, str) else tuple(stop) if isinstance(stop, Sequence) else (None,)
    if len(given) > MOST_STOPS or not all(isinstance(each, str) and 0 < len(each) <= LONGEST_STOP for each in given):
        raise InputError(f"stop must be at most {MOST_STOPS} texts of 1 to {LONGEST_STOP} characters, got {_counted(stop)}")
    return tuple(str(each) for each in given)


def _rows(rows: Iterable[int] | None) -> tuple[int, ...] | None:
    """Rows as a tuple; more than any model has names for are refused before a long range is listed."""
    if rows is None:
        return None
    if not isinstance(rows, Iterable):
        raise InputError(f"rows are an iterable of numbers, such as range(12, 15), or None, got {told(rows)}")
    wanted = list(islice(rows, MAX_ROWS + 1))
    wrong = [row for row in wanted if not (is_whole(row) and 0 <= row < MAX_ROWS)]
    if wrong or len(wanted) > MAX_ROWS:
        given = told(wrong[0]) if wrong else f"more than {MAX_ROWS} of them"
        raise InputError(f"rows are whole numbers from 0 to {MAX_ROWS - 1}, got {given}")
    return tuple(int(row) for row in wanted)


def _counted(given: object) -> str:
    """How many texts; their words are not for messages."""
    return f"{len(given)} of them" if isinstance(given, list | tuple) else type(given).__name__
