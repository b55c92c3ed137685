"""resample: the C++ under every instruction set, the CUDA arithmetic and the reference, all equal to Pillow bit for bit."""

import numpy as np
import PIL
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from optmem import ops, reference
from optmem.errors import InputError
from optmem.native import native
from optmem.testing import assert_equal, available_isas, forced_isa, generator

SIZES = [  # height, width -> height, width
    ((1, 1), (1, 1)),
    ((1, 1), (7, 5)),
    ((40, 33), (1, 1)),
    ((1, 50), (1, 7)),
    ((50, 1), (7, 1)),
    ((1, 200), (64, 3)),
    ((17, 16), (16, 17)),
    ((64, 64), (64, 64)),
    ((64, 65), (64, 31)),  # only one of the passes
    ((65, 64), (31, 64)),
    ((63, 300), (62, 299)),  # weights that all but one vanish
    ((127, 130), (131, 128)),
    ((300, 211), (100, 70)),
    ((30, 40), (301, 411)),
    ((2, 3), (500, 400)),
    ((1000, 3), (3, 1000)),
    ((700, 900), (2, 3)),  # windows of the whole image
    ((820, 640), (256, 200)),
    ((120, 100), (60, 70)),  # shrinks by exactly twice as many rows as columns: the width first
    ((121, 100), (60, 70)),  # by one more: the height first
    ((500, 70), (33, 150)),  # the height first, the width grows
]


