"""Ids to text, all at once or as they come: a delta never ends inside a character, and the deltas joined are the whole.

Tokens of a byte-level vocabulary are bytes, and a character may span several of them.  Bytes that are no UTF-8 become U+FFFD.
Special tokens are kept as text: the tags around blocks and boxes are special tokens (parse.py reads them).
"""

from __future__ import annotations

import codecs
from collections.abc import Iterable

from optmem.text.tokenizer import Tokenizer


def decode(tokenizer: Tokenizer, ids: Iterable[int]) -> str:
    """The text of these ids."""
    return b"".join(map(tokenizer.token_bytes, ids)).decode("utf-8", "replace")


class Detokenizer:
    """The same, one id at a time; one object for one sequence."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def add(self, token: int) -> str:
        """The characters that this id completes; often one word, sometimes nothing."""
        return self._decoder.decode(self._tokenizer.token_bytes(token))

    def finish(self) -> str:
        """What the end makes of bytes that were still waiting for the rest of their character: U+FFFD or nothing."""
        return self._decoder.decode(b"", final=True)
