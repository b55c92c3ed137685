"""`optmem memory`: a long history in a folder, from the command line."""

from __future__ import annotations

import json
import os
import re
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, get_args

import click

from optmem.engine import Engine
from optmem.errors import InputError, OutputError, StoreDamagedError
from optmem.files import check_writable
from optmem.items import watched
from optmem.memory.context import Context, PageItem
from optmem.memory.memory import Memory
from optmem.memory.policy import ROLES, Policy
from optmem.memory.pricing import DEFAULTS, READERS, find_reader
from optmem.memory.settings import Index, Settings
from optmem.memory_input import Kind, read_sources
from optmem.memory_output import (
    clean,
    describe_context,
    describe_hit,
    describe_payload,
    plural,
    print_json,
    show_context,
    show_cost,
    show_hit,
    show_stats,
    show_verified,
)
from optmem.memory_report import THUMBNAILS, save_report

Command = Callable[..., Any]
NEW = Settings()
MOST_SELECTED = 1_000_000  # messages of one FIRST:END
NOTHING_FOUND = 1  # as grep leaves


def register(cli: click.Group) -> None:
    """Adds the group."""
    cli.add_command(memory)


@click.group()
def memory() -> None:
    """Keep a long history inside a budget of tokens: recent messages as text, older ones as pages, all of it read back on demand.

    PATH is the folder of a memory.  Messages are named by the numbers that `add` gives, pages as p12.

    \b
    The words of a policy, as `add --policy` takes them:
      trigger         tokens shown above which pages are made smaller; null is the budget
      keep            newest groups that stay as they are; null is as many as an eighth of what is above 512 tokens has place for
      keep_share      of the trigger that a number of them may take
      clear_at_least  tokens freed whenever anything changes: each change costs a prompt cache
      exclude         tools whose calls and results stay text
      exclude_roles   roles whose messages stay text: system and developer, unless said otherwise
      half_life       groups after which a page counts half
      facts           tokens of a page's factsheet, at most; 0 is none
    """


_path = click.argument("path")
_as_json = click.option("--json", "as_json", is_flag=True, help="Print the result as JSON.")
_read_only = click.option(
    "--read-only", is_flag=True, help="Beside a process that writes: nothing is changed, cached or counted in the memory."
)


def _model(command: Command) -> Command:
    """Of the reader; the commands get an engine, or None for nano as it is, which is loaded when it is first needed."""
    chosen = click.option("--model", default="nano", show_default=True, help="Reads pages: nano, or a folder in the hub layout.")
    on = click.option("--device", default="auto", show_default=True, help="auto, cpu or cuda.")
    held = click.option(
        "--dtype", default="auto", show_default=True, help="auto, float32, bfloat16, float16, int8 (CPU), fp8 (GPU)."
    )
    return chosen(on(held(command)))


def _engine(model: str, device: str, dtype: str) -> Engine | None:
    if (model, device, dtype) == ("nano", "auto", "auto"):
        return None
    return Engine.from_pretrained(model, device=device, dtype=dtype)


def _opened(path: str, engine: Engine | None = None, *, read_only: bool | None = None) -> Memory:
    """A memory that is there.

    read_only   whether that was asked for; None is a command that cannot be
    """
    try:
        return Memory.open(path, engine, mode="read" if read_only else "write", create=False, watch=watched)
    except OutputError as error:
        if read_only or os.access(path, os.W_OK):
            raise
        hint = "give --read-only" if read_only is False else "this command needs one that can be written: copy it to such a place"
        raise OutputError(f"{error}; where the memory's folder is read-only, {hint}") from None


def _selected(names: Sequence[str]) -> list[int | str]:
    """Numbers, FIRST:END, and names of pages.  Raises InputError for a range that holds nothing or too much."""
    found: list[int | str] = []
    for name in names:
        ends = re.fullmatch(r"([0-9]{1,18})(?::([0-9]{1,18}))?", name)
        if ends is None:
            found.append(name)
            continue
        first = int(ends[1])
        end = int(ends[2]) if ends[2] else first + 1
        if not 0 < end - first <= MOST_SELECTED:
            raise InputError(f"messages are FIRST:END with END behind FIRST, at most {MOST_SELECTED:,} of them, got {name!r}")
        found += range(first, end)
    return found


# --- adding -------------------------------------------------------------------------------------------------------------------


