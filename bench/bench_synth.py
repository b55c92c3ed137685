"""Labelled pages a second on one thread, each form checked against its own pixels before the clock starts."""

import pytest
import torch

from optmem.pages.alphabet import alphabet_atlas
from optmem.testing import read_pixels
from optmem.train.corpus import make_corpus
from optmem.train.degrade import EVERYTHING
from optmem.train.kinds import Mix
from optmem.train.sources import SOURCES
from optmem.train.synth import Form, SynthConfig, draw_batch

CASES = {
    "512 8x16": SynthConfig(),
    "512 8x8": SynthConfig((Form(512, "8x8"),)),
    "1024 8x16": SynthConfig((Form(1024, "8x16"),)),
    "512 8x16 shown at 384": SynthConfig((Form(512, "8x16", 384),)),
    "512 8x16 degraded": SynthConfig(harms=EVERYTHING),
    **{f"512 8x16 {kind}": SynthConfig(mix=Mix.only([kind])) for kind in ("prose", "characters", "json", "chats")},
}


@pytest.fixture(scope="module")
def corpus():
    return make_corpus(document for source in SOURCES if source.name == "python" for document in source.documents())


@pytest.mark.parametrize("case", CASES)
def bench_synth(benchmark, corpus, case):
    config = CASES[case]
    form = config.forms[0]
    if form.side == form.size and not config.harms:
        for page in draw_batch(config, corpus, 0, 0).pages():
            assert read_pixels(page.image, alphabet_atlas(form.cell), break_rows=True).startswith(page.symbols)
    numbers = iter(range(1, 1_000_000))
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    benchmark.group = "synth, 32 pages, one thread"
    try:
        benchmark(lambda: draw_batch(config, corpus, 0, next(numbers)))
    finally:
        torch.set_num_threads(before)
    if benchmark.stats:
        benchmark.extra_info["pages_per_second"] = config.batch / benchmark.stats.stats.median
