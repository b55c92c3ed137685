"""contact_sheet: the CPU, the CUDA arithmetic on the host and the reference, all equal to Pillow's pages pasted on paper."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from optmem import ops, reference
from optmem.errors import InputError
from optmem.native import native
from optmem.ops import SheetBox
from optmem.ops.drawing import sheet_plan
from optmem.pixels import contact_sheet
from optmem.testing import assert_equal, generator

CPU = torch.device("cpu")


def make_pages(shapes):
    """Noise, and stripes where a page is large enough: the values that overshoot most."""
    pages = []
    for number, shape in enumerate(shapes):
        page = torch.randint(0, 256, shape, generator=generator(f"{number} {shape}"), dtype=torch.uint8)
        page[: shape[0] // 2] = (torch.arange(shape[1]) // 3 % 2 * 255).to(torch.uint8)[None, :, None]
        pages.append(page)
    return pages


def by_pillow(pages, boxes, size):
    """Each page resized alone and pasted, as anyone would; two calls where the height comes first, for Pillow before 13."""
    is_grey = all(page.shape[2] == 1 for page in pages)
    sheet = Image.new("L" if is_grey else "RGB", (size, size), 255 if is_grey else (255, 255, 255))
    for page, box in zip(pages, boxes, strict=True):
        picture = Image.fromarray(page.squeeze(2).numpy() if page.shape[2] == 1 else page.numpy())
        if reference.resample_order(*page.shape[:2], box.height, box.width) == (1, 2):
            picture = picture.resize((page.shape[1], box.height), Image.Resampling.BICUBIC)
        picture = picture.resize((box.width, box.height), Image.Resampling.BICUBIC)
        sheet.paste(picture.convert(sheet.mode), (box.left, box.top))
    pixels = torch.from_numpy(np.array(sheet))
    return pixels if pixels.dim() == 3 else pixels[..., None]


def by_scalar(pages, boxes, size):
    """The function that the CUDA kernel calls, on the host, with what the launcher would tell it."""
    channels = max(page.shape[2] for page in pages)
    sheet = torch.full((size, size, channels), reference.PAPER, dtype=torch.uint8)
    plan = sheet_plan(tuple(page.shape for page in pages), tuple(boxes), CPU)
    pixels = torch.cat([page.flatten() for page in pages])
    arrays = (tensor.numpy() for tensor in (pixels, plan.coefficients, plan.pages, sheet))
    native("_cpu").require().contact_sheet_scalar(*arrays)
    assert plan.most_values == max(box.height * box.width * page.shape[2] for page, box in zip(pages, boxes, strict=True))
    return sheet


SHEETS = {
    "one page": ([(9, 7, 1)], [SheetBox(0, 0, 9, 7)], 16),
    "smaller": ([(90, 70, 3)], [SheetBox(3, 5, 31, 44)], 50),
    "larger": ([(5, 6, 1)], [SheetBox(1, 2, 40, 33)], 48),
    "the width first": ([(120, 100, 1)], [SheetBox(0, 0, 60, 70)], 70),
    "the height first": ([(121, 100, 3)], [SheetBox(4, 0, 60, 70)], 70),
    "one axis": ([(64, 65, 1), (65, 64, 1)], [SheetBox(0, 0, 64, 31), SheetBox(0, 31, 31, 64)], 95),
    "grey and colour": (
        [(60, 30, 1), (33, 44, 3), (8, 8, 1)],
        [SheetBox(0, 0, 30, 15), SheetBox(0, 15, 25, 30), SheetBox(40, 3, 8, 8)],
        64,
    ),
    "a sheet of one pixel": ([(700, 900, 3)], [SheetBox(0, 0, 1, 1)], 1),
    "equal pages": ([(64, 64, 1)] * 4, [SheetBox(y, x, 20, 20) for y in (0, 20) for x in (0, 20)], 41),
    "out of order": ([(30, 30, 1), (20, 20, 1)], [SheetBox(30, 30, 10, 10), SheetBox(0, 0, 12, 9)], 40),
}


@pytest.mark.parametrize("name", SHEETS)
def test_equals_pillow(name):
    shapes, boxes, size = SHEETS[name]
    pages = make_pages(shapes)
    expected = by_pillow(pages, boxes, size)
    assert_equal(ops.contact_sheet(pages, boxes, size), expected)
    assert_equal(reference.contact_sheet(pages, boxes, size), expected)
    assert_equal(by_scalar(pages, boxes, size), expected)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU: here the same arithmetic is tested on the host")
@pytest.mark.parametrize("name", SHEETS)
def test_cuda_equals_pillow(name):
    shapes, boxes, size = SHEETS[name]
    pages = make_pages(shapes)
    assert_equal(ops.contact_sheet([page.cuda() for page in pages], boxes, size).cpu(), by_pillow(pages, boxes, size))


side = st.integers(1, 60)


@settings(max_examples=150, deadline=None)
@given(before=st.lists(st.tuples(side, side, st.sampled_from([1, 3])), min_size=1, max_size=5), after=st.tuples(side, side))
def test_any_pages_equal_pillow(before, after):
    """In a diagonal of boxes, so that none touches another."""
    pages, (height, width) = make_pages(before), after
    boxes = [SheetBox(at * height, at * width, height, width) for at in range(len(pages))]
    size = max(height, width) * len(pages) + 1
    expected = by_pillow(pages, boxes, size)
    assert_equal(ops.contact_sheet(pages, boxes, size), expected)
    assert_equal(by_scalar(pages, boxes, size), expected)


def test_a_history_of_pages_equals_pillow():
    """The sheet that memory draws, through the way it draws it."""
    pages = make_pages([(640, 640, 1)] * 9)
    sheet = contact_sheet([page.squeeze(2).numpy() for page in pages], 640)
    boxes = [SheetBox(box.top, box.left, box.bottom - box.top, box.right - box.left) for box in sheet.boxes]
    assert_equal(torch.from_numpy(sheet.image)[..., None], by_pillow(pages, boxes, 640))
    assert_equal(by_scalar(pages, boxes, 640), by_pillow(pages, boxes, 640))


def test_strided_pages():
    wide = make_pages([(40, 80, 3)])[0]
    pages, boxes = [wide[:, ::2], wide[..., 1:2], wide.transpose(0, 1)], [SheetBox(0, at, 10, 10) for at in (0, 10, 20)]
    assert_equal(ops.contact_sheet(pages, boxes, 32), by_pillow([page.contiguous() for page in pages], boxes, 32))


def test_a_plan_is_kept_for_pages_of_the_same_shapes():
    told = (((8, 8, 1), (9, 9, 3)), (SheetBox(0, 0, 4, 4), SheetBox(4, 4, 4, 4)), CPU)
    assert sheet_plan(*told) is sheet_plan(*told)


GREY = torch.zeros(8, 8, 1, dtype=torch.uint8)
HERE = SheetBox(0, 0, 8, 8)


@pytest.mark.parametrize(
    ("pages", "boxes", "size", "words"),
    [
        ([], [], 16, "at least one, got 0 and 0"),
        ([GREY], [HERE, HERE], 16, "as many, and at least one, got 1 and 2"),
        ([GREY], [HERE], 0, "size must be 1 to 65535 pixels, got 0"),
        ([GREY], [HERE], 65536, "got 65536"),
        ([GREY.float()], [HERE], 16, "pages must be torch.uint8, got torch.float32"),
        ([GREY, GREY.to("meta")], [HERE, HERE], 16, "on one device, got meta"),
        ([GREY[..., 0]], [HERE], 16, r"\[H, W, C\] with C 1 or 3 .* got \[8, 8\]"),
        ([GREY.expand(8, 8, 2)], [HERE], 16, r"got \[8, 8, 2\]"),
        ([GREY[:0]], [HERE], 16, r"got \[0, 8, 1\]"),
        ([GREY], [SheetBox(9, 0, 8, 8)], 16, r"inside the sheet of 16, got \(9, 0, 8, 8\)"),
        ([GREY], [SheetBox(0, -1, 8, 8)], 16, "inside the sheet"),
        ([GREY], [SheetBox(0, 0, 0, 8)], 16, "inside the sheet"),
        ([GREY], [SheetBox(0, 0, 60000, 60000)], 65535, "60000x60000 pixels are too many for one page"),
        ([GREY, GREY], [SheetBox(7, 7, 8, 8), HERE], 16, r"must not overlap, got \(0, 0, 8, 8\) and \(7, 7, 8, 8\)"),
        ([GREY] * 3, [SheetBox(0, 0, 16, 2), SheetBox(0, 8, 2, 8), SheetBox(9, 1, 4, 4)], 16, "must not overlap"),
    ],
)
def test_refuses_wrong_arguments(pages, boxes, size, words):
    with pytest.raises(InputError, match=words):
        ops.contact_sheet(pages, boxes, size)


@pytest.mark.parametrize(
    ("column", "value", "words"),
    [
        (0, 1, "outside the pixels"),
        (0, -1, "outside the pixels"),
        (1, 9, "outside the pixels"),
        (2, 0, "a page of 8x0 pixels"),
        (2, 7, "reads outside its page"),
        (3, 3, "a page of 3 channels"),
        (4, 9, "box lies outside"),
        (7, 17, "box lies outside"),
        (9, 10**6, "outside the coefficients"),
        (9, -1, "outside the coefficients"),
        (12, 10**6, "outside the coefficients"),
    ],
)
def test_native_module_refuses_what_would_touch_foreign_memory(column, value, words):
    plan = sheet_plan(((8, 8, 1),), (HERE,), CPU)
    rows = plan.pages.clone()
    rows[0, column] = value
    sheet = np.zeros((16, 16, 1), np.uint8)
    with pytest.raises(ValueError, match=words):
        native("_cpu").require().contact_sheet_scalar(GREY.numpy(), plan.coefficients.numpy(), rows.numpy(), sheet)


def test_says_who_serves_it():
    rows = {row.device: row.name for row in ops.implementations() if row.operator == "contact_sheet"}
    assert rows == {"cpu": "cpp", "cuda": "cuda" if native("_cuda").module is not None else "reference"}
