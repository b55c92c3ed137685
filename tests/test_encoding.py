"""The encode queue: who asks at the same time is served together, and alone where that fails."""

import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from optmem.engine.encoding import PICTURES_AT_ONCE, EncodeQueue
from optmem.engine.lanes import PlainLane
from optmem.engine.view_encoder import ViewEncoder
from optmem.model.model import Model
from optmem.pixels import make_views
from optmem.testing import generator

SIDE = 128


@pytest.fixture(scope="module", params=["plain", "recorded"])
def model(request):
    """Who encodes: a model, or its encoder with recorded passes."""
    made = Model.random("nano")
    return made if request.param == "plain" else ViewEncoder(made.encoder, PlainLane())


def views(number):
    pixels = torch.randint(0, 256, (SIDE, SIDE), generator=generator(f"picture {number}"), dtype=torch.uint8)
    return make_views(pixels.numpy(), f"square {SIDE}")


class Gate:
    """An encoder that remembers its passes, and whose first one waits to be let through."""

    def __init__(self, encode):
        self.encode, self.passes, self.open, self.entered = encode, [], threading.Event(), threading.Event()

    def __call__(self, pictures):
        self.passes.append(len(pictures))
        self.entered.set()
        assert self.open.wait(30)
        return self.encode(pictures)


def all_waiting(queue, count):
    while len(queue._waiting) < count:
        threading.Event().wait(0.001)


def test_who_waits_goes_together(model):
    gate = Gate(model.encode)
    queue = EncodeQueue(gate)
    with ThreadPoolExecutor(8) as pool:
        first = pool.submit(queue.encode, [views(0)])
        assert gate.entered.wait(30)
        others = [pool.submit(queue.encode, [views(number), views(number + 10)]) for number in range(1, 6)]
        all_waiting(queue, 5)
        gate.open.set()
        found = [first.result(30), *(other.result(30) for other in others)]
    assert gate.passes == [1, 10]
    wanted = [[0], *([number, number + 10] for number in range(1, 6))]
    for features, numbers in zip(found, wanted, strict=True):
        for mine, number in zip(features, numbers, strict=True):
            torch.testing.assert_close(mine, model.encode([views(number)])[0], atol=1e-5, rtol=1e-4)


def test_no_more_go_together_than_are_allowed():
    gate = Gate(lambda pictures: [torch.empty(0)] * len(pictures))
    queue = EncodeQueue(gate)
    some = [views(0)] * (PICTURES_AT_ONCE // 2)
    with ThreadPoolExecutor(8) as pool:
        calls = [pool.submit(queue.encode, some[:1])]
        assert gate.entered.wait(30)
        calls += [pool.submit(queue.encode, some) for _ in range(3)]
        calls.append(pool.submit(queue.encode, some * 3))  # alone it may be as many as it likes
        all_waiting(queue, 4)
        gate.open.set()
        counts = [len(call.result(30)) for call in calls]
    assert counts == [1, *[len(some)] * 3, 3 * len(some)]
    assert sum(gate.passes) == sum(counts)
    assert max(gate.passes) == 3 * len(some)
    assert PICTURES_AT_ONCE in gate.passes or gate.passes.count(len(some)) == 3  # by which of them came when


def test_a_call_that_fails_fails_alone(model):
    def encode(pictures):
        if any(picture.global_view[0, 0, 0] == 7 for picture in pictures):
            raise RuntimeError("a picture that cannot be encoded")
        return model.encode(pictures)

    gate = Gate(encode)
    queue, bad = EncodeQueue(gate), views(3)
    bad.global_view[0, 0] = 7
    with ThreadPoolExecutor(4) as pool:
        calls = [pool.submit(queue.encode, [views(0)])]
        assert gate.entered.wait(30)
        calls += [pool.submit(queue.encode, [each]) for each in (views(1), bad, views(2))]
        all_waiting(queue, 3)
        gate.open.set()
        assert [len(calls[k].result(30)) for k in (0, 1, 3)] == [1, 1, 1]
        with pytest.raises(RuntimeError, match="cannot be encoded"):
            calls[2].result(30)
    assert len(queue.encode([views(5)])) == 1


def test_who_is_interrupted_leaves_the_others_work_to_them(model):
    """Of two calls that go together one serves both, and is interrupted: the other is served nevertheless."""

    def encode(pictures):
        if len(pictures) == 2 and len(gate.passes) == 2:
            raise KeyboardInterrupt
        return model.encode(pictures)

    gate = Gate(encode)
    queue = EncodeQueue(gate)

    def outcome(number):
        try:
            return len(queue.encode([views(number)]))
        except KeyboardInterrupt:
            return "interrupted"

    with ThreadPoolExecutor(4) as pool:
        calls = [pool.submit(outcome, 0)]
        assert gate.entered.wait(30)
        calls += [pool.submit(outcome, number) for number in (1, 2)]
        all_waiting(queue, 2)
        gate.open.set()
        assert sorted(str(call.result(30)) for call in calls) == ["1", "1", "interrupted"]
    assert gate.passes == [1, 2, 1]
    assert len(queue.encode([views(3)])) == 1


def test_who_is_interrupted_while_waiting_is_forgotten(model, monkeypatch):
    queue = EncodeQueue(model.encode)

    def interrupted(_asked):
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(queue, "_wait_or_serve", interrupted)
        with pytest.raises(KeyboardInterrupt):
            queue.encode([views(1)])
    assert not queue._waiting
    assert len(queue.encode([views(2)])) == 1
