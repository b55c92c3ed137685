"""Pages whose file is damaged, drawn anew from the messages that they show, where these are kept."""

from __future__ import annotations

from dataclasses import dataclass

from optmem.memory.details import Details
from optmem.memory.messages import Message
from optmem.memory.optics import Optics, as_png
from optmem.memory.records import StoredPage
from optmem.memory.view import View
from optmem.pages import draw_pages, paginate


@dataclass(frozen=True, slots=True)
class Mended:
    """A file of a page that takes the place of a damaged one."""

    page: int  # its number
    kind: str
    png: bytes
    tier: str


def redrawn(view: View, page: StoredPage, optics: Optics) -> bytes | None:
    """The file of a page as it was first drawn; None where its messages are not all kept, or would be drawn otherwise now.

    Pages are drawn by runs, so all of its run is laid out again; the page's id says that nothing has changed.
    """
    details = Details.of(page)
    if details.kind != "text" or details.side:
        return None
    same = [(other, Details.of(other)) for other in view.pages()]
    seqs = sorted({seq for _, each in same if (each.run, each.kind) == (details.run, "text") for seq, _, _ in each.rows})
    stored = [each for each in view.messages(seqs[0], seqs[-1]) if each.seq in set(seqs)] if seqs else []
    if len(stored) < len(seqs) or any(each.content is None for each in stored):
        return None
    shown = [Message.from_json(each.content or "", f"message {each.seq}").drawable(str(each.seq)) for each in stored]
    found = [each for each in paginate(shown, size=optics.ladder.size) if each.id == page.id]
    return as_png(draw_pages(found[:1])[0]) if found else None
