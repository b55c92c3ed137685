"""The memory's store in one process: what goes in comes out, what is forgotten is gone, and hostile input changes nothing."""

import json
import os
import shutil
import sqlite3
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from optmem.errors import (
    InputError,
    OutputError,
    PageCorrupted,
    SourceNotFoundError,
    StoreBusyError,
    StoreDamagedError,
    StoreError,
    StoreVersionError,
)
from optmem.memory import schema
from optmem.memory.blobs import blob_name
from optmem.memory.copy import copy_memory
from optmem.memory.records import NewLine, NewMessage, NewPage, Reading
from optmem.memory.store import Reader, Store

ID = "0123456789abcdef" * 4


def message(text, **more):
    return NewMessage("user", json.dumps({"content": text}), len(text), 5.0, lines=(text,), **more)


def page(messages, text="a row", **more):
    fields = {"tier": "base", "height": 64, "width": 64, "cell": "6x12", "tokens": 10, "text_tokens": 90} | more
    return NewPage(ID, tuple(messages), lines=(NewLine(0, text, messages[0], messages[-1]),), **fields)


@pytest.fixture
def path(tmp_path):
    return tmp_path / "agent.optmem"


@pytest.fixture
def store(path):
    with Store.open(path) as opened:
        yield opened


def fill(store):
    """Five messages, the first four on two pages with pixels."""
    with store.transaction() as change:
        messages = change.add_messages([message(f"word{n} common", joins=n in (1, 4)) for n in range(5)])
        for number, text in ((1, "alpha row"), (2, "beta row")):
            assert change.add_page(page(messages[2 * number - 2 : 2 * number], text)) == number
            change.put_blob(number, "pixels", f"pixels of {text}".encode(), tier="base")
    return messages


def found(store, question):
    with store.snapshot() as view:
        return [each.line.text for each in view.search(question)]


# What goes in comes out


def test_messages_pages_and_files_come_back(store, path):
    assert fill(store) == [1, 2, 3, 4, 5]
    store.close()
    with Reader.open(path) as reader, reader.snapshot() as view:
        messages = list(view.messages())
        assert [each.group for each in messages] == [1, 1, 3, 4, 4]
        assert [json.loads(each.content)["content"] for each in messages] == [f"word{n} common" for n in range(5)]
        assert [each.seq for each in view.messages(2, 3)] == [2, 3]
        assert [each.seq for each in view.unpaged()] == [5]
        assert [(each.first, each.last, each.tier, each.is_pinned) for each in view.pages()] == [
            (1, 2, "base", False),
            (3, 4, "base", False),
        ]
        assert [each.number for each in view.pages_with_id(ID)] == [1, 2]
        assert view.pages_showing(2, 3) == [1, 2]
        assert view.messages_on(2) == [3, 4]
        assert view.messages_only_on([1]) == [1, 2]
        assert view.blob(2, "pixels") == b"pixels of beta row"
        assert view.last_seq() == 5
        counts = view.counts()
        assert (counts.messages, counts.unpaged, counts.pages, counts.page_tokens, counts.blobs, counts.lines) == (
            5,
            1,
            2,
            20,
            2,
            3,
        )


def test_a_group_goes_on_in_a_later_batch(store):
    with store.transaction() as change:
        change.add_messages([message("call", joins=True)])  # joins nothing: there is nothing before it
    with store.transaction() as change:
        change.add_messages([message("result", joins=True), message("next")])
    with store.snapshot() as view:
        assert [each.group for each in view.messages()] == [1, 1, 3]


def test_batches_are_atomic(store, path):
    def fail(change):
        change.add_messages([message("gone")])
        change.add_page(page([1]))
        change.put_blob(1, "pixels", b"gone too", tier="base")
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError), store.transaction() as change:
        fail(change)
    assert not list((path / "blobs").iterdir())
    with store.snapshot() as view:
        assert view.counts().messages == view.counts().pages == view.counts().lines == 0
    with store.transaction() as change:
        assert change.add_messages([message("first")]) == [1]


