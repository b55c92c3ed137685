"""A memory with a long history, through its own door: adding, opening and finding take milliseconds, and memory stays flat."""

import os
import random
import time
from itertools import accumulate
from pathlib import Path
from statistics import median

import pytest

from optmem import Memory

MESSAGES = int(os.environ.get("OPTMEM_MESSAGES", "100000"))
FIRST = 5000  # messages after which memory is to grow no more
AT_ONCE = 10
EVERY = 500  # messages between two recalls


def resident():
    """MiB that this process has in memory."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4 / 1024


def milliseconds(act, *arguments):
    start = time.perf_counter()
    act(*arguments)
    return (time.perf_counter() - start) * 1e3


class Said:
    """Sentences whose words are as frequent as those of languages."""

    def __init__(self):
        self.rng = random.Random(0)
        self.words = ["".join(self.rng.choices("abcdefghijklmnopqrstuvwxyz", k=self.rng.randint(2, 9))) for _ in range(30_000)]
        self.often = list(accumulate(1 / (rank + 1) for rank in range(len(self.words))))

    def sentence(self, length):
        return " ".join(self.rng.choices(self.words, cum_weights=self.often, k=length))

    def messages(self, count):
        roles = ("user", "assistant")
        return [{"role": roles[at % 2], "content": "\n".join(self.sentence(12) for _ in range(5))} for at in range(count)]


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_a_hundred_thousand_messages(tmp_path):
    said, path = Said(), tmp_path / "m"
    together, alone, finding, sizes = [], [], [], []
    with Memory.open(path) as memory:
        for first in range(0, MESSAGES, AT_ONCE):
            together.append(milliseconds(memory.add, said.messages(AT_ONCE)))
            if first % EVERY == 0:
                alone += [milliseconds(memory.add, said.messages(1)) for _ in range(2)]
                finding.append(milliseconds(memory.recall, said.sentence(3)))
            if first % FIRST == 0 and first:
                sizes.append(resident())
        assert memory.stats().counts.messages >= MESSAGES
    opening = [milliseconds(lambda: Memory.open(path).close()) for _ in range(5)]
    told = {
        "add of 10, ms a message": median(together) / AT_ONCE,
        "its mean": sum(together) / MESSAGES,
        "add of 1, ms": median(alone),
        "recall's search, ms": median(finding[-50:]),
        "the slowest": max(finding[-50:]),
        "open and close, ms": median(opening),
        "MiB after 5,000": sizes[0],
        "MiB at the end": sizes[-1],
        "MiB at most": max(sizes),
    }
    print("\n" + "\n".join(f"{name}: {value:.2f}" for name, value in told.items()))
    assert max(sizes) <= 1.05 * sizes[0], "memory is flat"
    assert median(together) / AT_ONCE < 5
    assert sum(together) / MESSAGES < 5
    assert median(alone) < 5 or median(alone) < 5 * sync_milliseconds(tmp_path), "above the disk's own cost"
    assert median(finding[-50:]) < 20
    assert median(opening) < 300


def sync_milliseconds(folder):
    """What one sync of this disk takes."""
    with (folder / "synced").open("wb", buffering=0) as file:

        def sync():
            file.write(b"x" * 4096)
            os.fsync(file.fileno())

        return median(milliseconds(sync) for _ in range(50))
