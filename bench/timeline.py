"""Where a GPU did nothing: gaps between its kernels and copies, from a trace of torch's profiler."""

from __future__ import annotations

import gzip
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

WORK = ("kernel", "gpu_memcpy", "gpu_memset")
GAP = 20.0  # microseconds


@dataclass(frozen=True)
class Gap:
    """Microseconds in which nothing ran, on any stream."""

    start: float  # from the first work on
    length: float
    after: str
    before: str

    def __str__(self) -> str:
        return f"at {self.start / 1000:9.3f} ms  {self.length:8.1f} us idle, behind {self.after[:48]} and before {self.before[:48]}"


@dataclass(frozen=True)
class Timeline:
    length: float  # microseconds, first work to last
    busy: float
    gaps: list[Gap]


def read_trace(path: Path) -> list[Mapping[str, Any]]:
    """The events of a chrome trace, which may be compressed."""
    data = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    events: list[Mapping[str, Any]] = json.loads(data)["traceEvents"]
    return events


def timeline(events: Iterable[Mapping[str, Any]], least: float = GAP) -> Timeline:
    """What ran, and the gaps of at least so many microseconds."""
    work = sorted((float(each["ts"]), float(each["dur"]), str(each["name"])) for each in events if each.get("cat") in WORK)
    if not work:
        return Timeline(0.0, 0.0, [])
    first, _, last = work[0]
    end, busy, gaps = first, 0.0, list[Gap]()
    for start, taken, name in work:
        if start - end >= least:
            gaps.append(Gap(end - first, start - end, last, name))
        busy += max(start + taken - max(start, end), 0.0)
        if start + taken >= end:
            end, last = start + taken, name
    return Timeline(end - first, busy, gaps)
