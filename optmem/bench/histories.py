"""Histories with needles in them: chats of one class of text, and questions whose answers stand on one line each.

Everything comes from a seed.  A history is cut into messages of a few lines; needles are lines of their own, at places drawn by
chance, but the values of one key stand in the order in which they were set.
"""

from __future__ import annotations

import json
import string
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from random import Random
from typing import Literal, get_args

from optmem.bench.answers import Shape
from optmem.pages import read_symbols
from optmem.train.corpus import Corpus
from optmem.train.distance import distance
from optmem.train.kinds import write

Filler = Literal["natural", "shuffled", "random"]
Suite = Literal["passkey", "key-value", "distractors", "updates", "absent", "json", "table", "code", "lines"]
FILLERS: tuple[Filler, ...] = get_args(Filler)
SUITES: tuple[Suite, ...] = get_args(Suite)
LINES_OF_A_MESSAGE = (3, 7)
WIDTH = 60  # characters of a filler's line, at most: it stands on one row
VERSIONS = 4  # of a value that is set again
LEAST_APART = 3  # letters in which two names differ, but for those that are meant to be near
_LONGEST_WORD = 9
_FIRST, _REST = "bcdfghjklmnprstvz", "aeiou"


@dataclass(frozen=True, slots=True)
class Question:
    """What is asked, and what is right."""

    suite: Suite
    query: str
    names: tuple[str, ...]  # that the line which answers holds
    answer: str | None  # of its line, as `Shape.read` gives it; None where the history says nothing of it
    shape: Shape
    line: str = ""  # which answers, whole
    message: int = -1  # its number, from 0
    form: str = ""  # of a suite that has several: "digits", "near"


@dataclass(frozen=True, slots=True)
class History:
    """Lines of messages, oldest first."""

    filler: Filler
    seed: int
    messages: tuple[tuple[str, ...], ...]
    questions: tuple[Question, ...]

    def chat(self) -> list[dict[str, str]]:
        """As a memory takes it: two people in turn."""
        return [
            {"role": "assistant" if number % 2 else "user", "content": "\n".join(lines)}
            for number, lines in enumerate(self.messages)
        ]

    def depth(self, question: Question) -> float:
        """Where the answer stands: 0 is the oldest message, 1 the newest."""
        return question.message / max(len(self.messages) - 1, 1)


@dataclass(frozen=True, slots=True)
class Size:
    """How long a history is and how much is asked of it."""

    messages: int = 64  # filler of about 11 pages
    passkeys: int = 6
    pairs: int = 8
    distractors: int = 12  # lines that differ from one another in one of two words
    updated: int = 3  # keys, each set VERSIONS times
    absent: int = 6
    records: int = 3  # of each of JSON, tables and code
    lines: int = 6  # of the filler itself


STANDARD = Size()


@dataclass(frozen=True, slots=True)
class _Needle:
    """Lines in a row, and what they answer."""

    lines: tuple[str, ...]
    questions: tuple[Question, ...]
    order: int = 0  # among the needles of its group
    group: str = ""


def make_history(filler: Filler, corpus: Corpus, seed: int, size: Size = STANDARD) -> History:
    """The same for the same arguments."""
    chance = Random(f"optmem bench {filler} {seed}")  # noqa: S311
    names = _Names(chance)
    needles = _needles(chance, names, size)
    told = [list(lines) for lines in _filler(filler, corpus, chance, size.messages)]
    asked = _own_lines(chance, told, size.lines)
    places = _places(chance, needles, len(told))
    for needle, place in zip(needles, places, strict=True):
        at = chance.randrange(len(told[place]) + 1)
        told[place][at:at] = needle.lines
        asked += [replace(question, message=place) for question in needle.questions]
    asked += _absent(chance, names, [each for each in asked if each.suite == "passkey"], size.absent)
    return History(filler, seed, tuple(map(tuple, told)), tuple(sorted(asked, key=lambda each: SUITES.index(each.suite))))


