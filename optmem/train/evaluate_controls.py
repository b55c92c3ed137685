"""What a reader says when there is nothing to read, and what the same number of tokens says without a picture.

A reader that guesses from how texts usually go would score on a blank page; one that reads does not.

Texts of one language are somewhat alike whatever they say, so even the text of another page has a score: that is the floor.

Baselines at equal budget:
    truncation    the first text tokens, as many as would be fed
    mean pooling  the embeddings of the page's symbols, averaged in as many groups as there are vision tokens, through the same
                  decoder.  No decoder was trained to read those, so this is a floor and says little; a reader trained for them
                  would be another model, and the fair comparison with it is not made here.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Sequence
from itertools import accumulate

import numpy as np
import torch
from torch import Tensor

from optmem.pages import read_symbols
from optmem.text.count import estimate_tokens
from optmem.train.evaluate_pages import Sample, form_name, mode_of
from optmem.train.evaluate_reading import Nano, Reader, Reading, Rows, encode, read_samples
from optmem.train.fidelity import Control
from optmem.train.scores import PageScore, interval, score_rows

READ = "as it is"
Features = list[Tensor]


def controls(
    nano: Nano, kind: str, samples: Sequence[Sample], rows: Sequence[Rows], reader: Reader, seed: int
) -> tuple[list[Control], list[Control]]:
    """Controls and baselines on pages of one form: features of every page replaced, and the page read as before.

    Where there is one page alone, there is no other one.
    """
    features = encode(nano, samples)
    shown: dict[str, Callable[[], Features]] = {
        READ: lambda: features,
        "blank page": lambda: _blank(nano, samples),
        "tokens shuffled": lambda: _shuffled(features, seed),
        "tokens of another page": lambda: [*features[1:], features[0]],
        "tokens zeroed": lambda: [torch.zeros_like(found) for found in features],
        "mean-pooled embeddings": lambda: [pool(nano, sample, found) for sample, found in zip(samples, features, strict=True)],
    }
    if len(samples) == 1:
        del shown["tokens of another page"]
    found = [_control(name, kind, samples, read_samples(nano, samples, make(), rows, reader)) for name, make in shown.items()]
    cut = [score_rows(truncate(sample), sample.rows) for sample in samples]
    texts = {"truncated text": cut} | ({"text of another page": _others(samples, rows)} if len(samples) > 1 else {})
    without = [_scored(name, kind, samples, scores, None) for name, scores in texts.items()]
    return found[:-1], [*without, found[-1]]


def _control(name: str, kind: str, samples: Sequence[Sample], readings: Sequence[Reading]) -> Control:
    glance = float(np.mean([reading.glance_likeness() for reading in readings]))
    return _scored(name, kind, samples, [reading.score() for reading in readings], glance)


def _scored(name: str, kind: str, samples: Sequence[Sample], scores: Sequence[PageScore], glance: float | None) -> Control:
    score = interval([score.likeness for score in scores], [1] * len(scores), [0])
    lines = interval([score.lines.hits for score in scores], [score.lines.of for score in scores], [0])
    return Control(name, form_name(samples[0].form), kind, len(samples), *score, lines.value, glance)


def _others(samples: Sequence[Sample], rows: Sequence[Rows]) -> list[PageScore]:
    """The same rows of the next page, as they stand there."""
    pairs = zip(samples, [*samples[1:], samples[0]], rows, strict=True)
    asked = ((sample, other, slice(None) if some is None else slice(some.start, some.stop)) for sample, other, some in pairs)
    return [score_rows(other.rows[some], sample.rows[some]) for sample, other, some in asked]


def _blank(nano: Nano, samples: Sequence[Sample]) -> Features:
    blank = Sample(np.full_like(samples[0].image, 255), ("",), samples[0].form)
    return encode(nano, [blank]) * len(samples)


def _shuffled(features: Features, seed: int) -> Features:
    random = torch.Generator().manual_seed(seed)
    return [found[torch.randperm(len(found), generator=random).to(found.device)] for found in features]


def pool(nano: Nano, sample: Sample, features: Tensor) -> Tensor:
    """The page's symbols as means of their embeddings, in as many groups as it has vision tokens: [n, hidden]."""
    ids = nano.tokenizer.ids_of(np.array([ord(symbol) for symbol in "".join(sample.rows)], dtype=np.uint32))
    embedded = nano.model.decoder.embed(torch.from_numpy(ids).to(features.device)).float()
    groups = torch.arange(len(ids), device=features.device) * len(features) // len(ids)
    sums = torch.zeros(features.shape, device=features.device).index_add_(0, groups, embedded)
    counts = torch.bincount(groups, minlength=len(features)).clamp(min=1)
    return (sums / counts[:, None]).to(features.dtype)


def truncated(sample: Sample) -> str:
    """The text of those rows."""
    return read_symbols("".join(truncate(sample)))


def truncate(sample: Sample) -> tuple[str, ...]:
    """The rows of a page as far as as many text tokens reach as its picture feeds."""
    said, budget = "".join(sample.rows), mode_of(sample.form).fed_tokens()
    kept = bisect_right(range(len(said) + 1), budget, key=lambda length: estimate_tokens(read_symbols(said[:length]))) - 1
    ends = [0, *accumulate(map(len, sample.rows))]
    cut = [row[: max(kept - start, 0)] for row, start in zip(sample.rows, ends[:-1], strict=True)]
    return tuple(row for row in cut if row)
