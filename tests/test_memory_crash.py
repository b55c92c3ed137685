"""The memory under faults: what was acknowledged is there, what was acknowledged as forgotten is not, and the rest is whole.

Every call of the store is struck in test_crash.py; here it is struck where memory's own changes are made of several of its steps.
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
from pathlib import Path

import pytest

from optmem import Engine, Memory

WRITER = Path(__file__).with_name("memory_writer.py")
FAULTS = int(os.environ.get("OPTMEM_FAULTS", "40"))  # of those that there are: each takes some seconds
CALLS = ("fdatasync", "renameat", "pwrite64", "unlink", "unlinkat")
strace = shutil.which("strace")
pytestmark = pytest.mark.skipif(strace is None, reason="strace is not installed (Debian: apt-get install strace)")


def load_writer():
    spec = importlib.util.spec_from_file_location("memory_writer", WRITER)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


writer = load_writer()


@pytest.fixture(scope="module")
def engine():
    with Engine.from_pretrained("nano", device="cpu") as found:
        yield found


class Server:
    """The process that forks those who are struck, so that torch and the reader are loaded once."""

    def __init__(self):
        alone = os.environ | {"OMP_NUM_THREADS": "1"}  # threads of the parent's would be missing in the child
        self.process = subprocess.Popen(
            [sys.executable, "-B", str(WRITER)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1, env=alone
        )

    def say(self, line):
        self.process.stdin.write(f"{line}\n")
        self.process.stdin.flush()

    def run(self, path, log, *options):
        """What a child said that worked on this path under strace, and its return code."""
        self.say(path)
        number = self.process.stdout.readline().split()[1]
        traced = [strace, "-f", "-p", number, "-o", str(log), f"--trace={','.join(CALLS)}", *options]
        with subprocess.Popen(traced, stderr=subprocess.PIPE, text=True) as tracer:
            assert "attached" in tracer.stderr.readline()
            self.say("go")
            said = []
            while not (line := self.process.stdout.readline()).startswith("ended"):
                assert line, "the writer itself has ended"
                said.append(line.strip())
            tracer.communicate()
        return said, int(line.split()[1])


@pytest.fixture(scope="module")
def server():
    found = Server()
    with found.process:
        yield found
        found.process.stdin.close()


def check(path, said, engine):
    """The memory that a fault left."""
    added = [int(line.split()[1]) for line in said if line.startswith("added")]
    with Memory.open(path, engine=engine) as memory:
        report = memory.verify()
        assert report.is_clean, report.problems
        count = memory.stats().counts.messages
        whole = {2 * len(added), 2 * len(added) + 2}
        assert count in whole | {number - 1 for number in whole}, "adds are whole, and one message may be forgotten"
        if "forgotten" in said:
            assert count == 2 * writer.TURNS - 1
            assert memory.verify([writer.SECRET]).is_clean
        view = memory.context()
        assert view.tokens <= view.budget
        for number in added:
            if number != 1:
                (hit,) = memory.recall(f"house {number} number 7", limit=1)
                assert hit.text == writer.LINE.format(number, 7), "what was acknowledged is read back"
        memory.add(writer.turn(99))
        assert memory.context().digest() == memory.context().digest()


def strike(folder, server, engine, call, number, action):
    path = folder / f"{call}-{number}-{action.replace('=', '-')}"
    said, code = server.run(path, folder / "log", f"--inject={call}:{action}:when={number}")
    assert code in (0, -signal.SIGKILL), said
    if path.exists() and (path / "index.db").exists():
        check(path, said, engine)
    shutil.rmtree(path, ignore_errors=True)
    return code, said


@pytest.mark.parametrize(("call", "number", "action"), [("fdatasync", 9, "signal=KILL"), ("renameat", 5, "error=ENOSPC")])
def test_some_faults(server, engine, tmp_path, call, number, action):
    code, said = strike(tmp_path, server, engine, call, number, action)
    assert code == -signal.SIGKILL or any("failed" in line for line in said), "the fault was met"


def test_a_disk_that_is_full_keeps_nobody_from_opening(server, engine, tmp_path):
    """The first of the writes is the owner's number, which nothing depends on."""
    code, said = strike(tmp_path, server, engine, "pwrite64", 1, "error=ENOSPC")
    assert (code, said[-1]) == (0, "forgotten")


@pytest.mark.slow
@pytest.mark.timeout(60 * FAULTS)
def test_many_faults(server, engine, tmp_path):
    said, code = server.run(tmp_path / "whole", tmp_path / "log")
    assert (code, said[-1]) == (0, "forgotten"), said
    check(tmp_path / "whole", said, engine)
    text = (tmp_path / "log").read_text()
    counts = {call: len(re.findall(rf"^\d+\s+{call}\(", text, re.MULTILINE)) for call in CALLS}
    cases = [(call, number, action) for call, count in counts.items() for number in range(1, count + 1) for action in ACTIONS]
    for case in random.Random(time.time_ns()).sample(cases, min(FAULTS, len(cases))):
        strike(tmp_path, server, engine, *case)
    print(f"{min(FAULTS, len(cases))} of {len(cases)} faults")


ACTIONS = ("signal=KILL", "error=EIO", "error=ENOSPC")
