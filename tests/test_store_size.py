"""The memory's store with a long history: opening, adding and searching take milliseconds, and memory stays flat."""

import os
import random
import time
from itertools import accumulate
from pathlib import Path
from statistics import median

import pytest

from optmem.memory.records import NewMessage
from optmem.memory.store import Reader, Store

MESSAGES = 100_000


def resident():
    """MiB that this process has in memory."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4 / 1024


def times(act, arguments):
    """Milliseconds of each call.  Medians are compared: a busy machine stops a process for longer than any of them takes."""
    found = []
    for argument in arguments:
        start = time.perf_counter()
        act(argument)
        found.append((time.perf_counter() - start) * 1e3)
    return found


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_hundred_thousand_messages(tmp_path):
    rng = random.Random(0)
    words = ["".join(rng.choices("abcdefghijklmnopqrstuvwxyz", k=rng.randint(2, 9))) for _ in range(30_000)]
    often = list(accumulate(1 / (rank + 1) for rank in range(len(words))))  # as words of languages are

    def sentence(length):
        return " ".join(rng.choices(words, cum_weights=often, k=length))

    def batch(count):
        for _ in range(count):
            lines = tuple(sentence(12) for _ in range(5))
            yield NewMessage("user", " ".join(lines), 90, 0.0, lines=lines)

    path = tmp_path / "memory"
    with Store.open(path) as store:

        def add(messages):
            with store.transaction() as change:
                change.add_messages(messages)

        add(list(batch(5000)))
        before = resident()
        together = times(add, (list(batch(100)) for _ in range((MESSAGES - 5000) // 100)))
        alone = times(add, (list(batch(1)) for _ in range(200)))
        grown = resident() - before
    opening = times(lambda _: Store.open(path).close(), range(5))
    with Reader.open(path) as reader, reader.snapshot() as view:
        searching = {
            count: times(lambda question: view.search(question, 3), [sentence(count) for _ in range(50)]) for count in (1, 3, 10)
        }
        searching["often"] = times(lambda question: view.search(question, 3), [" ".join(words[:n]) for n in range(1, 30)])
    print(f"add of 100: {median(together) / 100:.2f} ms a message; alone: {median(alone):.2f}; grown by {grown:.0f} MiB")
    print(
        f"open and close: {median(opening):.1f} ms; search:", {name: f"{median(each):.2f} ms" for name, each in searching.items()}
    )
    assert median(together) / 100 < 5
    assert sum(together) / MESSAGES < 5
    assert median(alone) < 5 or median(alone) < 5 * sync_milliseconds(tmp_path), "above the disk's own cost"
    assert median(opening) < 300
    assert all(median(each) < 20 for each in searching.values())
    assert grown < 40


def sync_milliseconds(folder):
    """What one sync of this disk takes."""
    with (folder / "synced").open("wb", buffering=0) as file:

        def sync(content):
            file.write(content)
            os.fsync(file.fileno())

        return median(times(sync, [b"x" * 4096] * 50))
