"""The measure itself: distances, what counts as whole, intervals, calibration, charts."""

import xml.etree.ElementTree as ET

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from optmem.pages import symbols
from optmem.train.calibration import calibrate, calibration_error, confidence_at, fit_temperature, reliability, silent_errors
from optmem.train.charts import HEIGHT, Axis, line_chart, nice_ticks
from optmem.train.distance import distance, keep
from optmem.train.scores import Hits, digit_runs, identifiers, interval, likeness, score_rows

SHORT = st.text("abc\n", max_size=14)


def naive(a, b):
    """The table, row by row."""
    row = list(range(len(b) + 1))
    for i, x in enumerate(a, 1):
        above, row = row, [i]
        for j, y in enumerate(b, 1):
            row.append(min(above[j] + 1, row[-1] + 1, above[j - 1] + (x != y)))
    return row[-1]


# --- distances


@given(SHORT, SHORT)
def test_the_distance_is_that_of_the_table(a, b):
    assert distance(a, b) == naive(a, b) == distance(list(a), list(b))


@given(st.text(max_size=200), st.integers(0, 200), st.text(max_size=3))
def test_long_texts_with_a_change(text, at, change):
    changed = text[:at] + change + text[at + 1 :]
    assert distance(text, changed) == naive(text, changed)


@given(SHORT, SHORT)
def test_what_is_kept_is_a_best_alignment(a, b):
    kept = [(i, j) for i, j in enumerate(keep(a, b)) if j >= 0]
    assert all(a[i] == b[j] for i, j in kept)
    cost, last = 0, (-1, -1)
    for here in [*kept, (len(a), len(b))]:  # between two kept characters all others are replaced, lost or added
        assert here[0] > last[0]
        assert here[1] > last[1]
        cost += max(here[0] - last[0], here[1] - last[1]) - 1
        last = here
    assert cost == distance(a, b)


def test_likeness_is_by_the_longer_text():
    assert likeness("", "") == 1
    assert likeness("abcd", "") == 0
    assert likeness("abcd", "abXd") == 0.75
    assert likeness("ab", "abcd") == 0.5


def test_pages_are_compared_at_once():
    a, b = np.random.default_rng(0).integers(97, 105, (2, 4096))
    steps = np.arange(4097)
    table = steps
    for char in a:
        row = np.concatenate([table[:1] + 1, np.minimum(table[:-1] + (b != char), table[1:] + 1)])
        table = np.minimum.accumulate(row - steps) + steps
    assert distance("".join(map(chr, a)), "".join(map(chr, b))) == table[-1]


# --- lines, digits, identifiers


def rows(*lines):
    return [line + symbols.LINE_END for line in lines]


def test_lines_are_exact_or_not():
    assert score_rows(rows("one", "two", "three"), rows("one", "twO", "three")).lines == Hits(2, 3)
    assert score_rows(rows("one"), rows("one", "two")).lines == Hits(1, 2)
    assert score_rows(rows("two", "one"), rows("one", "two")).lines == Hits(0, 2)
    assert score_rows([], rows("one")).lines == Hits(0, 1)


@pytest.mark.parametrize(
    ("said", "hits"),
    [
        ("a 12 b 345", 2),
        ("a 12 b 346", 1),
        ("a 12 b 3450", 1),
        ("a 1 2 b 345", 1),
        ("a12b345", 2),
        ("b 345", 1),
        ("", 0),
    ],
)
def test_digits_come_back_whole(said, hits):
    assert score_rows([said], ["a 12 b 345"]).digits == Hits(hits, 2)


def test_a_number_may_go_over_a_rows_end():
    assert score_rows(["id 12", "34"], ["id 12", "34"]).digits == Hits(1, 1)
    assert score_rows(["id 12", "3 "], ["id 12", "34"]).digits == Hits(0, 1)


def test_what_is_an_identifier():
    text = "see /usr/lib/foo.py, 9f86d081 (v1.2.3.) a_name x=1 e.g. words 2024-01-02T03:04:05Z, me@b.org. and C:\\dir\\f.txt"
    expected = ["/usr/lib/foo.py", "9f86d081", "v1.2.3", "a_name", "2024-01-02T03:04:05Z", "me@b.org", "C:\\dir\\f.txt"]
    assert [text[start:end] for start, end in identifiers(text)] == expected
    assert list(digit_runs("a1 22")) == [(1, 2), (3, 5)]


def test_identifiers_come_back_whole():
    assert score_rows(["at src/a.py ok"], ["at src/a.py ok"]).identifiers == Hits(1, 1)
    assert score_rows(["at src/a.pyy ok"], ["at src/a.py ok"]).identifiers == Hits(0, 1)
    assert score_rows(["at src/a py ok"], ["at src/a.py ok"]).identifiers == Hits(0, 1)


# --- intervals


