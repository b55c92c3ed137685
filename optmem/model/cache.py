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
from typing import Literal, get_args

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from optmem.errors import InputError
from optmem.machine import empty_weight, to_device
from optmem.model.config import DecoderConfig
from optmem.ops import PAGE_UNIT, CacheScales

GONE = -1  # stands for a page that was given back

Kv = Literal["auto", "8bit"]  # how keys and values are held: as they are computed, or as int8 with scales


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
    roomy_to: int = field(default=0, init=False, repr=False)  # length up to which its last page has room and is its own, if known
    _row: NDArray[np.int32] | None = field(default=None, init=False, repr=False)  # the pages as a table has them

    def __post_init__(self) -> None:
        if self.prompt < 0:
            raise InputError(f"a prompt has 0 tokens or more, got {self.prompt}")

    def row(self) -> NDArray[np.int32]:
        """The pages, as a table has them: another array whenever they have changed, which is once in page_size tokens."""
        if self._row is None:
            self._row = np.array(self.pages, dtype=np.int32)
        return self._row

    def append(self, count: int) -> tuple[int, int]:
        """Makes room for the next tokens and says which they are, first and end.  Changes nothing where there is no room."""
        (end,) = self.cache.append([self], [count])
        return end - count, end

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
        unseen, passed = self.unseen(), self.passed()
        if not passed:  # in all passes but one in page_size
            return
        self.cache.give_back(passed)
        self.pages[unseen.start : unseen.stop] = [GONE] * len(unseen)
        self.roomy_to, self._row = 0, None

    def extend(self, count: int) -> None:
        """What append does once there is room."""
        size = self.cache.page_size
        if self.length % size > 0 and self.cache.users[self.pages[-1]] > 1:
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
        self.roomy_to = len(self.pages) * size

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
            self.roomy_to, self._row = 0, None

    def fork(self, prompt: int | None = None) -> Sequence:
        """A sequence that begins with this one's tokens and goes its own way; its prompt may be longer than this one's."""
        fork = Sequence(self.cache, self.prompt if prompt is None else prompt, self.length, list(self.pages))
        self.roomy_to = 0
        most = self.gone().start * self.cache.page_size
        if self.gone() and fork.prompt > most:
            raise InputError(f"a fork's prompt can have {most} tokens, for those behind were given back, got {fork.prompt}")
        self.cache.share(self.pages)
        return fork

    def close(self) -> None:
        """Gives all pages back."""
        self.truncate(0)


class _LastBatch:
    """The table of the last batch: the same texts come pass after pass, and few of them have got a page meanwhile."""

    def __init__(self) -> None:
        self.prompts: list[int] = []  # of the sequences
        self._sequences: list[Sequence] = []
        self._table = np.zeros((0, 0), dtype=np.int32)

    def is_of(self, sequences: Several[Sequence]) -> bool:
        """Whether the last batch was of just these."""
        return self._sequences == sequences  # by identity

    def forget(self) -> None:
        """The next batch is of others, whatever it is of."""
        self._sequences = []

    def table(self, sequences: Several[Sequence], changed: Several[int]) -> NDArray[np.int32]:
        """[sequences, most pages of one], GONE where there is none; the caller's own.

        changed   those whose pages may not be what they were; all of them, where the last batch was not of these
        """
        width = max([len(sequences[at].pages) for at in changed], default=0)
        is_known, self._sequences = self.is_of(sequences), []  # until the table is whole again
        if not is_known:
            self.prompts = [sequence.prompt for sequence in sequences]
            self._table = np.full((len(sequences), width), GONE, dtype=np.int32)
        elif width > self._table.shape[1]:
            self._table = np.pad(self._table, ((0, 0), (0, width - self._table.shape[1])), constant_values=GONE)
        for at in changed:
            row = sequences[at].pages
            self._table[at, : len(row)] = row
            self._table[at, len(row) :] = GONE
        self._sequences = list(sequences)
        return self._table.copy()


def check_kv(kv: str) -> None:
    """Raises InputError for a way to hold keys and values that there is not."""
    if kv not in get_args(Kv):
        raise InputError(f"kv must be {' or '.join(map(repr, get_args(Kv)))}, got {kv!r}")


