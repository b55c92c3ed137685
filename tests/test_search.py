"""Search in vision tokens with the shipped model: what is there is found, and where; what is not is not."""

import pytest

from optmem import Engine, paginate
from optmem.errors import InputError

LINES = [
    "the quick brown fox jumps over the lazy dog",
    "ERROR 7f3a9c2e: connection to 10.0.0.12:5432 refused",
    "    return self.tokens[first:last]",
    "commit 4be1c09d by Ann, who was in Zurich",
]


@pytest.fixture(scope="module")
def engine():
    made = Engine.from_pretrained("nano", device="cpu")
    yield made
    made.close()


@pytest.fixture(scope="module")
def tokens(engine):
    texts = ["\n".join(LINES[first:] + LINES[:first]) + "\n" for first in range(4)]
    return engine.encode([page for text in texts for page in paginate(text)])


@pytest.mark.parametrize(
    ("words", "line"), [("brown fox", 0), ("7f3a9c2e", 1), ("self.tokens[", 2), ("4be1c09d", 3), ("lazy dog", 0)]
)
def test_words_are_found_where_they_stand(engine, tokens, words, line):
    found = engine.search(tokens, words)
    assert sorted((each.page, each.row, each.column) for each in found) == sorted(
        (page, (line - page) % 4, LINES[line].index(words)) for page in range(4)
    )
    assert [each.confidence for each in found] == sorted((each.confidence for each in found), reverse=True)
    assert all(each.confidence > 0.9 for each in found)


def test_what_is_not_there_is_not_found(engine, tokens):
    assert engine.search(tokens, "7f3a9c2f") == [] or engine.search(tokens, "7f3a9c2f")[0].confidence < 0.8
    assert engine.search(tokens, "elephant") == []
    assert engine.search([], "dog") == []


def test_case_and_limits(engine, tokens):
    assert engine.search(tokens, "error 7F3A9C2E") == []
    assert len(engine.search(tokens, "error 7F3A", ignore_case=True)) == 4
    assert len(engine.search(tokens, "the", limit=3)) == 3
    assert engine.search(tokens, "the", limit=0) == []


def test_words_across_a_full_row_are_found(engine):
    (page,) = paginate("x" * 60 + "needle in the hay\n")
    (found,) = engine.search(engine.encode(page), "needle in", limit=1)
    assert (found.row, found.column) == (0, 60)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"words": " "}, "must be a str that is not blank"),
        ({"words": 5}, "must be a str that is not blank, got 5"),
        ({"words": "two\nlines"}, "must stand on one line"),
        ({"words": "a", "least": 0}, "least must be above 0 and at most 1, got 0"),
        ({"words": "a", "limit": -1}, "limit must be a whole number of at least 0"),
    ],
)
def test_refuses(engine, tokens, arguments, message):
    with pytest.raises(InputError, match=message):
        engine.search(tokens, **arguments)
