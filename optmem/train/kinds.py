"""What pages say: eleven kinds of text, each a function from chance, a corpus and a length to atlas keys.

A kind returns at least `length` characters; the page takes what fits.  Half of the kinds cannot be guessed by a language model, so
a reader that does well on them reads.
"""

from __future__ import annotations

import base64
import json
import re
import textwrap
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, fields
from random import Random
from typing import Any, Literal, get_args

import numpy as np
from numpy.typing import NDArray

from optmem.config import check_choice
from optmem.errors import InputError
from optmem.pages import symbols
from optmem.pages.alphabet import CHARACTERS
from optmem.pages.cells import join_runs
from optmem.pages.chat import read_messages
from optmem.train.corpus import Corpus

Keys = NDArray[np.int64]
PageKind = Literal["prose", "paragraphs", "shuffled", "words", "characters", "symbols", "code", "json", "logs", "tables", "chats"]
_POOLS = tuple(  # of random characters, and how often each is drawn from
    (np.array([ord(char) for char in pool], dtype=np.int64), weight)
    for pool, weight in (
        (symbols.PRINTABLE_ASCII, 0.5),
        ("0123456789abcdef", 0.08),
        ("0123456789.,-+:/ ", 0.07),
        (CHARACTERS[95:189] + symbols.PRINTABLE_ASCII + "\t", 0.15),
    )
)
_ALPHABET = np.array([ord(char) for char in CHARACTERS + "\t"], dtype=np.int64)
_ACCENTS = np.array([ord(char) for char in "äöüßÄÖÜéèêàâçîôûùñáíóúåøæœëïÉ„“”‚‘’«»–—…¿¡"], dtype=np.int64)
_MARKS = np.array([ord(char) for char in "⇒⇔←→↑↓↔†‡‘’‚“”„′″∆™•…°±×÷≤≥≠≈░▒▓█▀▄■□▪●○─━│└├┌┐┘╰╭═║╚╝"], dtype=np.int64)
_SCRIPTS = ((0x00, 0x20), (0x370, 0x600), (0x3040, 0xD7A4), (0x10000, 0x20000))  # controls, letters, syllables, all the rest
_FOREIGN = np.array([ord(char) for char in "αβγδλπΩжияшה中文字日本語한국🙂🚀✅⚠️\u200b\u00ad\x07\x1b\x00\r"], dtype=np.int64)
_ALPHABETS = (  # first and last letters of scripts that are drawn as escapes, letter by letter
    (0x0410, 0x044F),
    (0x0391, 0x03C9),
    (0x0100, 0x017F),
    (0x05D0, 0x05EA),
    (0x0621, 0x064A),
    (0x3041, 0x30FE),
    (0x4E00, 0x9FFF),
    (0xAC00, 0xD7A3),
    (0x1F300, 0x1F64F),
)
_PARAGRAPH = 240  # characters
_ATTEMPTS = 20
_LEVELS = ("DEBUG", "INFO", "INFO", "INFO", "WARNING", "ERROR")
_SUFFIXES = (".py", ".rs", ".c", ".json", ".log", ".toml", ".md", ".tar.gz", "", "/")


@dataclass(frozen=True, slots=True)
class Mix:
    """How often each kind is drawn; only the proportions count."""

    prose: float = 0.16
    paragraphs: float = 0.06
    shuffled: float = 0.10
    words: float = 0.12
    characters: float = 0.12
    symbols: float = 0.03
    code: float = 0.13
    json: float = 0.08
    logs: float = 0.08
    tables: float = 0.06
    chats: float = 0.06

    def __post_init__(self) -> None:
        weights = asdict(self)
        if min(weights.values()) < 0 or sum(weights.values()) <= 0:
            raise InputError(f"the weights of a mix must be 0 or more and not all 0, got {weights}")

    @classmethod
    def only(cls, kinds: Sequence[str]) -> Mix:
        """The usual proportions among these kinds and none of the others."""
        for kind in kinds:
            check_choice("kind", kind, PageKind)
        return cls(**{field.name: getattr(cls(), field.name) * (field.name in kinds) for field in fields(cls)})

    def draw(self, chance: Random) -> PageKind:
        """One kind."""
        names: tuple[PageKind, ...] = get_args(PageKind)
        return chance.choices(names, [getattr(self, name) for name in names])[0]


