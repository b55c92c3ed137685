"""The store's tables, column by column, as an archive has them: what each may hold."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from optmem.errors import InputError

_WORD = re.compile(r"[a-z][a-z0-9_.-]{0,31}")


def _whole(value: object) -> bool:
    return type(value) is int and -1 <= value < 1 << 62


def _number(value: object) -> bool:
    return type(value) in (int, float) and math.isfinite(value)  # type: ignore[arg-type]


def _text(value: object) -> bool:
    return isinstance(value, str)


def _word(value: object) -> bool:
    return isinstance(value, str) and _WORD.fullmatch(value) is not None


def _name(value: object) -> bool:
    return isinstance(value, str) and re.fullmatch(r"[0-9a-f]{64}", value) is not None


def _or_none(check: Callable[[object], bool]) -> Callable[[object], bool]:
    return lambda value: value is None or check(value)


def _flag(value: object) -> bool:
    return value in (0, 1)


Check = Callable[[object], bool]
# In the order in which rows refer to each other.
TABLES: Mapping[str, Mapping[str, Check]] = {
    "settings": {"name": _word, "value": _text},
    "messages": {"seq": _whole, "group_seq": _whole, "role": _word, "tokens": _whole, "time": _number, "content": _or_none(_text)},
    "pages": {
        "number": _whole,
        "id": _name,
        "first": _whole,
        "last": _whole,
        "tier": _word,
        "height": _whole,
        "width": _whole,
        "cell": _text,
        "tokens": _whole,
        "text_tokens": _whole,
        "factsheet": _text,
        "details": _text,
        "is_pinned": _flag,
        "weight": _number,
        "hits": _whole,
        "last_hit": _or_none(_number),
    },
    "shown": {"page": _whole, "message": _whole},
    "blobs": {"page": _whole, "kind": _word, "name": _name, "size": _whole, "tier": _word, "place": _or_none(_whole)},
    "readings": {"page": _whole, "tier": _word, "row": _whole, "text": _text, "confidence": _number},
    "receipts": {"number": _whole, "time": _number, "content": _text},
    "lines": {
        "line": _whole,
        "page": _or_none(_whole),
        "row": _whole,
        "first": _whole,
        "last": _whole,
        "text": _text,
        "spaced": _or_none(_text),
    },
    "sqlite_sequence": {"name": _word, "seq": _whole},  # numbers that are never given twice
}


def check_row(table: str, row: Any) -> Sequence[Any]:
    """A row that may be kept.  Raises InputError."""
    checks = TABLES[table]
    if not isinstance(row, list) or len(row) != len(checks):
        raise InputError(f"a row of {table} has {', '.join(checks)}")
    for value, (name, check) in zip(row, checks.items(), strict=True):
        if not check(value):
            raise InputError(f"{name} of {table} cannot be {repr(value)[:80]}")
    return row
