"""The facts of a page that optics reads badly, kept as text: hashes, addresses, paths, numbers, dates and quoted names.

A word that is misread is guessed right from its neighbours; one wrong digit of a hash looks as good as the right one.  So what no
neighbour predicts comes first: the kinds stand in FACTS in this order, and of one kind what has the most such characters.
Every pattern begins where a run of its characters begins and counts what it takes, so that any text is read in linear time.
"""

from __future__ import annotations

import re
from bisect import bisect_right
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Literal

from optmem.errors import InputError
from optmem.text.count import estimate_tokens

Kind = Literal["hash", "uuid", "key", "address", "email", "url", "number", "version", "path", "date", "quoted"]

_UNITS = (
    r"%|‰|°[CFK]?|[kMGTP]i?B|[kMG]?bit/s|[kMGT]?Hz|[µun]?[smg](?![a-z])|k[gmVWA]|m[msgAVW]|[cM][mWV]|GW|min|hours?|days?|h|d|V|A|W|K|€|\$|£"
    r"|px|ms|USD|EUR|tokens?|bytes|rows|lines|pages"
)
_MONTHS = r"(?:Jan|Feb|Mar|Apr|May|Jun|Jul|Aug|Sep|Oct|Nov|Dec)[a-z]{0,6}"
_TIME = r"\d{1,2}:\d{2}(?::\d{2}(?:[.,]\d{1,9})?)?(?:Z|[+-]\d{2}:?\d{2})?"
_DIGITS = r"\d{1,30}(?:[.,]\d{1,30}){0,10}"
_NUMBER = rf"(?<![\w.,-])[-+±]?{_DIGITS}(?:[-–]{_DIGITS})?(?:[eE][-+]?\d{{1,3}})?(?: ?(?:{_UNITS})(?!\w))?(?!\w)"
# In the order in which they are tried at one place: what says more comes first.
_PATTERNS: dict[str, str] = {
    "url": r"(?<![A-Za-z])(?:https?|ftp|file|s3|git|ssh|wss?|postgres(?:ql)?|redis)://[^\s<>\"'`]{1,2000}",
    "email": r"(?<![\w.+-])[A-Za-z0-9][\w.+-]{0,63}@[A-Za-z0-9-]{1,63}(?:\.[A-Za-z0-9-]{1,63}){1,6}",
    "uuid": r"(?<![\w-])[0-9a-fA-F]{8}(?:-[0-9a-fA-F]{4}){3}-[0-9a-fA-F]{12}(?![\w-])",
    "date": (
        rf"(?<![\w.:-])(?:\d{{4}}-\d{{2}}-\d{{2}}(?:[T ]{_TIME})?|\d{{1,2}}[./]\d{{1,2}}[./]\d{{4}}"
        rf"|\d{{1,2}}\.? {_MONTHS},? \d{{4}}|{_MONTHS} \d{{1,2}},? \d{{4}}|{_TIME})(?![\w-])"
    ),
    "address": r"(?<![\w.:])(?:\d{1,3}(?:\.\d{1,3}){3}(?:/\d{1,2}|:\d{1,5})?|[0-9a-fA-F]{2}(?::[0-9a-fA-F]{2}){5})(?![\w.])",
    "version": (
        r"(?<![\w.])(?:[vV]\d{1,6}(?:\.\d{1,6}){0,4}|\d{1,6}(?:\.\d{1,6}){2,4})"
        r"(?:[-+.]?(?:rc|alpha|beta|a|b|dev|post)\.?\d{0,6})?(?!\w)"
    ),
    "hash": r"(?<![\w-])(?:0x|sha256:|sha1:|md5:)?[0-9a-fA-F]{7,128}(?![\w-])",
    "path": (
        r"(?<![\w./\\~@+-])(?:~|\.{1,2})?/[\w.@+-]{1,128}(?:/[\w.@+-]{1,128}){0,40}/?"
        r"|(?<![\w\\])[A-Za-z]:\\[\w.@+ -]{1,128}(?:\\[\w.@+-]{1,128}){0,40}"
        r"|(?<![\w./\\@+-])[\w.@+-]{1,128}(?:/[\w.@+-]{1,128}){1,40}"
    ),
    # All that hangs together, so that no number is cut out of a name; a name it is only where `_says` has it so.
    "key": r"(?<![\w.-])(?=[\d_-]{0,64}[A-Za-z])[A-Za-z0-9][\w-]{3,255}(?:\.\d[\w-]{0,64}){0,8}(?![\w-])",
    "number": _NUMBER,
    "quoted": r"(?<!\w)(?P<mark>[`\"'])(?P<inside>[^\s`\"']{2,80})(?P=mark)",
}
_WITH_UNIT = re.compile(_NUMBER)
_ANY = re.compile("|".join(f"(?P<{name}>{pattern})" for name, pattern in _PATTERNS.items()))
FACTS: tuple[Kind, ...] = ("hash", "uuid", "key", "address", "email", "url", "number", "version", "path", "date", "quoted")
MANY_NUMBERS = 4  # on one row
_TRIM = ".,;:!?)]}"  # what a sentence puts behind an address


@dataclass(frozen=True, slots=True)
class Fact:
    """One fact, as it stands on the page."""

    text: str
    kind: Kind
    row: int  # of the page, from 0, where it stands first


