"""draw_text against Pillow's ImageDraw: the same pages, checked pixel by pixel before the clock starts, one thread each.

Pillow gets its best case: one call a row, the same bitmap font through FreeType, the font loaded beforehand.
"""

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw, ImageFont

from optmem import ops, paginate
from optmem.pages import draw_pages, symbols
from optmem.pages.atlas import cell_atlas
from optmem.pages.fonts import SHIPPED

NUM_PAGES = 32
PROSE = (
    "The dome closed at four, as it had every night that week, and the instruments went quiet one after the other. "
    "Nobody had asked for the log; it was kept because it had always been kept.\n"
)


def pages_of(cell: str):
    return paginate(PROSE * 600, cell=cell)[:NUM_PAGES]


def job_of(pages):
    """The arguments of ops.draw_text for pages of one atlas, as optmem.pages.page makes them."""
    table = pages[0].store.table()
    starts = np.cumsum([0, *(len(page.placements) for page in pages)], dtype=np.int64)
    arrays = (table.ink, table.stamps, np.concatenate([page.placements for page in pages]), starts)
    return (*map(torch.from_numpy, arrays), pages[0].height, pages[0].width)


def draw_with_pillow(pages, cell: str, font, marks) -> list[Image.Image]:
    atlas = cell_atlas(cell)
    images = []
    for page in pages:
        image = Image.new("L", (page.width, page.height), 255)
        draw = ImageDraw.Draw(image)
        draw.fontmode = "1"
        for line in page.lines:
            said = line.text.rstrip("\n")
            draw.text((0, line.box.top), said, fill=0, font=font)
            if line.text.endswith("\n"):
                image.paste(marks[symbols.LINE_END], (line.box.right - atlas.font.width, line.box.top))
        images.append(image)
    return images


def pillow_marks(cell: str) -> dict[str, Image.Image]:
    ink = cell_atlas(cell).font.draw_mark(symbols.LINE_END)
    return {symbols.LINE_END: Image.fromarray(255 - ink)}


@pytest.fixture(params=["8x16", "6x12"])
def case(request):
    cell = request.param
    pages = pages_of(cell)
    used = cell_atlas(cell).font
    font = ImageFont.truetype(str(SHIPPED / f"{used.bitmap.name}.bdf"), used.height)
    marks = pillow_marks(cell)
    ours = draw_pages(pages)
    theirs = draw_with_pillow(pages, cell, font, marks)
    assert all((ours[i] == np.asarray(theirs[i])).all() for i in range(len(pages))), "Pillow and draw_text must draw the same pages"
    return cell, pages, font, marks


def note(benchmark, cell: str, pages) -> None:
    benchmark.group = f"draw_text {len(pages)} pages 512x512, cells {cell}"
    benchmark.extra_info["bytes_written"] = sum(page.height * page.width for page in pages)
    benchmark.extra_info["characters"] = sum(len(page.placements) for page in pages)


@pytest.mark.parametrize("threads", [1, 2])
def bench_optmem(benchmark, case, threads):
    cell, pages, _, _ = case
    note(benchmark, cell, pages)
    job = job_of(pages)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        benchmark(ops.draw_text, *job)
    finally:
        torch.set_num_threads(before)


def bench_draw_pages(benchmark, case):
    """What a user calls: placements gathered, pages drawn, images handed out."""
    cell, pages, _, _ = case
    note(benchmark, cell, pages)
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        benchmark(draw_pages, pages)
    finally:
        torch.set_num_threads(before)


def bench_pillow(benchmark, case):
    cell, pages, font, marks = case
    note(benchmark, cell, pages)
    benchmark.pedantic(draw_with_pillow, (pages, cell, font, marks), rounds=5, warmup_rounds=1)


def bench_lay_out(benchmark, case):
    """Text to placements: what comes before the drawing."""
    cell, pages, _, _ = case
    note(benchmark, cell, pages)
    text = "".join(page.text() for page in pages)
    benchmark.pedantic(paginate, (text,), {"cell": cell}, rounds=5, warmup_rounds=1)
