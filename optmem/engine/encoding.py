"""The encode queue: pictures of whoever asks while the encoder is busy go through it together, next.

There is no thread of its own.  Who finds the encoder idle serves everybody who waits, oldest first, until their own pictures are
done; who finds it busy waits, and is served by then or serves the next.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from torch import Tensor

from optmem.pixels import Views

PICTURES_AT_ONCE = 64  # of all who wait: their views are held as tensors already, so this bounds what comes out


@dataclass(slots=True, eq=False)
class _Asked:
    """One call's pictures, and what came of them."""

    pictures: Sequence[Views]
    features: list[Tensor] = field(default_factory=list)
    error: Exception | None = None
    is_done: bool = False


class EncodeQueue:
    """An encoder that many threads use."""

    def __init__(self, encode: Callable[[Sequence[Views]], list[Tensor]]) -> None:
        """
        encode   features of every picture; views of one size are grouped there
        """
        self._encode = encode
        self._turn = threading.Condition()
        self._waiting = deque[_Asked]()
        self._is_busy = False

    def encode(self, pictures: Sequence[Views]) -> list[Tensor]:
        """Features of every picture.  Raises what the encoder raises for these pictures, whatever is wrong with others'."""
        asked = _Asked(pictures)
        with self._turn:
            self._waiting.append(asked)
        try:
            while not asked.is_done:
                self._wait_or_serve(asked)
        except BaseException:  # interrupted: nobody needs it any more
            with self._turn:
                if asked in self._waiting:
                    self._waiting.remove(asked)
            raise
        if asked.error is not None:
            try:
                raise asked.error
            finally:
                del asked  # a traceback that held it would hold its pictures
        return asked.features

    def _wait_or_serve(self, asked: _Asked) -> None:
        with self._turn:
            while self._is_busy and not asked.is_done:
                self._turn.wait()
            if asked.is_done:
                return
            self._is_busy, served = True, self._next()
        try:
            self._serve(served)
        finally:
            with self._turn:
                left = [each for each in served if not each.is_done]  # this thread was interrupted: others do it,
                self._waiting.extendleft(each for each in reversed(left) if each is not asked)  # but for its own
                self._is_busy = False
                self._turn.notify_all()

    def _next(self) -> list[_Asked]:
        """The oldest calls, as many as may go together."""
        served = [self._waiting.popleft()]
        count = len(served[0].pictures)
        while self._waiting and count + len(self._waiting[0].pictures) <= PICTURES_AT_ONCE:
            served.append(self._waiting.popleft())
            count += len(served[-1].pictures)
        return served

    def _serve(self, served: Sequence[_Asked]) -> None:
        """Encodes calls together; where that fails, each alone."""
        try:
            features = self._encode([picture for each in served for picture in each.pictures])
        except Exception as error:
            if len(served) > 1:
                for each in served:
                    self._serve([each])
            else:
                served[0].error, served[0].is_done = error, True
            return
        end = 0
        for each in served:
            first, end = end, end + len(each.pictures)
            each.features, each.is_done = features[first:end], True
