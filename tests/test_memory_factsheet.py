"""Facts: what optics reads badly is found, ranked and kept within its budget, in linear time on any text."""

import re
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
        ("ticket KX-000003, JIRA-4711 and INV_2024_17", [("key", "KX-000003"), ("key", "JIRA-4711"), ("key", "INV_2024_17")]),
        ("part PQ12345 of foo-1.2.3", [("key", "PQ12345"), ("key", "foo-1.2.3")]),
        ("order-1234567 and x-9f86d081884c7d65", [("key", "order-1234567"), ("key", "x-9f86d081884c7d65")]),
        ("utf-8, covid-19, sha256, int32, x86, 12-bit, top-10, 2nd, 10000x and a 3D-print", []),
        ("it took 500ms, -40 °C, 10000-20000 rows, in 2024-2025", [
            ("number", "500ms"), ("number", "-40 °C"), ("number", "10000-20000 rows"), ("number", "2024-2025")]),
        ("", []),
    ],
)  # fmt: skip
def test_kinds(text, facts):
    assert found(text) == facts


def test_rows_of_sizes_come_last():
    sizes = [f"{n}000 {n}500 {n}700 {n}900\n" for n in range(3, 9)]
    rows = ["1024 2048 4096 8192 16384\n", *sizes, "it holds 31415 tokens\n"]
    assert [fact.text for fact in factsheet(rows, 12).facts] == ["31415 tokens"]
    assert len(factsheet(rows, 64).facts) > 5, "where there is place they are facts too"


@given(st.text(st.sampled_from("KX09-_.,:/ \nxyz"), max_size=80))
def test_no_fact_is_cut_out_of_a_name(text):
    for fact in find_facts(text.splitlines(keepends=True)):
        if fact.kind in ("key", "number", "hash"):
            whole = re.escape(fact.text)
            assert re.search(rf"(?<![A-Za-z0-9]){whole}(?![A-Za-z0-9])", text), (fact, text)


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
