"""The public models through the engine: prompts, streams, stops, circles, pages that fail, and bad input of every kind."""

import math
import resource
import threading
from itertools import count, islice

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from optmem.engine import Engine, VisionTokens
from optmem.engine.draft import Lookup
from optmem.engine.lanes import Lanes, PlainLane
from optmem.engine.modes import next_mode
from optmem.engine.sampling import chances
from optmem.engine.texts import EVERY, LOOKED, REPEATED, TIMES, Listener, turns_in_a_circle
from optmem.errors import CheckpointError, ImageError, InputError
from optmem.images import LoadedImage
from optmem.model.decoder import greedy
from optmem.model.model import Model
from optmem.pixels import MODES, NO_TILES
from optmem.testing.checkpoints import random_weights, special_ids, tiny_config, tokenizer_json
from optmem.text.ngram import NgramGuard
from optmem.text.prompts import prompt_ids, text_prompt
from optmem.text.tokenizer import BytePairTokenizer

CONTENT = tokenizer_json()
TOKENIZER = BytePairTokenizer(CONTENT)
FAMILIES = ("deepseek-ocr", "unlimited-ocr", "deepseek-ocr-2")


def make(family, *, tokenizer=TOKENIZER, **settings):
    """A tiny model that says many different things."""
    config = tiny_config(family, vocab_size=TOKENIZER.vocab_size, image_id=special_ids(CONTENT)["<image>"])
    weights = random_weights(config, torch.float32, seed=4)
    weights["lm_head.weight"] = weights["lm_head.weight"] * 30
    for name in weights:  # what a page looks like must matter
        if "projector" in name:
            weights[name] = weights[name] * 30
    return Engine(Model(config, weights, tokenizer), **settings)


RECORDED = Lanes(PlainLane(), PlainLane())


@pytest.fixture(
    scope="module",
    params=[(family, lanes) for lanes in (None, RECORDED) for family in FAMILIES],
    ids=[family + way for way in ("", " recorded") for family in FAMILIES],
)
def engine(request):
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    family, lanes = request.param
    made = make(family, lanes=lanes)
    yield made
    made.close()
    torch.set_num_threads(threads)


@pytest.fixture(scope="module", params=[None, RECORDED], ids=["plain", "recorded"])
def v1(request):
    made = make("deepseek-ocr", lanes=request.param)
    yield made
    made.close()


def pictures(number, side=512):
    rng = np.random.default_rng(number)
    return [rng.integers(0, 256, (side, side), dtype=np.uint8) for _ in range(number)]


def mode_of(engine):
    return "ocr2" if engine.model.config.family == "deepseek-ocr-2" else "tiny"


def plain(engine, page, words, most):
    """The plainest loop over the model."""
    config = engine.model.config
    prompt = text_prompt(words, family=config.family)
    ids = prompt_ids(TOKENIZER, prompt, [page.fed_tokens], bos_id=config.bos_id, image_id=config.image_id)
    embedded = engine.model.embed_prompt(ids, [page.features], page.mode, [page.grid])
    return list(greedy(engine.model.decoder, embedded, most, config.eos_id))


# --- the same text ------------------------------------------------------------------------------------------------------------


