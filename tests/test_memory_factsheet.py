"""Facts: what optics reads badly is found, ranked and kept within its budget, in linear time on any text."""

import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from optmem import paginate
from optmem.errors import InputError
from optmem.memory.factsheet import FACTS, Fact, factsheet, find_facts
from optmem.text.count import estimate_tokens


def found(text):
    return [(fact.kind, fact.text) for fact in find_facts(text.splitlines(keepends=True))]


@pytest.mark.parametrize(
    ("text", "facts"),
    [
        ("commit 9f86d081884c7d65 is bad", [("hash", "9f86d081884c7d65")]),
        ("at 0xdeadbeef.", [("hash", "0xdeadbeef")]),
        ("id 550e8400-e29b-41d4-a716-446655440000!", [("uuid", "550e8400-e29b-41d4-a716-446655440000")]),
        ("key sk-proj-A81bcX92Qz77", [("key", "sk-proj-A81bcX92Qz77")]),
        ("ping 192.168.0.1:8080 or 00:1B:44:11:3A:B7", [("address", "192.168.0.1:8080"), ("address", "00:1B:44:11:3A:B7")]),
        ("write to ada.l+x@mail.example.org, soon", [("email", "ada.l+x@mail.example.org")]),
        ("see https://x.org/a?b=1#c.", [("url", "https://x.org/a?b=1#c")]),
        ("took 12.5 ms, 40 % of 3 GiB", [("number", "12.5 ms"), ("number", "40 %"), ("number", "3 GiB")]),
        ("with 16384 rows", [("number", "16384 rows")]),
        ("v1.2.3-rc1 and 3.11.4", [("version", "v1.2.3-rc1"), ("version", "3.11.4")]),
        ("/var/log/dome/a.csv and src/main.py and ~/x, C:\\Temp\\b.txt", [
            ("path", "/var/log/dome/a.csv"), ("path", "src/main.py"), ("path", "~/x"), ("path", "C:\\Temp\\b.txt")]),
        ("on 2026-11-19T22:04:10Z, 21 November 2026, 22:15", [
            ("date", "2026-11-19T22:04:10Z"), ("date", "21 November 2026"), ("date", "22:15")]),
        ("call `is_outlier` with \"limit\"", [("quoted", "is_outlier"), ("quoted", "limit")]),
        ("see `/etc/hosts` and `9f86d081884c7d65`", [("path", "/etc/hosts"), ("hash", "9f86d081884c7d65")]),
        ("he said it and/or she did, 3 times, deadbeef effaced the facade", []),
        ("don't and won't quote", []),
        ("", []),
    ],
)  # fmt: skip
def test_kinds(text, facts):
    assert found(text) == facts


def test_a_fact_stands_once_with_its_first_row():
    rows = ["nothing\n", "a 9f86d081884c7d65\n", "b 9f86d081884c7d65\n"]
    assert find_facts(rows) == [Fact("9f86d081884c7d65", "hash", 1)]


def test_a_fact_broken_over_two_rows_is_whole():
    digest = "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"
    (page,) = paginate("x" * 50 + " " + digest)
    assert len(page.lines) == 2
    assert [(fact.text, fact.row) for fact in find_facts([line.text for line in page.lines])] == [(digest, 0)]


def test_what_is_worst_to_read_comes_first_and_is_shown_in_order():
    text = "on 2026-11-19 we saw `name`\n9f86d081884c7d65 took 12.5 ms\n"
    whole = factsheet(text, 1000)
    assert whole.text() == "1: 2026-11-19  name\n2: 9f86d081884c7d65  12.5 ms\n"
    assert whole.tokens == estimate_tokens(whole.text())
    assert whole.left_out == 0
    small = factsheet(text, estimate_tokens("2: 9f86d081884c7d65\n"))
    assert [fact.kind for fact in small.facts] == ["hash"]
    assert small.left_out == 3
    assert factsheet(text, 0).facts == ()
    assert factsheet(text, 0).text() == ""


def test_share_of_the_page():
    assert factsheet("9f86d081884c7d65", 100).share == 1.0
    assert factsheet("9f86d081884c7d65" + " word" * 16, 100).share == pytest.approx(1 / 6)
    assert factsheet("", 100).share == 0.0


@pytest.mark.parametrize("budget", [-1, 1.5, True, "64", None])
def test_budget_is_checked(budget):
    with pytest.raises(InputError, match="at least 0"):
        factsheet("x", budget)


alphabet = st.sampled_from([*"0123456789abcdefxyzABC-_./:@\\ \n\"'`%€é漢", "http://", "ms", "v1.", "2026-"])


@given(st.lists(alphabet, max_size=200).map("".join), st.integers(0, 60))
def test_facts_stand_on_the_page_and_fit(text, budget):
    sheet = factsheet(text, budget)
    rows = text.splitlines(keepends=True)
    assert sheet.tokens <= budget
    assert sheet.tokens == (estimate_tokens(sheet.text()) if sheet.facts else 0)
    for fact in sheet.facts:
        assert fact.kind in FACTS
        assert fact.text[:1] in rows[fact.row]
        assert fact.text in text
    assert len({fact.text for fact in sheet.facts}) == len(sheet.facts)
    assert factsheet(rows, budget) == sheet


@pytest.mark.parametrize(
    "unit",
    ["a", "1", "-", ".", "/", "a/", "1.", "1,", "a-", "a@", "a@a.", ":", "1:", "\\", "C:\\", "'", "`", "'a", "http://", "ab12-",
     "é", "0", " 1", "1e", "v1.",
     "/a", "~/", "aaaaaaaaaaaaaaa1 ", "f" * 127 + "g", "2026-11-", "1 M", "Jan", "1 Jan ", "::", "+", "x@x@"],
)  # fmt: skip
def test_linear_time_on_hostile_text(unit):
    def seconds(length):
        text = (unit * length)[:length]
        start = time.process_time()
        factsheet(text, 64)
        return time.process_time() - start

    seconds(1000)
    assert seconds(100_000) < 3.0  # quadratic time would be minutes
