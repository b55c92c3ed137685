"""The loop: requests in, passes one after the other, requests done.  By hand with `step`, or in a thread of its own.

    submit ──> inbox ──> scheduler ──plan──> runner ──said──> scheduler ──over──> request.follow, or done
    cancel ──> inbox

Only the loop touches texts, scheduler and cache.  A pass that fails is tried again text by text: who fails alone has failed, and
the others go on.  Where the thread itself dies, every request that waits is told so.
"""

from __future__ import annotations

import logging
import os
import threading
from collections import deque
from collections.abc import Callable, Sequence

import torch

from optmem.engine.requests import Request
from optmem.engine.runner import Runner
from optmem.engine.scheduler import Scheduler, Work
from optmem.engine.speech import Speech
from optmem.errors import BackendError, shown

log = logging.getLogger(__name__)
CLOSED = "this engine is closed: make a new one"


class Loop:
    """The only one who works with a scheduler and its runner."""

    def __init__(self, scheduler: Scheduler, runner: Runner) -> None:
        self.scheduler, self.runner = scheduler, runner
        self.steps = 0
        self.has_failed = False  # by a fault of ours
        self._of: dict[int, Request] = {}  # by id of a text that is not over
        self._open: set[Request] = set()  # taken and not done
        self._pid = os.getpid()
        self._inbox: deque[Request] = deque()
        self._cancelled: deque[Request] = deque()
        self._wake = threading.Condition()
        self._numbers = 0
        self._thread: threading.Thread | None = None
        self._is_stopping = False
        self._why = CLOSED

    # --- from any thread ------------------------------------------------------------------------------------------------------

    def submit(self, request: Request) -> None:
        """Takes a request; those that came first are served first."""
        with self._wake:
            if self._is_stopping:
                raise BackendError(self._why)
            request.number = self._numbers
            self._numbers += 1
            self._inbox.append(request)
            self._wake.notify()

    def cancel(self, request: Request) -> None:
        """Gives a request up: before the next pass its memory is free again."""
        with self._wake:
            self._cancelled.append(request)
            self._wake.notify()

    def start(self) -> None:
        """Runs in a thread of its own from now on."""
        with self._wake:
            if self._thread is None and not self._is_stopping:
                self._thread = threading.Thread(target=self._run, name="optmem engine", daemon=True)
                self._thread.start()

    def stop(self) -> None:
        """Ends the thread; what is not done is given up."""
        with self._wake:
            self._is_stopping = True
            self._wake.notify()
            thread = self._thread
        if thread is not None and thread is not threading.current_thread():
            thread.join()
        self._give_up("the engine was closed before this was done")

    @property
    def is_usable(self) -> bool:
        """Not after a fault of its own, nor in a child of the process that it was made in, where its thread is not."""
        return not self.has_failed and self._pid == os.getpid()

    # --- the loop's own -------------------------------------------------------------------------------------------------------

    def step(self) -> bool:
        """One pass, and what goes with it; whether anything is left to do."""
        self._take_inbox()
        self._collect()
        works = self.scheduler.plan()
        if works:
            self._work(works)
            self.steps += 1
            self._collect()
        return not self.scheduler.is_idle or bool(self._inbox)

    def _run(self) -> None:
        try:
            with torch.inference_mode(), self.runner.working():
                while self._wait():
                    self.step()
        except BaseException as error:  # a fault of ours: nobody may wait for ever
            log.exception("the engine's loop has failed")
            with self._wake:
                self._is_stopping, self.has_failed = True, True
                self._why = f"the engine's loop has failed: {type(error).__name__}"
            self._give_up(self._why)

    def _wait(self) -> bool:
        """Until there is something to do; whether to go on."""
        with self._wake:
            while not self._is_stopping and self.scheduler.is_idle and not self._inbox and not self._cancelled:
                self._wake.wait()
            return not self._is_stopping

    def _take_inbox(self) -> None:
        while True:
            with self._wake:
                if not self._inbox:
                    break
                request = self._inbox.popleft()
                self._open.add(request)
            self._guard(request, request.begin)
        with self._wake:
            cancelled, self._cancelled = self._cancelled, deque()
        for request in cancelled:
            request.is_cancelled = True
            for speech in request.speeches:
                self.scheduler.end(speech, "cancelled")

    def _add(self, request: Request, speeches: Sequence[Speech]) -> None:
        for speech in speeches:  # all before any: a request is taken whole or not at all
            self.scheduler.check(speech.prefix.length, speech.own.shape[0], speech.most)
        for speech in request.ordered(speeches):
            self._of[id(speech)] = request
            self.scheduler.add(speech)
        if not request.left:
            self._finish(request)

    def _finish(self, request: Request, error: Exception | None = None) -> None:
        self._open.discard(request)
        request.finish(error)

    def _guard(self, request: Request, ask: Callable[[], Sequence[Speech]]) -> None:
        """Takes the texts that a request asks for; a fault of its own ends it and no other."""
        try:
            self._add(request, ask())
        except Exception as error:
            self._fail(request, shown(error))

    def _fail(self, request: Request, error: Exception) -> None:
        for speech in request.speeches:
            self.scheduler.end(speech, "error", error)
        self._finish(request, error)

    def _work(self, works: Sequence[Work]) -> None:
        """A pass; one that fails is undone and tried text by text.  What was said is settled once, whatever comes of it."""
        try:
            said = self.runner.run(works)
        except Exception as error:
            log.warning("a pass of %d texts failed and is tried again one by one: %s", len(works), type(error).__name__)
            self.scheduler.undo(works)
            for work in works:
                self._work_alone(work)
        else:
            self.scheduler.settle(works, said)

    def _work_alone(self, work: Work) -> None:
        try:
            said = self.runner.run([work])
        except Exception as error:
            self.scheduler.undo([work])
            failed = [work.speech] if work.speech is not None else self.scheduler.users_of(work.written)
            for speech in failed:
                self.scheduler.end(speech, "error", shown(error))
        else:
            self.scheduler.settle([work], said)

    def _collect(self) -> None:
        """Those that are over, to their requests, which may ask for more."""
        while over := self.scheduler.collect():
            for speech in over:
                request = self._of.pop(id(speech))
                request.left -= 1
                request.error = request.error or speech.error
                if request.left == 0 and not request.is_done:
                    is_over = request.error is not None or request.is_cancelled or request.is_late
                    self._guard(request, tuple if is_over else request.follow)

    def _give_up(self, reason: str) -> None:
        with self._wake:
            waiting = [*self._inbox, *self._open]
            self._inbox.clear()
        for request in waiting:
            request.finish(BackendError(reason))