def _places(chance: Random, needles: Sequence[_Needle], count: int) -> list[int]:
    """The message of each needle; of one group, in their order, and each in a message of its own where there are enough."""
    places = [chance.randrange(count) for _ in needles]
    for group in dict.fromkeys(needle.group for needle in needles if needle.group):  # a set's order is another in every process
        members = [number for number, needle in enumerate(needles) if needle.group == group]
        drawn = sorted(
            chance.sample(range(count), len(members)) if len(members) <= count else chance.choices(range(count), k=len(members))
        )
        for number, place in zip(sorted(members, key=lambda each: needles[each].order), drawn, strict=True):
            places[number] = place
    return places


# --- filler ---------------------------------------------------------------------------------------------------------------------


def _filler(filler: Filler, corpus: Corpus, chance: Random, messages: int) -> list[list[str]]:
    counts = [chance.randint(*LINES_OF_A_MESSAGE) for _ in range(messages)]
    words = _words_of(filler, corpus, chance, sum(counts) * (WIDTH + 1))
    lines = _wrapped(words)
    return [[next(lines) for _ in range(count)] for count in counts]


def _words_of(filler: Filler, corpus: Corpus, chance: Random, length: int) -> list[str]:
    """Words, at least of this length together."""
    if filler == "random":
        letters = string.ascii_letters + string.digits
        return ["".join(chance.choices(letters, k=chance.randint(3, _LONGEST_WORD))) for _ in range(length // 4)]
    said: list[str] = []
    while sum(map(len, said)) < length:
        keys = write("paragraphs", chance, corpus, length, seasoned=False)
        said += [
            word for word in read_symbols("".join(map(chr, keys.tolist()))).split() if word.isascii() and len(word) < WIDTH // 2
        ]
    if filler == "shuffled":
        chance.shuffle(said)
    return said


def _wrapped(words: Sequence[str]) -> Iterator[str]:
    line = ""
    for word in words:
        if line and len(line) + 1 + len(word) > WIDTH:
            yield line
            line = word
        else:
            line = f"{line} {word}" if line else word


def _own_lines(chance: Random, told: Sequence[Sequence[str]], count: int) -> list[Question]:
    """Lines of the filler, asked for by their first half; only such as no other line begins like."""
    often: dict[str, int] = {}
    for lines in told:
        for line in lines:
            often[_half(line)] = often.get(_half(line), 0) + 1
    places = [
        (number, line) for number, lines in enumerate(told) for line in lines if often[_half(line)] == 1 and len(_half(line)) > 12
    ]
    chosen = chance.sample(places, min(count, len(places)))
    return [
        Question("lines", _half(line), (_half(line),), line[len(_half(line)) :].strip(), Shape.REST, line, number)
        for number, line in sorted(chosen)
    ]


def _half(line: str) -> str:
    """The first words of a line, half of it."""
    words = line.split()
    return " ".join(words[: (len(words) + 1) // 2])


# --- needles --------------------------------------------------------------------------------------------------------------------


class _Names:
    """Names that no text has and that are not like one another."""

    def __init__(self, chance: Random) -> None:
        self.chance = chance
        self.used: list[str] = []

    def new(self) -> str:
        while True:
            name = "".join(self.chance.choice(_FIRST) + self.chance.choice(_REST) for _ in range(4))
            if all(distance(name, other) >= LEAST_APART for other in self.used):
                self.used.append(name)
                return name

    def near(self, name: str) -> str:
        """One letter another."""
        while True:
            at = self.chance.randrange(0, len(name), 2)
            other = name[:at] + self.chance.choice(_FIRST) + name[at + 1 :]
            if other not in self.used:
                self.used.append(other)
                return other


def _needles(chance: Random, names: _Names, size: Size) -> list[_Needle]:
    found = [_passkey(chance, names.new(), ("digits", "uuid", "hash")[number % 3]) for number in range(size.passkeys)]
    found += [_pair(chance, names.new()) for _ in range(size.pairs)]
    found += _distractors(chance, names, size.distractors)
    for _ in range(size.updated):
        found += _updates(chance, names.new())
    for _ in range(size.records):
        found += [_json(chance, names.new()), _table(chance, [names.new() for _ in range(3)]), _code(chance, names.new())]
    return found


def secret(chance: Random, form: str) -> str:
    """Ten digits, a UUID, or a hash of sixteen."""
    said = f"{chance.getrandbits(128):032x}"
    if form == "digits":
        return str(chance.randrange(10**9, 10**10))
    return said[:16] if form == "hash" else f"{said[:8]}-{said[8:12]}-4{said[13:16]}-a{said[17:20]}-{said[20:]}"


def _one(question: Question, line: str) -> _Needle:
    return _Needle((line,), (replace(question, line=line),))


def _passkey(chance: Random, name: str, form: str) -> _Needle:
    value = secret(chance, form)
    return _one(
        Question("passkey", f"passkey of {name}", (name,), value, Shape.LAST, form=form), f"The passkey of {name} is {value}."
    )


def _pair(chance: Random, name: str) -> _Needle:
    value = "".join(chance.choices(string.ascii_lowercase + string.digits, k=8))
    return _one(Question("key-value", name, (name,), value, Shape.LAST), f"{name} = {value}")


def _distractors(chance: Random, names: _Names, count: int) -> list[_Needle]:
    """Every line shares a word with others; a third of them are asked for."""
    places = [names.new() for _ in range(-(-count // 3))]
    things = [names.new() for _ in range(3)]
    pairs = [(thing, place) for thing in things for place in places][:count]
    found = []
    for number, (thing, place) in enumerate(pairs):
        value = f"{chance.getrandbits(32):08x}"
        line = f"The token of {thing} in {place} is {value}."
        question = Question("distractors", f"token of {thing} in {place}", (thing, place), value, Shape.LAST, line)
        found.append(_Needle((line,), (question,) if number % 3 == 0 else ()))
    return found


def _updates(chance: Random, name: str) -> list[_Needle]:
    values = chance.sample(range(1000, 10_000), VERSIONS)
    lines = [f"The limit of {name} is now {value}." for value in values]
    last = Question("updates", f"limit of {name}", (name,), str(values[-1]), Shape.LAST, lines[-1])
    return [_Needle((line,), (last,) * (order == VERSIONS - 1), order, name) for order, line in enumerate(lines)]


def _json(chance: Random, name: str) -> _Needle:
    record = {
        "id": name,
        "port": chance.randrange(1024, 65536),
        "on": chance.random() < 0.5,
        "path": f"/srv/{name[:4]}/{secret(chance, 'hash')[:6]}",
    }
    line = json.dumps(record)
    return _one(Question("json", name, (name,), Shape.JSON.read(line, ()), Shape.JSON), line)


def _table(chance: Random, names: Sequence[str]) -> _Needle:
    """Three rows, the second of which is asked for."""
    rows = [
        f"| {name} | {chance.randrange(10**4)} | {chance.uniform(0, 99):.2f} | {secret(chance, 'hash')[:7]} |" for name in names
    ]
    question = Question("table", names[1], (names[1],), Shape.TABLE.read(rows[1], ()), Shape.TABLE, rows[1])
    return _Needle(("| name | calls | share | commit |", "|---|---|---|---|", *rows), (question,))


def _code(chance: Random, name: str) -> _Needle:
    first, second = chance.randrange(2, 100), chance.randrange(100, 10_000)
    line = f"def {name}(x, y={first}): return x * {second} + y % {first}"
    return _one(Question("code", name, (name,), Shape.CODE.read(line, ()), Shape.CODE), line)


def _absent(chance: Random, names: _Names, passkeys: Sequence[Question], count: int) -> list[Question]:
    """Passkeys that nobody told: every second of a name that is one letter away from one that is there."""
    found = []
    for number in range(count):
        is_near = number % 2 == 0 and bool(passkeys)
        name = names.near(chance.choice(passkeys).names[0]) if is_near else names.new()
        found.append(Question("absent", f"passkey of {name}", (name,), None, Shape.LAST, form="near" if is_near else "far"))
    return found
