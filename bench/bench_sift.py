"""Recall in an optical memory of very many stored pages: a glance over the tokens of all of them, no text kept, to its end.

Every page has 30 lines of words of its own, and one in a hundred hides a needle.  A recall reads the rows of pages from the
database, the tokens of each from its file (checksum and all), sifts them for the question's words, and decodes the row that
answers.  The answers are checked: needle found, and exact.  Seconds are of the wall and of the CPU, of the whole recall.

    OPTMEM_PAGES=10000        pages instead of 1,000: drawing and encoding them takes minutes
    OPTMEM_MEMORY=folder      where the memory is kept, and found again by the next run

On a quiet machine: OPTMEM_PAGES=10000 OPTMEM_MEMORY=... pytest bench/bench_sift.py --benchmark-enable -s
"""

import os
import random
import time
from pathlib import Path

import pytest

from optmem import Engine, Memory

PAGES = int(os.environ.get("OPTMEM_PAGES", "1000"))
AT_ONCE = 100  # pages that are added, drawn and encoded together
NEEDLE = 100  # one page in so many
ROWS = 30
QUESTIONS = ("vault{}", "what is the key of vault{}", "vault{} key")


def page(number):
    """The text of a page, and its needle where it has one.  The same number gives the same page."""
    rng = random.Random(f"page {number}")
    lines = [
        " ".join("".join(rng.choices("abcdefghijklmnopqrstuvwxyz", k=rng.randint(2, 9))) for _ in range(9))[:60]
        for _ in range(ROWS)
    ]
    needle = f"the key of vault{number} is {rng.getrandbits(40):010x}" if number % NEEDLE == NEEDLE // 2 else None
    if needle is not None:
        lines[rng.randrange(ROWS)] = needle
    return "\n".join(lines), needle


@pytest.fixture(scope="module")
def memory(tmp_path_factory):
    """Pages that are stored and encoded; one that is there already goes on where it was left."""
    given = os.environ.get("OPTMEM_MEMORY")
    path = Path(given) if given else tmp_path_factory.mktemp("sift") / "memory"
    with Engine.from_pretrained("nano", device="cpu") as engine, Memory.open(path, engine, index="optical", budget=1024) as opened:
        start = time.perf_counter()
        for first in range(opened.stats().counts.messages, PAGES, AT_ONCE):
            opened.add([{"role": "user", "content": page(number)[0]} for number in range(first, min(first + AT_ONCE, PAGES))])
            opened.age()
            opened._reader.encode_all()
        print(f"\n{PAGES:,} pages drawn and encoded in {time.perf_counter() - start:.0f} s")
        yield opened


@pytest.mark.parametrize("question", QUESTIONS)
def bench_recall(benchmark, memory, question):
    benchmark.group = f"recall among {PAGES:,} pages"
    asked = iter(random.Random(question).sample(range(NEEDLE // 2, PAGES - 8, NEEDLE), min(8, (PAGES - 8) // NEEDLE)) * 100)
    seconds = []

    def recall():
        number = next(asked)
        start = time.process_time()
        (hit,) = memory.recall(question.format(number), limit=1)
        seconds.append(time.process_time() - start)
        return hit.text == page(number)[1]

    assert recall(), "the needle is found, and read exactly"
    exact = benchmark.pedantic(recall, rounds=3)
    benchmark.extra_info.update(pages=PAGES, cpu_seconds=min(seconds), exact=exact)
    print(f"{question}: {min(seconds):.2f} s of CPU at least, {min(seconds) / PAGES * 1e3:.2f} ms a page")
