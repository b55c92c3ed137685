"""Draft and verify says what plain greedy decoding says, bit for bit, and gives back the memory of what was refused."""

import copy
from dataclasses import replace
from itertools import accumulate, pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from optmem.engine.draft import CellDraft, accept
from optmem.engine.loop import Loop
from optmem.engine.rows import BLOCK, PageRows, RowsRequest, draft_page, read_pages
from optmem.engine.runner import Runner
from optmem.engine.sampling import GREEDY, Pick, pick
from optmem.engine.scheduler import Limits, Scheduler
from optmem.engine.speech import PATIENCE
from optmem.errors import InputError
from optmem.model.cache import Cache
from optmem.model.glance import Glimpse
from optmem.model.nano import embed_prefix, join_rows
from optmem.pixels import find_mode
from optmem.testing import generator
from optmem.text.characters import END, EOL, MAX_ROWS

from .test_nano import TOKENIZER, pages, read_rows, tiny_model

EOL_ID, END_ID = TOKENIZER.special(EOL), TOKENIZER.special(END)
MOST = 12  # symbols of a row


class Fixed:
    """A draft that proposes the rest of one guess, right or wrong."""

    def __init__(self, ids):
        self.ids = list(ids)

    def propose(self, said):
        return self.ids[len(said) :]


