"""Going through many things: order, what is held, and that the first result waits for no second item."""

import gc
import threading
import weakref

import pytest

from optmem.items import in_parts, mapped


@pytest.mark.parametrize("ahead", [0, 1, 7, 100])
def test_results_come_in_the_order_of_their_items(ahead):
    assert list(mapped(lambda n: n * n, range(50), ahead=ahead)) == [n * n for n in range(50)]
    assert list(mapped(str, [], ahead=ahead)) == []


def test_no_more_items_are_taken_than_were_given_before_and_never_more_than_asked_for():
    taken = []

    def items():
        for at in range(40):
            taken.append(at)
            yield at

    for given, _ in enumerate(mapped(str, items(), ahead=5)):
        assert len(taken) - given <= 1 + min(given, 5)


def test_what_an_item_raises_comes_at_its_place():
    found = []
    with pytest.raises(ZeroDivisionError):
        found.extend(mapped(lambda n: 1 // n, [1, 1, 0, 1], ahead=4))
    assert found == [1, 1]


def test_closing_starts_nothing_more():
    begun, go = [], threading.Event()

    def act(at):
        begun.append(at)
        if at > 0:
            go.wait(10)
        return at

    results = mapped(act, range(100), ahead=50)
    assert [next(results), next(results) if go.set() is None else None] == [0, 1]
    results.close()
    assert len(begun) <= 4


def test_items_are_not_held_once_they_are_given():
    class Thing:
        pass

    alive = []

    def things():
        for _ in range(5):
            thing = Thing()
            alive.append(weakref.ref(thing))
            yield thing
            del thing

    for given, _ in enumerate(mapped(id, things(), ahead=0)):
        gc.collect()
        assert sum(ref() is not None for ref in alive) <= 1, given


def test_parts_are_whole_but_for_the_last():
    assert list(in_parts(range(7), 3)) == [[0, 1, 2], [3, 4, 5], [6]]
    assert list(in_parts([], 3)) == []
