"""patch_embed against torch's convolution of normalised floats.

    pytest bench/bench_patch_embed.py --benchmark-enable --benchmark-group-by=group

On a GPU the clock is CUDA events (extra_info: us, gb_per_s); on a CPU it is pytest-benchmark's own.
"""

import pytest
import torch

from optmem import ops, reference
from optmem.testing import assert_close, patch_embed_inputs

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


def convolve(pixels, weight, bias, positions):
    """What the published code does: a float image, three channels always, a convolution, a sum."""
    images = reference.normalise(pixels.expand(-1, -1, -1, 3), weight.dtype).permute(0, 3, 1, 2)
    return torch.nn.functional.conv2d(images, weight, bias, stride=16).permute(0, 2, 3, 1) + positions


RUNS = {"optmem": ops.patch_embed, "torch": convolve}


@pytest.mark.parametrize("run", RUNS)
@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize(("num_pages", "side"), [(1, 512), (1, 1024), (16, 1024)])
def bench_patch_embed(benchmark, num_pages, side, dtype, channels, run):
    if benchmark.disabled:
        num_pages, side = 1, 64  # the answer is checked, nothing is timed
    inputs = patch_embed_inputs(num_pages, (side // 16, side // 16), channels, 768, dtype, DEVICE)
    check(RUNS[run], inputs[0][:1], *inputs[1:])

    benchmark.group = f"patch_embed {num_pages} x {side} px, {channels} channels, {str(dtype).removeprefix('torch.')}"
    patches = num_pages * (side // 16) ** 2
    moved = sum(tensor.nbytes for tensor in inputs) + patches * 768 * dtype.itemsize
    benchmark.extra_info.update(bytes=moved, flops=2 * patches * 768 * 768, device=str(DEVICE))
    if DEVICE.type == "cuda" and not benchmark.disabled:
        us = microseconds(lambda: RUNS[run](*inputs))
        benchmark.extra_info.update(us=us, gb_per_s=moved / us / 1000)
    benchmark.pedantic(synchronised, args=(RUNS[run], inputs), rounds=10, warmup_rounds=2)


def check(run, pixels, *parameters):
    """One page, before the clock starts; the baseline may round three times, or multiply in TF32."""
    images = reference.normalise(pixels, parameters[0].dtype).double()
    exact = reference.project_patches(images, *(tensor.double() for tensor in parameters))
    if run is convolve:
        torch.testing.assert_close(run(pixels, *parameters).double(), exact, rtol=0.02, atol=0.02)
    else:
        assert_close(run(pixels, *parameters), reference.patch_embed(pixels, *parameters), exact=exact)


def synchronised(run, inputs):
    run(*inputs)
    if DEVICE.type == "cuda":
        torch.cuda.synchronize()


def microseconds(run):
    """The median on the device itself, with the L2 cache cleared between rounds."""
    from triton.testing import do_bench

    return do_bench(run, return_mode="median") * 1000
