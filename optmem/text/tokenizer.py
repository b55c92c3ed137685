"""Tokenizers: text to ids that a model was trained on, ids to bytes.  Which one serves a checkpoint is chosen by its files.

Text and special tokens never mix.  A tokenizer of the public kind looks for ``<image>`` and its like in every text it is given, so
that a user, or a page being quoted, could forge a picture or an end.  Here the special tokens are cut out of the vocabulary file
before the tokenizer is built: it does not know them, whatever a text spells.  A prompt names them (prompts.py), or there are none.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import Protocol

import tokenizers

from optmem.errors import CheckpointError, InputError
from optmem.files import checkpoint_folder, parse_json, read_inside
from optmem.text.characters import CHARACTERS, CharacterTokenizer

TOKENIZER = "tokenizer.json"
MAX_TOKENIZER = 64 << 20  # bytes; DeepSeek's is 8 MB
MAX_ID = 1 << 21

# Special tokens by the names that the public files give them.  The bars of the first three are U+FF5C.
BOS = "<｜begin▁of▁sentence｜>"
EOS = "<｜end▁of▁sentence｜>"
PAD = "<｜▁pad▁｜>"
IMAGE = "<image>"
REF, REF_END = "<|ref|>", "<|/ref|>"
DET, DET_END = "<|det|>", "<|/det|>"
GROUNDING = "<|grounding|>"


class Tokenizer(Protocol):
    """What the rest of optmem needs of a tokenizer."""

    @property
    def vocab_size(self) -> int:
        """One more than the largest id; a model may have more rows."""

    @property
    def special_ids(self) -> frozenset[int]:
        """Ids that no text encodes to."""

    def encode(self, text: str) -> list[int]:
        """The ids of a text, none of them special, whatever the text spells.  Lone surrogates are read as U+FFFD."""

    def special(self, name: str) -> int:
        """The id of a special token by its name.  Raises CheckpointError where the tokenizer has none of it."""

    def token_bytes(self, token: int) -> bytes:
        """What an id adds to the UTF-8 of a text, special tokens by their names; nothing where the vocabulary has no such id."""


class BytePairTokenizer:
    """Byte-level BPE from tokenizer.json, as all public families have it."""

    def __init__(self, content: bytes) -> None:
        fields = parse_json(content, TOKENIZER)
        self._specials = _added_tokens(fields)
        # Neither truncated nor padded nor framed: callers get the ids of exactly this text.
        plain = {**fields, "added_tokens": [], "truncation": None, "padding": None, "post_processor": None}
        self._encoder = _build(plain)
        self._bytes = _token_table(self._encoder, self._specials)
        self._check()

    @property
    def vocab_size(self) -> int:
        """One more than the largest id."""
        return len(self._bytes)

    @property
    def special_ids(self) -> frozenset[int]:
        """Ids that no text encodes to."""
        return self._special_ids

    def encode(self, text: str) -> list[int]:
        """The ids of a text, none of them special, whatever the text spells.  Lone surrogates are read as U+FFFD."""
        ids: list[int] = self._encoder.encode(_encodable(text), add_special_tokens=False).ids
        if not self._special_ids.isdisjoint(ids):  # a vocabulary made to do so; _check has tried the names, not every text
            raise InputError("this tokenizer makes special tokens out of plain text, so the text is refused")
        return ids

    def special(self, name: str) -> int:
        """The id of a special token by its name."""
        if name not in self._specials:
            raise CheckpointError(f"{TOKENIZER} has no token {name!r}, which this model needs")
        return self._specials[name]

    def token_bytes(self, token: int) -> bytes:
        """What an id adds to the UTF-8 of a text; nothing where the vocabulary has no such id."""
        return self._bytes[token] if 0 <= token < len(self._bytes) else b""

    def _check(self) -> None:
        self._special_ids = frozenset(self._specials.values())
        for name in self._specials:
            if not self._special_ids.isdisjoint(self._encoder.encode(_encodable(name), add_special_tokens=False).ids):
                raise CheckpointError(f"{TOKENIZER}: plain text can become the special token {name!r}")
        if not self._specials:
            raise CheckpointError(f"{TOKENIZER} has no special tokens; a model that reads pages needs {IMAGE!r}")


def has_tokenizer(folder: str | os.PathLike[str]) -> bool:
    """Whether a checkpoint has a tokenizer of any kind, broken or not.  A model can do without; one that is broken is an error."""
    return _file_name(checkpoint_folder(folder)) is not None


def tokenizer_name(folder: str | os.PathLike[str]) -> str:
    """The name of the file that the tokenizer of a checkpoint comes from.  Raises CheckpointError where there is none."""
    name = _file_name(checkpoint_folder(folder))
    if name is None:
        raise CheckpointError(f"the folder has no tokenizer: none of {', '.join(_READERS)}")
    return name


def tokenizer_file(folder: str | os.PathLike[str]) -> bytes:
    """The bytes of that file, to be saved beside the model again."""
    return read_inside(checkpoint_folder(folder), tokenizer_name(folder), limit=MAX_TOKENIZER)


def load_tokenizer(folder: str | os.PathLike[str]) -> Tokenizer:
    """The tokenizer of a checkpoint, chosen by the files that are there.  Raises CheckpointError where none can be used."""
    return _READERS[tokenizer_name(folder)](tokenizer_file(folder))


def _file_name(folder: Path) -> str | None:
    """A link that leads nowhere counts: whoever made it meant the model to have a tokenizer."""
    return next((name for name in _READERS if os.path.lexists(folder / name)), None)


# One row for every kind of vocabulary; the first whose file is there serves.
_READERS: dict[str, Callable[[bytes], Tokenizer]] = {TOKENIZER: BytePairTokenizer, CHARACTERS: CharacterTokenizer}


def _encodable(text: str) -> str:
    """The text with surrogate pairs joined and lone ones as U+FFFD: what UTF-8 can say."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")
    return text


