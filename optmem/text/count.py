"""How many tokens a text would cost a language model, estimated without a vocabulary.

A byte-pair vocabulary of 200,000 entries is megabytes, and every model has its own.  This counts the pieces such tokenizers split
text into and weighs them; the weights are a least-squares fit to o200k_base over 300 samples of prose, Markdown, Python, JavaScript
and JSON.  Over those kinds the mean error is at most 3 %, and the standard deviation on a sample of 6,000 characters at most 8 %.
"""

from __future__ import annotations

import re

_PIECES = re.compile(
    r" ?(?P<word>[A-Za-z]+)"
    r"|(?P<number>\d{1,3})"
    r"|(?P<cjk>[\u3040-\u30ff\u3400-\u9fff\uac00-\ud7af])"
    r"| ?(?P<letters>[^\W\d_A-Za-z\u3040-\u30ff\u3400-\u9fff\uac00-\ud7af]+)"
    r"| ?(?P<signs>[^\w\s]+|_+)"
    r"|(?P<space>\s+)"
)
_LONG_WORD = 6  # letters beyond which a word is likely to be split
_PER_PIECE = {"word": 0.866, "number": 1.459, "cjk": 0.83, "letters": 0.0, "signs": 0.0, "space": 1.919}
_PER_CHARACTER = {"word": 0.159, "number": 0.0, "cjk": 0.0, "letters": 0.254, "signs": 0.49, "space": 0.0}


def estimate_tokens(text: str) -> int:
    """About how many tokens of a 200,000-entry vocabulary the text takes; 0 for an empty text, else at least 1."""
    total = 0.0
    for piece in _PIECES.finditer(text):
        kind = piece.lastgroup
        assert kind is not None, "every alternative is named"
        start, end = piece.span(kind)
        free = _LONG_WORD if kind == "word" else 0
        total += _PER_PIECE[kind] + _PER_CHARACTER[kind] * max(end - start - free, 0)
    return max(round(total), 1) if text else 0
