"""Small charts as SVG, written by hand: series with a marker and a name each at its end, so that they can be told apart in grey."""

from __future__ import annotations

from collections.abc import Callable, Container, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from math import log

Point = tuple[float, float]
WIDTH, HEIGHT = 640, 400
LEFT, RIGHT, TOP, BOTTOM = 56, 132, 40, 48  # margins
LINE = 13  # pixels between two labels
_NARROWEST = 1e-3  # that an axis shows: ticks nearer to each other read alike
COLOURS = ("#1b6ca8", "#c1440e", "#2e7d32", "#7b1fa2", "#8d6e00", "#00838f", "#ad1457", "#37474f", "#5d4037", "#616161")


@dataclass(frozen=True, slots=True)
class Axis:
    """What runs along one side."""

    label: str
    ticks: Sequence[float]
    is_log: bool = False
    is_reversed: bool = False

    def place(self, value: float) -> float:
        """Where a value lies, from 0 to 1 between the first tick and the last."""
        scale: Callable[[float], float] = log if self.is_log else float
        first, last = scale(self.ticks[0]), scale(self.ticks[-1])
        at = (scale(value) - first) / (last - first)
        return 1 - at if self.is_reversed else at


def nice_ticks(low: float, high: float, most: int = 6) -> list[float]:
    """Round numbers in steps of 1, 2 or 5 that reach from below `low` to above `high`; of one value alone, from well below it."""
    low = min(low, high - _NARROWEST)
    steps = (digit * 10.0**power for power in range(-9, 10) for digit in (1, 2, 5))
    step = next(step for step in steps if (high - low) / step <= most - 1)
    first = int(low // step)
    last = max(-int(-high // step), first + 1)
    return [round(tick * step, 9) for tick in range(first, last + 1)]


def line_chart(
    title: str,
    series: Mapping[str, Sequence[Point]],
    x: Axis,
    y: Axis,
    *,
    diagonal: bool = False,
    dashed: Container[str] = (),
) -> str:
    """An SVG of some series, each sorted by x; one without points is left out.

    dashed   series whose lines have gaps, through which those that they cover are seen
    """
    shown = {name: sorted(points) for name, points in series.items() if points}
    parts = [f'<text x="{LEFT}" y="20" font-size="14" font-weight="bold">{escape(title)}</text>', *_grid(x, y)]
    if diagonal:
        parts.append(_polyline([_at(x, y, (x.ticks[0], y.ticks[0])), _at(x, y, (x.ticks[-1], y.ticks[-1]))], "#999", "4 3"))
    ends = [max(_at(x, y, point) for point in points) for points in shown.values()]
    labels = _spread([end[1] for end in ends])
    for number, ((name, points), end, label) in enumerate(zip(shown.items(), ends, labels, strict=True)):
        colour = COLOURS[number % len(COLOURS)]
        placed = [_at(x, y, point) for point in points]
        dash = "5 5" if name in dashed else ""
        parts += [_polyline(placed, colour, dash), *(_marker(number, at, colour) for at in placed), _name(name, end, label, colour)]
    style = 'font-family="sans-serif" font-size="11" fill="#222"'
    paper = '<rect width="100%" height="100%" fill="white"/>'
    return f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" {style}>{paper}{"".join(parts)}</svg>\n'


def _at(x: Axis, y: Axis, point: Point) -> Point:
    across, down = WIDTH - LEFT - RIGHT, HEIGHT - TOP - BOTTOM
    return LEFT + x.place(point[0]) * across, HEIGHT - BOTTOM - y.place(point[1]) * down


def _grid(x: Axis, y: Axis) -> list[str]:
    """Ticks, their lines and what the axes are."""
    parts = []
    for tick in y.ticks:
        left, at = _at(x, y, (x.ticks[-1 if x.is_reversed else 0], tick))
        parts.append(f'<path d="M{LEFT} {at:.1f}H{WIDTH - RIGHT}" stroke="#e0e0e0"/>')
        parts.append(f'<text x="{left - 6:.1f}" y="{at + 4:.1f}" text-anchor="end">{tick:g}</text>')
    for tick in x.ticks:
        at, bottom = _at(x, y, (tick, y.ticks[0]))
        parts.append(f'<path d="M{at:.1f} {bottom:.1f}v4" stroke="#222"/>')
        parts.append(f'<text x="{at:.1f}" y="{bottom + 17:.1f}" text-anchor="middle">{tick:g}</text>')
    parts.append(f'<path d="M{LEFT} {HEIGHT - BOTTOM}H{WIDTH - RIGHT}" stroke="#222"/>')
    middle = LEFT + (WIDTH - LEFT - RIGHT) / 2
    parts.append(f'<text x="{middle}" y="{HEIGHT - 10}" text-anchor="middle">{escape(x.label)}</text>')
    parts.append(f'<text x="{LEFT}" y="{TOP - 6}">{escape(y.label)}</text>')
    return parts


def _polyline(points: Sequence[Point], colour: str, dash: str = "") -> str:
    drawn = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
    dashed = f' stroke-dasharray="{dash}"' if dash else ""
    return f'<polyline fill="none" stroke="{colour}" stroke-width="1.5"{dashed} points="{drawn}"/>'


def _marker(number: int, at: Point, colour: str) -> str:
    """A disc, a square, a triangle, a diamond, and the same four hollow."""
    x, y = at
    shapes = ("M-3 0a3 3 0 1 0 6 0a3 3 0 1 0 -6 0z", "M-3 -3h6v6h-6z", "M0 -4L4 3H-4z", "M0 -4L4 0L0 4L-4 0z")
    fill = colour if number // len(shapes) % 2 == 0 else "white"
    return f'<path transform="translate({x:.1f},{y:.1f})" d="{shapes[number % len(shapes)]}" fill="{fill}" stroke="{colour}"/>'


def _name(name: str, end: Point, label: float, colour: str) -> str:
    """A series' name right of the chart, and a thin line from its end to it."""
    x = WIDTH - RIGHT + 14
    path = f"M{end[0] + 5:.1f} {end[1]:.1f}L{x - 3} {label:.1f}"
    line = f'<path d="{path}" stroke="{colour}" stroke-width="0.5" stroke-dasharray="2 2"/>'
    return f'{line}<text x="{x}" y="{label + 4:.1f}" fill="{colour}">{escape(name)}</text>'


def _spread(heights: Sequence[float]) -> list[float]:
    """Heights of labels near those wanted, in the same order, none over another, all inside."""
    order = sorted(range(len(heights)), key=lambda k: heights[k])
    placed = [0.0] * len(heights)
    below = TOP - LINE * 1.0
    for k in order:
        below = placed[k] = max(heights[k], below + LINE)
    above = HEIGHT - BOTTOM + LINE * 1.0
    for k in reversed(order):
        above = placed[k] = min(placed[k], above - LINE)
    return placed
