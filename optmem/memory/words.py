"""The text of the lexical index: how lines are cut into words, and how what a person asks becomes a query that cannot be malformed.

SQLite's unicode61 tokenizer cuts at spaces and signs.  Chinese, Japanese and Thai have no spaces between words, so every sign of
theirs is set apart, and a word of several signs is asked for as a phrase.
"""

from __future__ import annotations

import re

_UNSPACED = re.compile(
    r"[\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u2e80-\u2fdf\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff\U00020000-\U0003ffff]"
)
MAX_WORDS = 32  # of a question: each is one look into the index


def spaced(text: str) -> str | None:
    """The text with such signs set apart; None where it has none."""
    return _UNSPACED.sub(r" \g<0> ", text) if _UNSPACED.search(text) else None


def words(question: str) -> tuple[str, ...]:
    """The different words of a question, in order; a run of signs is one word."""
    clean = question.encode("utf-8", "replace").decode().replace("\0", " ")
    found = re.findall(r"[^\s\"]+", clean)
    return tuple(dict.fromkeys(word for word in found if any(letter.isalnum() for letter in word)))[:MAX_WORDS]


def phrase(word: str) -> str:
    """A word as a phrase of FTS5: its parts next to each other, in order.  Quoted, so that nothing in it is syntax."""
    return '"' + (spaced(word) or word).replace('"', '""') + '"'
