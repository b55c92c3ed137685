"""The memory's store against a plain dictionary, over random histories."""

import hashlib
import json
import shutil
import tempfile
from pathlib import Path

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from optmem.memory.records import NewLine, NewMessage, NewPage, Reading
from optmem.memory.store import Reader, Store

texts = st.text(st.characters(exclude_categories=()), max_size=40)
tiers = st.sampled_from(["large", "base", "small", "tiny"])
kinds = st.sampled_from(["pixels", "tokens"])


class Stored(RuleBasedStateMachine):
    """Every rule is one transaction on the store and one plain change of the model."""

    @initialize()
    def begin(self):
        self.folder = Path(tempfile.mkdtemp())
        self.store = Store.open(self.folder / "memory")
        self.reader = Reader.open(self.folder / "memory")
        self.messages, self.pages, self.receipts, self.dead = {}, {}, [], set()
        self.next_seq = self.next_page = 1

    def teardown(self):
        if hasattr(self, "store"):
            self.store.close()
            self.reader.close()
            shutil.rmtree(self.folder)

    def groups(self):
        found = {}
        for seq, (group, *_) in self.messages.items():
            found.setdefault(group, []).append(seq)
        return found

    @rule(batch=st.lists(st.tuples(texts, st.booleans()), max_size=5))
    def add(self, batch):
        with self.store.transaction() as change:
            seqs = change.add_messages(
                [NewMessage("user", json.dumps(text), len(text), 0.5, joins, (text,)) for text, joins in batch]
            )
        assert seqs == list(range(self.next_seq, self.next_seq + len(batch)))
        for seq, (text, joins) in zip(seqs, batch, strict=True):
            before = self.messages[max(self.messages)][0] if self.messages else None
            self.messages[seq] = (before if joins and before else seq, json.dumps(text))
        self.next_seq += len(batch)

    @precondition(lambda self: self.messages)
    @rule(data=st.data(), tier=tiers, text=texts)
    def draw(self, data, tier, text):
        seqs = sorted(data.draw(st.sets(st.sampled_from(sorted(self.messages)), min_size=1, max_size=4)))
        page_id = hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()
        with self.store.transaction() as change:
            number = change.add_page(
                NewPage(page_id, tuple(seqs), tier, 1, 2, "c", 3, 4, lines=(NewLine(0, text, seqs[0], seqs[-1]),))
            )
        assert number == self.next_page
        self.next_page += 1
        self.pages[number] = {"id": page_id, "seqs": seqs, "tier": tier, "text": text, "blobs": {}, "readings": {}, "hits": 0}

    @precondition(lambda self: self.pages)
    @rule(data=st.data(), kind=kinds, tier=tiers, content=st.binary(max_size=3))
    def put(self, data, kind, tier, content):
        number = data.draw(st.sampled_from(sorted(self.pages)))
        content = content * 20  # few different ones: pages share files, and files come back
        with self.store.transaction() as change:
            change.put_blob(number, kind, content, tier=tier)
            change.change_page(number, tier=tier)
        self.pages[number]["blobs"][kind] = content
        self.pages[number]["tier"] = tier

    @precondition(lambda self: self.pages)
    @rule(data=st.data(), kind=kinds)
    def drop(self, data, kind):
        number = data.draw(st.sampled_from(sorted(self.pages)))
        with self.store.transaction() as change:
            change.drop_blob(number, kind)
        self.pages[number]["blobs"].pop(kind, None)

    @precondition(lambda self: self.pages)
    @rule(data=st.data(), tier=tiers, row=st.integers(0, 3), text=texts)
    def cache(self, data, tier, row, text):
        number = data.draw(st.sampled_from(sorted(self.pages)))
        with self.store.transaction() as change:
            change.put_readings(number, tier, [Reading(row, text, 0.25)])
            change.count_hit(number, 1.0)
        self.pages[number]["readings"][tier, row] = text
        self.pages[number]["hits"] += 1

    @rule(data=st.data())
    def drop_text(self, data):
        shown = {seq for page in self.pages.values() for seq in page["seqs"]}
        if shown:
            seq = data.draw(st.sampled_from(sorted(shown)))
            with self.store.transaction() as change:
                change.drop_text([seq])
            self.messages[seq] = (self.messages[seq][0], None)

    @rule(content=st.integers())
    def receipt(self, content):
        with self.store.transaction() as change:
            change.add_receipt(str(content), 1.0)
        self.receipts.append(str(content))

    @precondition(lambda self: self.messages)
    @rule(data=st.data())
    def forget(self, data):
        """A group, the pages that show any of it, and the other messages that would have lost their text with them."""
        groups = self.groups()
        gone = {data.draw(st.sampled_from(sorted(groups)))}
        while True:
            seqs = {seq for group in gone for seq in groups[group]}
            pages = {number for number, page in self.pages.items() if seqs & set(page["seqs"])}
            kept = {seq for number, page in self.pages.items() if number not in pages for seq in page["seqs"]}
            lost = {seq for n in pages for seq in self.pages[n]["seqs"] if self.messages[seq][1] is None and seq not in kept | seqs}
            if not lost:
                break
            gone |= {self.messages[seq][0] for seq in lost}
        with self.store.transaction() as change:
            change.erase(pages=sorted(pages), messages=sorted(seqs))
        self.messages = {seq: each for seq, each in self.messages.items() if seq not in seqs}
        self.pages = {number: page for number, page in self.pages.items() if number not in pages}

    @rule(data=st.data(), content=st.binary(min_size=1, max_size=3))
    def fail(self, data, content):
        """A transaction that raises changes nothing, files included."""
        try:
            with self.store.transaction() as change:
                (seq,) = change.add_messages([NewMessage("user", "{}", 1, 0.0)])
                number = change.add_page(NewPage("0" * 64, (seq,), "base", 1, 1, "c", 1, 1))
                change.put_blob(number, "pixels", content * 20, tier="base")
                for other in data.draw(st.sets(st.sampled_from(sorted(self.pages)))) if self.pages else ():
                    change.put_blob(other, "tokens", content * 20, tier="base")
                raise ZeroDivisionError
        except ZeroDivisionError:
            pass

    @rule(clean=st.booleans())
    def again(self, clean):
        if clean:
            self.store.close()
        del self.store
        self.store = Store.open(self.folder / "memory")

    @invariant()
    def same(self):
        if not hasattr(self, "store"):
            return
        for opened in (self.store, self.reader):
            with opened.snapshot() as view:
                assert {each.seq: (each.group, each.content) for each in view.messages()} == self.messages
                shown = {seq for page in self.pages.values() for seq in page["seqs"]}
                assert [each.seq for each in view.unpaged()] == sorted(set(self.messages) - shown)
                pages = {each.number: each for each in view.pages()}
                assert pages.keys() == self.pages.keys()
                for number, page in self.pages.items():
                    assert (pages[number].id, pages[number].tier, pages[number].hits) == (page["id"], page["tier"], page["hits"])
                    assert (pages[number].first, pages[number].last) == (page["seqs"][0], page["seqs"][-1])
                    assert view.messages_on(number) == page["seqs"]
                    assert [each.text for each in view.lines(number)] == [page["text"]]
                    assert {each.kind: view.blob(number, each.kind) for each in view.blobs(number)} == page["blobs"]
                    found = {
                        (t, r): each.text
                        for t in ("large", "base", "small", "tiny")
                        for r, each in view.readings(number, t).items()
                    }
                    assert found == page["readings"]
                assert [each.content for each in view.receipts()] == self.receipts
        contents = {content for page in self.pages.values() for content in page["blobs"].values()}
        assert len(list((self.folder / "memory" / "blobs").iterdir())) == len(contents)
        report = self.store.verify()
        assert report.is_clean, report


Stored.TestCase.settings = settings(max_examples=25, stateful_step_count=25, deadline=None)
TestStored = Stored.TestCase
