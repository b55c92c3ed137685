"""Many texts over one cache: each says what it says alone, memory is never lost, and whoever fails fails alone.

All of it with the plain runner, and with the one that records its passes, on a lane that calls them again.
"""

import random
import threading
import time
from dataclasses import replace

import pytest
import torch
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, invariant, multiple, rule

from optmem.engine.graphs import GraphRunner
from optmem.engine.lanes import PlainLane
from optmem.engine.loop import Loop
from optmem.engine.requests import Request, TextRequest
from optmem.engine.runner import Runner
from optmem.engine.sampling import Pick, Sampling, pick
from optmem.engine.scheduler import Limits, Scheduler
from optmem.engine.speech import Prefix, Speech
from optmem.errors import BackendError, InputError, ModelError
from optmem.model.cache import Cache
from optmem.testing import generator
from optmem.text.ngram import NgramGuard

from .test_nano import tiny_model

VOCAB = 704
STOP = 3


@pytest.fixture(
    scope="module",
    params=[(torch.float32, "plain"), (torch.bfloat16, "plain"), (torch.float32, "recorded"), (torch.bfloat16, "recorded")],
    ids=["fp32", "bf16", "fp32 recorded", "bf16 recorded"],
)
def decoder(request):
    """One that says many different things, and ends now and then; on one thread, and by the runner of all engines of a test."""
    dtype, RUNNERS[None] = request.param[0], RUNNERS[request.param[1]]
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield talkative().to(dtype)
    torch.set_num_threads(threads)
    RUNNERS[None] = RUNNERS["plain"]


def talkative():
    decoder = tiny_model(seed=3).decoder
    with torch.no_grad():
        decoder.lm_head.weight.mul_(20)
        decoder.model.embed_tokens.weight.mul_(20)
        decoder.lm_head.weight[STOP].mul_(3)
    return decoder


def vectors(decoder, count, name):
    return torch.randn(count, decoder.config.hidden, generator=generator(name)).to(decoder.dtype)


def engine(decoder, pages=64, *, marked=None, runner=None, **limits):
    """A loop by hand.

    marked   texts whose passes fail
    """
    cache = Cache(decoder.config, pages, dtype=decoder.dtype)
    cache.keys.fill_(torch.nan), cache.values.fill_(torch.nan)
    scheduler = Scheduler(cache, decoder.config.vocab_size, decoder.config.max_positions, Limits(**limits))
    made = RUNNERS[runner](decoder, cache, scheduler.limits)
    if marked is not None:
        fail_with(made, marked)
    return Loop(scheduler, made)


def recorded(decoder, cache, limits):
    """One whose memory holds absurd numbers where nothing was written."""
    made = GraphRunner(decoder, cache, PlainLane(), texts=limits.texts)
    inputs = made._inputs
    inputs._numbers.fill(10**15), inputs._table.fill(10**8), inputs.numbers.fill_(-(10**15)), inputs.table.fill_(-(10**8))
    made._heard.fill_(torch.nan)
    return made


RUNNERS = {"plain": lambda decoder, cache, _: Runner(decoder, cache), "recorded": recorded}
RUNNERS[None] = RUNNERS["plain"]


def fail_with(runner, marked):
    """From now on it raises where it is given one of these texts: after there is room for all, as a device would."""
    run = runner.run

    def fails(works):
        said = run(works)
        if any(work.speech in marked for work in works):
            raise RuntimeError("device fault at 0xdeadbeef")
        return said

    runner.run = fails


def alone(decoder, speech):
    """The plainest loop: everything through a fresh cache for every token, the guard spelled out."""
    ids, logprobs = [], []
    prompt = torch.cat([speech.prefix.embeddings, speech.own])
    while len(ids) < speech.most and not (ids and ids[-1] in speech.stops):
        tokens = torch.cat([prompt, decoder.embed(torch.tensor(ids, dtype=torch.int64))])
        cache = Cache.for_tokens(decoder.config, len(tokens), decoder.dtype)
        with torch.inference_mode():
            hidden = decoder(tokens, cache.batch([cache.new_sequence(len(prompt))], [len(tokens)]), cache)[-1:]
            logits = decoder.logits(hidden)[0]
        guarded = logits.clone()
        if speech.sampling.guard:
            guarded[list(speech.sampling.guard.banned(ids))] = -torch.inf
        picked = pick(logits[None], [Pick(replace(speech.sampling, temperature=0.0), list(ids))])
        ids.append(int(guarded.argmax()))
        assert picked.ids == ids[-1:]
        assert picked.logprobs == pytest.approx([float(logits.log_softmax(-1)[ids[-1]])], abs=1e-5)  # summed in another order
        logprobs += picked.logprobs
    return ids, logprobs


