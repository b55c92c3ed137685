"""The suites of a memory, run: every method at every budget over the same histories, every question counted."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from optmem.bench.ageing import DEPTHS, Cell, Faded, fade, grid, make_stack
from optmem.bench.answers import Rate, Sure, choose, rate_of
from optmem.bench.histories import FILLERS, STANDARD, Filler, History, Question, Size, Suite, make_history
from optmem.bench.kept import ENCODINGS, Encoding, KeptPages, Method, Pages, Retrieval, Timing, Truncation, read_ahead
from optmem.bench.reader import Reader
from optmem.bench.remembered import FORMS, Form, Remembered
from optmem.bench.sizes import Sizes, weigh
from optmem.engine import Engine
from optmem.items import watched
from optmem.train.corpus import Corpus
from optmem.train.scores import likeness

PLACE_GIVEN = "newest pages, "  # methods that are told where the answer stands
READ = "rows of pages "  # readings that no question asked for as well


@dataclass(frozen=True, slots=True)
class Plan:
    """How much is measured."""

    histories: int = 2  # of each class of text
    fillers: tuple[Filler, ...] = FILLERS
    size: Size = STANDARD
    budgets: tuple[int, ...] = (256, 512, 1024, 2048)  # tokens
    forms: tuple[Form, ...] = FORMS
    encodings: tuple[Encoding, ...] = ENCODINGS
    faded_pages: int = 2  # of each history
    heights: tuple[int, ...] = (1, 4, 16)  # pages of a stack
    depths: tuple[float, ...] = DEPTHS
    trials: int = 4  # needles in a cell of the grid
    seed: int = 0


QUICK = Plan(
    histories=1,
    size=Size(messages=18, passkeys=3, pairs=2, distractors=3, updated=1, absent=2, records=1, lines=2),
    budgets=(256, 1024),
    forms=(FORMS[0], FORMS[2], FORMS[4]),
    encodings=(ENCODINGS[0], ENCODINGS[2], ENCODINGS[4]),
    faded_pages=1,
    heights=(4,),
    trials=1,
)


@dataclass(frozen=True, slots=True)
class Outcome:
    """One question put to one method."""

    method: str
    budget: int
    filler: Filler
    suite: Suite
    form: str
    depth: float
    is_right: bool
    likeness: float  # of the answer, 0 where there was none
    is_found: bool  # a line was given; of what is absent, that is a false hit

    @property
    def asks_for_something(self) -> bool:
        """Not of what was never told."""
        return self.suite != "absent"


@dataclass
class Result:
    """What was measured."""

    plan: Plan
    model: str
    corpus: str
    outcomes: list[Outcome] = field(default_factory=list)
    kept: dict[tuple[str, int], list[int]] = field(default_factory=dict)  # tokens that a method showed, of every history
    sure: dict[str, list[Sure]] = field(default_factory=dict)  # by method: its hits; and all rows of pages at every side
    faded: list[Faded] = field(default_factory=list)
    grid: list[Cell] = field(default_factory=list)
    sizes: list[Sizes] = field(default_factory=list)
    encoding: Timing = field(default_factory=Timing)
    reading: Timing = field(default_factory=Timing)
    asking: dict[str, Timing] = field(default_factory=dict)
    refused: dict[str, int] = field(default_factory=dict)  # readings of rows that the engine said are not there
    seconds: float = 0.0
    cpu_seconds: float = 0.0  # of all threads

    def rate(self, keep: Callable[[Outcome], bool]) -> Rate:
        """Right answers among those that are kept."""
        return rate_of(each.is_right for each in self.outcomes if keep(each))

    def methods(self) -> list[str]:
        """In the order in which they were asked."""
        return list(dict.fromkeys(each.method for each in self.outcomes))

    def budgets(self, method: str) -> list[int]:
        """At which it was asked."""
        return sorted({each.budget for each in self.outcomes if each.method == method})


def run(engine: Engine, corpus: Corpus, plan: Plan, model: str) -> Result:
    """All suites.  Memories are made in a folder that is gone afterwards."""
    result = Result(plan, model, corpus.fingerprint)
    jobs = [(filler, plan.seed + number) for filler in plan.fillers for number in range(plan.histories)]
    drawn: dict[str, list[Pages]] = {}
    for filler, seed in watched(jobs, "histories", unit="history"):
        history = make_history(filler, corpus, seed, plan.size)
        pages = Pages(history, engine)
        drawn.setdefault(filler, []).append(pages)
        for method, budget, kept in _methods(history, pages, plan):
            _ask(result, history, method, budget, kept)
        for form in plan.forms:
            reader = Reader(engine)
            for budget in plan.budgets:
                _remember(result, reader, history, form, budget)
    for some in drawn.values():
        result.faded += fade(some, plan.faded_pages, plan.encodings)
        result.sizes.append(weigh(some))
        for pages in some:
            result.encoding.add(pages.encoding.seconds, pages.encoding.count)
            result.refused["pages"] = result.refused.get("pages", 0) + pages.refused
            result.reading.add(pages.reading.seconds, pages.reading.count)
            for encoding in plan.encodings:
                if not encoding.pooled:
                    result.sure.setdefault(READ + encoding.name, []).extend(pages.sure(encoding))
    stack = make_stack(drawn[plan.fillers[0]][0].history, max(plan.heights))
    result.grid = list(grid(engine, stack, plan.heights, plan.depths, plan.trials, plan.seed))
    return result


def _methods(history: History, pages: Pages, plan: Plan) -> Iterator[tuple[str, int, Method]]:
    for encoding in plan.encodings:
        read_ahead(pages, encoding, history.questions)
    for budget in plan.budgets:
        yield "truncation", budget, Truncation(history, budget)
        yield "retrieval, disk", budget, Retrieval(history, budget)
        for encoding in plan.encodings:
            yield PLACE_GIVEN + encoding.name, budget, KeptPages(pages, encoding, budget)


def _remember(result: Result, reader: Reader, history: History, form: Form, budget: int) -> None:
    with tempfile.TemporaryDirectory(prefix="optmem-bench-") as folder:
        kept = Remembered(Path(folder) / "memory", reader, history, form, budget)
        try:
            _ask(result, history, form.name, budget, kept)
        finally:
            kept.close()
        result.kept.setdefault((form.name, budget), []).append(kept.tokens)
        result.sure.setdefault(form.name, []).extend(kept.hits)
        result.refused[form.name] = result.refused.get(form.name, 0) + kept.refused
        timing = result.asking.setdefault(form.name, Timing())
        timing.add(kept.asking.seconds, kept.asking.count)


def _ask(result: Result, history: History, name: str, budget: int, kept: Method) -> None:
    for question in history.questions:
        if question.answer is None and name.startswith(PLACE_GIVEN):
            continue  # there is no place to be told
        result.outcomes.append(_outcome(history, name, budget, question, kept))


def _outcome(history: History, name: str, budget: int, question: Question, kept: Method) -> Outcome:
    given = choose(kept.lines(question), question.names, question.shape)
    is_right = given.answer == question.answer if question.answer is not None else not given.is_found
    like = likeness(given.line, question.line) if given.is_found and question.answer is not None else 0.0
    return Outcome(
        name, budget, history.filler, question.suite, question.form, history.depth(question), is_right, like, given.is_found
    )


# --- as JSON --------------------------------------------------------------------------------------------------------------------


def to_json(result: Result) -> str:
    """One line with all numbers."""
    found: dict[str, Any] = {
        "bench": "memory",
        "model": result.model,
        "corpus": result.corpus,
        "seed": result.plan.seed,
        "histories": result.plan.histories,
        "seconds": round(result.seconds, 1),
        "cpu_seconds": round(result.cpu_seconds, 1),
        "recall": [_recall(result, *each) for each in _groups(result.outcomes)],
        "tokens_kept": [{"method": name, "budget": budget, "tokens": tokens} for (name, budget), tokens in result.kept.items()],
        "confidence": {name: confidences(some) for name, some in result.sure.items()},
        "ageing": [each.to_json() for each in result.faded],
        "grid": [each.to_json() for each in result.grid],
        "bytes": [each.to_json() for each in result.sizes],
        "refused": result.refused,
        "milliseconds": {
            "encode_page": round(result.encoding.milliseconds, 2),
            "read_row": round(result.reading.milliseconds, 2),
            "recall": {name: round(each.milliseconds, 1) for name, each in result.asking.items()},
        },
    }
    return json.dumps(found, ensure_ascii=False)


def _groups(outcomes: Iterable[Outcome]) -> list[tuple[str, int, str, str]]:
    return list(dict.fromkeys((each.method, each.budget, each.filler, each.suite) for each in outcomes))


def _recall(result: Result, method: str, budget: int, filler: str, suite: str) -> dict[str, Any]:
    some = [
        each for each in result.outcomes if (each.method, each.budget, each.filler, each.suite) == (method, budget, filler, suite)
    ]
    mean = sum(each.likeness for each in some) / len(some)
    names = {"method": method, "budget": budget, "filler": filler, "suite": suite, "likeness": round(mean, 4)}
    return names | {"found": sum(each.is_found for each in some)} | rate_of(each.is_right for each in some).to_json()


BANDS = ((0.9, 1.01), (0.7, 0.9), (0.5, 0.7), (0.3, 0.5), (0.1, 0.3), (0.0, 0.1))


def confidences(sure: Sequence[Sure]) -> list[dict[str, Any]]:
    """By bands of confidence, how much was read, its mean confidence, and how much of it is exact."""
    bands = [[each for each in sure if low <= each.confidence < high] for low, high in BANDS]
    means = [round(sum(each.confidence for each in some) / len(some), 4) if some else None for some in bands]
    return [
        {"from": low, "mean": mean} | rate_of(each.is_exact for each in some).to_json()
        for (low, _), mean, some in zip(BANDS, means, bands, strict=True)
    ]
