"""Engine: pictures to vision tokens, vision tokens to text."""

from __future__ import annotations

import os
import queue
import threading
import weakref
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, closing, nullcontext
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Self, Unpack

import torch

from optmem.engine.ahead import Ahead
from optmem.engine.checkpoint import (
    FP8,
    Temperatures,
    choose_device,
    choose_precision,
    encoder_fingerprint,
    find_checkpoint,
    load_model,
    quantize_model,
    read_temperatures,
)
from optmem.engine.draft import Draft, Lookup
from optmem.engine.encoding import EncodeQueue
from optmem.engine.graphs import GraphRunner
from optmem.engine.kv import gpu_cache_bytes, gpu_limits, make_cache
from optmem.engine.lanes import Lanes, lanes_for
from optmem.engine.loop import CLOSED, Loop
from optmem.engine.modes import choose_mode
from optmem.engine.options import Asked, DraftName, Options, check_names, options
from optmem.engine.pipeline import Pipeline, Shown
from optmem.engine.requests import Answer
from optmem.engine.result import Completion, Glanced
from optmem.engine.rows import PageRequest, RowsReader
from optmem.engine.runner import Runner
from optmem.engine.sampling import told
from optmem.engine.scheduler import Limits, Scheduler
from optmem.engine.search import LEAST, Found, Words, found_in
from optmem.engine.sift import Sieve
from optmem.engine.texts import Prompter, PromptRequest
from optmem.engine.view_encoder import ViewEncoder
from optmem.engine.vision_tokens import VisionTokens
from optmem.errors import BackendError, CheckpointError, InputError, OptmemError
from optmem.images import Pixels, is_whole, name_of, take_image
from optmem.items import in_parts, watched
from optmem.model.cache import Kv, check_kv
from optmem.model.model import Model
from optmem.pixels import Mode, make_views

MOST_TEXT = 1 << 14  # characters of a PDF's text layer that are looked through at every step: a dense page has a third of it
TEXT_DRAFT = 32  # tokens that a text proposes at once: it is right for long, or not at all
PAGES_AT_ONCE = 64  # pictures, or pages to read: what is held of all others is what was given