def texts(decoder, count, seed=0, **changes):
    """Texts of several lengths, some of which share a prefix."""
    chance = random.Random(seed)
    prefixes = [Prefix(vectors(decoder, length, f"prefix {length}")) for length in (0, 5, 16, 33, 40)]
    return [
        Speech(
            chance.choice(prefixes),
            vectors(decoder, chance.choice((1, 1, 3, 20)), f"own {at} {seed}"),
            chance.randrange(1, 24),
            (STOP,),
            **changes,
        )
        for at in range(count)
    ]


def run(loop, speeches, check=True):
    requests = [TextRequest(speech) for speech in speeches]
    for request in requests:
        loop.submit(request)
    while loop.step():
        if check:
            loop.scheduler.check_integrity()
    assert loop.scheduler.cache.num_free == loop.scheduler.cache.num_pages
    return requests


@pytest.fixture(scope="module")
def plainest(decoder):
    """What the plainest loop says to the texts of seed 0."""
    return [alone(decoder, speech) for speech in texts(decoder, 16)]


def said(speeches):
    return [(speech.ids, speech.logprobs) for speech in speeches]


# --- the same text ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("limits", [{}, {"texts": 3}, {"tokens": 7}, {"texts": 2, "tokens": 3}], ids=str)
def test_texts_are_those_of_the_plainest_loop(decoder, plainest, limits):
    speeches = texts(decoder, 16)
    run(engine(decoder, **limits), speeches)
    assert said(speeches) == plainest
    assert {speech.finish for speech in speeches} == {"stop", "length"}


@pytest.mark.parametrize("pages", [7, 12])
def test_memory_that_is_short_changes_no_text(decoder, pages):
    speeches = texts(decoder, 32, seed=1)
    run(engine(decoder), speeches)
    shorter = texts(decoder, 32, seed=1)
    loop = engine(decoder, pages)
    random.Random(pages).shuffle(order := list(range(32)))
    run(loop, [shorter[at] for at in order])
    assert said(shorter) == said(speeches)
    assert loop.scheduler.preemptions > 0


def test_a_guard_and_sampling_act_on_their_own_text_alone(decoder):
    """Guarded, sampled and greedy texts in one batch; the guard is that of its definition, a seed gives the same text twice."""
    guard, drawn = Sampling(guard=NgramGuard(2, 30)), Sampling(temperature=1.5, top_p=0.9, seed=5)
    mixed = texts(decoder, 12, seed=2)
    for at, speech in enumerate(mixed):
        speech.sampling = (Sampling(), guard, drawn)[at % 3]
    again = [replace(speech, prefix=Prefix(speech.prefix.embeddings), ids=[], logprobs=[], probabilities=[]) for speech in mixed]
    wanted = [alone(decoder, speech) for speech in mixed]
    run(engine(decoder), mixed)
    for speech in again:
        run(engine(decoder), [speech])
    assert said(mixed) == said(again)
    assert [said([speech])[0] for at, speech in enumerate(mixed) if at % 3 < 2] == [
        text for at, text in enumerate(wanted) if at % 3 < 2
    ]
    assert any(text != wanted[at] for at, text in enumerate(said(mixed)) if at % 3 == 2)


class Guess:
    """Proposes a known text, wrong now and then."""

    def __init__(self, ids, seed):
        chance = random.Random(seed)
        self.ids = [chance.randrange(VOCAB) if chance.random() < 0.2 else token for token in ids]

    def propose(self, ids):
        return self.ids[len(ids) :]


@pytest.mark.parametrize("sampling", [Sampling(), Sampling(temperature=0.8, seed=9), Sampling(guard=NgramGuard(1, 8))], ids=str)
def test_a_draft_changes_no_text_whatever_picks_it(decoder, sampling):
    plain = texts(decoder, 16, seed=3, sampling=sampling)
    run(engine(decoder), plain)
    drafted = texts(decoder, 16, seed=3, sampling=sampling)
    for at, speech in enumerate(drafted):
        speech.draft = Guess(plain[at].ids, at)
    loop = engine(decoder)
    run(loop, drafted)
    assert said(drafted) == said(plain)
    assert sum(speech.accepted for speech in drafted) > sum(speech.refused for speech in drafted) / 4


def test_who_listens_may_end_a_text(decoder):
    speeches = texts(decoder, 8, seed=4)
    for speech in speeches:
        speech.most, speech.stops = 20, ()
        speech.listen = lambda token, heard=[]: heard.append(token) or ("loop" if len(heard) == 9 else None)
    run(engine(decoder), speeches[:1])
    assert (len(speeches[0].ids), speeches[0].finish) == (9, "loop")


# --- order --------------------------------------------------------------------------------------------------------------------


