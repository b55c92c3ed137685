"""pick_token: against its meaning spelled out in loops, row by row, over histories that repeat; hostile rows, ties and edges."""

import math
import re
from fractions import Fraction
from importlib import import_module

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from optmem import ops, reference
from optmem.errors import InputError
from optmem.native import native
from optmem.ops import picking
from optmem.testing import assert_equal, available_isas, every_other, forced_isa, generator, guarded

INF, NAN = math.inf, math.nan
ALMOST_ONE = 1 - 2**-53  # the largest chance below 1
GREEDY = {"guard_size": 0, "guard_window": 0, "temperature": 0.0, "top_p": 1.0, "chance": 0.0}
TYPES = {
    "guard_size": torch.int64,
    "guard_window": torch.int64,
    "temperature": torch.float32,
    "top_p": torch.float32,
    "chance": torch.float64,
}
ORDER = ("logits", "history", "guard_size", "guard_window", "allowed", "temperature", "top_p", "chance")


class TritonForCpp:
    """The kernels in the C++'s place, behind the same arrays: on the GPU, or in the interpreter where there is none."""

    def __init__(self):
        self.kernel = import_module("optmem.kernels.pick_token")
        self.device = "cuda" if torch.cuda.is_available() else "cpu"

    def pick_token(self, *arguments):
        *inputs, most_guard, is_sampled, heat, ids, logprobs, confidence, _threads = arguments
        outputs = [torch.from_numpy(array) for array in (ids, logprobs, confidence)]
        placed = [torch.from_numpy(array).to(self.device) for array in (*inputs, ids, logprobs, confidence)]
        with np.errstate(all="ignore"):  # numpy has words for what a GPU does in silence: inf - inf, and what is too large
            self.kernel.pick_token(*placed[:6], most_guard, is_sampled, heat, *placed[6:])
        for output, placed_one in zip(outputs, placed[6:], strict=True):
            output.copy_(placed_one)


@pytest.fixture(scope="module", autouse=True, params=["reference", *available_isas(), "triton"])
def implementation(request):
    """Every test runs with plain torch, with the C++ for every instruction set, and with the Triton kernels."""
    if request.param == "triton":
        pytest.importorskip("triton")
        native_too = TritonForCpp()
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(picking, "cpp_for", lambda _: native_too)
            yield "triton"
        return
    if request.param != "reference":
        with forced_isa(request.param):
            yield "cpp"
        return
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(picking, "cpp_for", lambda _: None)
        yield "reference"


def spare_the_interpreter(implementation):
    if implementation == "triton" and not torch.cuda.is_available():
        pytest.skip("too many programs for the interpreter")


@pytest.fixture
def many(implementation):
    """For cases of thousands of programs, for which the interpreter takes minutes; those beside them ask the same in small."""
    spare_the_interpreter(implementation)


def test_each_implementation_is_what_runs(implementation, monkeypatch):
    monkeypatch.setattr(reference, "pick_token", None)
    if implementation != "reference":
        assert picked(row(FALLING)) == [0]
    else:
        with pytest.raises(TypeError, match="NoneType"):
            pick(row(FALLING))


# --- the meaning, spelled out ---------------------------------------------------------------------------------------------------


def row(logits, said=(), allowed=(), **settings):
    """One row as the loops below read it: plain lists and numbers, greedy and unguarded where nothing else is said."""
    return {"logits": list(logits), "history": list(said), "allowed": list(allowed), **GREEDY, **settings}


def banned_tokens(said, n, window, allowed):
    banned = set()
    if n == 0 or len(said) < n:
        return banned
    prefix = said[len(said) - n + 1 :]
    for start in range(max(0, len(said) - window), len(said) - n + 1):
        if said[start : start + n - 1] == prefix:
            banned.add(said[start + n - 1])
    return banned - set(allowed)


def guarded_logits(asked):
    banned = banned_tokens(asked["history"], asked["guard_size"], asked["guard_window"], asked["allowed"])
    guarded = [-INF if token in banned else logit for token, logit in enumerate(asked["logits"])]
    return guarded if max(guarded) > -INF else asked["logits"]


def drawn_token(logits, temperature, top_p, chance):
    """Sums of fractions, which round nothing."""
    order = sorted(range(len(logits)), key=lambda token: (-logits[token], token))
    highest = logits[order[0]]
    masses = [Fraction(math.exp((logits[token] - highest) / temperature)) for token in order]
    kept, before = [], Fraction(0)
    for mass in masses:
        if kept and before >= top_p * sum(masses):
            break
        kept.append(mass)
        before += mass
    passed, before = chance * sum(kept), Fraction(0)
    for token, mass in zip(order, kept, strict=False):
        before += mass
        if before > passed:
            return token
    return None


