"""The demo's report: one HTML file with the pages, what stands on them beside what was read, and how sure the reader was.

    shade       the less sure of a character, the redder behind it
    underline   read, and not what stands there
    struck      stands there, and was not read

Rows are compared symbol by symbol, as drawn: white on black is what optmem says itself, labels and escapes.
"""

from __future__ import annotations

import base64
import io
from collections.abc import Iterator, Sequence
from html import escape
from itertools import zip_longest

from PIL import Image

from optmem.demo import ReadBack
from optmem.engine import Completion
from optmem.pages import Page, symbols
from optmem.train.distance import keep

SURE = 0.995  # characters at least this sure have no shade
_MARKS = {symbols.LINE_END: "⏎", symbols.TEXT_END: "█", symbols.TAB: "⇥", symbols.FILL: "·", symbols.WIDE_REST: "·"}
_INVERSE = frozenset(symbols.inverse(symbols.PRINTABLE_ASCII))
_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; margin: 2rem; color: #222; background: #fff }
.page { display: grid; grid-template-columns: repeat(3, minmax(0, 1fr)); gap: 1.5rem; align-items: start; margin: 0 0 2rem }
.page img { width: 100%; box-sizing: border-box; border: 1px solid #bbb }
.rows { container-type: inline-size; border: 1px solid #ddd; overflow: hidden }
pre { font: min(14px, calc(100cqw / var(--columns) / .62))/1.33 monospace; margin: .25em }
@media (max-width: 900px) { .page { grid-template-columns: minmax(0, 1fr) } }
i { font-style: normal; color: #fff; background: #222 } u { color: #00c; text-decoration: underline wavy #c00 }
s { color: #999; background: #fdd } b { font-weight: normal; color: #999 } h2 { margin: 2rem 0 .5rem }
"""


def write_report(results: Sequence[ReadBack], reader: str) -> str:
    """The whole file.  reader says which checkpoint read."""
    parts = "".join(part for result in results for part in _source(result))
    legend = (
        "Left: the page. Middle: what stands on it. Right: what was read from its vision tokens alone; the redder, the less sure; "
        "<u>underlined</u> is not what stands there, <s>struck</s> was not read."
    )
    head = f'<!doctype html><html lang="en"><meta charset="utf-8"><title>optmem demo</title><style>{_STYLE}</style>'
    return f"{head}<h1>Read back by {escape(reader)}</h1><p>{legend}</p>{parts}</html>\n"


def _source(result: ReadBack) -> Iterator[str]:
    facts = escape(result.describe()).replace("\n", "<br>")
    yield f"<h2>{escape(result.name)}</h2><p>{facts}</p>"
    for page, drawn, done in zip(result.pages, result.drawn, result.read, strict=True):
        columns = max(map(len, (*drawn, *done.row_symbols)), default=1) + 1
        texts = "".join(f'<div class="rows"><pre>{text}</pre></div>' for text in (_plain(drawn), _read(drawn, done)))
        yield f'<div class="page" style="--columns:{columns}">{_picture(page)}{texts}</div>'


def _picture(page: Page) -> str:
    file = io.BytesIO()
    Image.fromarray(page.image()).save(file, "PNG", optimize=True)
    return f'<img alt="page {page.index + 1}" src="data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}">'


def _plain(rows: Sequence[str]) -> str:
    return "\n".join("".join(map(_shown, row)) for row in rows)


def _shown(symbol: str) -> str:
    """A symbol as HTML: marks in grey, what is drawn white on black as such."""
    if symbol in _MARKS:
        return f"<b>{_MARKS[symbol]}</b>"
    if symbol in _INVERSE:
        return f"<i>{escape(symbols.plain(symbol))}</i>"
    return escape(symbol)


def _read(drawn: Sequence[str], done: Completion) -> str:
    rows = [row for row in done.rows if not row.is_below]
    said = zip(done.row_symbols, (row.probabilities for row in rows), strict=True)
    return "\n".join(_row(true or "", *(read or ("", ()))) for true, read in zip_longest(drawn, said))


def _row(true: str, said: str, probabilities: Sequence[float]) -> str:
    """A row as it was read, with what is missing struck where it should stand."""
    places = keep(true, said)
    right, parts, at = {place for place in places if place >= 0}, list[str](), 0
    for symbol, place in zip(true, places, strict=True):
        if place < 0:
            parts.append(f"<s>{_shown(symbol)}</s>")
            continue
        parts += [_character(said, index, probabilities, right) for index in range(at, place + 1)]
        at = place + 1
    parts += [_character(said, index, probabilities, right) for index in range(at, len(said))]
    return "".join(parts)


def _character(said: str, index: int, probabilities: Sequence[float], right: set[int]) -> str:
    shown = _shown(said[index]) if index in right else f"<u>{_shown(said[index])}</u>"
    chance = probabilities[index] if index < len(probabilities) else 1.0  # names among symbols show nothing, and move the rest
    if chance >= SURE:
        return shown
    return f'<span style="background:rgba(255,60,0,{0.1 + 0.8 * (1 - chance):.2f})" title="{chance:.3f}">{shown}</span>'
