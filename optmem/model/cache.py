"""Keys and values of many sequences in pages, and the batch that a forward pass is given.

Cache       owns the memory: pages of page_size tokens for every layer, and counts who uses a page
Sequence    one text: its pages, how many tokens are written, how many of them are its prompt
Batch       what a pass does with some sequences' next tokens: plain tensors, nothing to look up

sequence a  [page 0][page 1][page 4 ..]
fork of a   [page 0][page 1][page 4 ..]     all pages are shared, and no memory is needed
appended    [page 0][page 1][page 5 ..]     who writes to a shared page takes a copy of it first

With a window W, pages that lie wholly behind the prompt P and before what the next token sees are given back, and their entries
are GONE.  So a text made token by token holds the pages of P tokens, those of W, and at most one more, however long it grows.

P 20, W 16  [page 0][page 1][ GONE ][ GONE ][page 7][page 8 ..]
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from collections.abc import Sequence as Several
from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from optmem.errors import InputError
from optmem.model.config import DecoderConfig
from optmem.ops import PAGE_UNIT

GONE = -1  # stands for a page that was given back


@dataclass(frozen=True, slots=True)
class Batch:
    """The next T tokens of B sequences, one sequence after the other: prompts, chunks of them, single tokens or drafts."""

    positions: Tensor  # int64 [T]      of every token in its sequence
    slots: Tensor  # int64 [T]      cell of the cache that it is written to: page * page_size + offset; negative is nowhere
    starts: Tensor  # int64 [B + 1]  sequence b owns tokens starts[b] .. starts[b + 1]
    lengths: Tensor  # int64 [B]      tokens of the sequence in the cache after this pass
    prompts: Tensor  # int64 [B]      tokens that no window hides
    table: Tensor  # int32 [B, max_pages]

    @property
    def last(self) -> Tensor:
        """The index of every sequence's last token: int64 [B]."""
        return self.starts[1:] - 1


