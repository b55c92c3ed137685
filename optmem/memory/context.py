"""What a model is to see: the recent messages as text, older ones as pages, oldest first, within the budget."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from optmem.errors import PageCorrupted
from optmem.memory.ageing import SHEET, SHOWN, Plan, Unit, at_tier, is_kept, whole_picture
from optmem.memory.details import handle
from optmem.memory.drawing import PIXELS, handle_text
from optmem.memory.mending import Mended, redrawn
from optmem.memory.messages import Message
from optmem.memory.optics import Optics, as_png, from_png
from optmem.memory.parts import shown
from optmem.memory.pricing import best_size, find_reader, image_tokens
from optmem.memory.providers import Item as GivenItem
from optmem.memory.providers import Pages, Payload, Picture, Rest, payload
from optmem.memory.receipt import Receipt
from optmem.memory.records import StoredMessage, StoredPage
from optmem.memory.sketch import SketchPage
from optmem.memory.tiers import Choices, Tier
from optmem.memory.view import View
from optmem.pages.chat import label
from optmem.pixels import resized
from optmem.text.count import estimate_tokens

if TYPE_CHECKING:
    from optmem.engine import VisionTokens


@dataclass(frozen=True, slots=True)
class TextItem:
    """A message as text."""

    seq: int  # its number, as `add` gave it
    message: Message = field(repr=False)
    tokens: int
    is_rest: bool = False  # of a group whose first messages are on pages

    @property
    def content(self) -> bytes:
        """What equal items have equal."""
        return self.message.json.encode()


@dataclass(frozen=True, slots=True)
class PageItem:
    """A page, or several on one contact sheet, as a picture."""

    pages: tuple[str, ...]  # what they are called: "p12"; of one that is not full yet and in no store, its first message: "m61"
    messages: tuple[int, int]  # the first and the last that is on them
    tier: str
    png: bytes = field(repr=False)
    width: int
    height: int
    facts: str = field(repr=False)  # said beside it: what it is called, where it is not at its sharpest, and its factsheet
    tokens: int
    fidelity: float | None  # share of its lines that the model reads exactly at this tier, facts counted; None of others' pictures
    run: int = 0  # pages of one run show the same groups; below 0, they are in no store
    _encode: Callable[[bytes], VisionTokens] | None = field(default=None, repr=False, compare=False)

    @property
    def content(self) -> bytes:
        """What equal items have equal."""
        return self.png + self.facts.encode()

    def vision_tokens(self) -> VisionTokens:
        """The picture as the reader is fed it, encoded now."""
        assert self._encode is not None
        return self._encode(self.png)


@dataclass(frozen=True, slots=True)
class FactsItem:
    """Of a page, its factsheet alone."""

    page: str
    messages: tuple[int, int]
    text: str
    tokens: int

    @property
    def content(self) -> bytes:
        """What equal items have equal."""
        return self.text.encode()


LEFT_OUT = "[Older pages are not shown here; they can be recalled.]\n"


@dataclass(frozen=True, slots=True)
class NoteItem:
    """Says to the model that pages are left out, where the first of them lies.  Always the same bytes, for prompt caches."""

    text: str
    tokens: int

    @property
    def content(self) -> bytes:
        """What equal items have equal."""
        return self.text.encode()


Item = TextItem | PageItem | FactsItem | NoteItem


@dataclass(frozen=True, slots=True)
class Context:
    """A view of the memory."""

    items: tuple[Item, ...]
    budget: int
    tokens: int  # of all items, as the reader counts them
    receipt: Receipt  # what changed to make this of what was shown before
    texts: dict[int, tuple[Message, ...]] = field(repr=False)  # of runs of pages whose messages are kept too
    reader: str = ""  # whose tokens these are, one of `pricing.READERS`; "" is the model that reads the pages

    def digest(self, count: int | None = None) -> str:
        """A hash over the first so many items, all of them where None: equal views have equal ones."""
        digest = hashlib.sha256()
        for item in self.items[:count]:
            content = item.content
            digest.update(f"{type(item).__name__} {len(content)}\n".encode() + content)
        return digest.hexdigest()

    def payload(self, reader: str | None = None, *, pictures: bool | None = None) -> Payload:
        """The messages of a provider with the price of every choice, as `providers.payload` has it, and of all of it.

        Where that is more than the budget, which may have been counted by another reader, a note says so.
        """
        name = reader or self.reader or "openai"
        found = payload(list(self._given(name)), name, pictures=pictures)
        tokens, called = self._cost(name, found), find_reader(name).name
        notes: tuple[str, ...] = ()
        if tokens > self.budget:
            over = f"this costs about {tokens:,} tokens at {called}, more than the budget of {self.budget:,}"
            counted = f", which was counted by {self.reader or 'the model that reads pages'}: ask for context(reader={called!r})"
            notes = (over + ("" if self.reader == called else counted),)
        return replace(found, tokens=tokens, notes=notes)

    def _cost(self, reader: str, found: Payload) -> int:
        """About what a reader bills: texts by an estimate, pictures by its formula, runs as they are given."""
        tokens = 0
        for item in self.items:
            if isinstance(item, PageItem):
                tokens += image_tokens(reader, *best_size(reader, item.width, item.height)) + estimate_tokens(item.facts)
            else:
                tokens += item.tokens
        as_text = (price for price, is_shown in zip(found.prices, found.pictured, strict=True) if not is_shown)
        return tokens + sum(price.text_tokens - price.image_tokens for price in as_text)

    def messages(self, reader: str | None = None, *, pictures: bool | None = None) -> Any:
        """The messages of a provider: "openai", "anthropic", "gemini", "qwen", or one of `pricing.READERS`.

        reader     None is whose tokens were counted, and "openai" where that is the model that reads the pages
        pictures   None gives as pictures what costs less so, where the text is kept; True all pages, False none whose text is kept

        For Anthropic and Gemini, whose instructions stand apart, see `payload(reader).body`.
        """
        body = self.payload(reader, pictures=pictures).body
        return body.get("messages", body.get("contents"))

    def _given(self, reader: str) -> Iterator[GivenItem]:
        run: list[PageItem] = []
        for item in self.items:
            if run and not (isinstance(item, PageItem) and item.run == run[0].run and item.run):
                yield self._pages(run, reader)
                run = []
            if isinstance(item, PageItem):
                run.append(item)
            elif isinstance(item, FactsItem | NoteItem):
                yield Message.read({"role": "user", "content": item.text})
            else:
                yield Rest(item.message) if item.is_rest else item.message
        if run:
            yield self._pages(run, reader)

    def _pages(self, run: Sequence[PageItem], reader: str) -> Pages:
        return Pages(tuple(_sized(item, reader) for item in run), self.texts.get(run[0].run, ()))

    def __str__(self) -> str:
        kinds = [f"{sum(isinstance(item, kind) for item in self.items)} {name}" for kind, name in _KINDS]
        counted = f" as {self.reader} counts" if self.reader else ""
        return f"{self.tokens:,} of {self.budget:,} tokens{counted}: {', '.join(kinds)}"


def _sized(item: PageItem, reader: str) -> Picture:
    """A page as it is sent: no larger than the provider's model sees it."""
    width, height = best_size(reader, item.width, item.height)
    is_whole = (width, height) == (item.width, item.height)
    png = item.png if is_whole else as_png(resized(from_png(item.png), height, width))
    return Picture(", ".join(item.pages), png, width, height, facts=item.facts)


