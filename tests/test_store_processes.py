"""The memory's store between processes: one writer, many readers, locks that die with their owner, forks."""

import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import textwrap
import threading
import time

import pytest

from optmem.errors import OutputError, StoreBusyError
from optmem.memory.records import NewLine, NewMessage, NewPage
from optmem.memory.store import Reader, Store


def run(program, *words, wait=True):
    """A Python process of its own; the last word of its life is on stdout."""
    command = [sys.executable, "-B", "-c", textwrap.dedent(program), *map(str, words)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    return process.communicate()[0] if wait else process


@pytest.fixture
def path(tmp_path):
    return tmp_path / "agent.optmem"


def add(store, text, tier="base"):
    with store.transaction() as change:
        seqs = change.add_messages([NewMessage("user", json.dumps(text), 1, 0.0), NewMessage("tool", "{}", 1, 0.0, joins=True)])
        lines = (NewLine(0, text, *seqs),)
        number = change.add_page(
            NewPage(hashlib.sha256(text.encode()).hexdigest(), tuple(seqs), tier, 1, 1, "6x12", 5, 9, lines=lines)
        )
        change.put_blob(number, "pixels", text.encode() * 100, tier=tier)
    return number


HOLD = """
    import sys, time
    from optmem.memory.store import Store
    store = Store.open(sys.argv[1])
    print("open", flush=True)
    time.sleep(60)
"""


def test_a_second_writer_is_told_who_writes(path):
    process = run(HOLD, path, wait=False)
    try:
        assert process.stdout.readline() == "open\n"
        with pytest.raises(StoreBusyError, match=f"process {process.pid} writes"):
            Store.open(path)
        process.kill()
        process.wait()
        with Store.open(path) as store:  # the lock died with its owner; what the file says of it does not matter
            assert store.verify().is_clean
    finally:
        process.kill()
        process.communicate()


def test_a_second_writer_in_the_same_process_is_told_too(path):
    with Store.open(path) as store:
        with pytest.raises(StoreBusyError, match=f"process {os.getpid()} writes"):
            Store.open(path)
        add(store, "goes on")
        assert store.verify().is_clean


def test_a_stale_lock_file_is_no_lock(path):
    Store.open(path).close()
    (path / "lock").write_text("1\n")
    with Store.open(path) as store:
        add(store, "x")
    assert (path / "lock").read_text() == f"{os.getpid()}\n"


def test_a_memory_that_was_dropped_unclosed_can_be_opened(path):
    store = Store.open(path)
    add(store, "x")
    del store
    with Store.open(path) as again:
        assert again.verify().is_clean


FORK = """
    import os, sys, time
    from optmem.errors import StoreError
    from optmem.memory.store import Reader, Store
    store = Store.open(sys.argv[1])
    reader = Reader.open(sys.argv[1])
    child = os.fork()
    if child == 0:
        said = []
        for use in (store.transaction, store.snapshot, reader.snapshot):
            try:
                with use():
                    said.append("used")
            except StoreError as error:
                said.append("fork" if "forked" in str(error) else str(error))
        store.close(), reader.close()
        print(*said, os.getpid(), flush=True)
        if len(sys.argv) > 2:
            time.sleep(float(sys.argv[2]))
        sys.exit()
    if len(sys.argv) > 2:
        os._exit(0)
    os.waitpid(child, 0)
    with store.transaction() as change:
        change.set("after", "1")
    store.close()
    print("parent goes on", flush=True)
"""


def test_a_forked_child_is_refused_and_does_no_harm(path):
    with Store.open(path) as store:
        add(store, "x")
    child, parent = run(FORK, path).splitlines()
    assert child.split()[:-1] == ["fork"] * 3
    assert parent == "parent goes on"
    with Store.open(path) as store:
        assert store.verify().is_clean


def test_a_child_does_not_keep_a_dead_parents_lock(path):
    process = run(FORK, path, 30, wait=False)
    *said, child = process.stdout.readline().split()
    try:
        assert said == ["fork"] * 3
        process.wait()
        with Store.open(path) as store:  # the child still lives
            add(store, "x")
            assert store.verify().is_clean
        os.kill(int(child), 0)
    finally:
        os.kill(int(child), signal.SIGKILL)
        process.stdout.close()


WATCH = """
    import hashlib, json, sys, time
    from optmem.memory.store import Reader
    looks, newest, until = 0, 0, time.monotonic() + float(sys.argv[2])
    with Reader.open(sys.argv[1]) as reader:
        while time.monotonic() < until:
            with reader.snapshot() as view:
                pages = list(view.pages())
                counts = view.counts()
                messages = [message.seq for message in view.messages()]
                assert len(messages) == counts.messages == 2 * counts.pages == 2 * len(pages), "a batch is whole"
                assert len(set(messages)) == len(messages)
                for page in pages[-3:] + pages[:2]:
                    text = view.lines(page.number)[0].text
                    content = view.blob(page.number, "pixels")
                    wanted = text.encode() * (100 if page.tier == "base" else 10)
                    assert content == wanted, "the file is that of the tier"
                assert pages[-1].number >= newest if pages else True, "time does not go back"
                newest = pages[-1].number if pages else 0
                assert view.counts() == counts and [each.number for each in view.pages()] == [each.number for each in pages]
            looks += 1
    print(looks, newest)
"""


def test_eight_processes_read_while_one_writes(path):
    with Store.open(path) as store:
        add(store, "text 0")
        readers = [run(WATCH, path, 3, wait=False) for _ in range(8)]
        number, forgotten = 1, 0
        while any(reader.poll() is None for reader in readers):
            number = add(store, f"text {number}")
            if number % 3 == 0:
                with store.transaction() as change:
                    change.put_blob(number, "pixels", f"text {number - 1}".encode() * 10, tier="small")
                    change.change_page(number, tier="small")
            if number % 40 == 0:
                with store.transaction() as change:
                    change.erase(pages=[number - 20], messages=change.messages_on(number - 20))
                forgotten += 1
        said = [reader.communicate()[0].split() for reader in readers]
        assert [reader.returncode for reader in readers] == [0] * 8
        assert all(int(looks) > 3 for looks, _ in said), said
        assert number > 20
        assert store.verify([b"text 20x"]).is_clean


def test_a_killed_writer_holds_no_reader_up(path):
    with Store.open(path) as store:
        add(store, "kept")
    process = run(
        """
        import sys, time
        from optmem.memory.records import NewMessage
        from optmem.memory.store import Store
        store = Store.open(sys.argv[1])
        for n in range(50):
            with store.transaction() as change:
                change.add_messages([NewMessage("user", "{}", 1, 0.0)])
        with store.transaction() as change:
            change.add_messages([NewMessage("user", "{}", 1, 0.0)] * 5000)
            print("inside", flush=True)
            time.sleep(60)
        """,
        path,
        wait=False,
    )
    assert process.stdout.readline() == "inside\n"
    with Reader.open(path) as reader:
        for _ in range(2):
            with reader.snapshot() as view:
                assert view.counts().messages == 52
            process.send_signal(signal.SIGKILL)
            process.wait()
    process.communicate()
    with Store.open(path) as store:
        assert store.verify().is_clean


def test_a_killed_reader_holds_no_writer_up(path):
    with Store.open(path) as store:
        number = add(store, "secret")
        process = run(
            """
            import sys, time
            from optmem.memory.store import Reader
            with Reader.open(sys.argv[1]).snapshot() as view:
                print(view.counts().pages, flush=True)
                time.sleep(60)
            """,
            path,
            wait=False,
        )
        assert process.stdout.readline() == "1\n"
        add(store, "goes on under an open snapshot")
        process.kill()
        process.communicate()
        with store.transaction() as change:
            change.erase(pages=[number], messages=[1, 2])
        assert store.verify(["secret"]).is_clean


def test_readers_wait_while_something_is_forgotten(path):
    with Store.open(path) as store, Reader.open(path) as reader:
        number = add(store, "secret")
        seen = []

        def look():
            with reader.snapshot() as view:
                seen.append(view.counts().pages)

        with store.transaction() as change:
            change.erase(pages=[number], messages=[1, 2])
            thread = threading.Thread(target=look)
            thread.start()
            time.sleep(0.1)
            assert not seen, "a reader sees the state before or after, never files that go under it"
        thread.join()
        assert seen == [0]


def test_threads_take_turns_while_files_are_replaced(path):
    with Store.open(path) as store:
        number, failed = add(store, "x"), []

        def replace(n):
            try:
                for k in range(15):
                    with store.transaction() as change:
                        change.put_blob(number, "pixels", b"%d %d" % (n, k), tier="base")
            except Exception as error:
                failed.append(error)

        threads = [threading.Thread(target=replace, args=(n,)) for n in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert not failed
        assert len(list((path / "blobs").iterdir())) == 1
        assert store.verify().is_clean


def test_threads_take_turns(path):
    with Store.open(path) as store:
        threads = [threading.Thread(target=lambda n=n: [add(store, f"t{n} {k}") for k in range(10)]) for n in range(6)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        with store.snapshot() as view:
            assert view.counts().pages == 60
            assert [each.seq for each in view.messages()] == list(range(1, 121))
        assert store.verify().is_clean


@pytest.mark.skipif(os.getuid() != 0, reason="only root can mount a small disk")
def test_a_disk_that_is_full_and_then_freed(tmp_path):
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=3m", "none", disk], check=False, capture_output=True).returncode:
        pytest.skip("no small disk can be mounted here")
    try:
        ballast = disk / "ballast"
        ballast.write_bytes(bytes(1 << 20))
        with Store.open(disk / "memory") as store:
            done = 0
            with pytest.raises(OutputError, match=r"space"):  # noqa: PT012 - some one of them
                while True:
                    done = add(store, f"page {done}" + "x" * 500)
            assert done > 3
            with pytest.raises(OutputError):
                add(store, "still full" + "x" * 5000)
            with store.snapshot() as view:
                assert view.counts().pages == done
            ballast.unlink()
            assert add(store, "there is space again") > done
            assert store.verify().is_clean
    finally:
        subprocess.run(["umount", "-l", disk], check=True)


def test_too_many_open_files(path):
    """The process has no descriptor left: nothing is kept, and once there are some it goes on."""
    program = """
        import os, resource, sys
        from optmem.errors import OptmemError
        from optmem.memory.records import NewMessage, NewPage
        from optmem.memory.store import Store
        store = Store.open(sys.argv[1])
        resource.setrlimit(resource.RLIMIT_NOFILE, (64, 64))
        held = []
        def put():
            with store.transaction() as change:
                (seq,) = change.add_messages([NewMessage("user", "{}", 1, 0.0)])
                change.put_blob(change.add_page(NewPage("a" * 64, (seq,), "base", 1, 1, "c", 1, 1)), "pixels", b"x", tier="base")
        try:
            while True:
                held.append(os.open("/dev/null", os.O_RDONLY))
        except OSError:
            pass
        try:
            put()
        except OptmemError as error:
            print(type(error).__name__)
        for each in held:
            os.close(each)
        put()
        print(store.verify().is_clean)
    """
    assert run(program, path).split() == ["OutputError", "True"]


@pytest.mark.skipif(shutil.which("strace") is None, reason="strace is not installed (Debian: apt-get install strace)")
def test_opening_is_refused_where_there_are_no_locks(path):
    """A file system without locks, as some network ones: refused with words, never used without."""
    program = "import sys; from optmem.memory.store import Store; Store.open(sys.argv[1])"
    command = ["strace", "-f", "-o", "/dev/null", "--inject=flock:error=ENOLCK", sys.executable, "-c", program, path]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert "StoreError: this file system has no locks between processes" in done.stderr


WRITE_IN_TURN = """
    import sys
    from optmem.errors import StoreBusyError
    from optmem.memory.records import NewMessage
    from optmem.memory.store import Store
    done = 0
    while done < 15:
        try:
            with Store.open(sys.argv[1]) as store, store.transaction() as change:
                change.add_messages([NewMessage("user", '"%s %d"' % (sys.argv[2], done), 1, 0.0)])
        except StoreBusyError:
            continue
        done += 1
"""


def test_writers_that_take_turns_lose_nothing(path):
    """Open, write, checkpoint, close, over and over in four processes, with readers: the pattern of SQLite's WAL-reset fault."""
    Store.open(path).close()
    writers = [run(WRITE_IN_TURN, path, n, wait=False) for n in range(4)]
    with Reader.open(path) as reader:
        seen = 0
        while any(writer.poll() is None for writer in writers):
            with reader.snapshot() as view:
                count = view.counts().messages
            assert count >= seen
            seen = count
    for writer in writers:
        writer.communicate()
        assert writer.returncode == 0
    with Store.open(path) as store:
        with store.snapshot() as view:
            contents = [each.content for each in view.messages()]
        assert sorted(contents) == sorted(f'"{n} {k}"' for n in range(4) for k in range(15))
        assert store.verify().is_clean