def test_who_came_first_is_served_first_and_gives_way_last(decoder):
    loop = engine(decoder, 9, texts=4)
    speeches = [Speech(Prefix(vectors(decoder, 16, f"p {at}")), vectors(decoder, 1, f"o {at}"), 30) for at in range(6)]
    requests = [TextRequest(speech) for speech in speeches]
    for request in requests:
        loop.submit(request)
    finished = []
    while loop.step():
        finished += [at for at, request in enumerate(requests) if request.is_done and at not in finished]
    finished += [at for at, request in enumerate(requests) if request.is_done and at not in finished]
    assert finished == sorted(finished)
    assert loop.scheduler.preemptions > 0


def test_what_could_never_be_said_is_refused_before_anything_changes(decoder):
    loop = engine(decoder, 4)
    for prefix, own, most, message in (
        (16, 1, 60, "and the cache has 4"),
        (0, 1, 10**9, "at most 8192 together"),
        (0, 0, 5, "needs a prompt"),
        (0, 1, 0, "at least one token"),
    ):
        request = TextRequest(Speech(Prefix(vectors(decoder, prefix, "p")), vectors(decoder, own, "o"), most))
        loop.submit(request)
        assert not loop.step()
        with pytest.raises(InputError, match=message):
            request.wait()
    fits = Speech(Prefix(vectors(decoder, 16, "p")), vectors(decoder, 1, "o"), 48)
    run(loop, [fits])
    assert len(fits.ids) == 48


# --- faults -------------------------------------------------------------------------------------------------------------------


def test_who_fails_fails_alone(decoder):
    plain = texts(decoder, 12, seed=5)
    run(engine(decoder), plain)
    speeches = texts(decoder, 12, seed=5)
    loop = engine(decoder, marked=(speeches[3], speeches[7]))
    requests = run(loop, speeches)
    for at, request in enumerate(requests):
        if at in (3, 7):
            with pytest.raises(ModelError, match="RuntimeError") as raised:
                request.wait()
            assert "0x" not in str(raised.value)
        else:
            assert request.wait()
            assert said([speeches[at]]) == said([plain[at]])


class Broken:
    """A draft that raises, or answers with no list."""

    def __init__(self, answer):
        self.answer = answer

    def propose(self, ids):
        return self.answer(ids)


@pytest.mark.parametrize("answer", [lambda ids: ids[10**6], lambda _: None, lambda _: iter([1]), lambda _: ["x"]])
def test_a_draft_that_fails_ends_its_own_text(decoder, answer):
    plain, speeches = texts(decoder, 5, seed=8), texts(decoder, 5, seed=8)
    run(engine(decoder), plain)
    speeches[2].most, speeches[2].draft, speeches[2].stops = 9, Broken(answer), ()
    requests = run(engine(decoder), speeches)
    with pytest.raises(ModelError, match="a part of the engine failed"):
        requests[2].wait()
    assert [said([speeches[at]]) for at in (0, 1, 3, 4)] == [said([plain[at]]) for at in (0, 1, 3, 4)]


def test_a_listener_that_fails_ends_its_own_text(decoder):
    """What the others of its pass said is taken once."""
    plain, speeches = texts(decoder, 6, seed=9), texts(decoder, 6, seed=9)
    run(engine(decoder), plain)
    speeches[5].listen = lambda _: 1 / 0
    requests = run(engine(decoder), speeches)
    with pytest.raises(ModelError, match="ZeroDivisionError"):
        requests[5].wait()
    assert said(speeches[:5]) == said(plain[:5])


def test_a_prompt_of_nan_fails_alone(decoder):
    plain, speeches = texts(decoder, 6, seed=6), texts(decoder, 6, seed=6)
    run(engine(decoder), plain)
    speeches[2].own = torch.full_like(speeches[2].own, torch.nan)
    requests = run(engine(decoder), speeches)
    with pytest.raises(ModelError, match="NaN"):
        requests[2].wait()
    others = [0, 1, 3, 4, 5]
    assert [said([speeches[at]]) for at in others] == [said([plain[at]]) for at in others]


def test_cancelled_and_late_texts_give_their_memory_back_within_a_step(decoder):
    loop = engine(decoder)
    for way in ("cancel", "deadline"):
        speech = Speech(Prefix(vectors(decoder, 20, "p")), vectors(decoder, 1, "o"), 500)
        request = TextRequest(speech, deadline=time.monotonic() + 1000)
        loop.submit(request)
        for _ in range(6):
            loop.step()
        assert loop.scheduler.cache.num_free < loop.scheduler.cache.num_pages
        if way == "cancel":
            loop.cancel(request)
        else:
            request.speech.deadline = time.monotonic()
        loop.step()
        assert loop.scheduler.cache.num_free == loop.scheduler.cache.num_pages
        assert request.wait(0)
        assert request.reason == "cancelled"
        assert len(request.speech.ids) >= 4


