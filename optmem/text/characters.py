"""The tokenizer of nano: one id for everything that a cell of a page can say, and names for what no cell can.

    id 0 ..        <bos> <pad> <image> <end> <eol> <row_0> .. <row_127>     special: no text becomes one of them
    behind them    one id a symbol: printable ASCII, Latin-1, typographic marks, box drawing, the marks of pages/symbols.py

Symbols of a page and ids are thus the same thing under two names.  A text's ids are the symbols that draw it: a line end is the
return arrow, and what the alphabet has no symbol for is its escape in white on black, which `read_symbols` turns back.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from optmem.errors import CheckpointError
from optmem.files import parse_json
from optmem.pages import symbols

CHARACTERS = "characters.json"
IMAGE = "<image>"
BOS, PAD, END, EOL = "<bos>", "<pad>", "<end>", "<eol>"
MAX_ROWS = 128
NAMES = (BOS, PAD, IMAGE, END, EOL)
MAX_SYMBOLS = 1 << 16

_LATIN_1 = "".join(map(chr, (*range(0xA1, 0xAD), *range(0xAE, 0x100))))  # without the no-break space and the soft hyphen
_SIGNS = "ŒœŠšŽžŸƒ–—‘’‚“”„†‡•…‰‹›€™‑′″←↑→↓↔↕⇐⇒⇔−∞≈≠≡≤≥√∑∏∫∂∆∈∀∃∅∩∪■▲▼●○✓✗★"
_BOXES = "".join(map(chr, range(0x2500, 0x25A0)))
_NEEDED = symbols.LINE_END + symbols.TEXT_END + symbols.TAB + symbols.inverse(symbols.PRINTABLE_ASCII)  # to say any text at all
ALPHABET = "".join(dict.fromkeys(_NEEDED + symbols.PRINTABLE_ASCII + _LATIN_1 + _BOXES + _SIGNS))


def row_name(row: int) -> str:
    """The special token that makes a decoder read this row."""
    return f"<row_{row}>"


class CharacterTokenizer:
    """Ids of an alphabet of single symbols, from a small JSON file."""

    def __init__(self, content: bytes) -> None:
        fields = parse_json(content, CHARACTERS)
        self.alphabet, rows = _alphabet(fields), _rows(fields)
        self._names = (*NAMES, *map(row_name, range(rows)))
        self._specials = {name: number for number, name in enumerate(self._names)}
        self.num_rows, self.first_symbol = rows, len(self._names)
        self._ids = {symbol: self.first_symbol + place for place, symbol in enumerate(self.alphabet)}

    @property
    def vocab_size(self) -> int:
        """One more than the largest id."""
        return self.first_symbol + len(self.alphabet)

    @property
    def special_ids(self) -> frozenset[int]:
        """Ids that no text encodes to."""
        return frozenset(range(self.first_symbol))

    def encode(self, text: str) -> list[int]:
        """The ids of the symbols that draw a text.  Private code points are escaped, so a text cannot spell our marks."""
        ids: list[int] = []
        for char in text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace"):
            ids += [self._ids[symbol] for symbol in self._drawn(char)]
        return ids

    def _drawn(self, char: str) -> str:
        if char in _SAID_BY_MARKS:
            return _SAID_BY_MARKS[char]
        is_plain = char in self._ids and symbols.is_drawable(ord(char))
        return char if is_plain else symbols.escape(ord(char))

    def special(self, name: str) -> int:
        """The id of a special token by its name."""
        if name not in self._specials:
            raise CheckpointError(f"{CHARACTERS} has no token {name[:80]!r}, which this model needs")
        return self._specials[name]

    def token_bytes(self, token: int) -> bytes:
        """What an id adds to the UTF-8 of a text; nothing for fillers, and of an escape its letters: `text` reads those."""
        if 0 <= token < self.first_symbol:
            return self._names[token].encode()
        symbol = self.symbols([token])
        return symbols.plain(symbol).encode() if symbol in _INVERSE else symbols.read_symbols(symbol).encode()

    def symbols(self, ids: Iterable[int]) -> str:
        """The symbols of ids; special tokens say nothing."""
        first, last = self.first_symbol, self.vocab_size
        return "".join(self.alphabet[token - first] for token in ids if first <= token < last)

    def text(self, ids: Iterable[int]) -> str:
        """The text that the ids of a page say, escapes read."""
        return symbols.read_symbols(self.symbols(ids))

    def ids_of(self, codes: NDArray[np.uint32]) -> NDArray[np.int64]:
        """The ids of a page's symbols (Page.characters), -1 for those outside the alphabet."""
        return np.where(codes < len(self._table), self._table[np.minimum(codes, len(self._table) - 1)], -1)

    @cached_property
    def _table(self) -> NDArray[np.int64]:
        table = np.full(max(map(ord, self.alphabet)) + 1, -1, dtype=np.int64)
        table[[ord(symbol) for symbol in self.alphabet]] = np.arange(self.first_symbol, self.vocab_size)
        return table

    @property
    def rows(self) -> range:
        """The ids of `<row_0>` and those after it."""
        return range(len(NAMES), self.first_symbol)


_SAID_BY_MARKS = {"\n": symbols.LINE_END, "\t": symbols.TAB}
_INVERSE = frozenset(symbols.inverse(symbols.PRINTABLE_ASCII))


def characters_json(alphabet: Sequence[str] = ALPHABET, rows: int = MAX_ROWS) -> bytes:
    """The file of a tokenizer."""
    return json.dumps({"kind": "characters", "rows": rows, "symbols": "".join(alphabet)}).encode()


def _alphabet(fields: dict[str, object]) -> str:
    alphabet = fields.get("symbols")
    if fields.get("kind") != "characters" or not isinstance(alphabet, str) or not 0 < len(alphabet) <= MAX_SYMBOLS:
        raise CheckpointError(f"{CHARACTERS} must be of kind characters and have symbols, at most {MAX_SYMBOLS:,}")
    if len(set(alphabet)) < len(alphabet) or any(0xD800 <= ord(symbol) < 0xE000 for symbol in alphabet):
        raise CheckpointError(f"{CHARACTERS} has a symbol twice, or one that is half a character")
    if not set(_NEEDED) <= set(alphabet):
        raise CheckpointError(f"{CHARACTERS} lacks marks or escapes, without which not every text can be said")
    return alphabet


def _rows(fields: dict[str, object]) -> int:
    rows = fields.get("rows")
    if type(rows) is not int or not 0 < rows <= MAX_ROWS:
        raise CheckpointError(f"{CHARACTERS}: rows must be a whole number from 1 to {MAX_ROWS}, got {str(rows)[:40]}")
    return rows