def right_tokens(asked):
    """What may be said: one token, or the two at an edge that rounding decides."""
    guarded = guarded_logits(asked)
    if asked["temperature"] == 0:
        return {guarded.index(max(guarded))}
    edge = Fraction(1, 10**12)
    shares = [Fraction(asked["top_p"]) * (1 + way * edge) for way in (-1, 0, 1)]
    chances = [min(max(Fraction(asked["chance"]) + way * edge, Fraction(0)), Fraction(ALMOST_ONE)) for way in (-1, 0, 1)]
    return {drawn_token(guarded, asked["temperature"], share, chance) for share in shares for chance in chances}


def is_broken(asked):
    logits = asked["logits"]
    return any(math.isnan(logit) or logit == INF for logit in logits) or max(logits) == -INF


def log_probability(logits, token):
    highest = max(logits)
    return logits[token] - highest - math.log(math.fsum(math.exp(logit - highest) for logit in logits))


def probability(logits, token, heat):
    highest = max(logits)
    return math.exp((logits[token] - highest) / heat) / math.fsum(math.exp((logit - highest) / heat) for logit in logits)


def assert_right(rows, got, heat=1.0):
    """What is picked of every row, and how likely it is, plainly and at the temperature of confidence."""
    assert [tensor.dtype for tensor in got] == [torch.int64, torch.float32, torch.float32]
    assert [tensor.shape for tensor in got] == [(len(rows),)] * 3
    for asked, token, logprob, confidence in zip(rows, *(tensor.tolist() for tensor in got), strict=True):
        if is_broken(asked):
            assert token == -1
            assert math.isnan(logprob)
            assert math.isnan(confidence)
        else:
            assert token in right_tokens(asked)
            scale = 1 + abs(asked["logits"][token]) + abs(max(asked["logits"]))
            assert abs(logprob - log_probability(asked["logits"], token)) <= 8 * scale * 2**-24
            sure = probability(asked["logits"], token, heat)
            assert abs(confidence - sure) <= sure * 8 * (scale / heat + 1) * 2**-24 + 1e-37


# --- rows to tensors ------------------------------------------------------------------------------------------------------------


def padded(lists, extra, side):
    width = max(map(len, lists), default=0) + extra
    fill = [[-1] * (width - len(ids)) for ids in lists]
    rows = [ids + more if side == "right" else more + ids for ids, more in zip(lists, fill, strict=True)]
    return torch.tensor(rows, dtype=torch.int64).view(len(lists), width)


def tensors(rows, extra=0):
    """The operator's tensors, by name; extra is columns of padding."""
    made = {name: torch.tensor([asked[name] for asked in rows], dtype=dtype) for name, dtype in TYPES.items()}
    made["logits"] = torch.tensor([asked["logits"] for asked in rows], dtype=torch.float32)
    made["history"] = padded([asked["history"] for asked in rows], extra, "left")
    made["allowed"] = padded([asked["allowed"] for asked in rows], extra, "right")
    return [made[name] for name in ORDER]


def flags(rows, most_guard=None):
    most = max(0, *(asked["guard_size"] for asked in rows))
    is_sampled = any(asked["temperature"] > 0 for asked in rows)
    return {"most_guard": most if most_guard is None else most_guard, "is_sampled": is_sampled}


def pick(*rows, extra=0, most_guard=None, heat=1.0):
    return ops.pick_token(*tensors(rows, extra), **flags(rows, most_guard), confidence_temperature=heat)


def picked(*rows, **settings):
    return pick(*rows, **settings)[0].tolist()


# --- against the meaning --------------------------------------------------------------------------------------------------------

levels = st.integers(-12, 12).map(lambda level: level / 4)  # ties are common, and fp32 holds every one
narrow_floats = st.floats(0, 1, width=32)


@st.composite
def histories(draw, tokens):
    """Few tokens, or a short text again and again with something behind it: n-grams of every length repeat."""
    ids = st.integers(0, tokens)
    if draw(st.booleans()):
        return draw(st.lists(ids, max_size=12))
    return (draw(st.lists(ids, min_size=1, max_size=3)) * draw(st.integers(1, 6)) + draw(st.lists(ids, max_size=2)))[:16]


@st.composite
def rows_of(draw, vocab):
    hostile = st.sampled_from([NAN, INF, -INF, 3.4e38, -3.4e38, -0.0])
    logit = st.one_of(levels, st.just(-INF)) if draw(st.integers(0, 5)) else st.one_of(levels, hostile)
    return row(
        [torch.tensor(x, dtype=torch.float32).item() for x in draw(st.lists(logit, min_size=vocab, max_size=vocab))],
        draw(histories(min(vocab, 2))),  # one token more than a vocabulary of 1 or 2 has
        draw(st.lists(st.integers(0, vocab), max_size=3)),
        guard_size=draw(st.integers(0, 6)),
        guard_window=draw(st.integers(0, 18)),
        temperature=draw(st.one_of(st.just(0.0), st.sampled_from([0.25, 1.0, 3.0]), st.floats(2**-10, 100, width=32))),
        top_p=draw(st.one_of(st.just(1.0), narrow_floats)),
        chance=draw(st.one_of(st.just(ALMOST_ONE), st.floats(0, 1, exclude_max=True))),
    )