@memory.command()
@_path
@click.argument("sources", nargs=-1, required=True)
@click.option("--kind", type=click.Choice(get_args(Kind)), help="What SOURCES hold.  [default: by suffix; stdin: messages]")
@click.option("--role", type=click.Choice(ROLES), default="user", show_default=True, help="Who says what is text or a picture.")
@click.option("--budget", type=int, help=f"Tokens of a context, kept in the memory.  [default: {NEW.budget} for a new one]")
@click.option("--archive/--no-archive", default=None, help="Keep messages as they came also when pages show them.")
@click.option(
    "--keep-sharp/--let-blur",
    "keep_sharp",
    default=None,
    help="Keep the sharpest pixels of pages on the disk however small they are shown, or not.",
)
@click.option(
    "--index", type=click.Choice(get_args(Index)), help="Of a new memory: optical keeps no text of pages.  [default: text]"
)
@click.option("--reader", metavar="NAME", help=f"Whose tokens the budget counts: {', '.join(READERS)}.  [default: the model's]")
@click.option(
    "--policy",
    metavar="JSON",
    help='Words of the policy, as `optmem memory --help` tells them: \'{"keep": 4, "exclude": ["web_search"]}\'.',
)
@_model
@_as_json
def add(
    path: str,
    sources: Sequence[str],
    kind: Kind | None,
    role: str,
    budget: int | None,
    archive: bool | None,
    keep_sharp: bool | None,
    index: Index | None,
    reader: str | None,
    policy: str | None,
    model: str,
    device: str,
    dtype: str,
    as_json: bool,
) -> None:
    """Add what SOURCES hold (or - for stdin) to the memory at PATH, a new one where there is none.

    Messages in the shape of OpenAI or Anthropic come as a JSON list, as a request that has them, or one on every line.  A text, a
    picture and a PDF are a message each.  All of it is added, or nothing where something in it is wrong.
    """
    asked = None if policy is None else _policy(policy)
    given = read_sources(sources, role, kind)
    engine = _engine(model, device, dtype)
    with Memory.open(path, engine, budget, archive, asked, index, keep_sharp=keep_sharp, reader=reader) as opened:
        numbers = opened.add(list(watched(given, "adding", unit="message")))
    if as_json:
        print_json({"messages": numbers})
        return
    which = f": {numbers[0]:,} to {numbers[-1]:,}" if numbers else ""
    click.echo(f"{plural(len(numbers), 'message')} added{which}")


def _policy(given: str) -> Policy:
    try:
        found = json.loads(given)
    except (ValueError, RecursionError):
        found = None
    if not isinstance(found, dict):
        raise InputError(f"a policy is a JSON object such as '{{\"keep\": 4}}', got {given[:80]!r}")
    return Policy.from_json(found)


# --- what a model is to see ---------------------------------------------------------------------------------------------------


@memory.command()
@_path
@click.option("--budget", type=int, help="Tokens; with another than the memory's nothing ages for good.  [default: the memory's]")
@click.option(
    "--provider", metavar="NAME", help=f"Print the request of {', '.join(DEFAULTS)}, or of a reader: {', '.join(READERS)}."
)
@click.option(
    "--pictures/--texts",
    default=None,
    help="With --provider: all pages as pictures, or as text where it is kept.  [default: what costs less]",
)
@click.option("-o", "--output", type=click.Path(path_type=Path, file_okay=False), help="Folder for the pictures, as PNGs.")
@_read_only
@_model
@_as_json
def context(
    path: str,
    budget: int | None,
    provider: str | None,
    pictures: bool | None,
    output: Path | None,
    read_only: bool,
    model: str,
    device: str,
    dtype: str,
    as_json: bool,
) -> None:
    """Print what a model is to see of the memory at PATH, oldest first, what it costs, and what was made smaller for it.

    With --provider the body of its request is printed, and costs go to stderr.  The budget is then counted in its tokens, and where
    the memory's own is counted otherwise, nothing ages for good: `add --reader` names whose tokens a memory counts.
    What is not shown comes back with a larger budget, as sharp as it is kept.
    """
    if provider is not None:
        find_reader(provider)
    elif pictures is not None:
        raise click.UsageError("--pictures and --texts are about the request of a --provider: name one")
    if output is not None:
        check_writable(output)
    with _opened(path, _engine(model, device, dtype), read_only=read_only) as opened:
        found = opened.context(budget, provider)
    files = {} if output is None else _save_pictures(found, output)
    request = None if provider is None else found.payload(provider, pictures=pictures)
    if as_json:
        told = {} if request is None or provider is None else {"request": describe_payload(provider, request)}
        print_json(describe_context(found, files) | told)
    elif request is not None and provider is not None:
        print_json(request.body)
        click.echo(show_cost(found, provider, request), err=True)
    else:
        click.echo(show_context(found))