@pytest.fixture(scope="module", params=[torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def reader(request):
    """A model whose rows say something, stop now and then, and three pages' prefixes of two sizes; on one thread."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    model = tiny_model(seed=3)
    with torch.no_grad():
        model.decoder.lm_head.weight.mul_(20)
        model.decoder.model.embed_tokens.weight.mul_(20)
        model.decoder.lm_head.weight[EOL_ID].mul_(3)
    model.encoder.to(request.param), model.decoder.to(request.param)
    prefixes = [
        embed_prefix(model.encoder, model.decoder, model.encoder(pages(2, side)[index : index + 1])[0], mode, TOKENIZER)
        for index, side in ((0, 128), (1, 128), (0, 192))
        for mode in [find_mode(f"square {side}")]
    ]
    yield model.decoder, prefixes
    torch.set_num_threads(threads)


def alone(decoder, prefix, row, most=MOST):
    """The plainest greedy loop: the whole text through a fresh cache for every token."""
    ids, logprobs = [], []
    while len(ids) <= most and not (ids and ids[-1] in (EOL_ID, END_ID)):
        tokens = torch.cat([prefix, decoder.embed(torch.tensor([TOKENIZER.rows[row], *ids]))])
        cache = Cache.for_tokens(decoder.config, len(tokens), decoder.dtype)
        with torch.inference_mode():
            hidden = decoder(tokens, cache.batch([cache.new_sequence(len(prefix))], [len(tokens)]), cache)[-1:]
            logits = decoder.logits(hidden)
        picked = pick(logits, [Pick(GREEDY, ids)])
        ids.append(int(logits.argmax()))
        assert picked.ids == ids[-1:]
        assert picked.logprobs == pytest.approx([float(logits.log_softmax(-1).max())], abs=1e-5)  # summed in another order
        logprobs += picked.logprobs
    return ids, logprobs


def said(row):
    """All tokens of a row, its end included."""
    return row.ids + {"eol": [EOL_ID], "end": [END_ID], "length": []}[row.ended_by]


def wrong(ids, every, rng):
    """A draft that is wrong in about one of so many tokens."""
    is_wrong = torch.randint(0, every, (len(ids),), generator=rng) == 0
    return torch.where(is_wrong, torch.randint(0, 700, (len(ids),), generator=rng), torch.tensor(ids, dtype=torch.int64)).tolist()


# --- what is accepted ---------------------------------------------------------------------------------------------------------


@given(st.lists(st.integers(0, 2)), st.lists(st.integers(0, 2)))
def test_the_longest_agreeing_prefix_is_accepted(proposed, decoded):
    said = decoded + [9] * len(proposed)  # the decoder says at least one token more than is proposed
    agreed = accept(proposed, said)
    assert proposed[:agreed] == said[:agreed]
    assert agreed == len(proposed) or proposed[agreed] != said[agreed]


# --- the same text ------------------------------------------------------------------------------------------------------------


def test_rows_are_those_of_the_plainest_loop(reader):
    decoder, prefixes = reader
    rows = read_rows(decoder, prefixes[0], range(6), TOKENIZER, max_symbols=MOST)
    assert {row.ended_by for row in rows} >= {"length"}
    for row in rows:
        assert (said(row), row.logprobs) == alone(decoder, prefixes[0], row.number)


@pytest.mark.parametrize("every", [1, 3, 10, 10**9])
def test_a_draft_changes_neither_text_nor_log_probabilities(reader, every):
    decoder, prefixes = reader
    rng = generator(f"draft {every}")
    asked = [PageRows(prefix, range(4), max_symbols=MOST) for prefix in prefixes]
    plain = read_pages(decoder, asked, TOKENIZER)
    drafts = [{row.number: Fixed(wrong(said(row), every, rng)) for row in rows} for rows in plain]
    asked = [replace(page, draft=draft.__getitem__) for page, draft in zip(asked, drafts, strict=True)]
    verified = read_pages(decoder, asked, TOKENIZER)
    assert verified == plain  # ids, ends, log-probabilities and probabilities, all of them equal as floats
    rows = [row for rows in verified for row in rows]
    if every == 10**9:  # right in everything: one pass, or two where the last token is one too many to be proposed
        assert all(row.passes == 1 and row.accepted >= len(row.logprobs) - 1 for row in rows)
    if every == 1:
        assert all(row.passes > 1 for row in rows)


@settings(max_examples=15)
@given(st.data())
def test_any_draft_at_all_leaves_the_text_alone(reader, data):
    """Ids that no vocabulary has, ends in the middle, nothing, or far too much."""
    decoder, prefixes = reader
    ids = st.lists(st.one_of(st.integers(-3, 800), st.sampled_from([EOL_ID, END_ID, 10**12])), max_size=2 * MOST)
    drafts = {row: Fixed(data.draw(ids)) for row in range(3)}
    plain = read_rows(decoder, prefixes[2], range(3), TOKENIZER, max_symbols=MOST)
    assert read_pages(decoder, [PageRows(prefixes[2], range(3), drafts.get, max_symbols=MOST)], TOKENIZER) == [plain]


def test_rows_of_many_pages_are_those_of_each_page(reader):
    decoder, prefixes = reader
    several = zip(prefixes, ([2, 0], [1], [7, 3, 5]), (MOST, 5, 2 * MOST), strict=True)
    asked = [PageRows(prefix, rows, max_symbols=most) for prefix, rows, most in several]
    alone = [read_rows(decoder, page.prefix, page.rows, TOKENIZER, max_symbols=page.max_symbols) for page in asked]
    for at_once in (1, 2, 4, 100):
        assert read_pages(decoder, asked, TOKENIZER, limits=Limits(texts=at_once)) == alone


@pytest.mark.parametrize("room", [1, 9, 24, 10**6])
def test_a_pass_has_room_for_so_much_and_the_text_is_the_same(reader, monkeypatch, room):
    decoder, prefixes = reader
    plain = read_rows(decoder, prefixes[0], range(3), TOKENIZER, max_symbols=MOST)
    fed = []
    monkeypatch.setattr(
        Cache, "batch", lambda self, seqs, counts, batch=Cache.batch: fed.append(sum(counts)) or batch(self, seqs, counts)
    )
    page = PageRows(prefixes[0], range(3), lambda row: Fixed(said(plain[row])), max_symbols=MOST)
    assert read_pages(decoder, [page], TOKENIZER, limits=Limits(tokens=room)) == [plain]
    assert max(fed) <= room


def test_a_draft_that_is_never_right_is_soon_asked_no_more(reader):
    decoder, prefixes = reader

    class Wrong:
        asked = 0

        def propose(self, said):
            Wrong.asked += 1
            return [700 + len(said) % 2] * 50

    rows = read_pages(decoder, [PageRows(prefixes[0], [0], lambda _: Wrong(), max_symbols=60)], TOKENIZER)[0]
    assert rows == read_rows(decoder, prefixes[0], [0], TOKENIZER, max_symbols=60)
    assert rows[0].accepted == 0
    assert Wrong.asked * 50 < PATIENCE + 101


# --- memory -------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("every", [1, 2, 5])
def test_refused_tokens_leave_nothing_behind(reader, every):
    """After every pass a text holds the pages of what it said and no others; the pages in use are those of all texts."""
    decoder, prefixes = reader
    plain = read_rows(decoder, prefixes[0], range(3), TOKENIZER, max_symbols=40)
    cache = Cache(decoder.config, 40, dtype=decoder.dtype)
    scheduler = Scheduler(cache, decoder.config.vocab_size, decoder.config.max_positions)
    loop = Loop(scheduler, Runner(decoder, cache))
    drafts = [Fixed(wrong(said(row), every, generator(f"memory {every}"))) for row in plain]
    request = RowsRequest(PageRows(prefixes[0], range(3), drafts.__getitem__, max_symbols=40), decoder, TOKENIZER)
    loop.submit(request)
    while loop.step():
        scheduler.check_integrity()
        for speech in scheduler.running:
            assert speech.written is None or speech.written.length == speech.known - 1
    assert request.found() == plain
    scheduler.check_integrity()
    assert cache.num_free == 40


def test_memory_is_that_of_the_rows_in_flight(reader, monkeypatch):
    decoder, prefixes = reader
    made = []
    monkeypatch.setattr("optmem.engine.rows.Cache", lambda *args, **settings: made.append(Cache(*args, **settings)) or made[-1])
    read_pages(decoder, [PageRows(prefixes[0], range(20), max_symbols=2)] * 5, TOKENIZER, limits=Limits(texts=8))
    assert made[0].num_pages < 8 * 5
    assert made[0].num_free == made[0].num_pages


# --- whole pages --------------------------------------------------------------------------------------------------------------


class Script:
    """A decoder whose answers are known: rows of so many pages, told apart by the first number of their prefix.

    It has the parts of a decoder that reading needs, and says the next token from what was written to the cache: real sequences.
    """

    def __init__(self, texts):
        self.texts = texts
        self.model = tiny_model().decoder
        self.config, self.dtype, self.lm_head = self.model.config, torch.float32, self.model.lm_head
        self.asked = set()

    def prefix(self, page):
        return torch.full((5, self.config.hidden), float(page))

    def embed(self, ids, **_):
        return torch.nn.functional.pad(ids[:, None].float(), (0, self.config.hidden - 1))

    def __call__(self, embeddings, batch, cache):
        """Writes what it is given to the keys of layer 0, and answers with the token that follows, for each."""
        flat = cache.keys[0].view(-1, self.config.hidden)
        flat[batch.slots] = embeddings
        answers = []
        for b, (start, end) in enumerate(pairwise(batch.starts.tolist())):
            slots = (batch.table[b].long()[:, None] * cache.page_size + torch.arange(cache.page_size)).flatten()
            whole = flat[slots[: int(batch.lengths[b])]][:, 0].int().tolist()
            fed = range(len(whole) - (end - start) + 1, len(whole) + 1)
            answers += [self.next(whole[:at]) if at > 5 else 0 for at in fed]
        return torch.tensor(answers)

    def next(self, whole):
        page, row, said = whole[0], whole[5] - TOKENIZER.rows[0], whole[6:]
        self.asked.add((page, row))
        lines = self.texts[page]
        if row >= len(lines):
            return END_ID
        assert said == lines[row][: len(said)], "a refused token is in the cache"
        return lines[row][len(said)] if len(said) < len(lines[row]) else EOL_ID

    def logits(self, answers):
        return torch.nn.functional.one_hot(answers, self.config.vocab_size).float() * 50


def lines(count, seed=0):
    rng = generator(f"lines {count} {seed}")
    lengths = torch.randint(0, 9, (count,), generator=rng).tolist()
    ids = torch.randint(TOKENIZER.first_symbol, 640, (sum(lengths),), generator=rng).tolist()
    ends = [0, *accumulate(lengths)]
    return [ids[start:end] for start, end in pairwise(ends)]


@pytest.mark.parametrize("count", [0, 1, 5, BLOCK - 1, BLOCK, BLOCK + 1, 80, MAX_ROWS - 1, MAX_ROWS])
def test_a_whole_page_is_asked_for_until_a_row_answers_end(count):
    script = Script([lines(count)])
    (rows,) = read_pages(script, [PageRows(script.prefix(0), max_symbols=20)], TOKENIZER)
    assert [row.ids for row in rows] == [*lines(count), *[[]] * (count < MAX_ROWS)]
    assert [row.ended_by for row in rows] == ["eol"] * count + ["end"] * (count < MAX_ROWS)
    assert len(script.asked) <= count + 2 * BLOCK


def test_a_page_without_end_takes_bounded_work():
    script = Script([[[500] * 10**4] * 10**3])
    (rows,) = read_pages(script, [PageRows(script.prefix(0), max_symbols=7)], TOKENIZER)
    assert [len(row.ids) for row in rows] == [8] * MAX_ROWS
    assert {row.ended_by for row in rows} == {"length"}


def test_an_end_said_inside_a_row_ends_that_row_and_not_the_page():
    text = lines(40)
    text[3] = [500, 501, END_ID, 502]
    script = Script([text])
    (rows,) = read_pages(script, [PageRows(script.prefix(0), max_symbols=20)], TOKENIZER)
    assert [row.ids for row in rows] == [*text[:3], [500, 501], *text[4:], []]
    assert [row.number for row in rows if row.is_below] == [40]
    assert join_rows(rows, TOKENIZER) == TOKENIZER.text(token for row in rows for token in row.ids)


def glimpse(cells):
    ids = torch.tensor(cells)
    return Glimpse(ids, torch.ones(ids.shape), (16, 8), 1.0)


@pytest.mark.parametrize("seen", [0, 3, 40])
def test_a_draft_never_decides_what_is_asked(seen):
    """Rows that contradict each other, and a glance that sees the end of the text too early: the answer is plain decoding's."""
    misread = lines(40, 1)
    misread[3] = misread[20] = [END_ID]
    texts = [misread, lines(3, 2)]
    grids = [[(line + [EOL_ID] * 9)[:9] if at < seen else [END_ID] * 9 for at, line in enumerate(text)] for text in texts]
    plain, drafted = Script(texts), Script(texts)
    wanted = read_pages(plain, [PageRows(plain.prefix(at)) for at in range(2)], TOKENIZER)
    found = read_pages(
        drafted, [draft_page(drafted.prefix(at), glimpse(grid), TOKENIZER) for at, grid in enumerate(grids)], TOKENIZER
    )
    assert found == wanted
    assert drafted.asked == plain.asked
    assert [[row.ids for row in rows if not row.is_below] for rows in found] == [
        [line for line in text if line != [END_ID]] for text in texts
    ]
    if seen == 40:
        assert all(row.passes == 1 for rows in found for row in rows)


def test_cells_are_proposed_from_the_column_after_what_was_said():
    assert CellDraft([7, 8, EOL_ID]).propose([1]) == [8, EOL_ID]
    assert CellDraft([7]).propose([1, 2]) == []
    assert CellDraft([7, 8, 9, 10], [0.1, 0.9, 0.5, 1.0]).propose([1]) == [8, 9]  # 10 behind them is likely for nothing
    assert CellDraft([7, 8, 9, 10], [0.9, 0.9, 0.9]).propose([]) == [7, 8, 9, 10]
    page = draft_page(torch.zeros(1, 1), glimpse([[50, 51], [50, EOL_ID], [END_ID, END_ID]]), TOKENIZER)
    assert page.draft(0).propose([]) == [50, 51, EOL_ID]
    assert page.draft(7).propose([]) == [END_ID]
    unsure = Glimpse(torch.tensor([[50, 51, 52]]), torch.tensor([[0.9, 0.3, 0.9]]), (16, 8), 1.0)
    assert draft_page(torch.zeros(1, 1), unsure, TOKENIZER).draft(0).propose([]) == [50, 51]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rows": [128]}, "rows are 0 to 127, got 128"),
        ({"rows": [-1]}, "rows are 0 to 127, got -1"),
        ({"max_symbols": -1}, "max_symbols must be 0 or more"),
        ({"prefix": torch.zeros(8192, 32)}, "at most 8192 together"),
    ],
)
def test_what_cannot_be_asked_is_refused(change, message):
    model = tiny_model()
    page = replace(PageRows(torch.zeros(5, 32), [0]), **change)
    with pytest.raises(InputError, match=message):
        read_pages(model.decoder, [page], TOKENIZER)
    assert read_pages(model.decoder, [], TOKENIZER) == []
    assert read_pages(model.decoder, [PageRows(torch.zeros(5, 32), [])], TOKENIZER) == [[]]


