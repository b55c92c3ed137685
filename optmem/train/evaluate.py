"""The measure: how well a nano reads held-out pages, by tier, density and kind of text.

Every page counts: one that could not be read scores what its empty or endless text scores.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, get_args
from zlib import crc32

import numpy as np
import torch

from optmem.engine.checkpoint import fingerprint
from optmem.errors import InputError
from optmem.inputs import Given
from optmem.model.model import Model
from optmem.text.characters import MAX_ROWS
from optmem.text.count import estimate_tokens
from optmem.train.calibration import calibrate, confidence_at, fit_temperature, silent_errors
from optmem.train.corpus import Corpus
from optmem.train.evaluate_controls import controls, truncated
from optmem.train.evaluate_pages import Sample, form_name, from_text, held_out, mode_of, parse_form
from optmem.train.evaluate_reading import (
    Distributions,
    Nano,
    Reader,
    Reading,
    Rows,
    choose_rows,
    decoder_distributions,
    encode,
    glance_distributions,
    judge,
    read_drafted,
    read_samples,
)
from optmem.train.fidelity import Cell, Control, Fidelity
from optmem.train.kinds import PageKind
from optmem.train.scores import Hits, Interval, interval, likeness
from optmem.train.synth import Form

EVERY_FORM = (  # the controls are on the first
    "512:8x16,256:8x16,640:8x16,1024:8x16,512:8x16:384,512:8x16:256,512:8x8,256:8x8,640:8x8,1024:8x8,512:8x8:384,512:8x8:256"
)
# Of each cell, for the temperatures.
CALIBRATION_PAGES, CALIBRATION_ROWS, CALIBRATION_GLIMPSES = 4, 2, 96
CONTROL_PAGES = 12


@dataclass(frozen=True, slots=True)
class Plan:
    """What is read."""

    forms: tuple[Form, ...] = tuple(map(parse_form, EVERY_FORM.split(",")))
    kinds: tuple[PageKind, ...] = get_args(PageKind)
    texts: tuple[Given, ...] = ()
    pages: int = 20  # of each form and kind
    rows: int = 16  # of each page; 0 is all
    seed: int = 0

    def __post_init__(self) -> None:
        if not self.forms or not (self.kinds or self.texts):
            raise InputError("an evaluation needs a form of page and a kind of text or a text")
        if self.pages < 1 or self.rows < 0 or self.seed < 0:
            raise InputError(f"pages must be 1 or more, rows and seed 0 or more, got {self.pages}, {self.rows} and {self.seed}")
        deep = next((form for form in self.forms if form.grid[0] > MAX_ROWS), None)
        if deep is not None:  # rows that nobody can ask for would not be read, and not missed either
            raise InputError(f"pages have at most {MAX_ROWS} rows that have a name, {form_name(deep)!r} has {deep.grid[0]}")
        for what, names in (
            ("form", [*map(form_name, self.forms)]),
            ("text", [*self.kinds, *(given.name for given in self.texts)]),
        ):
            twice = next((name for name in names if names.count(name) > 1), None)
            if twice is not None:
                raise InputError(f"the {what} {twice!r} is named twice: results could not be told apart")

    def calibrates(self, form: Form) -> bool:
        """Whether confidence is to hold on such pages: on those shown at their own size, where there are any."""
        return form.side == form.size or all(other.side != other.size for other in self.forms)

    def parts(self) -> list[Part]:
        """Every cell of the table."""
        return [Part(form, source) for form in self.forms for source in (*self.kinds, *self.texts)]


@dataclass(frozen=True, slots=True)
class Part:
    """A cell of the table before it is measured."""

    form: Form
    source: PageKind | Given

    @property
    def kind(self) -> str:
        """The kind, or the name of the text."""
        return self.source if isinstance(self.source, str) else self.source.name

    def samples(self, plan: Plan, corpus: Corpus | None) -> list[Sample]:
        """Its pages."""
        if isinstance(self.source, Given):
            return from_text(self.source, self.form, plan.pages)
        assert corpus is not None, "kinds are made from a corpus"
        return held_out(corpus, self.source, self.form, plan.seed, plan.pages)

    def rows(self, plan: Plan, samples: Sequence[Sample]) -> list[Rows]:
        """What is read of each page: the same rows at every tier."""
        seeds = ([plan.seed, crc32(self.kind.encode()), number] for number in range(len(samples)))
        return [choose_rows(sample, plan.rows, np.random.default_rng(seed)) for sample, seed in zip(samples, seeds, strict=True)]


@dataclass(slots=True)
class Evidence:
    """Distributions for the temperatures: of even pages to fit on, of odd ones to report."""

    decoder: tuple[list[Distributions], list[Distributions]] = field(default_factory=lambda: ([], []))
    glance: tuple[list[Distributions], list[Distributions]] = field(default_factory=lambda: ([], []))
    pages: int = 0

    def add(self, decoder: Distributions, glance: Distributions) -> None:
        """Of one page."""
        half = self.pages % 2
        self.decoder[half].append(decoder)
        self.glance[half].append(glance)
        self.pages += 1

    def summary(self) -> dict[str, Any]:
        """Temperatures, and calibration before and after."""
        decoder, glance = _scaled(*self.decoder), _scaled(*self.glance)
        temperatures = {"decoder_temperature": decoder.pop("temperature"), "glance_temperature": glance.pop("temperature")}
        return {**temperatures, "decoder": decoder, "glance": glance}


def _scaled(fit: list[Distributions], report: list[Distributions]) -> dict[str, Any]:
    fitted, others = _join(fit), _join(report or fit)
    temperature = fit_temperature(fitted.logits, fitted.said, fitted.is_right)
    is_right = others.is_right.numpy()
    at = {"before": 1.0, "after": temperature}
    confidences = {when: confidence_at(others.logits, others.said, value).double().numpy() for when, value in at.items()}
    measured = {when: calibrate(sure, is_right).summary() for when, sure in confidences.items()}
    return {"temperature": temperature, **measured, "is_held_out": bool(report)}


def _join(parts: Sequence[Distributions]) -> Distributions:
    return Distributions(*(torch.cat([getattr(part, name) for part in parts]) for name in ("logits", "said", "is_right")))


def evaluate(
    model: Model,
    plan: Plan,
    corpus: Corpus | None = None,
    *,
    reader: Reader = read_drafted,
    watch: Callable[[Sequence[Part]], Iterable[Part]] = iter,
    tell: Callable[[Cell], None] | None = None,
) -> Fidelity:
    """Measures every cell of the plan's table, then the controls on its first.

    corpus   held-out text; not needed where the plan has texts alone
    watch    goes through the parts, for a progress bar
    tell     is given every cell as soon as it is measured
    """
    weights = fingerprint(model.weights())  # refuses a quantised model, before hours of reading
    nano, evidence, parts = Nano.of(model), Evidence(), plan.parts()
    cells: list[Cell] = []
    for part in watch(parts):
        cells.append(_measure(nano, plan, part, corpus, reader, evidence))
        if tell is not None:
            tell(cells[-1])
    checks, baselines = _controls(nano, plan, parts[0], corpus, reader)
    found = corpus.fingerprint if corpus is not None and plan.kinds else None
    return Fidelity(
        weights,
        found,
        plan.seed,
        plan.pages,
        plan.rows,
        tuple(cells),
        tuple(checks),
        tuple(baselines),
        evidence.summary(),
    )


def _controls(nano: Nano, plan: Plan, part: Part, corpus: Corpus | None, reader: Reader) -> tuple[list[Control], list[Control]]:
    samples = part.samples(plan, corpus)[:CONTROL_PAGES]
    return controls(nano, part.kind, samples, part.rows(plan, samples), reader, plan.seed)


def _measure(nano: Nano, plan: Plan, part: Part, corpus: Corpus | None, reader: Reader, evidence: Evidence) -> Cell:
    samples = part.samples(plan, corpus)
    rows, features = part.rows(plan, samples), encode(nano, samples)
    readings = read_samples(nano, samples, features, rows, reader)
    kept = CALIBRATION_PAGES if plan.calibrates(part.form) else 0
    for number, (reading, tokens, asked) in enumerate(list(zip(readings, features, rows, strict=True))[:kept]):
        random = np.random.default_rng([plan.seed, number])
        chosen = random.permutation(len(reading.rows))[:CALIBRATION_ROWS].tolist()
        evidence.add(
            decoder_distributions(nano, reading, tokens, mode_of(part.form), chosen),
            glance_distributions(nano, reading, tokens, asked, CALIBRATION_GLIMPSES, plan.seed),
        )
    return _cell(part, plan, samples, readings)


def _cell(part: Part, plan: Plan, samples: Sequence[Sample], readings: Sequence[Reading]) -> Cell:
    """All numbers of a cell."""
    form, mode, count = part.form, mode_of(part.form), len(samples)
    seed = [plan.seed, crc32(f"{form_name(form)} {part.kind}".encode())]
    scores = [reading.score() for reading in readings]
    judged = [judge(reading) for reading in readings]
    confidence, is_right = (np.concatenate([getattr(each, name) for each in judged]) for name in ("confidence", "is_right"))
    characters = sum(len(sample.text) for sample in samples)
    tokens = sum(estimate_tokens(sample.text) for sample in samples)
    cut = [likeness(sample.text, truncated(sample)) for sample in samples]
    rates = {
        "exact_lines": _share([score.lines for score in scores], seed),
        "digits": _share([score.digits for score in scores], seed),
        "identifiers": _share([score.identifiers for score in scores], seed),
        "glance": _rate([reading.glance_likeness() for reading in readings], seed),
    }
    bounds = {f"{name}{end}": value for name, rate in rates.items() for end, value in zip(("", "_low", "_high"), rate, strict=True)}
    score = _rate([score.likeness for score in scores], seed)
    return Cell(
        form.size,
        form.side,
        form.cell,
        part.kind,
        pages=count,
        characters=sum(len("".join(reading.true)) for reading in readings),
        vision_tokens=mode.paper_tokens(),
        fed_tokens=mode.fed_tokens(),
        score=score.value,
        low=score.low,
        high=score.high,
        **bounds,
        silent=silent_errors(confidence, is_right)[0],
        ratio=tokens / (count * mode.fed_tokens()),
        quarter_ratio=characters / 4 / (count * mode.paper_tokens()),
        characters_per_token=characters / (count * mode.paper_tokens()),
        truncation=float(np.mean(cut)),
    )


def _rate(values: Sequence[float], seed: Sequence[int]) -> Interval:
    return interval(values, [1] * len(values), seed)


def _share(hits: Sequence[Hits], seed: Sequence[int]) -> Interval:
    return interval([each.hits for each in hits], [each.of for each in hits], seed)