def _save_pictures(found: Context, folder: Path) -> dict[int, str]:
    """Writes them; the files by the place of their item."""
    files = {}
    for number, item in enumerate(found.items):
        if isinstance(item, PageItem):
            file = folder / f"{number:04}-{item.pages[0]}{'-and-more' * (len(item.pages) > 1)}.png"
            try:
                file.write_bytes(item.png)
            except OSError as error:
                raise OutputError(f"cannot write {file}: {error.strerror or error}") from None
            files[number] = str(file)
    return files


@memory.command()
@_path
@click.option("--budget", type=int, help="Tokens.  [default: the memory's]")
@_model
@_as_json
def age(path: str, budget: int | None, model: str, device: str, dtype: str, as_json: bool) -> None:
    """Draw what fills pages in the memory at PATH, and make pages smaller until they fit the budget."""
    with _opened(path, _engine(model, device, dtype)) as opened:
        receipt = opened.age(budget)
    print_json(receipt.to_json()) if as_json else click.echo(clean(str(receipt)))


# --- reading back -------------------------------------------------------------------------------------------------------------


@memory.command()
@_path
@click.argument("query")
@click.option("--limit", type=click.IntRange(1), default=3, show_default=True, help="Lines, at most.")
@click.option("--min-confidence", type=float, help="Where a page says it less surely, its facts are given.")
@click.option("--min-fit", type=float, help="Share of the question's words that must stand in a line, rare ones counting most.")
@_read_only
@_model
@_as_json
def recall(
    path: str,
    query: str,
    limit: int,
    min_confidence: float | None,
    min_fit: float | None,
    read_only: bool,
    model: str,
    device: str,
    dtype: str,
    as_json: bool,
) -> None:
    """Find the lines of the memory at PATH that answer QUERY, and read them.

    Each comes with where it stands, what it was read from, how sure that is, and how well it fits the question: what was never
    told has lines that fit badly, which --min-fit 0.5 leaves out.  Where nothing is found the exit code is 1.
    """
    with _opened(path, _engine(model, device, dtype), read_only=read_only) as opened:
        hits = opened.recall(query, limit, min_confidence, min_fit)
    if as_json:
        print_json([describe_hit(hit) for hit in hits])
    elif hits:
        click.echo("\n\n".join(map(show_hit, hits)))
    else:
        click.echo("optmem: nothing was found", err=True)
    if not hits:
        sys.exit(NOTHING_FOUND)


@memory.command()
@_path
@click.argument("pages", nargs=-1, required=True)
@_read_only
@_model
@_as_json
def read(path: str, pages: Sequence[str], read_only: bool, model: str, device: str, dtype: str, as_json: bool) -> None:
    """Read whole PAGES of the memory at PATH, as contexts and hits name them: p12.  Of several, each stands under its name."""
    with _opened(path, _engine(model, device, dtype), read_only=read_only) as opened:
        hits = [opened.read(page) for page in watched(pages, "reading")]
    if as_json:
        print_json([describe_hit(hit) for hit in hits])
        return
    for page, hit in zip(pages, hits, strict=True):
        if len(hits) > 1:
            click.echo(f"-- {clean(page)}")
        text = clean(hit.text) if sys.stdout.isatty() else hit.text  # a file or a pipe gets it as it is
        click.echo(text, nl=not text.endswith("\n"), color=True)


# --- what is kept, and what is not --------------------------------------------------------------------------------------------


@memory.command()
@_path
@click.argument("selectors", nargs=-1, required=True)
@click.option("--undo", is_flag=True, help="Let them age again.")
@_as_json
def pin(path: str, selectors: Sequence[str], undo: bool, as_json: bool) -> None:
    """Keep messages of the memory at PATH as sharp as they are now.  SELECTORS: numbers, FIRST:END, or pages as p12."""
    with _opened(path) as opened:
        numbers = (opened.unpin if undo else opened.pin)(_selected(selectors))
    if as_json:
        print_json({"messages": numbers})
    else:
        click.echo(f"{plural(len(numbers), 'message')} {'un' * undo}pinned: {', '.join(map(str, numbers))}")