@pytest.mark.parametrize("text", ["", "\0", "a\0b", "\ud800 half", "😀e\u0301", "\u202e", "x" * 100_000, "'; DROP TABLE pages; --"])
def test_any_text_comes_back(store, text):
    with store.transaction() as change:
        (seq,) = change.add_messages([NewMessage("user", text, 0, 0.0, lines=(text,))])
        number = change.add_page(page([seq], text, factsheet=text))
        change.put_readings(number, "base", [Reading(0, text, 0.5)])
    with store.snapshot() as view:
        assert next(view.messages()).content == text
        assert view.lines(number)[0].text == text
        assert view.page(number).factsheet == text
        assert view.readings(number, "base")[0].text == text
    assert store.verify().is_clean


def test_an_older_page_is_replaced_and_its_file_goes(store, path):
    fill(store)
    with store.transaction() as change:
        change.put_blob(1, "pixels", b"smaller", tier="small")
        change.change_page(1, tier="small", tokens=3, is_pinned=True, weight=2.5, factsheet="f00", details='{"x": 1}')
        change.count_hit(1, 9.0)
        change.drop_text([1])
    with store.snapshot() as view:
        kept = view.page(1)
        assert (kept.tier, kept.tokens, kept.is_pinned, kept.weight, kept.factsheet) == ("small", 3, True, 2.5, "f00")
        assert (kept.details, kept.hits, kept.last_hit) == ('{"x": 1}', 1, 9.0)
        assert view.blob(1, "pixels") == b"smaller"
        assert [each.content is None for each in view.messages()] == [True, False, False, False, False]
    assert len(list((path / "blobs").iterdir())) == 2
    assert store.verify().is_clean


def test_files_are_shared_by_rows(store, path):
    """A contact sheet is one file, and goes with the last page that is on it."""
    fill(store)
    with store.transaction() as change:
        for number in (1, 2):
            change.drop_blob(number, "pixels")
            change.put_blob(number, "sheet", b"both of them", tier="sheet", place=number - 1)
    assert len(list((path / "blobs").iterdir())) == 1
    with store.snapshot() as view:
        (blob,) = view.blobs(1)
        assert [(each.page, each.place) for each in view.pages_on(blob.name)] == [(1, 0), (2, 1)]
    with store.transaction() as change:
        change.drop_blob(1, "sheet")
    with store.snapshot() as view:
        assert view.blob(2, "sheet") == b"both of them"
    with store.transaction() as change:
        change.drop_blob(2, "sheet")
    assert not list((path / "blobs").iterdir())


def test_receipts_are_only_added(store, path):
    with store.transaction() as change:
        assert [change.add_receipt(f'{{"n": {n}}}', float(n)) for n in range(3)] == [1, 2, 3]
    with store.snapshot() as view:
        assert [each.content for each in view.receipts(after=1)] == ['{"n": 1}', '{"n": 2}']
    raw = sqlite3.connect(path / "index.db")
    for statement in ("UPDATE receipts SET content = '{}'", "DELETE FROM receipts"):
        with pytest.raises(sqlite3.IntegrityError, match="only added"):
            raw.execute(statement)
    raw.close()


def test_settings_are_json_under_plain_names(store):
    with store.transaction() as change:
        change.set("policy", '{"keep": 3}')
        change.set("policy", '{"keep": 4}')
        with pytest.raises(InputError):
            change.set("store.scrub", "true")
        with pytest.raises(InputError):
            change.set("policy", "not json")
    with store.snapshot() as view:
        assert view.setting("policy") == '{"keep": 4}'
        assert view.setting("nothing") is None


def test_the_order_is_that_of_adding_when_the_clock_goes_back(store):
    with store.transaction() as change:
        for time in (100.0, 50.0, 50.0, -1.0):
            change.add_messages([NewMessage("user", "{}", 0, time)])
    with store.snapshot() as view:
        assert [each.time for each in view.messages()] == [100.0, 50.0, 50.0, -1.0]


def test_numbers_are_never_given_twice(store):
    messages = fill(store)
    with store.transaction() as change:
        change.erase(pages=[1, 2], messages=messages)
    with store.transaction() as change:
        assert change.add_messages([message("new")]) == [6]
        assert change.add_page(page([6])) == 3


