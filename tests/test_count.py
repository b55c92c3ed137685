"""The token estimate: its fixed points, and samples whose true count under o200k_base is known."""

import pytest

from optmem.text.count import estimate_tokens

PROSE = (
    "The dome closed at four, as it had every night that week, and the instruments went quiet one after the other. "
    "Nobody had asked for the log; it was kept because it had always been kept. When the new director came, she "
    "read all of it in one winter, and found in it the year that everyone had forgotten."
)
CODE = (
    "def is_outlier(row: dict[str, float], limit: float = 1.5) -> bool:\n"
    '    """A sensor that leaves its neighbours."""\n'
    "    middle = sorted(row.values())[len(row) // 2]\n"
    "    return any(abs(value - middle) > limit for value in row.values())\n"
    "\n"
    "\n"
    "for name in sensors:\n"
    "    if is_outlier(read(name)):\n"
    '        print(f"check {name}")\n'
)
TABLE = (
    "| time  | north | south | mirror |\n"
    "|-------|------:|------:|-------:|\n"
    "| 21:00 |   4.1 |   4.0 |    3.2 |\n"
    "| 21:20 |   4.0 |   4.0 |    3.1 |\n"
)
JSON = (
    '{"id": "call_7f3a", "name": "read_log", "input": {"path": "/var/log/dome/2026-11-19.csv", "last": 4}, "tags": '
    '["night", "dome"], "ok": true}'
)
KNOWN = [(PROSE, 67), (CODE, 83), (TABLE, 70), (JSON, 59)]  # tokens of o200k_base


@pytest.mark.parametrize(("text", "tokens"), KNOWN)
def test_is_near_a_real_vocabulary(text, tokens):
    assert estimate_tokens(text) == pytest.approx(tokens, rel=0.15)


def test_fixed_points():
    assert estimate_tokens("") == 0
    assert estimate_tokens(" ") >= 1
    assert estimate_tokens("\ud800\x00") >= 1
    assert estimate_tokens("word " * 1000) == pytest.approx(1000, rel=0.2)
