"""`ocr`: pictures at one end, their texts at the other, in order; encoding and reading at the same time, in bounded memory.

pictures ──> show, encode, ask ──> window ──> wait, read again if it turned in circles ──> texts
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import islice
from typing import Protocol

from optmem.engine.modes import next_mode
from optmem.engine.requests import Answer
from optmem.engine.result import Attempt, Completion, failed
from optmem.engine.vision_tokens import VisionTokens
from optmem.errors import ModelError, OptmemError
from optmem.model.config import ModelConfig
from optmem.pixels import Mode, Views

WINDOW = 64  # pages that are encoded and not done
AT_ONCE = 16  # pictures that are encoded together


@dataclass(frozen=True, slots=True)
class Shown:
    """A picture as the encoder is given it."""

    mode: Mode
    views: Views
    picture: tuple[int, int]  # width and height, as it came


class Reader(Protocol):
    """The part of an engine that a pipeline needs."""

    def show(self, picture: object, mode: Mode | str | None) -> Shown:
        """A picture in its mode."""

    def encode(self, shown: Sequence[Shown]) -> list[VisionTokens]:
        """The vision tokens of pictures."""

    def ask(self, page: VisionTokens) -> Answer:
        """A request that is on its way."""

    def cancel(self, asked: Answer) -> None:
        """Gives it up."""


@dataclass(slots=True)
class _Page:
    """A picture on its way."""

    picture: object
    mode: Mode | str | None
    shown_in: Mode | None = None
    request: Answer | None = None
    error: OptmemError | None = None
    attempts: list[Attempt] = field(default_factory=list)


class Pipeline:
    """One run over pictures."""

    def __init__(self, reader: Reader, config: ModelConfig, *, retries: int) -> None:
        self.reader, self.config, self.retries = reader, config, retries

    def run(self, pictures: Iterator[object], mode: Mode | str | None) -> Iterator[Completion]:
        """Their texts.  Closing the iterator gives up what is on its way."""
        window: deque[_Page] = deque()
        try:
            while True:
                if len(window) <= WINDOW - AT_ONCE:
                    window += self._begin([_Page(picture, mode) for picture in islice(pictures, AT_ONCE)])
                if not window:
                    return
                yield self._end(window[0])
                window.popleft()
        finally:
            for page in window:
                if page.request is not None and not page.request.is_done:
                    self.reader.cancel(page.request)

    def _begin(self, pages: list[_Page]) -> list[_Page]:
        """Encodes pictures and asks for their texts; one that cannot be read keeps its error."""
        shown: list[tuple[_Page, Shown]] = []
        for page in pages:
            try:
                shown.append((page, self.reader.show(page.picture, page.mode)))
            except OptmemError as error:
                page.error = error
        for (page, view), tokens in zip(shown, self._encoded([view for _, view in shown]), strict=True):
            page.shown_in = view.mode
            try:
                if isinstance(tokens, OptmemError):
                    raise tokens
                page.request = self.reader.ask(tokens)
            except OptmemError as error:
                page.error = error
        return pages

    def _encoded(self, shown: Sequence[Shown]) -> Sequence[VisionTokens | OptmemError]:
        """The vision tokens of pictures; where they fail together, each is tried alone."""
        try:
            return self.reader.encode(shown)
        except (RuntimeError, MemoryError, OptmemError) as error:
            if len(shown) > 1:
                return [tokens for each in shown for tokens in self._encoded([each])]
            failure = error if isinstance(error, OptmemError) else ModelError(f"encoding failed: {type(error).__name__}")
            return [failure]

    def _end(self, page: _Page) -> Completion:
        """Waits for a page, and reads it again as long as it turns in circles."""
        while True:
            try:
                if page.error is not None:
                    raise page.error
                assert page.request is not None
                page.request.wait()
                done = page.request.completion()
            except OptmemError as error:
                return failed(error, tuple(page.attempts))
            assert page.shown_in is not None
            larger = next_mode(self.config, page.shown_in) if done.finish_reason == "loop" else None
            if larger is None or len(page.attempts) >= self.retries:
                return replace(done, attempts=(*page.attempts, Attempt(page.shown_in.name, "")))
            page.attempts.append(Attempt(page.shown_in.name, "loop"))
            page.mode = larger
            self._begin([page])
