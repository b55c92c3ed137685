"""The memory's store under faults: the n-th system call kills the process, fails, or finds the disk full, for all n.

Afterwards the memory opens, holds what was acknowledged and at most the change that was under way, whole; and is clean.
SIGKILL is not a loss of power: that what is acknowledged was synced before, in the right order, is read from a log of the calls.
"""

import importlib.util
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from itertools import pairwise
from pathlib import Path

import pytest

from optmem.memory.store import Reader, Store

WRITER = Path(__file__).with_name("store_writer.py")
CALLS = "write,pwrite64,fsync,fdatasync,renameat,openat,ftruncate,unlink,unlinkat,fchmod,fchmodat,mkdirat"
strace = shutil.which("strace")
needs_strace = pytest.mark.skipif(strace is None, reason="strace is not installed (Debian: apt-get install strace)")


def load_writer():
    spec = importlib.util.spec_from_file_location("store_writer", WRITER)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


writer = load_writer()


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A memory that is copied for each fault."""
    path = tmp_path_factory.mktemp("crash") / "base"
    writer.prepare(path)
    return path


@pytest.fixture(scope="module")
def states(base, tmp_path_factory):
    """What the memory tells after none, one, ... all of the steps."""
    path = tmp_path_factory.mktemp("states") / "memory"
    shutil.copytree(base, path)
    with Store.open(path) as store:
        found = [writer.state(store)]
        for step in writer.STEPS.values():
            with store.transaction() as change:
                step(change)
            found.append(writer.state(store))
    assert all(one != two for one, two in pairwise(found))
    return found


def run_traced(path, log, *options):
    """The steps under strace; what the process said, and its return code."""
    command = [strace, "-f", "-y", "-s", "40", "-o", str(log), f"--trace={CALLS}", *options]
    done = subprocess.run(
        [*command, sys.executable, "-B", str(WRITER), "steps", str(path)], capture_output=True, text=True, check=False
    )
    return done.stdout.splitlines(), done.returncode, done.stderr


@pytest.fixture(scope="module")
def calls(base, tmp_path_factory):
    """Name, number among those of its name, and text of each call that concerns the memory, in order."""
    folder = tmp_path_factory.mktemp("calls")
    path = folder / "memory"
    shutil.copytree(base, path)
    said, code, _ = run_traced(path, folder / "log")
    assert code == 0
    assert said[-1] == "closed"
    counts, found = {}, []
    for line in (folder / "log").read_text().splitlines():
        match = re.match(r"\d+\s+(\w+)\(", line)
        if match:
            name = match[1]
            counts[name] = counts.get(name, 0) + 1
            if str(path) in line or "write(1<" in line:
                found.append((name, counts[name], line))
    return found


def check(path, said, states):
    """The memory that a fault left."""
    acknowledged = sum(line.startswith("ack") for line in said)
    with Store.open(path) as store:
        found = writer.state(store)
        assert found in states[acknowledged : acknowledged + 2], f"not the state after {acknowledged} or {acknowledged + 1} steps"
        forgotten = found == states[-1]
        report = store.verify([writer.SECRET, writer.PIXELS["second-small"]] if forgotten else [])
        assert report.is_clean, report
        names = [path / "blobs" / name for name, _ in store._folder.blobs.names()]
        assert len(names) == report.blobs
    with Reader.open(path) as reader, reader.snapshot() as view:
        assert view.last_seq() == len(found[0]) or forgotten


def strike(base, states, folder, name, number, action):
    path = folder / f"{name}-{number}-{action.replace('=', '-')}"
    shutil.copytree(base, path)
    said, code, errors = run_traced(path, folder / "log", f"--inject={name}:{action}:when={number}")
    assert code in ((-signal.SIGKILL,) if "KILL" in action else (0,)) or "write(1" in errors or "OSError" in errors, errors
    check(path, said, states)
    shutil.rmtree(path)
    return said


ACTIONS = ("signal=KILL", "error=EIO", "error=ENOSPC")


@needs_strace
def test_some_faults(base, states, calls, tmp_path):
    concerned = [(name, number) for name, number, line in calls if "write(1<" not in line]
    cases = [(*call, action) for call in concerned for action in ACTIONS]
    for name, number, action in random.Random(time.time_ns()).sample(cases, 24):
        strike(base, states, tmp_path, name, number, action)


@needs_strace
@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("action", ACTIONS)
def test_every_fault(base, states, calls, tmp_path, action):
    concerned = [(name, number) for name, number, line in calls if "write(1<" not in line]
    assert len(concerned) * len(ACTIONS) >= 300
    failed = {}
    for name, number in concerned:
        try:
            strike(base, states, tmp_path, name, number, action)
        except AssertionError as error:
            failed[name, number] = str(error)[:600]
    print(f"{len(concerned)} faults by {action}, {len(failed)} of them left something wrong")
    assert not failed


def between(calls, first, last):
    """The calls between two lines that the process said."""
    texts = [line for _, _, line in calls]
    start = next(
        (number for number, line in enumerate(texts) if "write(1<" in line and f'"{first}' in line), -1
    )  # or the beginning
    end = next(number for number, line in enumerate(texts) if "write(1<" in line and f'"{last}' in line)
    return calls[start + 1 : end]


@needs_strace
def test_a_file_is_synced_then_named_then_its_folder_synced_then_the_commit(calls):
    lines = [line for _, _, line in between(calls, "begin add", "ack add")]

    def first(pattern):
        return next(number for number, line in enumerate(lines) if re.search(pattern, line))

    last_write = max(number for number, line in enumerate(lines) if re.search(r"\bwrite\(\d+<.*unfinished>", line))
    file_sync, rename = first(r"fsync\(\d+<.*unfinished>\)"), first("renameat")
    folder_sync, commit = first(r"fsync\(\d+<.*/blobs>\)"), first(r"pwrite64\(\d+<.*index\.db-wal>")
    assert last_write < file_sync < rename < folder_sync < commit
    assert re.search(r"fdatasync\(\d+<.*index\.db-wal>\)", lines[-1]), "the last thing before the acknowledgment is the log's sync"


@needs_strace
def test_a_sync_that_fails_once_is_never_acknowledged(base, states, calls, tmp_path):
    # SQLite syncs the memory's folder when it begins a log, and ignores failures: opening has done it, and has not.
    opening = between(calls, "the beginning", "opened")
    made = next(n for n, (_, _, line) in enumerate(opening) if "index.db-wal" in line and "O_CREAT" in line)
    assert any(name == "fsync" and line.split(">)")[0].endswith("/memory") for name, _, line in opening[made:])
    added = [call for call in between(calls, "begin add", "ack add") if not call[2].split(">)")[0].endswith("/memory")]
    syncs = [(name, number) for name, number, _ in added if name in ("fsync", "fdatasync")]
    assert len(syncs) == 4  # the file, its folder, the log's head, the commit
    for name, number in syncs:
        said = strike(base, states, tmp_path, name, number, "error=EIO")
        assert said == ["opened", "begin add", "failed add DiskFailedError", "closed"], (
            "and nothing goes on until it is opened again"
        )


@needs_strace
def test_a_full_disk_keeps_the_memory_usable(base, states, calls, tmp_path):
    writes = [(name, number) for name, number, _ in between(calls, "begin add", "ack add") if name in ("write", "pwrite64")]
    for name, number in [writes[0], writes[1], writes[len(writes) // 2], writes[-1]]:
        said = strike(base, states, tmp_path, name, number, "error=ENOSPC")
        assert said == ["opened", "begin add", "failed add OutputError", "goes on", "closed"]


def kill_under_load(path, seed, seconds):
    """What was acknowledged before the process was killed, and what had begun."""
    command = [sys.executable, "-B", str(WRITER), "load", str(path), str(seed)]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as process:
        process.stdout.readline()
        time.sleep(seconds)
        os.kill(process.pid, signal.SIGKILL)
        return [line.split() for line in process.stdout.read().decode().splitlines(keepends=True) if line.endswith("\n")]


def storm(path, times):
    """Kills writers one after the other on one memory; how many adds were acknowledged."""
    rng, pages, aged, forgotten = random.Random(4), {}, {}, set()
    for seed in range(times):
        for what, *words in kill_under_load(path, seed, rng.uniform(0.02, 0.4)):
            if what == "ack":
                pages[int(words[1])] = (int(words[0]), words[2], words[3:])
            elif what == "aged":
                aged[int(words[0])] = words[1]
            else:
                forgotten.add(int(words[0]))
        with Store.open(path) as store:
            report = store.verify()
            assert report.is_clean, report.problems[:3]
            with store.snapshot() as view:
                kept = {page.number: page for page in view.pages()}
                under_way = set(pages) - set(kept) - forgotten
                # An erasing may have been committed without having been acknowledged, one for each kill.
                assert all(number == max(pages) for number in under_way), f"acknowledged pages are gone: {under_way}"
                forgotten |= under_way
                for number in set(pages) - forgotten:
                    first, digest, names = pages[number]
                    contents = [message.content for message in view.messages(first, first + len(names) - 1)]
                    assert contents == [f'{{"content":"{name}"}}' for name in names]
                    name = view.blobs(number)[0].name
                    assert kept[number].tier == "small" or name == digest
                    assert number not in aged or name == aged[number]
    return len(pages)


def test_five_kills_under_load(tmp_path):
    assert storm(tmp_path / "memory", 5)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_fifty_kills_under_load(tmp_path):
    assert storm(tmp_path / "memory", 50) > 100