class Engine:
    """A model, ready to be used, from any thread.  It keeps nothing of what it read.  `with` closes it at the end."""

    def __init__(
        self,
        model: Model,
        temperatures: Temperatures | None = None,
        *,
        cache_bytes: int | None = None,
        kv: Kv = "auto",
        limits: Limits | None = None,
        lanes: Lanes | None = None,
        folder: Path | None = None,
        fingerprint: str | None = None,
    ) -> None:
        """
        model          its weights are shared, not copied
        temperatures   of its calibration, where it has one
        cache_bytes    for keys and values; None is 2 GiB on a CPU, and most of what is free on a GPU
        kv             how keys and values are held: "auto" as they are computed, "8bit" as int8 with a scale for every head, which
                       holds and moves half of the bytes on a GPU and changes answers a little (docs/notes/kernels.md)
        limits         of one pass; None is what suits a CPU, or a GPU with its memory
        lanes          on which passes are recorded and replayed; None is CUDA graphs on a GPU, and on a CPU nothing is recorded
        folder         of its checkpoint, where what was measured of it is looked for
        fingerprint    of its encoder before that was quantised; None computes it
        """
        check_kv(kv)
        self.model, self.folder = model, folder
        self.temperatures = temperatures
        self.cache_bytes, self.kv, self.limits = cache_bytes, kv, limits
        self._lanes = lanes_for(self.device) if lanes is None else lanes
        encode = model.encode if self._lanes is None else ViewEncoder(model.encoder, self._lanes.encode).encode
        self._encoding = EncodeQueue(encode)
        if fingerprint is not None:
            self.encoder_fingerprint = fingerprint
        self._is_closed = False
        self._loop: Loop | None = None
        self._lock = threading.Lock()

    @classmethod
    def from_pretrained(
        cls,
        name: str | os.PathLike[str] = "nano",
        *,
        device: torch.device | str = "auto",
        dtype: torch.dtype | str = "auto",
        kv: Kv = "auto",
    ) -> Engine:
        """An engine from a checkpoint that is shipped ("nano"), or from a folder in the hub layout.

        device   "auto" is a GPU where there is one
        dtype    "auto" is what is stored, but fp32 on a CPU that multiplies it in software: `optmem env` says which.
                 "int8", on a CPU, holds the decoder's matrices as int8, with a scale for every row, and all else in the type
                 that is fast here: half the memory of bf16.  Tokens are faster only where memory is slow beside the cores.
                 "fp8" holds encoder's and decoder's as 8-bit floats (e4m3) and rounds tokens to them too, for a GPU of compute
                 capability 9.0 on; a CPU does it slowly, for proof.  Its vision tokens are taken for those of the weights it was
                 made of, and differ by some percent (docs/notes/kernels.md).  Such models cannot be saved
        kv       how keys and values are held, as Engine says

        Raises SourceNotFoundError where there is no such checkpoint, CheckpointError where it is damaged or of an unknown model,
        InputError for int8 on a GPU, or a kv that there is not, BackendError for fp8 on a GPU that has no such products.
        """
        check_kv(kv)
        folder, place = find_checkpoint(name), choose_device(device)
        precision = choose_precision(dtype, place)
        model = load_model(folder, place, precision.dtype)
        temperatures = read_temperatures(folder, model)  # compares the weights that are stored
        compared = encoder_fingerprint(model.encoder) if precision.held == FP8 else None
        quantize_model(model, precision.held)
        return cls(model, temperatures, kv=kv, folder=folder, fingerprint=compared)

    @property
    def device(self) -> torch.device:
        """Where the weights lie."""
        return self.model.decoder.lm_head.weight.device

    @cached_property
    def encoder_fingerprint(self) -> str:
        """What VisionTokens of this engine carry, and what those it decodes must carry."""
        return encoder_fingerprint(self.model.encoder)

    # --- pictures to vision tokens ------------------------------------------------------------------------------------------

    def encode(self, images: object, mode: Mode | str | None = None) -> list[VisionTokens]:
        """Vision tokens of every picture, views of one size through the encoder together.

        images   one picture or an iterable of them: Page, PIL image, uint8 array, path
        mode     by its name, or "square <pixels>"; None is a picture's own size, which must be that of a view

        Raises ImageError for what cannot be read, InputError for a mode that the model does not have.
        """
        self._check_open()
        is_one = _is_one(images)
        named = ((picture, "image" if is_one else f"image {number}") for number, picture in enumerate(_pictures(images), 1))
        encoded: list[VisionTokens] = []
        with closing(Ahead()) as ahead:
            shown = (ahead.start(self._take(picture, mode, name)) for picture, name in named)
            for some in in_parts(shown, PAGES_AT_ONCE):
                encoded += self._encode([wait() for wait in some])
                del some  # their views, before the next ones are made
        return encoded

    def _encode(self, shown: Sequence[Shown]) -> list[VisionTokens]:
        features, encoder = self._encoding.encode([each.views for each in shown]), self.encoder_fingerprint
        found = zip(features, shown, strict=True)
        return [VisionTokens(tokens, each.mode, each.views.grid, encoder, each.picture) for tokens, each in found]

    def _take(self, picture: object, mode: Mode | str | None, name: str = "image") -> Callable[[], Shown]:
        """A picture's views, as soon as the result is called: bytes are decoded then, in any thread.  What comes as pixels is cut
        into views at once, so that of many pictures, perhaps a hundred times as large, none is held.

        name   for messages, where the picture has none of its own
        """
        name = name_of(picture, name)
        taken = take_image(picture, name=name)
        if callable(taken):
            return lambda: self._show(taken(), mode, name)
        shown = self._show(taken, mode, name)
        return lambda: shown

    def _show(self, pixels: Pixels, mode: Mode | str | None, name: str) -> Shown:
        height, width = pixels.shape[:2]
        try:
            chosen = choose_mode(self.model.config, mode, height, width)
        except InputError as error:
            raise InputError(f"{name}: {error}" if mode is None else str(error)) from None
        return Shown(chosen, make_views(pixels, chosen), (width, height))

    # --- vision tokens to text ----------------------------------------------------------------------------------------------

    def decode(
        self, tokens: VisionTokens | Iterable[VisionTokens | Sequence[VisionTokens]], **asked: Unpack[Asked]
    ) -> list[Completion]:
        """What stands on every page, in their order; a list in the list is pages that are read together, in one prompt.

        asked   as `options` has it: prompt, rows, draft, max_tokens, temperature, top_p, seed, ngram_guard, stop, timeout.
                With several prompts there are as many answers to a page, one behind the other

        Raises InputError for tokens of another encoder, what cannot be asked, and what this model does not have.
        """
        wanted = self._options(asked)
        requests = (request for pages in self._groups(tokens) for request in self._requests(pages, wanted))
        return [request.completion() for request in self._done(requests)]

    def stream(self, tokens: VisionTokens | Sequence[VisionTokens], **asked: Unpack[Asked]) -> Iterator[str]:
        """The text of a page, or of pages that are read together, as it is said: the parts joined are the whole.

        asked   as for decode, with one prompt.  Closing the iterator gives the page up

        nano reads all rows of a page together, so its parts are lines, which come at the end.
        Raises InputError as decode does.
        """
        wanted = self._options(asked, one="a stream")
        (pages,) = self._groups([tokens])
        parts: queue.SimpleQueue[str | None] = queue.SimpleQueue()
        (request,) = self._requests(pages, wanted, parts.put)
        request.on_done = lambda: parts.put(None)
        return self._told(request, parts)

    def _told(self, request: Answer, parts: queue.SimpleQueue[str | None]) -> Iterator[str]:
        loop = self._started()
        loop.submit(request)
        try:
            while (part := parts.get()) is not None:
                yield part
            request.wait()
            text = request.completion().text  # and with it the last parts are told
            yield from text.splitlines(keepends=True) if isinstance(request, PageRequest) else _left(parts)
        finally:
            if not request.is_done:
                loop.cancel(request)

    def ocr(
        self, images: object, mode: Mode | str | None = None, *, retries: int = 3, **asked: Unpack[Asked]
    ) -> Iterator[Completion]:
        """What stands on every picture, in their order: encoded and read at the same time, in bounded memory.

        images    as for encode; an iterator may be as long as it likes
        retries   a page that turns in circles is read again in the next larger mode, so often at most; `attempts` tells
        asked     as for decode, with one prompt

        A picture that cannot be read gives a Completion with its error, and the others go on.  Pictures are taken ahead of
        their answers, the first alone, then up to 64: whoever makes them must not wait for one.
        """
        if not (is_whole(retries) and retries >= 0):
            raise InputError(f"retries must be a whole number of at least 0, got {told(retries)}")
        pipeline = Pipeline(_Reads(self, self._options(asked, one="ocr")), self.model.config, retries=retries)
        total = len(images) if isinstance(images, Sequence) and not isinstance(images, str | bytes) else None
        return watched(pipeline.run(_pictures(images), mode), "reading", total=total)

    def text_draft(self, text: str) -> Draft:
        """A draft for `decode` and `stream` from a text that a page is likely to say, such as a PDF's text layer: what follows
        the last tokens in it is proposed.  The answer is the same without it; where the text is right it is there sooner."""
        tokenizer = self.model.tokenizer
        if not isinstance(text, str):
            raise InputError(f"a text draft is made from a str, got {told(text)}")
        if tokenizer is None:
            raise CheckpointError("a text draft needs the model's tokenizer, and this model came without one")
        return Lookup(known=tokenizer.encode(text), most=TEXT_DRAFT)

    def glance(self, tokens: VisionTokens | Iterable[VisionTokens], *, rows: Iterable[int] | None = None) -> list[Glanced]:
        """What a glance sees on every page: one pass, no decoder, a probability for every character.

        rows   of every page; None is all down to the end of the text

        Raises InputError as decode does.
        """
        wanted, reader = self._options({"rows": rows}), self._rows_reader("glance")
        temperature = (self.temperatures or Temperatures()).glance
        return [reader.glance(pages, wanted.rows, temperature) for pages in self._groups(tokens)]

    def search(
        self,
        tokens: VisionTokens | Iterable[VisionTokens],
        words: str,
        *,
        limit: int | None = None,
        least: float = LEAST,
        ignore_case: bool = False,
    ) -> list[Found]:
        """Where these words are likely to stand on the pages, the likeliest first: by a glance, with no text and no decoder.

        limit   places, at most; None is all
        least   what is given is at least so sure

        Words that are broken over two lines are found where the line is full.  Raises InputError as glance does, and for words
        that are blank or more than a line.
        """
        if not (isinstance(least, int | float) and 0 < least <= 1):
            raise InputError(f"least must be above 0 and at most 1, got {told(least)}")
        if limit is not None and not (is_whole(limit) and limit >= 0):
            raise InputError(f"limit must be a whole number of at least 0, or None, got {told(limit)}")
        reader = self._rows_reader("search")
        wanted = Words(words, reader.tokenizer, ignore_case=ignore_case)
        temperature = (self.temperatures or Temperatures()).glance
        found: list[Found] = []
        for number, pages in enumerate(self._groups(tokens)):
            found += found_in(number, reader.fits(pages, wanted, temperature), least)
        return sorted(found, key=lambda each: -each.confidence)[:limit]

    def sieve(self, words: Sequence[str]) -> Sieve:
        """Words to look for in very many pages, in capitals or not: `Sieve.find` takes features of pages of one size at once.

        Raises InputError for a public model, and for words that are blank or more than a line.
        """
        reader = self._rows_reader("search")
        for word in words:
            Words(word, reader.tokenizer, ignore_case=True)  # which refuses what cannot be looked for
        return Sieve(reader.head, reader.tokenizer, words, temperature=(self.temperatures or Temperatures()).glance)

    def _rows_reader(self, what: str) -> RowsReader:
        """Nano's reader.  Raises InputError for a public model."""
        if not isinstance(self._reader, RowsReader):
            raise InputError(f"only nano has a {what}, this is a {self.model.config.family} model")
        return self._reader

    # --- behind them --------------------------------------------------------------------------------------------------------

    @cached_property
    def _reader(self) -> RowsReader | Prompter:
        """Who makes requests of pages: by rows for nano, by prompts for the public models."""
        return RowsReader(self.model) if self.model.config.family == "nano" else Prompter(self.model)

    def _requests(
        self, pages: Sequence[VisionTokens], wanted: Options, tell: Callable[[str], None] | None = None
    ) -> Sequence[PageRequest | PromptRequest]:
        """What is to be read of pages.  Their prompts are made beside what is being read."""
        with self._beside():
            return self._reader.requests(pages, wanted, tell=tell)

    def _beside(self, *, follows: bool = False) -> AbstractContextManager[None]:
        """Where a GPU does what it does for pages that are not read yet."""
        return nullcontext() if self._lanes is None else self._lanes.encode.working(follows=follows)

    def _options(self, asked: Asked, *, one: str = "") -> Options:
        self._check_open()
        check_names(asked)
        wanted = options(**asked)
        self._reader.check(wanted)
        if wanted.draft == "text" and one != "ocr":
            raise InputError("draft='text' is for ocr, whose pictures may come with a text; elsewhere make one by text_draft")
        if one and len(wanted.prompts) > 1:
            raise InputError(f"{one} has one prompt: decode takes several")
        return wanted

    def _done(self, requests: Iterable[Answer]) -> Iterator[Answer]:
        """Requests as they are done, in their order, PAGES_AT_ONCE on their way.  Raises what fails first; the rest is given up."""
        loop = self._started()
        waiting: deque[Answer] = deque()
        try:
            for request in requests:
                loop.submit(request)
                waiting.append(request)
                if len(waiting) >= PAGES_AT_ONCE:
                    waiting[0].wait()
                    yield waiting.popleft()
            while waiting:
                waiting[0].wait()
                yield waiting.popleft()
        finally:
            for request in waiting:
                loop.cancel(request)

    def _started(self) -> Loop:
        """The loop, in its own thread; it ends when the engine is no longer referred to."""
        with self._lock:
            self._check_open()
            if self._loop is None or not self._loop.is_usable:
                self._loop = self._new_loop()
                weakref.finalize(self, self._loop.stop)
                self._loop.start()
            return self._loop

    def _new_loop(self) -> Loop:
        decoder, lanes, limits, cache_bytes = self.model.decoder, self._lanes, self.limits or Limits(), self.cache_bytes
        if self.device.type == "cuda":
            free = torch.cuda.mem_get_info(self.device)[0]
            limits = self.limits or gpu_limits(free, self.model.config, decoder.dtype.itemsize)
            if cache_bytes is None:
                cache_bytes = gpu_cache_bytes(free, self.model.config, limits, decoder.dtype, self.kv)
        cache = make_cache(decoder, cache_bytes, self.kv)
        scheduler = Scheduler(cache, decoder.config.vocab_size, decoder.config.max_positions, limits)
        temperature = (self.temperatures or Temperatures()).decoder
        if lanes is None:
            return Loop(scheduler, Runner(decoder, cache, temperature=temperature))
        with lanes.decode.working():
            return Loop(scheduler, GraphRunner(decoder, cache, lanes.decode, texts=limits.texts, temperature=temperature))

    def close(self) -> None:
        """Ends the engine: what is being read is given up, and nothing more is encoded or read."""
        with self._lock:
            self._is_closed = True
            loop = self._loop
        if loop is not None:
            loop.stop()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _check_open(self) -> None:
        if self._is_closed:
            raise BackendError(CLOSED)

    def _groups(self, tokens: VisionTokens | Iterable[VisionTokens | Sequence[VisionTokens]]) -> Iterator[list[VisionTokens]]:
        """Pages that are read together, checked, on the engine's device and in its type."""
        self._check_open()
        groups: Iterable[object] = (tokens,) if isinstance(tokens, VisionTokens) else tokens
        if not isinstance(groups, Iterable) or isinstance(groups, str | bytes | Mapping):
            raise InputError(f"decode and glance take VisionTokens or an iterable of them, got {type(tokens).__name__}")
        for group in groups:
            pages = group if isinstance(group, list | tuple) else (group,)
            if not pages:
                raise InputError("pages that are read together are one or more, got an empty list")
            yield [self._checked(page) for page in pages]

    def _checked(self, page: object) -> VisionTokens:
        if not isinstance(page, VisionTokens):
            raise InputError(f"decode and glance take VisionTokens, as encode makes them, got {type(page).__name__}")
        page.check_fits(self.model.config.decoder.hidden, self.encoder_fingerprint)
        with self._beside(follows=True):
            return replace(page, features=page.features.to(self.device, self.model.decoder.dtype))


