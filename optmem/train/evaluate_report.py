"""An evaluation for people: a table for the terminal, a report in Markdown, and charts."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from itertools import count
from pathlib import Path
from typing import Any

from optmem.engine.checkpoint import FIDELITY
from optmem.train.charts import Axis, Point, line_chart, nice_ticks
from optmem.train.fidelity import Cell, Control, Fidelity, Tier, write

REPORT = "report.md"
DECAY_FROM = 512  # pixels: pages of this size are also shown smaller
_HOW = """\
Score: 1 - edit distance / length of the longer text, on the raw text; the interval is 95 % over pages, drawn again with
replacement, and none where all pages scored the same; of few pages, most of them perfect, it is too narrow. Lines: rows of a page
without any error. Digits, identifiers: runs of digits, and hashes, paths, numbers and names with underscores that came back whole.
Ratio: estimated text tokens (o200k) of the page / tokens fed, newlines and separator among them; chars/4: a quarter of the
characters / vision tokens. Truncated: the score of the first text tokens, as many as are fed. Silent: share of the symbols said
that are wrong with a confidence above 0.9, before calibration. Every page counts.
"""


def form(of: Cell | Tier) -> str:
    """A form of page as people say it."""
    shown = f", shown at {of.side}" if of.side != of.size else ""
    return f"{of.size} px, {of.cell}{shown}"


def rate(value: float | None) -> str:
    """A share with four digits, or a dash.  What is not all is not rounded to all, and what is not nothing not to nothing."""
    if value is None:
        return "–"
    shown = min(max(value, 0.0001), 0.9999) if 0 < value < 1 else value
    return f"{shown:.4f}".removeprefix("0") if value < 1 else "1.000"


def _score(of: Cell | Control) -> str:
    """With its interval; one without width is none: pages that are all alike do not say how pages differ."""
    if of.low == of.high:
        return f"{rate(of.score)} [{of.pages} alike]"
    return f"{rate(of.score)} [{rate(of.low)}, {rate(of.high)}]"


_CELL_COLUMNS: dict[str, Callable[[Cell], str]] = {
    "page": form,
    "kind": lambda cell: cell.kind,
    "score [95 %]": _score,
    "lines": lambda cell: rate(cell.exact_lines),
    "digits": lambda cell: rate(cell.digits),
    "identifiers": lambda cell: rate(cell.identifiers),
    "glance": lambda cell: rate(cell.glance),
    "silent": lambda cell: rate(cell.silent),
    "ratio": lambda cell: f"{cell.ratio:.1f}",
    "chars/4": lambda cell: f"{cell.quarter_ratio:.1f}",
    "truncated": lambda cell: rate(cell.truncation),
}
_TIER_COLUMNS: dict[str, Callable[[Tier], str]] = {
    "page": form,
    "tokens fed": lambda tier: str(tier.fed_tokens),
    "ratio": lambda tier: "–" if tier.ratio is None else f"{tier.ratio:.1f}",
    "score": lambda tier: rate(tier.score),
    "lines": lambda tier: rate(tier.exact_lines),
    "digits": lambda tier: rate(tier.digits),
    "identifiers": lambda tier: rate(tier.identifiers),
    "glance": lambda tier: rate(tier.glance),
}
_CONTROL_COLUMNS: dict[str, Callable[[Control], str]] = {
    "shown": lambda control: control.name,
    "pages": lambda control: f"{control.pages} of {control.kind}, {control.form}",
    "score [95 %]": _score,
    "lines": lambda control: rate(control.exact_lines),
    "glance": lambda control: rate(control.glance),
}


# --- tables ---------------------------------------------------------------------------------------------------------------------


def _rows(columns: dict[str, Callable[[Any], str]], items: Sequence[Any]) -> list[list[str]]:
    return [list(columns), *([say(item) for say in columns.values()] for item in items)]


def aligned(rows: Sequence[Sequence[str]]) -> str:
    """A table for a terminal: columns two blanks apart, the first two to the left."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join("  ".join(map(_padded, count(), row, widths)).rstrip() for row in rows)


def _padded(column: int, text: str, width: int) -> str:
    return text.ljust(width) if column < 2 else text.rjust(width)


def markdown(rows: Sequence[Sequence[str]]) -> str:
    """A table of Markdown."""
    ruler = ["---"] + ["---:"] * (len(rows[0]) - 1)
    return "\n".join(f"| {' | '.join(row)} |" for row in (rows[0], ruler, *rows[1:]))


def table(found: Fidelity) -> str:
    """What the terminal shows."""
    parts = [aligned(_rows(_CELL_COLUMNS, found.cells)), aligned(_rows(_TIER_COLUMNS, found.tiers()))]
    parts += [aligned(_rows(_CONTROL_COLUMNS, [*found.controls, *found.baselines])), aligned(_calibration(found))]
    return "\n\n".join(parts)


