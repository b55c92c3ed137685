"""Which tokens the next pass takes, and who waits for memory.

    waiting ──admit──> running ──over──> collected
       ^                  │
       └──── give way ────┘      the youngest rests when an older one needs its pages: what it said stays and is fed again

Older texts come first, everywhere.  The oldest may take the pages of all others, and no text is accepted that could not be said
alone, so whatever is asked comes to its end.  A pass mixes chunks of prompts, single tokens and proposals.
"""

from __future__ import annotations

import heapq
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import count

from torch import Tensor

from optmem.engine.draft import Said
from optmem.engine.result import FinishReason
from optmem.engine.speech import Prefix, Speech
from optmem.errors import InputError, ModelError, shown
from optmem.model.cache import Cache
from optmem.model.cache import Sequence as Written


@dataclass(frozen=True, slots=True)
class Limits:
    """Of one pass.  On two cores of Zen 5 in bf16 a nano row's token takes 136 us among 128 rows, 240 among 33, and 4,150 alone;
    beyond 500 tokens a pass is no faster for one of them."""

    texts: int = 128
    tokens: int = 1024

    def __post_init__(self) -> None:
        if self.texts < 1 or self.tokens < 1:
            raise InputError(f"a pass takes at least one text and one token, got {self.texts} and {self.tokens}")