def to_keys(text: str) -> Keys:
    """The atlas keys of plain text."""
    return np.frombuffer(text.encode("utf-32-le", "surrogatepass"), dtype="<u4").astype(np.int64)


def write(kind: PageKind, chance: Random, corpus: Corpus, length: int, *, seasoned: bool = True) -> Keys:
    """A text of a kind, at least `length` characters where the kind has so many; as written, or some of them seasoned."""
    said = _WRITERS[kind](chance, corpus, length)
    if not isinstance(said, str):
        return said
    return season(to_keys(said), chance) if seasoned else to_keys(said)


# --- from the corpus ------------------------------------------------------------------------------------------------------------


def excerpt(chance: Random, text: bytes, length: int) -> str:
    """A stretch from the beginning of some line; a text that is too short is repeated."""
    start = text.find(b"\n", chance.randrange(len(text))) + 1
    said = text[start : start + length + 8].decode("utf-8", "ignore")
    while len(said) < length:
        said += text[:length].decode("utf-8", "ignore")
    return said


def _prose(chance: Random, corpus: Corpus, length: int) -> str:
    said = excerpt(chance, corpus.prose, length)
    if chance.random() < 0.2:  # as in files that were wrapped by hand
        width = chance.randrange(30, 100)
        said = "\n".join(textwrap.fill(line, width) if len(line) > width else line for line in said.split("\n"))
    return said


def _paragraphs(chance: Random, corpus: Corpus, length: int) -> str:
    """Running text alone: neighbouring paragraphs, without the headings, lists and tables between them."""
    kept: list[str] = []
    for _ in range(_ATTEMPTS):
        kept += [line for line in excerpt(chance, corpus.prose, 8 * length).split("\n") if len(line) >= _PARAGRAPH]
        if sum(map(len, kept)) >= length:
            return "\n".join(kept)
    return excerpt(chance, corpus.prose, length)  # of a corpus that has no paragraphs


def _shuffled(chance: Random, corpus: Corpus, length: int) -> str:
    words = excerpt(chance, corpus.prose, length).split(" ")
    chance.shuffle(words)
    return " ".join(words)