batches = st.integers(1, 6).flatmap(lambda vocab: st.lists(rows_of(vocab), min_size=1, max_size=4))


heats = st.sampled_from([0.5, 1.0, 2.0])  # of confidence


@pytest.mark.usefixtures("many")
@settings(max_examples=300)
@given(batches, heats)
def test_says_what_the_loops_say(rows, heat):
    assert_right(rows, pick(*rows, heat=heat), heat)


@settings(max_examples=20)
@given(batches, heats)
def test_says_what_the_loops_say_of_a_few(rows, heat):
    assert_right(rows, pick(*rows, heat=heat), heat)


@settings(max_examples=10)
@given(batches, st.integers(0, 5), st.integers(0, 40), heats)
def test_a_row_knows_neither_of_the_others_nor_of_padding_in_a_few(rows, extra, more, heat):
    assert_alone(rows, extra, more, heat)


@pytest.mark.usefixtures("many")
@settings(max_examples=60)
@given(batches, st.integers(0, 5), st.integers(0, 40), heats)
def test_a_row_knows_neither_of_the_others_nor_of_padding(rows, extra, more, heat):
    assert_alone(rows, extra, more, heat)


def assert_alone(rows, extra, more, heat):
    together = pick(*rows, extra=extra, most_guard=flags(rows)["most_guard"] + more, heat=heat)
    for at, asked in enumerate(rows):
        for got, alone in zip(together, pick(asked, heat=heat), strict=True):
            assert_equal(got[at : at + 1].nan_to_num(7), alone.nan_to_num(7))


@pytest.mark.usefixtures("many")
@settings(max_examples=60)
@given(batches)
def test_no_more_history_is_needed_than_the_longest_window(rows):
    longest = max(asked["guard_window"] for asked in rows)
    cut = [asked | {"history": asked["history"][max(0, len(asked["history"]) - longest) :]} for asked in rows]
    for whole, recent in zip(pick(*rows), pick(*cut), strict=True):
        assert_equal(whole.nan_to_num(7), recent.nan_to_num(7))


@pytest.mark.usefixtures("many")
@pytest.mark.parametrize(("size", "window"), [(20, 50), (30, 90), (35, 128), (35, 1024), (40, 90), (2, 300), (1, 300)])
def test_the_guards_of_the_family(size, window):
    """Long texts that loop with any period, stop looping, or are cut: exactly the tokens of the loops are banned.

    A vocabulary of 5, of which at most 4 are said: the lowest that is not banned is picked.
    """
    assert_guarded(size, window, (*range(1, 40), 45, 49, 55, 60, 89, 95, 300))


@pytest.mark.parametrize(("size", "window"), [(20, 50), (35, 1024), (1, 300)])
def test_the_guards_of_the_family_for_a_few(size, window):
    assert_guarded(size, window, (1, 3, 4, 8, 19, 20, 31, 60, 95))


