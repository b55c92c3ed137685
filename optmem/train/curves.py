"""A run's log as a page of curves: SVG, written by hand."""

from __future__ import annotations

import json
from collections.abc import Sequence
from html import escape
from pathlib import Path
from statistics import median

WIDTH, HEIGHT, MARGIN = 360, 200, 34
NEAR = 7  # lines of the log on either side, over which a curve is smoothed
COLOURS = ("#1b6ca8", "#c1440e", "#2e7d32", "#7b1fa2", "#8d6e00", "#00838f")
PANELS = {  # title -> what is drawn; shares run from 0 to 1, losses from 0 to their largest
    "symbols read (share)": ("glance", "patches", "text"),
    "attention on the right token, expert chosen (share)": ("look 1", "look 2", "route 1", "route 2"),
    "cursor after layer 2 (share)": ("x 2", "y 2"),
    "loss": ("glance loss", "text loss"),
}

Point = tuple[float, float]


def draw_curves(log: Path, to: Path) -> None:
    """Writes the curves of a log; nothing where there is none."""
    if not log.exists():
        return
    lines = [json.loads(line) for line in log.read_text(encoding="utf-8").splitlines()]
    minutes, stages = _clock(lines)
    panels = [_panel(title, names, lines, minutes, stages) for title, names in PANELS.items()]
    placed = [f'<g transform="translate({i % 2 * WIDTH},{i // 2 * HEIGHT})">{panel}</g>' for i, panel in enumerate(panels)]
    size = f'width="{2 * WIDTH}" height="{-(-len(panels) // 2) * HEIGHT}"'
    style = 'font-family="sans-serif" font-size="10"'
    to.write_text(f'<svg xmlns="http://www.w3.org/2000/svg" {size} {style}>{"".join(placed)}</svg>\n', encoding="utf-8")


def _clock(lines: Sequence[dict[str, float]]) -> tuple[list[float], list[float]]:
    """Minutes of the whole run for every line, and where stages begin."""
    minutes: list[float] = []
    begun, before, stage = [0.0], 0.0, lines[0]["stage"] if lines else 0.0
    for line in lines:
        if line["stage"] != stage:
            before, stage = minutes[-1], line["stage"]
            begun.append(before)
        minutes.append(before + line["seconds"] / 60)
    return minutes, begun


def _panel(title: str, names: Sequence[str], lines: Sequence[dict[str, float]], minutes: list[float], stages: list[float]) -> str:
    curves = {
        name: [(minute, float(line[name])) for minute, line in zip(minutes, lines, strict=True) if name in line] for name in names
    }
    top = max([1.0, *(value for curve in curves.values() for _, value in curve)])
    end = max([*minutes, 1e-9])
    parts = [f'<text x="{MARGIN}" y="14" font-weight="bold">{escape(title)}</text>']
    parts += [_line([(at, 0.0), (at, top)], end, top, "#bbb", dash=True) for at in stages[1:]]
    parts += [_line([(0.0, level), (end, level)], end, top, "#ddd") for level in (0.0, top / 2, top)]
    parts += [f'<text x="4" y="{_y(level, top) + 3:.1f}">{level:.3g}</text>' for level in (0.0, top / 2, top)]
    parts.append(f'<text x="{WIDTH - 8}" y="{HEIGHT - 8}" text-anchor="end">{end:.3g} minutes</text>')
    for i, (name, curve) in enumerate(curves.items()):
        for stretch in _stretches(curve, minutes):
            parts.append(_line(stretch, end, top, COLOURS[i], opacity=0.2))
            parts.append(_line(_smooth(stretch), end, top, COLOURS[i]))
        parts.append(f'<text x="{MARGIN + 66 * i}" y="{HEIGHT - 8}" fill="{COLOURS[i]}">{escape(name)}</text>')
    return "".join(parts)


def _stretches(curve: Sequence[Point], minutes: Sequence[float]) -> list[list[Point]]:
    """A curve without the lines of the log that say nothing of it: some stages do not."""
    stretches: list[list[Point]] = [[]]
    said = dict(curve)
    for minute in minutes:
        if minute in said:
            stretches[-1].append((minute, said[minute]))
        elif stretches[-1]:
            stretches.append([])
    return [stretch for stretch in stretches if stretch]


def _smooth(curve: Sequence[Point]) -> list[Point]:
    """The median of the neighbours: one step's pages are hard, another's easy."""
    values = [value for _, value in curve]
    return [(at, median(values[max(i - NEAR, 0) : i + NEAR + 1])) for i, (at, _) in enumerate(curve)]


def _y(value: float, top: float) -> float:
    return HEIGHT - MARGIN - value / top * (HEIGHT - 2 * MARGIN)


def _line(points: Sequence[Point], end: float, top: float, colour: str, *, dash: bool = False, opacity: float = 1.0) -> str:
    drawn = " ".join(f"{MARGIN + x / end * (WIDTH - MARGIN - 8):.1f},{_y(y, top):.1f}" for x, y in points)
    dashed = ' stroke-dasharray="3"' if dash else ""
    faint = f' opacity="{opacity}"' if opacity < 1 else ""
    return f'<polyline fill="none" stroke="{colour}"{dashed}{faint} points="{drawn}"/>'
