"""What `optmem bench memory` found, for people: one table, a page of Markdown with all of them, and the chart."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from optmem.bench.answers import Rate
from optmem.bench.histories import FILLERS, SUITES
from optmem.bench.memory_run import BANDS, PLACE_GIVEN, READ, Outcome, Result, confidences, to_json
from optmem.bench.paint import paint
from optmem.bench.remembered import LIMIT
from optmem.train.charts import Axis, Point, line_chart
from optmem.train.evaluate_report import aligned, markdown, rate
from optmem.train.fidelity import write

NAME = "bench-memory"  # of all files
COVERING = ("optmem, disk", "optical", "pages pooled to 16")  # series of the chart that may lie on others
SHORT = {"key-value": "kv", "distractors": "similar", "updates": "latest"}


def shown(found: Rate, *, with_interval: bool = True) -> str:
    """A share with its interval, or a dash for nothing."""
    if found.value is None:
        return "–"
    low, high = found.interval
    return f"{rate(found.value)} [{rate(low)}, {rate(high)}]" if with_interval else rate(found.value)


# --- tables ---------------------------------------------------------------------------------------------------------------------


def main_rows(result: Result) -> list[list[str]]:
    """Every method at every budget: recall of all, of each class of text, of each suite; and false hits on what is absent."""
    suites = [suite for suite in SUITES if suite != "absent"]
    rows = [["method", "budget", "n", "recall [95 %]", *FILLERS, *(SHORT.get(suite, suite) for suite in suites), "false hits"]]
    for method in result.methods():
        for budget in result.budgets(method):
            some = [each for each in result.outcomes if each.method == method and each.budget == budget]
            rows.append(_row(method, budget, some, suites))
    return rows


def _row(method: str, budget: int, some: Sequence[Outcome], suites: Sequence[str]) -> list[str]:
    answers = [each for each in some if each.asks_for_something]
    absent = [each for each in some if not each.asks_for_something]
    by_filler = [shown(_rate(each for each in answers if each.filler == filler), with_interval=False) for filler in FILLERS]
    by_suite = [shown(_rate(each for each in answers if each.suite == suite), with_interval=False) for suite in suites]
    false = f"{sum(each.is_found for each in absent)}/{len(absent)}" if absent else "–"
    return [method, str(budget), str(len(answers)), shown(_rate(answers)), *by_filler, *by_suite, false]


def _rate(some: Iterable[Outcome]) -> Rate:
    found = [each.is_right for each in some]
    return Rate(sum(found), len(found))


def beside_rows(result: Result) -> list[list[str]]:
    """Memories that keep nothing but what the budget holds, beside the best plain rule that does so too."""
    ours = [form.name for form in result.plan.forms if not form.keeps_sharp]
    plain = [name for name in result.methods() if name == "truncation" or name.startswith(PLACE_GIVEN)]
    rows = [["budget", "best plain rule", "its recall [95 %]", *ours]]
    for budget in result.plan.budgets:
        found = {name: _at(result, name, budget) for name in (*plain, *ours)}
        best = max(plain, key=lambda name: found[name].value or 0.0)
        rows.append([str(budget), best, shown(found[best]), *(_beside(found[name], found[best]) for name in ours)])
    return rows


def _at(result: Result, name: str, budget: int) -> Rate:
    return result.rate(lambda each: each.method == name and each.budget == budget and each.asks_for_something)


def _beside(found: Rate, other: Rate) -> str:
    if found.value is None or other.value is None:
        return "–"
    word = "above it" if found.value > other.value else "within its interval" if found.value >= other.interval[0] else "below it"
    return f"{rate(found.value)}, {'the same' if found.value == other.value else word}"


def depth_rows(result: Result) -> list[list[str]]:
    """Recall by where the answer stands, at the budget in the middle."""
    budget = result.plan.budgets[len(result.plan.budgets) // 2]
    thirds = ("oldest third", "middle", "newest third")
    rows = [[f"method, {budget} tokens", *thirds]]
    for method in result.methods():
        some = [each for each in result.outcomes if each.method == method and each.budget == budget and each.asks_for_something]
        parts = [_rate(each for each in some if min(int(each.depth * 3), 2) == third) for third in range(3)]
        rows.append([method, *(f"{shown(part)} of {part.of}" for part in parts)])
    return rows


def faded_rows(result: Result) -> list[list[str]]:
    """Whole pages at every encoding."""
    rows = [["page", "text", "pages", "tokens", "lines [95 %]", "of", "1 - NED [95 %]"]]
    for each in result.faded:
        like = f"{rate(each.likeness)} [{rate(each.low)}, {rate(each.high)}]"
        rows.append(
            [each.encoding, each.filler, str(each.pages), str(each.fed_tokens), shown(each.lines), str(each.lines.of), like]
        )
    return rows


def grid_rows(result: Result) -> list[list[str]]:
    """Depth by pages by tier: needles found by a glance / needles read right."""
    depths = sorted({cell.depth for cell in result.grid})
    rows = [["pages", "shown at", *(f"depth {depth:g}" for depth in depths), "found [95 %]", "right [95 %]"]]
    for pages, side in dict.fromkeys((cell.pages, cell.side) for cell in result.grid):
        cells = [cell for cell in result.grid if (cell.pages, cell.side) == (pages, side)]
        found = Rate(sum(cell.found.hits for cell in cells), sum(cell.found.of for cell in cells))
        right = Rate(sum(cell.right.hits for cell in cells), sum(cell.right.of for cell in cells))
        each = [f"{cell.found.hits}/{cell.right.hits} of {cell.found.of}" for cell in cells]
        rows.append([str(pages), str(side), *each, shown(found), shown(right)])
    return rows


def confidence_rows(result: Result) -> list[list[str]]:
    """What was read, by how sure the reader was: of the hits of each memory, and of rows of pages at each side."""
    bands = [f"at {low:g} and above" if high > 1 else f"{low:g} to {high:g}" for low, high in BANDS]
    rows = [["exact among what was read", *bands]]
    hits = [each for name, some in result.sure.items() if not name.startswith(READ) for each in some]
    read = [each for name, some in result.sure.items() if name.startswith(READ) for each in some]
    for name, some in (result.sure | {"all hits": hits, "all rows of pages": read}).items():
        rows.append([name, *map(_band, confidences(some))])
    return rows


def _band(found: dict[str, Any]) -> str:
    rate_there = Rate(found["hits"], found["of"])
    return f"{shown(rate_there)} of {found['of']:,}, said {rate(found['mean'])}" if found["of"] else "–"


def size_rows(result: Result) -> list[list[str]]:
    """Bytes a page beside tokens a page."""
    rows = [["text", "pages", "text tokens", "fed tokens", "text, bytes", "zipped", "PNG", "tokens int8", "tokens bf16"]]
    for each in result.sizes:
        values = (each.text_tokens, each.fed_tokens, each.text, each.zipped, each.pictures, each.int8_tokens, each.tokens)
        rows.append([each.filler, str(each.pages), *(f"{value / each.pages:,.0f}" for value in values)])
    return rows


def legend(result: Result) -> str:
    """What the table says, in words."""
    plan = result.plan
    return f"""\
{plan.histories} histories of each class of text, {plan.size.messages} messages each, seed {plan.seed}; Wilson's intervals.
Recall: answers that are exactly right, parsed where they are JSON, a table's row or code.  False hits: answers to what nobody told.
"disk": the sharp pages, or all text, lie on the disk and are looked up for every question ({LIMIT} lines, or as many as the budget
holds of text).  All others keep nothing but what the budget holds; "{PLACE_GIVEN}…" are told on which rows the answer stands.
"optical" is optmem with index="optical": no text of any page, no factsheets.  "optmem" has both, "no facts" has no factsheets."""


def table(result: Result) -> str:
    """For the terminal."""
    took = ", ".join(f"{name} {each.milliseconds:.0f} ms" for name, each in result.asking.items())
    speed = (
        f"encode {result.encoding.milliseconds:.0f} ms a page, read {result.reading.milliseconds:.1f} ms a row; a question: {took}"
    )
    return f"{aligned(main_rows(result))}\n\n{legend(result)}\n{speed}; {_took(result)} in all"


def _took(result: Result) -> str:
    return f"{result.seconds:.0f} s, {result.cpu_seconds:.0f} s of work"


def report(result: Result, machine: str) -> str:
    """All tables as Markdown."""
    sections = {
        "Recall against tokens kept": f"![recall against tokens kept]({NAME}.svg)\n\n{markdown(main_rows(result))}",
        "Beside the best plain rule": markdown(beside_rows(result)),
        "By depth in the history": markdown(depth_rows(result)),
        "A page as it ages": markdown(faded_rows(result)),
        "A needle by depth, pages and tier": "Found by a glance / read right, of so many.\n\n" + markdown(grid_rows(result)),
        "Confidence": markdown(confidence_rows(result)),
        "Bytes and tokens, a page": markdown(size_rows(result)),
    }
    model = f"Model `{result.model}`, corpus `{result.corpus}` (held out); {machine}; {_took(result)}."
    head = f"# A memory's recall\n\n{model}\n\n{legend(result)}\n"
    return head + "".join(f"\n## {title}\n\n{body}\n" for title, body in sections.items())


# --- the chart ------------------------------------------------------------------------------------------------------------------


def chart(result: Result) -> str:
    """Recall against tokens kept, an SVG."""
    methods = [name for name in result.methods() if not name.startswith(PLACE_GIVEN)]
    methods += [PLACE_GIVEN + name for name in ("shown at 512", "shown at 256", "pooled to 16")]
    series = {name.replace(PLACE_GIVEN, "pages "): _points(result, name) for name in methods}
    ticks = [float(budget) for budget in result.plan.budgets]
    x = Axis("tokens kept of the history", ticks, is_log=True)
    y = Axis("exact answers", [0, 0.2, 0.4, 0.6, 0.8, 1.0])
    title = "Recall of single lines, all suites and classes of text"
    return line_chart(title, series, x, y, dashed=COVERING)


def _points(result: Result, method: str) -> list[Point]:
    found = []
    for budget in result.budgets(method):
        share = result.rate(lambda each, b=budget: each.method == method and each.budget == b and each.asks_for_something)  # type: ignore[misc]
        if share.value is not None:
            found.append((float(budget), share.value))
    return found


def save(result: Result, folder: Path, machine: str) -> list[Path]:
    """Writes the report, the chart twice and the JSON; raises OutputError where that cannot be."""
    drawn = chart(result)
    files: dict[Path, str | bytes] = {
        folder / f"{NAME}.md": report(result, machine),
        folder / f"{NAME}.svg": drawn,
        folder / f"{NAME}.png": paint(drawn),
        folder / f"{NAME}.json": to_json(result) + "\n",
    }
    for file, content in files.items():
        write(file, content)
    return list(files)
