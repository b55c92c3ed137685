"""Recorded passes: what is said is what plain passes say, bit for bit; what fails to record is called; padding reaches nobody."""

import logging

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from optmem import Engine, paginate
from optmem.engine.buckets import table_bucket, text_bucket
from optmem.engine.graphs import NOWHERE, SLOTS, GraphRunner
from optmem.engine.lanes import Lanes, PlainLane, Recordings, lanes_for
from optmem.engine.sampling import Sampling
from optmem.engine.scheduler import Limits, Work
from optmem.engine.speech import Prefix, Speech
from optmem.errors import InputError
from optmem.model.cache import Cache
from optmem.testing import assert_equal, generator
from optmem.text.ngram import NgramGuard

from .test_scheduler import RUNNERS, engine, run, said, talkative, texts, vectors

TEXTS = 13


@pytest.fixture(scope="module")
def decoder():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield talkative()
    torch.set_num_threads(threads)


def written(decoder, count, texts=TEXTS, pages=64):
    """Two runners over caches that hold the same texts, and what each has said last."""
    runners, sequences = [], []
    for make in (RUNNERS["plain"], RUNNERS["recorded"]):
        cache = Cache(decoder.config, pages, dtype=decoder.dtype)
        cache.keys.fill_(torch.nan), cache.values.fill_(torch.nan)
        runner = make(decoder, cache, Limits(texts=texts))
        lengths = [1 + 7 * at % 40 for at in range(count)]
        sequences.append([cache.new_sequence(prompt=length) for length in lengths])
        for number, (sequence, length) in enumerate(zip(sequences[-1], lengths, strict=True)):
            runner.run([Work(sequence, vectors(decoder, length, f"text {number}"))])
        runners.append(runner)
    return runners, sequences


def works_of(sequences, ids, samplings=None):
    """One token for each."""
    works = []
    for at, (sequence, token) in enumerate(zip(sequences, ids, strict=True)):
        speech = Speech(Prefix(torch.empty(0, 1)), torch.empty(1, 1), 100, ids=[token])
        speech.sampling = samplings[at] if samplings else Sampling()
        works.append(Work(sequence, None, [token], speech, (), 1))
    return works


@settings(max_examples=25, deadline=None)
@given(st.lists(st.integers(1, TEXTS), min_size=1, max_size=8), st.integers(0, 9))
def test_passes_of_any_sizes_say_what_plain_passes_say(counts, seed):
    """Texts come and go, so a row of the table is another text's from pass to pass."""
    decoder = talkative()
    (plain, recorded), (theirs, ours) = written(decoder, TEXTS)
    for step, count in enumerate(counts):
        chosen = torch.randperm(TEXTS, generator=generator(f"{seed} {step}"))[:count].tolist()
        ids = torch.randint(0, 704, (count,), generator=generator(f"ids {seed} {step}")).tolist()
        wanted = plain.run(works_of([theirs[at] for at in chosen], ids))
        found = recorded.run(works_of([ours[at] for at in chosen], ids))
        assert found == wanted
        assert [sequence.length for sequence in ours] == [sequence.length for sequence in theirs]
        for one, other in ((recorded.cache.keys, plain.cache.keys), (recorded.cache.values, plain.cache.values)):
            assert_equal(one.view(torch.int32), other.view(torch.int32))  # and padding wrote nowhere: NaN is NaN still


def width_of(runner, sequences):
    return table_bucket(max(len(sequence.pages) for sequence in sequences), runner._inputs.table.shape[1])


def test_guards_and_sampling_see_the_logits(decoder):
    kinds = (Sampling(), Sampling(guard=NgramGuard(1, 8)), Sampling(temperature=0.9, top_p=0.8, seed=3))
    (plain, recorded), (theirs, ours) = written(decoder, 6)
    for step in range(3):
        ids, samplings = [5 + step] * 6, [kinds[at % 3] for at in range(6)]
        assert recorded.run(works_of(ours, ids, samplings)) == plain.run(works_of(theirs, ids, samplings))
    names = set(recorded.passes._known)
    assert names == {recorded._largest, ("logits", 8, width_of(recorded, ours))}


def test_padding_is_the_first_row_said_again_and_written_nowhere(decoder):
    (_, recorded), (_, ours) = written(decoder, 5)
    recorded.run(works_of(ours, [7, 8, 9, 10, 11]))
    numbers, table = recorded._inputs.numbers[:, :8], recorded._inputs.table[:8]
    assert numbers[SLOTS].tolist()[5:] == [NOWHERE] * 3
    others = [row for row in range(5) if row != SLOTS]
    assert (numbers[others, 5:] == numbers[others, :1]).all()
    for row, sequence in zip(table, [*ours, *ours[:1] * 3], strict=True):
        assert row[: len(sequence.pages)].tolist() == sequence.pages
    batch = recorded._inputs.batch(8, 16)
    assert all(tensor.is_contiguous() for tensor in (batch.positions, batch.slots, batch.starts, batch.lengths))


def test_prompts_proposals_and_too_many_texts_go_as_they_do_without(decoder):
    (plain, recorded), (theirs, ours) = written(decoder, TEXTS)
    (_, small), (_, few) = written(decoder, TEXTS, texts=4)
    mixed = [[Work(sequences[0], vectors(decoder, 3, "more")), *works_of(sequences[1:3], [4, 5])] for sequences in (theirs, ours)]
    assert recorded.run(mixed[1]) == plain.run(mixed[0])
    for runner in (recorded, small):
        assert not runner.passes._known
    assert small.run(works_of(few[3:], [9] * 10)) == recorded.run(works_of(ours[3:], [9] * 10))
    assert not small.passes._known
    assert set(recorded.passes._known) == {recorded._largest, ("picks", TEXTS, 16)}


