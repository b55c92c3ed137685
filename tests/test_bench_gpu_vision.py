"""The cases of bench_gpu_vision.py, at a view so small that a CPU can say whether their answers and their counts are right."""

import bench_gpu_vision
import pytest
import torch

CPU = torch.device("cpu")


@pytest.mark.parametrize("name", bench_gpu_vision.MAKERS)
def test_every_way_has_the_same_answer(name):
    case = bench_gpu_vision.MAKERS[name](256, 2, CPU)
    case.check()
    ours = bench_gpu_vision.results(case.ours())
    for run in case.theirs.values():
        torch.testing.assert_close(bench_gpu_vision.results(run()), ours, rtol=0.05, atol=0.05)


@pytest.mark.parametrize("name", bench_gpu_vision.MAKERS)
def test_counts_grow_with_the_batch(name):
    one, three = (bench_gpu_vision.MAKERS[name](128, pages, CPU) for pages in (1, 3))
    assert three.flops == 3 * one.flops
    assert one.bytes < three.bytes <= 3 * one.bytes


def test_counts_are_those_of_exact_arithmetic():
    """GFLOP of a page of 1024 px, counted apart from here: four global layers, eight of windows, the compressor, the patches."""
    published = {"global_attention": (4, 209.4), "window_attention": (8, 19.1), "compress": (1, 11.3), "patch_embed": (1, 4.8)}
    for name, (layers, gflop) in published.items():
        counted = layers * bench_gpu_vision.MAKERS[name](1024, 1, CPU).flops / 1e9
        assert counted == pytest.approx(gflop, rel=0.02), name
