"""Going through many things."""

from optmem.items import in_parts, watched


def test_parts_are_whole_but_for_the_last():
    assert list(in_parts(range(7), 3)) == [[0, 1, 2], [3, 4, 5], [6]]
    assert list(in_parts([], 3)) == []


def test_nobody_watches_here(capfd):
    assert list(watched(range(3), "counting")) == [0, 1, 2]
    assert capfd.readouterr() == ("", "")
