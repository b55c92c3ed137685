"""Keys and values of many sequences in pages, and the batch that a forward pass is given.

Cache       owns the memory: pages of page_size tokens for every layer, and counts who uses a page
Sequence    one text: its pages, how many tokens are written, how many of them are its prompt
Batch       what a pass does with some sequences' next tokens: plain tensors, nothing to look up

sequence a  [page 0][page 1][page 4 ..]
fork of a   [page 0][page 1][page 4 ..]     all pages are shared, and no memory is needed
appended    [page 0][page 1][page 5 ..]     who writes to a shared page takes a copy of it first
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence as Several
from dataclasses import dataclass, field
from itertools import accumulate

import torch
from torch import Tensor

from optmem.errors import InputError
from optmem.model.config import DecoderConfig
from optmem.ops import PAGE_UNIT


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
    pages: list[int] = field(default_factory=list)

    def append(self, count: int) -> tuple[int, int]:
        """Makes room for the next tokens and says which they are, first and end.  Changes nothing where there is no room."""
        if count < 1:
            raise InputError(f"a pass takes at least one token of a sequence, got {count}")
        first, size = self.length, self.cache.page_size
        must_copy = first % size > 0 and self.cache.users[self.pages[-1]] > 1
        missing = -(-(first + count) // size) - len(self.pages)
        new = self.cache.take(missing + must_copy)
        if must_copy:
            self.cache.copy(self.pages[-1], new[0])
            self.cache.give_back([self.pages.pop()])
        self.pages += new
        self.length += count
        return first, self.length

    def truncate(self, length: int) -> None:
        """Forgets the tokens from this length on, such as drafts that were refused."""
        if not 0 <= length <= self.length:
            raise InputError(f"a sequence of {self.length} tokens cannot be cut to {length}")
        kept = -(-length // self.cache.page_size)
        self.cache.give_back(self.pages[kept:])
        del self.pages[kept:]
        self.length = length

    def fork(self, prompt: int | None = None) -> Sequence:
        """A sequence that begins with this one's tokens and goes its own way; its prompt may be longer than this one's."""
        self.cache.share(self.pages)
        return Sequence(self.cache, self.prompt if prompt is None else prompt, self.length, list(self.pages))

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
        self.keys, self.values = (torch.empty(shape, dtype=dtype, device=device) for _ in range(2))
        self.users = [0] * num_pages  # sequences that hold a page
        self.free = list(range(num_pages))[::-1]

    @classmethod
    def for_tokens(cls, config: DecoderConfig, num_tokens: int, dtype: torch.dtype, device: torch.device | str = "cpu") -> Cache:
        """A cache with room for one sequence of so many tokens."""
        return cls(config, max(1, -(-num_tokens // PAGE_UNIT)), dtype=dtype, device=device)

    def new_sequence(self, prompt: int) -> Sequence:
        """An empty sequence, whose first tokens no window hides."""
        return Sequence(self, prompt)

    def take(self, count: int) -> list[int]:
        """Free pages, now with one user."""
        if count > len(self.free):
            raise InputError(f"{count} pages of {self.page_size} tokens are needed, {len(self.free)} of {len(self.users)} are free")
        pages = [self.free.pop() for _ in range(count)]
        self.share(pages)
        return pages

    def share(self, pages: list[int]) -> None:
        """One user more for every page."""
        for page in pages:
            self.users[page] += 1

    def give_back(self, pages: list[int]) -> None:
        """One user less for every page."""
        for page in pages:
            self.users[page] -= 1
            if self.users[page] == 0:
                self.free.append(page)

    def copy(self, page: int, to: int) -> None:
        """Copies a page of all layers."""
        for cache in (self.keys, self.values):
            cache[:, to] = cache[:, page]

    def batch(self, sequences: Several[Sequence], counts: Several[int]) -> Batch:
        """Appends so many tokens to every sequence and says where they go.  Changes nothing where there is no room for all."""
        if len(sequences) != len(counts) or not sequences:
            raise InputError(f"a batch needs sequences and a count for each, got {len(sequences)} and {len(counts)}")
        spans = self._append(sequences, counts)
        device, widest = self.keys.device, max(len(sequence.pages) for sequence in sequences)
        table = torch.tensor([sequence.pages + [-1] * (widest - len(sequence.pages)) for sequence in sequences])
        positions = torch.cat([torch.arange(first, end) for first, end in spans])
        rows = torch.repeat_interleave(torch.arange(len(counts)), torch.tensor(counts))
        slots = table[rows, positions // self.page_size] * self.page_size + positions % self.page_size
        starts = torch.tensor([0, *accumulate(counts)])
        lengths = torch.tensor([sequence.length for sequence in sequences])
        prompts = torch.tensor([sequence.prompt for sequence in sequences])
        positions, slots, starts, lengths, prompts = (t.to(device) for t in (positions, slots, starts, lengths, prompts))
        return Batch(positions, slots, starts, lengths, prompts, table.to(device, torch.int32))

    @staticmethod
    def _append(sequences: Several[Sequence], counts: Several[int]) -> list[tuple[int, int]]:
        spans: list[tuple[int, int]] = []
        try:
            for sequence, count in zip(sequences, counts, strict=True):
                spans.append(sequence.append(count))
        except InputError:
            for sequence, (first, _) in zip(sequences, spans, strict=False):
                sequence.truncate(first)
            raise
        return spans

    def check_integrity(self, sequences: Several[Sequence]) -> None:
        """Every page is free or held by exactly the sequences that say so, and every sequence has the pages it needs."""
        held = Counter(page for sequence in sequences for page in sequence.pages)
        assert self.users == [held[page] for page in range(len(self.users))], "users of a page are miscounted"
        assert sorted(self.free) == [page for page, users in enumerate(self.users) if users == 0], "a free page is used, or lost"
        for sequence in sequences:
            assert len(sequence.pages) == -(-sequence.length // self.page_size), "a sequence has not the pages it needs"
