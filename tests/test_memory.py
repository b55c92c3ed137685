"""The memory as an object: what it refuses, readers beside the writer, settings that stay, pins, awaited twins."""

import asyncio
import base64
import subprocess
import sys

import pytest
from memory_histories import history, key, said, turn

import optmem
from optmem import Memory
from optmem.errors import ImageError, InputError, PageCorrupted, StoreBusyError, StoreError
from optmem.memory.context import PageItem, TextItem
from optmem.memory.policy import Policy


@pytest.fixture(scope="module")
def engine():
    with optmem.Engine.from_pretrained("nano", device="cpu") as found:
        yield found


def test_what_is_refused_leaves_no_memory_behind(tmp_path):
    wrong = ({"policy": {"keep": 2}}, {"index": "foo"}, {"budget": -1}, {"budget": "9"}, {"engine": "nano"})
    for number, asked in enumerate(wrong):
        with pytest.raises(InputError, match=r"policy|index|budget|engine"):
            Memory.open(tmp_path / f"m{number}", **asked)
    assert not list(tmp_path.iterdir())


def test_odd_selectors_and_weights_are_refused(engine, tmp_path):
    with Memory.open(tmp_path / "m", engine=engine) as memory:
        memory.add(turn(1))
        for selector in (None, 1.5, slice(2, 4), [], [None], "p9"):
            with pytest.raises(InputError, match=r"messages are meant|nothing was selected|no message|no page"):
                memory.forget(selector)
        for weight in (-3, float("nan"), "x"):
            with pytest.raises(InputError, match="a weight"):
                memory.weigh(1, weight)


def attached(data, media_type="image/png"):
    """A message with a file."""
    source = {"type": "base64", "media_type": media_type, "data": base64.b64encode(data).decode()}
    return {"role": "user", "content": [{"type": "image" if media_type.startswith("image") else "document", "source": source}]}


def test_messages_that_cannot_be_kept_are_refused_whole(engine, tmp_path):
    with Memory.open(tmp_path / "m", engine=engine) as memory:
        for wrong in (
            "text",
            5,
            [{"role": "user"}],
            [{"role": "user", "content": "good"}, {"role": "assistant", "content": None}],
            [{"role": "user", "content": []}],
            [{"role": "user", "content": "good"}, *(attached(data) for data in (b"", b"nothing", b"\x89PNG\r\n\x1a\nnothing"))],
            attached(b"not a PDF", "application/pdf"),
            attached(b" \n", "text/plain"),
            {"role": "user", "content": [{"type": "tool_result", "tool_use_id": "t", "content": [attached(b"x")["content"][0]]}]},
            [{"role": "user", "content": "\ud800"}],
            [{"role": "user", "content": "good"}, {"role": "tool", "tool_call_id": "x", "content": "answers nothing"}],
        ):
            with pytest.raises((InputError, ImageError)):
                memory.add(wrong)
        assert memory.stats().counts.messages == 0
        assert memory.add([]) == []
        assert memory.context().items == ()
        for query, limit, least in (("", 3, None), ("x", -1, None), ("x", 3, 2.0)):
            with pytest.raises(InputError):
                memory.recall(query, limit, least)


def test_a_call_that_nobody_answers_is_given_up(engine, tmp_path):
    call = {"id": "c1", "type": "function", "function": {"name": "run", "arguments": "{}"}}
    with Memory.open(tmp_path / "m", engine=engine, budget=500) as memory:
        memory.add({"role": "assistant", "tool_calls": [call]})
        for number in range(40):
            memory.add(turn(number, 10))
            memory.context()
        with memory._snapshot() as view:
            groups = {}
            for each in view.messages():
                groups.setdefault(each.group, []).append(each.seq)
        assert max(map(len, groups.values())) < 20


def test_damaged_pages_do_not_hide_others(engine, tmp_path):
    path = tmp_path / "m"
    with Memory.open(path, engine=engine, budget=900) as memory:
        history(memory, 10)
        shown = [item.pages[0] for item in memory.context().items if isinstance(item, PageItem)]
        number = int(shown[-1][1:])
        with memory._snapshot() as view:
            (name,) = [blob.name for blob in view.blobs(number) if blob.kind == "pixels"]
        file = path / "blobs" / name
        file.write_bytes(file.read_bytes()[:100])
        view = memory.context()
        assert any("damaged" in note or "not what was written" in note for note in view.receipt.notes)
        assert [item.pages[0] for item in view.items if isinstance(item, PageItem)] == shown[:-1]
        with pytest.raises(PageCorrupted):
            memory.read(shown[-1])
        assert memory.recall("key of host 1", limit=1)[0].source == "ocr"
        assert not memory.verify().is_clean
        memory.forget(shown[-1])
        assert memory.verify().is_clean


