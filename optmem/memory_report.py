"""`optmem memory report`: one HTML file that shows a memory: its ladder, pages at their tiers, tokens over time, recalls, receipts.

Nothing in it runs and nothing is fetched: pictures are data, charts are SVG, and its own policy forbids the rest.  A page is shown
larger while it has the focus.  All texts come from messages, and are escaped.
"""

from __future__ import annotations

import base64
import os
from collections import Counter
from collections.abc import Iterator, Sequence
from datetime import UTC, datetime
from html import escape
from pathlib import Path

from optmem.engine import Engine
from optmem.errors import OutputError
from optmem.items import watched
from optmem.memory.details import handle
from optmem.memory.optics import Optics
from optmem.memory.overview import Dated, Overview, Recalled, Shown, Step, read_overview
from optmem.memory_output import clean, plural
from optmem.train.charts import Axis, Point, line_chart, nice_ticks

THUMBNAILS = 200  # pages, the newest
RECEIPTS = 40  # the newest
CHANGES = 12  # of one receipt
WIDE = 142  # pixels at which a page of 512 is seen
_LOG = 8  # times: a chart whose values lie further apart has a logarithmic scale
_FAR = 100  # times: the first messages are no part of a chart that shows so much more
_GREY = "hsl(220 8% 55%)"
_STYLE = """
:root { color-scheme: light dark; --ink: #1d2330; --soft: #5b6475; --paper: #f6f7f9; --card: #fff; --line: #dfe3ea; --bad: #b3261e }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e6e9ef; --soft: #9aa4b5; --paper: #12151b; --card: #1b2029; --line: #2e3542; --bad: #ff8a80 }
  svg { filter: invert(1) hue-rotate(180deg); mix-blend-mode: screen } figure img { filter: brightness(.86) }
}
* { box-sizing: border-box }
body { font: 15px/1.5 system-ui, sans-serif; color: var(--ink); background: var(--paper); margin: 0 auto; max-width: 1180px;
  padding: 1.5rem 1.25rem 4rem }
h1 { font-size: 1.5rem; margin: 0; overflow-wrap: anywhere } h2 { font-size: 1.15rem; margin: 2.25rem 0 .6rem }
p { margin: .3rem 0 .8rem; color: var(--soft) }
.cards { display: grid; grid-template-columns: repeat(auto-fit, minmax(9.5rem, 1fr)); gap: .7rem; margin: 1rem 0 0 }
.cards div, .box { background: var(--card); border: 1px solid var(--line); border-radius: 8px; padding: .6rem .8rem }
.cards b { display: block; font-size: 1.35rem; line-height: 1.3 } .cards span { color: var(--soft); font-size: .86rem }
.scroll { overflow-x: auto } table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums }
th, td { text-align: left; padding: .35rem .7rem; border-top: 1px solid var(--line); white-space: nowrap; vertical-align: middle }
thead th { border: 0; color: var(--soft); font-weight: 500; font-size: .86rem } .n { text-align: right }
tbody tr.none { color: var(--soft) } td.wide { white-space: normal; min-width: 16rem }
.dot { display: inline-block; width: .75em; height: .75em; border-radius: 3px; background: var(--tier); margin-right: .5em }
.size { display: inline-block; border: 1.5px solid var(--tier); border-radius: 2px; vertical-align: middle }
.bar { display: inline-block; width: 6rem; height: .55rem; border-radius: 3px; background: var(--line); margin-right: .5rem }
.bar i { display: block; height: 100%; border-radius: 3px; background: var(--tier) }
.stack { display: flex; height: 1.5rem; border-radius: 6px; overflow: hidden; background: var(--line); margin: 0 0 .45rem }
.stack i { background: var(--tier); min-width: 1px }
.legend { display: flex; flex-wrap: wrap; gap: .2rem 1.1rem; font-size: .86rem }
.chart { background: var(--card); border: 1px solid var(--line); border-radius: 8px; padding: .4rem; max-width: 760px }
.chart svg { display: block; width: 100%; height: auto }
.pages { display: flex; flex-wrap: wrap; gap: .6rem; align-items: flex-end }
figure { margin: 0; outline: none; cursor: zoom-in; width: calc(var(--shown) * 1px + 6px) }
figure img, figure .gone { display: block; width: 100%; aspect-ratio: 1; border: 3px solid var(--tier); border-radius: 4px;
  background: #fff }
figure .gone { display: grid; place-items: center; text-align: center; font-size: .72rem; color: var(--bad);
  border-color: var(--bad); background: var(--card); overflow: hidden; overflow-wrap: anywhere }
figure.away img { opacity: .45 } figcaption { font-size: .7rem; line-height: 1.25; color: var(--soft); overflow-wrap: anywhere }
figure:target { outline: 3px solid var(--ink); outline-offset: 2px } figure:focus { cursor: zoom-out; outline: none }
figure:focus img { position: fixed; inset: 0; margin: auto; width: min(94vmin, 1024px); z-index: 2;
  opacity: 1; box-shadow: 0 0 0 100vmax rgb(0 0 0 / .55); image-rendering: pixelated }
details { border-top: 1px solid var(--line); padding: .35rem 0 } details:first-child { border: 0 }
summary { cursor: pointer } details ul { margin: .3rem 0 .6rem }
li { color: var(--soft); font-size: .9rem; overflow-wrap: anywhere }
code { font: .86rem/1.4 ui-monospace, monospace; overflow-wrap: anywhere }
.bad { color: var(--bad) }
"""
_POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
_WORDS = {
    "text": "what it says, as text",
    "sheet": "{} pages on one picture",
    "facts": "its hashes, paths and numbers as text",
    "stored": "in the store alone: recall finds it",
}