@dataclass(frozen=True, slots=True)
class _Reads:
    """An engine as a pipeline needs it."""

    engine: Engine
    wanted: Options

    def take(self, picture: object, mode: Mode | str | None) -> Callable[[], Shown]:
        return self.engine._take(picture, mode)

    def encode(self, shown: Sequence[Shown]) -> list[VisionTokens]:
        return self.engine._encode(shown)

    def ask(self, page: VisionTokens, text: str) -> Answer:
        wanted = self.wanted
        if wanted.draft == "text":
            wanted = replace(wanted, draft=self._draft_of(text))
        (request,) = self.engine._requests([page], wanted)
        self.engine._started().submit(request)
        return request

    def _draft_of(self, text: str) -> Draft | DraftName:
        """Of a text that came with a picture, which may be anything: a guess must not fail a page.  Nano has a better one."""
        if not text or isinstance(self.engine._reader, RowsReader):
            return "auto"
        try:
            return self.engine.text_draft(text[:MOST_TEXT])
        except OptmemError:
            return "auto"

    def cancel(self, asked: Answer) -> None:
        if self.engine._loop is not None:
            self.engine._loop.cancel(asked)


def _left(parts: queue.SimpleQueue[str | None]) -> Iterator[str]:
    """What the end of a text still had to tell."""
    while not parts.empty():
        part = parts.get()
        if part is not None:
            yield part


def _pictures(images: object) -> Iterator[object]:
    """One picture after another."""
    if isinstance(images, Iterable) and not _is_one(images):
        return iter(images)
    return iter((images,))


def _is_one(images: object) -> bool:
    """Whether this is one picture: what can itself be read as one is, though it may be iterable.  Raises InputError for a dict."""
    if isinstance(images, Mapping):
        raise InputError(f"pictures are one picture or an iterable of them, got {type(images).__name__}")
    is_read = isinstance(images, str | bytes | bytearray | os.PathLike) or hasattr(images, "shape") or hasattr(images, "read")
    return is_read or not isinstance(images, Iterable)