@dataclass(frozen=True, slots=True)
class Factsheet:
    """The facts of a page that found a place, from the top of the page down."""

    facts: tuple[Fact, ...]
    tokens: int  # of `text()`
    left_out: int = 0  # that found none
    share: float = 0.0  # of the page's characters that are kept here

    def text(self) -> str:
        """One row of the page a line: its number, and the facts on it."""
        return _text_of(self.facts)


def factsheet(page: str | Sequence[str], budget: int = 64, *, count: Callable[[str], int] = estimate_tokens) -> Factsheet:
    """The facts of a page within so many tokens.

    page    its text, or its rows: what is broken over two rows is one fact
    count   tokens of a text for the model that is to read it

    The same page gives the same facts.  Raises InputError for a budget below 0.
    """
    if isinstance(budget, bool) or not isinstance(budget, int) or budget < 0:
        raise InputError(f"the budget of a factsheet is a whole number of tokens, at least 0, got {budget!r}")
    rows = page.splitlines(keepends=True) if isinstance(page, str) else list(page)
    found = find_facts(rows)
    kept = _within(_ranked(found), budget, count)
    shown = tuple(fact for fact in found if fact in kept)
    length = sum(map(len, rows))
    share = min(sum(len(fact.text) for fact in shown) / length, 1.0) if length else 0.0
    return Factsheet(shown, count(_text_of(shown)) if shown else 0, len(found) - len(shown), share)


def find_facts(rows: Sequence[str]) -> list[Fact]:
    """Every fact of a page once, in the order in which they stand on it."""
    starts = list(accumulate(map(len, rows), initial=0))
    text = "".join(rows)
    found: dict[str, Fact] = {}
    for match in _ANY.finditer(text):
        named = _named(match)
        if named is not None and named[0] not in found:
            found[named[0]] = Fact(*named, row=bisect_right(starts, match.start(), hi=len(rows)) - 1)
    return list(found.values())


def _named(match: re.Match[str]) -> tuple[str, Kind] | None:
    """A fact and its kind; None where a pattern found a plain word."""
    kind, text = match.lastgroup, match.group()
    if match["quoted"] is not None:
        text = match["inside"]
        inner = _ANY.fullmatch(text)
        kind = _kind_of(inner) if inner else None
        return (text, kind if kind in FACTS and kind and _says(text, kind) else "quoted")
    kind = _kind_of(match)
    if kind in ("url", "path", "email"):
        text = text.rstrip(_TRIM)
    if kind == "path" and not _is_path(text):
        return None
    if kind in ("hash", "key") and not _says(text, kind):
        kind = "number" if _WITH_UNIT.fullmatch(text) else None
    if kind == "number" and not _is_number(text):
        return None
    return None if kind is None else (text, kind)  # type: ignore[return-value]


def _kind_of(match: re.Match[str]) -> str | None:
    return next((kind for kind in _PATTERNS if match[kind] is not None), None)


def _says(text: str, kind: str) -> bool:
    """Whether this can be no word: a hash has letters and digits, a key several of both, or three digits behind - or _."""
    digits = sum(char.isdecimal() for char in text)
    letters = sum(char.isalpha() for char in text)
    if kind == "hash":
        return text.startswith(("0x", "sha", "md5")) or (digits >= 2 and letters >= 1) or (len(text) >= 24 and digits >= 1)
    if kind == "key":
        is_parted = text[0].isalpha() and ("-" in text or "_" in text)
        return digits >= 3 and letters >= (1 if is_parted else 2) and (len(text) >= 12 or is_parted or digits >= 4)
    return True


def _is_path(text: str) -> bool:
    """ "and/or" is none, "src/main.py" is."""
    return text[:1] in ("/", "~", ".") or ":\\" in text or text.count("/") >= 2 or "." in text.rpartition("/")[2][1:]


def _is_number(text: str) -> bool:
    """A unit, a fraction, a sign of four digits or more; the small numbers of prose are none."""
    digits = sum(char.isdecimal() for char in text)
    return digits >= 4 or (digits >= 2 and ("." in text or "," in text)) or not text[-1].isdecimal()


def _ranked(found: Sequence[Fact]) -> list[Fact]:
    """The best first.  A row of many numbers is one of a table, such as of sizes: those come last."""
    numbers = Counter(fact.row for fact in found if fact.kind == "number")
    return sorted(found, key=lambda fact: (fact.kind == "number" and numbers[fact.row] >= MANY_NUMBERS, _rank(fact)))


def _rank(fact: Fact) -> tuple[int, int, int, str]:
    unpredicted = sum(not char.isalpha() for char in fact.text) if fact.kind not in ("hash", "uuid", "key") else len(fact.text)
    return FACTS.index(fact.kind), -unpredicted, fact.row, fact.text


def _within(ranked: Sequence[Fact], budget: int, count: Callable[[str], int]) -> set[Fact]:
    """Those that fit, the first first.  Tokens of texts joined are about the sum of theirs; what is over at the end goes again."""
    kept: list[Fact] = []
    left = budget
    for fact in ranked:
        if left <= 0:
            break
        cost = count(f"{fact.row + 1}: {fact.text}\n")
        if cost <= left:
            kept.append(fact)
            left -= cost
    while kept and count(_text_of(sorted(kept, key=lambda fact: fact.row))) > budget:
        kept.pop()
    return set(kept)


def _text_of(facts: Sequence[Fact]) -> str:
    rows: dict[int, list[str]] = {}
    for fact in facts:
        rows.setdefault(fact.row, []).append(fact.text)
    return "".join(f"{row + 1}: {'  '.join(texts)}\n" for row, texts in sorted(rows.items()))
