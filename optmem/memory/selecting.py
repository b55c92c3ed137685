"""What a user means: messages by their numbers, pages by what they are called."""

from __future__ import annotations

import re
from collections.abc import Iterable

from optmem.errors import InputError
from optmem.memory.details import Details
from optmem.memory.records import StoredPage
from optmem.memory.view import View

# A message's number as `add` gave it, a page ("p12", or its id), or several of these.
Selector = int | str | Iterable[int | str]


def find_page(view: View, name: object) -> StoredPage:
    """A page by what it is called.  Raises InputError where there is none."""
    found = re.fullmatch(r"p([1-9][0-9]{0,17})", name) if isinstance(name, str) else None
    if found is not None:
        return view.page(int(found[1]))
    pages = view.pages_with_id(name) if isinstance(name, str) else []
    if not pages:
        raise InputError(
            f"a page is named 'p12', as contexts and hits name it, or by its id; there is none named {repr(name)[:80]}"
        )
    return pages[0]


def select(view: View, selector: Selector) -> list[int]:
    """The numbers of the messages that are meant, in order.  Raises InputError where there are none, or no such message or page."""
    try:
        each = [selector] if isinstance(selector, int | str) else list(selector)
    except TypeError:
        given = type(selector).__name__
        raise InputError(f"messages are meant by a number, a page's name such as 'p12', or several of these, got {given}") from None
    seqs: set[int] = set()
    for one in each:
        if isinstance(one, str):
            seqs |= {seq for seq, _, _ in Details.of(find_page(view, one)).rows}
        else:
            if type(one) is not int or not any(True for _ in view.messages(max(one, 0), max(one, 0))):
                raise InputError(f"the memory has no message {repr(one)[:80]}; it may have been forgotten")
            seqs.add(one)
    if not seqs:
        raise InputError("nothing was selected: give numbers of messages, or names of pages")
    return sorted(seqs)
