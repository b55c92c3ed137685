"""The engine around the model: what share of the time of reading is spent outside the model's operators.

    plain          token by token, up to 128 rows in a pass
    draft          what a glance proposes is verified: few passes, each of up to 1,024 tokens
    one row        a pass of one token, where the overhead weighs most

Reading is timed as users call it (`Engine.decode`), the operators by a clock around the decoder's forward pass and its logits, the
glance, and `pick_token`.  The bar is 5 % of a pass of many rows.

    OPTMEM_PAGES=4     pages instead of 16
"""

import os
import time
from statistics import median

import pytest

from optmem import Engine, ops, paginate

PAGES = int(os.environ.get("OPTMEM_PAGES", "16"))
ROUNDS = 3
WAYS = {"plain": {"draft": None}, "draft": {"draft": "glance"}, "one row": {"draft": None, "rows": [3]}}


class Clock:
    """Seconds inside the model's operators."""

    def __init__(self, model, monkeypatch):
        self.seconds = 0.0
        self.passes = 0
        for owner, name in ((model.decoder, "forward"), (model.decoder, "logits"), (model.glance, "read"), (ops, "pick_token")):
            monkeypatch.setattr(owner, name, self.timed(getattr(owner, name), name == "forward" and owner is model.decoder))

    def timed(self, act, counts):
        def wrapped(*arguments, **settings):
            start = time.perf_counter()
            result = act(*arguments, **settings)
            self.seconds += time.perf_counter() - start
            self.passes += counts
            return result

        return wrapped


@pytest.fixture(scope="module")
def reading():
    engine = Engine.from_pretrained("nano", device="cpu")
    text = "".join(f"{at:05} the quick brown fox jumps over the lazy dog, {at * at} times\n" for at in range(40 * PAGES))
    pages = paginate(text)[:PAGES]
    return engine, engine.encode(pages), [page.text() for page in pages]


@pytest.mark.benchmark(group="the engine's own time")
@pytest.mark.parametrize("way", WAYS)
def bench_overhead(benchmark, monkeypatch, reading, way):
    engine, tokens, texts = reading
    tokens = tokens[:1] if way == "one row" else tokens
    clock = Clock(engine.model, monkeypatch)
    found = engine.decode(tokens, **WAYS[way])
    if way != "one row":
        right = sum(done.text == text for done, text in zip(found, texts, strict=True))
        assert right >= 0.9 * len(texts), "the answer is wrong"
    shares = []

    def read():
        clock.seconds, clock.passes, start = 0.0, 0, time.perf_counter()
        assert engine.decode(tokens, **WAYS[way]) == found
        whole = time.perf_counter() - start
        shares.append((whole - clock.seconds) / whole)

    benchmark.pedantic(read, rounds=ROUNDS)
    benchmark.extra_info |= {"outside the operators": round(median(shares), 4), "passes": clock.passes, "pages": len(tokens)}
    print(f"\n{way}: {median(shares):.1%} of the time outside the operators, {clock.passes} passes")