def assert_guarded(size, window, periods):
    rng = generator(f"guard {size} {window}")
    rows = []
    for period in periods:
        loop = torch.randint(0, 3, (period,), generator=rng).tolist()
        said = (loop * (1200 // period + 1))[: int(torch.randint(40, 1200, (), generator=rng))]
        if period % 4 == 0:
            said[-(size + 1) // 2] = 3
        rows.append(row([0.0] * 5, said, guard_size=size, guard_window=window))
    logits, history, sizes, windows, allowed, *_ = tensors(rows)
    guarded = reference.guard_repeats(logits, history, sizes, windows, allowed, size)
    banned = [banned_tokens(asked["history"], size, window, ()) for asked in rows]
    assert [set(where.nonzero().flatten().tolist()) for where in guarded == -INF] == banned
    assert picked(*rows) == [min({*range(5)} - tokens) for tokens in banned]
    assert sum(map(bool, banned)) >= min(5, len(periods) // 3)
    assert size < 20 or not all(banned)


# --- the guard, by hand ---------------------------------------------------------------------------------------------------------

FALLING = [4.0, 3.0, 2.0, 1.0]  # the likeliest token is 0


@pytest.mark.parametrize(
    ("said", "size", "window", "allowed", "token"),
    [
        ([1, 2, 0, 1, 2], 3, 5, [], 1),  # 1 2 0 would repeat
        ([1, 2, 0, 1, 2], 3, 5, [0], 0),  # a token of the whitelist may repeat
        ([1, 2, 0, 1, 2], 3, 4, [], 0),  # it began before the window
        ([1, 2, 0, 1, 2], 3, 10**18, [], 1),
        ([1, 2, 0, 1, 2], 3, 2, [], 0),  # a window below n
        ([1, 2, 0, 1, 2], 3, -1, [], 0),
        ([1, 2, 0, 1, 2], 3, -(2**63), [], 0),
        ([1, 2, 0, 1, 2], 6, 9, [], 0),  # longer than the history
        ([1, 2, 0, 1, 2], 0, 9, [], 0),
        ([1, 2, 0, 1, 2], -3, 9, [], 0),
        ([0, 0, 0], 3, 3, [], 1),  # the n-gram that ends the history counts
        ([0, 0], 3, 3, [], 0),
        ([0, 1, 3], 1, 2, [], 0),  # n = 1 bans every token of the window, whatever came last
        ([3, 0, 1], 1, 2, [], 2),
        ([3, 0, 1], 1, 2, [1], 1),
        ([1, 2, 10**15, 1, 2], 3, 5, [], 0),  # tokens that no logit is for
        ([10**15, 2, 0, 10**15, 2], 3, 5, [10**15], 1),
        ([0, 1, 2, 3], 1, 4, [], 0),  # everything would be banned, so nothing is
        ([0, 1, 2, 3], 1, 4, [3], 3),
        ([], 1, 1, [], 0),
    ],
)
def test_the_guard(said, size, window, allowed, token):
    assert picked(row(FALLING, said, allowed, guard_size=size, guard_window=window)) == [token]
    assert picked(row(FALLING, said, allowed, guard_size=size, guard_window=window, temperature=0.01)) == [token]


def test_a_token_that_no_logit_is_for_bans_none():
    assert picked(row([1.0, 2.0], [0, 0, 2, 0, 0], guard_size=3, guard_window=5)) == [1]
    assert picked(row([1.0, 2.0], [0, 0, 10**15, 0, 0], guard_size=3, guard_window=5)) == [1]


def test_where_the_guard_leaves_nothing_finite_nothing_is_banned():
    assert picked(row([-INF, 2.0, 1.0], [1, 2], guard_size=1, guard_window=2)) == [1]
    assert picked(row([0.0], [0], guard_size=1, guard_window=1)) == [0]


def test_logprobs_are_those_of_the_raw_logits():
    ids, logprobs, confidence = pick(row(FALLING, [0, 0], guard_size=1, guard_window=2, temperature=9.0, top_p=0.1))
    assert ids.tolist() == [1]
    assert_near(logprobs, torch.tensor([FALLING]).log_softmax(-1)[:, 1])
    assert_near(confidence, torch.tensor([FALLING]).softmax(-1)[:, 1])


# --- how likely it is -----------------------------------------------------------------------------------------------------------


def assert_near(got, expected, atol=1e-6):
    assert_equal(got.isnan(), expected.isnan())
    assert torch.allclose(got.double(), expected.double(), rtol=2**-22, atol=atol, equal_nan=True)


def error_allowed(implementation):
    """Of a long sum, against fp64: torch adds 129,280 fp32 in a row and is off by 4e-6, the C++ adds in parts and is not."""
    return 1e-5 if implementation == "reference" else 1e-6


@pytest.mark.parametrize("heat", [0.5, 1.0, 2.0])
def test_confidence_is_the_probability_at_its_temperature(heat):
    rows = [*many_rows("confidence"), row([0.0] * 33), row([-INF] * 31 + [7.0, 1.0])]
    logits = tensors(rows)[0]
    ids, logprobs, confidence = pick(*rows, heat=heat)
    assert_near(confidence, (logits.double() / heat).softmax(-1).gather(1, ids[:, None])[:, 0])
    assert_near(logprobs, logits.double().log_softmax(-1).gather(1, ids[:, None])[:, 0])
    if heat == 1:
        assert_near(confidence, logprobs.exp())


def test_temperatures_of_confidence_at_the_ends():
    rows = [row(FALLING), row([3.4e38, -3.4e38, 3.4e38, -INF]), row([NAN, 1.0, 1.0, 1.0])]
    coldest, hottest = torch.finfo(torch.float32).tiny, torch.finfo(torch.float32).max
    cold, hot = (pick(*rows, heat=heat)[2] for heat in (coldest, hottest))
    assert cold.tolist()[:2] == [1.0, 0.5]
    assert hot[0] == 0.25
    assert cold[2].isnan()
    assert hot[2].isnan()


# --- what is drawn --------------------------------------------------------------------------------------------------------------


def test_of_equals_the_lower_id():
    equal = [1.0, 3.0, 3.0, 2.0, 3.0]
    assert picked(row(equal)) == [1]
    thirds = [row(equal, temperature=0.05, chance=chance) for chance in (0.0, 0.33, 0.34, 0.66, 0.67, ALMOST_ONE)]
    assert picked(*thirds) == [1, 1, 2, 2, 4, 3]  # with a chance as near to 1 as can be, even the unlikely 3
    assert picked(row(equal, temperature=0.05, top_p=0.5, chance=ALMOST_ONE)) == [2]
    assert picked(row([0.0] * 4, temperature=1.0, chance=0.5)) == [2]  # 2 of 4 is not above a half
    assert picked(row([0.0] * 4, temperature=1.0, top_p=0.5, chance=ALMOST_ONE)) == [1]


@pytest.mark.usefixtures("many")
def test_of_many_equals_the_lower_id():
    """More than a sort keeps in order by chance."""
    equal = row([0.0] * 999, temperature=1.0)
    assert picked(*(equal | {"chance": (at + 0.5) / 999} for at in range(999))) == list(range(999))


@pytest.mark.parametrize("chance", [0.0, 0.3, ALMOST_ONE])
@pytest.mark.parametrize("top_p", [0.0, 2**-149, 0.5, ALMOST_ONE, 1.0])
def test_what_cannot_be_is_never_drawn(chance, top_p):
    """Zeros of the softmax in front, behind and between; logits so far apart that fp32 holds no difference of them."""
    rows = [[-INF, 1.0, -INF, -INF], [-INF, -3.4e38, -INF, 3.4e38], [-3e38, -3e38, -3.4e38, -INF], [0.0, -1e4, -1e4, -1e4]]
    drawn = picked(*(row(logits, temperature=1.0, top_p=top_p, chance=chance) for logits in rows))
    assert drawn[:2] == [1, 3]
    assert drawn[2] in (0, 1)
    assert drawn[3] == 0


def test_a_temperature_near_0_draws_the_likeliest():
    assert picked(*(row(FALLING[::-1], temperature=heat, chance=ALMOST_ONE) for heat in (2**-149, 1e-30, 0.01))) == [3, 3, 3]


@pytest.mark.usefixtures("many")
@pytest.mark.parametrize("top_p", [1.0, 0.9, 0.6, 0.2])
@pytest.mark.parametrize("temperature", [0.5, 1.0, 4.0])
def test_frequencies_are_those_of_the_softmax(temperature, top_p):
    """20,000 chances at even distances: every token's count is its probability's to within the rounding at its two ends."""
    count, logits = 20_000, [0.3, -1.0, 2.0, 0.9, -INF, 1.6]
    probabilities = (torch.tensor(logits, dtype=torch.float64) / temperature).softmax(-1)
    before = torch.tensor([probabilities[probabilities > own].sum() for own in probabilities])
    kept = probabilities * (before < top_p)
    one = row(logits, temperature=temperature, top_p=top_p)
    ids = picked(*(one | {"chance": (at + 0.5) / count} for at in range(count)))
    counts = torch.bincount(torch.tensor(ids), minlength=6)
    assert ((counts - count * kept / kept.sum()).abs() <= 1).all()
    assert (counts[kept == 0] == 0).all()


def test_a_whole_vocabulary(implementation):
    """129,280 logits: the answer of fp64, and that of the same row alone."""
    rng = generator("pick_token 129280")
    logits = 3 * torch.randn(4, 129280, generator=rng)
    chance, top_p = torch.rand(4, generator=rng, dtype=torch.float64), torch.tensor([1.0, 0.9, 0.5, 1.0])
    none = torch.empty(4, 0, dtype=torch.int64)
    zeros = torch.zeros(4, dtype=torch.int64)
    columns = (logits, none, zeros, zeros, none, torch.tensor([1.0, 0.7, 2.0, 0.0]), top_p, chance)
    ids, logprobs, confidence = ops.pick_token(*columns, most_guard=0, is_sampled=True, confidence_temperature=2.0)
    for wide, atol in ((logits.double(), error_allowed(implementation)), (logits, 1e-5)):
        assert_near(logprobs, wide.log_softmax(-1).gather(1, ids[:, None])[:, 0], atol)
        assert_near(confidence, (wide / 2).softmax(-1).gather(1, ids[:, None])[:, 0], atol)
    assert ids[3] == logits[3].argmax()
    for at, heat in enumerate((1.0, 0.7, 2.0)):
        probabilities, order = (logits[at].double() / heat).softmax(-1).sort(descending=True)
        ends = probabilities.cumsum(0)
        kept = ends[int((ends - probabilities < top_p[at].double()).sum()) - 1]
        place = int((order == ids[at]).nonzero())
        assert ends[place] - probabilities[place] - 1e-9 <= chance[at] * kept <= ends[place] + 1e-9
        assert probabilities[place] < 0.1  # so that another token could have been drawn


# --- hostile rows ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("temperature", [0.0, 0.8])
@pytest.mark.parametrize("bad", [[1.0, NAN, 2.0], [NAN] * 3, [-INF] * 3, [1.0, INF, 2.0], [INF, -INF, NAN]], ids=str)
def test_a_broken_row_fails_alone(bad, temperature):
    guard = {"guard_size": 2, "guard_window": 9, "temperature": temperature, "chance": 0.7}
    good = [row(logits, [0, 1, 0], **guard) for logits in ([1.0, 2.0, 0.0], [0.0, -INF, 1.0])]
    ids, logprobs, confidence = pick(good[0], row(bad, [0, 1, 0], **guard), good[1])
    assert ids[1] == -1
    assert logprobs[1].isnan()
    assert confidence[1].isnan()
    for got, expected in zip((ids, logprobs, confidence), pick(*good), strict=True):
        assert_equal(got[::2], expected)
    assert picked(row(bad, [0, 1, 0], **guard)) == [-1]


@pytest.mark.parametrize("temperature", [-1.0, -(2**-149), NAN, INF])
def test_a_temperature_that_cannot_be_fails_its_row(temperature):
    ids, logprobs, confidence = pick(row(FALLING, temperature=temperature), row(FALLING, temperature=1.0), heat=2.0)
    assert ids.tolist() == [-1, 0]
    assert logprobs.isnan().tolist() == confidence.isnan().tolist() == [True, False]


def test_a_row_that_belies_the_flags_fails_alone():
    rows = [row(FALLING, [0, 0], guard_size=2, guard_window=2), row(FALLING, temperature=1.0), row(FALLING)]
    told = dict(zip(ORDER, tensors(rows), strict=True))
    assert ops.pick_token(**told, most_guard=2, is_sampled=True)[0].tolist() == [1, 0, 0]
    assert ops.pick_token(**told, most_guard=1, is_sampled=True)[0].tolist() == [-1, 0, 0]
    assert ops.pick_token(**told, most_guard=0, is_sampled=True)[0].tolist() == [-1, 0, 0]
    assert ops.pick_token(**told, most_guard=2, is_sampled=False)[0].tolist() == [1, -1, 0]
    assert ops.pick_token(**told, most_guard=2**63 - 1, is_sampled=True)[0].tolist() == [1, 0, 0]


@pytest.mark.parametrize(("top_p", "chance"), [(NAN, NAN), (-1.0, -1.0), (1.5, 1.5), (1.0, 1.0), (INF, INF), (0.5, -INF)])
def test_numbers_out_of_range_still_draw_a_token(top_p, chance):
    assert picked(row([1.0, 2.0, -INF], temperature=1.0, top_p=top_p, chance=chance))[0] in (0, 1)


def test_padding_may_be_anything_below_0():
    rows = [row(FALLING, [0, 1, 0], [2], guard_size=2, guard_window=9), row(FALLING, [1] * 9, guard_size=4, guard_window=9)]
    hostile = [torch.where(t < 0, -(2**62), t) if t.dtype == torch.int64 else t for t in tensors(rows, extra=3)]
    for got, expected in zip(ops.pick_token(*hostile, **flags(rows)), pick(*rows), strict=True):
        assert_equal(got, expected)


def test_one_token_no_history_and_no_rows():
    ids, logprobs, confidence = pick(row([5.0], temperature=1.0, chance=ALMOST_ONE), row([NAN], temperature=1.0))
    assert ids.tolist() == [0, -1]
    assert logprobs[0] == 0
    assert confidence[0] == 1
    assert picked(row(FALLING, guard_size=3, guard_window=9)) == [0]  # L = 0, and a guard that has nothing to look at
    empty = [tensor[:0] for tensor in tensors([row(FALLING, [1, 1], [2])])]
    for most, is_sampled in ((0, False), (2, False), (2, True)):
        ids, *numbers = ops.pick_token(*empty, most_guard=most, is_sampled=is_sampled, confidence_temperature=0.5)
        assert_equal(ids, torch.empty(0, dtype=torch.int64))
        for tensor in numbers:
            assert_equal(tensor, torch.empty(0))


def many_rows(name, count=9, vocab=33):
    """Rows of all kinds: guards that ban, greedy and drawn."""
    rng = generator(name)
    return [
        row(
            (4 * torch.randn(vocab, generator=rng)).tolist(),
            torch.randint(0, 2, (at * 2,), generator=rng).tolist(),
            [1] * (at % 2),
            guard_size=at % 4,
            guard_window=3 * at,
            temperature=(0.0, 0.9)[at % 2],
            top_p=(1.0, 0.8)[at % 3 == 0],
            chance=torch.rand((), generator=rng).item(),
        )
        for at in range(count)
    ]


def test_strided_inputs_are_read_where_they_are_and_left_alone():
    plain = tensors(many_rows("strided"))
    plain[0][2, 3] = NAN
    before = [tensor.clone() for tensor in plain]
    expected = ops.pick_token(*plain, most_guard=3, is_sampled=True)
    for tensor, copy in zip(plain, before, strict=True):
        assert torch.equal(tensor.nan_to_num(7), copy.nan_to_num(7))
    turned = [tensor.T.contiguous().T if tensor.dim() == 2 else tensor for tensor in plain]
    for strided in ([every_other(tensor) for tensor in plain], turned):
        for got, want in zip(ops.pick_token(*strided, most_guard=3, is_sampled=True), expected, strict=True):
            assert_equal(got.nan_to_num(7), want.nan_to_num(7))


# --- the C++ --------------------------------------------------------------------------------------------------------------------

CHUNK = 4096  # logits, that it reads at a time


def wide_inputs(vocab, count):
    """Rows with ties, with what is broken, and with guards that ban the likeliest on both sides of every chunk's edge."""
    rng = generator(f"wide {vocab} {count}")
    logits = torch.randint(-20, 20, (count, vocab), generator=rng) / 4
    edges = torch.tensor([token for edge in range(0, vocab + 1, CHUNK) for token in (edge - 1, edge) if 0 <= token < vocab])
    logits[: count // 2, edges] = 7.0
    logits[count - 1, vocab // 2] = NAN
    logits[count - 2, vocab - 1] = INF
    logits[count - 3, :CHUNK] = -INF  # a whole chunk of nothing, or the whole row
    history = torch.full((count, 12), -1)
    for at in range(1, count):
        said = edges[torch.randperm(len(edges), generator=rng)[: at % 12]]
        history[at, 12 - len(said) :] = said
    size, window = torch.ones(count, dtype=torch.int64), torch.full((count,), 12)
    allowed = edges[torch.randint(0, len(edges), (count, 1), generator=rng)]
    heat = torch.tensor([0.0, 0.0, 1.3]).repeat(count)[:count]
    top_p = torch.full((count,), 0.9)
    return logits, history, size, window, allowed, heat, top_p, torch.rand(count, generator=rng, dtype=torch.float64)


def wide_pick(inputs, *, heat=2.0, is_sampled=True):
    return ops.pick_token(*inputs, most_guard=1, is_sampled=is_sampled, confidence_temperature=heat)


@pytest.mark.parametrize("heat", [0.5, 1.0, 2.0])
@pytest.mark.parametrize("vocab", [1, 31, 32, 33, CHUNK - 1, CHUNK, CHUNK + 1, 3 * CHUNK + 33])
def test_says_what_the_reference_says(implementation, vocab, heat):
    inputs = wide_inputs(vocab, 14)
    ids, *numbers = wide_pick(inputs, heat=heat)
    expected_ids, *expected = reference.pick_token(*inputs, 1, True, heat)
    assert_equal(ids, expected_ids)
    assert (ids[-2:] == -1).all()
    wide, places = inputs[0].double(), ids.clamp(min=0)[:, None]
    exact = (wide.log_softmax(-1).gather(1, places)[:, 0], (wide / heat).softmax(-1).gather(1, places)[:, 0])
    for got, same, right in zip(numbers, expected, exact, strict=True):
        assert_near(got, same, 1e-5)
        assert_near(got, right.masked_fill(ids < 0, NAN), error_allowed(implementation))


@pytest.mark.usefixtures("many")
@pytest.mark.parametrize(("vocab", "count"), [(129280, 3), (3 * CHUNK + 33, 14), (33, 3000)])
def test_neither_other_rows_nor_threads_change_a_bit(vocab, count):
    inputs = wide_inputs(vocab, count)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        expected = [tensor.nan_to_num(7) for tensor in wide_pick(inputs)]
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            for got, want in zip(wide_pick(inputs), expected, strict=True):
                assert_equal(got.nan_to_num(7), want)
            for at in range(0, count, 1 + count // 20):
                one = wide_pick([column[at : at + 1] for column in inputs])
                assert_equal(
                    torch.stack([got[0].nan_to_num(7).double() for got in one]), torch.stack([t[at].double() for t in expected])
                )
    finally:
        torch.set_num_threads(before)


def test_whether_another_row_draws_changes_no_bit():
    inputs = list(wide_inputs(CHUNK + 1, 6))
    inputs[5] = torch.zeros(6)
    greedy = wide_pick(inputs, is_sampled=False)
    inputs[5] = torch.tensor([0.0, 0.9] * 3)
    for got, want in zip(wide_pick(inputs), greedy, strict=True):
        assert_equal(got[::2].nan_to_num(7), want[::2].nan_to_num(7))


def native_arguments(count=4, vocab=33):
    logits, *guard, heat, _, _ = wide_inputs(vocab, count)
    names = ("logits", "history", "guard_size", "guard_window", "allowed", "temperature")
    arrays = {name: tensor.numpy() for name, tensor in zip(names, (logits.nan_to_num(0, 0, 0), *guard, heat), strict=True)}
    numbers = {"most_guard": 1, "is_sampled": True, "confidence_temperature": 2.0, "num_threads": 2}
    out = {"ids": torch.zeros(count, dtype=torch.int64), "logprobs": torch.empty(count), "confidence": torch.empty(count)}
    return arrays | numbers | {name: tensor.numpy() for name, tensor in out.items()}


def test_writes_its_outputs_and_nothing_else():
    asked = native_arguments()
    place = torch.device("cpu")
    with guarded((4,), torch.float32, place) as logprobs, guarded((4,), torch.float32, place) as confidence:
        native("_cpu").require().pick_token(**asked | {"logprobs": logprobs.numpy(), "confidence": confidence.numpy()})


@pytest.mark.parametrize("token", [-1, 33, 2**62, -(2**63)])
def test_a_drawn_token_that_no_logit_is_for_fails_its_row(token):
    asked = native_arguments()
    asked["ids"][:] = token
    native("_cpu").require().pick_token(**asked)
    assert (asked["ids"] == -1).tolist() == [False, False, True, False]


@pytest.mark.parametrize("name", ["history", "guard_size", "allowed", "temperature", "ids", "logprobs", "confidence"])
def test_the_native_code_refuses_wrong_sizes(name):
    asked = native_arguments()
    with pytest.raises(ValueError, match=f"{name} must have"):
        native("_cpu").require().pick_token(**asked | {name: asked[name][:-1]})


# --- the operator ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("is_sampled", [False, True])
@pytest.mark.parametrize("length", [0, 7])
def test_nothing_waits_for_the_device(length, is_sampled):
    """On the meta device there are no values: whoever asks for one, as .item() or nonzero() do, raises."""
    inputs = tensors(many_rows("meta"))
    inputs[1] = inputs[1][:, :length]
    got = reference.pick_token(*(tensor.to("meta") for tensor in inputs), 3, is_sampled, 0.5)
    assert [(tensor.shape, tensor.dtype) for tensor in got] == [
        ((9,), dtype) for dtype in (torch.int64, torch.float32, torch.float32)
    ]


def test_what_the_flags_rule_out_is_not_done(implementation, monkeypatch):
    """Without guards no history is looked at, and without temperatures nothing is sorted."""
    rows = [row(FALLING, [1, 1]), row(FALLING)]
    for name in ("ends_of_repeats", "_give_back", "draw_token"):
        monkeypatch.setattr(reference, name, None)
    assert picked(*rows) == [0, 0]
    assert picked(row(FALLING, guard_size=2), most_guard=2) == [0]
    with pytest.raises(TypeError):
        pick(row(FALLING, temperature=1.0))
    if implementation == "reference":  # the C++ has its own guard
        with pytest.raises(TypeError):
            pick(*rows, most_guard=1)


WRONG = [
    ("logits", torch.ones(2, 4).double(), "logits must be torch.float32, got torch.float64"),
    ("logits", torch.ones(4), r"logits must be \[N, V\], V at least 1, got \[4\]"),
    ("logits", torch.ones(2, 0), r"logits must be \[N, V\], V at least 1, got \[2, 0\]"),
    ("history", torch.ones(2, 3), "history must be torch.int64, got torch.float32"),
    ("history", torch.ones(3, 3, dtype=torch.int64), r"history must be \[2, L\], got \[3, 3\]"),
    ("history", torch.ones(2, 3, dtype=torch.int64, device="meta"), "history must be on cpu, got meta"),
    ("guard_size", torch.ones(2, dtype=torch.int32), "guard_size must be torch.int64, got torch.int32"),
    ("guard_window", torch.ones(3, dtype=torch.int64), r"guard_window must be \[2\], got \[3\]"),
    ("allowed", torch.ones(2, dtype=torch.int64), r"allowed must be \[2, A\], got \[2\]"),
    ("temperature", torch.ones(2).double(), "temperature must be torch.float32, got torch.float64"),
    ("temperature", torch.ones(2, device="meta"), "temperature must be on cpu, got meta"),
    ("top_p", torch.ones(2, 1), r"top_p must be \[2\], got \[2, 1\]"),
    ("chance", torch.ones(2), "chance must be torch.float64, got torch.float32"),
    ("most_guard", -1, "most_guard must not be negative, got -1"),
    *(
        ("confidence_temperature", heat, f"confidence_temperature must be finite and above 0 in fp32, got {re.escape(str(heat))}")
        for heat in (0.0, -1.0, NAN, INF, -INF, 1e-50, 1e39)
    ),
]


@pytest.mark.parametrize(("name", "value", "words"), WRONG, ids=[words for _, _, words in WRONG])
def test_refuses_wrong_arguments(name, value, words):
    right = dict(zip(ORDER, tensors([row(FALLING, [1]), row(FALLING)]), strict=True)) | {"most_guard": 0, "is_sampled": False}
    ops.pick_token(**right)
    with pytest.raises(InputError, match=f"^pick_token: {words}"):
        ops.pick_token(**right | {name: value})


@pytest.mark.parametrize("rows", [[row(FALLING)] * 3, many_rows("opcheck", count=5)], ids=["greedy", "mixed"])
def test_opcheck(rows):
    inputs = (*tensors(rows), *flags(rows).values())
    torch.library.opcheck(torch.ops.optmem.pick_token, inputs)
    torch.library.opcheck(torch.ops.optmem.pick_token, (*inputs, 0.5))


@pytest.mark.parametrize("is_sampled", [False, True])
def test_compiles_in_one_piece(is_sampled):
    inputs = tensors(many_rows("compile", count=5))
    inputs[0][2, 3] = NAN
    compiled = torch.compile(ops.pick_token, fullgraph=True, backend="aot_eager")
    got = compiled(*inputs, most_guard=3, is_sampled=is_sampled)
    for ours, expected in zip(got, ops.pick_token(*inputs, most_guard=3, is_sampled=is_sampled), strict=True):
        assert_equal(ours.nan_to_num(7), expected.nan_to_num(7))


def test_says_who_serves_it():
    rows = {row.device: row.name for row in ops.implementations() if row.operator == "pick_token"}
    assert rows == {"cpu": "cpp", "cuda": "triton"}