def test_history_is_read_in_parts(store):
    with store.transaction() as change:
        change.add_messages([message(f"m{n}") for n in range(1700)])
        for seq in range(1, 1201):
            change.add_page(page([seq], tokens=seq))
    with store.snapshot() as view:
        assert [each.seq for each in view.messages()] == list(range(1, 1701))
        assert [each.first for each in view.pages()] == list(range(1, 1201))
        assert [each.seq for each in view.unpaged()] == list(range(1201, 1701))


def test_a_page_is_drawn_anew_without_losing_its_messages(store, path):
    fill(store)
    with store.transaction() as change:
        change.drop_text([1, 2])
    with pytest.raises(InputError, match="message 1 has no text"), store.transaction() as change:
        change.drop_page(1)
    with pytest.raises(InputError, match="message 1 has no text"), store.transaction() as change:
        change.erase(pages=[1])
    with store.transaction() as change:
        change.drop_page(1)
        assert change.add_page(page([1, 2], "gamma row")) == 3
    assert found(store, "row") != []
    assert found(store, "alpha") == []
    assert len(list((path / "blobs").iterdir())) == 1
    assert store.verify().is_clean


# Searching


def test_search_finds_lines_of_messages_and_of_pages(store):
    fill(store)
    assert found(store, "alpha") == ["alpha row"]
    assert found(store, "WORD4") == ["word4 common"]
    assert found(store, "word0") == [], "its page's lines took the place of the message's own"
    assert set(found(store, "row alpha")) == {"alpha row", "beta row"}
    assert found(store, "row alpha")[0] == "alpha row"


@pytest.mark.parametrize(
    "question",
    ['"', '""', "NEAR(", "alpha AND", "a*", "text:alpha", "^x", "-", "(", "+ +", "\0", "\ud800", "", " ", "'", "{", "alpha" * 5000],
)
def test_no_question_is_syntax(store, question):
    fill(store)
    assert isinstance(found(store, question), list)
    assert found(store, question + " alpha")[:1] == ["alpha row"]


def test_words_without_spaces_are_found(store):
    with store.transaction() as change:
        change.add_messages([message("光学記憶は長い履歴を保つ"), message("path src/optmem/memory.py:42"), message("naïve café")])
    assert found(store, "履歴") == ["光学記憶は長い履歴を保つ"]
    assert found(store, "歴履") == []
    assert found(store, "optmem/memory.py:42") == ["path src/optmem/memory.py:42"]
    assert found(store, "naive CAFE") == ["naïve café"]


def test_words_of_many_lines_are_found_unranked_and_newest_first(store):
    with store.transaction() as change:
        change.add_messages([message(f"the thing number{n}") for n in range(1100)])
        change.add_messages([message("the end") for n in range(1100)])
    assert found(store, "end thing the")[0] == "the end", "no line has all of them"
    assert found(store, "the thing")[0] == "the thing number1099"
    assert found(store, "the thing number7")[0] == "the thing number7"


# Forgetting


def test_what_is_forgotten_is_in_no_byte(store, path):
    needles = []
    with store.transaction() as change:
        for n in range(60):
            needles.append(f"NeedleSecret{n:03}x{os.urandom(8).hex()}")
            seqs = change.add_messages([message(f"{needles[-1]} pad " * (n % 7 + 1)), message(f"kept{n}")])
            number = change.add_page(page(seqs, f"row {needles[-1]}", factsheet=needles[-1]))
            change.put_blob(number, "pixels", needles[-1].encode() * 50, tier="base")
            change.put_readings(number, "base", [Reading(0, needles[-1], 0.5)])
    before = store.verify(needles)
    assert {trace.needle for trace in before.search.traces} == set(range(60))
    assert "words" in {trace.file for trace in before.search.traces}
    with store.transaction() as change:
        for n in range(0, 60, 2):
            change.erase(pages=[n + 1], messages=[2 * n + 1])
    gone, kept = store.verify(needles[::2]), store.verify(needles[1::2])
    assert gone.is_clean, gone
    assert not kept.problems
    assert {trace.needle for trace in kept.search.traces} == set(range(30))
    content = b"".join(file.read_bytes() for file in path.rglob("*") if file.is_file())
    assert not [needle for needle in needles[::2] if needle[-12:].lower().encode() in content]


