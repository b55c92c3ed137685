"""One text while it is said, and what several texts begin with.

    prefix                own          ids
    <bos> page newlines   <row_17>     c0 c1 c2 ..                   a row: all rows of a page share its prefix
    <bos> page newlines   \\nFree OCR.  w0 w1 w2 ..                   a prompt: several prompts on one page share its prefix
    (none)                <bos> .. ..  w0 w1 w2 ..                   words before the page: nothing is shared

What is written to the cache is always a beginning of that line.  So there is one rule for prompts, single tokens and texts that
gave their memory back: feed what is not written yet, and behind the last known token there is a new one to be picked.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field

from torch import Tensor

from optmem.engine.draft import Draft, Said, accept
from optmem.engine.result import FinishReason
from optmem.engine.sampling import GREEDY, Sampling
from optmem.model.cache import Sequence as Written

PATIENCE = 128  # tokens that a draft may be wrong in more than it was right in, before it is asked no more


@dataclass(slots=True, eq=False)
class Prefix:
    """What several texts begin with: written once, and shared by their forks."""

    embeddings: Tensor  # [P, hidden]
    written: Written | None = None
    users: int = 0  # texts that are not over
    length: int = field(init=False)  # tokens

    def __post_init__(self) -> None:
        self.length = self.embeddings.shape[0]

    @property
    def is_whole(self) -> bool:
        """Whether all of it is in the cache, or there is nothing of it."""
        return self.length == (0 if self.written is None else self.written.length)

    def close(self) -> None:
        """Gives its memory back."""
        if self.written is not None:
            self.written.close()
            self.written = None


@dataclass(slots=True, eq=False)
class Speech:
    """A text, what is asked of it, and what was said so far."""

    prefix: Prefix
    own: Tensor  # [n, hidden]  what is known behind the prefix, at least one token
    most: int  # tokens to say
    stops: Collection[int] = ()  # ids that end it
    sampling: Sampling = GREEDY
    draft: Draft | None = None
    listen: Callable[[int], FinishReason | None] | None = None  # told every token; may end the text
    order: tuple[int, ...] = ()  # who comes first: lower ones are served first and give way last
    deadline: float | None = None  # time.monotonic

    written: Written | None = None  # in the cache; None while it waits
    ids: list[int] = field(default_factory=list)  # said so far, what ended it included
    logprobs: list[float] = field(default_factory=list)
    probabilities: list[float] = field(default_factory=list)  # of the same tokens at the temperature of confidence
    finish: FinishReason | None = None
    error: Exception | None = None
    passes: int = 0
    accepted: int = 0  # proposed tokens that the decoder said too
    refused: int = 0
    prompt: int = field(init=False)  # tokens known before the first is said

    def __post_init__(self) -> None:
        self.prompt = self.prefix.length + self.own.shape[0]

    @property
    def known(self) -> int:
        """Tokens of the prompt and of what was said."""
        return self.prompt + len(self.ids)

    @property
    def is_ended(self) -> bool:
        """Whether one of the stops ended it."""
        return bool(self.ids) and self.ids[-1] in self.stops

    def propose(self, vocab_size: int, most: int) -> list[int]:
        """What the draft says: `most` tokens, up to what ends the text, with room left for one of the decoder's own."""
        if self.draft is None or self.refused > self.accepted + PATIENCE:
            return []
        most = min(most, self.most - len(self.ids) - 1)
        if most < 1:
            return []
        proposed = self._up_to_stop([int(token) for token in self.draft.propose(tuple(self.ids))[:most]])
        if proposed and not (min(proposed) >= 0 and max(proposed) < vocab_size):
            return proposed[: next(at for at, token in enumerate(proposed) if not 0 <= token < vocab_size)]
        return proposed

    def _up_to_stop(self, ids: list[int]) -> list[int]:
        """Tokens up to the first that ends the text, with it."""
        for stop in self.stops:
            if stop in ids:
                ids = ids[: ids.index(stop) + 1]
        return ids

    def unended(self, proposed: list[int]) -> list[int]:
        """What has to be fed of a proposal: nothing stands behind what ends a text."""
        return proposed[:-1] if proposed and proposed[-1] in self.stops else proposed

    def take(self, proposed: Sequence[int], said: Said, first: int, end: int) -> None:
        """What the decoder says to this proposal, from its `first` on; what was written of the refused part is forgotten again."""
        self.passes += 1
        if proposed:
            agreed = accept(proposed, said.ids, first)
            self.accepted, self.refused = self.accepted + agreed, self.refused + len(proposed) - agreed
            end = min(first + agreed + 1, end)  # a proposal that ends the text and is right has no token behind it
        ids = self._up_to_stop(said.ids[first : min(end, first + self.most - len(self.ids))])
        heard = None
        if self.listen is not None:
            for count, token in enumerate(ids, 1):
                heard = self.listen(token)
                if heard is not None:
                    ids = ids[:count]
                    break
        end = first + len(ids)
        self.ids += ids
        self.logprobs += said.logprobs[first:end]
        self.probabilities += said.probabilities[first:end]
        if self.is_ended:
            self.finish = "stop"
        elif heard is not None or len(self.ids) >= self.most:
            self.finish = heard or "length"
        elif proposed and self.written is not None:
            self.written.truncate(self.known - 1)

    def rest(self) -> None:
        """Gives its memory back; what was said stays, and is fed again when it goes on."""
        if self.written is not None:
            self.written.close()
            self.written = None
