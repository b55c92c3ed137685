"""A long history inside a budget of tokens: recent messages as text, older ones as pages, every line read back when asked for.

with optmem.Memory.open("agent.optmem", budget=2048) as memory:
    memory.add([{"role": "user", "content": "The staging key is 9f3a77b1."}])
    view = memory.context()                     # what the model is to see, oldest first
    view.messages("openai")
    memory.recall("staging key")[0].text
"""

from __future__ import annotations

import json
import os
import threading
import time as clock
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from itertools import islice
from typing import TYPE_CHECKING, Any, Literal, Self, TypeGuard

from optmem.errors import InputError, StoreError
from optmem.items import Watch, unwatched
from optmem.memory.adding import new_messages
from optmem.memory.ageing import Plan, Planner, apply, check_budget
from optmem.memory.aio import twin
from optmem.memory.archive import Exported, export, restore
from optmem.memory.check import Verified
from optmem.memory.context import Context, note_tokens, show
from optmem.memory.details import RECALLS, Details, handle
from optmem.memory.drawing import AT_ONCE, behind, cut, draw_runs, keep_runs, kept_groups, read_groups, rows_of
from optmem.memory.forgetting import Forgetting, Forgotten, names
from optmem.memory.grep import Grep, with_text
from optmem.memory.mending import Mended
from optmem.memory.messages import Message, read_messages
from optmem.memory.optics import Optics, from_png
from optmem.memory.policy import Policy
from optmem.memory.pricing import reader_name
from optmem.memory.reading import PageReader
from optmem.memory.recall import Answers, Hit, Place, check_query, search_lines
from optmem.memory.receipt import Receipt
from optmem.memory.records import StoredPage, check_number
from optmem.memory.selecting import Selector, find_page, select
from optmem.memory.settings import STATE, Index, Settings, State, kept_settings
from optmem.memory.sketch import Sketched, not_yet
from optmem.memory.stats import Stats, stats_of
from optmem.memory.store import Reader, Store
from optmem.memory.transaction import Transaction
from optmem.memory.view import View

if TYPE_CHECKING:
    from optmem.engine import Engine, VisionTokens

Given = Mapping[str, Any] | Message


