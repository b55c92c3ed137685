"""resample against Pillow: a scan fitted to 1024 px, up-scaling and grey; megapixels and bytes are of the input."""

import pytest
import torch
from PIL import Image

from optmem import ops
from optmem.testing import assert_equal, generator

CASES = {  # height, width -> height, width, channels
    "scan 2550x3300 RGB to 791x1024": ((3300, 2550), (1024, 791), 3),
    "scan 2550x3300 L to 791x1024": ((3300, 2550), (1024, 791), 1),
    "page 512x512 RGB to 1024x1024": ((512, 512), (1024, 1024), 3),
    "page 1024x1024 L to 640x640": ((1024, 1024), (640, 640), 1),
}


@pytest.fixture(params=CASES)
def case(request, benchmark):
    before, after, channels = CASES[request.param]
    image = torch.randint(0, 256, (*before, channels), generator=generator(request.param), dtype=torch.uint8)
    benchmark.group = request.param
    benchmark.extra_info.update(megapixels=before[0] * before[1] / 1e6, bytes=image.numel())
    picture = Image.fromarray(image.squeeze(2).numpy() if channels == 1 else image.numpy())
    return image, picture, after


def by_pillow(picture, after):
    return picture.resize((after[1], after[0]), Image.Resampling.BICUBIC)


def bench_pillow(benchmark, case):
    _, picture, after = case
    benchmark.pedantic(by_pillow, (picture, after), rounds=10, warmup_rounds=1)


@pytest.mark.parametrize("threads", [1, 2])
def bench_optmem(benchmark, case, threads):
    image, picture, after = case
    expected = torch.frombuffer(bytearray(by_pillow(picture, after).tobytes()), dtype=torch.uint8)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        assert_equal(ops.resample(image[None], *after).flatten(), expected)
        benchmark.pedantic(ops.resample, (image[None], *after), rounds=20, warmup_rounds=3)
    finally:
        torch.set_num_threads(before)
