"""What a model is shown: within the budget, in order, pairs and pins kept, equal bytes where nothing changed."""

import io
import json
import random
import re
import tempfile
from pathlib import Path
from types import SimpleNamespace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from memory_histories import check_context, history, key, png_of, said, said_of, turn, with_picture
from PIL import Image

import optmem
from optmem import Memory
from optmem.errors import InputError
from optmem.memory.context import LEFT_OUT, NoteItem, PageItem, TextItem
from optmem.memory.drawing import cut
from optmem.memory.policy import Policy
from optmem.memory.pricing import READERS, best_size, find_reader, image_tokens
from optmem.memory.providers import Pages
from optmem.memory.receipt import Receipt
from optmem.pages import paginate
from optmem.text.count import estimate_tokens


@pytest.fixture(scope="module")
def engine():
    with optmem.Engine.from_pretrained("nano", device="cpu") as found:
        yield found


@settings(deadline=None)
@given(st.lists(st.integers(1, 40), max_size=60), st.sampled_from([16, 32]))
def test_no_page_is_drawn_for_the_end_of_a_text_alone(rows, page_rows):
    groups = [SimpleNamespace(rows=count, reason=None, attachments=[], is_rest=False, is_pinned=False) for count in rows]
    *closed, tail = cut(groups, page_rows)
    assert [group for run in [*closed, tail] for group in run] == groups
    for run in closed:
        assert sum(group.rows for group in run) % page_rows


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


@pytest.mark.parametrize("archive", [False, True])
def test_a_result_whose_call_is_on_a_page_is_said_as_text(engine, tmp_path, archive):
    """A picture that comes while a call waits is drawn with the call; no provider then takes the result as one."""
    call = {"id": "call-7", "type": "function", "function": {"name": "run", "arguments": "{}"}}
    with Memory.open(tmp_path / "m", engine=engine, budget=300, archive=archive) as memory:
        memory.add([{"role": "assistant", "content": said(1, 500), "tool_calls": [call]}, with_picture(png_of("seen meanwhile"))])
        assert not any(isinstance(item, TextItem) for item in memory.context().items)
        (seq,) = memory.add({"role": "tool", "tool_call_id": "call-7", "content": "done as asked"})
        view = memory.context()
        with memory._snapshot() as inside:
            (last,) = inside.messages(seq)
        for provider in ("openai", "anthropic", "gemini", "qwen"):
            for pictures in (False, True):
                given = view.payload(provider, pictures=pictures).to_json()
                is_text = b"done as asked" in given
                assert archive or (b"which is on a page" in given) == is_text
                assert is_text <= (last.content is not None), "what is on pages is no text any more"
        for number in range(6):
            memory.add(turn(number, 200))
        memory.context()
        with memory._snapshot() as inside:
            (last,) = inside.messages(seq, seq)
            assert (last.content is None) == (not archive), "what is on pages is no text any more"


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
        shown = memory._shown[2000, ""]
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


def test_what_is_left_out_is_said(engine, tmp_path):
    """To the model in a line that never changes, to the user with the budget that would have place for all."""
    with Memory.open(tmp_path / "m", engine=engine, budget=700) as memory:
        memory.add({"role": "system", "content": "Be brief."})
        assert not any(isinstance(item, NoteItem) for item in memory.context().items)
        for number in range(30):
            memory.add(turn(number))
            view = memory.context()
            assert view.tokens <= 700
            notes = [at for at, item in enumerate(view.items) if isinstance(item, NoteItem)]
            hints = [note for note in view.receipt.notes if note.startswith("not shown: ")]
            assert len(notes) == len(hints) <= 1
            if notes:
                assert notes == [1], "behind the instructions, before the first page"
                assert view.items[1].content == LEFT_OUT.encode()
                assert memory.context().digest() == view.digest()
        assert hints
        assert LEFT_OUT in json.dumps(view.messages("anthropic"), ensure_ascii=False).replace("\\n", "\n")
        needed = int(re.search(r"about ([0-9,]+) tokens", hints[0])[1].replace(",", ""))
        whole = memory.context(needed)
        assert not any(isinstance(item, NoteItem) for item in whole.items)
        assert not [note for note in whole.receipt.notes if note.startswith("not shown: ")]
        assert needed < 6000


@pytest.mark.parametrize("reader", ["openai", "anthropic", "gemini", "qwen", "gpt-4o"])
def test_a_budget_is_counted_by_the_reader_that_is_named(engine, tmp_path, reader):
    with Memory.open(tmp_path / "m", engine=engine, budget=2500) as memory:
        history(memory, 24)
        plain = memory.context()
        request = plain.payload(reader)
        assert (request.tokens > 2500) == bool(request.notes), "what costs more than the budget is said"
        before = memory.stats().tiers
        view = memory.context(reader=reader)
        assert memory.stats().tiers == before, "nothing ages for good"
        assert view.reader == find_reader(reader).name
        assert view.payload().provider == find_reader(reader).provider
        for item in view.items:
            if isinstance(item, PageItem):
                price = image_tokens(reader, *best_size(reader, item.width, item.height))
                assert item.tokens == price + estimate_tokens(item.facts)
        for pictures in (None, True):
            done = view.payload(pictures=pictures)
            assert done.tokens <= view.tokens <= 2500
            assert not done.notes
        assert memory.context().digest() == plain.digest()
        with pytest.raises(InputError, match="prices are known of"):
            memory.context(reader="nobody")


def test_a_memory_may_be_counted_by_its_reader(engine, tmp_path):
    with Memory.open(tmp_path / "m", engine=engine, budget=2500, reader="anthropic") as memory:
        history(memory, 30)
        view = memory.context()
        assert (view.reader, view.tokens <= 2500) == ("claude", True)
        assert memory.receipts(), "it ages for good"
        assert view.payload().tokens <= 2500
    with Memory.open(tmp_path / "m", engine=engine) as memory:
        assert memory.settings.reader == "claude"
        assert memory.context().digest() == view.digest()
    with pytest.raises(InputError, match="prices are known of"):
        Memory.open(tmp_path / "other", engine=engine, reader="nobody")


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


@pytest.mark.parametrize(("own", "asked"), [(600, None), (2048, 800)], ids=["own budget", "another budget"])
def test_what_flows_over_onto_a_new_page_is_no_text_beside_its_run(tmp_path, engine, own, asked):
    """A sketched page that is hardly begun cost less as its part of the text, and all text of its run was shown then."""
    words = ("alpha", "beta", "gamma", "server", "port", "the", "of", "and", "42", "deploy")
    chance = random.Random(1 if asked is None else 5)
    with Memory.open(tmp_path / "m", engine, budget=own) as memory:
        for _ in range(60):
            role = chance.choice(["user", "assistant"])
            count = chance.randint(5, 80)
            memory.add({"role": role, "content": " ".join(chance.choice(words) for _ in range(count))})
            view = memory.context(asked)
            check_context(view, memory, [])
