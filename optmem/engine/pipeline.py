"""`ocr`: pictures at one end, their texts at the other, in order; encoding and reading at the same time, in bounded memory.

pictures ──> take ──> show, in threads ──> encode, ask ──> window ──> wait, read again if it turned in circles ──> texts
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import islice
from typing import Protocol, TypeVar

from optmem.engine.ahead import Ahead
from optmem.engine.modes import next_mode
from optmem.engine.requests import Answer
from optmem.engine.result import Attempt, Completion, failed
from optmem.engine.vision_tokens import VisionTokens
from optmem.errors import BackendError, OptmemError, shown
from optmem.images import LoadedImage
from optmem.items import one_ahead
from optmem.model.config import ModelConfig
from optmem.pixels import Mode, Views

WINDOW = 64  # pictures that are taken and not done, those counted whose views are being made
AT_ONCE = 16  # that are encoded together
T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Shown:
    """A picture as the encoder is given it."""

    mode: Mode
    views: Views
    picture: tuple[int, int]  # width and height, as it came


class Reader(Protocol):
    """The part of an engine that a pipeline needs."""

    def take(self, picture: object, mode: Mode | str | None) -> Callable[[], Shown]:
        """A picture's content; and the picture in its mode, by calling the result in any thread."""

    def encode(self, shown: Sequence[Shown]) -> list[VisionTokens]:
        """The vision tokens of pictures."""

    def ask(self, page: VisionTokens, text: str) -> Answer:
        """A request that is on its way; the text is what came with the picture, and may be right."""

    def cancel(self, asked: Answer) -> None:
        """Gives it up."""


@dataclass(slots=True)
class _Page:
    """A picture on its way."""

    picture: object
    show: Callable[[], Shown | OptmemError]  # waits for what is made of it
    mode: Mode | None = None
    error: OptmemError | None = None
    request: Answer | None = None
    attempts: list[Attempt] = field(default_factory=list)

    @property
    def is_ready(self) -> bool:
        """Whether nothing of it is to be waited for."""
        return self.request is None or self.request.is_done


class Pipeline:
    """One run over pictures."""

    def __init__(self, reader: Reader, config: ModelConfig, *, retries: int) -> None:
        self.reader, self.config, self.retries = reader, config, retries
        self.ahead = Ahead()

    def run(self, pictures: Iterator[object], mode: Mode | str | None) -> Iterator[Completion]:
        """Their texts.  Closing the iterator gives up what is on its way; what the pictures' own iterator raises comes last."""
        window: deque[_Page] = deque()
        source = _Source(pictures)
        batches = one_ahead(_growing(self._page(picture, mode) for picture in source.take()))
        is_over = False
        try:
            while window or not is_over:
                if len(window) + 2 * AT_ONCE <= WINDOW:
                    new = next(batches, [])
                    is_over = not new
                    window += new
                    self._begin(new)
                while window and (is_over or window[0].is_ready or len(window) + 2 * AT_ONCE > WINDOW):
                    yield self._end(window[0])
                    window.popleft()
        finally:
            self.ahead.close()
            for page in window:
                if page.request is not None and not page.request.is_done:
                    self.reader.cancel(page.request)
        if source.error is not None:
            raise source.error

    def _page(self, picture: object, mode: Mode | str | None) -> _Page:
        """A picture whose views are being made, or what is wrong with it."""
        taken = _tried(partial(self.reader.take, picture, mode))
        if isinstance(taken, OptmemError):
            return _Page(picture, lambda: taken)
        return _Page(picture, self.ahead.start(partial(_tried, taken)))

    def _begin(self, pages: list[_Page]) -> None:
        """Encodes pictures and asks for their texts; one that cannot be read keeps its error."""
        sound, shown = list[_Page](), list[Shown]()
        for page in pages:
            found = page.show()
            del page.show  # its pixels
            if isinstance(found, OptmemError):
                page.error = found
            else:
                page.mode = found.mode
                sound.append(page)
                shown.append(found)
        for page, tokens in zip(sound, self._encoded(shown), strict=True):
            asked = tokens if isinstance(tokens, OptmemError) else _tried(partial(self.reader.ask, tokens, _text_of(page.picture)))
            if isinstance(asked, OptmemError):
                page.error = asked
            else:
                page.request = asked

    def _encoded(self, views: Sequence[Shown]) -> Sequence[VisionTokens | OptmemError]:
        """The vision tokens of pictures; where they fail together, each is tried alone."""
        found = _tried(partial(self.reader.encode, views))
        if isinstance(found, OptmemError):
            return [found] if len(views) == 1 else [tokens for view in views for tokens in self._encoded([view])]
        return found

    def _end(self, page: _Page) -> Completion:
        """Waits for a page, and reads it again as long as it turns in circles; what was read is kept where that fails."""
        done = self._wait(page)
        while done.finish_reason == "loop" and len(page.attempts) < self.retries:
            assert page.mode is not None
            larger = next_mode(self.config, page.mode)
            if larger is None:
                break
            page.attempts.append(Attempt(page.mode.name, "loop"))
            page.show, page.error, page.mode, page.request = self._page(page.picture, larger).show, None, larger, None
            self._begin([page])
            again = self._wait(page)
            if again.error is not None:
                return replace(done, attempts=(*page.attempts, Attempt(larger.name, "error")))
            done = again
        name = page.mode.name if page.mode is not None else ""
        return done if done.error is not None else replace(done, attempts=(*page.attempts, Attempt(name, "")))

    def _wait(self, page: _Page) -> Completion:
        if page.request is None:
            assert page.error is not None
            return failed(page.error)
        request = page.request

        def finished() -> Completion:
            request.wait()
            return request.completion()

        found = _tried(finished)
        return failed(found) if isinstance(found, OptmemError) else found


def _growing(pages: Iterable[_Page]) -> Iterator[list[_Page]]:
    """Batches of as many as there were before: the first page is alone, and does not wait for a second one."""
    rest, taken = iter(pages), 0
    while new := list(islice(rest, min(AT_ONCE, max(1, taken)))):
        taken += len(new)
        yield new


def _text_of(picture: object) -> str:
    """What a PDF says of its page; no attribute of a user's object is asked for."""
    return picture.text if isinstance(picture, LoadedImage) else ""


class _Source:
    """The pictures; what their iterator raises is kept for the end."""

    def __init__(self, pictures: Iterator[object]) -> None:
        self.pictures = pictures
        self.error: Exception | None = None

    def take(self) -> Iterator[object]:
        """One after the other."""
        try:
            yield from self.pictures
        except Exception as error:
            self.error = error


def _tried(act: Callable[[], T]) -> T | OptmemError:
    """What it gives, or what is wrong with this page.  Where the engine itself is gone, all pages are."""
    try:
        return act()
    except BackendError:
        raise
    except (OptmemError, RuntimeError, MemoryError) as error:
        return shown(error)
