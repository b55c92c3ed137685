"""optmem itself as a method of the bench: a memory in a folder, asked as an agent asks it."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from pathlib import Path
from time import perf_counter

from optmem.bench.answers import Line, Sure
from optmem.bench.histories import History, Question
from optmem.bench.kept import Row, Timing
from optmem.bench.reader import Reader
from optmem.errors import InputError
from optmem.memory.context import FactsItem, PageItem, TextItem
from optmem.memory.memory import Memory
from optmem.memory.policy import Policy
from optmem.memory.recall import Hit
from optmem.memory.settings import Index
from optmem.pages import read_symbols
from optmem.train.scores import likeness

LIMIT = 5  # lines that a question brings: as many as tell an old value from a new one
COLUMNS = 64  # characters on a row of a page


@dataclass(frozen=True, slots=True)
class Form:
    """Which memory."""

    name: str
    index: Index = "text"
    has_facts: bool = True
    keeps_sharp: bool = False  # False: nothing counts but what the budget shows


FORMS = (
    Form("optmem, disk", keeps_sharp=True),
    Form("optical, disk", index="optical", keeps_sharp=True),
    Form("optmem"),
    Form("optmem, no facts", has_facts=False),
    Form("optical", index="optical"),
)


class Remembered:
    """One memory.  Without its sharp pages, a hit on what the context does not show does not count: nothing of it was kept.

    What the context shows as a page that is not full yet is in the store as text: it is read from its picture here.
    """

    def __init__(self, folder: Path, reader: Reader, history: History, form: Form, budget: int) -> None:
        self.form, self.history = form, history
        self.hits: list[Sure] = []
        self.asking = Timing()
        self.refused = 0  # questions that failed: they count as not answered
        policy = Policy() if form.has_facts else Policy(facts=0)
        self.memory = Memory.open(folder, reader.as_engine(), budget, policy=policy, index=form.index, keep_sharp=form.keeps_sharp)
        self.first = self.memory.add(history.chat())[0]
        context = self.memory.context()
        self.tokens = context.tokens
        self.tiers: dict[str, int] = {}
        self.reader = reader
        self._pages: set[str] = set()
        self._texts: set[int] = set()
        self._sketch: list[PageItem] = []
        self._rows: list[list[Row]] = []  # of each page of the sketch
        for item in context.items:
            if isinstance(item, TextItem):
                self._texts.add(item.seq)
            elif isinstance(item, PageItem):
                self._pages.update(item.pages)
                if item.run < 0:
                    self._sketch.append(item)
                self.tiers[item.tier] = self.tiers.get(item.tier, 0) + len(item.pages)
            elif isinstance(item, FactsItem):
                self._pages.add(item.page)
                self.tiers["facts"] = self.tiers.get("facts", 0) + 1

    def lines(self, question: Question) -> list[Line]:
        """What it recalls."""
        start, spared = perf_counter(), self.reader.spared
        try:
            hits = self.memory.recall(question.query, limit=LIMIT)
        except InputError:  # the engine takes a small page for one that has no such rows
            self.refused += 1
            hits = []
        if self.reader.spared == spared:  # all of it was work
            self.asking.add(perf_counter() - start, 1)
        kept = hits if self.form.keeps_sharp else [self._as_shown(hit) for hit in hits if self._is_kept(hit)]
        self.hits += [Sure(hit.confidence, self._is_exact(hit)) for hit in kept if hit.source == "ocr"]
        return [Line(hit.text, max(hit.messages) - self.first, hit.confidence, hit.facts) for hit in kept if hit.messages]

    def _is_kept(self, hit: Hit) -> bool:
        return hit.page in self._pages or any(seq in self._texts or self._is_sketched(seq) for seq in hit.messages)

    def _is_sketched(self, seq: int) -> bool:
        return seq not in self._texts and any(item.messages[0] <= seq <= item.messages[1] for item in self._sketch)

    def _as_shown(self, hit: Hit) -> Hit:
        """A line of a sketch as its picture is read: of the rows there, those that are most like it."""
        if hit.page is not None or not any(map(self._is_sketched, hit.messages)):
            return hit
        if not self._rows:
            self._rows = [self._read(item) for item in self._sketch]
        count = -(-(len(hit.text) + 1) // COLUMNS)
        places = [rows[at : at + count] for rows in self._rows for at in range(len(rows))]
        said = [("".join(row.text for row in some).rstrip("\n"), math.prod(row.confidence for row in some)) for some in places]
        text, confidence = max(said, key=lambda each: likeness(each[0], hit.text))
        return replace(hit, text=text, confidence=confidence, source="ocr")

    def _read(self, item: PageItem) -> list[Row]:
        (done,) = self.reader.decode([item.vision_tokens()])
        sure = [math.prod(row.probabilities) for row in done.rows]
        return [Row(read_symbols(symbols), each) for symbols, each in zip(done.row_symbols, sure, strict=False)]

    def _is_exact(self, hit: Hit) -> bool:
        """Also of a line that goes on over the edge of a page, of which a hit has one part: whole rows of it."""
        said = hit.text
        for seq in hit.messages:
            number = seq - self.first
            label = "[assistant]" if number % 2 else "[user]"
            for line in (label, *self.history.messages[number]):
                if said == line or (line.startswith(said) and said and len(said) % COLUMNS == 0):
                    return True
                if line.endswith(said) and said and (len(line) - len(said)) % COLUMNS == 0:
                    return True
        return False

    def close(self) -> None:
        """Lets go of the folder."""
        self.memory.close()