def test_answers_are_those_of_the_plainest_loop(engine):
    seen = engine.encode(pictures(3), mode_of(engine))
    wanted = [plain(engine, page, words, 24) for page in seen for words in ("Free OCR.", "What is it?")]
    asked = {"max_tokens": 24, "ngram_guard": None}
    found = engine.decode(seen, prompt=["Free OCR.", "What is it?"], **asked)
    assert [list(done.token_ids) for done in found] == wanted
    few = engine.model.config.family == "deepseek-ocr-2"  # its queries hardly see the picture where weights are random
    assert len({done.token_ids for done in found}) > (1 if few else 3)
    for at, done in enumerate(found):
        assert done.text == "".join(engine.stream(seen[at // 2], prompt=["Free OCR.", "What is it?"][at % 2], **asked))
        assert len(done.logprobs) == len(done.probabilities) == done.output_tokens
        assert done.probabilities == pytest.approx([math.exp(value) for value in done.logprobs])


def test_several_prompts_on_a_page_write_it_once(v1):
    (page,) = v1.encode(pictures(1), "tiny")
    requests = v1._reader.requests([page], v1._options({"prompt": ["one", "two", "three"], "max_tokens": 4}))
    assert len({id(request.speech.prefix) for request in requests}) == 1
    assert requests[0].speech.prefix.length == 1 + page.fed_tokens
    alone = [v1.decode(page, prompt=words, max_tokens=4)[0] for words in ("one", "two", "three")]
    assert v1.decode(page, prompt=["one", "two", "three"], max_tokens=4) == alone


def test_pages_that_are_read_together_are_one_answer(engine):
    seen = engine.encode(pictures(2), mode_of(engine))
    (together,) = engine.decode([seen], max_tokens=6)
    assert together.prompt_tokens > sum(page.fed_tokens for page in seen)
    assert len(engine.decode([seen, seen[:1]], max_tokens=6)) == 2


def test_a_tokenizer_is_needed():
    bare = make("deepseek-ocr", tokenizer=None)
    with pytest.raises(CheckpointError, match=r"needs tokenizer\.json"):
        bare.decode(bare.encode(pictures(1), "tiny"))


def test_a_guard_is_the_familys_unless_another_is_asked_for(v1):
    (page,) = v1.encode(pictures(1), "tiny")
    (default,) = v1._reader.requests([page], v1._options({"max_tokens": 4}))
    assert default.speech.sampling.guard.size == 30
    (none,) = v1._reader.requests([page], v1._options({"max_tokens": 4, "ngram_guard": None}))
    assert none.speech.sampling.guard is None
    (free,), (strict,) = (v1.decode(page, max_tokens=40, ngram_guard=guard) for guard in (None, NgramGuard(1, 1000)))
    assert len(set(strict.token_ids)) == len(strict.token_ids)
    assert strict != free


def test_a_seed_says_which_text_is_drawn(v1):
    seen = v1.encode(pictures(2), "tiny")
    hot = {"temperature": 3.0, "max_tokens": 16}
    first, again, other = (v1.decode(seen, seed=seed, **hot) for seed in (1, 1, 2))
    assert first == again != other
    assert v1.decode(seen[1], seed=1, **hot)[0] == first[1]


@pytest.mark.parametrize("draft", ["ngrams", Lookup(known=tuple(range(40, 90)), shortest=1)], ids=["ngrams", "known"])
def test_drafts_change_nothing(v1, draft):
    seen = v1.encode(pictures(3), "tiny")
    assert v1.decode(seen, max_tokens=60, draft=draft) == v1.decode(seen, max_tokens=60, draft=None)


def printed_page(pixels, text):
    """A picture that comes with a text, as a PDF's page does."""
    return LoadedImage("page", pixels, text=text)


def test_a_text_layer_saves_passes_and_changes_nothing(v1):
    shown = pictures(2)
    plain = list(v1.ocr(shown, "tiny", max_tokens=60))
    printed = [printed_page(picture, done.text) for picture, done in zip(shown, plain, strict=True)]
    loop, steps = v1._started(), []
    for several, draft in ((shown, None), (printed, "text")):
        before = loop.steps  # of pages one after the other: together they take as many as their overlap has it
        assert [done for picture in several for done in v1.ocr([picture], "tiny", max_tokens=60, draft=draft)] == plain
        steps.append(loop.steps - before)
    assert steps[1] < steps[0]
    for text in ("", "what does not stand there " * 9, "<image> what " * 9_000):
        assert list(v1.ocr([printed_page(picture, text) for picture in shown], "tiny", max_tokens=60, draft="text")) == plain
    seen = v1.encode(shown[0], "tiny")
    assert v1.decode(seen, max_tokens=60, draft=v1.text_draft(plain[0].text)) == v1.decode(seen, max_tokens=60)


class Odd:
    """A user's picture, whose other attributes are nobody's business."""

    def image(self):
        return pictures(1)[0]

    @property
    def text(self):
        raise RuntimeError("asked for")


def test_nothing_of_a_users_object_is_asked_for_but_its_image(v1):
    (done,) = v1.ocr([Odd()], "tiny", max_tokens=3, draft="text")
    assert done.error is None


def test_a_text_belongs_to_pictures(v1):
    with pytest.raises(InputError, match="draft='text' is for ocr"):
        v1.decode(v1.encode(pictures(1), "tiny"), draft="text")
    with pytest.raises(InputError, match="a text draft is made from a str, got bytes"):
        v1.text_draft(b"words")


def test_a_lookup_proposes_what_followed():
    assert Lookup().propose([1, 2, 3, 4, 1, 2]) == [3, 4, 1, 2]
    assert Lookup(known=[7, 8, 9, 10]).propose([5, 7, 8]) == [9, 10]
    assert Lookup(known=[7, 8, 9]).propose([]) == [7, 8, 9]
    assert list(Lookup().propose([1, 2, 3])) == []


# --- streams and stops --------------------------------------------------------------------------------------------------------


def test_closing_a_stream_gives_its_memory_back(v1):
    (page,) = v1.encode(pictures(1), "tiny")
    cache = v1._started().scheduler.cache
    parts = v1.stream(page, max_tokens=1500, ngram_guard=None)
    next(parts)
    assert cache.num_free < cache.num_pages
    parts.close()
    v1.decode(page, max_tokens=1)  # behind it in the queue
    assert cache.num_free == cache.num_pages


@given(st.lists(st.integers(5, 300), max_size=40), st.lists(st.text(max_size=3, min_size=1), max_size=3))
def test_a_listener_cuts_where_a_stop_begins(ids, stops):
    told = []
    heard = Listener(TOKENIZER, tuple(stops), told.append)
    whole = b"".join(map(TOKENIZER.token_bytes, ids)).decode("utf-8", "replace")
    reason = next((reason for token in ids if (reason := heard(token))), None)
    text = heard.finish()
    assert "".join(told) == text
    first = [whole.find(stop) for stop in stops if stop in whole]
    if reason is None:
        assert text == whole
    else:
        assert reason == "stop"
        assert text == whole[: len(text)]
        assert any(whole.startswith(stop, len(text)) for stop in stops) or "\ufffd" in whole
        assert len(text) >= min(first, default=0)


def test_nothing_follows_where_a_stop_cut():
    byte = {TOKENIZER.token_bytes(token): token for token in range(TOKENIZER.vocab_size)}
    heard = Listener(TOKENIZER, ("x",))
    assert [heard(byte[word]) for word in (b"a", b"x")] == [None, "stop"]
    assert heard.finish() == "a"
    heard = Listener(TOKENIZER, ("xyz", "x"))
    assert [heard(token) for token in TOKENIZER.encode("bx")][-1] == "stop"
    assert heard.finish() == "b"


def test_messages_name_no_addresses_and_no_prompts(v1):
    (page,) = v1.encode(pictures(1), "tiny")
    for asked in ({"draft": object()}, {"max_tokens": object()}, {"rows": [object()]}, {"temperature": object()},
                  {"stop": object()}, {"timeout": object()}, {"seed": object()}, {"prompt": ["my secret"] * 65}):  # fmt: skip
        with pytest.raises(InputError) as raised:
            v1.decode(page, **asked)
        assert "0x" not in str(raised.value)
        assert "secret" not in str(raised.value)
        assert len(str(raised.value)) < 300


def test_a_stop_ends_an_answer_and_is_no_part_of_it(v1):
    (page,) = v1.encode(pictures(1), "tiny")
    (whole,) = v1.decode(page, max_tokens=30, ngram_guard=None)
    stop = whole.text[5:7]
    (cut,) = v1.decode(page, max_tokens=30, ngram_guard=None, stop=[stop, "never said"])
    assert cut.text == whole.text[: whole.text.index(stop)]
    assert cut.finish_reason == "stop"
    assert "".join(v1.stream(page, max_tokens=30, ngram_guard=None, stop=stop)) == cut.text


def test_a_time_that_is_over_gives_what_was_read(v1):
    (page,) = v1.encode(pictures(1), "tiny")
    (done,) = v1.decode(page, max_tokens=1500, ngram_guard=None, timeout=0.2)
    assert done.finish_reason in ("cancelled", "loop", "stop")


# --- circles ------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("length", [1, 2, 7, 100, LOOKED])
def test_circles_are_seen(length):
    circle = list(range(length))
    times = max(TIMES + 1, 2 * REPEATED // length)
    assert turns_in_a_circle([*range(2000, 2050), *circle * times])
    assert not turns_in_a_circle([*circle * times, 9999])
    assert not turns_in_a_circle(circle * (TIMES - 1))


def test_a_table_of_empty_cells_is_no_circle_too_soon():
    assert not turns_in_a_circle([1, 2] * (REPEATED // 2 - 1))
    assert not turns_in_a_circle([])


def test_a_page_that_turns_in_circles_is_read_again_one_mode_higher(v1, monkeypatch):
    """A model of random weights turns in circles soon; here it is heard earlier than pages of real models are."""
    monkeypatch.setattr("optmem.engine.texts.turns_in_a_circle", lambda ids: len(ids) >= EVERY)
    (done,) = v1.ocr(pictures(1), "tiny", max_tokens=64, ngram_guard=None, retries=2)
    assert [attempt.mode for attempt in done.attempts] == ["tiny", "small", "base"]
    assert [attempt.reason for attempt in done.attempts] == ["loop", "loop", ""]
    assert done.finish_reason == "loop"
    assert len(done.token_ids) == EVERY


def test_what_was_read_is_kept_where_a_larger_mode_cannot_be_read(v1, monkeypatch):
    monkeypatch.setattr("optmem.engine.texts.turns_in_a_circle", lambda ids: len(ids) >= EVERY)
    token = 2 * 4 * v1.model.config.decoder.layers * v1.model.config.decoder.hidden
    small = Engine(v1.model, cache_bytes=200 * token)  # room for tiny's 74 tokens and not for base's
    (done,) = small.ocr(pictures(1), "tiny", max_tokens=64, ngram_guard=None)
    small.close()
    assert (done.finish_reason, len(done.token_ids), done.error) == ("loop", EVERY, None)
    assert [attempt.reason for attempt in done.attempts][-1] == "error"


def test_the_ladder_of_modes_ends():
    config = make("deepseek-ocr").model.config
    names, mode = [], MODES["tiny"]
    while mode:
        names.append(mode.name)
        mode = next_mode(config, mode)
    assert names == ["tiny", "small", "base", "large", "gundam"]
    assert next_mode(make("deepseek-ocr-2").model.config, MODES["ocr2"]) is None


# --- many pages ---------------------------------------------------------------------------------------------------------------


def test_one_bad_picture_is_its_own(v1, tmp_path):
    (tmp_path / "bad.png").write_bytes(b"\x89PNG\r\n\x1a\n but no more")
    given = [*pictures(2), tmp_path / "bad.png", np.zeros((3, 0), dtype=np.uint8), *pictures(1), tmp_path / "not there.png"]
    found = list(v1.ocr(iter(given), "tiny", max_tokens=8))
    assert [done.finish_reason == "error" for done in found] == [False, False, True, True, False, True]
    assert all(isinstance(done.error, Exception) == (done.finish_reason == "error") for done in found)
    assert isinstance(found[2].error, ImageError)
    alone = v1.decode(v1.encode([given[0], given[1], given[4]], "tiny"), max_tokens=8)
    assert [done.token_ids for done in found if not done.error] == [done.token_ids for done in alone]


def test_an_endless_iterator_is_read_in_order_and_in_bounded_memory(v1):
    taken = []
    rng = np.random.default_rng(0)
    first = rng.integers(0, 256, (64, 64), dtype=np.uint8)

    def endless():
        for at in count():
            taken.append(at)
            yield first if at % 3 else np.zeros((64, 64), dtype=np.uint8)

    pages = v1.ocr(endless(), "tiny", max_tokens=2)
    found = [done.token_ids for done in islice(pages, 100)]
    assert found == [found[at % 3 > 0] for at in range(100)]
    assert len(taken) <= 100 + 64
    pages.close()
    cache = v1._started().scheduler.cache
    v1.decode(v1.encode(first, "tiny"), max_tokens=1)
    assert cache.num_free == cache.num_pages


def test_an_iterator_that_fails_says_so(v1):
    def failing():
        yield from pictures(1)
        raise KeyError("no more")

    found = []
    with pytest.raises(KeyError):
        found += v1.ocr(failing(), "tiny", max_tokens=2)
    read = v1.ocr(failing(), "tiny", max_tokens=2)
    assert next(read).text == v1.decode(v1.encode(pictures(1), "tiny"), max_tokens=2)[0].text  # what came before is read
    assert v1.decode(v1.encode(pictures(1), "tiny"), max_tokens=2)


def test_threads_read_at_once(v1):
    seen = v1.encode(pictures(4), "tiny")
    wanted = [v1.decode(page, max_tokens=12)[0] for page in seen]
    found = {}
    threads = [
        threading.Thread(target=lambda at=at: found.update({at: v1.decode(seen[at % 4], max_tokens=12)[0]})) for at in range(12)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert [found[at] for at in range(12)] == wanted * 3


# --- bad input: faults 28 to 40 -----------------------------------------------------------------------------------------------


def bad_tokens(page):
    features = page.features
    return {
        "28 hidden size": lambda: VisionTokens(torch.zeros(64, 8), page.mode, page.grid, page.encoder),
        "28 dimensions": lambda: VisionTokens(features[None], page.mode, page.grid, page.encoder),
        "28 dtype": lambda: VisionTokens(features.to(torch.int8), page.mode, page.grid, page.encoder),
        "29 rows": lambda: VisionTokens(features[:-1], page.mode, page.grid, page.encoder),
        "29 mode": lambda: VisionTokens(features, MODES["base"], page.grid, page.encoder),
        "30 NaN": lambda: VisionTokens(features * torch.nan, page.mode, page.grid, page.encoder),
        "30 infinite": lambda: VisionTokens(features / 0, page.mode, page.grid, page.encoder),
        "31 sparse": lambda: VisionTokens(
            torch.sparse_coo_tensor(size=(64, 10**12), check_invariants=True), page.mode, page.grid, page.encoder
        ),
        "31 csr": lambda: VisionTokens(features.to_sparse_csr(), page.mode, page.grid, page.encoder),
        "fingerprint": lambda: VisionTokens(features, page.mode, page.grid, "0" * 32),
        "picture": lambda: VisionTokens(features, page.mode, page.grid, page.encoder, (0, 5)),
    }


@pytest.mark.filterwarnings("ignore:Sparse")
@pytest.mark.parametrize("name", list(bad_tokens(VisionTokens(torch.zeros(64, 32), MODES["tiny"], NO_TILES, "a" * 32))))
def test_tokens_that_do_not_fit_are_refused(v1, name):
    (page,) = v1.encode(pictures(1), "tiny")
    with pytest.raises(InputError):
        v1.decode(bad_tokens(page)[name]())
    assert v1.decode(page, max_tokens=2)


def test_odd_tensors_that_hold_right_numbers_are_read(v1):
    """32: strides, gradients and subclasses change no answer."""
    (page,) = v1.encode(pictures(1), "tiny")
    wanted = v1.decode(page, max_tokens=6)
    plain = page.features.clone()
    for odd in (
        plain.t().contiguous().t(),
        plain.clone().requires_grad_(),
        torch.nn.Parameter(plain.clone()),
        plain.double().float(),
    ):
        assert v1.decode(VisionTokens(odd, page.mode, page.grid, page.encoder), max_tokens=6) == wanted


@pytest.mark.parametrize(
    "asked",
    [
        {"max_tokens": 0}, {"max_tokens": -1}, {"max_tokens": 10**9}, {"max_tokens": 2.0}, {"max_tokens": True},
        {"temperature": math.nan}, {"temperature": -1}, {"temperature": math.inf}, {"temperature": "hot"}, {"temperature": 1e9},
        {"top_p": 0}, {"top_p": 1.5}, {"top_p": math.nan}, {"seed": 1.5}, {"seed": "x"},
        {"stop": ["x"] * 10_000}, {"stop": [""]}, {"stop": "x" * 10_000}, {"stop": 5}, {"stop": [None]},
        {"ngram_guard": "off"}, {"ngram_guard": 20}, {"timeout": 0}, {"timeout": math.nan}, {"timeout": "soon"},
        {"prompt": 5}, {"prompt": []}, {"prompt": ["x"] * 1000}, {"prompt": [None]}, {"prompt": "x" * 3_000_000},
        {"rows": [1]}, {"draft": "glance"}, {"draft": "magic"}, {"draft": 5},
    ],
    ids=lambda asked: str(asked)[:30],
)  # fmt: skip
def test_what_cannot_be_asked_is_refused(v1, asked):
    """33, 34."""
    (page,) = v1.encode(pictures(1), "tiny")
    for read in (v1.decode, lambda page, **asked: list(v1.stream(page, **asked))):
        with pytest.raises(InputError):
            read(page, **asked)
    with pytest.raises(InputError, match="penalty"):
        v1.decode(page, penalty=1.0)
    assert v1.decode(page, max_tokens=2)


def test_a_prompt_that_leaves_no_room_for_an_answer_is_refused(v1):
    (page,) = v1.encode(pictures(1), "tiny")
    with pytest.raises(InputError, match="fewer than 2048 tokens"):
        v1.decode(page, prompt="a " * 3000)


@pytest.mark.parametrize("retries", [None, -1, "x", 1.5])
def test_retries_are_a_number(v1, retries):
    with pytest.raises(InputError, match="retries"):
        v1.ocr(pictures(1), "tiny", retries=retries)


@pytest.mark.parametrize("guard", [(0, 5), (-1, 5), (3, 0), (2.0, 5)])
def test_guards_that_make_no_sense_are_refused(guard):
    with pytest.raises(InputError):
        NgramGuard(*guard)


def test_a_guard_larger_than_the_answer_and_ids_that_do_not_exist_do_nothing(v1):
    (page,) = v1.encode(pictures(1), "tiny")
    guard = NgramGuard(5000, 6000, frozenset({10**9, 3}))
    assert v1.decode(page, max_tokens=8, ngram_guard=guard) == v1.decode(page, max_tokens=8, ngram_guard=None)


def test_an_answer_without_end_stops_at_its_limit(v1):
    """35."""
    (page,) = v1.encode(pictures(1), "tiny")
    (done,) = v1.decode(page, max_tokens=EVERY - 1, ngram_guard=None)
    assert done.finish_reason in ("length", "stop")
    assert done.output_tokens <= EVERY - 1


def test_memory_that_is_short_changes_no_answer(v1):
    """36: a cache for two pages as they begin, and not as they end."""
    seen = v1.encode(pictures(5), "tiny")
    wanted = v1.decode(seen, max_tokens=40, ngram_guard=None)
    token = 2 * 4 * v1.model.config.decoder.layers * v1.model.config.decoder.hidden
    small = Engine(v1.model, cache_bytes=272 * token)
    assert small.decode(seen, max_tokens=40, ngram_guard=None) == wanted
    assert small._started().scheduler.preemptions > 0
    with pytest.raises(InputError, match="make the cache larger"):
        small.decode(seen, max_tokens=400)
    small.close()
    with pytest.raises(InputError, match="cache_bytes must be at least"):
        Engine(v1.model, cache_bytes=10).decode(seen)


def test_chances_are_even_and_differ_by_seed_and_place():
    drawn = chances([7] * 4000, range(4000))
    assert ((drawn >= 0) & (drawn < 1)).all()
    assert abs(drawn.mean() - 0.5) < 0.02
    assert len(set(drawn)) == 4000
    assert chances([1, -1, 2**70], [0, 0, 0]).tolist() != chances([2, -2, 2**71], [0, 0, 0]).tolist()


@pytest.mark.slow
def test_memory_is_flat_over_ten_thousand_pages(v1):
    """Peak resident memory of the last 9,000 is within 5 % of that after 1,000."""
    page = np.zeros((64, 64), dtype=np.uint8)
    after = 0
    for at, done in enumerate(v1.ocr((page for _ in range(10_000)), "tiny", max_tokens=1)):
        assert done.error is None
        if at == 1000:
            after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss < 1.05 * after