def save_report(path: str, file: Path, engine: Engine | None, most: int) -> int:
    """Writes the report of a memory, for its owner alone; its size in bytes.

    most   pages that are shown, the newest; the rest are counted

    Raises as Reader.open does, and OutputError where it cannot be written.
    """
    optics = Optics(engine)
    found = read_overview(path, optics, most, lambda pages: watched(pages, "reading"))
    name = Path(path).resolve().name
    content = write_report(found, name, optics.ladder.sheet_pages).encode("utf-8", "replace")  # names of files may be any bytes
    try:
        with os.fdopen(os.open(file, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600), "wb") as target:
            target.write(content)
    except OSError as error:
        raise OutputError(f"cannot write {file}: {error.strerror or error}") from None
    return len(content)


def write_report(found: Overview, name: str, sheet_pages: int) -> str:
    """The whole file."""
    colours = _colours(found.steps)
    head = (
        '<!doctype html><html lang="en"><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">'
        f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}"><title>memory {_text(name)}</title><style>{_STYLE}</style>'
    )
    parts = [head, f"<h1>Memory {_text(name)}</h1>", *_cards(found)]
    if not found.stats.counts.messages:
        parts.append("<p>Nothing has been added yet.</p>")
    parts += [*_ladder(found, colours, sheet_pages), *_time(found), *_pages(found, colours), *_recalls(found), *_receipts(found)]
    return "".join([*parts, "</html>\n"])


def _text(given: str) -> str:
    """Text of others, as text: nothing in it is markup, and nothing hides or reorders what stands around it."""
    return f"<bdi>{escape(clean(given))}</bdi>"


def _colours(steps: Sequence[Step]) -> dict[str, str]:
    """From blue, the sharpest, to red; what is no picture or text any more is grey."""
    shown = [step.name for step in steps if step.tier is not None and step.tier.kind != "stored"]
    hues = {name: f"hsl({215 - 200 * place / max(len(shown) - 1, 1):.0f} 62% 50%)" for place, name in enumerate(shown)}
    return {step.name: hues.get(step.name, _GREY) for step in steps}


def _cards(found: Overview) -> Iterator[str]:
    counts, shown = found.stats.counts, found.tokens
    ratio = counts.message_tokens / max(shown, 1)
    share = f"{ratio:.{int(ratio < 20)}f} times less" if shown and ratio > 1 else "no less"
    cards = [
        (f"{counts.messages:,}", f"message{'s' * (counts.messages != 1)}, {counts.message_tokens:,} tokens as text"),
        (f"{shown:,}", f"tokens shown now, of a budget of {found.stats.budget:,}"),
        (share, "than the whole history as text"),
        (f"{counts.pages:,}", f"page{'s' * (counts.pages != 1)}, {plural(counts.readings, 'row')} of them read so far"),
        (f"{(counts.blob_bytes + counts.database_bytes) / 1e6:,.1f} MB", f"on disk, {plural(counts.blobs, 'file')} and a database"),
    ]
    yield f'<div class="cards">{"".join(f"<div><b>{big}</b><span>{small}</span></div>" for big, small in cards)}</div>'


# --- the ladder ---------------------------------------------------------------------------------------------------------------


def _ladder(found: Overview, colours: dict[str, str], sheet_pages: int) -> Iterator[str]:
    yield "<h2>The ladder</h2><p>A page ages down these steps. What each keeps was measured on the model that reads it.</p>"
    yield from _stack(found, colours)
    heads = (
        "<th>step<th>at<th class=n>tokens<th>characters read<th>lines without an error<th class=n>pages now<th class=n>tokens now"
    )
    rows = "".join(_row(step, colours[step.name], sheet_pages) for step in found.steps)
    yield f'<div class="box scroll"><table id="ladder"><thead><tr>{heads}</thead><tbody>{rows}</tbody></table></div>'