_KINDS = ((TextItem, "messages as text"), (PageItem, "pictures of pages"), (FactsItem, "factsheets"))


def show(
    view: View,
    plan: Plan,
    optics: Optics,
    budget: int,
    *,
    receipt: Receipt,
    encode: Callable[[bytes], VisionTokens],
    mended: list[Mended] | None = None,
) -> Context:
    """The items of a plan.

    mended   gets the files of pages that were damaged and made anew
    """
    maker = _Maker(view, plan, optics, encode)
    items = tuple(maker.items())
    tokens = sum(item.tokens for item in items)
    if mended is not None:
        mended += maker.mended
    left = note_tokens(plan, optics)
    if left and tokens + left <= budget:
        items, tokens = (*items[: maker.first_left], NoteItem(LEFT_OUT, left), *items[maker.first_left :]), tokens + left
    doubt = [optics.doubt] if optics.doubt and any(isinstance(item, PageItem) for item in items) else []
    notes = (*receipt.notes, *maker.notes, *doubt, *_hint(plan, optics, tokens))
    told = Receipt(receipt.budget, receipt.tokens_before, receipt.tokens_after, receipt.changes, notes)
    return Context(items, budget, tokens, told, maker.texts, optics.reader)


def note_tokens(plan: Plan, optics: Optics) -> int:
    """What it costs to say that pages are left out; 0 where none is."""
    return optics.count(LEFT_OUT) if any(_is_left_out(unit, optics) for unit in plan.units) else 0


