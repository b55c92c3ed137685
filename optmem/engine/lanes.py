"""How work gets to a device and back: staging memory, a stream, and functions that are recorded once and replayed.

PlainLane   calls a function again and again, over the same memory: for tests, on any device
CudaLane    records it as a CUDA graph, and has a stream of its own; copies from pinned memory wait for nobody

Two lanes serve an engine, and neither waits for the other: `decode` is the loop's, `encode` that of pictures and of the prompts
that are made of them.  Whoever leaves a lane has waited for his work, so what he takes along may be read from any other; but the
memory is given away by the lane that it came from, which has to be told who reads it (`use`).
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor

log = logging.getLogger(__name__)
Act = Callable[[], Tensor]

# Before a recording torch waits for the whole device, which would break one that another thread is making, of whatever engine.
_RECORDING = threading.Lock()


class Lane(Protocol):
    """A way to a device."""

    @property
    def device(self) -> torch.device:
        """Where it leads."""

    def staging(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """Memory of the host, zero, that the device copies from and to by itself: nobody may touch it until `wait`."""

    def staged(self, tensor: Tensor) -> Tensor:
        """The same numbers in such memory, which is used again only when copies from it are done."""

    def record(self, act: Act) -> Act:
        """What does the same as `act` over the memory that it reads and writes, which must stay, and gives the same tensor, anew
        filled.  Raises what says that it cannot be recorded; `act` was called before."""

    def working(self, *, follows: bool = False) -> AbstractContextManager[None]:
        """This thread's work goes this way, and is done when the context ends.

        follows   it reads what this thread has asked for another way, and waits for that
        """

    def wait(self) -> None:
        """Until all that this thread has asked for is done."""

    def use(self, tensor: Tensor) -> None:
        """Says that the next work of this thread reads memory that came another way: it is not given away before that is done."""


@dataclass(frozen=True, slots=True)
class PlainLane:
    """Calls, and nothing to wait for."""

    device: torch.device = field(default_factory=lambda: torch.device("cpu"))

    def staging(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """Plain memory."""
        return torch.zeros(tuple(shape), dtype=dtype, device="cpu")

    def staged(self, tensor: Tensor) -> Tensor:
        """As it is."""
        return tensor

    def record(self, act: Act) -> Act:
        """Calls it, and puts what it gives where its first result is, as a graph does: who keeps that has it overwritten."""
        kept: list[Tensor] = []

        def replay() -> Tensor:
            result = act()
            if not kept:
                kept.append(result.clone())
            return kept[0].copy_(result)

        return replay

    def working(self, *, follows: bool = False) -> AbstractContextManager[None]:  # noqa: ARG002 - there is one way
        """As ever."""
        return nullcontext()

    def wait(self) -> None:
        """A copy to the host has waited already."""

    def use(self, tensor: Tensor) -> None:
        """All memory is everybody's."""


class CudaLane:
    """CUDA graphs that share one pool: no two of a lane run at once, and what one leaves is read before the next begins."""

    def __init__(self, device: torch.device, *, is_urgent: bool) -> None:
        """
        is_urgent   its work is begun before that of other lanes, and its waits spin: a step of decoding is a few milliseconds
        """
        index = torch.cuda.current_device() if device.index is None else device.index
        self.device, self.is_urgent = torch.device("cuda", index), is_urgent
        self._stream = torch.cuda.Stream(self.device, priority=-1 if is_urgent else 0)  # type: ignore[no-untyped-call]
        self._recorder = torch.cuda.Stream(self.device)  # type: ignore[no-untyped-call]
        self._pool = torch.cuda.graph_pool_handle()
        self._stream.wait_stream(torch.cuda.current_stream(self.device))  # weights may still be on their way

    def staging(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """Pinned memory."""
        return torch.zeros(tuple(shape), dtype=dtype, device="cpu").pin_memory()

    def staged(self, tensor: Tensor) -> Tensor:
        """In pinned memory of torch's own pool, which knows the copies that are made of it."""
        return tensor.pin_memory()

    def record(self, act: Act) -> Act:
        """A CUDA graph, which runs on the stream that its caller has then."""
        graph = torch.cuda.CUDAGraph()
        # The outer context puts the stream back where a recording fails: torch does not.  "thread_local": another thread may
        # ask for memory, or look whether its copy is done, meanwhile.
        with _RECORDING, torch.cuda.device(self.device), torch.cuda.stream(torch.cuda.current_stream(self.device)):
            recording = torch.cuda.graph(graph, pool=self._pool, stream=self._recorder, capture_error_mode="thread_local")
            with recording:
                result = act()

        def replay() -> Tensor:
            graph.replay()
            return result

        return replay

    @contextmanager
    def working(self, *, follows: bool = False) -> Iterator[None]:
        """On the lane's stream."""
        if follows:
            self._stream.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(self._stream):
            try:
                yield
            finally:
                self.wait()

    def wait(self) -> None:
        """For what is on the stream that this thread has."""
        done = torch.cuda.Event(blocking=not self.is_urgent)  # type: ignore[no-untyped-call]
        done.record(torch.cuda.current_stream(self.device))
        done.synchronize()

    def use(self, tensor: Tensor) -> None:
        """Known to the pool of torch that the memory is from."""
        tensor.record_stream(torch.cuda.current_stream(self.device))


@dataclass(frozen=True, slots=True)
class Lanes:
    """Those of an engine."""

    decode: Lane
    encode: Lane


def lanes_for(device: torch.device) -> Lanes | None:
    """Those of a GPU; a CPU needs none."""
    if device.type != "cuda":
        return None
    return Lanes(CudaLane(device, is_urgent=True), CudaLane(device, is_urgent=False))


class Recordings:
    """Functions over memory that stays where it is, by name: called the first time, which loads what they need, then recorded."""

    def __init__(self, lane: Lane, what: str) -> None:
        """
        what   for the log: "decode"
        """
        self.lane, self.what = lane, what
        self.plain: list[Hashable] = []  # names of what could not be recorded
        self._known: dict[Hashable, Act | None] = {}  # None: called once

    def is_known(self, name: Hashable) -> bool:
        """Whether something was run under this name."""
        return name in self._known

    def run(self, name: Hashable, act: Act) -> Tensor:
        """What `act` gives; of all that is given under this name the first is kept."""
        if name not in self._known:
            result = act()
            self._known[name] = None  # now that it did not fail
            return result
        again = self._known[name]
        if again is None:
            again = self._known[name] = self._recorded(name, act)
        return again()

    def _recorded(self, name: Hashable, act: Act) -> Act:
        try:
            return self.lane.record(act)
        except Exception as error:
            self.plain.append(name)
            first = error.__context__ or error  # torch ends the recording that was broken off, and that fails too
            why = str(first).partition("\n")[0] or type(first).__name__
            log.warning("%s: a pass of %s cannot be recorded and is called as it is from now on: %s", self.what, name, why)
            return act