@dataclass(slots=True, eq=False)
class Sequence:
    """One text in a cache."""

    cache: Cache
    prompt: int = 0  # tokens, those still to come counted: known before the first is written, whatever the chunks
    length: int = 0  # tokens written
    pages: list[int] = field(default_factory=list)  # GONE where no later token sees the page
    _row: NDArray[np.int32] | None = field(default=None, init=False, repr=False)  # the pages as a table has them

    def __post_init__(self) -> None:
        if self.prompt < 0:
            raise InputError(f"a prompt has 0 tokens or more, got {self.prompt}")

    def row(self) -> NDArray[np.int32]:
        """The pages, as a table has them: they change once in page_size tokens, and are asked for with every one."""
        if self._row is None:
            self._row = np.array(self.pages, dtype=np.int32)
        return self._row

    def append(self, count: int) -> tuple[int, int]:
        """Makes room for the next tokens and says which they are, first and end.  Changes nothing where there is no room."""
        return self.cache.append([self], [count])[0]

    def unseen(self) -> range:
        """The places of the pages that neither the next token nor a later one sees: none without a window."""
        size, window = self.cache.page_size, self.cache.window
        first = -(-self.prompt // size)
        return range(first, first if window is None else max((self.length - window + 1) // size, first))

    def gone(self) -> range:
        """The places of the pages that were given back: neighbours, for what is unseen begins behind the prompt and only grows."""
        count = self.pages.count(GONE)
        first = self.pages.index(GONE) if count else 0
        return range(first, first + count)

    def passed(self) -> list[int]:
        """The pages that are still held and no longer seen."""
        unseen, gone = self.unseen(), self.gone()
        return self.pages[unseen.start : gone.start] + self.pages[max(unseen.start, gone.stop) : unseen.stop]

    def forget_unseen(self) -> None:
        """Gives back the pages that no later token sees."""
        unseen = self.unseen()
        self.cache.give_back(self.passed())
        self.pages[unseen.start : unseen.stop] = [GONE] * len(unseen)
        self._row = None

    def extend(self, count: int) -> tuple[int, int]:
        """What append does once there is room."""
        first, size = self.length, self.cache.page_size
        if first % size > 0 and self.cache.users[self.pages[-1]] > 1:
            shared = self.pages.pop()
            self.pages += self.cache.take(1)
            self.cache.copy(shared, self.pages[-1])
            self.cache.give_back([shared])
            self._row = None
        self.length += count
        missing = -(-self.length // size) - len(self.pages)
        if missing:
            self.pages += self.cache.take(missing)
            self._row = None
        return first, self.length

    def truncate(self, length: int) -> None:
        """Forgets the tokens from this length on, such as drafts that were refused.

        Where there is a window, the last append may always be undone, and earlier ones as far as their pages are still held.
        """
        if not 0 <= length <= self.length:
            raise InputError(f"a sequence of {self.length} tokens cannot be cut to {length}")
        size, gone = self.cache.page_size, self.gone()
        if gone and self.cache.window is not None:
            most, least = gone.start * size, gone.stop * size + self.cache.window - 1
            if most < length < least:
                allowed = f"{most} or fewer, or {least} or more, for what lies between was given back"
                raise InputError(f"a sequence of {self.length} tokens cannot be cut to {length}: it can to {allowed}")
        self.length, kept = length, -(-length // size)
        if kept < len(self.pages):
            self.cache.give_back(self.pages[kept:])
            del self.pages[kept:]
            self._row = None

    def fork(self, prompt: int | None = None) -> Sequence:
        """A sequence that begins with this one's tokens and goes its own way; its prompt may be longer than this one's."""
        fork = Sequence(self.cache, self.prompt if prompt is None else prompt, self.length, list(self.pages))
        most = self.gone().start * self.cache.page_size
        if self.gone() and fork.prompt > most:
            raise InputError(f"a fork's prompt can have {most} tokens, for those behind were given back, got {fork.prompt}")
        self.cache.share(self.pages)
        return fork

    def close(self) -> None:
        """Gives all pages back."""
        self.truncate(0)


class Cache:
    """The pages of all layers.  Layer n's keys are keys[n], [pages, page_size, heads, head_dim]."""

    def __init__(
        self,
        config: DecoderConfig,
        num_pages: int,
        page_size: int = PAGE_UNIT,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> None:
        if num_pages < 1 or page_size < 1 or page_size % PAGE_UNIT:
            raise InputError(f"a cache has pages of a multiple of {PAGE_UNIT} tokens, got {num_pages} pages of {page_size}")
        shape = (config.layers, num_pages, page_size, config.heads, config.head_dim)
        self.page_size = page_size
        self.window = config.window
        self.keys, self.values = (torch.empty(shape, dtype=dtype, device=device) for _ in range(2))
        self.users = [0] * num_pages  # sequences that hold a page
        self.free = list(range(num_pages))[::-1]

    @classmethod
    def for_tokens(
        cls,
        config: DecoderConfig,
        num_tokens: int,
        dtype: torch.dtype,
        device: torch.device | str = "cpu",
        *,
        prompt: int | None = None,
    ) -> Cache:
        """A cache with room for one sequence of so many tokens.

        prompt   its length, where what follows comes token by token: with a window that takes no more room than the window
        """
        pages = -(-num_tokens // PAGE_UNIT)
        if prompt is not None and config.window is not None:
            pages = min(pages, -(-prompt // PAGE_UNIT) - (-config.window // PAGE_UNIT) + 1)
        return cls(config, max(1, pages), dtype=dtype, device=device)

    def new_sequence(self, prompt: int) -> Sequence:
        """An empty sequence, whose first tokens no window hides."""
        return Sequence(self, prompt)

    def take(self, count: int) -> list[int]:
        """Free pages, now with one user."""
        self._check_room(count, len(self.free))
        pages = [self.free.pop() for _ in range(count)]
        self.share(pages)
        return pages

    def share(self, pages: list[int]) -> None:
        """One user more for every page."""
        for page in _held(pages):
            self.users[page] += 1

    def give_back(self, pages: list[int]) -> None:
        """One user less for every page."""
        for page in _held(pages):
            self.users[page] -= 1
            if self.users[page] == 0:
                self.free.append(page)

    @property
    def num_pages(self) -> int:
        """How many there are."""
        return len(self.users)

    @property
    def num_free(self) -> int:
        """How many of them nobody holds."""
        return len(self.free)

    def fits(self, sequences: Several[Sequence], counts: Several[int]) -> bool:
        """Whether there is room for so many more tokens of every sequence."""
        needed, free = self._room(sequences, counts)
        return needed <= free

    def copy(self, page: int, to: int) -> None:
        """Copies a page of all layers."""
        for cache in (self.keys, self.values):
            cache[:, to] = cache[:, page]

    def batch(self, sequences: Several[Sequence], counts: Several[int]) -> Batch:
        """Appends so many tokens to every sequence and says where they go.  Changes nothing where there is no room for all."""
        self.append(sequences, counts)
        table = np.full((len(sequences), max(len(sequence.pages) for sequence in sequences)), GONE, dtype=np.int32)
        for row, sequence in zip(table, sequences, strict=True):
            row[: len(sequence.pages)] = sequence.row()
        lengths = np.array([sequence.length for sequence in sequences])
        starts = np.zeros(len(counts) + 1, dtype=np.int64)
        np.cumsum(counts, out=starts[1:])
        rows = np.repeat(np.arange(len(counts)), counts)
        positions = np.arange(len(rows)) + (lengths - starts[1:])[rows]
        slots = table[rows, positions // self.page_size].astype(np.int64) * self.page_size + positions % self.page_size
        prompts = np.array([sequence.prompt for sequence in sequences])
        arrays = (positions, slots, starts, lengths, prompts, table)
        return Batch(*(torch.from_numpy(array).to(self.keys.device) for array in arrays))

    def append(self, sequences: Several[Sequence], counts: Several[int]) -> list[tuple[int, int]]:
        """Makes room for the next tokens of every sequence and says which they are, first and end.

        What no later token sees is given back first.  Changes nothing where there is no room for all.
        """
        if len(sequences) != len(counts) or not sequences:
            raise InputError(f"a batch needs sequences and a count for each, got {len(sequences)} and {len(counts)}")
        if min(counts) < 1:
            raise InputError(f"a pass takes at least one token of a sequence, got {min(counts)}")
        for at, sequence in enumerate(sequences):
            if sequence.cache is not self:
                raise InputError(f"a batch takes sequences of its own cache, but number {at} is of another")
        if len(set(sequences)) < len(sequences):
            raise InputError(f"a batch takes a sequence once, but of its {len(sequences)} only {len(set(sequences))} differ")
        most = sum(counts) // self.page_size + 2 * len(counts)  # pages: a part of one and a copy of one for each
        if most > len(self.free):
            self._check_room(*self._room(sequences, counts))
        if self.window is not None:
            for sequence in sequences:
                sequence.forget_unseen()
        return [sequence.extend(count) for sequence, count in zip(sequences, counts, strict=True)]

    def _room(self, sequences: Several[Sequence], counts: Several[int]) -> tuple[int, int]:
        """The pages that a batch needs, and those that will be free when it has given back what it no longer sees."""
        size = self.page_size
        passed = Counter(page for sequence in sequences if self.window is not None for page in sequence.passed())
        freed = sum(users == self.users[page] for page, users in passed.items())
        new = sum(-(-(each.length + count) // size) - len(each.pages) for each, count in zip(sequences, counts, strict=True))
        # All who write to a page but one take a copy of it; that one too, where somebody else keeps the page.
        writers = Counter(sequence.pages[-1] for sequence in sequences if sequence.length % size > 0)
        copies = sum(min(several, self.users[page] - passed[page] - 1) for page, several in writers.items())
        return new + copies, len(self.free) + freed

    def _check_room(self, needed: int, free: int) -> None:
        if needed > free:
            raise InputError(f"{needed} pages of {self.page_size} tokens are needed, {free} of {len(self.users)} are free")

    def check_integrity(self, sequences: Several[Sequence]) -> None:
        """Every page is free or held by exactly the sequences that say so, and every sequence has the pages it needs."""
        assert all(sequence.cache is self for sequence in sequences), "a sequence is of another cache"
        assert len(set(sequences)) == len(sequences), "a sequence is named twice"
        for sequence in sequences:
            held, unseen = _held(sequence.pages), sequence.unseen()
            assert len(sequence.pages) == -(-sequence.length // self.page_size), "a sequence has not the pages it needs"
            assert len(set(held)) == len(held), "a sequence has a page twice"
            assert all(GONE <= page < len(self.users) for page in sequence.pages), "a sequence has a page that does not exist"
            assert all(at in unseen for at, page in enumerate(sequence.pages) if page == GONE), "a page that is seen was given back"
            assert all(sequence.pages[at] == GONE for at in sequence.gone()), "pages that were given back are not neighbours"
        users = Counter(page for sequence in sequences for page in _held(sequence.pages))
        assert self.users == [users[page] for page in range(len(self.users))], "users of a page are miscounted"
        assert sorted(self.free) == [page for page, count in enumerate(self.users) if count == 0], "a free page is used, or lost"
        rows = all(sequence.row().tolist() == sequence.pages for sequence in sequences)
        assert rows, "a sequence's row is not of its pages"


def _held(pages: Iterable[int]) -> list[int]:
    return [page for page in pages if page != GONE]