@dataclass(slots=True, eq=False)
class Work:
    """What a pass feeds of one text, or of a prefix."""

    written: Written
    vectors: Tensor | None  # [n, hidden]  of a prompt
    ids: Sequence[int] = ()  # behind them: said before, then proposed
    speech: Speech | None = None  # None: a prefix
    proposal: Sequence[int] = ()  # what the draft says; its last token is not fed where it ends the text
    asked: int = 0  # tokens picked: one behind everything known, and one behind every proposed token that is fed
    before: int = field(init=False)  # tokens of it in the cache
    count: int = field(init=False)  # tokens fed

    def __post_init__(self) -> None:
        self.before = self.written.length
        self.count = len(self.ids) if self.vectors is None else self.vectors.shape[0] + len(self.ids)

    @property
    def most_pages(self) -> int:
        """Pages of the cache that feeding it can take: with a copy of one that others hold."""
        cache, pages = self.written.cache, self.written.pages
        copied = self.before % cache.page_size > 0 and cache.users[pages[-1]] > 1
        return -(-(self.before + self.count) // cache.page_size) - len(pages) + copied


class Scheduler:
    """The texts that are to be said over one cache."""

    def __init__(self, cache: Cache, vocab_size: int, max_positions: int, limits: Limits | None = None) -> None:
        self.cache, self.vocab_size, self.max_positions = cache, vocab_size, max_positions
        self.limits = limits or Limits()
        self.running: list[Speech] = []  # by order
        self.preemptions = 0
        self._waiting: list[tuple[tuple[int, ...], int, Speech]] = []  # a heap
        self._arrivals = count()
        self._prefixes: list[Prefix] = []  # that have users
        self._deadlines = 0  # texts that have one
        self._is_any_ended = False  # of those that wait

    @property
    def is_idle(self) -> bool:
        """Whether nothing is to be done."""
        return not self.running and not self._waiting

    def add(self, speech: Speech) -> None:
        """Takes a text.  Raises InputError, before anything changes, where the cache or the model is too small for it."""
        self.check(speech.prefix.length, speech.own.shape[0], speech.most)
        if speech.prefix.users == 0:
            self._prefixes.append(speech.prefix)
        speech.prefix.users += 1
        self._deadlines += speech.deadline is not None
        self._wait(speech)

    def end(self, speech: Speech, reason: FinishReason, error: Exception | None = None) -> None:
        """Ends a text that is here, whatever it is doing; `collect` gives it back."""
        if speech.finish is None:
            speech.finish, speech.error, self._is_any_ended = reason, error, True

    def check(self, prefix: int, own: int, most: int) -> None:
        """Raises InputError where a text of these lengths could not be said though it were alone."""
        prompt, size = prefix + own, self.cache.page_size
        if own < 1 or most < 1:
            raise InputError(f"a text needs a prompt and at least one token to say, got {own} and {most}")
        if prompt + most > self.max_positions:
            raise InputError(f"prompt and max_tokens must be at most {self.max_positions} together, got {prompt} and {most}")
        pages = -(-(prompt + most - 1) // size)
        if self.cache.window is not None:
            pages = min(pages, -(-prompt // size) + -(-(self.cache.window + self.limits.tokens) // size) + 1)
        needed = -(-prefix // size) + pages - prefix // size
        if needed > self.cache.num_pages:
            room = f"{needed} pages of {size} tokens, and the cache has {self.cache.num_pages}"
            raise InputError(
                f"a prompt of {prompt} tokens and max_tokens {most} need {room}: ask for less, or make the cache larger"
            )

    # --- what a pass takes ----------------------------------------------------------------------------------------------------

    def plan(self) -> list[Work]:
        """The next pass: empty only where nothing is to be done."""
        self._admit()
        works: list[Work] = []
        left, pages = self.limits.tokens, 0
        share = left // max(len(self.running), 1) - 1
        # Each takes a part of a page, and a copy of one, at most.
        is_roomy = self.cache.num_free > left // self.cache.page_size + 2 * len(self.running)
        for speech in self.running:  # which gets shorter meanwhile, at its end: who gives way is younger than who goes on
            if left < 1 or (speech.written is None and not self._may_begin(speech, works)):
                continue
            work = self._work(speech, left, share)
            pages += 0 if is_roomy else work.most_pages
            if pages > self.cache.num_free and not self._make_room(works, work, speech):
                if speech.written is not None and speech.written.length == speech.prefix.length:
                    speech.rest()  # a fork that fed nothing holds what others could use
                break
            works.append(work)
            left -= work.count
        assert works or not self.running, "somebody waits for memory that nobody holds"
        return works

    def users_of(self, prefix: Written) -> list[Speech]:
        """The texts that begin with what is written here."""
        everyone = (*self.running, *(entry[2] for entry in self._waiting))
        return [speech for speech in everyone if speech.prefix.written is prefix]

    def settle(self, works: Sequence[Work], said: Said) -> None:
        """What a pass said, to those who asked; a text that cannot take it fails, and so does one whose logits hold NaN."""
        is_sound = not said.ids or min(said.ids) >= 0
        end = 0
        for work in works:
            first, end = end, end + work.asked
            if work.speech is None or not work.asked or work.speech.finish is not None:
                continue
            try:
                if not is_sound and min(said.ids[first:end]) < 0:
                    raise ModelError("the decoder said NaN: its weights or these vision tokens are damaged")
                work.speech.take(work.proposal, said, first, end)
            except Exception as error:
                work.speech.finish = None
                self.end(work.speech, "error", shown(error))

    def undo(self, works: Sequence[Work]) -> None:
        """Forgets what a pass that failed had made room for."""
        for work in works:
            work.written.truncate(min(work.before, work.written.length))

    def collect(self) -> list[Speech]:
        """The texts that are over, their memory given back."""
        if self._deadlines:
            self._check_deadlines()
        over = [speech for speech in self.running if speech.finish is not None]
        if over:
            self.running = [speech for speech in self.running if speech.finish is None]
        if self._is_any_ended:
            over += [entry[2] for entry in self._waiting if entry[2].finish is not None]
            self._waiting = [entry for entry in self._waiting if entry[2].finish is None]
            heapq.heapify(self._waiting)
            self._is_any_ended = False
        for speech in over:
            speech.rest()
            speech.prefix.users -= 1
            self._deadlines -= speech.deadline is not None
            if speech.prefix.users == 0:
                speech.prefix.close()
                self._prefixes.remove(speech.prefix)
        return over

    # --- memory ---------------------------------------------------------------------------------------------------------------

    def _admit(self) -> None:
        """Texts begin while there is a place, and memory for more than the next step of those that run."""
        before = len(self.running)
        while self._waiting and len(self.running) < self.limits.texts:
            if self.running and self.cache.num_free <= len(self.running):
                break
            self.running.append(heapq.heappop(self._waiting)[2])
        if len(self.running) > before:
            self.running.sort(key=lambda speech: speech.order)

    def _may_begin(self, speech: Speech, works: Sequence[Work]) -> bool:
        """Whether a text that has nothing in the cache can go on in this pass: not while somebody else writes its prefix."""
        return speech.prefix.is_whole or all(work.written is not speech.prefix.written for work in works)

    def _work(self, speech: Speech, left: int, share: int) -> Work:
        """What a text feeds next, at most `left` tokens."""
        if (
            speech.draft is None
            and speech.written is not None
            and speech.written.length == speech.prompt + len(speech.ids) - 1
            and speech.ids
        ):
            return Work(speech.written, None, speech.ids[-1:], speech, (), 1)  # what nearly all texts do in nearly all passes
        prefix = speech.prefix
        if speech.written is None and not prefix.is_whole:
            if prefix.written is None:
                prefix.written = self.cache.new_sequence(prompt=prefix.length)
            first = prefix.written.length
            return Work(prefix.written, prefix.embeddings[first : first + left])
        if speech.written is None:
            shared = prefix.written
            speech.written = self.cache.new_sequence(speech.prompt) if shared is None else shared.fork(speech.prompt)
        written, known = speech.written.length, speech.known
        end = min(known, written + left)
        ids = speech.ids[max(written - speech.prompt, 0) : max(end - speech.prompt, 0)]
        vectors = speech.own[written - prefix.length : end - prefix.length] if written < speech.prompt else None
        if end < known:
            return Work(speech.written, vectors, ids, speech)
        proposal = self._proposal(speech, min(share, left - (end - written)))
        fed = speech.unended(proposal)
        return Work(speech.written, vectors, ids + fed, speech, proposal, 1 + len(fed))

    def _proposal(self, speech: Speech, most: int) -> list[int]:
        """What a draft says; one that fails ends its text and no other."""
        try:
            return speech.propose(self.vocab_size, most)
        except Exception as error:
            self.end(speech, "error", shown(error))
            return []

    def _make_room(self, works: Sequence[Work], work: Work, speech: Speech) -> bool:
        """Whether there are pages for this as well; who is younger gives way."""
        sequences, counts = [each.written for each in (*works, work)], [each.count for each in (*works, work)]
        while not self.cache.fits(sequences, counts):
            busy = {id(each) for each in sequences}
            if not self._close_idle_prefix(busy) and not self._rest_youngest(busy, speech):
                return False
        return True

    def _close_idle_prefix(self, busy: set[int]) -> bool:
        """Forgets a prefix that nobody goes on from now."""
        used = {id(speech.prefix) for speech in self.running if speech.written is not None}
        for prefix in reversed(self._prefixes):
            if prefix.written is not None and id(prefix) not in used and id(prefix.written) not in busy:
                prefix.close()
                return True
        return False

    def _rest_youngest(self, busy: set[int], older: Speech) -> bool:
        for speech in reversed(self.running):
            if speech is older:
                return False
            if speech.written is not None and id(speech.written) not in busy:
                self.preemptions += 1
                self.running.remove(speech)
                self._wait(speech)
                return True
        return False

    def _wait(self, speech: Speech) -> None:
        speech.rest()
        heapq.heappush(self._waiting, (speech.order, next(self._arrivals), speech))

    def _check_deadlines(self) -> None:
        now = time.monotonic()
        for speech in (*self.running, *(entry[2] for entry in self._waiting)):
            if speech.deadline is not None and now >= speech.deadline:
                self.end(speech, "cancelled")

    def check_integrity(self) -> None:
        """Every page of the cache is free, or held by a prefix or a text that is here."""
        waiting = [entry[2] for entry in self._waiting]
        assert all(speech.written is None for speech in waiting), "a text that waits holds memory"
        assert [speech.order for speech in self.running] == sorted(speech.order for speech in self.running), "out of order"
        held = [speech.written for speech in self.running] + [prefix.written for prefix in self._prefixes]
        self.cache.check_integrity([sequence for sequence in held if sequence is not None])
        users = [sum(each.prefix is prefix for each in (*self.running, *waiting)) for prefix in self._prefixes]
        assert users == [prefix.users for prefix in self._prefixes], "users of a prefix are miscounted"