@pytest.mark.parametrize("wrong", [0.0, -1.0, float("nan")])
def test_settings_are_checked(wrong):
    with pytest.raises(InputError, match="temperature must be above 0"):
        read_pages(tiny_model().decoder, [PageRows(torch.zeros(5, 32), [0])], TOKENIZER, temperature=wrong)
    with pytest.raises(InputError, match="at least one text and one token"):
        Limits(texts=0)


def test_a_temperature_moves_probabilities_and_not_the_text(reader):
    decoder, prefixes = reader
    asked = [PageRows(prefixes[0], [0, 1], max_symbols=4)]
    (plain,), (warm,) = (read_pages(decoder, asked, TOKENIZER, temperature=t) for t in (1.0, 3.0))
    assert [row.ids for row in warm] == [row.ids for row in plain]
    assert [row.logprobs for row in warm] == [row.logprobs for row in plain]
    assert all(w < p for a, b in zip(warm, plain, strict=True) for w, p in zip(a.probabilities, b.probabilities, strict=True))


# --- rows that are asked again ------------------------------------------------------------------------------------------------


def glimpse_of(*rows):
    """What a glance is sure of: dots are cells behind the end."""
    ids = [[END_ID if char == "." else TOKENIZER.encode(char)[0] for char in row] for row in rows]
    return Glimpse(torch.tensor(ids), torch.ones(len(rows), len(rows[0])), (16, 8), 1.0)