def _stack(found: Overview, colours: dict[str, str]) -> Iterator[str]:
    """Where the tokens of a context go."""
    blue = colours.get("text", _GREY)
    parts = [("messages that are on no page", found.text_messages, found.text_tokens, blue)]
    parts += [(f"pages as {step.name}", step.pages, step.tokens, colours[step.name]) for step in found.steps]
    shown = [part for part in parts if part[2]]
    if not shown:
        return
    total = max(found.stats.budget, sum(tokens for _, _, tokens, _ in shown))
    bars = "".join(f'<i style="--tier:{c};width:{100 * tokens / total:.2f}%"></i>' for _, _, tokens, c in shown)
    names = "".join(
        f'<span><i class="dot" style="--tier:{c}"></i>{count:,} {_text(what)}: {tokens:,} tokens</span>'
        for what, count, tokens, c in shown
    )
    free = f"<span>free: {total - sum(part[2] for part in shown):,}</span>"
    yield f'<div class="stack">{bars}</div><div class="legend" style="margin-bottom:.8rem">{names}{free}</div>'


def _row(step: Step, colour: str, sheet_pages: int) -> str:
    fidelity = step.fidelity
    at, cost = _place(step, sheet_pages)
    guess = "" if fidelity is None or fidelity.basis == "measured" else f" ({fidelity.basis})"
    score = _bar(None if fidelity is None else fidelity.score) + guess
    exact = _bar(None if fidelity is None else fidelity.exact_lines)
    name = f'<i class="dot"></i>{_text(step.name)}'
    row = f"<td>{name}<td>{at}<td class=n>{cost}<td>{score}<td>{exact}<td class=n>{step.pages:,}<td class=n>{step.tokens:,}"
    return f'<tr style="--tier:{colour}"{"" if step.pages else " class=none"}>{row}</tr>'


def _place(step: Step, sheet_pages: int) -> tuple[str, str]:
    """What a page is there, and what it costs."""
    tier = step.tier
    if tier is None:
        return ("drawn, and not shown yet" if step.name == "new" else "a step of another model"), ""
    if tier.kind == "page":
        side, beside = f"{tier.side / 24:.0f}px", " and its facts" * tier.has_facts
        return (
            f'<span class="size" style="width:{side};height:{side}"></span> {tier.side} px',
            f"{tier.tokens}{beside}",
        )
    cost = {"sheet": f"{tier.tokens} / {sheet_pages}", "stored": "0"}.get(tier.kind, "its own")
    return _WORDS[tier.kind].format(sheet_pages), cost


def _bar(share: float | None) -> str:
    if share is None:
        return ""
    return f'<span class="bar"><i style="width:{100 * share:.1f}%"></i></span>{share:.1%}'


# --- over time ----------------------------------------------------------------------------------------------------------------


def _time(found: Overview) -> Iterator[str]:
    if len(found.history) < 2:
        return
    top = found.history[-1][1]
    history: list[Point] = [(float(seq), float(max(tokens, 1))) for seq, tokens in found.history if tokens * _FAR >= top]
    changed = _thinned([each for each in found.receipts if each.receipt.tokens_after > 0])
    first, last, budget = history[0][0], history[-1][0], float(found.stats.budget or 1)
    shown = {float(each.message): float(each.receipt.tokens_after) for each in changed} | {last: float(max(found.tokens, 1))}
    before = {float(each.message): float(max(each.receipt.tokens_before, 1)) for each in changed}
    series: dict[str, list[Point]] = {
        "as text": history,
        "shown": list(shown.items()),
        "before ageing": list(before.items()),
        "budget": [(first, budget), (last, budget)],
    }
    values = [tokens for points in series.values() for _, tokens in points]
    y = _scale(min(values), max(values))
    x = Axis("messages", [*(tick for tick in nice_ticks(first, last) if tick < last - (last - first) / 10), last])
    chart = line_chart("Tokens over the history", series, x, y)
    told = "Each change stands at the newest message whose page it touched; receipts below say what it did."
    yield f"<h2>Tokens over time</h2><p>{told}</p>"
    yield f'<div class="chart" id="time">{chart}</div>'