@memory.command()
@_path
@click.argument("selectors", nargs=-1, required=True)
@click.option("--prove/--no-prove", default=True, show_default=True, help="Search every byte of the memory for it afterwards.")
@_model
@_as_json
def forget(path: str, selectors: Sequence[str], prove: bool, model: str, device: str, dtype: str, as_json: bool) -> None:
    """Erase messages of the memory at PATH for good, and with them the calls and results that belong to them.

    SELECTORS: numbers, FIRST:END, or pages as p12 for all that is on them.  What else stood on their pages is drawn anew.
    """
    with _opened(path, _engine(model, device, dtype)) as opened:
        gone = opened.forget(_selected(selectors), prove=prove)
    if as_json:
        print_json(asdict(gone))
    else:
        redrawn = f", drawn anew without them as {', '.join(gone.redrawn)}" if gone.redrawn else ""
        click.echo(f"{plural(len(gone.messages), 'message')} forgotten: {', '.join(map(str, gone.messages))}")
        click.echo(f"{plural(len(gone.pages), 'page')} erased{': ' * bool(gone.pages)}{', '.join(gone.pages)}{redrawn}")
        if gone.verified is not None:
            click.echo(f"searched for {plural(gone.searched, 'text and file')}: {show_verified(gone.verified)}")
    if prove and not gone.is_proven:
        raise StoreDamagedError("what was forgotten is still found, or the memory is not whole: see `optmem memory verify`")


# --- the rest -----------------------------------------------------------------------------------------------------------------


@memory.command()
@_path
@_as_json
def stats(path: str, as_json: bool) -> None:
    """Say how much the memory at PATH holds and how it is shown."""
    with _opened(path, read_only=True) as opened:
        found = opened.stats()
    print_json(found.to_json()) if as_json else click.echo(show_stats(found))


@memory.command()
@_path
@click.option("--absent", metavar="TEXT", multiple=True, help="A text that must not be anywhere in it; give it again for more.")
@_as_json
def verify(path: str, absent: Sequence[str], as_json: bool) -> None:
    """Check all of the memory at PATH: database, index and every checksum.  Where anything is wrong the exit code is 65."""
    with _opened(path) as opened:
        found = opened.verify(absent)
    print_json({"is_clean": found.is_clean, **asdict(found)}) if as_json else click.echo(show_verified(found))
    if not found.is_clean:
        sys.exit(StoreDamagedError.exit_code)


@memory.command()
@_path
@click.argument("file", type=click.Path(path_type=Path))
@_as_json
def export(path: str, file: Path, as_json: bool) -> None:
    """Write all of the memory at PATH to FILE, a tar of JSON lines and of the pages' files."""
    with _opened(path, read_only=True) as opened:
        done = opened.export(file)
    for number in done.damaged:
        click.echo(f"optmem: a file of page p{number} is damaged, and left out", err=True)
    if as_json:
        print_json(asdict(done))
    else:
        click.echo(f"{plural(done.messages, 'message')} and {plural(done.pages, 'page')} in {file}, {done.bytes:,} bytes")


@memory.command("import")
@_path
@click.argument("file", type=click.Path(path_type=Path))
@_as_json
def import_(path: str, file: Path, as_json: bool) -> None:
    """Make a new memory at PATH of FILE, as `optmem memory export` wrote it.  Nothing in it is trusted."""
    with Memory.import_(file, path, watch=watched) as opened:
        found = opened.stats()
    print_json(found.to_json()) if as_json else click.echo(show_stats(found))


@memory.command()
@_path
@click.option(
    "-o",
    "--output",
    type=click.Path(path_type=Path, dir_okay=False),
    default=Path("report.html"),
    show_default=True,
    help="The page: one file, that needs no network and no script.",
)
@click.option(
    "--pages", type=click.IntRange(0), default=THUMBNAILS, show_default=True, help="Newest pages to show; the rest are counted."
)
@_model
@_as_json
def report(path: str, output: Path, pages: int, model: str, device: str, dtype: str, as_json: bool) -> None:
    """Write a page to look at: the ladder, every page at its tier, tokens over time, what was recalled and what changed."""
    written = save_report(path, output, _engine(model, device, dtype), pages)
    if as_json:
        print_json({"file": str(output), "bytes": written})
    else:
        click.echo(f"the report is {output}, {written:,} bytes")
