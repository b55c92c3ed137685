"""What goes into the store and comes out of it.  Plain values: no tensors, no pictures, bytes and text only."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, field

from optmem.errors import InputError

_PAGE_ID = re.compile(r"[0-9a-f]{64}")
_WORD = re.compile(r"[a-z][a-z0-9_-]{0,31}")
_INTEGER = range(-(1 << 63), 1 << 63)  # what SQLite calls an integer


@dataclass(frozen=True, slots=True)
class NewMessage:
    """A message as it is added."""

    role: str
    content: str = field(repr=False)  # the whole message as canonical JSON
    tokens: int  # in the reader's own tokens
    time: float  # seconds since 1970, as the caller's clock says; the order is that of adding, not of clocks
    joins: bool = False  # belongs to the group of the message before it: a tool's result to its call
    lines: tuple[str, ...] = field(default=(), repr=False)  # what the index finds it by until pages show it

    def __post_init__(self) -> None:
        check_word(self.role, "a role")
        check_integer(self.tokens, "a message's tokens", least=0)
        check_number(self.time, "a message's time")


@dataclass(frozen=True, slots=True)
class StoredMessage:
    """A message as it is kept."""

    seq: int  # its place in the history, from 1; never given twice
    group: int  # seq of the first message of its group
    role: str
    content: str | None = field(repr=False)  # None once only pages show it
    tokens: int
    time: float


@dataclass(frozen=True, slots=True)
class NewLine:
    """A row of a page, for the index."""

    row: int
    text: str = field(repr=False)
    first: int  # seq of the messages that the row shows
    last: int

    def __post_init__(self) -> None:
        for value in (self.row, self.first, self.last):
            check_integer(value, "a line's row and messages", least=0)


@dataclass(frozen=True, slots=True)
class NewPage:
    """A page as it is added.  Its pixels and tokens are put beside it, in the same transaction or later."""

    id: str  # as Page.id: equal pages have equal ids, so a history may hold an id more than once
    messages: tuple[int, ...]  # seq of each that it shows
    tier: str
    height: int
    width: int
    cell: str  # size of a character cell, as the drawing's config names it
    tokens: int  # what it costs the reader at its tier
    text_tokens: int  # what its text would cost
    factsheet: str = field(default="", repr=False)
    details: str = field(default="{}", repr=False)  # what else the memory keeps of it, JSON
    is_pinned: bool = False
    weight: float = 1.0  # the user's, of its importance
    lines: tuple[NewLine, ...] = field(default=(), repr=False)

    def __post_init__(self) -> None:
        if not isinstance(self.id, str) or not _PAGE_ID.fullmatch(self.id):
            raise InputError(f"a page's id is 64 hexadecimal digits, got {str(self.id)[:80]!r}")
        if not self.messages or len(set(self.messages)) < len(self.messages):
            raise InputError("a page shows at least one message, and none twice")
        for seq in self.messages:
            check_integer(seq, "a message's number", least=1)
        check_word(self.tier, "a tier")
        for value in (self.height, self.width, self.tokens, self.text_tokens):
            check_integer(value, "a page's sizes and tokens", least=0)
        check_number(self.weight, "a weight")


@dataclass(frozen=True, slots=True)
class StoredPage:
    """A page as it is kept."""

    number: int  # its place in the memory, from 1; never given twice
    id: str
    first: int  # seq of the first and last message that it shows
    last: int
    tier: str
    height: int
    width: int
    cell: str
    tokens: int
    text_tokens: int
    factsheet: str = field(repr=False)
    details: str = field(repr=False)
    is_pinned: bool
    weight: float
    hits: int  # how often it was recalled
    last_hit: float | None  # when last, as the caller's clock said


@dataclass(frozen=True, slots=True)
class StoredLine:
    """A line of the index."""

    page: int | None  # None while only the message's text shows it
    row: int
    first: int
    last: int
    text: str = field(repr=False)


@dataclass(frozen=True, slots=True)
class Found:
    """A line that a question found."""

    line: StoredLine
    score: float  # higher is better; BM25, and 0 where a question has only words that very many lines have


@dataclass(frozen=True, slots=True)
class Blob:
    """A file of a page: pixels, tokens, or the contact sheet that it shares."""

    page: int
    kind: str
    name: str  # SHA-256 of its bytes
    size: int
    tier: str
    place: int | None  # on a sheet that several pages share


@dataclass(frozen=True, slots=True)
class Reading:
    """What a model read in a row of a page at one tier."""

    row: int
    text: str = field(repr=False)
    confidence: float

    def __post_init__(self) -> None:
        check_integer(self.row, "a reading's row", least=0)
        check_number(self.confidence, "a confidence")


@dataclass(frozen=True, slots=True)
class StoredReceipt:
    """One entry of what changed and why."""

    number: int
    time: float
    content: str = field(repr=False)  # JSON


@dataclass(frozen=True, slots=True)
class Counts:
    """How much the memory holds."""

    messages: int
    message_tokens: int
    unpaged: int  # messages that no page shows
    pages: int
    page_tokens: int
    lines: int
    readings: int
    receipts: int
    blobs: int  # files
    blob_bytes: int
    database_bytes: int


def check_word(value: object, what: str) -> None:
    """Raises InputError for what is no short plain word."""
    if not isinstance(value, str) or not _WORD.fullmatch(value):
        raise InputError(f"{what} is a word of up to 32 of a-z, 0-9, - and _, got {str(value)[:80]!r}")


def check_integer(value: object, what: str, *, least: int) -> None:
    """Raises InputError for what is no whole number, or too small, or too large for a database."""
    if type(value) is not int or value < least or value not in _INTEGER:
        raise InputError(f"{what} must be whole numbers from {least} to 2**63, got {str(value)[:80]!r}")


def check_number(value: object, what: str) -> None:
    """Raises InputError for what is no finite number."""
    if type(value) not in (int, float) or not math.isfinite(value):  # type: ignore[arg-type]  # checked before
        raise InputError(f"{what} must be a finite number, got {str(value)[:80]!r}")
