"""The memory: a history of any shape inside a budget, every line read back, and what is forgotten gone.  Real store, real nano."""

import asyncio
import base64
import io
import random
import subprocess
import sys
import tempfile
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

import optmem
from optmem import Memory
from optmem.errors import InputError, OptmemError, PageCorrupted, StoreBusyError, StoreError
from optmem.memory.context import FactsItem, PageItem, TextItem
from optmem.memory.drawing import cut
from optmem.memory.policy import Policy
from optmem.memory.pricing import READERS, best_size
from optmem.memory.providers import Pages
from optmem.memory.receipt import Receipt
from optmem.pages import paginate
from optmem.text.count import estimate_tokens

WORDS = ("alpha", "beta", "gamma", "delta", "run", "test", "file", "build", "error", "value", "count", "paper", "water", "light")


@pytest.fixture(scope="module")
def engine():
    with optmem.Engine.from_pretrained("nano", device="cpu") as found:
        yield found


def said(seed, words=40):
    return " ".join(random.Random(seed).choices(WORDS, k=words))


def turn(number, words=40, extra=""):
    return [
        {"role": "user", "content": f"Turn {number}: {said(number, words)}\n{extra}"},
        {"role": "assistant", "content": said(-number)},
    ]


def key(number):
    return f"{random.Random(1000 + number).getrandbits(40):010x}"


def said_of(number):
    return f"the key of host {number} is {key(number)} in /srv/app/{number}.cfg"


def history(memory, turns, every=5):
    """Turns with a key each, and contexts in between, as an agent asks for them."""
    seqs = []
    for number in range(turns):
        seqs += memory.add(turn(number, extra=said_of(number)))
        if number % every == every - 1:
            memory.context()
    memory.context()
    return seqs


@settings(deadline=None)
@given(st.lists(st.integers(1, 40), max_size=60), st.sampled_from([16, 32]))
def test_no_page_is_drawn_for_the_end_of_a_text_alone(rows, page_rows):
    groups = [SimpleNamespace(rows=count, reason=None, attachments=[], is_rest=False, is_pinned=False) for count in rows]
    *closed, tail = cut(groups, page_rows)
    assert [group for run in [*closed, tail] for group in run] == groups
    for run in closed:
        assert sum(group.rows for group in run) % page_rows


# --- context ------------------------------------------------------------------------------------------------------------------


def check_context(view, memory, groups):
    """What holds for every context."""
    assert view.tokens == sum(item.tokens for item in view.items) <= view.budget
    firsts = []
    told = set()
    tiers = {tier.name: tier for tier in memory.optics.ladder.tiers}
    for item in view.items:
        if isinstance(item, TextItem):
            firsts.append(item.seq)
            assert item.seq not in told
            told.add(item.seq)
            assert item.tokens == estimate_tokens(item.message.text())
        elif isinstance(item, PageItem):
            firsts.append(item.messages[0])
            tier = tiers[item.tier]
            extra = 0 if tier.kind == "sheet" else estimate_tokens(item.facts)
            assert item.tokens == tier.tokens + extra
            with Image.open(io.BytesIO(item.png)) as picture:
                side = 512 if tier.kind == "sheet" else min(tier.side, 512)
                assert picture.size == (item.width, item.height) == (side, side)
        else:
            assert isinstance(item, FactsItem)
            firsts.append(item.messages[0])
            assert item.tokens == estimate_tokens(item.text)
    if not any(isinstance(item, PageItem) and len(item.pages) > 1 for item in view.items):
        assert firsts == sorted(firsts)
    for group in groups:
        assert not group & told or group <= told, "a group is text or it is not"
    for provider in ("openai", "anthropic", "gemini", "qwen"):
        view.messages(provider)
    return told


texts = st.one_of(
    st.integers(1, 400).map(lambda count: said(count, count)),
    st.text(max_size=300),
    st.sampled_from(
        ["", "\n\n\n", "x" * 3000, "<image> [user]\n[tool | c]", "\u202e\u0301" * 40, "\ud7ff\U0001f600" * 50, "a\tb\r\nc\0d"]
    ),
)


@st.composite
def steps(draw):
    found = []
    for _ in range(draw(st.integers(1, 12))):
        kind = draw(st.sampled_from(["say", "say", "say", "call", "context", "pin", "system", "small", "reopen"]))
        found.append((kind, draw(texts), draw(st.integers(0, 30)), draw(st.booleans())))
    return found


