"""Forgetting: what is forgotten is nowhere, and what stood beside it is still read."""

from pathlib import Path

import pytest
from memory_histories import check_context, history, key, turn

import optmem
from optmem import Memory
from optmem.errors import InputError
from optmem.memory.context import PageItem


@pytest.fixture(scope="module")
def engine():
    with optmem.Engine.from_pretrained("nano", device="cpu") as found:
        yield found


def everything(path):
    return b"".join(file.read_bytes() for file in sorted(Path(path).rglob("*")) if file.is_file())


@pytest.mark.parametrize("archive", [False, True])
def test_what_is_forgotten_is_nowhere(engine, tmp_path, archive):
    path = tmp_path / "m"
    with Memory.open(path, engine=engine, budget=700, archive=archive) as memory:
        history(memory, 12)
        memory.recall("key of host 2 /srv/app/2.cfg")
        memory.recall("key of host 3 /srv/app/3.cfg")
        with memory._snapshot() as view:
            (number,) = view.pages_showing(5, 5)[:1]
            files = [view.bytes_of(blob) for blob in view.blobs(number)]
        assert key(2).encode() in everything(path)
        done = memory.forget(5)
        assert done.messages == (5,)
        assert done.is_proven, done.verified
        assert done.searched > 0
        left = everything(path)
        assert key(2).encode() not in left
        assert all(file not in left for file in files)
        assert not any(key(2) in hit.text for hit in memory.recall(key(2)))
        assert key(3) in memory.recall("key of host 3 /srv/app/3.cfg", limit=1)[0].text, "what shared its page is still read"
        check_context(memory.context(), memory, [])
        assert memory.verify([key(2)]).is_clean
    assert key(2).encode() not in everything(path)


def test_forgetting_takes_groups_whole_and_leaves_the_tail_readable(engine, tmp_path):
    with Memory.open(tmp_path / "m", engine=engine, budget=2000) as memory:
        call = {"id": "c1", "type": "function", "function": {"name": "run", "arguments": "{}"}}
        seqs = memory.add(
            [{"role": "assistant", "tool_calls": [call]}, {"role": "tool", "tool_call_id": "c1", "content": "secret-word-of-all"}]
        )
        memory.add({"role": "user", "content": "what remains"})
        done = memory.forget(seqs[1])
        assert done.messages == tuple(seqs)
        assert done.is_proven
        assert [item.message.given["content"] for item in memory.context().items] == ["what remains"]
        with pytest.raises(InputError, match="no message"):
            memory.forget(seqs[0])


def test_contact_sheets_are_redrawn_without_forgotten_pages(engine, tmp_path):
    from optmem.memory.ageing import draw_sheets

    with Memory.open(tmp_path / "m", engine=engine, budget=700) as memory:
        history(memory, 30)
        with memory._store.transaction() as change:
            for number in (1, 2, 3):
                change.change_page(number, tier="sheet")
            assert draw_sheets(change, memory.optics) == []
            old = change.blob(2, "sheet")
        done = memory.forget("p2")
        assert done.is_proven, done.verified
        assert "p2" in done.pages
        assert old not in everything(tmp_path / "m")
        view = memory.context()
        (sheet,) = [item for item in view.items if isinstance(item, PageItem) and item.tier == "sheet"] or [None]
        assert sheet is None or "p2" not in sheet.pages


def test_all_can_be_forgotten(engine, tmp_path):
    with Memory.open(tmp_path / "m", engine=engine, budget=700) as memory:
        seqs = history(memory, 6)
        assert memory.forget(seqs).is_proven
        assert memory.context().items == ()
        assert memory.recall("host") == []
        memory.add(turn(1))
        assert len(memory.context().items) == 2