@pytest.mark.parametrize("mode", ["write", "read"])
def test_a_damaged_page_is_drawn_anew_where_its_text_is_kept(engine, tmp_path, mode):
    path = tmp_path / "m"
    with Memory.open(path, engine=engine, budget=900, archive=True) as memory:
        history(memory, 10)
        before = memory.context()
        shown = [item.pages[0] for item in before.items if isinstance(item, PageItem) and item.pages[0][0] == "p"]
        with memory._snapshot() as view:
            names = [blob.name for blob in view.blobs(int(shown[0][1:]))]
    for name in names:
        (path / "blobs" / name).write_bytes(b"damaged")
    with Memory.open(path, engine=engine, mode=mode) as memory:
        after = memory.context()
        assert f"the picture of page {shown[0]} was damaged, and was drawn anew from its text" in after.receipt.notes
        assert after.digest() == before.digest()
        is_mended = not any("drawn anew" in note for note in memory.context().receipt.notes)
        assert is_mended == (mode == "write")
        if mode == "write":
            assert not [each for each in memory.verify().problems if "pixels" in each.what]


def test_readers_beside_the_writer(engine, tmp_path):
    path = tmp_path / "m"
    with Memory.open(path, engine=engine, budget=900) as writer:
        history(writer, 10)
        with pytest.raises(StoreBusyError):
            Memory.open(path, engine=engine)
        with Memory.open(path, engine=engine, mode="read") as reader:
            assert reader.context().digest() == writer.context().digest()
            assert key(1) in reader.recall("key of host 1", limit=1)[0].text
            assert reader.stats() == writer.stats()
            assert reader.stats().counts.readings == 0, "a reader keeps nothing"
            for forbidden in (
                lambda: reader.add(turn(1)),
                lambda: reader.forget(1),
                reader.age,
                lambda: reader.pin(1),
                reader.verify,
            ):
                with pytest.raises(StoreError, match="read only"):
                    forbidden()
            writer.add({"role": "user", "content": "said meanwhile"})
            assert reader.context().items[-1].message.given["content"] == "said meanwhile"


READ = """
import sys
from optmem import Memory
with Memory.open(sys.argv[1], mode="read") as memory:
    (hit,) = memory.recall("what was said meanwhile", limit=1)
    print(hit.text, hit.source, memory.stats().counts.messages)
"""


def test_another_process_reads_what_was_added(engine, tmp_path):
    with Memory.open(tmp_path / "m", engine=engine, budget=900) as memory:
        history(memory, 4)
        memory.add({"role": "user", "content": "this was said meanwhile"})
        done = subprocess.run([sys.executable, "-c", READ, str(tmp_path / "m")], capture_output=True, text=True, check=True)
        assert done.stdout == "this was said meanwhile verbatim 9\n"


def test_settings_stay_with_the_memory(engine, tmp_path):
    policy = Policy(keep=2, exclude=("secrets",))
    with Memory.open(tmp_path / "m", engine=engine, budget=777, archive=True, policy=policy) as memory:
        memory.add(turn(1))
    with Memory.open(tmp_path / "m", engine=engine) as memory:
        assert (memory.settings.budget, memory.settings.archive, memory.settings.policy) == (777, True, policy)
    with Memory.open(tmp_path / "m", engine=engine, budget=900, archive=False) as memory:
        assert (memory.settings.budget, memory.settings.archive) == (900, False)
    for wrong in ({"budget": -1}, {"budget": True}, {"index": "words"}, {"mode": "append"}, {"policy": {}}, {"archive": "yes"}):
        with pytest.raises(InputError):
            Memory.open(tmp_path / "wrong", engine=engine, **wrong)


def test_nano_is_loaded_when_it_is_needed(tmp_path):
    with Memory.open(tmp_path / "m") as memory:
        memory.add(turn(1, extra="the password is swordfish"))
        assert memory.recall("password", limit=1)[0].text == "the password is swordfish"
        assert memory.optics._given is None
        assert len(memory.context().items) == 2
        assert memory.optics._given is not None


def test_async_twins(engine, tmp_path):
    async def talk():
        with Memory.open(tmp_path / "m", engine=engine) as memory:
            await asyncio.gather(*(memory.aadd(turn(number)) for number in range(8)))
            view = await memory.acontext()
            hits = await memory.arecall("Turn 3", limit=1)
            stats, report = await memory.astats(), await memory.averify()
            assert await memory.aweigh(2, 1.5) == [2]
            pinned = await memory.apin(1)
            assert await memory.aunpin(1) == pinned
            await memory.aexport(tmp_path / "m.tar")
            assert [str(each) for each in await memory.areceipts()] == [str(each) for each in memory.receipts()]
            done = await memory.aforget(await memory.apin(1))
            return view, hits, stats, report, done

    view, hits, stats, report, done = asyncio.run(talk())
    assert len(view.items) == stats.counts.messages == 16
    assert hits[0].text.startswith("Turn 3")
    assert report.is_clean
    assert done.is_proven


def test_pins_and_weights(engine, tmp_path):
    with Memory.open(tmp_path / "m", engine=engine, budget=800) as memory:
        first = memory.add({"role": "user", "content": "always remember: " + said(1, 30)})
        memory.pin(first)
        history(memory, 20)
        assert memory.context().items[0].seq == first[0]
        memory.unpin(first)
        history(memory, 60)
        assert not isinstance(memory.context().items[0], TextItem)
        assert memory.weigh("p3", 1000.0)
        memory.recall("key of host 2", limit=1)
        with pytest.raises(InputError):
            memory.pin(10**6)
        with pytest.raises(InputError):
            memory.pin([])
