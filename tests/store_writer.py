"""Not a test: the process that the crash tests kill.  It writes to a memory, and says on stdout what was acknowledged.

    python store_writer.py steps PATH          the four changes below, one after the other, until one fails
    python store_writer.py load PATH SEED      adds and ages without end

No word of it loads torch: it starts in a tenth of a second.
"""

import hashlib
import os
import random
import sys
from contextlib import suppress

from optmem.errors import DiskFailedError, OptmemError
from optmem.memory.records import NewLine, NewMessage, NewPage, Reading
from optmem.memory.store import Store

SECRET = "Zq7secret0f93b1c4d5e6a7pass"
PIXELS = {name: hashlib.sha256(name.encode()).digest() * 300 for name in ("first", "second", "third", "second-small")}


def page_id(name):
    return hashlib.sha256(name.encode()).hexdigest()


def message(text, **more):
    return NewMessage("user", f'{{"content":"{text}"}}', 7, 1.5, lines=(text,), **more)


def page(name, messages, line):
    return NewPage(
        page_id(name), tuple(messages), "base", 640, 640, "6x12", 273, 900, lines=(NewLine(0, line, messages[0], messages[-1]),)
    )


def prepare(path):
    """What is there before anything fails: two pages, the second with the secret."""
    with Store.open(path) as store, store.transaction() as change:
        change.add_messages(
            [message("first words"), message("second words"), message(f"a password {SECRET}"), message("its answer", joins=True)]
        )
        for number, (name, messages, line) in enumerate([("first", [1, 2], "first row"), ("second", [3, 4], f"row {SECRET}")], 1):
            assert change.add_page(page(name, messages, line)) == number
            change.put_blob(number, "pixels", PIXELS[name], tier="base")
        change.put_readings(2, "base", [Reading(0, f"row {SECRET}", 0.9)])


def add(change):
    change.add_messages([message("third words"), message("fourth words", joins=True), message("fifth words")])
    change.add_page(page("third", [5, 6], "third row"))
    change.put_blob(3, "pixels", PIXELS["third"], tier="base")
    change.add_receipt('{"added": 3}', 1.0)


def age(change):
    change.change_page(2, tier="small", tokens=73)
    change.put_blob(2, "pixels", PIXELS["second-small"], tier="small")
    change.drop_readings(2)
    change.add_receipt('{"page": 2, "to": "small"}', 2.0)


def cache(change):
    change.put_readings(2, "small", [Reading(0, f"rew {SECRET}", 0.7)])
    change.count_hit(2, 3.0)


def forget(change):
    change.erase(pages=[2], messages=[3, 4])


STEPS = {"add": add, "age": age, "cache": cache, "forget": forget}


def say(*words):
    os.write(1, (" ".join(words) + "\n").encode())


def state(store):
    """Everything that a memory tells, files included, to be compared."""
    with store.snapshot() as view:
        pages = list(view.pages())
        blobs = [(blob, view.blob(each.number, blob.kind)) for each in pages for blob in view.blobs(each.number)]
        readings = [view.readings(each.number, tier) for each in pages for tier in ("base", "small")]
        lines = [view.lines(each.number) for each in pages]
        found = [view.search(words, 9) for words in ("words", "row", "fifth")]
        return (
            list(view.messages()),
            pages,
            blobs,
            readings,
            lines,
            [[each.line for each in some] for some in found],
            list(view.receipts()),
        )


def run_steps(path):
    try:
        store = Store.open(path)
    except OptmemError as error:
        say("failed", "open", type(error).__name__)
        return
    say("opened")
    for name, step in STEPS.items():
        say("begin", name)
        try:
            with store.transaction() as change:
                step(change)
        except OptmemError as error:
            say("failed", name, type(error).__name__)
            with suppress(DiskFailedError), store.transaction():
                say("goes on")
            break
        say("ack", name)
    store.close()
    say("closed")


def run_load(path, seed):
    rng, number = random.Random(seed), 0
    with Store.open(path) as store:
        say("opened")
        while True:
            number += 1
            names = [f"{seed}-{number}-{each}" for each in range(rng.randint(1, 6))]
            content = rng.randbytes(rng.randint(1, 60_000))
            with store.transaction() as change:
                messages = change.add_messages([message(name) for name in names])
                added = change.add_page(page(names[0], messages, names[0]))
                change.put_blob(added, "pixels", content, tier="base")
            say("ack", str(messages[0]), str(added), hashlib.sha256(content).hexdigest(), *names)
            if number % 3 == 0:
                with store.transaction() as change:
                    change.put_blob(added, "pixels", content[: len(content) // 2 + 1], tier="small")
                    change.change_page(added, tier="small")
                say("aged", str(added), hashlib.sha256(content[: len(content) // 2 + 1]).hexdigest())
            if number % 10 == 0:
                with store.transaction() as change:
                    change.erase(pages=[added], messages=messages)
                say("forgot", str(added), str(messages[0]))


if __name__ == "__main__":
    run_steps(sys.argv[2]) if sys.argv[1] == "steps" else run_load(sys.argv[2], sys.argv[3])
