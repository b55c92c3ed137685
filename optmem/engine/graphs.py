"""A runner whose passes of one token per text are recorded once for every size and replayed.

    works ──fill──> staging ──copy──> ids positions slots lengths prompts, table ──replay──> picks ──copy──> staging ──> Said
                    of the host       of the device, always in the same place                 the one wait of a pass

A pass is filled up to its bucket with its first row, said again: what it reads is read anyway, of experts and of the cache, it
writes nowhere, and nobody asks what it picks.  Prompts, chunks of them and proposals go as they do without graphs.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from contextlib import AbstractContextManager

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from optmem import ops
from optmem.engine.buckets import table_bucket, text_bucket
from optmem.engine.draft import Said
from optmem.engine.lanes import Lane, Recordings
from optmem.engine.runner import Runner, picks_of
from optmem.engine.sampling import packed, pick, plain_arguments, unpacked
from optmem.engine.scheduler import Work
from optmem.model.cache import Batch, Cache
from optmem.model.decoder import Decoder

log = logging.getLogger(__name__)
NOWHERE = -1  # a slot
IDS, POSITIONS, SLOTS, LENGTHS, PROMPTS = range(5)  # rows of what a pass is told about every text


class Inputs:
    """What a pass of one token per text is given, in memory that stays where it is."""

    def __init__(self, lane: Lane, cache: Cache, texts: int, max_positions: int) -> None:
        self.lane, self.cache = lane, cache
        self.is_free = True  # whether no copy from the staging memory is on its way: not where a pass has failed
        width = -(-max_positions // cache.page_size)
        self._staged = lane.staging((5, texts), torch.int64), lane.staging((texts, width), torch.int32)
        self._numbers, self._table = (staged.numpy() for staged in self._staged)
        self.numbers, self.table = (torch.zeros_like(staged, device=lane.device) for staged in self._staged)
        self.starts = torch.arange(texts + 1, device=lane.device)
        self._rows: list[NDArray[np.int32] | None] = [None] * texts  # of the table, as they were written

    def fill(self, works: Sequence[Work], size: int) -> None:
        """Of texts that have room for their tokens already."""
        if not self.is_free:
            self.lane.wait()
        self.is_free = False
        sequences, count, page_size = [work.written for work in works], len(works), self.cache.page_size
        numbers = self._numbers
        numbers[IDS, :count] = [work.ids[0] for work in works]
        numbers[LENGTHS, :count] = [sequence.length for sequence in sequences]
        numbers[PROMPTS, :count] = [sequence.prompt for sequence in sequences]
        numbers[POSITIONS, :count] = numbers[LENGTHS, :count] - 1
        pages = np.array([sequence.pages[-1] for sequence in sequences])
        numbers[SLOTS, :count] = pages * page_size + numbers[POSITIONS, :count] % page_size
        numbers[:, count:size] = numbers[:, :1]
        numbers[SLOTS, count:size] = NOWHERE
        rows = [sequence.row() for sequence in sequences]
        changed = self._fill_table([*rows, *rows[:1] * (size - count)])
        self.numbers.copy_(self._staged[0], non_blocking=True)
        if changed:
            self.table[:changed].copy_(self._staged[1][:changed], non_blocking=True)

    def _fill_table(self, rows: Sequence[NDArray[np.int32]]) -> int:
        """The end of what has changed: a text's pages do once in page_size tokens."""
        end = 0
        for at, row in enumerate(rows):
            if self._rows[at] is not row:
                self._table[at, : len(row)] = row
                self._rows[at], end = row, at + 1
        return end

    def batch(self, size: int, width: int) -> Batch:
        """For the first so many texts, of so many pages at most."""
        positions, slots, lengths, prompts = self.numbers[POSITIONS:, :size]
        return Batch(positions, slots, self.starts[: size + 1], lengths, prompts, self.table[:size, :width])

    def width(self, works: Sequence[Work]) -> int:
        """Of a table that names all pages of these texts."""
        return table_bucket(max(len(work.written.pages) for work in works), self.table.shape[1])