def make_images(seed: str, num_images: int, size: tuple[int, int], channels: int) -> torch.Tensor:
    """Noise, then black and white stripes and checks: the values that overshoot most."""
    images = torch.randint(0, 256, (num_images, *size, channels), generator=generator(seed), dtype=torch.uint8)
    rows, columns = torch.meshgrid(torch.arange(size[0]), torch.arange(size[1]), indexing="ij")
    for image, pattern in zip(images[1:], ((rows + columns) % 2, columns // 3 % 2, rows // 2 % 2), strict=False):
        image[:] = (pattern * 255).to(torch.uint8)[..., None]
    return images


def by_pillow(images: torch.Tensor, height: int, width: int) -> torch.Tensor:
    """Pillow 13's answer; an older Pillow, which always takes the width first, gives it in two calls."""
    steps = [(width, height)]
    if PIL.__version__ < "13" and reference.resample_order(*images.shape[1:3], height, width) == (1, 2):
        steps = [(images.shape[2], height), (width, height)]
    rows = []
    for image in images.numpy():
        picture = Image.fromarray(image.squeeze(2) if image.shape[2] == 1 else image)
        for step in steps:
            picture = picture.resize(step, Image.Resampling.BICUBIC)
        rows.append(np.asarray(picture).reshape(height, width, image.shape[2]))
    return torch.from_numpy(np.stack(rows))


def by_scalar(images: torch.Tensor, height: int, width: int) -> torch.Tensor:
    """The function that the CUDA kernel calls, on the host."""
    out = torch.empty((images.shape[0], height, width, images.shape[3]), dtype=torch.uint8)
    native("_cpu").require().resample_scalar(images.numpy(), out.numpy())
    return out


@pytest.mark.parametrize("isa", available_isas())
@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize(("before", "after"), SIZES)
def test_equals_pillow(isa, channels, before, after):
    images = make_images(f"{before} {after}", 4, before, channels)
    with forced_isa(isa):
        assert_equal(ops.resample(images, *after), by_pillow(images, *after))


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize(("before", "after"), SIZES)
def test_reference_and_cuda_arithmetic_equal_pillow(channels, before, after):
    images = make_images(f"{before} {after}", 2, before, channels)
    expected = by_pillow(images, *after)
    assert_equal(reference.resample(images, *after), expected)
    assert_equal(by_scalar(images, *after), expected)


side = st.integers(1, 90)


@settings(max_examples=300, deadline=None)
@given(before=st.tuples(side, side), after=st.tuples(side, side), channels=st.sampled_from([1, 3]), seed=st.integers(0, 2**32))
def test_equals_pillow_at_any_size(before, after, channels, seed):
    images = make_images(str(seed), 1, before, channels)
    expected = by_pillow(images, *after)
    for isa in available_isas():
        with forced_isa(isa):
            assert_equal(ops.resample(images, *after), expected)
    assert_equal(by_scalar(images, *after), expected)
    assert_equal(reference.resample(images, *after), expected)


@pytest.mark.parametrize("sizes", [(255, 79), (3300, 1024), (65535, 1), (1, 65535), (65535, 65534), (1000, 3), (7, 400)])
def test_weights_equal_the_reference_and_cannot_overflow(sizes):
    size_in, size_out = sizes
    bounds, weights = (
        torch.from_numpy(table).long() for table in native("_cpu").require().resample_coefficients(size_in, size_out)
    )
    assert weights.abs().sum(1).max() * 255 + 2**21 < 2**31
    for i in {0, size_out // 2, size_out - 1}:
        first, count = bounds[i].tolist()
        assert 0 <= first < first + count <= size_in
        assert not weights[i, count:].any()
    if size_in * size_out < 2**22:
        dense = torch.zeros(size_out, size_in + weights.shape[1], dtype=torch.int64)
        dense.scatter_(1, bounds[:, :1] + torch.arange(weights.shape[1]), weights)
        assert_equal(dense[:, :size_in], reference.resample_weights(size_in, size_out))


@pytest.mark.parametrize("threads", [1, 2, 3, 7])
@pytest.mark.parametrize(
    ("before", "after"),
    [((400, 130), (128, 41)), ((5, 9), (3, 300)), ((9, 5), (400, 3)), ((600, 300), (4, 200)), ((300, 40), (100, 90))],
)
def test_threads_do_not_change_the_answer(threads, before, after):
    images = make_images("threads", 3, before, 3)
    out = torch.full((3, *after, 3), 0xA5, dtype=torch.uint8)
    native("_cpu").require().resample(images.numpy(), out.numpy(), threads)
    assert_equal(out, by_pillow(images, *after))


def test_accepts_strided_inputs():
    wide = make_images("strided", 4, (90, 110), 3)
    views = [wide[::2, 5::3, ::2], wide.transpose(1, 2), wide[:, :, :40, :1], wide.flip(1), wide[:1].expand(3, -1, -1, -1)]
    for view in views:
        assert_equal(ops.resample(view, 31, 50), by_pillow(view.contiguous(), 31, 50))


def test_no_images_give_no_images():
    assert ops.resample(torch.empty(0, 9, 9, 3, dtype=torch.uint8), 4, 5).shape == (0, 4, 5, 3)


def test_the_result_is_never_the_input():
    images = make_images("same", 1, (8, 8), 3)
    resized = ops.resample(images, 8, 8)
    assert_equal(resized, images)
    assert resized.data_ptr() != images.data_ptr()


@pytest.mark.parametrize(
    ("images", "height", "width", "words"),
    [
        (torch.zeros(1, 4, 4, 3), 2, 2, "must be torch.uint8, got torch.float32"),
        (torch.zeros(4, 4, 3, dtype=torch.uint8), 2, 2, r"must be \[N, H, W, C\]"),
        (torch.zeros(1, 4, 4, 4, dtype=torch.uint8), 2, 2, "with C 1 or 3"),
        (torch.zeros(1, 0, 4, 3, dtype=torch.uint8), 2, 2, "a side of images must be 1 to 65535 pixels, got 0x4"),
        (torch.zeros(1, 1, 65536, 1, dtype=torch.uint8), 2, 2, "got 1x65536"),
        (torch.zeros(1, 4, 4, 3, dtype=torch.uint8), 0, 2, "a side of the result must be 1 to 65535 pixels, got 0x2"),
        (torch.zeros(1, 4, 4, 3, dtype=torch.uint8), 2, -1, "got 2x-1"),
        (torch.zeros(1, 4, 4, 3, dtype=torch.uint8), 10**12, 2, "got 1000000000000x2"),
        (torch.zeros(1, 4, 4, 3, dtype=torch.uint8), 60000, 60000, "too many for one image"),
    ],
)
def test_refuses_wrong_arguments(images, height, width, words):
    with pytest.raises(InputError, match=words):
        ops.resample(images, height, width)


@pytest.mark.parametrize(
    ("images", "out", "words"),
    [
        (np.zeros((1, 4, 4, 3), np.uint8), np.zeros((1, 2, 2, 1), np.uint8), "agree in N and C"),
        (np.zeros((2, 4, 4, 3), np.uint8), np.zeros((1, 2, 2, 3), np.uint8), "agree in N and C"),
        (np.zeros((4, 4, 3), np.uint8), np.zeros((1, 2, 2, 3), np.uint8), "must be"),
        (np.zeros((1, 4, 0, 3), np.uint8), np.zeros((1, 2, 2, 3), np.uint8), "at least one pixel"),
    ],
)
def test_native_module_refuses_what_would_touch_foreign_memory(images, out, words):
    with pytest.raises(ValueError, match=words):
        native("_cpu").require().resample(images, out, 1)


def test_opcheck():
    torch.library.opcheck(torch.ops.optmem.resample, (make_images("opcheck", 2, (20, 30), 3), 7, 50))


def test_cpu_row_says_which_code_serves():
    rows = {row.device: row for row in ops.implementations() if row.operator == "resample"}
    assert rows["cpu"].name == "cpp"
    assert rows["cuda"].name == ("cuda" if native("_cuda").module is not None else "reference")


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device: here the same arithmetic is tested on the host")
@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize(("before", "after"), SIZES)
def test_cuda_equals_pillow(channels, before, after):
    images = make_images(f"{before} {after}", 4, before, channels)
    assert_equal(ops.resample(images.cuda(), *after).cpu(), by_pillow(images, *after))