def _calibration(found: Fidelity) -> list[list[str]]:
    rows = [["confidence of", "temperature", "symbols", "calibration error", "silent errors", "wrong when sure"]]
    for part in ("decoder", "glance"):
        for when, temperature in (("before", 1.0), ("after", found.calibration[f"{part}_temperature"])):
            said = found.calibration[part][when]
            rates = [rate(said[name]) for name in ("error", "silent", "wrong_when_sure")]
            rows.append([f"{part}, {when}", f"{temperature:g}", f"{said['symbols']:,}", *rates])
    return rows


def report(found: Fidelity) -> str:
    """All tables, to be pasted into docs/nano.md."""
    read = f"{found.rows} consecutive rows of each page" if found.rows else "whole pages"
    pages = f"at most {found.pages} pages of each kind and form, {read}, seed {found.seed}"
    sections = {
        "By tier and density, means over kinds": markdown(_rows(_TIER_COLUMNS, found.tiers())),
        "By kind of text": markdown(_rows(_CELL_COLUMNS, found.cells)),
        "Controls: nothing to read, or something else": markdown(_rows(_CONTROL_COLUMNS, found.controls)),
        "At the same number of tokens, without a picture": markdown(_rows(_CONTROL_COLUMNS, found.baselines)) + f"\n\n{_POOLED}",
        "Confidence": markdown(_calibration(found)),
    }
    corpus = f", corpus `{found.corpus}`" if found.corpus else ""
    head = f"# Fidelity\n\nModel `{found.model}`{corpus}; {pages}.\n{_HOW}"
    return head + "".join(f"\n## {title}\n\n{body}\n" for title, body in sections.items())


_POOLED = """\
Mean pooling has no reader here: the decoder was trained on vision tokens, so its line is a floor that shows that it does not answer
from embeddings it happens to know, not what a reader trained on pooled embeddings would do."""


# --- charts ---------------------------------------------------------------------------------------------------------------------


def charts(found: Fidelity) -> dict[str, str]:
    """SVGs by name of file.  A chart with nothing to show is left out."""
    drawn = {"fidelity.svg": _by_ratio(found), "reliability.svg": _reliability(found)}
    for cell in dict.fromkeys(cell.cell for cell in found.cells):
        drawn[f"decay-{cell}.svg"] = _decay(found, cell)
    return {name: chart for name, chart in drawn.items() if chart}


def _series(cells: Sequence[Cell], x: Callable[[Cell], float]) -> dict[str, list[Point]]:
    kinds = dict.fromkeys(cell.kind for cell in cells)
    points = {kind: [(x(cell), cell.score) for cell in cells if cell.kind == kind and cell.score is not None] for kind in kinds}
    return {kind: sorted(found) for kind, found in points.items() if found}


def _up_to(series: dict[str, list[Point]]) -> Axis:
    return Axis("score", nice_ticks(min(y for points in series.values() for _, y in points), 1.0))


def _by_ratio(found: Fidelity) -> str:
    """Of the size of page that is there in most forms, shown at that size: a larger page has more to say at any ratio, and is
    another curve, and so is a lower tier (`_decay`)."""
    own = [cell for cell in found.cells if cell.side == cell.size]
    if not own:
        return ""
    sizes = Counter(cell.size for cell in own)
    size = max(sizes, key=lambda each: sizes[each])
    series = _series([cell for cell in own if cell.size == size], lambda cell: cell.quarter_ratio)
    x = Axis("characters / 4 for each vision token", nice_ticks(0, max(x for points in series.values() for x, _ in points)))
    return line_chart(f"Fidelity by compression: pages of {size} px, all densities", series, x, _up_to(series))


def _decay(found: Fidelity, cell: str) -> str:
    cells = [each for each in found.cells if each.size == DECAY_FROM and each.cell == cell]
    sides = sorted({each.side for each in cells})
    if len(sides) < 2:
        return ""
    series = _series(cells, lambda each: float(each.side))
    x = Axis(f"pixels at which a page of {DECAY_FROM} is shown", sides, is_reversed=True)
    return line_chart(f"The same page at lower tiers, cells of {cell}", series, x, _up_to(series))


def _reliability(found: Fidelity) -> str:
    names = {"decoder": "decoder", "glance": "glance"}
    series = dict(_curves(found, names))
    ticks = nice_ticks(min([y for points in series.values() for point in points for y in point], default=0.0), 1.0)
    title = "Reliability: on the dashed line, confidence is the share that is right"
    return line_chart(title, series, Axis("confidence", ticks), Axis("share right", ticks), diagonal=True) if series else ""


def _curves(found: Fidelity, names: dict[str, str]) -> Iterator[tuple[str, list[Point]]]:
    for part, name in names.items():
        for when in ("before", "after"):
            bins = found.calibration[part][when]["bins"]
            if bins:
                yield f"{name}, {when}", [(each["confidence"], each["right"]) for each in bins]


def save(found: Fidelity, folder: Path) -> list[Path]:
    """fidelity.json, report.md and the charts, in a folder; their files."""
    found.save(folder)
    written = {REPORT: report(found)} | charts(found)
    for name, content in written.items():
        write(folder / name, content)
    return [folder / FIDELITY, *(folder / name for name in written)]
