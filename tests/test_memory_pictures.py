"""Pictures and documents that come with messages: they are pages, are read, and one that is damaged hides nothing."""

import base64
import io

import numpy as np
import pytest
from memory_histories import check_context, png_of, said, turn, with_picture
from PIL import Image

import optmem
from optmem import Memory
from optmem.memory.context import PageItem
from optmem.memory.details import Details
from optmem.pages import paginate


@pytest.fixture(scope="module")
def engine():
    with optmem.Engine.from_pretrained("nano", device="cpu") as found:
        yield found


def test_pictures_are_pages_and_are_read(engine, tmp_path):
    with Memory.open(tmp_path / "m", engine=engine, budget=2000) as memory:
        (seq,) = memory.add(with_picture(png_of("invoice number 7731-A\ntotal of 1,250.00 EUR\n")))
        memory.add(turn(1))
        view = memory.context()
        check_context(view, memory, [{seq}])
        pictures = [item for item in view.items if isinstance(item, PageItem)]
        assert len(pictures) == 1
        assert view.items[0].seq == seq
        assert b"not drawn on this page" in view.items[0].content
        (hit,) = memory.recall("invoice number", limit=1)
        assert (hit.text, hit.source, hit.messages) == ("invoice number 7731-A", "ocr", (seq,))
        assert pictures[0].fidelity is None  # nobody measured how others' pictures are read
        assert hit.fidelity is None
        assert "nano reads only pages that optmem draws" in hit.note
        assert memory.read(pictures[0].pages[0]).note == hit.note
        assert memory.recall("1,250.00", limit=1)[0].text == "total of 1,250.00 EUR"


def test_what_optmem_wrote_itself_is_known(engine, tmp_path):
    """The line that stands for a picture is no guess of nano's, which would misread its number."""
    with Memory.open(tmp_path / "m", engine=engine, budget=400) as memory:
        seen = with_picture(png_of("seen\n"))
        seen["content"].append({"type": "text", "text": said(1, 200)})
        memory.add([seen, *turn(1, 300), *turn(2, 300), *turn(3, 300)])
        memory.context()
        with memory._snapshot() as view:
            (page,) = [page for page in view.pages() if page.number == 1]
            assert page.tier != "text"
            (line,) = [line.text for line in view.lines(1) if "not drawn" in line.text]
        assert line in memory.read("p1").text
        assert memory.read("p1").source == "ocr"
        (hit,) = memory.recall("image not drawn on this page", limit=1)
        assert (hit.text, hit.source, hit.confidence) == (line.rstrip("\n"), "verbatim", 1.0)


def test_pictures_of_others_are_not_taken_to_be_read_as_pages_are(engine, tmp_path):
    with Memory.open(tmp_path / "m", engine=engine, budget=2000) as memory:
        memory.add([with_picture(png_of("seen\n")), *turn(1)])
        memory.context()
        with memory._snapshot() as view:
            pages = {Details.of(page).kind: page for page in view.pages()}
        nano, claude = memory._planner(""), memory._planner("claude")
        own, foreign = (nano.choices(pages[kind], Details.of(pages[kind])) for kind in ("text", "picture"))
        assert 0 < max(foreign.fidelity) < 0.2 < 0.9 < max(own.fidelity)
        assert not foreign.is_measured
        assert max(claude.choices(pages["picture"], Details.of(pages["picture"])).fidelity) > 0.9


def test_odd_pictures(engine, tmp_path):
    """Small, large, in colour, in a tool's result; one that is damaged hides nothing."""
    wide = io.BytesIO()
    Image.fromarray(np.full((40, 1500, 3), 200, np.uint8)).save(wide, "PNG")
    tiny = io.BytesIO()
    Image.new("L", (1, 1)).save(tiny, "PNG")
    broken = base64.b64encode(wide.getvalue()[:200]).decode()  # its header is whole
    with Memory.open(tmp_path / "m", engine=engine, budget=2000) as memory:
        for data in (base64.b64encode(wide.getvalue()).decode(), base64.b64encode(tiny.getvalue()).decode(), broken):
            memory.add(with_picture(data))
        source = {"type": "base64", "media_type": "image/png", "data": png_of("seen by a tool\n")}
        memory.add(
            [
                {"role": "assistant", "content": [{"type": "tool_use", "id": "t1", "name": "look", "input": {}}]},
                {
                    "role": "user",
                    "content": [{"type": "tool_result", "tool_use_id": "t1", "content": [{"type": "image", "source": source}]}],
                },
            ]
        )
        view = memory.context()
        assert any("message 3" in note for note in view.receipt.notes)
        check_context(view, memory, [{4, 5}])
        assert memory.recall("seen by a tool", limit=1)[0].text == "seen by a tool"
        assert memory.verify().is_clean


def test_documents_are_pages(engine, tmp_path):
    pytest.importorskip("pypdfium2")
    file = io.BytesIO()
    Image.fromarray(paginate("the contract ends in May\n")[0].image()).save(file, "PDF")
    pdf = {"type": "base64", "media_type": "application/pdf", "data": base64.b64encode(file.getvalue()).decode()}
    text = {"type": "text", "media_type": "text/plain", "data": "notes on the lease\n"}
    with Memory.open(tmp_path / "m", engine=engine, budget=2000) as memory:
        memory.add({"role": "user", "content": [{"type": "document", "source": pdf}, {"type": "document", "source": text}]})
        view = memory.context()
        assert sum(isinstance(item, PageItem) for item in view.items) == 2
        assert memory.recall("lease", limit=1)[0].text == "notes on the lease"
