"""How well lines fit a question: the rare words count, joining words do not, and every language has words."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from optmem.memory.fit import FEW, fit, note, plain, stands_in, worths


@pytest.mark.parametrize(
    ("word", "line", "stands"),
    [
        ("Key", "the KEY of it", True),
        ("key", "a monkey", False),
        ("/srv/app.cfg", "in /srv/app.cfg.", True),
        ("app.cfg", "in /srv/app-cfg", True),
        ("host-3", "host 3 is", True),
        ("host-3", "host 33 is", False),
        ("漢字", "これは漢字です", True),
        ("字漢", "これは漢字です", False),
        ("?", "what?", False),
    ],
)
def test_words_stand_whole(word, line, stands):
    assert stands_in(plain(word), plain(line)) == stands


def test_rare_words_count_most():
    worth = worths({"what": 0, "is": 50, "the": 90, "key": 60, "zebra": 0}, 100)
    assert set(worth) == {"key", "zebra"}, "joining words name nothing"
    assert worth["zebra"] > worth["key"]
    assert fit(worth, ["key", "the"]) < FEW < fit(worth, ["zebra"]) < fit(worth, ["zebra", "key"]) == 1.0
    assert note(worth, ["key"]) == "few of the words asked for stand here: not zebra"
    assert note(worth, ["zebra"]) == ""
    assert set(worths({"what": 3, "is": 5}, 10)) == {"what", "is"}, "where there are no others they count"


@given(st.dictionaries(st.text(min_size=1), st.integers(0, 1000)), st.integers(0, 10**6))
def test_any_words_have_a_fit(often, lines):
    worth = worths(often, lines)
    assert 0 <= fit(worth, []) <= fit(worth, list(often)) <= 1 + 1e-9
    assert plain(plain("".join(often))) == plain("".join(often))
