"""The floors that the engine's bench divides by are those of the table, and its timeline finds what is idle."""

import gzip
import json

import floors
import pytest
import timeline

from optmem.model.config import DecoderConfig

V1 = DecoderConfig()


@pytest.mark.parametrize(
    ("texts", "contexts"),
    [
        (1, (0.27, 0.28, 0.29)),
        (8, (0.81, 0.87, 0.92)),
        (64, (1.56, 2.02, 2.48)),
        (256, (2.39, 4.22, 6.05)),
        (1024, (5.69, 13.0, 20.3)),
        (2048, (10.1, 24.7, 39.4)),
    ],
)
def test_a_step_takes_what_the_table_says(texts, contexts):
    found = [1000 * floors.step_seconds(V1, texts, context) for context in (300, 800, 1300)]
    assert found == pytest.approx(contexts, rel=0.02)


def test_experts_chosen_at_random():
    assert [floors.expected_experts(V1, texts) for texts in (1, 8, 64)] == pytest.approx([6, 34.9, 63.9], abs=0.1)


@pytest.mark.parametrize(
    ("side", "prompt", "encode", "prefill", "pages"),
    [(512, 85, 0.31, 0.089, 99.7), (640, 123, 0.50, 0.129, 92.5), (1024, 285, 1.43, 0.299, 70.3), (1280, 433, 2.46, 0.457, 57.0)],
)
def test_a_page_takes_what_the_table_says(side, prompt, encode, prefill, pages):
    assert 1000 * floors.encode_seconds(side) == pytest.approx(encode, rel=0.03)
    assert 1000 * floors.prompt_seconds(V1, prompt) == pytest.approx(prefill, rel=0.03)
    assert 1 / floors.page_seconds(V1, side, prompt, 1000, 1024) == pytest.approx(pages, rel=0.02)


def test_a_slower_device_has_higher_floors():
    slow = floors.Device(bytes_per_s=floors.H200.bytes_per_s / 2, flops_per_s=floors.H200.flops_per_s / 2)
    assert floors.page_seconds(V1, 1024, 285, 1000, 1024, slow) == pytest.approx(2 * floors.page_seconds(V1, 1024, 285, 1000, 1024))


def event(ts, dur, name="k", cat="kernel"):
    return {"ts": ts, "dur": dur, "name": name, "cat": cat}


def test_gaps_are_where_nothing_runs_on_any_stream():
    events = [
        event(100, 50, "a"),
        event(120, 10, "inside"),
        event(169, 1, "near"),  # 19 us behind a
        event(190, 30, "copy", "gpu_memcpy"),
        event(0, 1e6, "host", "cpu_op"),
        event(240, 10, "b"),
        {"name": "no time", "cat": "kernel_launch", "ph": "M"},
    ]
    found = timeline.timeline(reversed(events))
    assert [(gap.start, gap.length, gap.after, gap.before) for gap in found.gaps] == [
        (70, 20, "near", "copy"),
        (120, 20, "copy", "b"),
    ]
    assert (found.length, found.busy) == (150, 91)
    assert "20.0 us idle, behind near and before copy" in str(found.gaps[0])


def test_nothing_ran():
    assert timeline.timeline([]) == timeline.Timeline(0.0, 0.0, [])


def test_a_trace_is_read_from_its_file(tmp_path):
    content = json.dumps({"traceEvents": [event(1, 2)]}).encode()
    (tmp_path / "one.json").write_bytes(content)
    (tmp_path / "two.json.gz").write_bytes(gzip.compress(content))
    assert timeline.read_trace(tmp_path / "one.json") == timeline.read_trace(tmp_path / "two.json.gz") == [event(1, 2)]
