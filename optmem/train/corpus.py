"""Text for training, and text held out from it.

Documents are split by a hash of their names, so every machine holds out the same ones.  A line of a held-out document that shares
60 characters in a row with anything in training is dropped, so what is held out was never seen.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal, get_args

import numpy as np
from numpy.typing import NDArray

from optmem.config import check_choice
from optmem.errors import InputError, OutputError, SourceNotFoundError
from optmem.train.sources import MIN_LENGTH, Document, TextKind, collect, read_words

Split = Literal["train", "held-out"]
WINDOW = 60  # characters
HELD_OUT = 0.04  # of all documents
BETWEEN = "\n\n"  # documents
_FALLBACK_WORDS = 50_000

Hashes = NDArray[np.uint64]


@dataclass(frozen=True)
class Corpus:
    """One side of the split, as UTF-8, and the words that pages are made of."""

    prose: bytes
    code: bytes
    words: tuple[str, ...]

    @property
    def fingerprint(self) -> str:
        """What two runs must share to see the same pages."""
        digest = hashlib.sha256()
        for part in (self.prose, self.code, "\n".join(self.words).encode()):
            digest.update(len(part).to_bytes(8, "little") + part)
        return digest.hexdigest()[:16]


def split_of(name: str) -> Split:
    """On which side a document lies.  Frozen: changing this would let an old checkpoint be tested on what it has seen."""
    digest = hashlib.sha256(f"optmem split 1\0{name}".encode()).digest()
    return "held-out" if int.from_bytes(digest[:8], "big") < HELD_OUT * 2**64 else "train"


# --- windows --------------------------------------------------------------------------------------------------------------------


def window_hashes(text: str, length: int = WINDOW) -> Hashes:
    """A hash of every stretch of `length` characters: polynomials modulo 2^64, made from one running sum.  [n - length + 1]"""
    codes = np.frombuffer(text.encode("utf-32-le", "surrogatepass"), dtype="<u4").astype(np.uint64)
    if len(codes) < length:
        return np.empty(0, dtype=np.uint64)
    mixed = (codes + np.uint64(0x9E37)) * np.uint64(0x9E3779B97F4A7C15)
    mixed ^= mixed >> np.uint64(29)
    base = np.uint64(0xD1342543DE82EF95)
    powers = np.cumprod(np.full(len(codes), base, dtype=np.uint64))
    sums = np.concatenate([np.zeros(1, dtype=np.uint64), np.cumsum(mixed * powers)])
    windows = sums[length:] - sums[:-length]
    inverse = np.uint64(pow(int(base), -1, 2**64))
    hashes: Hashes = windows * np.cumprod(np.full(len(windows), inverse, dtype=np.uint64))  # as if each began at the same place
    return hashes


class Seen:
    """The windows of training, looked up through a table of bits that turns most strangers away."""

    _BITS = 26

    def __init__(self, texts: Iterable[str]) -> None:
        self._sorted = np.concatenate([np.empty(0, dtype=np.uint64), *map(window_hashes, texts)])
        self._sorted.sort()  # in place, repeats and all: np.unique took 70 s for 45 million, this takes 5
        self._table = np.zeros(2**self._BITS, dtype=np.bool_)
        self._table[self._sorted >> np.uint64(64 - self._BITS)] = True

    def find(self, text: str) -> NDArray[np.bool_]:
        """Which windows of a text are among these."""
        hashes = window_hashes(text)
        found: NDArray[np.bool_] = self._table[hashes >> np.uint64(64 - self._BITS)]
        near = np.searchsorted(self._sorted, hashes[found]).clip(max=max(len(self._sorted) - 1, 0))
        if len(near):
            found[found] = self._sorted[near] == hashes[found]
        return found


def without_seen(text: str, seen: Seen) -> str:
    """The lines of a text that share no window with what was seen; no window of the result does."""
    while (shared := seen.find(text)).any():
        marked = np.zeros(len(text) + 1, dtype=np.int64)
        starts = np.flatnonzero(shared)
        np.add.at(marked, starts, 1)
        np.add.at(marked, starts + WINDOW, -1)
        covered = np.concatenate([[0], np.cumsum(np.cumsum(marked[:-1]) > 0)])
        kept, at = [], 0
        for line in text.split("\n"):
            if covered[min(at + max(len(line), 1), len(text))] == covered[at]:  # an empty line is its line end
                kept.append(line)
            at += len(line) + 1
        text = "\n".join(kept)
    return text


# --- the two sides --------------------------------------------------------------------------------------------------------------


def split(documents: Sequence[Document]) -> dict[Split, list[Document]]:
    """Both sides, the held-out one without what training shares with it."""
    train = [document for document in documents if split_of(document.name) == "train"]
    seen = Seen(document.text for document in train)
    cut = (
        replace(document, text=without_seen(document.text, seen)) for document in documents if split_of(document.name) == "held-out"
    )
    return {"train": train, "held-out": [document for document in cut if len(document.text.strip()) >= MIN_LENGTH]}


def make_corpus(documents: Iterable[Document], words: Sequence[str] = ()) -> Corpus:
    """The texts of documents, joined.  Without a word list the words are those of the texts."""
    texts: dict[TextKind, list[str]] = {"prose": [], "code": []}
    for document in documents:
        texts[document.kind].append(document.text.strip("\n"))
    prose, code = (BETWEEN.join(texts[kind]) + "\n" for kind in ("prose", "code"))
    if not prose.strip():
        raise InputError("a corpus needs prose, and none of its documents has any")
    code = code if code.strip() else prose
    return Corpus(prose.encode("utf-8", "replace"), code.encode("utf-8", "replace"), _words(words, prose))


def _words(words: Sequence[str], prose: str) -> tuple[str, ...]:
    if words:
        return tuple(words)
    found = {word for word in prose.split() if word.isalpha()}
    return tuple(sorted(found)[:_FALLBACK_WORDS]) or ("word",)


# --- on disk --------------------------------------------------------------------------------------------------------------------


def build(folder: Path) -> None:
    """Collects what this machine has and writes both sides to a folder, with a note of what is in it."""
    documents = collect()
    sides = split(documents)
    words = read_words()
    note = {side: _count(sides[side]) for side in get_args(Split)} | {"words": len(words)}
    try:
        for side in get_args(Split):
            corpus = make_corpus(sides[side], words or _words((), make_corpus(sides["train"]).prose.decode()))
            (folder / side).mkdir(parents=True, exist_ok=True)
            (folder / side / "prose.txt").write_bytes(corpus.prose)
            (folder / side / "code.txt").write_bytes(corpus.code)
            (folder / side / "words.txt").write_text("\n".join(corpus.words), encoding="utf-8")
        (folder / "corpus.json").write_text(json.dumps(note, indent=2) + "\n", encoding="utf-8")  # last: it says that all is there
    except OSError as error:
        raise OutputError(f"cannot write the corpus to {folder}: {error.strerror}") from None


def _count(documents: Sequence[Document]) -> dict[str, dict[str, int]]:
    """Documents and characters by source and kind."""
    counts: dict[str, dict[str, int]] = {}
    for document in documents:
        source = counts.setdefault(f"{document.name.split('/')[0]} {document.kind}", {"documents": 0, "characters": 0})
        source["documents"] += 1
        source["characters"] += len(document.text)
    return counts


def load(folder: Path, side: Split = "train") -> Corpus:
    """One side of a corpus that `build` wrote."""
    check_choice("side", side, Split)
    if not (folder / "corpus.json").is_file():
        raise SourceNotFoundError(f"{folder} holds no corpus: make one with `optmem synth --corpus {folder}`")
    read = {name: (folder / side / f"{name}.txt").read_bytes() for name in ("prose", "code", "words")}
    return Corpus(read["prose"], read["code"], tuple(read["words"].decode().split("\n")))


def open_corpus(folder: Path, side: Split = "train") -> Corpus:
    """One side of the corpus in a folder, which is made first where it is not there."""
    if not (folder / "corpus.json").is_file():
        build(folder)
    return load(folder, side)
