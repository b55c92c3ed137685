"""The engine on a GPU, every figure beside its floor: steps, encoding, pages per second, and where the GPU was idle.

The public model at its full size with random weights, a Base page, exactly so many tokens a page, greedy, bf16.  Uint8 pages go in
and ids come out; all that the engine's host does is in it, but for cutting pictures into views, which other cores do ahead.
Random weights route at random, but texts that turn in circles share experts: how many were read is counted, not assumed.
"""

from __future__ import annotations

import gc
import statistics
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from floors import H200, Device, encode_seconds, expected_experts, page_seconds, step_seconds
from timeline import Timeline, read_trace, timeline

from optmem.engine import Engine
from optmem.engine.graphs import GraphRunner
from optmem.engine.lanes import Lanes
from optmem.engine.loop import Loop
from optmem.engine.requests import TextRequest
from optmem.engine.runner import Runner
from optmem.engine.scheduler import Limits, Scheduler
from optmem.engine.speech import Prefix, Speech
from optmem.model.cache import Cache
from optmem.model.decoder import Decoder, Router
from optmem.model.model import Model
from optmem.pixels import MODES, NO_TILES, Mode, Views, make_views

WORDS = 11  # of a prompt, besides its page and the beginning: 285 tokens at Base, as performance.md counts
AT_ONCE = 16  # pages that are encoded together
AHEAD = 64  # pages that wait, beside those that are read


@dataclass(frozen=True)
class Setup:
    """What is measured."""

    mode: Mode = MODES["base"]
    tokens: int = 1000  # a page
    batches: Sequence[int] = (1, 8, 64, 256, 1024)
    views: Sequence[int] = (1, 8, 16)
    pages: int = 4096
    steps: int = 40  # timed ones, of every batch
    device: Device = H200

    @property
    def prompt(self) -> int:
        """Tokens before the first is said."""
        return 1 + self.mode.fed_tokens() + WORDS


def full_size(device: torch.device) -> Engine:
    """V1 with random weights."""
    made = Model.random("deepseek-ocr", dtype=torch.bfloat16)
    return Engine(Model(made.config, {name: weight.to(device) for name, weight in made.weights().items()}))


def pictures(mode: Mode, count: int) -> list[Views]:
    """Random bytes."""
    chance = torch.Generator().manual_seed(count)
    pixels = [torch.randint(0, 256, (mode.size, mode.size), generator=chance, dtype=torch.uint8) for _ in range(count)]
    return [make_views(each.numpy(), mode) for each in pixels]


# --- steps --------------------------------------------------------------------------------------------------------------------


def step_rows(decoder: Decoder, lanes: Lanes, setup: Setup) -> list[dict[str, Any]]:
    """A step of every batch, by hand: replayed, and as it is without graphs."""
    rows = []
    for texts in setup.batches:
        rows.append(_step_row(decoder, lanes, setup, texts))
        gc.collect()
        torch.cuda.empty_cache()
    return rows