def test_every_pass_of_one_token_per_text_is_replayed(decoder):
    """Texts without drafts: all but prompts; with drafts, what is left when they are silent."""
    speeches = texts(decoder, 12, seed=11)
    loop = engine(decoder, runner="recorded", texts=TEXTS)
    run(loop, speeches)
    sizes = {text_bucket(count, TEXTS) for count in range(1, 13)}
    names = set(loop.runner.passes._known)
    assert loop.runner._largest in names
    assert {size for _, size, _ in names} <= {*sizes, TEXTS}
    assert {width for _, _, width in names} <= {16, loop.runner._largest[2]}
    assert len(names) > 2
    plain = texts(decoder, 12, seed=11)
    run(engine(decoder, runner="plain", texts=TEXTS), plain)
    assert said(speeches) == said(plain)


def test_who_is_not_in_the_vocabulary_fails_before_a_device_would(decoder):
    (_, recorded), (_, ours) = written(decoder, 2)
    with pytest.raises(InputError, match="0 to 703"):
        recorded.run(works_of(ours, [7, 704]))


def test_no_room_changes_nothing(decoder):
    (_, recorded), (_, ours) = written(decoder, 2, pages=8)
    cache = recorded.cache
    cache.take(cache.num_free)
    for sequence in ours:
        while sequence.length % cache.page_size:
            recorded.run(works_of([sequence], [3]))
    lengths = [sequence.length for sequence in ours]
    with pytest.raises(InputError, match="are free"):
        recorded.run(works_of(ours, [1, 2]))
    assert [sequence.length for sequence in ours] == lengths


# --- recording ----------------------------------------------------------------------------------------------------------------


class Once(PlainLane):
    """A lane that records nothing."""

    def record(self, _):
        try:
            raise RuntimeError("operation not permitted when stream is capturing\nand a trace of C++")
        finally:
            raise RuntimeError("the recording was broken off")


def test_a_function_is_called_then_recorded_then_replayed():
    calls = []
    passes = Recordings(PlainLane(), "decode")
    found = [passes.run("one", lambda number=number: calls.append(number) or torch.tensor(len(calls))) for number in range(5)]
    assert calls == [0, 1, 1, 1, 1]  # the second is recorded, and called again from then on
    assert [each.tolist() for each in found] == [1, 5, 5, 5, 5]  # all but the first lie where the last was put
    assert passes.plain == []


def test_a_function_that_fails_is_not_known():
    passes = Recordings(PlainLane(), "decode")
    with pytest.raises(ZeroDivisionError):
        passes.run("one", lambda: torch.tensor(1 // 0))
    assert not passes.is_known("one")
    assert passes.run("one", lambda: torch.tensor(1)) == 1


def test_what_cannot_be_recorded_is_called_and_said_once(decoder, caplog):
    (plain, _), (theirs, _) = written(decoder, 3)
    cache = Cache(decoder.config, 64, dtype=decoder.dtype)
    runner = GraphRunner(decoder, cache, Once(), texts=4)
    ours = [cache.new_sequence(prompt=1 + 7 * at % 40) for at in range(3)]
    for number, sequence in enumerate(ours):
        runner.run([Work(sequence, vectors(decoder, sequence.prompt, f"text {number}"))])
    with caplog.at_level(logging.WARNING):
        for step in range(5):
            assert runner.run(works_of(ours, [step] * 3)) == plain.run(works_of(theirs, [step] * 3))
    names = [("picks", 4, runner._inputs.table.shape[1]), ("picks", 4, 16)]  # the largest, and the one that is run: once each
    assert len(caplog.records) == len(names)
    message = caplog.records[1].getMessage()
    assert "decode: a pass of ('picks', 4, 16) cannot be recorded" in message
    assert "stream is capturing" in message
    assert "C++" not in message
    assert runner.passes.plain == names


class Narrow(GraphRunner):
    """Has no room for the largest pass."""

    def _picked(self, size, width):
        if size == self.texts:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return super()._picked(size, width)


def test_without_room_for_the_largest_pass_nothing_is_recorded_and_nobody_fails(decoder, caplog):
    speeches, plain = texts(decoder, 6, seed=12), texts(decoder, 6, seed=12)
    run(engine(decoder, runner="plain"), plain)
    loop = engine(decoder, runner="plain")
    loop.runner = Narrow(decoder, loop.scheduler.cache, PlainLane(), texts=32)
    with caplog.at_level(logging.WARNING):
        run(loop, speeches)
    assert said(speeches) == said(plain)
    assert [record.getMessage() for record in caplog.records if record.name.endswith("graphs")] == [
        "decode: nothing is recorded, for there is no room for a pass of 32 texts"
    ]


def test_a_cpu_needs_no_lanes():
    assert lanes_for(torch.device("cpu")) is None


def test_nano_reads_a_page_as_it_does_without():
    """The shipped checkpoint: the same pictures, tokens and numbers; its texts one token at a time, and verified."""
    plain = Engine.from_pretrained("nano", device="cpu")
    (tokens,) = plain.encode(paginate("a page of words\nand some more of them\n\tthe last line\n"))
    with Engine(plain.model, plain.temperatures, lanes=Lanes(PlainLane(), PlainLane())) as recorded:
        for asked in ({"draft": None}, {"draft": "glance"}, {"draft": None, "temperature": 0.7, "seed": 4}):
            (wanted,), (found,) = (engine.decode(tokens, rows=range(4), **asked) for engine in (plain, recorded))
            assert found == wanted
        names = set(recorded._loop.runner.passes._known)
        assert {kind for kind, _, _ in names} == {"picks", "logits"}
        assert {size for _, size, _ in names} >= {1, 2, 4}
    assert "a page of words" in plain.decode(tokens, rows=range(4), draft=None)[0].text
