"""The memory's store: messages added a second, alone and a hundred at once, beside the disk's own sync, and a search."""

import os

import pytest

from optmem.memory.records import NewLine, NewMessage, NewPage
from optmem.memory.store import Store


def message(number):
    lines = tuple(f"line {number} {row} of words that an index holds" for row in range(5))
    return NewMessage("user", "\n".join(lines), 60, 0.0, lines=lines)


@pytest.fixture
def store(tmp_path):
    with Store.open(tmp_path / "memory") as opened:
        with opened.transaction() as change:
            change.add_messages([message(number) for number in range(2000)])
        yield opened


@pytest.mark.parametrize("count", [1, 100])
def bench_add(benchmark, store, count):
    benchmark.group = "add"
    messages = [message(number) for number in range(count)]

    def add():
        with store.transaction() as change:
            return change.add_messages(messages)

    assert len(add()) == count
    benchmark.extra_info["messages"] = count
    benchmark(add)


def bench_sync(benchmark, tmp_path):
    """What every acknowledgment has to wait for: one sync of a page of the log."""
    benchmark.group = "add"
    with (tmp_path / "file").open("wb", buffering=0) as file:

        def sync():
            file.write(bytes(4096))
            os.fsync(file.fileno())

        sync()
        benchmark(sync)


def bench_page_with_tokens(benchmark, store):
    """A page and 140 KB of tokens: three syncs."""
    benchmark.group = "add"
    page = NewPage(
        "0" * 64, (1,), "base", 640, 640, "6x12", 100, 900, lines=tuple(NewLine(row, f"row {row}", 1, 1) for row in range(40))
    )
    contents = iter(range(1 << 30))

    def add():
        with store.transaction() as change:
            return change.put_blob(change.add_page(page), "tokens", next(contents).to_bytes(8, "big") * 17_500, tier="base")

    assert len(add()) == 64
    benchmark(add)


def bench_search(benchmark, store):
    benchmark.group = "search"
    with store.snapshot() as view:
        assert view.search("line 1234 words", 3)[0].line.text.startswith("line 1234 ")
        benchmark(view.search, "line 1234 words", 3)
