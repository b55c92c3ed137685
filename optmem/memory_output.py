"""What `optmem memory` prints: contexts, hits and what changed, for people and as JSON."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict
from typing import Any

import click

from optmem.memory.check import Verified
from optmem.memory.context import Context, FactsItem, Item, NoteItem, PageItem, TextItem
from optmem.memory.pricing import find_reader
from optmem.memory.providers import Payload
from optmem.memory.recall import Hit
from optmem.memory.stats import Stats

Json = dict[str, Any]
_KEPT = "\n\t"


def print_json(result: Any) -> None:
    """One JSON value on stdout; lone surrogates are escaped, so any text passes."""
    click.echo(json.dumps(result, indent=2))


def clean(text: str) -> str:
    """Text for a terminal: what would steer it is shown as an escape, so that no message can write over what we say."""
    return "".join(each if each in _KEPT or each.isprintable() else ascii(each)[1:-1] for each in text)


def plural(count: int, word: str) -> str:
    """How many there are."""
    return f"{count:,} {word}{'s' * (count != 1)}"


def span(first: int, last: int) -> str:
    """Which messages."""
    return f"message {first}" if first == last else f"messages {first} to {last}"


# --- contexts -----------------------------------------------------------------------------------------------------------------


def show_context(context: Context) -> str:
    """For people: every item under a line that says what it is and what it costs, then the sum and what changed."""
    parts = [f"-- {_head(item)}\n{clean(_text(item))}".rstrip() for item in context.items]
    return "\n\n".join([*parts, f"{context}\n{clean(str(context.receipt))}"])


def _head(item: Item) -> str:
    cost = plural(item.tokens, "token")
    if isinstance(item, TextItem):
        return f"message {item.seq}, {item.message.role}, {cost}"
    if isinstance(item, FactsItem):
        return f"facts of {item.page}, {span(*item.messages)}, {cost}"
    if isinstance(item, NoteItem):
        return f"for the model, {cost}"
    what = f"{', '.join(item.pages)}, {span(*item.messages)}"
    read = "not drawn by optmem" if item.fidelity is None else f"{item.fidelity:.1%} of lines can be read exactly"
    return f"{what}, {item.tier} at {item.width} x {item.height} pixels, {cost}, {read}"


def _text(item: Item) -> str:
    if isinstance(item, TextItem):
        return item.message.text()
    return item.facts if isinstance(item, PageItem) else item.text


def describe_item(item: Item, file: str | None) -> Json:
    """As JSON.

    file   that holds its picture, where that was asked for
    """
    if isinstance(item, TextItem):
        return {"kind": "text", "message": item.seq, "tokens": item.tokens, "content": item.message.given}
    if isinstance(item, FactsItem):
        return {"kind": "facts", "page": item.page, "messages": item.messages, "tokens": item.tokens, "text": item.text}
    if isinstance(item, NoteItem):
        return {"kind": "note", "tokens": item.tokens, "text": item.text}
    told = {name: getattr(item, name) for name in ("pages", "messages", "tier", "width", "height", "tokens", "fidelity", "facts")}
    return {"kind": "pages", **told, "file": file}


def describe_context(context: Context, files: dict[int, str]) -> Json:
    """As JSON.

    files   that hold the pictures of items, by the item's place
    """
    return {
        "budget": context.budget,
        "tokens": context.tokens,
        "counted_by": context.reader,
        "digest": context.digest(),
        "items": [describe_item(item, files.get(number)) for number, item in enumerate(context.items)],
        "receipt": context.receipt.to_json(),
    }


def describe_payload(reader: str, payload: Payload) -> Json:
    """What a request costs at its provider, as JSON, with its body."""
    prices = [
        {"image_tokens": price.image_tokens, "text_tokens": price.text_tokens, "as_picture": is_shown}
        for price, is_shown in zip(payload.prices, payload.pictured, strict=True)
    ]
    told = {
        "reader": find_reader(reader).name,
        "provider": payload.provider,
        "tokens_estimated": payload.tokens,
        "notes": list(payload.notes),
    }
    return {**told, "saved": payload.saved, "prices": prices, "body": payload.body}


def show_cost(context: Context, reader: str, payload: Payload) -> str:
    """For people: what it costs, and what pictures save where the text is there too."""
    lines = [str(context), f"about {payload.tokens:,} tokens at {find_reader(reader).name}"]
    if payload.prices:
        cheaper = sum(price.is_worth_it for price in payload.prices)
        lines.append(f"of {plural(len(payload.prices), 'run')} of pages whose text is kept {cheaper:,} are cheaper as pictures")
        change = f"saves {payload.saved:,}" if payload.saved >= 0 else f"costs {-payload.saved:,} more"
        lines.append(f"{sum(payload.pictured):,} of them are given so, which {change} tokens")
    return "\n".join([*lines, *payload.notes, clean(str(context.receipt))])


# --- the rest -----------------------------------------------------------------------------------------------------------------


def show_hit(hit: Hit) -> str:
    """A line that answers, and below it where it stands and how sure it is."""
    first, stop = hit.lines
    rows = f"row {first}" if stop - first == 1 else f"rows {first} to {stop - 1}"
    where = f"{hit.page}, {rows}" if hit.page else rows.replace("row", "line")
    shown = ", ".join(map(str, hit.messages))
    sure = "facts that were kept as text" if hit.source == "factsheet" else f"{hit.source}, confidence {hit.confidence:.3f}"
    said = f"{where}, message {shown}, {sure}, fit {hit.fit:.2f}"
    if hit.source != "verbatim" and hit.fidelity is not None:
        said += f", {hit.fidelity:.1%} of such lines are exact"
    return "\n".join([clean(hit.text), *(f"  {each}" for each in _beside(hit, said))])


def _beside(hit: Hit, said: str) -> Iterator[str]:
    yield said
    if hit.facts and hit.source != "factsheet":
        yield f"facts: {clean('  '.join(hit.facts))}"
    if hit.note:
        yield clean(hit.note)


def describe_hit(hit: Hit) -> Json:
    """As JSON."""
    return asdict(hit)


def show_stats(stats: Stats) -> str:
    """A line for each thing that there is."""
    counts = stats.counts
    tiers = ", ".join(f"{count:,} {tier}" for tier, count in sorted(stats.tiers.items(), key=lambda each: -each[1]))
    size = (counts.blob_bytes + counts.database_bytes) / 1e6
    return "\n".join(
        [
            f"messages   {counts.messages:,}, {counts.message_tokens:,} tokens as text; {stats.waiting_messages:,} on no page yet",
            f"pages      {counts.pages:,}{': ' if tiers else ''}{tiers}",
            f"budget     {stats.budget:,} tokens",
            f"found by   {'a glance over tokens' if stats.index == 'optical' else f'words of {counts.lines:,} lines'}",
            f"read       {counts.readings:,} rows so far",
            f"changes    {plural(counts.receipts, 'receipt')}",
            f"on disk    {size:,.1f} MB, {plural(counts.blobs, 'file')} and a database",
            f"keeps      {'every message as it came' if stats.archive else 'text until pages show it'};"
            f" {'the sharpest pixels of every page' if stats.keep_sharp else 'pixels as sharp as they are shown'}",
        ]
    )


def show_verified(found: Verified) -> str:
    """What was looked at, and every problem."""
    searched = f"{plural(found.blobs, 'checksum')}, {found.search.bytes:,} bytes in {plural(found.search.files, 'file')}"
    problems = [f"{problem.kind}: {problem.what}" for problem in found.problems]
    traces = [f"found: text {trace.needle + 1} is in {trace.file}" for trace in found.search.traces]
    head = "whole" if found.is_clean else plural(len(problems) + len(traces), "problem")
    return "\n".join([f"{head}: {searched} were looked at", *map(clean, problems + traces)])
