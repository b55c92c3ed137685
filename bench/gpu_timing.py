"""What the benches on a GPU share: measured ceilings, medians by CUDA events, one table and one line of JSON.

    Case      one operator at one shape: how to run it, what torch offers instead, the bytes and FLOPs that it cannot do without
    measure   the answer is checked first, then every way is timed; what fails is a row of its own and ends in exit status 1
    main      the command line of a bench: python bench/bench_gpu_<part>.py [--only word] [--list]

A share is that of the nearer ceiling: (bytes / copy bandwidth or FLOPs / matrix rate, the longer) / time, and both ceilings are
measured in the same run.  Runs are replayed from a CUDA graph, so that the host's part is no part of a kernel's time; the second
level cache is overwritten before each one.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from optmem.machine import E4M3_CAPABILITY
from optmem.testing import assert_close

RESULTS = Path(__file__).parent / "results"
SECONDS = 0.2  # of timed runs of one way
ROUNDS = (7, 200)  # at least, at most
COPIED = 1 << 30  # bytes: many times the 50 MB of an H200's second-level cache
SIDE = 8192  # of the square matrices that measure the matrix rate


class Errors(NamedTuple):
    """Largest differences from fp64."""

    ours: float
    torchs: float


def compare(actual: Tensor, expected: Tensor, exact: Tensor) -> Errors:
    """Raises where our error is more than twice torch's own in that type, plus one rounding."""
    assert_close(actual, expected, exact=exact)
    return Errors(*((tensor.double() - exact).abs().max().item() for tensor in (actual, expected)))


@dataclass(frozen=True)
class Case:
    operator: str
    shape: str  # for people: "1024 px x 16, bf16"
    dtype: torch.dtype  # of the products: says which matrix rate is the ceiling
    ours: Callable[[], Any]
    theirs: dict[str, Callable[[], Any]]  # name -> the same from torch
    check: Callable[[], Errors]  # at this shape or at a slice of it; raises where the answer is wrong
    bytes: int  # the fewest that move: inputs once, outputs once
    flops: int  # of exact arithmetic
    replayed: bool = True  # from a CUDA graph; False where a run synchronises with the host

    @property
    def name(self) -> str:
        return f"{self.operator} {self.shape}"


@dataclass(frozen=True)
class Ceilings:
    bytes_per_s: float
    flops_per_s: dict[torch.dtype, float] = field(default_factory=dict)

    def floor(self, case: Case) -> tuple[float, str]:
        """Seconds that the case cannot be faster than, and what bounds it."""
        memory = case.bytes / self.bytes_per_s
        matrix = case.flops / self.flops_per_s[case.dtype] if case.flops else 0.0
        return (memory, "memory") if memory >= matrix else (matrix, "compute")


def measure_ceilings(device: torch.device) -> Ceilings:
    """Copy bandwidth, reading and writing counted, and the rate of square products in each type; fp32 without TF32."""
    source = torch.ones(COPIED, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    bandwidth = 2 * COPIED / seconds(lambda: target.copy_(source))
    rates = {}
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        a, b = (torch.randn(SIDE, SIDE, device=device).to(dtype) for _ in "ab")
        rates[dtype] = 2 * SIDE**3 / seconds(lambda a=a, b=b: a @ b)
    if torch.cuda.get_device_capability(device) >= E4M3_CAPABILITY:
        rates[torch.float8_e4m3fn] = 2 * SIDE**3 / seconds(_product_of_e4m3(device))
    return Ceilings(bandwidth, rates)


def _product_of_e4m3(device: torch.device) -> Callable[[], Tensor]:
    """With one scale for all, and sums as short as the tensor cores keep them: the fastest that there is."""
    a, b = (torch.randn(SIDE, SIDE, device=device).to(torch.float8_e4m3fn) for _ in "ab")
    one = torch.ones((), device=device)
    return lambda: torch._scaled_mm(a, b.t(), scale_a=one, scale_b=one, out_dtype=torch.bfloat16, use_fast_accum=True)


def seconds(run: Callable[[], Any], *, replayed: bool = True) -> float:
    """The median on the device, after warming up, with a cache that holds nothing of the inputs."""
    for _ in range(3):
        run()
    if replayed:
        run = _captured(run)
    flush = torch.empty(max(1 << 28, 4 * _cache_bytes()), dtype=torch.uint8, device="cuda")
    once = statistics.median(_timed(run, flush, 3))
    return statistics.median(_timed(run, flush, min(ROUNDS[1], max(ROUNDS[0], int(SECONDS / once)))))


def _captured(run: Callable[[], Any]) -> Callable[[], None]:
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):  # as torch asks: libraries take their workspaces before the capture
        run()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    return graph.replay


def _cache_bytes() -> int:
    return int(torch.cuda.get_device_properties().L2_cache_size)


def _timed(run: Callable[[], Any], flush: Tensor, rounds: int) -> list[float]:
    edges = [tuple(torch.cuda.Event(enable_timing=True) for _ in range(2)) for _ in range(rounds)]
    for start, end in edges:
        flush.zero_()
        start.record()
        run()
        end.record()
    torch.cuda.synchronize()
    return [start.elapsed_time(end) / 1000 for start, end in edges]