def _words(chance: Random, corpus: Corpus, length: int) -> str:
    words = chance.choices(corpus.words, k=length // 6 + 8)
    if chance.random() < 0.5:
        return _fill(chance, words, length, corpus.words)
    for k in chance.sample(range(len(words)), len(words) // 5):  # as a text has them: capitals, commas, ends of lines
        words[k] = chance.choice((words[k].upper(), words[k].capitalize(), words[k] + ",", words[k] + ".", words[k] + "\n"))
    return _fill(chance, words, length, corpus.words)


def _fill(chance: Random, words: list[str], length: int, more: Sequence[str]) -> str:
    said = " ".join(words)
    while len(said) < length:
        said += " " + " ".join(chance.choices(more, k=32))
    return said.replace("\n ", "\n")


def _code(chance: Random, corpus: Corpus, length: int) -> str:
    draw = chance.random()
    if draw < 0.25:  # as makefiles, Go and kernels are indented
        said = excerpt(chance, corpus.code, 4 * length)
        return re.sub(r"(?m)^(?: {4})+", lambda blanks: "\t" * (len(blanks[0]) // 4), said)
    said = excerpt(chance, corpus.code, length)
    return textwrap.indent(said, " " * chance.randrange(4, 48)) if draw < 0.4 else said  # as deep in a nest


# --- made up --------------------------------------------------------------------------------------------------------------------


def _characters(chance: Random, _: Corpus, length: int) -> Keys:
    """ASCII, digits or Latin-1 at random, or long runs of the same: rules, rows of blanks, what is set far to the right."""
    pool = chance.choices([pool for pool, _ in _POOLS], [weight for _, weight in _POOLS])[0]
    return _in_runs(chance, _random(chance, pool, length))


def _symbols(chance: Random, _: Corpus, length: int) -> Keys:
    """The whole alphabet at random or the signs alone, and now and then a character of any script, drawn as its escape."""
    keys = _in_runs(chance, _random(chance, _MARKS if chance.random() < 0.2 else _ALPHABET, length))
    random = np.random.default_rng(chance.getrandbits(63))
    is_escaped = random.random(length) < chance.choice((0.0, 0.01, 0.05))
    keys[is_escaped] = random.integers(*chance.choice(_SCRIPTS), size=int(is_escaped.sum()))
    return keys


def _in_runs(chance: Random, keys: Keys) -> Keys:
    """An eighth of the texts with each character several times over, and blanks between."""
    if chance.random() >= 0.12:
        return keys
    random = np.random.default_rng(chance.getrandbits(63))
    keys[random.random(len(keys)) < 0.4] = ord(" ")
    return np.repeat(keys, random.geometric(1 / chance.choice((3, 12, 60)), size=len(keys)))[: len(keys)]


def _random(chance: Random, pool: Keys, length: int) -> Keys:
    """Characters at random, in lines of random lengths or in none."""
    random = np.random.default_rng(chance.getrandbits(63))
    keys = pool[random.integers(len(pool), size=length)]
    if chance.random() < 0.6:
        keys[random.random(length) < chance.choice((0.005, 0.02, 0.05))] = ord("\n")
    if chance.random() < 0.3:
        keys[random.random(length) < 0.15] = ord(" ")
    return keys


def _hexadecimal(chance: Random, digits: int) -> str:
    return f"{chance.getrandbits(4 * digits):0{digits}x}"


def _uuid(chance: Random) -> str:
    said = _hexadecimal(chance, 32)
    return f"{said[:8]}-{said[8:12]}-4{said[13:16]}-{chance.choice('89ab')}{said[17:20]}-{said[20:]}"


def _path(chance: Random, corpus: Corpus) -> str:
    parts = [chance.choice(corpus.words).lower() for _ in range(chance.randrange(1, 5))]
    return chance.choice(("/", "./", "~/", "/var/log/", "/usr/lib/", "src/", "C:\\")) + "/".join(parts) + chance.choice(_SUFFIXES)


def _stamp(chance: Random) -> str:
    day = f"20{chance.randrange(10, 40)}-{chance.randrange(1, 13):02}-{chance.randrange(1, 29):02}"
    return f"{day}T{chance.randrange(24):02}:{chance.randrange(60):02}:{chance.randrange(60):02}.{chance.randrange(1000):03}Z"


def _number(chance: Random, _: Corpus) -> str:
    return chance.choice(
        (
            str(chance.randrange(10 ** chance.randrange(1, 13))),
            f"{chance.uniform(-1, 1) * 10 ** chance.randrange(6):.{chance.randrange(1, 7)}f}",
            f"{chance.uniform(-1, 1):.{chance.randrange(2, 9)}e}",
            f"0x{chance.getrandbits(32):X}",
            f"{chance.randrange(10**9):,}",
            f"{chance.randrange(100)}%",
        )
    )


def _address(chance: Random, corpus: Corpus) -> str:
    if chance.random() < 0.4:
        return ".".join(str(chance.randrange(256)) for _ in range(4)) + f":{chance.randrange(1024, 65536)}"
    word = chance.choice(corpus.words).lower()
    return chance.choice((f"https://{word}.example/{_hexadecimal(chance, 8)}?id={chance.randrange(10**6)}", f"{word}@example.org"))


_IDENTIFIERS: tuple[Callable[[Random, Corpus], str], ...] = (
    lambda chance, _: _hexadecimal(chance, chance.choice((7, 8, 16, 40, 64))),
    lambda chance, _: _uuid(chance),
    _path,
    _number,
    _address,
    lambda chance, _: _stamp(chance),
    lambda chance, _: f"v{chance.randrange(10)}.{chance.randrange(30)}.{chance.randrange(100)}",
    lambda chance, _: base64.b64encode(chance.randbytes(chance.randrange(6, 36))).decode(),
    lambda chance, corpus: "_".join(chance.choices(corpus.words, k=2)).lower(),
)


def identifier(chance: Random, corpus: Corpus) -> str:
    """A hash, a UUID, a path, a number, an address, a time, a version: what no one can guess."""
    return chance.choice(_IDENTIFIERS)(chance, corpus)


def _phrase(chance: Random, corpus: Corpus, most: int = 6) -> str:
    return " ".join(chance.choices(corpus.words, k=chance.randrange(1, most + 1)))


def _value(chance: Random, corpus: Corpus, depth: int) -> Any:
    """A value of JSON."""
    draw = chance.random()
    if depth and draw < 0.25:
        return {_key(chance, corpus): _value(chance, corpus, depth - 1) for _ in range(chance.randrange(1, 6))}
    if depth and draw < 0.4:
        return [_value(chance, corpus, depth - 1) for _ in range(chance.randrange(4))]
    if draw < 0.55:
        return chance.choice((None, True, False, chance.randrange(10**6), chance.randrange(10**12), chance.uniform(-1e3, 1e3)))
    return identifier(chance, corpus) if draw < 0.85 else _phrase(chance, corpus)


def _key(chance: Random, corpus: Corpus) -> str:
    return "_".join(chance.choices(corpus.words, k=chance.randrange(1, 3))).lower()


def _json(chance: Random, corpus: Corpus, length: int) -> str:
    indent, said = chance.choice((None, None, 1, 2, 2, 4)), ""
    separators = (",", ":") if indent is None and chance.random() < 0.5 else None
    while len(said) < length:
        value = {_key(chance, corpus): _value(chance, corpus, 3) for _ in range(chance.randrange(2, 8))}
        said += json.dumps(value, indent=indent, separators=separators, ensure_ascii=chance.random() < 0.5) + "\n"
    return said


def _log_line(chance: Random, corpus: Corpus, form: int) -> str:
    said, name, mark = _phrase(chance, corpus), chance.choice(corpus.words), identifier(chance, corpus)
    if form == 0:
        return f"{_stamp(chance)} {chance.choice(_LEVELS):<7} {name}: {said} {_key(chance, corpus)}={mark}"
    if form == 1:
        return f"[{chance.uniform(0, 1e5):12.6f}] {name}[{chance.randrange(1, 65536)}]: {said} ({mark})"
    if form == 2:
        request = f"{chance.choice(('GET', 'POST', 'PUT'))} {_path(chance, corpus)} HTTP/1.1"
        answer = f"{chance.choice((200, 204, 301, 404, 500))} {chance.randrange(10**6)}"
        return f'{_address(chance, corpus)} - - [{_stamp(chance)}] "{request}" {answer}'
    if form == 3:
        return f"{_hexadecimal(chance, 7)} {_path(chance, corpus)}:{chance.randrange(1, 4000)} {said}"
    done, length = chance.randrange(101), chance.randrange(10, 40)
    bar = ("█" * (done * length // 100)).ljust(length, chance.choice("░▒ "))
    return f"{name:<12} {done:3}% |{bar}| {chance.randrange(1000)}/{chance.randrange(1000)} [{chance.uniform(0, 99):.1f}s]"


def _logs(chance: Random, corpus: Corpus, length: int) -> str:
    form, said = chance.choices(range(5), (3, 3, 3, 3, 1))[0], ""
    while len(said) < length:
        said += _log_line(chance, corpus, form) + "\n"
    return said


def _cell(chance: Random, corpus: Corpus) -> str:
    draw = chance.random()
    said = _phrase(chance, corpus, 2) if draw < 0.5 else _number(chance, corpus) if draw < 0.93 else identifier(chance, corpus)
    return said.replace("|", "\\|")


def _table(chance: Random, corpus: Corpus) -> str:
    """A table of Markdown, its columns padded or not, one with drawn borders, or one of fields between tabs or commas."""
    columns = range(chance.randrange(2, 6))
    rows = [[_phrase(chance, corpus, 2) for _ in columns]]
    rows += [[_cell(chance, corpus) for _ in columns] for _ in range(chance.randrange(2, 14))]
    separator = chance.choices(("|", "\t", ","), (8, 1, 1))[0]
    if separator != "|":
        return "\n".join(separator.join(row) for row in rows)
    widths = [max(len(row[k]) for row in rows) if chance.random() < 0.8 else 3 for k in columns]
    padded = [[row[k].ljust(widths[k]) for k in columns] for row in rows]
    if chance.random() < 0.2:
        rule = ["─" * (width + 2) for width in widths]
        body = [f"│ {' │ '.join(row)} │" for row in padded]
        return "\n".join([f"┌{'┬'.join(rule)}┐", body[0], f"├{'┼'.join(rule)}┤", *body[1:], f"└{'┴'.join(rule)}┘"])
    ruler = [chance.choice(("-", ":")) + "-" * max(width - 2, 1) + chance.choice(("-", ":")) for width in widths]
    return "\n".join(f"| {' | '.join(row)} |" for row in [padded[0], ruler, *padded[1:]])


def _tree(chance: Random, corpus: Corpus) -> str:
    """Folders and files as they are listed in a terminal."""
    lines, stem = [_key(chance, corpus) + "/"], ""
    for _ in range(chance.randrange(3, 14)):
        is_last = chance.random() < 0.3
        lines.append(f"{stem}{'└── ' if is_last else '├── '}{_key(chance, corpus)}{chance.choice(_SUFFIXES)}")
        stem = stem[:-4] if is_last else chance.choice((stem, stem + "│   ", stem + "    "))[:24]
    return "\n".join(lines)


def _tables(chance: Random, corpus: Corpus, length: int) -> str:
    said = ""
    while len(said) < length:
        heading = "#" * chance.randrange(1, 4) + " " + _phrase(chance, corpus, 4).capitalize()
        said += f"{heading}\n\n{(_tree if chance.random() < 0.08 else _table)(chance, corpus)}\n\n"
    return said


def _message(chance: Random, corpus: Corpus) -> dict[str, Any]:
    """A message of a conversation between a user, an assistant and its tools."""
    role = chance.choice(("user", "user", "assistant", "assistant", "tool", "system"))
    message: dict[str, Any] = {"role": role, "content": excerpt(chance, corpus.prose, chance.randrange(20, 400)).rstrip()}
    if chance.random() < 0.3:
        message["name"] = chance.choice(corpus.words)
    if chance.random() < 0.3:
        message["timestamp"] = _stamp(chance)
    if role == "tool":
        message["tool_call_id"] = f"call_{_hexadecimal(chance, 24)}"
        message["content"] = chance.choice((_logs, _json, _code))(chance, corpus, chance.randrange(40, 400))
    if role == "assistant" and chance.random() < 0.5:
        arguments = json.dumps(_value(chance, corpus, 2))
        function = {"name": _key(chance, corpus), "arguments": arguments}
        message["tool_calls"] = [{"id": f"call_{_hexadecimal(chance, 24)}", "type": "function", "function": function}]
    return message


def _chats(chance: Random, corpus: Corpus, length: int) -> Keys:
    messages: list[dict[str, Any]] = []
    keys = np.empty(0, dtype=np.int64)
    while len(keys) < length:
        messages += [_message(chance, corpus) for _ in range(3 + length // 600)]
        keys = join_runs(read_messages(messages, rich=False)).keys
    return keys


# --- spice ----------------------------------------------------------------------------------------------------------------------


_SEASONS: tuple[tuple[float, Keys, tuple[float, ...]], ...] = (  # how often, from what, and which shares of the letters
    (0.12, _ALPHABET, (0.01, 0.03, 0.1)),
    (0.05, _FOREIGN, (0.005, 0.03)),
    (0.06, _ACCENTS, (0.02, 0.06)),
    (0.03, _MARKS, (0.01, 0.05)),
)
_TRANSLATED = 0.03  # share of the texts with words in another script


def season(keys: Keys, chance: Random) -> Keys:
    """Some letters of some texts become characters that English lacks, ones that must be escaped among them."""
    draw = chance.random()
    random = np.random.default_rng(chance.getrandbits(63))
    letters = np.flatnonzero((keys >= ord("A")) & (keys <= ord("z")))
    for share_of_texts, pool, shares in _SEASONS:
        if draw < share_of_texts:
            chosen = letters[random.random(len(letters)) < chance.choice(shares)]
            seasoned = keys.copy()
            seasoned[chosen] = pool[random.integers(len(pool), size=len(chosen))]
            return seasoned
        draw -= share_of_texts
    return _translated(keys, letters, chance, random) if draw < _TRANSLATED else keys


def _translated(keys: Keys, letters: NDArray[np.int64], chance: Random, random: np.random.Generator) -> Keys:
    """Some words or all of them in letters of another script."""
    word = np.cumsum((keys == ord(" ")) | (keys == ord("\n")))
    is_chosen = random.random(int(word[-1]) + 1) < chance.choice((0.05, 0.3, 1.0))
    chosen, (first, last) = letters[is_chosen[word[letters]]], chance.choice(_ALPHABETS)
    seasoned = keys.copy()
    seasoned[chosen] = random.integers(first, last + 1, size=len(chosen))
    return seasoned


_WRITERS: dict[PageKind, Callable[[Random, Corpus, int], str] | Callable[[Random, Corpus, int], Keys]] = {
    "prose": _prose,
    "paragraphs": _paragraphs,
    "shuffled": _shuffled,
    "words": _words,
    "characters": _characters,
    "symbols": _symbols,
    "code": _code,
    "json": _json,
    "logs": _logs,
    "tables": _tables,
    "chats": _chats,
}
