"""Nano reading full pages: `Engine.ocr` beside transformers' decoder with the same weights, a page at a time.

    optmem                pictures in, texts out: encoded, read by rows, drafted by the glance and verified
    transformers, rows together        a page's prefix is fed once, then all its rows are said in one batch
    transformers, a row after another  the same, row by row over the same prefix

transformers has no nano: its side gets our vision tokens for nothing, and its decoder is Unlimited-OCR's, which is the same
arithmetic.  The bar is 6x in pages a second.

    OPTMEM_PAGES=16     pages instead of 64
"""

import os
import time

import pytest
import torch
from transformers import DynamicCache

from optmem import Engine, paginate
from optmem.model.nano import embed_prefix
from optmem.testing.oracle import build_decoder_oracle
from optmem.text.characters import END, EOL

PAGES = int(os.environ.get("OPTMEM_PAGES", "64"))
THEIRS = {"rows together": 4, "a row after another": 1}  # pages that transformers reads
ROWS, MOST = 32, 65  # of a page of 512 px


class Peer:
    """transformers' decoder, reading a page by its rows."""

    def __init__(self, engine):
        self.model, self.tokenizer = engine.model, engine.model.tokenizer
        self.whole = build_decoder_oracle(engine.model)
        self.stops = torch.tensor([self.tokenizer.special(EOL), self.tokenizer.special(END)])

    def read(self, tokens, rows_at_once):
        prefix = embed_prefix(self.model.encoder, self.model.decoder, tokens.features, tokens.mode, self.tokenizer)
        return [row for first in range(0, ROWS, rows_at_once) for row in self.rows(prefix, range(first, first + rows_at_once))]

    def rows(self, prefix, numbers):
        cache = DynamicCache()  # its own cannot be shared by rows
        self.whole(inputs_embeds=prefix[None], past_key_values=cache, logits_to_keep=1)
        cache.batch_repeat_interleave(len(numbers))
        ids = torch.tensor([self.tokenizer.rows[number] for number in numbers])
        said = []
        for _ in range(MOST):
            ids = self.whole(inputs_embeds=self.model.decoder.embed(ids)[:, None], past_key_values=cache).logits[:, -1].argmax(-1)
            said.append(ids)
            if all(torch.isin(torch.stack(said), self.stops).any(0)):
                break
        return [self.until_stop(row) for row in torch.stack(said, 1).tolist()]

    def until_stop(self, row):
        return row[: next((at for at, token in enumerate(row) if token in self.stops), len(row))]


@pytest.fixture(scope="module")
def reading():
    engine = Engine.from_pretrained("nano", device="cpu")
    text = "".join(f"{at:05} the quick brown fox jumps over the lazy dog, {at * at} times\n" for at in range(40 * PAGES))
    pages = paginate(text)[:PAGES]
    return engine, pages, [page.image() for page in pages]


@pytest.mark.benchmark(group="reading full pages")
def bench_optmem(benchmark, reading):
    engine, pages, pictures = reading
    found = list(engine.ocr(pictures))
    right = sum(done.text == page.text() for done, page in zip(found, pages, strict=True))
    assert right >= 0.9 * len(pages), "the answer is wrong"
    benchmark.pedantic(lambda: list(engine.ocr(pictures)), rounds=3)
    benchmark.extra_info |= {"pages a second": round(len(pages) / benchmark.stats.stats.median, 2)}


@pytest.mark.benchmark(group="reading full pages")
@pytest.mark.parametrize("way", THEIRS)
def bench_transformers(benchmark, reading, way):
    engine, _, pictures = reading
    peer = Peer(engine)
    tokens = engine.encode(pictures[: THEIRS[way]])
    ours = [[row.ids for row in done.rows[:ROWS]] for done in engine.decode(tokens)]
    rows_at_once = ROWS if way == "rows together" else 1
    with torch.inference_mode():
        start = time.perf_counter()
        theirs = [peer.read(page, rows_at_once) for page in tokens]
        first = time.perf_counter() - start
        agreed = sum(a == b for mine, page in zip(ours, theirs, strict=True) for a, b in zip(mine, page, strict=True))
        assert agreed >= 0.95 * ROWS * len(tokens), f"{agreed} rows of {ROWS * len(tokens)} are the same"
        benchmark.pedantic(lambda: [peer.read(page, rows_at_once) for page in tokens], rounds=1 if first > 20 else 3)
    benchmark.extra_info |= {"pages a second": round(len(tokens) / benchmark.stats.stats.median, 2)}
