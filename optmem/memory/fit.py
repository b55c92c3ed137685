"""How well a line fits a question: the share of the question's words that stand in it, each worth the more the fewer lines have it.

What is sure of a hit is its reading; that it answers is another thing.  A question about what was never told finds lines that share
its common words, and this is what tells them apart.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping

from optmem.memory.words import spaced

FEW = 0.5  # of a question, below which a hit says that few of its words stand there
_WORDS = re.compile(r"[^\W_]+")
TOLD = 4  # of the words that are missing, named in a hit's note
# English words that ask or join and name nothing: a line that answers need not have them.
_JOINING = frozenset(
    re.findall(
        r"[a-z]+",
        """a an and any are as at be been but by can could did do does for from had has have how i if in is it its me my no not of
        on or our shall should so tell than that the their them then there these they this those to was we were what when where
        which who whom whose why will with would you your about again also all please show find give say said""",
    )
)


def plain(text: str) -> str:
    """Its words in small letters, each between blanks."""
    found = _WORDS.findall((spaced(text) or text).casefold())
    return f" {' '.join(found)} "


def stands_in(word: str, line: str) -> bool:
    """Whether a plain word stands in a plain line, whole."""
    return bool(word.strip()) and word in line


def worths(often: Mapping[str, int], lines: int) -> dict[str, float]:
    """What each word of a question is worth.

    often   how many lines have it
    lines   that there are
    """
    found = {word: math.log(1 + max(lines, 1) / (1 + count)) for word, count in often.items()}
    naming = {word: worth for word, worth in found.items() if _names(word)}
    return naming or found  # a question of joining words alone has nothing else


def _names(word: str) -> bool:
    said = plain(word).strip()
    return bool(said) and said not in _JOINING and (len(said) > 1 or not said.isascii() or said.isdecimal())


def fit(worth: Mapping[str, float], held: Iterable[str]) -> float:
    """From 0, none of the words that name something, to 1, all of them."""
    whole = sum(worth.values())
    return sum(worth.get(word, 0.0) for word in set(held)) / whole if whole else 1.0


def note(worth: Mapping[str, float], held: Iterable[str]) -> str:
    """What should be known of a line in which few of the words stand; "" of others."""
    there = set(held)
    if fit(worth, there) >= FEW:
        return ""
    missing = sorted((word for word in worth if word not in there), key=lambda word: -worth[word])
    rest = ", .." if len(missing) > TOLD else ""
    return f"few of the words asked for stand here: not {', '.join(missing[:TOLD])}{rest}"
