"""The engine's bench for a GPU holds together: here with a small model, on lanes that call their passes again."""

import engine_on_gpu as bench
import torch
from timeline import Gap, Timeline

from optmem.engine import Engine
from optmem.engine.lanes import Lanes, PlainLane
from optmem.engine.scheduler import Limits
from optmem.model.model import Model
from optmem.pixels import find_mode


def test_everything_is_measured_and_said(tmp_path, monkeypatch):
    monkeypatch.setitem(bench.encode_seconds.__globals__["ENCODER_GFLOP"], 64, 1)
    lanes = Lanes(PlainLane(), PlainLane())
    setup = bench.Setup(find_mode("square 64"), tokens=12, batches=(1, 3), views=(1, 3), pages=40, steps=4)
    assert bench.Setup().prompt == 285
    with Engine(Model.random("deepseek-ocr", scale=0.05), limits=Limits(texts=8, tokens=64), lanes=lanes) as engine:
        facts, found = bench.measure(engine, lanes, setup, tmp_path / "trace.json.gz")
        assert engine._loop.scheduler.cache.num_free == engine._loop.scheduler.cache.num_pages
    assert (tmp_path / "trace.json.gz").stat().st_size > 0
    assert [row["texts"] for row in facts["steps"]] == [1, 3]
    assert all(row["ms"] > 0 and row["experts"] >= 6 and row["not_recorded"] == 0 for row in facts["steps"])
    assert facts["page"]["pages_per_s"] > 0
    assert facts["page"]["texts"] == 8
    assert found == Timeline(0.0, 0.0, [])  # no GPU, no work of one
    words = bench.described(facts, Timeline(1000.0, 900.0, [Gap(5.0, 100.0, "a", "b")]))
    assert "pages/s of 12 tokens, 8 at once" in words
    assert "idle for 10.0% of them, 1 gaps" in words
    assert "100.0 us idle, behind a and before b" in words


def test_pages_are_counted_once_each():
    lanes = Lanes(PlainLane(), PlainLane())
    setup = bench.Setup(find_mode("square 64"), tokens=5)
    with Engine(Model.random("deepseek-ocr", scale=0.05), limits=Limits(texts=8, tokens=64), lanes=lanes) as engine:
        feeder = bench.Feeder(engine, setup, 8)
        assert feeder.run(21) > 0
        assert len(feeder.done) == 21
    assert torch.get_num_threads() >= 1