def _thinned(receipts: Sequence[Dated], most: int = 80) -> list[Dated]:
    step = -(-len(receipts) // most) or 1
    return list(receipts[::-1][::step][::-1])


def _scale(low: float, high: float) -> Axis:
    if high / low < _LOG:
        return Axis("tokens", nice_ticks(0.0, high))
    steps = [float(digit * 10**power) for power in range(13) for digit in (1, 2, 5)]
    first = max([step for step in steps if step <= low], default=1.0)
    last = min([step for step in steps if step >= high], default=steps[-1])
    return Axis("tokens (logarithmic)", [step for step in steps if first <= step <= last], is_log=True)


# --- pages --------------------------------------------------------------------------------------------------------------------


def _pages(found: Overview, colours: dict[str, str]) -> Iterator[str]:
    if not found.stats.counts.pages:
        return
    told = "Oldest first, as large as they are shown to the model. Pale ones it does not see. Choose one to look closer."
    yield f"<h2>Pages</h2><p>{told}</p>"
    if found.older:
        told = ", ".join(f"{count:,} {_text(tier)}" for tier, count in found.older)
        count = sum(count for _, count in found.older)
        yield f'<p id="older">{plural(count, "older page")} {"is" if count == 1 else "are"} not shown here: {told}.</p>'
    yield f'<div class="pages">{"".join(_figure(each, colours.get(each.page.tier, _GREY)) for each in found.pages)}</div>'


def _figure(each: Shown, colour: str) -> str:
    page = each.page
    name = handle(page.number)
    is_text = page.tier in ("text", "new")
    side = WIDE if is_text else max(each.side * WIDE / 512, 36)
    messages = f"{page.first}" if page.first == page.last else f"{page.first} to {page.last}"
    marks = (" pinned" if each.is_pinned else "") + (f", recalled {page.hits} times" if page.hits else "")
    title = escape(clean(f"{name}: messages {messages}, {page.tier}, {page.tokens} tokens{marks}\n{page.factsheet}"))
    if each.png is None:
        picture = f'<div class="gone" title="{escape(clean(each.damage))}">damaged</div>'
    else:
        picture = f'<img alt="page {name}" loading="lazy" src="data:image/png;base64,{base64.b64encode(each.png).decode()}">'
    label = f"{name}{' &#128204;' if each.is_pinned else ''}" + (
        f" {_text(page.tier)} m{messages.replace(' to ', '-')}" if side > 70 else ""
    )
    kind = ' class="away"' if not each.side and not is_text else ""
    style = f"--tier:{colour};--shown:{min(side, 2 * WIDE):.0f}"
    return (
        f'<figure id="{name}" tabindex="0"{kind} style="{style}" title="{title}">{picture}<figcaption>{label}</figcaption></figure>'
    )


# --- recalls and receipts -----------------------------------------------------------------------------------------------------


def _recalls(found: Overview) -> Iterator[str]:
    yield "<h2>What was recalled</h2>"
    if not found.recalled:
        yield "<p>Nothing yet.</p>"
        return
    rows = "".join(map(_recall, found.recalled))
    heads = "<th>page<th class=n>times<th>now<th>first lines that were read of it"
    yield f'<div class="box scroll"><table id="recalled"><thead><tr>{heads}</thead><tbody>{rows}</tbody></table></div>'


def _recall(each: Recalled) -> str:
    page = each.page
    lines = "<br>".join(f"<code>{_text(line)}</code>" for line in each.lines) or "none: its text was there"
    name = handle(page.number)
    return f'<tr><td><a href="#{name}">{name}</a><td class=n>{page.hits:,}<td>{_text(page.tier)}<td class="wide">{lines}</tr>'


def _receipts(found: Overview) -> Iterator[str]:
    yield "<h2>Receipts</h2>"
    if not found.receipts:
        yield "<p>Nothing has changed yet.</p>"
        return
    newest = found.receipts[-RECEIPTS:][::-1]
    if len(found.receipts) > len(newest):
        yield f"<p>The newest {len(newest):,} of {len(found.receipts):,}.</p>"
    yield f'<div class="box" id="receipts">{"".join(map(_receipt, newest))}</div>'


def _receipt(each: Dated) -> str:
    receipt = each.receipt
    moved = Counter((change.from_tier, change.to_tier) for change in receipt.changes)
    steps = ", ".join(f"{count:,} {_text(start)} &rarr; {_text(end)}" for (start, end), count in moved.items())
    tokens = f"{receipt.tokens_before:,} &rarr; {receipt.tokens_after:,} of {receipt.budget:,} tokens" if receipt.changes else ""
    head = "; ".join(part for part in (tokens, steps, *map(_text, receipt.notes[:1])) if part)
    changes = [
        _text(f"{change.page}: {change.from_tier} to {change.to_tier}, {change.why}") for change in receipt.changes[:CHANGES]
    ]
    rest = len(receipt.changes) - CHANGES
    listed = [*changes, *([f"and {rest:,} more"] if rest > 0 else []), *map(_text, receipt.notes)]
    body = "".join(f"<li>{item}</li>" for item in listed)
    return f"<details><summary>{each.number}. {_when(each.time)}: {head}</summary><ul>{body}</ul></details>"


def _when(time: float) -> str:
    try:
        return datetime.fromtimestamp(time, UTC).strftime("%Y-%m-%d %H:%M:%S UTC")
    except (ValueError, OverflowError, OSError):  # a clock that shows no year of a calendar
        return f"{time:g} s"