def test_forgetting_leaves_no_rest_in_the_gaps_of_the_database(store, path):
    """secure_delete alone leaves copies where b-tree pages were balanced, as with rows of many sizes that come and go."""
    dead = set()
    with store.transaction() as change:
        (seq,) = change.add_messages([message("m")])
        change.add_page(page([seq]))
    for turn in range(60):
        with store.transaction() as change:
            texts = [os.urandom(16).hex() + "p" * (37 * turn * n % 3000) for n in range(30)]
            change.put_readings(1, f"tier{turn % 5}", [Reading(n * 7919 % 1009, text, 0.5) for n, text in enumerate(texts)])
            dead |= {text[:32] for text in texts}
            if turn % 4 == 3:
                change.drop_readings(1)
    with store.transaction() as change:
        change.erase(pages=[1], messages=[1])
    content = b"".join((path / name).read_bytes() for name in ("index.db", "index.db-wal"))
    assert not [text for text in dead if text.encode() in content]


def test_a_group_is_never_parted(store):
    fill(store)
    for messages in ([1], [2]):
        with pytest.raises(InputError, match="group"), store.transaction() as change:
            change.erase(pages=[1], messages=messages)
    with pytest.raises(InputError, match="page 1 still shows message 1"), store.transaction() as change:
        change.erase(messages=[1, 2])
    with store.snapshot() as view:
        assert view.counts().messages == 5
    assert store.verify().is_clean


def test_a_sheet_with_a_forgotten_page_must_be_replaced(store):
    fill(store)
    with store.transaction() as change:
        for number in (1, 2):
            change.put_blob(number, "sheet", b"both of them", tier="sheet", place=number - 1)
    with pytest.raises(InputError, match="contact sheet"), store.transaction() as change:
        change.erase(pages=[1], messages=[1, 2])
    with store.transaction() as change:
        change.put_blob(2, "sheet", b"one of them", tier="sheet", place=0)
        change.erase(pages=[1], messages=[1, 2])
    report = store.verify([b"both of them"])
    assert report.is_clean, report


def test_what_another_page_shows_too_stays(store):
    """Equal pages share a file; forgetting one of them leaves the other's."""
    fill(store)
    with store.transaction() as change:
        change.put_blob(1, "pixels", b"the same", tier="base")
        change.put_blob(2, "pixels", b"the same", tier="base")
    with store.transaction() as change:
        change.erase(pages=[1], messages=[1, 2])
    with store.snapshot() as view:
        assert view.blob(2, "pixels") == b"the same"


def test_a_reader_of_an_older_state_is_not_forgotten_under(store, path, monkeypatch):
    fill(store)
    monkeypatch.setattr("optmem.memory.store.BUSY_SECONDS", 0.05)
    with Reader.open(path) as reader:
        with reader.snapshot() as view:
            with pytest.raises(StoreBusyError, match="reads an older state"), store.transaction() as change:
                change.erase(pages=[1], messages=[1, 2])
            assert view.blob(1, "pixels") == b"pixels of alpha row"
        with store.transaction() as change:
            change.erase(pages=[1], messages=[1, 2])
        with reader.snapshot() as view, pytest.raises(InputError, match="no page 1"):
            view.blob(1, "pixels")
    assert store.verify(["alpha"]).is_clean


def test_a_snapshot_keeps_its_files_while_pages_age(store, path):
    fill(store)
    with Reader.open(path) as reader:
        with reader.snapshot() as view:
            with store.transaction() as change:
                change.put_blob(1, "pixels", b"smaller", tier="small")
            assert view.blob(1, "pixels") == b"pixels of alpha row"
        assert len(list((path / "blobs").iterdir())) == 3
    with store.transaction() as change:
        change.set("anything", "1")  # the next change clears up
    assert len(list((path / "blobs").iterdir())) == 2
    assert store.verify().is_clean


def test_text_without_a_page_is_not_dropped(store):
    fill(store)
    with pytest.raises(InputError, match="no page shows message 5"), store.transaction() as change:
        change.drop_text([4, 5])


# Damage


def flip(file):
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