def _added_tokens(fields: dict[str, object]) -> dict[str, int]:
    """Name to id of every added token: all are special here, whether the file calls them so or not."""
    added = fields.get("added_tokens", [])
    if not isinstance(added, list):
        raise CheckpointError(f"{TOKENIZER}: added_tokens must be a list")
    specials: dict[str, int] = {}
    for token in added:
        name, number = (token.get("content"), token.get("id")) if isinstance(token, dict) else (None, None)
        if not isinstance(name, str) or not name or type(number) is not int or not 0 <= number < MAX_ID:
            raise CheckpointError(f"{TOKENIZER}: every added token needs a content and an id from 0 to {MAX_ID:,}")
        if _encodable(name) != name or name in specials:
            raise CheckpointError(f"{TOKENIZER}: the added token {name[:80]!r} is no text, or stands there twice")
        specials[name] = number
    return specials


def _build(fields: dict[str, object]) -> tokenizers.Tokenizer:
    model, decoder = fields.get("model"), fields.get("decoder")
    if not isinstance(model, dict) or model.get("type") != "BPE":
        raise CheckpointError(f"{TOKENIZER} must hold a BPE model")
    if not isinstance(decoder, dict) or decoder.get("type") != "ByteLevel":
        raise CheckpointError(f"{TOKENIZER} must have a ByteLevel decoder")
    if model.get("dropout"):
        raise CheckpointError(f"{TOKENIZER}: dropout would encode a text differently every time")
    try:
        return tokenizers.Tokenizer.from_str(json.dumps(fields))
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:  # the library raises plain Exception, and its panics are not even that
        raise CheckpointError(f"{TOKENIZER} cannot be used: {str(error)[:200]}") from None


def _token_table(encoder: tokenizers.Tokenizer, specials: dict[str, int]) -> list[bytes]:
    """The bytes of every id, b"" for ids that no token has."""
    vocabulary = encoder.get_vocab(with_added_tokens=False)
    named = {**{token: number for token, number in vocabulary.items() if token not in specials}, **specials}
    numbers = sorted(named.values())
    if len(set(numbers)) < len(numbers) or any(vocabulary.get(name, number) != number for name, number in specials.items()):
        raise CheckpointError(f"{TOKENIZER}: two tokens share an id, or one token has two")
    if numbers[-1] >= MAX_ID:
        raise CheckpointError(f"{TOKENIZER}: ids must lie below {MAX_ID:,}, got {numbers[-1]:,}")
    table = [b""] * (numbers[-1] + 1)
    for token, number in named.items():
        table[number] = token.encode() if token in specials else _bytes_of(token)
    return table


def _bytes_of(token: str) -> bytes:
    """The bytes that a byte-level token stands for; one with other characters stands for itself."""
    alphabet = _byte_alphabet()
    try:
        return bytes(alphabet[char] for char in token)
    except KeyError:
        return token.encode()


@lru_cache(maxsize=1)
def _byte_alphabet() -> dict[str, int]:
    """GPT-2's: printable Latin-1 characters stand for their byte, the other 68 bytes for U+0100 onwards in order."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(0x100 + index): byte for index, byte in enumerate(others)}