def test_an_interval_holds_its_rate_and_narrows_with_pages():
    random = np.random.default_rng(1)
    few, many = (interval(random.random(count), [1.0] * count, [0]) for count in (10, 1000))
    for found in (few, many):
        assert found.low < found.value < found.high
    assert many.high - many.low < few.high - few.low
    assert interval([0.3, 0.7], [1, 1], [5]) == interval([0.3, 0.7], [1, 1], [5])


def test_an_interval_covers_the_truth_as_often_as_it_says():
    random = np.random.default_rng(2)
    held = [found.low <= 0.5 <= found.high for found in (interval(random.random(60), [1.0] * 60, [k]) for k in range(100))]
    assert 85 <= sum(held) <= 100


def test_pages_weigh_as_much_as_they_count():
    assert interval([9, 0], [9, 1], [0]).value == 0.9
    assert interval([0, 0], [0, 0], [0]) == (None, None, None)
    assert interval([1, 0], [1, 0], [0]) == (1.0, 1.0, 1.0)


# --- calibration


def test_the_calibration_error_of_constructed_confidence():
    sure = np.repeat([0.55, 0.95], 150)
    right = np.concatenate([np.arange(150) % 2 == 0, np.arange(150) % 10 > 0])  # 0.5 and 0.9
    bins = reliability(sure, right, 2)
    assert [(round(each.confidence, 6), round(each.right, 6), each.count) for each in bins] == [(0.55, 0.5, 150), (0.95, 0.9, 150)]
    assert calibration_error(bins) == pytest.approx(0.05)
    assert silent_errors(sure, right) == (pytest.approx(15 / 300), pytest.approx(15 / 150))
    assert calibrate(sure, right).error == pytest.approx(0.05, abs=0.01)


def test_bins_are_of_equal_mass_and_lose_nothing():
    bins = reliability(np.random.default_rng(0).random(1001), np.ones(1001, dtype=bool))
    assert sum(each.count for each in bins) == 1001
    assert {each.count for each in bins} == {66, 67}
    assert [each.confidence for each in bins] == sorted(each.confidence for each in bins)
    nothing = calibrate(np.empty(0), np.empty(0, dtype=bool))
    assert (nothing.error, nothing.silent, nothing.wrong_when_sure) == (None, None, None)  # saying nothing is no merit
    assert silent_errors(np.array([0.5]), np.array([False])) == (0, None)


def test_the_order_of_symbols_that_are_equally_sure_does_not_matter():
    right = np.arange(3000) < 2970
    for order in (right, right[::-1], np.random.default_rng(0).permutation(right)):
        assert calibrate(np.full(3000, 0.99), order).error == pytest.approx(0, abs=1e-9)


@pytest.mark.parametrize("truth", [0.5, 1.0, 2.0])
def test_the_temperature_that_made_the_answers_is_found(truth):
    random = torch.Generator().manual_seed(0)
    logits = torch.randn(20000, 12, generator=random) * 2
    answers = torch.multinomial((logits / truth).softmax(-1), 1, generator=random)[:, 0]
    said = logits.argmax(-1)
    found = fit_temperature(logits, said, answers == said)
    assert found == pytest.approx(truth, rel=0.08)
    sure, off = (confidence_at(logits, said, temperature).double().numpy() for temperature in (found, 4 * truth))
    assert calibrate(sure, (answers == said).numpy()).error < 0.02 < calibrate(off, (answers == said).numpy()).error


def test_no_temperature_without_errors():
    logits, said = torch.eye(4), torch.arange(4)
    assert fit_temperature(logits, said, torch.ones(4, dtype=torch.bool)) == 1
    assert fit_temperature(logits[:0], said[:0], torch.ones(0, dtype=torch.bool)) == 1


# --- charts


@pytest.mark.parametrize(("low", "high"), [(0, 1), (0.93, 1.0), (0, 31.5), (0.9999, 1.0), (1.0, 1.0)])
def test_ticks_are_round_and_reach_around(low, high):
    ticks = nice_ticks(low, high)
    assert ticks[0] <= low <= high <= ticks[-1]
    assert 2 <= len(ticks) <= 7
    assert len({f"{tick:g}" for tick in ticks}) == len(ticks)
    assert np.allclose(np.diff(ticks), ticks[1] - ticks[0])


def test_a_chart_is_xml_with_every_name_once_and_none_over_another():
    series = {f"<kind {k}>": [(1.0, 0.5 + k / 1000), (2.0, 0.9)] for k in range(9)}
    chart = line_chart("a & b", series | {"empty": []}, Axis("x", [1, 2]), Axis("y", [0, 1]))
    texts = [node for node in ET.fromstring(chart) if node.tag.endswith("text")]
    labels = [node for node in texts if node.text in series]
    assert sorted(node.text for node in labels) == sorted(series)
    heights = sorted(float(node.get("y")) for node in labels)
    assert min(np.diff(heights)) >= 12
    assert 0 < heights[0] < heights[-1] < HEIGHT
    assert "empty" not in chart