class Memory:
    """An open memory, usable from any thread; one call at a time, the others wait."""

    def __init__(self, opened: Store | Reader, settings: Settings, optics: Optics, watch: Watch = unwatched) -> None:
        """Use `open`."""
        self._opened, self.settings, self.optics, self._watch = opened, settings, optics, watch
        self._store = opened if isinstance(opened, Store) else None
        self._turn = threading.RLock()
        self._planners: dict[str, Planner] = {}  # for each reader whose tokens were asked for
        self._reader = PageReader(optics, self._snapshot, None if self._store is None else self._store.transaction)
        self._grep = Grep(optics, self._reader, watch)
        # For budgets and readers other than the memory's: the tier of each page when last shown.
        self._shown: dict[tuple[int, str], dict[int, int]] = {}
        self._sketched: dict[tuple[int, str], Sketched] = {}

    @classmethod
    def open(
        cls,
        path: str | os.PathLike[str],
        engine: Engine | None = None,
        budget: int | None = None,
        archive: bool | None = None,
        policy: Policy | None = None,
        index: Index | None = None,
        *,
        keep_sharp: bool | None = None,
        reader: str | None = None,
        count: Callable[[str], int] | None = None,
        watch: Watch = unwatched,
        mode: Literal["write", "read"] = "write",
        create: bool = True,
    ) -> Memory:
        """A memory in a folder; a new one where there is none.

        engine       that reads pages; None is nano, loaded when it is first needed
        budget       tokens of a context; 2,048 for a new memory
        archive      keep messages as they came also when pages show them; not for a new memory
        policy       when pages are made smaller and which are not
        index        "text" keeps the lines of pages to find them by words; "optical" keeps none, and finds them by a glance over
                     their tokens
        keep_sharp   keep the sharpest pixels of a page on disk however small it is shown; False lets them age too
        reader       whose tokens the budget counts: a provider or one of `pricing.READERS`; "" is the engine
        count        tokens of a text for the model that is to read it; None as `Optics` has it
        watch        shows how far drawing, ageing, a look over many pages and an export are, as `optmem.items.watched` does
        mode         "read" is for processes beside the one that writes: nothing is changed, cached or counted
        create       False refuses where there is no memory

        What is None is as the memory was made.  The index of a memory cannot be changed, and archive=True keeps what is added
        from then on.  Raises StoreBusyError while another process writes, and as Store.open and Reader.open do.
        """
        if mode not in ("write", "read"):
            raise InputError(f"a memory is opened to 'write' or to 'read', got {repr(mode)[:80]}")
        if engine is not None and not hasattr(engine, "encoder_fingerprint"):
            raise InputError(f"engine must be an Engine, or None for nano, got {type(engine).__name__}")
        given: dict[str, Any] = {
            "budget": budget,
            "archive": archive,
            "policy": policy,
            "index": index,
            "keep_sharp": keep_sharp,
            "reader": reader,
        }
        Settings().changed(given)  # before anything is made: what is refused leaves no memory behind
        opened = Reader.open(path) if mode == "read" else Store.open(path, create=create)
        try:
            settings = kept_settings(opened, given)
            return cls(opened, settings, Optics(engine, count, settings.reader), watch)
        except BaseException:
            opened.close()
            raise

    # Adding

    def add(self, messages: Sequence[Given] | Given, *, time: float | None = None) -> list[int]:
        """Keeps messages in the shape of OpenAI or Anthropic; their numbers.  They are on the disk when this returns.

        Nothing is drawn or encoded now.  What is said while a call waits for its result belongs to the call's group.

        Raises InputError for what is no message, a result without a call, and an id called twice; then nothing is kept.
        """
        given = [messages] if isinstance(messages, Mapping | Message) else messages
        found = list(given) if _all_messages(given) else read_messages(given)
        with self._turn, self._writing() as change:
            before = State.of(change)
            moment = clock.time() if time is None else time
            new, after = new_messages(found, before, self.optics.count, moment, indexed=self.settings.index == "text")
            seqs = change.add_messages(new)
            if after != before:
                change.set(STATE, after.to_json())
            return seqs

    # What a model is to see

    def context(self, budget: int | None = None, reader: str | None = None) -> Context:
        """What a model is to see, oldest first: text for what is recent, pages for the rest, never above the budget.

        budget   None is the memory's own.  With another one nothing is aged for good: what would not fit is only shown smaller,
                 and stays so from one call to the next as long as the memory is open.  With a larger one than before, pages are
                 shown as sharp as they are kept, as far as they fit
        reader   whose tokens the budget counts, as `open` takes it; None is the memory's own.  With another one, too, nothing ages

        Nothing changes while what is shown fits, so that an unchanged prefix keeps its bytes; but a page that is not full yet is
        drawn again with what follows on it.
        Raises InputError where what is pinned or excluded does not fit.
        """
        own = self.settings.budget
        wanted = own if budget is None else check_budget(budget)
        name = self.settings.reader if reader is None else reader_name(reader)
        with self._turn:
            notes = self._draw() if self._store is not None else []
            if (wanted, name) == (own, self.settings.reader) and self._store is not None:
                plan, more = self._age(own)
                notes += more
            else:
                key = wanted, name
                plan = self._plan(wanted, name, shown=self._shown.setdefault(key, {}), sketched=self._sketched.get(key))
                self._shown[key] = {unit.number: unit.tier for unit in plan.units if unit.page is not None}
                self._sketched[key] = plan.sketched
            receipt = plan.allocation.receipt
            receipt = replace(receipt, notes=(*receipt.notes, *notes))
            mended: list[Mended] = []
            with self._snapshot() as view:
                optics = self._planner(name).optics
                found = show(view, plan, optics, wanted, receipt=receipt, encode=self._encode, mended=mended)
            if mended and self._store is not None:
                with self._writing() as change:
                    for each in mended:
                        change.put_blob(each.page, each.kind, each.png, tier=each.tier)
            return found

    def _planner(self, reader: str) -> Planner:
        if reader not in self._planners:
            self._planners[reader] = Planner(self.optics.counted_by(reader), self.settings)
        return self._planners[reader]

    def age(self, budget: int | None = None) -> Receipt:
        """Draws what fills pages, and makes pages smaller until they fit the budget; what changed."""
        with self._turn:
            self._writer()
            notes = self._draw()
            plan, more = self._age(self.settings.budget if budget is None else check_budget(budget))
            receipt = plan.allocation.receipt
            return replace(receipt, notes=(*receipt.notes, *notes, *more))

    def _age(self, budget: int) -> tuple[Plan, list[str]]:
        """A plan that is carried out; and what went wrong on the way."""
        plan = self._plan(budget, self.settings.reader)
        changed = {unit.number for unit in plan.units if unit.page is not None and self._differs(unit.tier, unit.page)}
        raised = any(unit.details is not None and unit.details.raised for unit in plan.units)
        with self._snapshot() as view:
            state = State.of(view)
        aged_for = budget if budget == self.settings.budget else state.aged_for
        sketch = tuple(self.optics.ladder.tiers[tier].name for tier in plan.sketched.tiers)
        after = replace(state, sketched=plan.sketched.last, sketch=sketch, aged_for=aged_for)
        if not changed and not raised and after == state:
            return plan, []
        with self._writing() as change:
            change.set(STATE, after.to_json())
            notes = apply(change, plan, self.optics, self.settings, self._watch)
            if plan.allocation.receipt.changes:
                change.add_receipt(json.dumps(plan.allocation.receipt.to_json()), clock.time())
        self._changed(changed)
        return plan, notes

    def _changed(self, numbers: Iterable[int]) -> None:
        """What was known of these pages holds no more."""
        for number in numbers:
            for planner in self._planners.values():
                planner.forget(number)

    def _differs(self, tier: int, page: StoredPage) -> bool:
        return self.optics.ladder.tiers[tier].name != page.tier

    def _plan(self, budget: int, reader: str, *, shown: Mapping[int, int] | None = None, sketched: Sketched | None = None) -> Plan:
        """Where pages are left out, there is place to say so, if that can be had."""
        planner = self._planner(reader)
        with self._snapshot() as view:
            state = State.of(view)
            groups = [*kept_groups(view, state), *read_groups(view, state, self.settings.policy)]
            found = planner.plan(view, state, groups, budget, shown=shown, sketched=sketched)
            note = note_tokens(found, planner.optics)
            if found.allocation.receipt.tokens_after + note <= budget:
                return found
            with suppress(InputError):
                return planner.plan(view, state, groups, budget - note, shown=shown, sketched=sketched)
            return found

    def _draw(self) -> list[str]:
        """Puts what fills pages on pages; what could not be drawn."""
        with self._snapshot() as view:
            state = State.of(view)
            waiting = view.last_seq() - state.drawn
        notes: list[str] = []
        if waiting:
            for _ in self._watch(self._draw_runs(notes), "drawing", unit="message", total=waiting):
                pass
        return notes

    def _draw_runs(self, notes: list[str]) -> Iterator[int]:
        """Numbers of messages that are drawn, some runs at a time: a history that was never drawn may be larger than memory."""
        rows = rows_of(self.optics.ladder.size, self.optics.ladder.cell)
        is_last = False
        while not is_last:
            with self._snapshot() as view:
                state = State.of(view)
                before = state.drawn
                groups = read_groups(view, state, self.settings.policy)
                found = list(islice(cut(groups, rows), AT_ONCE + 1))
            is_last = len(found) <= AT_ONCE
            limit = self.settings.policy.limit(self.settings.budget)
            found = found[: -not_yet(found, self.settings.policy, limit) if is_last else AT_ONCE]  # others are for the next round
            drawn, wrong = draw_runs([each for each in found if isinstance(each, list)], self.optics, self.settings)
            notes += wrong
            for each in found:
                state = behind(state, each)
            if found:
                with self._writing() as change:
                    count = keep_runs(change, drawn, self.optics)
                    change.set(STATE, replace(state, sketch=state.sketch[count:]).to_json())
                self._sketched = {each: replace(one, tiers=one.tiers[count:]) for each, one in self._sketched.items()}
            yield from range(before, state.drawn)

    def _encode(self, png: bytes) -> VisionTokens:
        return self.optics.tokens([from_png(png)])[0]

    # Reading back

    def recall(self, query: str, limit: int = 3, min_confidence: float | None = None, min_fit: float | None = None) -> list[Hit]:
        """The lines that answer best, each with where it stands, how sure it is and what it was read from.

        min_confidence   where a page says less surely what was asked for, its facts are given instead; where there are none, the
                         hit says so in its note
        min_fit          share of the question's words that must stand in a line, the rarest counting most (`Hit.fit`): with 0.5
                         hardly anything answers what was never told.  None gives all, and hits below say so in their note

        What is read is kept, and counts for the importance of its page.
        """
        check_query(query, limit, min_confidence, min_fit)
        with self._turn:
            if not limit:
                return []
            if self.settings.index == "text":
                self._index_pictures()
                with self._snapshot() as view:
                    places = search_lines(view, query, limit, self.settings, min_fit or 0.0)
            else:
                places = self._glance(query, limit, min_fit or 0.0)
            with self._snapshot() as view:
                pages = {place.page: view.page(place.page) for place in places if place.page is not None}
            hits = Answers(self.optics, self._reader, self.settings).hits(places, pages, min_confidence)
            self._count(pages.values())
            return hits

    def _glance(self, query: str, limit: int, min_fit: float) -> list[Place]:
        if self._store is not None:
            self._draw()
        with self._snapshot() as view:
            state = State.of(view)
            told = [(each.seq, Message.from_json(each.content or "")) for each in with_text(view, state)]
            pages = [page for page in view.pages() if page.tier != "text"]
        return self._grep.find(query, told, pages, limit, min_fit)

    def _index_pictures(self) -> None:
        """Reads the pages that came as pictures, and puts their lines into the index."""
        if self._store is None:
            return
        with self._snapshot() as view:
            if view.setting("unread") != "true":
                return
            unread = [page for page in view.pages() if not Details.of(page).was_read]
        for page in unread:
            self._reader.index(page)
        with self._writing() as change:
            change.set("unread", "false")

    def _count(self, pages: Any) -> None:
        """That pages were recalled."""
        found = list(pages)
        if self._store is None or not found:
            return
        with self._writing() as change:
            now = State.of(change).groups
            for page in found:
                details = Details.of(change.page(page.number))
                recalls = (*details.recalls, now)[-RECALLS:]
                details = replace(details, recalls=recalls, raised=page.tier not in ("text", "new"))
                change.change_page(page.number, details=details.to_json())
                change.count_hit(page.number, float(now))

    def read(self, page: str) -> Hit:
        """All of a page, as `recall` would say a line of it.

        page   "p12", as a context and hits name it, or its id

        Raises InputError where there is none, PageCorrupted where its picture is damaged.
        """
        with self._turn:
            with self._snapshot() as view:
                found = find_page(view, page)
                lines = [line.text for line in view.lines(found.number)]
                keeps = self.settings.archive or found.tier == "text"
            answers = Answers(self.optics, self._reader, self.settings)
            hit = answers.whole(found, "".join(lines) if keeps and lines and Details.of(found).kind == "text" else None)
            self._count([found])
            return hit

    # What is kept, and what is not

    def pin(self, selector: Selector) -> list[int]:
        """Keeps messages, or those of a page, as sharp as they are now whatever their age; their numbers.

        Raises InputError where there are none of these.
        """
        return self._pin(selector, is_pinned=True)

    def unpin(self, selector: Selector) -> list[int]:
        """Lets messages age again."""
        return self._pin(selector, is_pinned=False)

    def _pin(self, selector: Selector, *, is_pinned: bool) -> list[int]:
        with self._turn, self._writing() as change:
            seqs = select(change, selector)
            state = State.of(change)
            pins = {seq: name for seq, name in state.pins if seq not in seqs}
            if is_pinned:
                pins |= dict.fromkeys(seqs, "sharp")
            change.set(STATE, replace(state, pins=tuple(sorted(pins.items()))).to_json())
            return seqs

    def weigh(self, selector: Selector, weight: float) -> list[int]:
        """Makes pages that show these messages count as much more, or less, as the weight says; 1 is as they were."""
        check_number(weight, "a weight")
        if weight < 0:
            raise InputError(f"a weight is a number, at least 0, got {repr(weight)[:80]}")
        with self._turn, self._writing() as change:
            seqs = select(change, selector)
            for number in sorted({number for seq in seqs for number in change.pages_showing(seq, seq)}):
                change.change_page(number, weight=weight)
            return seqs

    def forget(self, selector: Selector, *, prove: bool = True) -> Forgotten:
        """Forgets messages for good, and with them their groups: text, pixels, tokens, lines of the index and what was read.

        What else stood on their pages is drawn anew without them, contact sheets too.

        selector   a page means all messages on it
        prove      search every byte of the memory afterwards, and verify it

        Raises InputError where there are none of these, StoreBusyError where a reader keeps looking at an older state,
        PageCorrupted where a page that others share is damaged: forget those too.
        """
        with self._turn:
            with self._writing() as change:
                work = Forgetting(change, select(change, selector), self.optics, self.settings)
                needles = work.needles() if prove else []
                redrawn, notes = work.carry_out()
                note = f"{len(work.seqs)} messages and {len(work.pages)} pages were forgotten"
                receipt = Receipt(self.settings.budget, 0, 0, (), (note, *notes))
                change.add_receipt(json.dumps(receipt.to_json()), clock.time())
            self._shown.clear()
            self._sketched.clear()
            self._changed(work.pages)
            verified = None
            if prove:
                with self._snapshot() as view:
                    needles = [each for each in needles if isinstance(each, bytes) or not view.holds(each)]
                verified = self.verify(needles)
            return Forgotten(tuple(work.seqs), names(work.pages), names(redrawn), len(needles), verified)

    # The rest

    def export(self, path: str | os.PathLike[str]) -> Exported:
        """Writes all of the memory to one file, a tar of JSON lines and the pages' files with their checksums.

        Raises OutputError where it cannot be written, or is there already.
        """
        with self._turn, self._snapshot() as view:
            return export(view, path, self._watch)

    @classmethod
    def import_(cls, archive: str | os.PathLike[str], path: str | os.PathLike[str], **asked: Any) -> Memory:
        """A new memory from a file that `export` wrote, opened as `open` does.

        Nothing in the file is trusted: names, sizes, types, checksums and what must hold between them are checked, and where
        anything is wrong there is no new memory.

        Raises SourceNotFoundError, InputError for what is no such file, OutputError where the new folder is there already.
        """
        restore(archive, path, asked.get("watch", unwatched))
        return cls.open(path, **asked)

    def stats(self) -> Stats:
        """How much there is, and at which tiers."""
        with self._turn, self._snapshot() as view:
            return stats_of(view, self.settings)

    def receipts(self) -> list[Receipt]:
        """Everything that was changed so far, oldest first."""
        with self._turn, self._snapshot() as view:
            return [Receipt.from_json(json.loads(each.content)) for each in view.receipts()]

    def verify(self, needles: Sequence[str | bytes] = ()) -> Verified:
        """Looks at everything: the database, the index, every checksum, and for texts or bytes that must not be anywhere."""
        with self._turn:
            return self._writer().verify(needles)

    # Each `await`ed in a thread
    aadd, acontext, arecall, aread, aage = twin(add), twin(context), twin(recall), twin(read), twin(age)
    apin, aunpin, aweigh, aforget, aexport = twin(pin), twin(unpin), twin(weigh), twin(forget), twin(export)
    astats, areceipts, averify = twin(stats), twin(receipts), twin(verify)

    def close(self) -> None:
        """Lets go of the memory; a second time does nothing.  The engine is the caller's."""
        with self._turn:
            self._opened.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _writer(self) -> Store:
        if self._store is None:
            raise StoreError("this memory is open to read only: open it with mode='write' in the one process that writes")
        return self._store

    @contextmanager
    def _writing(self) -> Iterator[Transaction]:
        with self._writer().transaction() as change:
            yield change

    @contextmanager
    def _snapshot(self) -> Iterator[View]:
        with self._opened.snapshot() as view:
            yield view


def _all_messages(given: object) -> TypeGuard[Sequence[Message]]:
    return isinstance(given, list | tuple) and bool(given) and all(isinstance(each, Message) for each in given)


__all__ = ["Context", "Hit", "Memory", "Policy", "Receipt", "Settings", "handle"]