def _step_row(decoder: Decoder, lanes: Lanes, setup: Setup, texts: int) -> dict[str, Any]:
    config, device = decoder.config, decoder.lm_head.weight.device
    most = 4 * setup.steps
    cache = Cache(config, texts * (-(-(setup.prompt + most) // 16) + 1), dtype=decoder.dtype, device=device)
    limits = Limits(texts=texts, tokens=max(4 * texts, 4096))
    graphs = GraphRunner(decoder, cache, lanes.decode, texts=texts)
    loop = Loop(Scheduler(cache, config.vocab_size, config.max_positions, limits), graphs)
    speeches = []
    for _ in range(texts):
        own = torch.randn(setup.prompt, config.hidden, device=device).to(decoder.dtype)
        speeches.append(Speech(Prefix(own[:0]), own, most))
        loop.submit(TextRequest(speeches[-1]))
    while not all(speech.ids for speech in speeches):
        loop.step()
    replayed = _median(loop.step, setup.steps)
    context = setup.prompt + len(speeches[0].ids) - setup.steps / 2
    loop.runner = Runner(decoder, cache)
    plain = _median(loop.step, setup.steps // 2)
    floor = step_seconds(config, texts, context, setup.device)
    return {
        "texts": texts,
        "context": round(context),
        "ms": 1000 * replayed,
        "floor_ms": 1000 * floor,
        "share": floor / replayed,
        "tokens_per_s": texts / replayed,
        "ms_without_graphs": 1000 * plain,
        "experts": _experts(decoder, loop.step),
        "experts_expected": expected_experts(config, texts),
        "not_recorded": len(graphs.passes.plain),
    }


def _median(act: Callable[[], object], rounds: int) -> float:
    """Seconds of the host: a step ends when its ids are there."""
    for _ in range(4):  # called, recorded, replayed
        act()
    taken = []
    for _ in range(rounds):
        start = time.perf_counter()
        act()
        taken.append(time.perf_counter() - start)
    return statistics.median(taken)


def _experts(decoder: Decoder, act: Callable[[], object]) -> float:
    """How many different ones of a layer a plain pass reads."""
    seen: list[int] = []
    routers = [module for module in decoder.modules() if isinstance(module, Router)]
    hooks = [router.register_forward_hook(lambda _, __, routing: seen.append(routing.ids.unique().numel())) for router in routers]
    act()
    for hook in hooks:
        hook.remove()
    return statistics.mean(seen)


# --- encoding -----------------------------------------------------------------------------------------------------------------


def encode_rows(engine: Engine, setup: Setup) -> list[dict[str, Any]]:
    """Pages that are encoded together, from uint8 of the host to features that may be read."""
    rows = []
    for count in setup.views:
        shown = pictures(setup.mode, count)
        taken = _median(lambda shown=shown: engine._encoding.encode(shown), 20) / count
        floor = encode_seconds(setup.mode.size, setup.device)
        rows.append({"pages": count, "ms_a_page": 1000 * taken, "floor_ms": 1000 * floor, "share": floor / taken})
    return rows


# --- pages --------------------------------------------------------------------------------------------------------------------


@dataclass
class Feeder:
    """Pages that go in while there is room, and when each came out."""

    engine: Engine
    setup: Setup
    texts: int  # that are read at once
    done: list[float] = field(default_factory=list)  # of counted pages

    def run(self, pages: int, midway: Callable[[], None] | None = None) -> float:
        """Pages per second, steady: those before, whose lengths are spread out, are not counted, nor is the end."""
        room, total = threading.Semaphore(self.texts + AHEAD), self.texts + pages
        shown, requests, submitted, halfway = pictures(self.setup.mode, 64), [], 0.0, midway
        for first in range(0, total, AT_ONCE):
            some = range(first, min(first + AT_ONCE, total))
            for _ in some:
                room.acquire()
            requests += [self._ask(features, at, room) for at, features in zip(some, self._encode(shown, some), strict=True)]
            submitted = time.perf_counter()
            if halfway is not None and first >= self.texts + pages // 2:
                halfway, _ = None, halfway()
        for request in requests:
            request.wait()
        steady = sorted(when for when in self.done if when <= submitted)
        if len(steady) < 2:  # fewer pages than are read at once: there is no steady state
            steady = sorted(self.done)
        return (len(steady) - 1) / max(steady[-1] - steady[0], 1e-9)

    def _encode(self, shown: Sequence[Views], some: range) -> list[torch.Tensor]:
        return self.engine._encoding.encode([shown[at % len(shown)] for at in some])

    def _ask(self, features: torch.Tensor, at: int, room: threading.Semaphore) -> TextRequest:
        setup, model = self.setup, self.engine.model
        most = setup.tokens if at >= self.texts else 1 + setup.tokens * at // self.texts
        ids = [model.config.bos_id, *[model.config.image_id] * setup.mode.fed_tokens(), *range(5, 5 + WORDS)]
        with self.engine._beside():
            prompt = model.embed_prompt(ids, [features], setup.mode, [NO_TILES])
        request = TextRequest(Speech(Prefix(prompt[:-1]), prompt[-1:], most))

        def count() -> None:
            if at >= self.texts:
                self.done.append(time.perf_counter())
            room.release()

        request.on_done = count
        self.engine._started().submit(request)
        return request


def page_row(engine: Engine, setup: Setup) -> dict[str, Any]:
    """Encoding and reading at once, steady."""
    texts = engine._started().scheduler.limits.texts
    rate = Feeder(engine, setup, texts).run(setup.pages)
    config = engine.model.config.decoder
    floor = page_seconds(config, setup.mode.size, setup.prompt, setup.tokens, texts, setup.device)
    loop = engine._started()
    return {
        "pages": setup.pages,
        "texts": texts,
        "tokens_a_page": setup.tokens,
        "pages_per_s": rate,
        "floor_pages_per_s": 1 / floor,
        "share": rate * floor,
        "preemptions": loop.scheduler.preemptions,
        "cache_tokens": loop.scheduler.cache.num_pages * loop.scheduler.cache.page_size,
    }


def watch(engine: Engine, setup: Setup, trace: Path, seconds: float = 0.3) -> Timeline:
    """A stretch of the steady state, kept as a chrome trace."""
    from torch.profiler import ProfilerActivity, profile

    def record() -> None:
        activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if torch.cuda.is_available() else [])]
        with profile(activities=activities) as recorded:
            time.sleep(seconds)
        recorded.export_chrome_trace(str(trace))

    texts = engine._started().scheduler.limits.texts
    Feeder(engine, setup, texts).run(max(4 * AT_ONCE, setup.pages // 16), record)
    return timeline(read_trace(trace))


# --- words --------------------------------------------------------------------------------------------------------------------


def described(facts: dict[str, Any], found: Timeline) -> str:
    """The ceiling first, then what was measured as a share of it."""
    lines = ["steps: texts  context      ms   floor  share   tokens/s  without graphs   experts (at random)"]
    lines += [_step(row) for row in facts["steps"]]
    lines += [
        f"encode {row['pages']:3} pages together: {row['ms_a_page']:.2f} ms a page, floor {row['floor_ms']:.2f}, {row['share']:.1%}"
        for row in facts["encode"]
    ]
    page = facts["page"]
    lines.append(
        f"{page['pages_per_s']:.1f} pages/s of {page['tokens_a_page']} tokens, {page['texts']} at once: {page['share']:.1%} of the "
        f"floor, {page['floor_pages_per_s']:.1f}; {page['preemptions']} texts gave way, room for {page['cache_tokens']} tokens"
    )
    idle = 1 - found.busy / found.length if found.length else 0.0
    lines.append(f"{found.length / 1000:.1f} ms watched, idle for {idle:.1%} of them, {len(found.gaps)} gaps of 20 us and more:")
    lines += [f"  {gap}" for gap in found.gaps]
    return "\n".join(lines)


def _step(row: dict[str, Any]) -> str:
    took = f"{row['ms']:7.2f} {row['floor_ms']:7.2f} {row['share']:6.1%} {row['tokens_per_s']:10.0f}"
    experts = f"{row['experts']:9.1f} ({row['experts_expected']:.1f})"
    plain = f"   {row['not_recorded']} sizes were not recorded" if row["not_recorded"] else ""
    return f"      {row['texts']:6} {row['context']:8} {took} {row['ms_without_graphs']:12.2f} ms {experts}{plain}"


def measure(engine: Engine, lanes: Lanes, setup: Setup, trace: Path) -> tuple[dict[str, Any], Timeline]:
    """Everything, steps first: their caches are gone when the engine asks what is free."""
    steps = step_rows(engine.model.decoder, lanes, setup)
    encode = encode_rows(engine, setup)
    page = page_row(engine, setup)
    found = watch(engine, setup, trace)
    idle = {"watched_us": found.length, "busy_us": found.busy, "gaps": len(found.gaps)}
    return {"steps": steps, "encode": encode, "page": page, "timeline": idle}, found
