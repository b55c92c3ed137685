"""Where a training's pages come from."""

from __future__ import annotations

import string
from collections.abc import Mapping
from dataclasses import dataclass
from random import Random
from typing import Protocol

import numpy as np

from optmem.train.corpus import Corpus
from optmem.train.degrade import Degradation
from optmem.train.kinds import Mix
from optmem.train.synth import Batch, Form, SynthConfig, draw_batch

_LETTERS = string.ascii_lowercase + "eeeettaaooiinnsshhrr"


class Feed(Protocol):
    """Pages by seed: the same one gives the same pages, so that a run can be resumed at any step."""

    def batch(self, form: Form, count: int, seed: int, mix: Mapping[str, float]) -> Batch:
        """So many pages of this form, of these kinds; an empty mix is the usual one."""


@dataclass(frozen=True, slots=True)
class SynthFeed:
    """Pages that synth draws from a corpus."""

    corpus: Corpus
    harms: tuple[Degradation, ...] = ()

    def batch(self, form: Form, count: int, seed: int, mix: Mapping[str, float]) -> Batch:
        """So many pages of this form, of these kinds."""
        kinds = Mix(**(dict.fromkeys(Mix.__dataclass_fields__, 0.0) | dict(mix))) if mix else Mix()
        return draw_batch(SynthConfig((form,), kinds, self.harms, count), self.corpus, seed, 0)


def chance_corpus(seed: int = 0, count: int = 20_000) -> Corpus:
    """Words of letters drawn by chance and no text: enough for the kinds "words" and "characters"."""
    chance = Random(seed)  # noqa: S311 - pages, not secrets
    words = tuple("".join(chance.choices(_LETTERS, k=chance.randrange(1, 12))) for _ in range(count))
    return Corpus(b"", b"", words)


def seed_of(*numbers: int) -> int:
    """One seed from several numbers, all of which matter."""
    return int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0])
