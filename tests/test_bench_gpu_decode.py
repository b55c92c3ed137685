"""The bench of the decoder's operators, as far as it needs no GPU: its inputs, its answers, its counts, on a small decoder."""

import bench_gpu_decode as bench
import pytest
import torch

CPU = torch.device("cpu")
SMALL = bench.Sizes(hidden=64, heads=2, dense_width=96, experts=8, expert_width=24, top_k=2, vocab=500)


@pytest.mark.parametrize(
    ("name", "make"),
    [plan for plan in bench.plans(CPU, SMALL) if plan[0].split()[1] in ("1", "8")],
    ids=lambda value: str(value)[:30],
)
def test_answers_are_right_and_torchs_ways_run(name, make):
    case = make()
    assert case.name == name
    assert case.check().ours < 0.1
    for run in (case.ours, *case.theirs.values()):
        run()
    assert case.bytes > 0


def test_counts_at_a_throughput_batch():
    """Performance notes: 61,440 bytes a token of twelve layers; all experts of a layer are 440 MB."""
    sizes = bench.Sizes()
    case = bench.paged(2, 300, CPU, sizes)
    assert case.bytes == 2 * 300 * 61440 // 12 + 2 * 2 * 1280 * 2
    assert case.flops == 2 * 300 * 4 * 1280
    small = bench.experts(64, CPU, SMALL)
    assert small.bytes == 8 * 3 * 24 * 64 * 2 + 2 * 64 * 64 * 2 + 8 * 64 * 2
    assert small.flops == 2 * 64 * 2 * 3 * 24 * 64
    halved = bench.experts_e4m3(64, CPU, SMALL)
    assert halved.bytes == 8 * (3 * 24 * 64 + 4 * (2 * 24 + 64)) + 2 * 64 * 64 * 2 + 8 * 64 * 2
    assert halved.flops == small.flops
    assert bench.layer_e4m3(8, CPU, SMALL).bytes == 8 * 64 * 2 + 96 * 64 + 96 * 4 + 8 * 96 * 2


def test_every_batch_and_context_is_planned():
    names = [name for name, _ in bench.plans(CPU, SMALL)]
    assert len(set(names)) == len(names) == 5 * 9 + 5 * 3
    assert {"paged_attention 1024 x 1300", "expert_mlp 1024 rows"} <= set(names)
