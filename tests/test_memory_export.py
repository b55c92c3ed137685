"""A memory in one file: it comes back whole, and no hostile file makes one."""

import errno
import io
import os
import random
import stat

import pytest
from memory_histories import history, turn

import optmem
from optmem import Memory
from optmem.errors import InputError, OptmemError, OutputError
from optmem.memory.archive import export


@pytest.fixture(scope="module")
def engine():
    with optmem.Engine.from_pretrained("nano", device="cpu") as found:
        yield found


@pytest.fixture(scope="module")
def exported(engine, tmp_path_factory):
    folder = tmp_path_factory.mktemp("exported")
    with Memory.open(folder / "m", engine=engine, budget=800) as memory:
        history(memory, 12)
        memory.add({"role": "user", "content": "漢字 and \U0001f600"})
        memory.recall("key of host 1")
        memory.forget(3)
        memory.context()
        done = memory.export(folder / "m.tar")
        assert done.messages == memory.stats().counts.messages
        with pytest.raises(OptmemError, match="already"):
            memory.export(folder / "m.tar")
        yield folder / "m.tar", memory


def test_export_and_import(exported, engine, tmp_path):
    path, memory = exported
    assert path.stat().st_mode & 0o077 == 0
    with Memory.import_(path, tmp_path / "copy", engine=engine) as copy:
        assert copy.context().digest() == memory.context().digest()
        assert copy.receipts() == memory.receipts()
        assert copy.settings == memory.settings
        assert copy.recall("key of host 5") == memory.recall("key of host 5")
        assert copy.verify().is_clean
        assert copy.add(turn(3))[0] == memory.stats().counts.messages + 2, "numbers go on where they were"
    with pytest.raises(OptmemError, match="already"):
        Memory.import_(path, tmp_path / "copy")
    with pytest.raises(OptmemError, match="cannot be opened"):
        Memory.import_(tmp_path / "nothing.tar", tmp_path / "other")


def test_an_export_touches_no_file_of_another(exported, tmp_path):
    """What another is still writing stays, and is not in the way; nothing unfinished is left behind."""
    _, memory = exported
    other = tmp_path / ".out.tar.unfinished"
    other.write_bytes(b"of another")
    memory.export(tmp_path / "out.tar")
    assert other.read_bytes() == b"of another"
    assert {file.name for file in tmp_path.iterdir()} == {"out.tar", other.name}


@pytest.mark.parametrize("has_links", [True, False])
def test_an_export_replaces_nothing_that_appears_meanwhile(exported, tmp_path, monkeypatch, has_links):
    def refuse(*_):
        raise OSError(errno.EPERM, "no hard links here")

    if not has_links:
        monkeypatch.setattr(os, "link", refuse)
    _, memory = exported
    target = tmp_path / "out.tar"

    def watch(items, *_, **__):
        yield from items
        target.write_bytes(b"of another")

    with memory._snapshot() as view:
        with pytest.raises(OutputError, match=r"'out\.tar' is there already"):
            export(view, target, watch)
        assert target.read_bytes() == b"of another"
        assert list(tmp_path.iterdir()) == [target]
        export(view, tmp_path / "free.tar")
    assert (tmp_path / "free.tar").stat().st_nlink == 1
    assert (tmp_path / "free.tar").stat().st_mode & 0o777 == 0o600
    assert {file.name for file in tmp_path.iterdir()} == {"out.tar", "free.tar"}


def test_an_export_that_fails_leaves_nothing(exported, tmp_path):
    _, memory = exported

    def watch(items, *_, **__):
        yield from items
        raise OSError(errno.ENOSPC, "no space left")

    (tmp_path / "link.tar").symlink_to("nowhere")
    with memory._snapshot() as view:
        with pytest.raises(OutputError, match=r"cannot write out\.tar: no space left"):
            export(view, tmp_path / "out.tar", watch)
        with pytest.raises(OutputError, match="already"):
            export(view, tmp_path / "link.tar")
        with pytest.raises(OutputError, match=r"cannot write out\.tar: No such file"):
            export(view, tmp_path / "nothing" / "out.tar")
    assert [file.name for file in tmp_path.iterdir()] == ["link.tar"]


