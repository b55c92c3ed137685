"""What a memory keeps of a page besides its row in the store: on which rows each message stands, and what happened to the page."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from typing import Literal

from optmem.errors import InputError
from optmem.memory.records import StoredPage

NEW = "new"  # the tier of a page that was never shown, and has no text to be shown as
RECALLS = 16  # of a page, remembered with their time
Kind = Literal["text", "document", "picture"]


@dataclass(frozen=True, slots=True)
class Details:
    """Of one page."""

    run: int  # its pages are text together or not at all: the number of the first of them
    group: int  # how many groups were before the newest that is on it
    kind: Kind = "text"  # "document": a text that came with a message; "picture": one did, and its text is what is read of it
    rows: tuple[tuple[int, int, int], ...] = ()  # seq, first row, row after the last, of every message that it shows
    ends: str = ""  # for every row, "1" where the line ends with it and "0" where it goes on
    facts_share: float = 0.0  # of its characters that are on its factsheet
    facts_tokens: int = 0  # of what is said beside its picture
    pin: str = ""  # tier that it must not fall below
    recalls: tuple[int, ...] = ()  # groups after which it was recalled
    raised: bool = False  # recalled since it was last shown
    side: int = 0  # pixels of its picture where that aged too; 0 is as large as it was drawn
    was_read: bool = True  # of a picture: whether its lines are in the index
    sketched: str = ""  # the tier at which it was shown before it was full

    def to_json(self) -> str:
        """As `of` takes it."""
        return json.dumps(asdict(self), separators=(",", ":"))

    @classmethod
    def of(cls, page: StoredPage) -> Details:
        """A page's."""
        return cls.from_json(page.details)

    @classmethod
    def from_json(cls, text: str) -> Details:
        """Raises InputError for what is none."""
        found = json.loads(text)
        if not isinstance(found, dict) or not {"run", "group"} <= found.keys() <= cls.__dataclass_fields__.keys():
            raise InputError("the details of a page are not such as this optmem keeps")
        return cls(**found | {"rows": tuple(map(tuple, found.get("rows", ()))), "recalls": tuple(found.get("recalls", ()))})

    def line_at(self, row: int) -> range:
        """The rows of the line that stands on a row."""
        first = row
        while first > 0 and first <= len(self.ends) and self.ends[first - 1] == "0":
            first -= 1
        last = row
        while last < len(self.ends) and self.ends[last] == "0":
            last += 1
        return range(first, min(last + 1, max(len(self.ends), row + 1)))

    def messages_at(self, rows: range) -> tuple[int, ...]:
        """The messages that stand on rows; of a picture, the one that it came with."""
        return tuple(seq for seq, first, stop in self.rows if first < rows.stop and rows.start < stop)


def side_of(page: StoredPage) -> int:
    """Pixels of the side of the sharpest picture that there is."""
    return Details.of(page).side or page.width


def handle(number: int) -> str:
    """What a page is called."""
    return f"p{number}"
