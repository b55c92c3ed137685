"""Draft and verify: a guess of what the decoder will say is checked in one pass, and the answer stays the decoder's own.

    a pass feeds      pending  d0   d1   d2   d3         pending: what was said last and is not in the cache yet
    the decoder says  d0       d1   x    .    .          each after all that stands before it
    so it has said    d0       d1   x                    the longest prefix that agrees, and one token of its own
    the cache keeps   pending  d0   d1                   x is pending now; what was refused is cut off again

Without a draft a pass feeds one token: plain greedy decoding is this loop with nothing proposed.  So the two say the same by
construction, and on CPU, where a row of every operator has a fixed order of summation, with the same log-probabilities bit for bit
(in fp32 and bf16; fp16 and fp64 run on the reference, whose matrix products choose their order by shape).
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import torch

from optmem.model.cache import Cache
from optmem.model.cache import Sequence as Written
from optmem.model.decoder import Decoder

PATIENCE = 128  # tokens that a draft may be wrong in more than it was right in, before it is asked no more
TOKENS_AT_ONCE = 1024  # of a pass: beyond 500 nano takes no less time for a token (on CPU, bf16: 93 us; for one alone 4,150)


class Draft(Protocol):
    """Whoever has a guess: a glance, n-grams of what was said, a PDF's text layer.  A wrong guess costs time, never correctness."""

    def propose(self, said: Sequence[int]) -> Sequence[int]:
        """The ids that may follow these, what ends the text included; none where nothing is known."""


@dataclass(slots=True, eq=False)
class Stream:
    """A text while the decoder says it."""

    written: Written  # all that stands before `pending`
    pending: int  # known, and the next to be written
    most: int  # tokens to say
    draft: Draft | None = None
    ids: list[int] = field(default_factory=list)  # said so far, what ended it included
    logprobs: list[float] = field(default_factory=list)
    probabilities: list[float] = field(default_factory=list)  # of the same tokens at the temperature of confidence
    is_ended: bool = False  # by one of the stops; else by `most`
    passes: int = 0
    accepted: int = 0  # proposed tokens that the decoder said too
    refused: int = 0

    @property
    def is_over(self) -> bool:
        """Whether nothing is to be said any more."""
        return self.is_ended or len(self.ids) >= self.most

    def propose(self, stops: Collection[int], vocab_size: int, most: int) -> list[int]:
        """What the draft says: `most` tokens, up to what ends the text, with room left for one of the decoder's own."""
        most = min(most, self.most - len(self.ids) - 1)
        if self.draft is None or self.refused > self.accepted + PATIENCE or most < 1:
            return []
        proposed = list(self.draft.propose(self.ids)[:most])
        for at, token in enumerate(proposed):
            if token in stops:
                return proposed[: at + 1]
            if not 0 <= token < vocab_size:
                return proposed[:at]
        return proposed

    def take(self, proposed: Sequence[int], said: Said, stops: Collection[int]) -> None:
        """What the decoder says to this proposal; gives back what was written of the refused part, and at the end everything."""
        agreed = accept(proposed, said.ids)
        new = slice(0, agreed + 1)  # of a proposal that ends the text and is right, there is no own token behind it
        self.ids += said.ids[new]
        self.logprobs += said.logprobs[new]
        self.probabilities += said.probabilities[new]
        self.passes, self.accepted, self.refused = self.passes + 1, self.accepted + agreed, self.refused + len(proposed) - agreed
        self.pending, self.is_ended = self.ids[-1], self.ids[-1] in stops
        if self.is_over:
            self.written.close()
        else:
            self.written.truncate(self.written.length - len(said.ids) + agreed + 1)


@dataclass(frozen=True, slots=True)
class Said:
    """The likeliest token behind each of those that a pass fed: log-probabilities, and probabilities at a temperature."""

    ids: list[int]
    logprobs: list[float]
    probabilities: list[float]

    def part(self, start: int, end: int) -> Said:
        """Those of one stream."""
        return Said(self.ids[start:end], self.logprobs[start:end], self.probabilities[start:end])


def accept(proposed: Sequence[int], said: Sequence[int]) -> int:
    """How many proposed tokens, from the first on, are those that the decoder says."""
    return next((at for at, (guess, token) in enumerate(zip(proposed, said, strict=False)) if guess != token), len(proposed))


@torch.inference_mode()
def advance(decoder: Decoder, cache: Cache, streams: Sequence[Stream], stops: Collection[int], *, temperature: float = 1.0) -> None:
    """Every stream says one token more, or as many more as its draft is right in.

    The more streams there are, the less each proposes: a wrong guess makes everything behind it useless, and a full pass is as fast
    for a token as an overfull one.
    """
    most = TOKENS_AT_ONCE // max(len(streams), 1) - 1
    proposals = [stream.propose(stops, decoder.config.vocab_size, most) for stream in streams]
    fed = [[stream.pending, *_unended(proposed, stops)] for stream, proposed in zip(streams, proposals, strict=True)]
    tokens = torch.tensor([token for some in fed for token in some], device=cache.keys.device)
    batch = cache.batch([stream.written for stream in streams], [len(some) for some in fed])
    said = _said(decoder, decoder(decoder.embed(tokens), batch, cache), temperature)
    end = 0
    for stream, proposed, given in zip(streams, proposals, fed, strict=True):
        start, end = end, end + len(given)
        stream.take(proposed, said.part(start, end), stops)


def _unended(proposed: list[int], stops: Collection[int]) -> list[int]:
    """What has to be fed of a proposal: nothing stands behind what ends a text."""
    return proposed[:-1] if proposed and proposed[-1] in stops else proposed


def _said(decoder: Decoder, hidden: torch.Tensor, temperature: float) -> Said:
    """Hidden states [T, hidden] to what they say."""
    logits = decoder.logits(hidden)
    logprobs, ids = logits.log_softmax(-1).max(-1)
    tempered = logprobs if temperature == 1 else (logits / temperature).log_softmax(-1).amax(-1)
    return Said(ids.tolist(), logprobs.tolist(), tempered.exp().tolist())