DAMAGES = {
    "flipped": flip,
    "truncated": lambda file: file.write_bytes(file.read_bytes()[:-1]),
    "longer": lambda file: file.write_bytes(file.read_bytes() + b"x"),
    "empty": lambda file: file.write_bytes(b""),
    "missing": Path.unlink,
    "link": lambda file: (file.unlink(), file.symlink_to("/etc/hostname")),
    "folder": lambda file: (file.unlink(), file.mkdir()),
    "pipe": lambda file: (file.unlink(), os.mkfifo(file)),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_one_damaged_file_hides_no_other_page(store, path, damage):
    fill(store)
    with store.snapshot() as view:
        name = view.blobs(1)[0].name
    DAMAGES[damage](path / "blobs" / name)
    with store.snapshot() as view:
        with pytest.raises(PageCorrupted, match="page 1") as caught:
            view.blob(1, "pixels")
        assert caught.value.page == 1
        assert view.blob(2, "pixels") == b"pixels of beta row"
    assert {problem.page for problem in store.verify().problems} - {None} == {1}


def test_swapped_files_are_both_known_as_damaged(store, path):
    fill(store)
    one, two = (path / "blobs").iterdir()
    one.rename(path / "blobs" / "x")
    two.rename(one)
    (path / "blobs" / "x").rename(two)
    assert {problem.page for problem in store.verify().problems} == {1, 2}


def test_putting_the_same_bytes_again_heals(store, path):
    fill(store)
    for file in (path / "blobs").iterdir():
        flip(file)
    with store.transaction() as change:
        change.put_blob(1, "pixels", b"pixels of alpha row", tier="base")
    assert {problem.page for problem in store.verify().problems} == {2}


def test_a_database_that_is_none_is_said_to_be_none(store, path):
    fill(store)
    store.close()
    for content in (b"garbage " * 1000, (path / "index.db").read_bytes()[:5000]):
        (path / "index.db").write_bytes(content)
        with pytest.raises(StoreDamagedError):
            Store.open(path)
        assert len(list((path / "blobs").iterdir())) == 2, "files are no orphans because the database is gone"
    (path / "index.db").write_bytes(b"")
    with pytest.raises(StoreDamagedError, match="empty"):
        Store.open(path)
    with pytest.raises(StoreVersionError):
        Reader.open(path)
    assert len(list((path / "blobs").iterdir())) == 2


def test_damaged_pages_of_the_database_are_reported(store, path):
    with store.transaction() as change:
        change.add_messages([message(f"text {n} " * 30) for n in range(300)])
    store.close()
    content = bytearray((path / "index.db").read_bytes())
    for start in range(4096 * 20, len(content), 4096 * 3):
        content[start : start + 2000] = b"\xff" * 2000
    (path / "index.db").write_bytes(content)
    try:
        with Store.open(path) as again:
            assert not again.verify().is_clean
    except StoreDamagedError:
        pass


def test_another_database_is_left_alone(tmp_path):
    folder = tmp_path / "other"
    folder.mkdir()
    raw = sqlite3.connect(folder / "index.db")
    raw.execute("CREATE TABLE theirs(x)")
    raw.commit()
    raw.close()
    before = (folder / "index.db").read_bytes()
    with pytest.raises(StoreDamagedError, match="not that of an optmem memory"):
        Store.open(folder)
    assert (folder / "index.db").read_bytes() == before


def test_a_newer_memory_is_refused_and_left_alone(store, path):
    fill(store)
    store.close()
    raw = sqlite3.connect(path / "index.db")
    raw.execute(f"PRAGMA user_version={schema.VERSION + 1}")
    raw.close()
    before = (path / "index.db").read_bytes()
    for opened in (Store.open, Reader.open):
        with pytest.raises(StoreVersionError):
            opened(path)
    assert (path / "index.db").read_bytes() == before


def test_an_older_memory_is_brought_up_to_date(store, path):
    fill(store)
    store.close()
    connection = schema.connect(path, writes=True)
    schema.migrate(connection, ("CREATE TABLE later(x); INSERT INTO later SELECT count(*) FROM messages;",))
    assert connection.execute("SELECT x FROM later").fetchone() == (5,)
    assert connection.execute("PRAGMA user_version").fetchone() == (2,)
    with pytest.raises(StoreError):
        schema.migrate(connection, ("", "CREATE TABLE latest(x); nonsense;"))
    connection.rollback()
    assert connection.execute("SELECT count(*) FROM sqlite_schema WHERE name = 'latest'").fetchone() == (0,)
    connection.close()


@pytest.mark.parametrize("names", [["index.db-wal"], ["index.db-shm"], ["index.db-wal", "index.db-shm"]])
def test_a_deleted_log_takes_with_it_only_what_it_held(path, tmp_path, names):
    """Nobody can bring back what another program deletes; the rest must be whole, and files without rows must go."""
    with Store.open(path) as store:
        fill(store)
    with Store.open(path) as store:
        with store.transaction() as change:
            change.add_page(page([5]))
            change.put_blob(3, "pixels", b"only in the log", tier="base")
        copy = tmp_path / "copy"
        shutil.copytree(path, copy)
    for name in names:
        (copy / name).unlink()
    with Store.open(copy) as store:
        assert store.verify().is_clean
        with store.snapshot() as view:
            assert view.counts().messages == 5
            assert view.counts().pages == (3 if "index.db-wal" not in names else 2)


def test_a_copy_of_a_closed_memory_is_a_memory(store, path, tmp_path):
    fill(store)
    store.close()
    shutil.copytree(path, tmp_path / "copy")
    with Store.open(tmp_path / "copy") as copy:
        assert copy.verify().is_clean
        assert found(copy, "alpha") == ["alpha row"]


def test_a_copy_is_one_state_while_it_is_written_to(store, path, tmp_path):
    fill(store)
    flip(path / "blobs" / blob_name(b"pixels of beta row"))
    with Reader.open(path) as reader:
        assert copy_memory(reader, tmp_path / "copy") == [2]
        with store.transaction() as change:
            change.add_messages([message("later")])
        with pytest.raises(OutputError, match="already"):
            copy_memory(reader, tmp_path / "copy")
    with Store.open(tmp_path / "copy") as copy:
        assert {problem.page for problem in copy.verify().problems} == {2}
        with copy.snapshot() as view:
            assert view.counts().messages == 5
            assert view.blob(1, "pixels") == b"pixels of alpha row"
        assert found(copy, "alpha") == ["alpha row"]


def test_rests_of_a_killed_writer_are_cleared_up(store, path):
    fill(store)
    store.close()
    (path / "blobs" / ".0123456789abcdef.unfinished").write_bytes(b"half")
    (path / "blobs" / ("ab" * 32)).write_bytes(b"orphan")
    (path / "blobs" / "notes.txt").write_bytes(b"somebody's")
    with Store.open(path) as again:
        assert len(list((path / "blobs").iterdir())) == 3
        assert [problem.kind for problem in again.verify().problems] == ["foreign"]


# The folder


def test_files_are_the_owners_alone_whatever_the_umask(path):
    for mask in (0o000, 0o777):
        before = os.umask(mask)
        try:
            with Store.open(path) as store:
                if mask == 0:
                    fill(store)
                modes = {each.name: stat.S_IMODE(each.stat().st_mode) for each in [path, *path.rglob("*")]}
        finally:
            os.umask(before)
        assert {name for name, mode in modes.items() if mode == 0o700} == {path.name, "blobs"}
        assert set(modes.values()) == {0o700, 0o600}


def test_wide_modes_are_reported_and_narrowed(store, path):
    fill(store)
    path.chmod(0o755)
    (path / "index.db").chmod(0o644)
    assert {problem.kind for problem in store.verify().problems} == {"modes"}
    store.close()
    with Store.open(path) as again:
        assert again.verify().is_clean


@pytest.mark.parametrize("name", ["index.db", "blobs", "lock", "gate", "readers"])
def test_links_are_refused(store, path, tmp_path, name):
    store.close()
    (path / name).rename(tmp_path / "elsewhere")
    (path / name).symlink_to(tmp_path / "elsewhere")
    for opened in (Store.open, Reader.open):
        with pytest.raises(StoreError, match="link"):
            opened(path)


def test_what_is_no_memory_is_refused(tmp_path):
    (tmp_path / "file").write_text("x")
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "letter.txt").write_text("x")
    for given in (tmp_path / "file", tmp_path / "home", "", "\0", "x" * 5000, 7, None):
        with pytest.raises(InputError):
            Store.open(given)
    assert [each.name for each in (tmp_path / "home").iterdir()] == ["letter.txt"]
    with pytest.raises(SourceNotFoundError):
        Reader.open(tmp_path / "nothing")
    with pytest.raises(SourceNotFoundError):
        Store.open(tmp_path / "nothing", create=False)
    with pytest.raises(InputError):
        Reader.open(tmp_path / "home")


