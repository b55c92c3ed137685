"""Nano's ways to read full 512-pixel pages of 8x16 cells, 64 tokens each, from stored vision tokens, in the CPU's fast type.

    greedy, a row after another   one token a step: what plain decoding is
    greedy, a page's rows         all rows of one page in a step
    greedy, rows of all pages     up to 128 rows in a step
    draft and verify              a glance, verified by the decoder; its time counts the glance
    glance                        no decoder

All but the glance give the same answer, checked before the clock starts (the first, which takes minutes, on one page) and after.
Ratios are of wall seconds and of CPU seconds; on a busy machine with OMP_NUM_THREADS=1 only the latter mean something.

    OPTMEM_PAGES=4     pages instead of 64         OPTMEM_NANO=folder   a checkpoint instead of the shipped one

Without a checkpoint the weights are random, and since nothing can be read with those, the draft is greedy's own answer with one
token in 50 wrong: speeds of a reader whose glance is .98 right, and not a measurement of one.
"""

import os
import time
from dataclasses import dataclass, replace
from itertools import count
from math import inf
from statistics import median

import numpy as np
import pytest
import torch

from optmem.engine import Engine
from optmem.engine.draft import CellDraft
from optmem.engine.rows import PageRows, draft_page, read_pages
from optmem.engine.scheduler import Limits
from optmem.errors import SourceNotFoundError
from optmem.model.config_json import public_config
from optmem.model.model import Model
from optmem.model.nano import embed_prefix, longest_row
from optmem.pixels import MODES
from optmem.testing import generator
from optmem.text.characters import CHARACTERS, EOL, CharacterTokenizer, characters_json
from optmem.train.alignment import Parts
from optmem.train.corpus import make_corpus
from optmem.train.kinds import Mix
from optmem.train.sources import SOURCES
from optmem.train.synth import BLANK, SynthConfig, draw_batch

PAGES = int(os.environ.get("OPTMEM_PAGES", "64"))
ROWS = 33  # those of the page, and the one below it
WRONG = 50
WAYS = ("greedy, a row after another", "greedy, a page's rows", "greedy, rows of all pages", "draft and verify", "glance")


def full_pages(number):
    """Pages whose text reaches the last row: uint8 [512, 512] each."""
    corpus = make_corpus(document for source in SOURCES if source.name == "python" for document in source.documents())
    found = []
    for at in count():
        batch = draw_batch(SynthConfig(mix=Mix.only(["prose", "code", "words"])), corpus, 0, at)
        found += [image for image, ids in zip(batch.images, batch.ids, strict=True) if (ids[-1] != BLANK).any()]
        if len(found) >= number:
            return found[:number]
    return found


def random_engine():
    config, characters = public_config("nano"), characters_json()
    weights = {name: value.bfloat16() for name, value in Parts(config).weights().items()}
    return Engine(Model(config, weights, CharacterTokenizer(characters), {CHARACTERS: characters}))


@dataclass
class Reader:
    """One engine, its pages, and every way to read them."""

    engine: Engine
    is_trained: bool

    def __post_init__(self):
        model = self.engine.model
        self.tokenizer, self.seconds, self.cpu = model.tokenizer, {}, {}
        self.tokens = self.engine.encode(full_pages(PAGES))
        with torch.inference_mode():
            prefixes = [
                embed_prefix(model.encoder, model.decoder, page.features, MODES["tiny"], self.tokenizer) for page in self.tokens
            ]
        rows = None if self.is_trained else range(ROWS)
        self.asked = [PageRows(prefix, rows, max_symbols=longest_row(512)) for prefix in prefixes]
        self.answers = self.read(self.asked)

    def read(self, asked, **settings):
        return read_pages(self.engine.model.decoder, asked, self.tokenizer, **settings)

    def drafted(self):
        if self.is_trained:
            seen = [self.engine.model.glance.read(page.features) for page in self.tokens]
            return [
                draft_page(page.prefix, one, self.tokenizer, None, page.max_symbols)
                for page, one in zip(self.asked, seen, strict=True)
            ]
        return [replace(page, draft=self.imagined(rows).__getitem__) for page, rows in zip(self.asked, self.answers, strict=True)]

    def imagined(self, rows):
        """Cells as a glance might see them, one in WRONG not as greedy says."""
        rng, eol = generator("imagined"), self.tokenizer.special(EOL)
        cells = {row.number: np.array([*row.ids, eol]) for row in rows}
        for said in cells.values():
            is_wrong = torch.randint(0, WRONG, (len(said),), generator=rng).numpy() == 0
            said[is_wrong] = self.tokenizer.first_symbol
        return {number: CellDraft(said.tolist()) for number, said in cells.items()}

    def run(self, way):
        """The answer, or for the glance nothing to compare."""
        start = time.process_time()
        found = self.ways(way)
        self.cpu[way] = min(time.process_time() - start, self.cpu.get(way, inf))
        return found

    def ways(self, way):
        if way == "glance":
            return [self.engine.model.glance.read(page.features) for page in self.tokens] and self.answers
        if way == "draft and verify":
            return self.read(self.drafted())
        if way == "greedy, a page's rows":
            return [rows for page in self.asked for rows in self.read([page])]
        return self.read(self.asked, limits=Limits(texts=1)) if way == "greedy, a row after another" else self.read(self.asked)


@pytest.fixture(scope="module")
def reader():
    try:
        return Reader(Engine.from_pretrained(os.environ.get("OPTMEM_NANO", "nano"), device="cpu"), is_trained=True)
    except SourceNotFoundError:
        return Reader(random_engine(), is_trained=False)


@pytest.mark.timeout(7200)
@pytest.mark.parametrize("way", WAYS)
def bench_read(benchmark, capsys, reader, way):
    weights = "" if reader.is_trained else ", random weights, imagined drafts"
    benchmark.group = f"nano, {PAGES} full pages, {reader.engine.model.decoder.dtype}{weights}"
    is_slow = way == WAYS[0]
    if is_slow:
        assert reader.read(reader.asked[:1], limits=Limits(texts=1)) == reader.answers[:1], "the answer is wrong"
    else:
        assert reader.run(way) == reader.answers, "the answer is wrong"
    found = benchmark.pedantic(reader.run, (way,), rounds=1 if is_slow else 3)
    assert found == reader.answers, "the answer is wrong"
    if not benchmark.stats:
        return
    reader.seconds[way] = median(benchmark.stats.stats.data)
    rows = [row for page in found for row in page]
    accepted = sum(len(row.logprobs) for row in rows) / sum(row.passes for row in rows)
    right = sum(row.accepted for row in rows) / max(sum(row.accepted + row.refused for row in rows), 1)
    symbols = sum(len(row.ids) for row in rows)
    benchmark.extra_info.update(pages_per_second=PAGES / reader.seconds[way], symbols=symbols, tokens_a_pass=accepted)
    with capsys.disabled():
        wall, cpu = (times[WAYS[0]] / times[way] if WAYS[0] in times else 0 for times in (reader.seconds, reader.cpu))
        passes = f", {accepted:.1f} tokens a pass, {right:.3f} of what was proposed" if way == "draft and verify" else ""
        print(f"\n{way:28} {reader.seconds[way]:8.2f} s {wall:8.1f}x   CPU {reader.cpu[way]:8.2f} s {cpu:8.1f}x{passes}")
