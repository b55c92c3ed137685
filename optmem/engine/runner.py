"""One pass: works to tensors, tensors through the decoder, picks back.  The ids are all that the host waits for."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import NamedTuple

import torch
from torch import Tensor

from optmem.engine.draft import Said
from optmem.engine.sampling import Pick, pick
from optmem.engine.scheduler import Work
from optmem.errors import InputError
from optmem.machine import to_device
from optmem.model.cache import Cache
from optmem.model.decoder import Decoder


class Runner:
    """A decoder over a cache.  It keeps nothing between passes."""

    def __init__(self, decoder: Decoder, cache: Cache, *, temperature: float = 1.0) -> None:
        """
        temperature   of confidence (Said.probabilities), not of the choice of tokens
        """
        self.decoder, self.cache, self.temperature = decoder, cache, temperature

    @torch.inference_mode()
    def run(self, works: Sequence[Work]) -> Said:
        """What those works are told that ask, one behind the other, `work.asked` tokens each."""
        batch = self.cache.batch([work.written for work in works], [work.count for work in works])
        ids, placed, asked, speaking = _gathered(works)
        hidden = self.decoder(self._embeddings(ids, placed), batch, self.cache)
        if not asked:
            return Said([], [], [])
        if len(asked) < hidden.shape[0]:
            hidden = hidden[to_device(torch.tensor(asked, device="cpu"), hidden.device)]
        return pick(self.decoder.logits(hidden), picks_of(speaking), confidence_temperature=self.temperature)

    def check_ids(self, ids: Sequence[int]) -> None:
        """As the decoder's `embed`, but on the host.  Raises InputError."""
        count = self.decoder.config.vocab_size
        if min(ids) < 0 or max(ids) >= count:
            at = next(at for at, token in enumerate(ids) if not 0 <= token < count)
            raise InputError(f"token ids must be 0 to {count - 1}, got {ids[at]} at {at}")

    def working(self) -> AbstractContextManager[None]:
        """Where a thread stays that only runs passes."""
        return nullcontext()

    def _embeddings(self, ids: Sequence[int], placed: Sequence[tuple[int, Tensor]]) -> Tensor:
        """[T, hidden]: words from the table in one call, vectors of prompts in their places."""
        self.check_ids(ids)
        told = torch.tensor(ids, dtype=torch.int64, device="cpu")
        embedded = self.decoder.embed(to_device(told, self.cache.keys.device), is_checked=True)
        for first, vectors in placed:
            embedded[first : first + vectors.shape[0]] = vectors
        return embedded


class _Gathered(NamedTuple):
    """What a pass is made of."""

    ids: list[int]  # of every token; 0 in the place of a vector
    placed: list[tuple[int, Tensor]]  # vectors of prompts, and where the first of them stands
    asked: list[int]  # the tokens behind which one is picked
    speaking: list[Work]  # whose they are


def _gathered(works: Sequence[Work]) -> _Gathered:
    """All that is asked of works, in one walk over them: there are many, and behind a pass they are in no cache any more."""
    gathered = _Gathered([], [], [], [])
    ids, placed, asked, speaking = gathered
    for work in works:
        if work.vectors is not None:
            placed.append((len(ids), work.vectors))
            ids += [0] * work.vectors.shape[0]
        ids += work.ids
        if work.asked == 1:
            asked.append(len(ids) - 1)
        elif work.asked:
            asked += range(len(ids) - work.asked, len(ids))
        if work.asked:
            speaking.append(work)
    return gathered


def picks_of(works: Sequence[Work]) -> list[Pick]:
    """How every token is picked; nothing where all are the likeliest."""
    if all(work.speech is None or work.speech.sampling.is_plain for work in works):
        return []
    asking = [(work.speech, work) for work in works if work.speech is not None]
    return [Pick(speech.sampling, speech.ids, work.proposal, work.asked) for speech, work in asking]