def test_a_folder_removed_under_it_acknowledges_nothing(store, path):
    fill(store)
    with Reader.open(path) as reader:
        shutil.rmtree(path)
        with pytest.raises(StoreError, match="removed"), store.transaction() as change:
            change.add_messages([message("into the void")])
        with pytest.raises(StoreError, match="removed"), reader.snapshot():
            pass


def test_a_database_put_in_its_place_is_noticed(store, path):
    fill(store)
    content = (path / "index.db").read_bytes()
    (path / "index.db").unlink()
    (path / "index.db").write_bytes(content)
    with pytest.raises(StoreError, match="replaced"), store.transaction():
        pass


READ_ONLY = """
import os, sys
from optmem.errors import OutputError
from optmem.memory.store import Reader, Store
os.setgid(65534); os.setuid(65534)
with Reader.open(sys.argv[1]) as reader, reader.snapshot() as view:
    print(view.counts().messages, view.blob(1, "pixels").decode())
try:
    Store.open(sys.argv[1])
except OutputError as error:
    print("refused:", error)
"""


@pytest.mark.skipif(os.getuid() != 0, reason="only root can become nobody, for whom the folder is read-only")
def test_a_read_only_folder_can_be_read(tmp_path):
    for folder in [tmp_path, *tmp_path.parents]:
        if folder.stat().st_uid == os.getuid() and folder not in (Path("/"), Path("/tmp")):
            folder.chmod(folder.stat().st_mode | 0o055)
    path = tmp_path / "agent.optmem"
    with Store.open(path) as store:
        fill(store)
    for each in [path, *path.rglob("*")]:
        each.chmod(0o555 if each.is_dir() else 0o444)
    done = subprocess.run([sys.executable, "-c", READ_ONLY, path], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[0] == "5 pixels of alpha row"
    assert done.stdout.splitlines()[1].startswith("refused:")


# Hostile arguments


@pytest.mark.parametrize(
    "page_id", ["", "../" * 21 + "x", "A" * 64, "g" * 64, "a" * 63, "a" * 10_000, "é" * 64, "0" * 63 + "\n", None, 7]
)
def test_page_ids_are_hexadecimal(store, page_id):
    with pytest.raises(InputError):
        NewPage(page_id, (1,), "base", 1, 1, "6x12", 1, 1)
    with store.snapshot() as view:
        assert view.pages_with_id(page_id) == []


@pytest.mark.parametrize("number", [0, -1, 33, 1 << 62, 1 << 63, 1 << 70, "1", "1 OR 1=1", 1.0, None, True, "NaN"])
def test_unknown_pages_are_refused(store, number):
    fill(store)
    with store.transaction() as change:
        for attempt in (
            lambda: change.page(number),
            lambda: change.blob(number, "pixels"),
            lambda: change.drop_blob(number, "pixels"),
            lambda: change.put_readings(number, "base", []),
            lambda: change.drop_readings(number),
            lambda: change.drop_text([number or 9]),
            lambda: change.change_page(number, tier="small"),
            lambda: change.put_blob(number, "pixels", b"x", tier="base"),
            lambda: change.count_hit(number),
            lambda: change.erase(pages=[number]),
        ):
            with pytest.raises(InputError):
                attempt()


@pytest.mark.parametrize("word", ["", "../x", "a/b", "A", "x" * 33, "a b", "pixels'--", "é", 7, None])
def test_kinds_and_tiers_are_plain_words(store, word):
    fill(store)
    with store.transaction() as change:
        with pytest.raises(InputError):
            change.put_blob(1, word, b"x", tier="base")
        with pytest.raises(InputError):
            change.put_blob(1, "pixels", b"x", tier=word)
        with pytest.raises(InputError):
            change.put_readings(1, word, [])
        with pytest.raises(InputError):
            change.set(word, "1")
    with pytest.raises(InputError):
        NewMessage(word, "{}", 1, 1.0)


def test_there_are_no_columns_to_name(store):
    """Nothing that a caller names becomes SQL: an unknown field is an unknown argument."""
    fill(store)
    with store.transaction() as change, pytest.raises(TypeError):
        change.change_page(1, **{"tier = 'x' --": 1})


def test_numbers_are_numbers():
    for tokens in (-1, 1.5, True, "1", None, 1 << 63):
        with pytest.raises(InputError):
            NewMessage("user", "{}", tokens, 1.0)
    for time in (float("nan"), float("inf"), "1", None):
        with pytest.raises(InputError):
            NewMessage("user", "{}", 1, time)
    for messages in ((), (1, 1), (0,), (-1,), ("1",)):
        with pytest.raises(InputError):
            NewPage(ID, messages, "base", 1, 1, "6x12", 1, 1)
    with pytest.raises(InputError):
        Reading(-1, "x", 0.5)


def test_pages_show_messages_that_are_there(store):
    with pytest.raises(InputError, match="no message 9"), store.transaction() as change:
        change.add_page(page([9]))
    with pytest.raises(InputError, match="no message 9"), store.transaction() as change:
        change.erase(messages=[9])


def test_one_transaction_at_a_time_in_a_thread(store):
    with store.transaction() as change:
        change.add_messages([message("kept")])
        with pytest.raises(StoreError, match="already"), store.transaction():
            pass
        with pytest.raises(StoreError, match="already"), store.snapshot():
            pass
    with store.snapshot() as view:
        assert view.counts().messages == 1


def test_a_snapshot_that_is_over_tells_nothing(store, path):
    fill(store)
    with Reader.open(path) as reader, reader.snapshot() as view:
        messages = view.messages()
        assert next(messages).seq == 1
    with store.transaction() as change:
        pass
    with pytest.raises(StoreError, match="over"):
        view.counts()
    with pytest.raises(StoreError, match="over"):
        change.add_messages([message("too late")])
    with store.snapshot() as now:
        assert now.counts().messages == 5
    with pytest.raises(StoreError, match="over"):
        now.search("alpha")


@pytest.mark.parametrize(
    "text", ["", "{", "NaN", "[1, Infinity]", "[" * 100_000, '"\ud800"', None, 7, b"{}"], ids=lambda text: ascii(text)[:12]
)
def test_only_json_is_kept_where_json_is_kept(store, text):
    fill(store)
    with store.transaction() as change:
        for attempt in (
            lambda: change.add_receipt(text, 1.0),
            lambda: change.set("name", text),
            lambda: change.change_page(1, details=text or ""),
        ):
            with pytest.raises(InputError):
                attempt()
        with pytest.raises(InputError):
            change.add_messages([NewMessage("user", 7, 1, 1.0)])
    assert store.verify().is_clean


def test_closed_is_closed(store, path):
    fill(store)
    reader = Reader.open(path)
    reader.close()
    reader.close()
    with pytest.raises(StoreError, match="closed"), reader.snapshot():
        pass
    store.close()
    store.close()
    with pytest.raises(StoreError, match="closed"), store.transaction():
        pass
    assert {each.name for each in path.iterdir()} == {"blobs", "gate", "index.db", "lock", "readers"}


def test_needles_too_short_to_mean_anything_are_refused(store):
    for needle in ("", "ab", b"x", 7):
        with pytest.raises(InputError):
            store.verify([needle])


def test_a_needle_across_two_chunks_is_found(store, path, monkeypatch):
    monkeypatch.setattr("optmem.memory.erase._CHUNK", 7)
    (path / "blobs" / "note").write_bytes(b"0123456789needle01234")
    assert [trace.file for trace in store.verify([b"needle"]).search.traces] == ["blobs/note"]


def test_the_store_needs_no_torch():
    program = "import sys, optmem.memory.store; print([name for name in ('torch', 'numpy', 'PIL') if name in sys.modules])"
    assert subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout == "[]\n"


def test_no_write_is_an_output_error(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError):
        Store.open("/proc/nowhere/memory")