def _is_left_out(unit: Unit, optics: Optics) -> bool:
    return unit.group is None and optics.ladder.tiers[unit.tier].kind == "stored"


def _hint(plan: Plan, optics: Optics, tokens: int) -> Iterator[str]:
    """What is not shown, and how large a budget would have to be: of every page the sharpest picture that there is."""
    left, needed = [], tokens
    for unit, choices in zip(plan.units, plan.choices, strict=True):
        if _is_left_out(unit, optics):
            left.append(unit)
            needed += next((cost for cost in choices.tokens[optics.sharp :] if cost), 0)
    if left:
        first, last = min(unit.first for unit in left), max(_last(unit) for unit in left)
        what = f"{len(left):,} page{'s' * (len(left) != 1)} of messages {first:,} to {last:,}"
        yield f"not shown: {what}; a budget of about {needed:,} tokens has place for all, and `recall` finds what is on them"


def _last(unit: Unit) -> int:
    if unit.page is not None:
        return unit.page.last
    return unit.drawn.last if unit.drawn is not None else unit.first


class _Maker:
    def __init__(self, view: View, plan: Plan, optics: Optics, encode: Callable[[bytes], VisionTokens]) -> None:
        self.view, self.plan, self.optics, self.encode = view, plan, optics, encode
        self.notes: list[str] = []
        self.texts: dict[int, tuple[Message, ...]] = {}
        self._told: set[int] = set()  # messages that stand there as text
        self._sheets: set[str] = set()
        self.mended: list[Mended] = []
        self.first_left = 0  # items before the first page that is left out

    def items(self) -> Iterator[Item]:
        count, is_whole = 0, True
        for unit, choices in zip(self.plan.units, self.plan.choices, strict=True):
            if is_whole and _is_left_out(unit, self.optics):
                is_whole, self.first_left = False, count
            for item in self._of(unit, choices):
                count += 1
                yield item

    def _of(self, unit: Unit, choices: Choices) -> Iterator[Item]:
        """The items of a unit."""
        if unit.group is not None:
            yield from self._texts(unit.group.stored, is_rest=unit.group.is_rest)
            return
        if unit.drawn is not None:
            yield from self._sketched(unit, unit.drawn, choices)
            return
        assert unit.page is not None
        assert unit.details is not None
        kind = self.optics.ladder.tiers[unit.tier].kind
        cost = choices.tokens[unit.tier] or 0
        if kind == "text":
            seqs = [seq for seq, _, _ in unit.details.rows]
            yield from self._texts(list(self.view.messages(min(seqs), max(seqs))), seqs)
        elif kind == "page":
            yield from self._page(unit, cost, choices.fidelity[unit.tier])
        elif kind == "sheet":
            yield from self._sheet(unit, cost, choices.fidelity[unit.tier])
        elif kind == "facts":
            text = handle_text(unit.number, unit.page.factsheet)
            yield FactsItem(handle(unit.number), (unit.page.first, unit.page.last), text, cost)

    def _texts(
        self, stored: Sequence[StoredMessage], seqs: Sequence[int] | None = None, *, is_rest: bool = False
    ) -> Iterator[TextItem]:
        for each in stored:
            if each.seq in self._told or (seqs is not None and each.seq not in seqs) or each.content is None:
                continue
            self._told.add(each.seq)
            message = Message.from_json(each.content, f"message {each.seq}")
            yield TextItem(each.seq, _without_bytes(message) if seqs is not None else message, each.tokens, is_rest)

    def _sketched(self, unit: Unit, drawn: SketchPage, choices: Choices) -> Iterator[Item]:
        """A page that is in no store: its text is."""
        tier = self.optics.ladder.tiers[unit.tier]
        if tier.kind == "text":
            yield from self._texts([each for group in drawn.groups for each in group.stored])
        elif tier.kind == "page":
            self._keep_sketched(drawn)
            png, cost = drawn.picture(tier, self.optics), choices.tokens[unit.tier] or 0
            name, span, known = f"m{drawn.first}", (drawn.first, drawn.last), choices.fidelity[unit.tier]
            yield PageItem((name,), span, tier.name, png, tier.side, tier.side, "", cost, known, drawn.run, self.encode)

    def _keep_sketched(self, drawn: SketchPage) -> None:
        same = [unit for unit in self.plan.units if unit.run == drawn.run]
        is_whole = {self.optics.ladder.tiers[unit.tier].kind for unit in same} == {"page"}
        stored = [each for group in drawn.groups for each in group.stored]
        messages = [Message.from_json(each.content or "", f"message {each.seq}") for each in stored if is_whole]
        self.texts.setdefault(drawn.run, tuple(messages))

    def _page(self, unit: Unit, cost: int, fidelity: float) -> Iterator[PageItem]:
        assert unit.page is not None
        assert unit.details is not None
        tier = self.optics.ladder.tiers[unit.tier]
        png = self._whole(unit.page, tier)
        if png is None:
            return
        self._keep_text(unit)
        side = min(tier.side, unit.details.side or unit.page.width)
        beside = handle_text(unit.number, unit.page.factsheet if tier.has_facts else "")
        facts = beside if self.optics.ladder.is_named(tier) else ""
        span = unit.page.first, unit.page.last
        run = unit.details.run if unit.details.kind == "text" else 0
        known = None if unit.details.kind == "picture" else fidelity  # it was measured of pages that optmem draws
        yield PageItem((handle(unit.number),), span, tier.name, png, side, side, facts, cost, known, run, self.encode)

    def _whole(self, page: StoredPage, tier: Tier) -> bytes | None:
        """The file of a page's picture, made anew where it is damaged: of the sharp one, or else of the text.  None of neither."""
        try:
            png, notes = whole_picture(self.view, page, tier, self.optics)
        except PageCorrupted as damage:
            whole = redrawn(self.view, page, self.optics)
            if whole is None:
                self.notes.append(str(damage))
                return None
            png = at_tier(whole, tier, self.optics)
            notes = [f"the picture of page {handle(page.number)} was damaged, and was drawn anew from its text"]
            self.mended.append(Mended(page.number, PIXELS, whole, "sharp"))
        self.notes += notes
        if notes and is_kept(self.view, page, tier):
            self.mended.append(Mended(page.number, SHOWN, png, tier.view))
        return png

    def _keep_text(self, unit: Unit) -> None:
        """The messages of a run, where they are kept and all its pages are pictures."""
        assert unit.details is not None
        run = unit.details.run
        if run in self.texts or unit.details.kind != "text":
            return
        same = [each for each in self.plan.units if each.details is not None and each.details.run == run]
        same = [each for each in same if each.details is not None and each.details.kind == "text"]
        kinds = {self.optics.ladder.tiers[each.tier].kind for each in same}
        seqs = sorted({seq for each in same if each.details is not None for seq, _, _ in each.details.rows})
        stored = [each for each in self.view.messages(seqs[0], seqs[-1]) if each.seq in seqs]
        is_whole = kinds == {"page"} and all(each.content is not None for each in stored)
        found = [_without_bytes(Message.from_json(each.content or "", f"message {each.seq}")) for each in stored if is_whole]
        self.texts[run] = tuple(found)

    def _sheet(self, unit: Unit, cost: int, fidelity: float) -> Iterator[PageItem]:
        name = next((blob.name for blob in self.view.blobs(unit.number) if blob.kind == SHEET), None)
        if name is None or name in self._sheets:
            return
        self._sheets.add(name)
        tier = self.optics.ladder.tiers[unit.tier]
        try:
            png = self.view.blob(unit.number, SHEET)
        except PageCorrupted as damage:
            self.notes.append(str(damage))
            return
        pages = [self.view.page(blob.page) for blob in self.view.pages_on(name)]
        span = min(page.first for page in pages), max(page.last for page in pages)
        size = self.optics.ladder.size
        handles = tuple(handle(page.number) for page in pages)
        yield PageItem(handles, span, tier.name, png, size, size, "", cost, fidelity, 0, self.encode)


def _without_bytes(message: Message) -> Message:
    """A message whose pictures and documents are on pages: they are named in it."""
    content = message.given.get("content")
    if not isinstance(content, list):
        return message
    named = [_named(part) for part in content]
    return message if named == content else Message.read({**message.given, "content": named})


def _named(part: Any) -> Any:
    if isinstance(part, dict) and part.get("type") == "tool_result" and isinstance(part.get("content"), list):
        return part | {"content": [_named(inner) for inner in part["content"]]}
    found = shown(part)
    if isinstance(found, dict) and found is not part and re.fullmatch(r"[0-9a-f]{12}", str(found.get("uuid"))):
        words = f"{found['type']}, not drawn on this page", found.get("title"), found["uuid"]
        return {"type": "text", "text": label(*words).runs[0].text.rstrip("\n")}  # as it was counted, and as pages say it
    return part