def test_a_request_that_is_given_up_before_it_begins_is_done(decoder):
    loop = engine(decoder)
    request = TextRequest(Speech(Prefix(vectors(decoder, 20, "p")), vectors(decoder, 1, "o"), 500))
    loop.submit(request)
    loop.cancel(request)
    loop.step()
    loop.step()
    assert request.is_done


class Odd(Request):
    """Does something wrong where it is asked for texts."""

    def begin(self):
        raise ZeroDivisionError("at 0x7f")


def test_a_request_that_is_itself_wrong_harms_no_other(decoder):
    loop, odd = engine(decoder), Odd()
    loop.submit(odd)
    run(loop, texts(decoder, 3))
    with pytest.raises(ModelError, match="ZeroDivisionError"):
        odd.wait()


# --- the thread ---------------------------------------------------------------------------------------------------------------


def test_threads_ask_at_once_and_each_gets_its_own(decoder):
    wanted = [said([speech])[0] for speech in texts(decoder, 16, seed=7) if run(engine(decoder), [speech])]
    loop, found = engine(decoder), [None] * 16
    loop.start()

    def ask(at):
        request = TextRequest(texts(decoder, 16, seed=7)[at])
        loop.submit(request)
        request.wait(60)
        found[at] = said([request.speech])[0]

    threads = [threading.Thread(target=ask, args=(at,)) for at in range(16)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    loop.stop()
    assert found == wanted


def test_nobody_waits_for_a_loop_that_ended(decoder):
    loop = engine(decoder)
    request = TextRequest(Speech(Prefix(vectors(decoder, 20, "p")), vectors(decoder, 1, "o"), 5000))
    with pytest.raises(InputError):
        loop.submit(request), loop.step(), request.wait()
    request = TextRequest(Speech(Prefix(vectors(decoder, 20, "p")), vectors(decoder, 1, "o"), 900))
    loop.start()
    loop.submit(request)
    loop.stop()
    with pytest.raises(BackendError, match="closed"):
        request.wait(10)
    with pytest.raises(BackendError, match="closed"):
        loop.submit(request)


def test_a_fault_of_the_loop_itself_is_told_to_all_who_wait(decoder, monkeypatch):
    loop = engine(decoder)
    monkeypatch.setattr(loop.scheduler, "plan", lambda: 1 / 0)
    request = TextRequest(texts(decoder, 1)[0])
    loop.start()
    loop.submit(request)
    with pytest.raises(BackendError, match="ZeroDivisionError"):
        request.wait(10)


# --- anything at all ----------------------------------------------------------------------------------------------------------


class Traffic(RuleBasedStateMachine):
    """Requests that come, go, fail and run late over a cache that is too small: no page is ever lost or held twice."""

    requests = Bundle("requests")
    decoder = talkative()
    runner = "plain"

    def __init__(self):
        super().__init__()
        self.marked = set()
        self.loop = engine(self.decoder, 12, runner=self.runner, marked=self.marked, texts=5, tokens=24)
        self.prefixes = [Prefix(vectors(self.decoder, length, f"{length}")) for length in (0, 4, 16, 35)]

    @rule(target=requests, data=st.data(), count=st.integers(1, 4))
    def submit(self, data, count):
        made = []
        for _ in range(count):
            prefix = self.prefixes[data.draw(st.integers(0, 3))]
            own, most = data.draw(st.integers(1, 20)), data.draw(st.integers(1, 40))
            speech = Speech(prefix, vectors(self.decoder, own, f"{own}"), most, (STOP,))
            speech.draft = data.draw(st.sampled_from([None, Guess([STOP + 1] * 40, 1)]))
            request = TextRequest(speech, deadline=data.draw(st.sampled_from([None, None, None, 0.0, time.monotonic() + 0.02])))
            self.loop.submit(request)
            made.append(request)
        return multiple(*made)

    @rule(request=consumes(requests))
    def cancel(self, request):
        self.loop.cancel(request)

    @rule(request=consumes(requests))
    def fail(self, request):
        self.marked.add(request.speech)

    @rule(count=st.integers(1, 6))
    def step(self, count):
        for _ in range(count):
            self.loop.step()

    @invariant()
    def nothing_is_lost(self):
        self.loop.scheduler.check_integrity()

    def teardown(self):
        while self.loop.step():
            self.loop.scheduler.check_integrity()
        assert self.loop.scheduler.cache.num_free == self.loop.scheduler.cache.num_pages
        assert not self.loop._of


class RecordedTraffic(Traffic):
    """The same with recorded passes."""

    runner = "recorded"


for machine in (Traffic, RecordedTraffic):
    machine.TestCase.settings = settings(
        max_examples=40, stateful_step_count=50, deadline=None, suppress_health_check=list(HealthCheck)
    )
TestTraffic, TestRecordedTraffic = Traffic.TestCase, RecordedTraffic.TestCase