class History:
    """A memory that steps are taken in, and what is known of it."""

    def __init__(self, path, engine, budget, policy):
        self.path, self.engine, self.budget = path, engine, budget
        self.memory = Memory.open(path, engine=engine, budget=budget, policy=policy)
        self.groups, self.seqs, self.pinned, self.calls = [], [], set(), 0

    def take(self, kind, text, number, flag):
        if kind in ("say", "system"):
            role = "system" if kind == "system" else "user"
            (seq,) = self.memory.add({"role": role, "content": text[:200] if kind == "system" else text})
            self.groups.append({seq})
            self.seqs.append(seq)
        elif kind == "call":
            self.call(text, is_parted=flag)
        elif kind == "pin" and self.seqs and not self.pinned:
            self.pinned = set(self.memory.pin(self.seqs[number % len(self.seqs)]))
        elif kind == "reopen":
            self.memory.close()
            self.memory = Memory.open(self.path, engine=self.engine)
        elif kind == "small":
            self.context(self.budget * 3 // 4)
        elif kind == "context":
            self.context()

    def call(self, text, *, is_parted):
        self.calls += 1
        name = f"call-{self.calls}"
        asked = {"id": name, "type": "function", "function": {"name": "run", "arguments": '{"path": "/tmp/x"}'}}
        first = {"role": "assistant", "content": None, "tool_calls": [asked]}
        second = {"role": "tool", "tool_call_id": name, "content": text}
        seqs = self.memory.add([first])
        if is_parted:
            self.context()
        seqs += self.memory.add([second])
        self.groups.append(set(seqs))
        self.seqs += seqs

    def context(self, budget=None):
        try:
            view = self.memory.context(budget)
        except InputError as error:
            if "needs" not in str(error):  # what is pinned or excluded does not fit, and nothing else is a reason
                raise
            return None
        told = check_context(view, self.memory, self.groups)
        again = self.memory.context(budget)
        assert again.digest() == view.digest(), "equal bytes where nothing changed"
        assert not again.receipt.changes
        if self.pinned and not self.memory._shown:
            self.check_pins(view, told)
        return view

    def check_pins(self, view, told):
        """What is pinned is text, or, where its text was gone when it was pinned, a sharp picture."""
        pages = [item for item in view.items if isinstance(item, PageItem) and item.tier == "tiny"]
        for seq in self.pinned:
            assert seq in told or any(item.messages[0] <= seq <= item.messages[1] for item in pages)


policies = st.sampled_from([Policy(), Policy(keep=2), Policy(keep=0, clear_at_least=200), Policy(trigger=250, half_life=4)])


@settings(max_examples=30)
@given(steps=steps(), budget=st.sampled_from([300, 700, 1500, 4000]), policy=policies)
def test_histories(engine, steps, budget, policy):
    with tempfile.TemporaryDirectory() as folder:
        found = History(Path(folder) / "memory", engine, budget, policy)
        try:
            for step in steps:
                found.take(*step)
            found.context()
            report = found.memory.verify()
            assert report.is_clean, report.problems
        finally:
            found.memory.close()


def test_an_unchanged_prefix_keeps_its_bytes(engine, tmp_path):
    with Memory.open(tmp_path / "m", engine=engine, budget=3000) as memory:
        history(memory, 20)
        view = memory.context()
        stable = changed = 0
        for number in range(20, 40):
            memory.add(turn(number))
            following = memory.context()
            if following.receipt.changes:
                changed += 1
            else:
                stable += 1
                assert following.digest(len(view.items)) == view.digest()
            view = following
        assert stable >= changed, "most adds change nothing of what was shown"


def test_clear_at_least_changes_seldom(engine, tmp_path):
    counts = {}
    for name, policy in (("default", Policy()), ("clears", Policy(clear_at_least=1000))):
        with Memory.open(tmp_path / name, engine=engine, budget=2500, policy=policy) as memory:
            counts[name] = 0
            for number in range(40):
                memory.add(turn(number))
                counts[name] += bool(memory.context().receipt.changes)
    assert 0 < counts["clears"] < counts["default"]


def test_the_whole_ladder(engine, tmp_path):
    """A long history in a small budget: text, sharp pages, smaller ones; nothing is lost, and receipts say all of it."""
    with Memory.open(tmp_path / "m", engine=engine, budget=900) as memory:
        history(memory, 60)
        stats = memory.stats()
        assert stats.counts.messages == 120
        assert sum(stats.tiers.values()) == stats.counts.pages
        assert stats.tiers["stored"] > 0
        view = memory.context()
        assert {type(item) for item in view.items} >= {TextItem, PageItem}
        assert view.items[-1].message.given["content"] == said(-59)
        receipts = memory.receipts()
        assert receipts
        assert all(isinstance(each, Receipt) and each.tokens_after <= 900 for each in receipts)
        for number in (0, 7, 30, 59):
            assert key(number) in memory.recall(f"key of host {number}", limit=1)[0].text


def test_small_tiers_are_shown_where_they_are_pictures(engine, tmp_path):
    """Pages of all sides, and a contact sheet, made by hand: an allocation seldom wants them all."""
    with Memory.open(tmp_path / "m", engine=engine, budget=6000) as memory:
        history(memory, 40)
        memory.context(2000)
        names = ("tiny", "square-384-facts", "square-384", "square-256", "sheet", "tiny-facts")
        shown = memory._shown[2000]
        wanted = {number: names[at % 6] for at, number in enumerate(sorted(shown)[:8])}
        with memory._store.transaction() as change:
            for number, name in wanted.items():
                change.change_page(number, tier=name)
            from optmem.memory.ageing import draw_sheets

            assert draw_sheets(change, memory.optics) == []
        view = memory.context()
        tiers = [item.tier for item in view.items if isinstance(item, PageItem)]
        assert set(tiers) == set(wanted.values())
        assert tiers.count("sheet") == 1, "pages on one sheet are one picture"
        told = check_context(view, memory, [])
        assert told
        for item in view.items:
            if isinstance(item, PageItem):
                tokens = item.vision_tokens()
                assert tokens.fed_tokens == item.tokens - (estimate_tokens(item.facts) if item.facts else 0)


# --- what is not on pages yet -------------------------------------------------------------------------------------------------


def sketches(view):
    return [item for item in view.items if isinstance(item, PageItem) and item.run < 0]


def read_from(engine, item):
    (done,) = engine.decode([item.vision_tokens()])
    return done.text


def test_what_fills_no_page_is_drawn_where_text_does_not_fit(engine, tmp_path):
    """It stays text in the store, and the pages are there as soon as the text would push others out."""
    with Memory.open(tmp_path / "m", engine=engine, budget=160) as memory:
        for number in range(3):
            memory.add(turn(number, extra=said_of(number)))
        view = memory.context()
        assert sketches(view)
        assert memory.stats().counts.pages == 0, "nothing is given up for it"
        assert view.receipt.changes
        assert not memory.context().receipt.changes
        assert all(change.from_tier == "text" for change in view.receipt.changes)
        seen = "".join(read_from(engine, item) for item in sketches(view))
        assert key(0) in seen
        assert key(1) in seen
        assert memory.recall("key of host 1")[0].source == "verbatim"
        assert memory.context(10_000).tokens > 160
        assert all(isinstance(item, TextItem) for item in memory.context(10_000).items)


def test_a_sketch_grows_at_its_end_and_becomes_pages(engine, tmp_path):
    with Memory.open(tmp_path / "m", engine=engine, budget=400, policy=Policy(keep=0)) as memory:
        seen, full = {}, 0
        for number in range(24):
            memory.add(turn(number))
            view = memory.context()
            again = memory.context()
            assert again.digest() == view.digest()
            for item in sketches(view)[:-1]:  # full pages do not change
                first = item.messages[0]
                full += first in seen
                assert seen.setdefault(first, item.content) == item.content
        assert full
        assert view.items[-1].messages[-1] == 48 if isinstance(view.items[-1], PageItem) else view.items[-1].seq == 48
        stats = memory.stats()
        at_once = paginate([message for number in range(24) for message in turn(number)], size=512)
        assert stats.counts.pages <= len(at_once) + 1, "no page is drawn for every context"
        tiers = [item.tier for item in view.items if isinstance(item, PageItem)]
        assert tiers == ["tiny"] * len(tiers)
        assert memory.verify().is_clean


def test_messages_of_a_sketch_are_sent_as_text_where_that_costs_less(engine, tmp_path):
    with Memory.open(tmp_path / "m", engine=engine, budget=160) as memory:
        memory.add([message for number in range(3) for message in turn(number)])
        view = memory.context()
        (pages,) = [given for given in view._given("openai") if isinstance(given, Pages)]
        assert len(pages.pictures) == len(sketches(view))
        assert len(pages.messages) + len([item for item in view.items if isinstance(item, TextItem)]) == 6


@pytest.mark.parametrize("policy", [Policy(), Policy(keep=6, keep_share=1.0)], ids=["default", "six"])
def test_the_newest_messages_are_text_as_far_as_the_policy_says(engine, tmp_path, policy):
    with Memory.open(tmp_path / "m", engine=engine, budget=2048, policy=policy) as memory:
        history(memory, 200, every=50)
        texts = [item for item in memory.context().items if isinstance(item, TextItem)]
        assert [item.seq for item in texts] == list(range(401 - len(texts), 401)), "the newest, without a gap"
        tokens = sum(item.tokens for item in texts)
        if policy.keep is None:
            assert 0 < tokens <= policy.kept_tokens(2048) + 73, "an eighth, and what costs no more than its page"
        else:
            assert len(texts) >= 6


def test_pages_come_back_with_a_larger_budget(engine, tmp_path):
    with Memory.open(tmp_path / "m", engine=engine, budget=300) as memory:
        history(memory, 40)
        small = memory.context()
        stored = memory.stats().tiers["stored"]
        assert stored > 2
        large = memory.context(4000)
        assert len([item for item in large.items if isinstance(item, PageItem) and item.tier == "tiny"]) >= stored
        assert memory.context(4000).digest() == large.digest()
        assert memory.context().digest() == small.digest(), "for the memory's own budget nothing is changed"
    with Memory.open(tmp_path / "m", engine=engine, budget=4000) as memory:
        view = memory.context()
        assert "stored" not in memory.stats().tiers
        assert {change.why for change in view.receipt.changes} == {"the budget is larger"}
        assert memory.context().digest() == view.digest()
        assert memory.verify().is_clean


def test_pixels_that_aged_do_not_come_back(engine, tmp_path):
    with Memory.open(tmp_path / "m", engine=engine, budget=300, keep_sharp=False) as memory:
        history(memory, 40)
        stored = memory.stats().tiers["stored"]
        sides = [item.width for item in memory.context(4000).items if isinstance(item, PageItem)]
        assert sides.count(256) >= stored


def test_budgets_of_others_age_nothing(engine, tmp_path):
    with Memory.open(tmp_path / "m", engine=engine, budget=20_000) as memory:
        history(memory, 20)
        before = memory.context().digest()
        assert memory.context(600).tokens <= 600
        assert memory.context().digest() == before
        assert not memory.receipts()


@pytest.mark.parametrize("reader", READERS)
def test_pictures_are_no_larger_than_a_provider_sees_them(engine, tmp_path, reader):
    with Memory.open(tmp_path / "m", engine=engine, budget=700) as memory:
        history(memory, 12)
        view = memory.context()
        shown = [item for item in view.items if isinstance(item, PageItem)]
        sent = [picture for given in view._given(reader) if isinstance(given, Pages) for picture in given.pictures]
        assert [(picture.width, picture.height) for picture in sent] == [
            best_size(reader, item.width, item.height) for item in shown
        ]
        for picture, item in zip(sent, shown, strict=True):
            assert Image.open(io.BytesIO(picture.png)).size == (picture.width, picture.height)
            assert (picture.png == item.png) == (picture.width == item.width)


def test_what_cannot_fit_is_said(engine, tmp_path):
    with Memory.open(tmp_path / "m", engine=engine, budget=100) as memory:
        memory.add({"role": "system", "content": said(1, 300)})
        with pytest.raises(InputError, match=r"needs .* tokens"):
            memory.context()
        with pytest.raises(InputError, match="budget"):
            memory.context(-1)
        assert memory.context(1000).tokens <= 1000


def test_the_saving_is_priced(engine, tmp_path):
    """Where text is kept, a provider gets as text what would cost more as a picture."""
    with Memory.open(tmp_path / "m", engine=engine, budget=1200, archive=True) as memory:
        history(memory, 30)
        view = memory.context()
        found = view.payload("anthropic")
        assert found.prices
        for price in found.prices:
            assert price.is_worth_it == (price.image_tokens < price.text_tokens)
        assert found.saved == sum(price.saved for price in found.prices if price.is_worth_it)
        assert found.pictured == tuple(price.is_worth_it for price in found.prices)
        drawn, told = view.payload("anthropic", pictures=True), view.payload("anthropic", pictures=False)
        assert drawn.saved == sum(price.saved for price in found.prices)
        assert told.saved == 0
        assert (set(drawn.pictured), set(told.pictured)) == ({True}, {False})
        as_pictures = drawn.to_json()
        assert as_pictures.count(b'"image"') >= found.to_json().count(b'"image"')
        assert b'"image"' not in view.payload("anthropic", pictures=False).to_json()


# --- reading back -------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module", params=["text", "archive", "optical"])
def kept(request, engine, tmp_path_factory):
    """A long history of each kind of index."""
    path = tmp_path_factory.mktemp("kept") / request.param
    index = "optical" if request.param == "optical" else "text"
    with Memory.open(path, engine=engine, budget=800, index=index, archive=request.param == "archive") as memory:
        history(memory, 16)
        yield request.param, memory


def test_recall_finds_keys_and_paths(kept):
    kind, memory = kept
    right = 0
    for number in range(0, 16, 3):
        (hit,) = memory.recall(f"/srv/app/{number}.cfg", limit=1)
        assert f"/srv/app/{number}.cfg" in hit.text
        right += key(number) in hit.text
        assert hit.messages == (2 * number + 1,)
        if hit.page is None:
            assert (hit.source, hit.confidence) == ("verbatim", 1.0)
        else:
            assert hit.source == ("verbatim" if kind == "archive" else "ocr")
            assert hit.lines[0] < hit.lines[1] <= 32
    assert right >= 5, "nano reads 99 of 100 identifiers on sharp pages"


def test_recall_by_the_key_itself(kept):
    _, memory = kept
    (hit,) = memory.recall(key(2), limit=1)
    assert "host 2 " in hit.text


def test_what_was_never_said_is_not_found(kept):
    _, memory = kept
    assert memory.recall("zebra quokka wombat") == []


def test_a_page_reads_back_as_it_was(kept):
    kind, memory = kept
    hit = memory.read("p1")
    given = [each for number in range(4) for each in turn(number, extra=said_of(number))]
    drawn = paginate(given[: len(hit.messages)])
    assert hit.source == ("verbatim" if kind == "archive" else "ocr")
    assert hit.text == drawn[0].text()
    assert hit.confidence > 0.5
    with pytest.raises(InputError, match="p12"):
        memory.read("nonsense")
    with pytest.raises(InputError, match="no page 999"):
        memory.read("p999")


def test_what_was_read_is_kept(engine, tmp_path):
    with Memory.open(tmp_path / "m", engine=engine, budget=600) as memory:
        history(memory, 10)
        first = memory.recall("key of host 1", limit=1)
        count = memory.stats().counts.readings
        assert memory.recall("key of host 1", limit=1) == first
        assert memory.stats().counts.readings == count > 0


def test_optical_memories_keep_no_text_of_pages(engine, tmp_path):
    with Memory.open(tmp_path / "m", engine=engine, budget=600, index="optical") as memory:
        history(memory, 12)
        assert memory.recall("host 1 key")
        hidden = [key(number) for number in range(2)]
        with memory._snapshot() as view:
            contents = [each.content or "" for each in view.messages()]
            assert not any(secret in content for secret in hidden for content in contents)
            assert view.counts().lines == 0
            assert all(page.factsheet == "" for page in view.pages())
    with pytest.raises(InputError, match="cannot be changed"):
        Memory.open(tmp_path / "m", engine=engine, index="text")
    with pytest.raises(InputError, match="choose one"):
        Memory.open(tmp_path / "other", engine=engine, index="optical", archive=True)


def test_facts_where_the_reading_is_less_sure(engine, tmp_path):
    with Memory.open(tmp_path / "m", engine=engine, budget=600) as memory:
        history(memory, 10)
        (hit,) = memory.recall("key of host 1", limit=1, min_confidence=0.9999999)
        assert hit.source == "factsheet"
        assert key(1) in hit.facts
        assert "/srv/app/1.cfg" in hit.text
        assert "less sure" in hit.note
        (plain,) = memory.recall("Turn " + said(1), limit=1, min_confidence=0.9999999)
        assert plain.source == "ocr"
        assert "less sure" in plain.note


def test_pixels_may_age_too(engine, tmp_path):
    with Memory.open(tmp_path / "m", engine=engine, budget=300, keep_sharp=False) as memory:
        history(memory, 24)
        (hit,) = memory.recall("key of host 1", limit=1, min_confidence=0.9)
        assert hit.fidelity < 0.9
        assert hit.source == "factsheet"
        assert key(1) in hit.text
        assert memory.verify().is_clean


def test_small_pictures_are_read_without_a_fault(engine, tmp_path):
    """Of some a glance is sure that they have fewer rows than are asked for.  What is read surely is right."""
    with Memory.open(tmp_path / "m", engine=engine, budget=300, keep_sharp=False) as memory:
        history(memory, 24)
        for number in range(14):
            hits = memory.recall(said_of(number), limit=2)
            assert all(key(number) in hit.text for hit in hits[:1] if hit.confidence >= 0.9)
        for page in range(1, memory.stats().counts.pages + 1):
            assert memory.read(f"p{page}").confidence <= 1


def test_hits_of_the_sharp_tier_are_as_sure_as_they_say(engine, tmp_path):
    """Among the hits at 0.9 and more, nine of ten are exact."""
    with Memory.open(tmp_path / "m", engine=engine, budget=600) as memory:
        history(memory, 24)
        sure = exact = 0
        for number in range(20):
            for hit in memory.recall(f"key of host {number} /srv/app/{number}.cfg", limit=1):
                if hit.source == "ocr" and hit.confidence >= 0.9:
                    sure += 1
                    exact += hit.text == said_of(number)
        assert sure >= 10
        assert exact >= 0.9 * sure


# --- pictures and documents ---------------------------------------------------------------------------------------------------


def png_of(text, side=512):
    file = io.BytesIO()
    Image.fromarray(paginate(text, size=side)[0].image()).save(file, "PNG")
    return base64.b64encode(file.getvalue()).decode()


def with_picture(data, kind="image_url"):
    url = {"url": f"data:image/png;base64,{data}"}
    return {"role": "user", "content": [{"type": "text", "text": "what I see"}, {"type": kind, "image_url": url}]}


def test_pictures_are_pages_and_are_read(engine, tmp_path):
    with Memory.open(tmp_path / "m", engine=engine, budget=2000) as memory:
        (seq,) = memory.add(with_picture(png_of("invoice number 7731-A\ntotal of 1,250.00 EUR\n")))
        memory.add(turn(1))
        view = memory.context()
        check_context(view, memory, [{seq}])
        pictures = [item for item in view.items if isinstance(item, PageItem)]
        assert len(pictures) == 1
        assert view.items[0].seq == seq
        assert b"not drawn on this page" in view.items[0].content
        (hit,) = memory.recall("invoice number", limit=1)
        assert (hit.text, hit.source, hit.messages) == ("invoice number 7731-A", "ocr", (seq,))
        assert pictures[0].fidelity is None  # nobody measured how others' pictures are read
        assert hit.fidelity is None
        assert "nano reads only pages that optmem draws" in hit.note
        assert memory.read(pictures[0].pages[0]).note == hit.note
        assert memory.recall("1,250.00", limit=1)[0].text == "total of 1,250.00 EUR"


def test_odd_pictures(engine, tmp_path):
    """Small, large, in colour, in a tool's result; one that is damaged hides nothing."""
    wide = io.BytesIO()
    Image.fromarray(np.full((40, 1500, 3), 200, np.uint8)).save(wide, "PNG")
    tiny = io.BytesIO()
    Image.new("L", (1, 1)).save(tiny, "PNG")
    broken = base64.b64encode(b"\x89PNG\r\n\x1a\nnothing").decode()
    with Memory.open(tmp_path / "m", engine=engine, budget=2000) as memory:
        for data in (base64.b64encode(wide.getvalue()).decode(), base64.b64encode(tiny.getvalue()).decode(), broken):
            memory.add(with_picture(data))
        source = {"type": "base64", "media_type": "image/png", "data": png_of("seen by a tool\n")}
        memory.add(
            [
                {"role": "assistant", "content": [{"type": "tool_use", "id": "t1", "name": "look", "input": {}}]},
                {
                    "role": "user",
                    "content": [{"type": "tool_result", "tool_use_id": "t1", "content": [{"type": "image", "source": source}]}],
                },
            ]
        )
        view = memory.context()
        assert any("message 3" in note for note in view.receipt.notes)
        check_context(view, memory, [{4, 5}])
        assert memory.recall("seen by a tool", limit=1)[0].text == "seen by a tool"
        assert memory.verify().is_clean


def test_documents_are_pages(engine, tmp_path):
    pytest.importorskip("pypdfium2")
    file = io.BytesIO()
    Image.fromarray(paginate("the contract ends in May\n")[0].image()).save(file, "PDF")
    pdf = {"type": "base64", "media_type": "application/pdf", "data": base64.b64encode(file.getvalue()).decode()}
    text = {"type": "text", "media_type": "text/plain", "data": "notes on the lease\n"}
    with Memory.open(tmp_path / "m", engine=engine, budget=2000) as memory:
        memory.add({"role": "user", "content": [{"type": "document", "source": pdf}, {"type": "document", "source": text}]})
        view = memory.context()
        assert sum(isinstance(item, PageItem) for item in view.items) == 2
        assert memory.recall("lease", limit=1)[0].text == "notes on the lease"


# --- forgetting ---------------------------------------------------------------------------------------------------------------


def everything(path):
    return b"".join(file.read_bytes() for file in sorted(Path(path).rglob("*")) if file.is_file())


@pytest.mark.parametrize("archive", [False, True])
def test_what_is_forgotten_is_nowhere(engine, tmp_path, archive):
    path = tmp_path / "m"
    with Memory.open(path, engine=engine, budget=700, archive=archive) as memory:
        history(memory, 12)
        memory.recall("key of host 2 /srv/app/2.cfg")
        memory.recall("key of host 3 /srv/app/3.cfg")
        with memory._snapshot() as view:
            (number,) = view.pages_showing(5, 5)[:1]
            files = [view.bytes_of(blob) for blob in view.blobs(number)]
        assert key(2).encode() in everything(path)
        done = memory.forget(5)
        assert done.messages == (5,)
        assert done.is_proven, done.verified
        assert done.searched > 0
        left = everything(path)
        assert key(2).encode() not in left
        assert all(file not in left for file in files)
        assert not any(key(2) in hit.text for hit in memory.recall(key(2)))
        assert key(3) in memory.recall("key of host 3 /srv/app/3.cfg", limit=1)[0].text, "what shared its page is still read"
        check_context(memory.context(), memory, [])
        assert memory.verify([key(2)]).is_clean
    assert key(2).encode() not in everything(path)


def test_forgetting_takes_groups_whole_and_leaves_the_tail_readable(engine, tmp_path):
    with Memory.open(tmp_path / "m", engine=engine, budget=2000) as memory:
        call = {"id": "c1", "type": "function", "function": {"name": "run", "arguments": "{}"}}
        seqs = memory.add(
            [{"role": "assistant", "tool_calls": [call]}, {"role": "tool", "tool_call_id": "c1", "content": "secret-word-of-all"}]
        )
        memory.add({"role": "user", "content": "what remains"})
        done = memory.forget(seqs[1])
        assert done.messages == tuple(seqs)
        assert done.is_proven
        assert [item.message.given["content"] for item in memory.context().items] == ["what remains"]
        with pytest.raises(InputError, match="no message"):
            memory.forget(seqs[0])


def test_contact_sheets_are_redrawn_without_forgotten_pages(engine, tmp_path):
    from optmem.memory.ageing import draw_sheets

    with Memory.open(tmp_path / "m", engine=engine, budget=700) as memory:
        history(memory, 30)
        with memory._store.transaction() as change:
            for number in (1, 2, 3):
                change.change_page(number, tier="sheet")
            assert draw_sheets(change, memory.optics) == []
            old = change.blob(2, "sheet")
        done = memory.forget("p2")
        assert done.is_proven, done.verified
        assert "p2" in done.pages
        assert old not in everything(tmp_path / "m")
        view = memory.context()
        (sheet,) = [item for item in view.items if isinstance(item, PageItem) and item.tier == "sheet"] or [None]
        assert sheet is None or "p2" not in sheet.pages


def test_all_can_be_forgotten(engine, tmp_path):
    with Memory.open(tmp_path / "m", engine=engine, budget=700) as memory:
        seqs = history(memory, 6)
        assert memory.forget(seqs).is_proven
        assert memory.context().items == ()
        assert memory.recall("host") == []
        memory.add(turn(1))
        assert len(memory.context().items) == 2


# --- the rest -----------------------------------------------------------------------------------------------------------------


def test_what_is_refused_leaves_no_memory_behind(tmp_path):
    wrong = ({"policy": {"keep": 2}}, {"index": "foo"}, {"budget": -1}, {"budget": "9"}, {"engine": "nano"})
    for number, asked in enumerate(wrong):
        with pytest.raises(InputError, match=r"policy|index|budget|engine"):
            Memory.open(tmp_path / f"m{number}", **asked)
    assert not list(tmp_path.iterdir())


def test_odd_selectors_and_weights_are_refused(engine, tmp_path):
    with Memory.open(tmp_path / "m", engine=engine) as memory:
        memory.add(turn(1))
        for selector in (None, 1.5, slice(2, 4), [], [None], "p9"):
            with pytest.raises(InputError, match=r"messages are meant|nothing was selected|no message|no page"):
                memory.forget(selector)
        for weight in (-3, float("nan"), "x"):
            with pytest.raises(InputError, match="a weight"):
                memory.weigh(1, weight)


def test_messages_that_cannot_be_kept_are_refused_whole(engine, tmp_path):
    with Memory.open(tmp_path / "m", engine=engine) as memory:
        for wrong in (
            "text",
            5,
            [{"role": "user"}],
            [{"role": "user", "content": "\ud800"}],
            [{"role": "user", "content": "good"}, {"role": "tool", "tool_call_id": "x", "content": "answers nothing"}],
        ):
            with pytest.raises(InputError):
                memory.add(wrong)
        assert memory.stats().counts.messages == 0
        assert memory.add([]) == []
        assert memory.context().items == ()
        for query, limit, least in (("", 3, None), ("x", -1, None), ("x", 3, 2.0)):
            with pytest.raises(InputError):
                memory.recall(query, limit, least)


def test_a_call_that_nobody_answers_is_given_up(engine, tmp_path):
    call = {"id": "c1", "type": "function", "function": {"name": "run", "arguments": "{}"}}
    with Memory.open(tmp_path / "m", engine=engine, budget=500) as memory:
        memory.add({"role": "assistant", "tool_calls": [call]})
        for number in range(40):
            memory.add(turn(number, 10))
            memory.context()
        with memory._snapshot() as view:
            groups = {}
            for each in view.messages():
                groups.setdefault(each.group, []).append(each.seq)
        assert max(map(len, groups.values())) < 20


def test_damaged_pages_do_not_hide_others(engine, tmp_path):
    path = tmp_path / "m"
    with Memory.open(path, engine=engine, budget=900) as memory:
        history(memory, 10)
        shown = [item.pages[0] for item in memory.context().items if isinstance(item, PageItem)]
        number = int(shown[-1][1:])
        with memory._snapshot() as view:
            (name,) = [blob.name for blob in view.blobs(number) if blob.kind == "pixels"]
        file = path / "blobs" / name
        file.write_bytes(file.read_bytes()[:100])
        view = memory.context()
        assert any("damaged" in note or "not what was written" in note for note in view.receipt.notes)
        assert [item.pages[0] for item in view.items if isinstance(item, PageItem)] == shown[:-1]
        with pytest.raises(PageCorrupted):
            memory.read(shown[-1])
        assert memory.recall("key of host 1", limit=1)[0].source == "ocr"
        assert not memory.verify().is_clean
        memory.forget(shown[-1])
        assert memory.verify().is_clean


def test_readers_beside_the_writer(engine, tmp_path):
    path = tmp_path / "m"
    with Memory.open(path, engine=engine, budget=900) as writer:
        history(writer, 10)
        with pytest.raises(StoreBusyError):
            Memory.open(path, engine=engine)
        with Memory.open(path, engine=engine, mode="read") as reader:
            assert reader.context().digest() == writer.context().digest()
            assert key(1) in reader.recall("key of host 1", limit=1)[0].text
            assert reader.stats() == writer.stats()
            assert reader.stats().counts.readings == 0, "a reader keeps nothing"
            for forbidden in (
                lambda: reader.add(turn(1)),
                lambda: reader.forget(1),
                reader.age,
                lambda: reader.pin(1),
                reader.verify,
            ):
                with pytest.raises(StoreError, match="read only"):
                    forbidden()
            writer.add({"role": "user", "content": "said meanwhile"})
            assert reader.context().items[-1].message.given["content"] == "said meanwhile"


READ = """
import sys
from optmem import Memory
with Memory.open(sys.argv[1], mode="read") as memory:
    (hit,) = memory.recall("what was said meanwhile", limit=1)
    print(hit.text, hit.source, memory.stats().counts.messages)
"""


def test_another_process_reads_what_was_added(engine, tmp_path):
    with Memory.open(tmp_path / "m", engine=engine, budget=900) as memory:
        history(memory, 4)
        memory.add({"role": "user", "content": "this was said meanwhile"})
        done = subprocess.run([sys.executable, "-c", READ, str(tmp_path / "m")], capture_output=True, text=True, check=True)
        assert done.stdout == "this was said meanwhile verbatim 9\n"


def test_settings_stay_with_the_memory(engine, tmp_path):
    policy = Policy(keep=2, exclude=("secrets",))
    with Memory.open(tmp_path / "m", engine=engine, budget=777, archive=True, policy=policy) as memory:
        memory.add(turn(1))
    with Memory.open(tmp_path / "m", engine=engine) as memory:
        assert (memory.settings.budget, memory.settings.archive, memory.settings.policy) == (777, True, policy)
    with Memory.open(tmp_path / "m", engine=engine, budget=900, archive=False) as memory:
        assert (memory.settings.budget, memory.settings.archive) == (900, False)
    for wrong in ({"budget": -1}, {"budget": True}, {"index": "words"}, {"mode": "append"}, {"policy": {}}, {"archive": "yes"}):
        with pytest.raises(InputError):
            Memory.open(tmp_path / "wrong", engine=engine, **wrong)


def test_nano_is_loaded_when_it_is_needed(tmp_path):
    with Memory.open(tmp_path / "m") as memory:
        memory.add(turn(1, extra="the password is swordfish"))
        assert memory.recall("password", limit=1)[0].text == "the password is swordfish"
        assert memory.optics._given is None
        assert len(memory.context().items) == 2
        assert memory.optics._given is not None


def test_async_twins(engine, tmp_path):
    async def talk():
        with Memory.open(tmp_path / "m", engine=engine) as memory:
            await asyncio.gather(*(memory.aadd(turn(number)) for number in range(8)))
            view = await memory.acontext()
            hits = await memory.arecall("Turn 3", limit=1)
            stats, report = await memory.astats(), await memory.averify()
            assert await memory.aweigh(2, 1.5) == [2]
            pinned = await memory.apin(1)
            assert await memory.aunpin(1) == pinned
            await memory.aexport(tmp_path / "m.tar")
            assert [str(each) for each in await memory.areceipts()] == [str(each) for each in memory.receipts()]
            done = await memory.aforget(await memory.apin(1))
            return view, hits, stats, report, done

    view, hits, stats, report, done = asyncio.run(talk())
    assert len(view.items) == stats.counts.messages == 16
    assert hits[0].text.startswith("Turn 3")
    assert report.is_clean
    assert done.is_proven


def test_pins_and_weights(engine, tmp_path):
    with Memory.open(tmp_path / "m", engine=engine, budget=800) as memory:
        first = memory.add({"role": "user", "content": "always remember: " + said(1, 30)})
        memory.pin(first)
        history(memory, 20)
        assert memory.context().items[0].seq == first[0]
        memory.unpin(first)
        history(memory, 60)
        assert not isinstance(memory.context().items[0], TextItem)
        assert memory.weigh("p3", 1000.0)
        memory.recall("key of host 2", limit=1)
        with pytest.raises(InputError):
            memory.pin(10**6)
        with pytest.raises(InputError):
            memory.pin([])


# --- export -------------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def exported(engine, tmp_path_factory):
    folder = tmp_path_factory.mktemp("exported")
    with Memory.open(folder / "m", engine=engine, budget=800) as memory:
        history(memory, 12)
        memory.add({"role": "user", "content": "漢字 and \U0001f600"})
        memory.recall("key of host 1")
        memory.forget(3)
        memory.context()
        done = memory.export(folder / "m.tar")
        assert done.messages == memory.stats().counts.messages
        with pytest.raises(OptmemError, match="already"):
            memory.export(folder / "m.tar")
        yield folder / "m.tar", memory


def test_export_and_import(exported, engine, tmp_path):
    path, memory = exported
    assert path.stat().st_mode & 0o077 == 0
    with Memory.import_(path, tmp_path / "copy", engine=engine) as copy:
        assert copy.context().digest() == memory.context().digest()
        assert copy.receipts() == memory.receipts()
        assert copy.settings == memory.settings
        assert copy.recall("key of host 5") == memory.recall("key of host 5")
        assert copy.verify().is_clean
        assert copy.add(turn(3))[0] == memory.stats().counts.messages + 2, "numbers go on where they were"
    with pytest.raises(OptmemError, match="already"):
        Memory.import_(path, tmp_path / "copy")
    with pytest.raises(OptmemError, match="cannot be opened"):
        Memory.import_(tmp_path / "nothing.tar", tmp_path / "other")


def tamper(source, target, change):
    """A copy of an archive whose members went through `change`: name, content -> what is there instead."""
    import tarfile

    with tarfile.open(source) as old, tarfile.open(target, "w") as new:
        for member in old:
            for info, content in change(member, old.extractfile(member).read()):
                info.size = len(content)
                new.addfile(info, io.BytesIO(content))


def renamed(name):
    def change(info, content):
        if info.name == "messages.jsonl":
            info.name = name
        return [(info, content)]

    return change


def replaced(table, old, new):
    def change(info, content):
        return [(info, content.replace(old, new) if info.name == table else content)]

    return change


def linked(info, content):
    import tarfile

    if info.name.startswith("blobs/"):
        info.type, info.linkname = tarfile.SYMTYPE, "/etc/passwd"
        return [(info, b"")]
    return [(info, content)]


HOSTILE = {
    "a name outside": renamed("../messages.jsonl"),
    "an absolute name": renamed("/tmp/messages.jsonl"),
    "an unknown table": renamed("sqlite_master.jsonl"),
    "links": linked,
    "twice": lambda info, content: [(info, content)] * 2,
    "no manifest": lambda info, content: [] if info.name == "manifest.json" else [(info, content)],
    "no lines": lambda info, content: [] if info.name == "lines.jsonl" else [(info, content)],
    "changed text": replaced("lines.jsonl", b"key of host", b"key of ghost"),
    "not JSON": replaced("messages.jsonl", b"[", b"{"),
    "wrong types": replaced("pages.jsonl", b',"', b',1.5,"'),
    "damaged files": lambda info, content: [(info, content[:-1] + b"x" if info.name.startswith("blobs/") else content)],
    "missing files": lambda info, content: [] if info.name.startswith("blobs/") else [(info, content)],
    "something behind": lambda info, content: (
        [(info, content)] + ([(type(info)("more"), b"x")] if info.name == "manifest.json" else [])
    ),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_archives_are_refused(exported, tmp_path, name):
    path, _ = exported
    tamper(path, tmp_path / "hostile.tar", HOSTILE[name])
    with pytest.raises(InputError):
        Memory.import_(tmp_path / "hostile.tar", tmp_path / "copy")
    assert not (tmp_path / "copy").exists()
    assert not list(tmp_path.glob("*.jsonl"))


def test_cut_archives_are_refused(exported, tmp_path):
    path, _ = exported
    whole = path.read_bytes()
    for number, size in enumerate((0, 100, 513, len(whole) // 2, len(whole) - 20_000)):
        (tmp_path / "cut.tar").write_bytes(whole[:size])
        with pytest.raises(InputError):
            Memory.import_(tmp_path / "cut.tar", tmp_path / f"copy-{number}")
    (tmp_path / "noise.tar").write_bytes(random.Random(1).randbytes(5000))
    with pytest.raises(InputError):
        Memory.import_(tmp_path / "noise.tar", tmp_path / "copy")
