"""What the benches on a GPU share, as far as it needs none: floors, rows, the table, and that a failure is told."""

import json

import gpu_timing
import pytest
import torch
from gpu_timing import Case, Ceilings, Errors, compare, row_of, table

CEILINGS = Ceilings(bytes_per_s=4e12, flops_per_s={torch.bfloat16: 800e12, torch.float32: 50e12})


def case(moved=4_000_000, flops=0, dtype=torch.bfloat16):
    return Case("rms_norm", "64 rows", dtype, int, {}, lambda: Errors(0.0, 0.0), moved, flops)


def test_the_nearer_ceiling_is_the_floor():
    assert CEILINGS.floor(case()) == (1e-6, "memory")
    assert CEILINGS.floor(case(flops=1_600_000_000)) == (pytest.approx(2e-6), "compute")
    assert CEILINGS.floor(case(flops=1_600_000_000, dtype=torch.float32)) == (pytest.approx(32e-6), "compute")


def test_a_row_has_shares_and_the_best_of_torch():
    row = row_of(case(), CEILINGS, Errors(1e-3, 2e-3), 2e-6, {"eager": 9e-6, "compiled": 3e-6})
    assert (row["us"], row["floor_us"], row["share"], row["gb_per_s"]) == (2.0, 1.0, 0.5, 2000.0)
    assert (row["best_torch"], row["vs_torch"], row["error"], row["torch_error"]) == ("compiled", 1.5, 1e-3, 2e-3)
    assert row_of(case(), CEILINGS, Errors(0, 0), 2e-6, {})["best_torch"] is None


def test_the_table_has_a_line_for_every_row():
    rows = [
        row_of(case(), CEILINGS, Errors(1e-3, 2e-3), 2e-6, {"eager": 9e-6}),
        row_of(case(), CEILINGS, Errors(0, 0), 2e-6, {}),
        {"operator": "route", "shape": "1 row", "failed": "AssertionError: error 1"},
    ]
    _, first, second, third = table(rows).splitlines()
    assert first.startswith("rms_norm 64 rows")
    assert "50.0%" in first
    assert first.endswith("eager 9.0 us, 4.5x")
    assert second.endswith("-")
    assert third.endswith("failed: AssertionError: error 1")


def test_a_wrong_answer_is_refused():
    exact = torch.ones(4, dtype=torch.float64)
    assert compare(exact.bfloat16(), exact.bfloat16(), exact) == Errors(0.0, 0.0)
    with pytest.raises(AssertionError, match="against fp64"):
        compare(exact.bfloat16() * 1.1, exact.bfloat16(), exact)


def test_a_failure_is_a_row():
    def broken():
        raise ValueError("no such shape\nat all")

    row = gpu_timing._row("route 1 row, bf16", broken, CEILINGS)
    assert row == {"operator": "route", "shape": "1 row, bf16", "failed": "ValueError: no such shape"}
    assert json.dumps(row)


@pytest.mark.skipif(torch.cuda.is_available(), reason="it would measure")
def test_without_a_gpu_it_says_so(monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["bench_gpu_x.py"])
    assert gpu_timing.main("x", [("route 1 row", case)]) == 2
    assert "no GPU here" in capsys.readouterr().err
    monkeypatch.setattr("sys.argv", ["bench_gpu_x.py", "--list", "--only", "route"])
    assert gpu_timing.main("x", [("route 1 row", case), ("rms_norm 1 row", case)]) == 0
    assert capsys.readouterr().out == "route 1 row\n"


@pytest.mark.skipif(not torch.cuda.is_available(), reason="a clock on a GPU needs one")
def test_seconds_are_those_of_the_device():
    a = torch.randn(2048, 2048, device="cuda")
    once, twice = (gpu_timing.seconds(lambda n=n: [a @ a for _ in range(n)]) for n in (1, 4))
    assert 2 < twice / once < 8
