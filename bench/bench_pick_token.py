"""pick_token against its reference in torch and what public scripts do: the guard as a Python loop over every sequence, then torch.

    pytest bench/bench_pick_token.py --benchmark-enable --benchmark-group-by=group

Greedy, as the family reads, drawn, and with a confidence that has a temperature of its own.  Half of the histories loop, so that
the guard has work.  Without a GPU the widest batch has fewer rows: a pass over 1,024 rows of logits moves half a gigabyte.

On a busy machine: OMP_NUM_THREADS=1 and --benchmark-timer=time.thread_time, which counts what this thread does and nothing else.
"""

import pytest
import torch

from optmem import ops, reference
from optmem.testing import assert_equal, generator

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
VOCAB = 129280
WIDEST = 1024 if DEVICE.type == "cuda" else 256
ALLOWED = (128821, 128822)
SIDES = ("optmem", "reference", "loop")  # optmem is C++ on a CPU, where it is built
GUARDS = {"no guard": (0, 0), "guard 20/50": (20, 50), "guard 35/1024": (35, 1024)}


def make_inputs(rows, guard, temperature):
    """The operator's tensors, and the histories as the lists that a script would hold."""
    size, window = GUARDS[guard]
    length = window or 50
    rng = generator(f"bench pick_token {rows} {guard}")
    logits = 4 * torch.randn(rows, VOCAB, generator=rng)
    history = torch.randint(0, VOCAB, (rows, length), generator=rng)
    history[::2] = history[::2, :7].repeat(1, length // 7 + 1)[:, :length]  # a loop of seven tokens,
    logits[::2].scatter_(1, history[::2, length % 7, None], 40.0)  # which would go on
    whole = [torch.full((rows,), value) for value in (size, window)]
    allowed = torch.tensor([ALLOWED]).expand(rows, -1).contiguous()
    parts = [torch.full((rows,), value) for value in (temperature, 0.9)]
    chance = torch.rand(rows, generator=rng, dtype=torch.float64)
    return [tensor.to(DEVICE) for tensor in (logits, history, *whole, allowed, *parts, chance)], history.tolist()


def by_loop(logits, said, size, window):
    """The published processors: Python slices of every sequence's own list, and one write to its logits."""
    scores = logits.clone()
    for row, ids in enumerate(said):
        if size and len(ids) >= size:
            prefix = ids[len(ids) - size + 1 :]
            starts = range(max(0, len(ids) - window), len(ids) - size + 1)
            banned = {ids[start + size - 1] for start in starts if ids[start : start + size - 1] == prefix}
            banned.difference_update(ALLOWED)
            if banned:
                scores[row, list(banned)] = -torch.inf
    return scores


def likelihoods(logits, ids, confidence):
    """Of the ids [N]: log-probabilities, and probabilities at the temperature of confidence."""
    plain = logits.log_softmax(-1).gather(1, ids[:, None])[:, 0]
    return plain, plain.exp() if confidence == 1 else (logits / confidence).softmax(-1).gather(1, ids[:, None])[:, 0]


def likeliest(logits, said, size, window, confidence, *_):
    ids = by_loop(logits, said, size, window).argmax(-1)
    return ids, *likelihoods(logits, ids, confidence)


def drawn(logits, said, size, window, confidence, temperature, top_p, chance):
    """The usual nucleus: sort, softmax and running sums in fp32."""
    scores, order = by_loop(logits, said, size, window).sort(descending=True)
    probabilities = (scores / temperature[:, None]).softmax(-1)
    before = probabilities.cumsum(-1) - probabilities
    kept = probabilities.masked_fill(before >= top_p[:, None], 0)
    ends = kept.cumsum(-1)
    place = (ends <= chance.float()[:, None] * ends[:, -1:]).sum(-1, keepdim=True).clamp(max=VOCAB - 1)
    ids = order.gather(1, place)[:, 0]
    return ids, *likelihoods(logits, ids, confidence)


def make_run(side, rows, guard, temperature, confidence):
    inputs, said = make_inputs(rows, guard, temperature)
    if side != "loop":
        operator = ops.pick_token if side == "optmem" else reference.pick_token
        flags = {"most_guard": GUARDS[guard][0], "is_sampled": temperature > 0, "confidence_temperature": confidence}
        return lambda: operator(*inputs, **flags)
    logits, *_, heat, top_p, chance = inputs
    peer = drawn if temperature else likeliest
    return lambda: peer(logits, said, *GUARDS[guard], confidence, heat, top_p, chance)


def check(rows, guard, temperature, confidence):
    """All sides, before the clock starts; greedy they are equal, drawn the loop's sum in fp32 may fall on an edge's other side."""
    (ids, *ours), (same_ids, *same), (their_ids, *theirs) = (
        make_run(side, rows, guard, temperature, confidence)() for side in SIDES
    )
    assert_equal(ids, same_ids)
    assert (ids == their_ids).float().mean() >= (0.9 if temperature else 1.0)
    agree = ids == their_ids
    for our, own, their in zip(ours, same, theirs, strict=True):
        assert torch.allclose(our, own, rtol=1e-6, atol=1e-5)
        assert torch.allclose(our[agree], their[agree], rtol=1e-6, atol=1e-5)
    logprobs = ours[0]
    loops = logprobs[::2] > -1e-3  # a looping row's next token is all but certain, where nothing bans it
    assert loops.all() if guard == "no guard" else not loops.any()


def timed(benchmark, side, rows, guard, temperature, confidence=1.0):
    check(2 if benchmark.disabled else min(rows, 16), guard, temperature, confidence)
    run = make_run(side, 2 if benchmark.disabled else rows, guard, temperature, confidence)
    benchmark.group = f"{'drawn' if temperature else 'greedy'}, {rows} rows of {VOCAB:,}, {guard}, confidence at {confidence:g}"
    benchmark.extra_info.update(bytes=rows * VOCAB * 4, device=str(DEVICE))
    benchmark.pedantic(synchronised, args=(run,), rounds=5 if rows > 64 else 10, warmup_rounds=1)


def synchronised(run):
    run()
    if DEVICE.type == "cuda":
        torch.cuda.synchronize()


@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("guard", GUARDS)
@pytest.mark.parametrize("rows", [1, 64, WIDEST])
def bench_greedy(benchmark, rows, guard, side):
    timed(benchmark, side, rows, guard, 0.0)


@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("rows", [1, 16])
def bench_drawn(benchmark, rows, side):
    timed(benchmark, side, rows, "guard 20/50", 0.8)


@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("rows", [1, 64])
def bench_confidence(benchmark, rows, side):
    timed(benchmark, side, rows, "no guard", 0.0, confidence=1.5)