def test_the_name_of_an_export_is_durable(exported, tmp_path, monkeypatch):
    """The file first, then its name, then the folder that the name stands in."""
    done = []

    def seen(file):
        kind = "folder" if stat.S_ISDIR(os.fstat(file).st_mode) else "file"
        done.append((kind, (tmp_path / "out.tar").exists()))
        sync(file)

    sync = os.fsync
    monkeypatch.setattr(os, "fsync", seen)
    _, memory = exported
    memory.export(tmp_path / "out.tar")
    assert done == [("file", False), ("folder", True)]


def test_who_watches_sees_how_far_it_is(exported, engine, tmp_path):
    """Every long step goes through the hook, and counts what it said it would."""
    seen = {}

    def watch(items, what, *, unit="page", total=None):
        count = 0
        for item in items:
            count += 1
            yield item
        seen.setdefault(what, []).append((unit, count, total))

    path, _ = exported
    with Memory.import_(path, tmp_path / "copy", engine=engine, watch=watch) as copy:
        copy.add([message for number in range(12) for message in turn(number)])
        copy.context()
        copy.export(tmp_path / "again.tar")
    assert set(seen) == {"importing", "drawing", "ageing", "exporting"}
    assert seen["importing"][0][1] > 10
    (drawn,) = seen["drawing"]
    assert drawn[0] == "message"
    assert 0 < drawn[1] <= drawn[2]
    (exporting,) = seen["exporting"]
    assert exporting[1] == exporting[2] > 0


def tamper(source, target, change):
    """A copy of an archive whose members went through `change`: name, content -> what is there instead."""
    import tarfile

    with tarfile.open(source) as old, tarfile.open(target, "w") as new:
        for member in old:
            for info, content in change(member, old.extractfile(member).read()):
                info.size = len(content)
                new.addfile(info, io.BytesIO(content))


def renamed(name):
    def change(info, content):
        if info.name == "messages.jsonl":
            info.name = name
        return [(info, content)]

    return change


def replaced(table, old, new):
    def change(info, content):
        return [(info, content.replace(old, new) if info.name == table else content)]

    return change


def linked(info, content):
    import tarfile

    if info.name.startswith("blobs/"):
        info.type, info.linkname = tarfile.SYMTYPE, "/etc/passwd"
        return [(info, b"")]
    return [(info, content)]


HOSTILE = {
    "a name outside": renamed("../messages.jsonl"),
    "an absolute name": renamed("/tmp/messages.jsonl"),
    "an unknown table": renamed("sqlite_master.jsonl"),
    "links": linked,
    "twice": lambda info, content: [(info, content)] * 2,
    "no manifest": lambda info, content: [] if info.name == "manifest.json" else [(info, content)],
    "no lines": lambda info, content: [] if info.name == "lines.jsonl" else [(info, content)],
    "changed text": replaced("lines.jsonl", b"key of host", b"key of ghost"),
    "not JSON": replaced("messages.jsonl", b"[", b"{"),
    "wrong types": replaced("pages.jsonl", b',"', b',1.5,"'),
    "damaged files": lambda info, content: [(info, content[:-1] + b"x" if info.name.startswith("blobs/") else content)],
    "missing files": lambda info, content: [] if info.name.startswith("blobs/") else [(info, content)],
    "something behind": lambda info, content: (
        [(info, content)] + ([(type(info)("more"), b"x")] if info.name == "manifest.json" else [])
    ),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_archives_are_refused(exported, tmp_path, name):
    path, _ = exported
    tamper(path, tmp_path / "hostile.tar", HOSTILE[name])
    with pytest.raises(InputError):
        Memory.import_(tmp_path / "hostile.tar", tmp_path / "copy")
    assert not (tmp_path / "copy").exists()
    assert not list(tmp_path.glob("*.jsonl"))


def test_cut_archives_are_refused(exported, tmp_path):
    path, _ = exported
    whole = path.read_bytes()
    for number, size in enumerate((0, 100, 513, len(whole) // 2, len(whole) - 20_000)):
        (tmp_path / "cut.tar").write_bytes(whole[:size])
        with pytest.raises(InputError):
            Memory.import_(tmp_path / "cut.tar", tmp_path / f"copy-{number}")
    (tmp_path / "noise.tar").write_bytes(random.Random(1).randbytes(5000))
    with pytest.raises(InputError):
        Memory.import_(tmp_path / "noise.tar", tmp_path / "copy")
