"""Going through many things."""

from optmem.items import in_parts, one_ahead, watched


def test_parts_are_whole_but_for_the_last():
    assert list(in_parts(range(7), 3)) == [[0, 1, 2], [3, 4, 5], [6]]
    assert list(in_parts([], 3)) == []


def test_nobody_watches_here(capfd):
    assert list(watched(range(3), "counting")) == [0, 1, 2]
    assert capfd.readouterr() == ("", "")


def test_one_ahead_gives_the_first_at_once_and_others_when_the_next_is_there():
    made = []

    def numbers(count):
        for number in range(count):
            made.append(number)
            yield number

    assert [list(one_ahead(numbers(count))) for count in range(5)] == [list(range(count)) for count in range(5)]
    made.clear()
    seen = [(number, len(made)) for number in one_ahead(numbers(4))]
    assert seen == [(0, 1), (1, 3), (2, 4), (3, 4)]