def test_a_row_that_says_the_text_is_over_is_asked_again_where_the_glance_sees_text(reader):
    decoder, prefixes = reader
    seen = glimpse_of("one.", "  x.", "    ", "....", "y z.")
    request = RowsRequest(PageRows(prefixes[0], range(6), max_symbols=40, seen=seen), decoder, TOKENIZER)
    for speech in request.ordered(request.begin()):
        speech.ids, speech.logprobs, speech.probabilities = [END_ID], [-0.1], [0.9]
    again = request.ordered(request.follow())
    blank, y = TOKENIZER.encode(" ")[0], TOKENIZER.encode("y")[0]
    assert [(ask.number, ask.first) for ask in request.asks[6:]] == [(0, TOKENIZER.encode("o")[0]), (1, blank), (4, y)]
    for speech in again:
        assert speech.own.shape[0] == 2
        speech.ids, speech.logprobs, speech.probabilities = [blank, EOL_ID], [-0.2, -0.3], [0.8, 0.7]
    assert not request.follow()  # once each
    rows = request.found()
    assert [row.ids for row in rows] == [[TOKENIZER.encode("o")[0], blank], [blank, blank], [], [], [y, blank], []]
    assert [row.ended_by for row in rows] == ["eol", "eol", "end", "end", "eol", "end"]
    assert rows[1].logprobs == [0.0, -0.2, -0.3]  # of the first symbol the glance's own


