"""One pass: works to tensors, tensors through the decoder, picks back.  The ids are all that the host waits for."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor

from optmem.engine.draft import Said
from optmem.engine.sampling import Pick, pick
from optmem.engine.scheduler import Work
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
        hidden = self.decoder(self._embeddings(works), batch, self.cache)
        asked = _asked(works)
        if not asked:
            return Said([], [], [])
        if len(asked) < hidden.shape[0]:
            hidden = hidden[torch.tensor(asked, device=hidden.device)]
        return pick(self.decoder.logits(hidden), _picks(works), confidence_temperature=self.temperature)

    def working(self) -> AbstractContextManager[None]:
        """Where a thread stays that only runs passes."""
        return nullcontext()

    def _embeddings(self, works: Sequence[Work]) -> Tensor:
        """[T, hidden]: words from the table in one call, vectors of prompts in their places."""
        ids: list[int] = []
        placed: list[tuple[int, Tensor]] = []
        for work in works:
            if work.vectors is not None:
                placed.append((len(ids), work.vectors))
                ids += [0] * work.vectors.shape[0]
            ids += work.ids
        embedded = self.decoder.embed(torch.tensor(ids, device=self.cache.keys.device))
        for first, vectors in placed:
            embedded[first : first + vectors.shape[0]] = vectors
        return embedded


def _asked(works: Sequence[Work]) -> Sequence[int]:
    """The tokens of a pass behind which one is picked."""
    if all(work.asked == work.count for work in works):
        return range(sum(work.count for work in works))
    asked, end = list[int](), 0
    for work in works:
        end += work.count
        asked += range(end - work.asked, end)
    return asked


def _picks(works: Sequence[Work]) -> list[Pick]:
    """How every token is picked; nothing where all are the likeliest."""
    asking = [(work.speech, work) for work in works if work.speech is not None and work.asked]
    if all(speech.sampling.is_plain for speech, _ in asking):
        return []
    return [Pick(speech.sampling, speech.ids, work.proposal, work.asked) for speech, work in asking]