class Cache:
    """The pages of all layers.  Layer n's keys are keys[n], [pages, page_size, heads, head_dim]; their scales are scales_of(n)."""

    def __init__(
        self,
        config: DecoderConfig,
        num_pages: int,
        page_size: int = PAGE_UNIT,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
        *,
        kv: Kv = "auto",
    ) -> None:
        """
        kv   "auto" holds keys and values in dtype, "8bit" as int8 with an fp32 scale for every head of every token
        """
        check_kv(kv)
        if num_pages < 1 or page_size < 1 or page_size % PAGE_UNIT:
            raise InputError(f"a cache has pages of a multiple of {PAGE_UNIT} tokens, got {num_pages} pages of {page_size}")
        shape = (config.layers, num_pages, page_size, config.heads, config.head_dim)
        self.page_size = page_size
        self.window = config.window
        self.keys, self.values = (empty_weight(shape, torch.int8 if kv == "8bit" else dtype, device) for _ in range(2))
        is_scaled = kv == "8bit"
        self.scales = CacheScales(*(empty_weight(shape[:-1], torch.float32, device) for _ in range(2))) if is_scaled else None
        self.users = [0] * num_pages  # sequences that hold a page
        self.free = list(range(num_pages))[::-1]
        self._last = _LastBatch()

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

    def scales_of(self, layer: int) -> CacheScales | None:
        """What a step of a layer's keys and values is worth; None where they are held as they are computed."""
        return None if self.scales is None else CacheScales(self.scales.keys[layer], self.scales.values[layer])

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
        for cache in (self.keys, self.values, *(self.scales or ())):
            cache[:, to] = cache[:, page]

    def batch(self, sequences: Several[Sequence], counts: Several[int]) -> Batch:
        """Appends so many tokens to every sequence and says where they go.  Changes nothing where there is no room for all."""
        ends, changed = self._append(sequences, counts)
        table = self._last.table(sequences, changed)
        texts, tokens, device = len(counts), sum(counts), self.keys.device
        is_step = texts == tokens  # one token of each
        numbers = self._of_step(sequences, ends) if is_step else self._of_several(table, counts, ends)
        sizes = (tokens, tokens, texts + 1, texts, texts)
        positions, slots, starts, lengths, prompts = to_device(torch.from_numpy(numbers), device).split_with_sizes(sizes)
        return Batch(positions, slots, starts, lengths, prompts, to_device(torch.from_numpy(table), device))

    def _of_step(self, sequences: Several[Sequence], ends: Several[int]) -> NDArray[np.int64]:
        """Positions, slots, starts, lengths and prompts of one token of each, in one array.

        Behind a pass's weights no code is in a cache any more: a call of numpy that takes 2 us in a loop takes 10 to 20 here, so
        that plain lists are faster.
        """
        size, positions, slots = self.page_size, list[int](), list[int]()
        for sequence, end in zip(sequences, ends, strict=True):
            page, cell = divmod(end - 1, size)
            positions.append(end - 1)
            slots.append(sequence.pages[page] * size + cell)
        return np.array([*positions, *slots, *range(len(ends) + 1), *ends, *self._last.prompts])

    def _of_several(self, table: NDArray[np.int32], counts: Several[int], ends: Several[int]) -> NDArray[np.int64]:
        """The same of several tokens."""
        starts = np.zeros(len(counts) + 1, dtype=np.int64)
        np.cumsum(counts, out=starts[1:])
        rows = np.repeat(np.arange(len(counts)), counts)
        positions = np.arange(len(rows)) + (np.array(ends) - starts[1:])[rows]
        pages, cells = np.divmod(positions, self.page_size)
        slots = table[rows, pages].astype(np.int64) * self.page_size + cells
        return np.concatenate((positions, slots, starts, ends, self._last.prompts))

    def append(self, sequences: Several[Sequence], counts: Several[int]) -> list[int]:
        """Makes room for the next tokens of every sequence and says what lengths they have then.

        What no later token sees is given back first.  Changes nothing where there is no room for all.
        """
        self._last.forget()
        return self._append(sequences, counts)[0]

    def _append(self, sequences: Several[Sequence], counts: Several[int]) -> tuple[list[int], list[int]]:
        """Their new lengths, and those whose pages may not be what they were in the last batch."""
        if len(sequences) != len(counts) or not sequences:
            raise InputError(f"a batch needs sequences and a count for each, got {len(sequences)} and {len(counts)}")
        if min(counts) < 1:
            raise InputError(f"a pass takes at least one token of a sequence, got {min(counts)}")
        is_known = self._last.is_of(sequences)
        if not is_known:
            self._check_own(sequences)
        most = sum(counts) // self.page_size + 2 * len(counts)  # pages: a part of one and a copy of one for each
        if most > len(self.free):
            self._check_room(*self._room(sequences, counts))
        if self.window is not None:
            for sequence in sequences:
                sequence.forget_unseen()
        ends, changed = list[int](), list[int]()
        for at, (sequence, count) in enumerate(zip(sequences, counts, strict=True)):
            end = sequence.length + count
            if end <= sequence.roomy_to:  # nearly all texts in nearly all passes
                sequence.length = end
            else:
                sequence.extend(count)
                changed.append(at)
            ends.append(end)
        return ends, changed if is_known else list(range(len(ends)))

    def _check_own(self, sequences: Several[Sequence]) -> None:
        for at, sequence in enumerate(sequences):
            if sequence.cache is not self:
                raise InputError(f"a batch takes sequences of its own cache, but number {at} is of another")
        if len(set(sequences)) < len(sequences):
            raise InputError(f"a batch takes a sequence once, but of its {len(sequences)} only {len(set(sequences))} differ")

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
        roomy = [sequence for sequence in sequences if sequence.roomy_to]
        assert all(sequence.roomy_to == len(sequence.pages) * self.page_size for sequence in roomy), "room is misjudged"
        assert all(self.users[sequence.pages[-1]] == 1 for sequence in roomy), "a sequence would write to a page of others"
        rows = all(sequence.row().tolist() == sequence.pages for sequence in sequences)
        assert rows, "a sequence's row is not of its pages"


def _held(pages: Iterable[int]) -> list[int]:
    return [page for page in pages if page != GONE]