def test_a_row_that_says_it_twice_is_below_the_text(reader):
    decoder, prefixes = reader
    request = RowsRequest(PageRows(prefixes[0], range(2), max_symbols=40, seen=glimpse_of("one.", "  x.")), decoder, TOKENIZER)
    for speech in request.ordered(request.begin()):
        speech.ids, speech.logprobs, speech.probabilities = [END_ID], [-0.1], [0.9]
    for speech in request.ordered(request.follow()):
        speech.ids, speech.logprobs, speech.probabilities = [END_ID], [-0.2], [0.8]
    rows = request.found()
    assert [row.ids for row in rows] == [TOKENIZER.encode("o"), []]  # what the glance saw first is text, a blank is none
    assert [row.is_below for row in rows] == [False, True]


def test_no_glance_no_doubt(reader):
    decoder, prefixes = reader
    request = RowsRequest(PageRows(prefixes[0], range(3), max_symbols=40), decoder, TOKENIZER)
    for speech in request.ordered(request.begin()):
        speech.ids = [END_ID]
    assert not request.follow()


@pytest.mark.parametrize("at_once", [1, 3, 64])
def test_rows_asked_again_are_the_same_with_and_without_drafts(reader, at_once):
    decoder, prefixes = reader
    bent = ending_at_once(decoder, prefixes[0])
    seen = [glimpse_of(*["  ab" * 3] * 4) for _ in prefixes]
    plain = [PageRows(prefix, range(5), max_symbols=MOST, seen=one) for prefix, one in zip(prefixes, seen, strict=True)]
    drafted = [
        replace(draft_page(prefix, one, TOKENIZER, range(5), MOST), seen=one) for prefix, one in zip(prefixes, seen, strict=True)
    ]
    limits = Limits(texts=at_once)
    rows = read_pages(bent, plain, TOKENIZER, limits=limits)
    assert rows == read_pages(bent, drafted, TOKENIZER, limits=limits)
    assert any(row.ids and row.logprobs[0] == 0.0 for page in rows for row in page), "no row was asked again"


def ending_at_once(decoder, prefix):
    """The same decoder, which says the end of the text wherever it said what row 0 of a page begins with."""
    (first, *_), bent = read_rows(decoder, prefix, range(1), TOKENIZER, max_symbols=2)[0].ids, copy.deepcopy(decoder)
    with torch.no_grad():
        bent.lm_head.weight[END_ID] = bent.lm_head.weight[first] * 1.1
    return bent
