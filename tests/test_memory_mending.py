"""Damaged files of pages that are shown small: nothing is hidden that can be made anew, and a writer mends the file at once."""

from dataclasses import replace

import pytest
from memory_histories import history

import optmem
from optmem import Memory
from optmem.memory.ageing import SHOWN, Unit, _show, picture
from optmem.memory.context import PageItem
from optmem.memory.details import Details
from optmem.memory.drawing import PIXELS

ANEW = "the small picture of page {} was damaged, and was made anew from the sharp one"


@pytest.fixture(scope="module")
def engine():
    with optmem.Engine.from_pretrained("nano", device="cpu") as found:
        yield found


@pytest.fixture(params=[False, True], ids=["no text", "archive"])
def aged(request, engine, tmp_path):
    """A memory with a page that is shown small: its folder, the page's number, and the context that it gave."""
    with Memory.open(tmp_path / "m", engine=engine, budget=600, archive=request.param) as memory:
        history(memory, 16)
        ladder = memory.optics.ladder
        small = ladder.tiers[ladder.find("square-256")]
        with memory._writing() as change:
            page = next(page for page in change.pages() if page.tier == "tiny")
            number = page.number
            change.put_blob(number, SHOWN, picture(change, page, small, memory.optics), tier=small.view)
            change.change_page(number, tier=small.name, tokens=small.tokens)
        memory._changed([number])
        before = memory.context()
    return tmp_path / "m", number, before


def damage(memory, path, number, *kinds):
    """Flips a byte in the middle of these files of a page."""
    with memory._snapshot() as view:
        names = [blob.name for blob in view.blobs(number) if blob.kind in kinds]
    assert len(names) == len(kinds)
    for name in names:
        content = bytearray((path / "blobs" / name).read_bytes())
        content[len(content) // 2] ^= 255
        (path / "blobs" / name).write_bytes(content)


def files(path):
    return {file.name: file.read_bytes() for file in (path / "blobs").iterdir()}


def of_page(context, number):
    return [item for item in context.items if isinstance(item, PageItem) and item.pages == (f"p{number}",)]


def notes(context):
    return [note for note in context.receipt.notes if "damaged" in note or "not what was written" in note]


def test_a_reader_shows_a_damaged_small_picture_and_writes_nothing(aged, engine):
    path, number, before = aged
    with Memory.open(path, engine=engine, mode="read") as reader:
        damage(reader, path, number, SHOWN)
        damaged = files(path)
        for _ in range(2):
            seen = reader.context()
            assert of_page(seen, number) == of_page(before, number) != []
            assert seen.digest() == before.digest()
            assert notes(seen) == [ANEW.format(f"p{number}")]
        assert files(path) == damaged


def test_a_writer_mends_a_small_picture_and_says_so_once(aged, engine):
    path, number, before = aged
    whole = files(path)
    with Memory.open(path, engine=engine) as memory:
        damage(memory, path, number, SHOWN)
        assert not memory.verify().is_clean
        first, second = memory.context(), memory.context()
        assert of_page(first, number) == of_page(before, number) != []
        assert first.digest() == second.digest() == before.digest()
        assert notes(first) == [ANEW.format(f"p{number}")]
        assert notes(second) == []
        assert files(path) == whole
        assert memory.verify().is_clean


def test_where_the_sharp_picture_is_damaged_too_its_text_mends_both(aged, engine):
    path, number, before = aged
    whole = files(path)
    with Memory.open(path, engine=engine) as memory:
        damage(memory, path, number, PIXELS, SHOWN)
        first, second = memory.context(), memory.context()
        if not memory.settings.archive:
            assert of_page(first, number) == of_page(second, number) == []
            assert len(notes(first)) == len(notes(second)) == 1, "it is gone, and that is said"
            return
        assert first.digest() == second.digest() == before.digest()
        assert notes(first) == [f"the picture of page p{number} was damaged, and was drawn anew from its text"]
        assert notes(second) == []
        assert files(path) == whole
        assert memory.verify().is_clean


@pytest.mark.parametrize("keep_sharp", [True, False])
def test_ageing_mends_what_it_finds_damaged(aged, engine, keep_sharp):
    """A page that is to be shown as small as it was, such as with its facts beside it."""
    path, number, _ = aged
    with Memory.open(path, engine=engine, keep_sharp=keep_sharp) as memory:
        with memory._snapshot() as view:
            page = view.page(number)
            at = memory.optics.ladder.find(page.tier)
            small = picture(view, page, memory.optics.ladder.tiers[at], memory.optics)
        damage(memory, path, number, SHOWN)
        unit = Unit(page.first, number, at, page, Details.of(page))
        with memory._writing() as change:
            side, said = _show(change, unit, memory.optics, memory.settings)
            kept = Details.of(page)
            change.change_page(number, details=replace(kept, side=side).to_json())
        assert said == [ANEW.format(f"p{number}")]
        with memory._snapshot() as view:
            assert view.blob(number, SHOWN if keep_sharp else PIXELS) == small
        assert memory.verify().is_clean
