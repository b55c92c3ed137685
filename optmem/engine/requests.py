"""What is asked of the loop: one page of it is one request, made of one text or of many.

A request makes texts, may ask for more when all are over, and is done when none is left.  Its methods but `wait` are the loop's:
nobody else calls them.
"""

from __future__ import annotations

import threading
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence

from optmem.engine.result import Completion, FinishReason
from optmem.engine.speech import Speech


class Request(ABC):
    """Something to be read."""

    def __init__(self, *, deadline: float | None = None) -> None:
        """
        deadline   time.monotonic, when it is given up: what was said until then is the result
        """
        self.deadline = deadline
        self.number = -1  # by arrival, as the loop counts
        self.speeches: list[Speech] = []
        self.left = 0  # texts that are not over
        self.error: Exception | None = None
        self.is_cancelled = False
        self.on_done: Callable[[], None] | None = None  # called once, by the loop
        self._done = threading.Event()

    @abstractmethod
    def begin(self) -> Sequence[Speech]:
        """The first texts."""

    def follow(self) -> Sequence[Speech]:
        """More texts, when all are over; none where it is done."""
        return ()

    @property
    def is_late(self) -> bool:
        """Whether a text of it was given up."""
        return any(speech.finish == "cancelled" for speech in self.speeches)

    @property
    def is_done(self) -> bool:
        """Whether there is a result, or an error."""
        return self._done.is_set()

    def wait(self, seconds: float | None = None) -> bool:
        """Until it is done, or so many seconds; whether it is.  Raises what failed."""
        if not self._done.wait(seconds):
            return False
        if self.error is not None:
            raise self.error
        return True

    # --- the loop's -----------------------------------------------------------------------------------------------------------

    def finish(self, error: Exception | None = None) -> None:
        """It is done."""
        self.error = self.error or error
        is_first = not self._done.is_set()
        self._done.set()
        if is_first and self.on_done is not None:
            self.on_done()

    def ordered(self, speeches: Sequence[Speech]) -> Sequence[Speech]:
        """Texts of this request, with their place in the queue and its deadline."""
        for speech in speeches:
            speech.order, speech.deadline = (self.number, len(self.speeches)), self.deadline
            self.speeches.append(speech)
        self.left += len(speeches)
        return speeches


class Answer(Request):
    """A request whose result is what was read."""

    @abstractmethod
    def completion(self) -> Completion:
        """What was read, once it is done."""


class TextRequest(Request):
    """One text behind a prompt."""

    def __init__(self, speech: Speech, *, deadline: float | None = None) -> None:
        super().__init__(deadline=deadline)
        self.speech = speech

    def begin(self) -> Sequence[Speech]:
        """That one."""
        return [self.speech]

    @property
    def reason(self) -> FinishReason:
        """Why it is over."""
        return self.speech.finish or "cancelled"