def measure(case: Case, ceilings: Ceilings) -> dict[str, Any]:
    """One row: figures of our run, of torch's ways, and what they are of the ceilings."""
    errors = case.check()
    ours = seconds(case.ours, replayed=case.replayed)
    theirs, failed = {}, {}
    for name, run in case.theirs.items():
        try:
            theirs[name] = seconds(run, replayed=case.replayed)
        except Exception as error:  # most of all memory: what torch cannot run here is told, and is no fault of ours
            failed[name] = _in_words(error)
    return row_of(case, ceilings, errors, ours, theirs) | ({"torch_failed": failed} if failed else {})


def row_of(case: Case, ceilings: Ceilings, errors: Errors, ours: float, theirs: dict[str, float]) -> dict[str, Any]:
    floor, bound = ceilings.floor(case)
    best = min(theirs, key=lambda name: theirs[name], default=None)
    return {
        "operator": case.operator,
        "shape": case.shape,
        "us": round(ours * 1e6, 2),
        "floor_us": round(floor * 1e6, 2),
        "bound": bound,
        "share": round(floor / ours, 3),
        "bytes": case.bytes,
        "flops": case.flops,
        "gb_per_s": round(case.bytes / ours / 1e9, 1),
        "tflop_per_s": round(case.flops / ours / 1e12, 2),
        "error": errors.ours,
        "torch_error": errors.torchs,
        "torch_us": {name: round(taken * 1e6, 2) for name, taken in theirs.items()},
        "best_torch": best,
        "vs_torch": round(theirs[best] / ours, 2) if best is not None else None,
    }


def table(rows: Sequence[dict[str, Any]]) -> str:
    """A line a row; what failed says why."""
    figures = ("us", 9), ("floor", 9), ("share", 6), ("GB/s", 7), ("TFLOP/s", 8), ("error", 8), ("torch", 8)
    lines = [f"{'operator and shape':58} " + " ".join(f"{name:>{width}}" for name, width in figures) + "  best of torch"]
    for row in rows:
        name = f"{row['operator']} {row['shape']}"
        if "failed" in row:
            lines.append(f"{name:58} failed: {row['failed']}")
            continue
        other = f"{row['best_torch']} {row['torch_us'][row['best_torch']]} us, {row['vs_torch']}x" if row["best_torch"] else "-"
        lines.append(
            f"{name:58} {row['us']:9.1f} {row['floor_us']:9.1f} {row['share']:6.1%} {row['gb_per_s']:7.0f}"
            f" {row['tflop_per_s']:8.1f} {row['error']:8.1e} {row['torch_error']:8.1e}  {other}"
        )
    return "\n".join(lines)


def provenance(ceilings: Ceilings) -> dict[str, Any]:
    """What a published figure carries: device, versions, commit, command, and the ceilings of this run."""
    commit = subprocess.run(["git", "describe", "--always", "--dirty"], cwd=RESULTS.parent, capture_output=True, text=True).stdout
    try:
        import triton

        compiler = triton.__version__
    except ImportError:
        compiler = None
    return {
        "device": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "triton": compiler,
        "python": platform.python_version(),
        "commit": commit.strip() or None,
        "command": " ".join(Path(part).name if i == 0 else part for i, part in enumerate(sys.argv)),
        "when": time.strftime("%Y-%m-%d %H:%M:%S"),
        "copy_gb_per_s": round(ceilings.bytes_per_s / 1e9, 1),
        "matrix_tflop_per_s": {str(dtype): round(rate / 1e12, 1) for dtype, rate in ceilings.flops_per_s.items()},
    }


Plan = tuple[str, Callable[[], Case]]  # a name, and what makes the case: its inputs exist only while it is measured


def main(part: str, plans: Sequence[Plan]) -> int:
    """Measures, prints one table and last one line of JSON, and keeps that under bench/results/."""
    parser = argparse.ArgumentParser(description=f"{part}: operators on a GPU beside their floors and what torch offers")
    parser.add_argument("--only", default="", help="only the cases whose name has this in it")
    parser.add_argument("--list", action="store_true", help="name the cases, and measure nothing")
    options = parser.parse_args()
    chosen = [(name, make) for name, make in plans if options.only in name]
    if options.list:
        print("\n".join(name for name, _ in chosen))
        return 0
    if not torch.cuda.is_available():
        print(f"{part}: no GPU here; tests check the answers without one, and only a GPU has these times", file=sys.stderr)
        return 2
    torch.backends.cuda.matmul.allow_tf32 = False
    with torch.inference_mode():
        ceilings = measure_ceilings(torch.device("cuda"))
        rows = [_row(name, make, ceilings) for name, make in chosen]
    facts = provenance(ceilings) | {"part": part, "rows": rows}
    RESULTS.mkdir(exist_ok=True)
    device = facts["device"].replace(" ", "-").lower()
    (RESULTS / f"{part}-{device}.json").write_text(json.dumps(facts, indent=1) + "\n")
    print(table(rows))
    print(json.dumps(facts))
    return int(any("failed" in row for row in rows))


def _row(name: str, make: Callable[[], Case], ceilings: Ceilings) -> dict[str, Any]:
    print(f"{name} ...", file=sys.stderr, flush=True)
    try:
        return measure(make(), ceilings)
    except Exception as error:  # one operator that fails must not take the figures of the others with it
        operator, _, shape = name.partition(" ")
        return {"operator": operator, "shape": shape, "failed": _in_words(error)}


def _in_words(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"