class GraphRunner(Runner):
    """A runner over a lane."""

    def __init__(self, decoder: Decoder, cache: Cache, lane: Lane, *, texts: int, temperature: float = 1.0) -> None:
        """
        texts   that a pass may have at most
        """
        super().__init__(decoder, cache, temperature=temperature)
        self.lane, self.texts = lane, texts
        self.is_recording = True
        self.passes = Recordings(lane, "decode")
        self._inputs = Inputs(lane, cache, texts, decoder.config.max_positions)
        self._largest = ("picks", texts, self._inputs.table.shape[1])
        self._heard = lane.staging((3 * texts,), torch.float64)
        self._settings = [setting.to(lane.device) for setting in plain_arguments(texts)]
        self._logits: Tensor | None = None  # fp32 [texts, vocab], where guards or sampling look at them

    @torch.inference_mode()
    def run(self, works: Sequence[Work]) -> Said:
        """As a runner's."""
        is_recorded = self.is_recording and 0 < len(works) <= self.texts and all(map(_is_single, works))
        return self._replayed(works) if is_recorded else self._plainly(works)

    def _plainly(self, works: Sequence[Work]) -> Said:
        for work in works:
            if work.vectors is not None:
                self.lane.use(work.vectors)  # made where pictures are encoded
        return super().run(works)

    def _replayed(self, works: Sequence[Work]) -> Said:
        self.check_ids([work.ids[0] for work in works])  # what is recorded cannot refuse anything
        self.cache.append([work.written for work in works], [1] * len(works))
        if not self.passes.is_known(self._largest):
            self._record_largest(works)
        size, width, picks = text_bucket(len(works), self.texts), self._inputs.width(works), picks_of(works)
        self._inputs.fill(works, size)
        if picks:
            logits = self.passes.run(("logits", size, width), lambda: self._said(size, width))
            said = pick(logits[: len(works)], picks, confidence_temperature=self.temperature)
        else:
            said = self._told(self.passes.run(("picks", size, width), lambda: self._picked(size, width)), len(works))
        self._inputs.is_free = True  # the host has waited
        return said

    def _record_largest(self, works: Sequence[Work]) -> None:
        """Before any other: smaller ones find their memory in what it leaves.  Ever larger ones would each ask for more."""
        self._inputs.fill(works, self.texts)
        _, size, width = self._largest
        try:
            for _ in range(2):  # called, then recorded; what it writes to the cache is what the pass is about to write
                self.passes.run(self._largest, lambda: self._picked(size, width))
        except torch.OutOfMemoryError:  # which fails this pass; it is tried again, and is then no larger than it must be
            self.is_recording = False
            log.warning("decode: nothing is recorded, for there is no room for a pass of %d texts", self.texts)
            raise

    def _hidden(self, size: int, width: int) -> Tensor:
        """[size, hidden]."""
        embedded = self.decoder.model.embed_tokens(self._inputs.numbers[IDS, :size])
        hidden: Tensor = self.decoder(embedded, self._inputs.batch(size, width), self.cache)
        return hidden

    def _picked(self, size: int, width: int) -> Tensor:
        """The likeliest tokens, as `packed` has them: [3, size]."""
        logits, settings = self.decoder.logits(self._hidden(size, width)), [setting[:size] for setting in self._settings]
        picked = ops.pick_token(logits, *settings, most_guard=0, is_sampled=False, confidence_temperature=self.temperature)
        return packed(*picked)

    def _said(self, size: int, width: int) -> Tensor:
        """Logits, fp32 [size, vocab], in memory that all sizes share."""
        if self._logits is None:
            self._logits = torch.empty(self.texts, self.decoder.config.vocab_size, device=self.lane.device)
        return self._logits[:size].copy_(self.decoder.logits(self._hidden(size, width)))

    def _told(self, picked: Tensor, count: int) -> Said:
        """What the host has been waiting for, of the rows that somebody asked for."""
        heard = self._heard[: picked.numel()].view(picked.shape)
        heard.copy_(picked, non_blocking=True)
        self.lane.wait()
        return unpacked(heard[:, :count])

    def working(self) -> AbstractContextManager[None]:
        """On the lane."""
        return self.lane.working()


def _is_single(work: Work) -> bool:
    """Whether one token is fed, that was said before, and one is asked for."""
    return work.count == 1 and work.asked == 1 and work.vectors is None
