"""The command line.  Results go to stdout, progress and errors to stderr; an error of ours is one sentence and an exit code."""

from __future__ import annotations

import json
import os
import sys
from collections import Counter
from contextlib import suppress
from pathlib import Path
from typing import Any, get_args

import click
from PIL import Image

from optmem import __version__, env, memory_commands, reading_commands
from optmem.bench import command as bench_command
from optmem.config import Alphabet, Cell, Kind, PageConfig, Style
from optmem.demo import LEGEND, ReadBack, read_all, run_demo, sample
from optmem.demo_report import write_report
from optmem.engine import Engine
from optmem.errors import OptmemError, OutputError, SourceNotFoundError
from optmem.inputs import read_input, read_inputs
from optmem.items import watched
from optmem.pages import Page, draw_pages, lay_out, read_source
from optmem.pixels import MODES, PIXELS_PER_TOKEN, Mode
from optmem.train import eval_command, synth_command, train_command

PAGES_AT_ONCE = 64
DEFAULTS = PageConfig()
as_json = click.option("--json", "as_json", is_flag=True, help="Print the result as JSON.")


def print_json(result: Any) -> None:
    """One JSON value on stdout; lone surrogates are escaped, so any text passes."""
    click.echo(json.dumps(result, indent=2))


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(__version__)
def cli() -> None:
    """Optical memory for language models: text as pages, pages as vision tokens, tokens read back on demand."""


@cli.command("env")
@click.option("--all", "all_devices", is_flag=True, help="List operators for devices that are not here too.")
@as_json
def env_command(all_devices: bool, as_json: bool) -> None:
    """Say what this machine has and which code serves each operator."""
    facts = env.report(all_devices=all_devices)
    print_json(facts) if as_json else click.echo(env.describe(facts))


def describe_page(page: Page, file: Path) -> dict[str, Any]:
    """What a page shows and where everything on it came from: the label beside the picture."""
    return {
        "file": str(file),
        "id": page.id,
        "height": page.height,
        "width": page.width,
        "missing": list(page.missing),
        "lines": [
            {"text": line.text, "box": line.box, "spans": [[span.source, span.start, span.end] for span in line.spans]}
            for line in page.lines
        ],
    }


def page_file(folder: Path, name: str, style: str, number: int) -> Path:
    """Where a page is written.  The whole name of its source is in it, so that x.md and x.py never meet."""
    return folder / f"{name}-{style}-{number:04}.png"


def save_pages(pages: list[Page], folder: Path, name: str) -> list[dict[str, Any]]:
    """Writes a PNG for every page, a batch at a time, and returns their descriptions."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        described = []
        batches = [pages[start : start + PAGES_AT_ONCE] for start in range(0, len(pages), PAGES_AT_ONCE)]
        drawn = watched(range(len(pages)), "drawing")
        for batch in batches:
            for page, pixels in zip(batch, draw_pages(batch), strict=True):
                file = page_file(folder, name, page.style, page.index + 1)
                Image.fromarray(pixels).save(file)
                described.append(describe_page(page, file))
                next(drawn)
        for style, count in Counter(page.style for page in pages).items():
            while (stale := page_file(folder, name, style, count + 1)).exists():
                stale.unlink()  # the next page of a longer run of the same source before this one
                count += 1
    except OSError as error:
        raise OutputError(f"cannot write to {folder}: {error.strerror or error}") from None
    return described


@cli.command()
@click.argument("file")
@click.option(
    "-o",
    "--output",
    type=click.Path(path_type=Path, file_okay=False),
    default=Path("pages"),
    show_default=True,
    help="Folder for the PNGs.",
)
@click.option("--style", type=click.Choice(get_args(Style)), default=DEFAULTS.style, show_default=True, help="Look of the pages.")
@click.option(
    "--mode", type=click.Choice([name for name, mode in MODES.items() if not mode.is_tiled]), help="Square pages of a model's mode."
)
@click.option("--size", type=int, default=None, help="Square pages of this many pixels.  [default: 512]")
@click.option(
    "--cell",
    type=click.Choice(get_args(Cell)),
    default=DEFAULTS.cell,
    show_default=True,
    help="dense, packed: width x height of a character.",
)
@click.option(
    "--alphabet",
    type=click.Choice(get_args(Alphabet)),
    default=DEFAULTS.alphabet,
    show_default=True,
    help="dense, packed: draw what the shipped reader can say, or any character of a font here; the rest as escapes.",
)
@click.option("--font-size", type=int, default=DEFAULTS.font_size, show_default=True, help="document: pixels per em.")
@click.option("--kind", type=click.Choice(get_args(Kind)), help="What FILE holds.  [default: by its suffix; stdin: text]")
@as_json
def render(
    file: str,
    output: Path,
    style: Style,
    mode: str | None,
    size: int | None,
    cell: Cell,
    alphabet: Alphabet,
    font_size: int,
    kind: Kind | None,
    as_json: bool,
) -> None:
    """Draw FILE (or - for stdin) as pages: text, Markdown, code, or a chat as JSON."""
    if mode is not None and size is not None:
        raise click.UsageError("--mode and --size both set the size of a page: give one")
    side = MODES[mode].size if mode is not None else DEFAULTS.height if size is None else size
    config = PageConfig(style, side, side, cell, alphabet, font_size)
    given = read_input(file, kind)
    pages = lay_out(read_source(given.source, given.kind, rich=style == "document", name=given.name), config)
    described = save_pages(pages, output, given.name)
    tokens, fed = given.text_tokens(), fed_tokens(side, len(pages))
    missing = "".join(sorted({char for page in pages for char in page.missing}))
    if as_json:
        print_json({"pages": described, "text_tokens_estimated": tokens, "fed_tokens": fed, "missing": missing})
        return
    cost = f"{fed:,} vision tokens fed instead" if fed is not None else "no vision tokens: the encoder wants multiples of 64 pixels"
    click.echo(f"{len(pages)} page{'s' * (len(pages) != 1)} in {output}; about {tokens:,} text tokens, {cost}")
    if missing:
        why = "the alphabet of nano lacks" if alphabet == "nano" and style != "document" else "no font here has"
        click.echo(f"{why} {missing}: drawn as escapes (U+XXXX)", err=True)


def fed_tokens(side: int, num_pages: int) -> int | None:
    """Vision tokens, newlines and separators that a decoder gets for square pages of one view; None off the encoder's grid."""
    return num_pages * Mode(f"square {side}", side).fed_tokens() if side % PIXELS_PER_TOKEN == 0 else None


@cli.command()
@click.argument("files", nargs=-1)
@click.option(
    "-o",
    "--output",
    type=click.Path(path_type=Path, file_okay=False),
    default=Path("demo"),
    show_default=True,
    help="Folder for the PNGs and the report.",
)
@click.option("--checkpoint", default="nano", show_default=True, help="What reads: the shipped checkpoint, or a folder.")
@as_json
def demo(files: tuple[str, ...], output: Path, checkpoint: str, as_json: bool) -> None:
    """Draw a sample chat and FILES as pages, say what they cost in text tokens and in vision tokens, and read them back."""
    given = read_inputs(files, taken=[sample().name])
    results = run_demo(given)
    for result in results:
        save_pages(result.pages, output, result.name)
    if not as_json:
        click.echo("\n\n".join(result.describe() for result in results) + f"\n\n{LEGEND}")
    engine, missing = open_reader(checkpoint)
    read = read_all(engine, given) if engine is not None else []
    report = save_report(read, output, checkpoint) if read else None
    if as_json:
        found = [result.summary() for result in results]
        for drawn, back in zip(found, read, strict=False):  # without a checkpoint there is nothing read
            drawn["read_back"] = back.summary()
        print_json(found)
        return
    if engine is not None:
        click.echo(f"\nread back by {checkpoint}, from vision tokens alone:\n" + "\n".join(back.describe() for back in read))
    else:
        click.echo(f"\nNothing was read back: {missing}")
    click.echo(f"\nThe pages are in {output}" + (f", the report is {report}" if report else ""))


def open_reader(checkpoint: str) -> tuple[Engine | None, str]:
    """The engine; or None and the reason, where the checkpoint that is to be shipped is not here yet."""
    try:
        return Engine.from_pretrained(checkpoint), ""
    except SourceNotFoundError as error:
        if checkpoint != "nano":
            raise
        return None, str(error)


def save_report(read: list[ReadBack], folder: Path, checkpoint: str) -> Path:
    """Writes the report and says where it is."""
    file = folder / "report.html"
    try:
        file.write_text(write_report(read, checkpoint), encoding="utf-8", errors="replace")  # names of files may be any bytes
    except OSError as error:
        raise OutputError(f"cannot write {file}: {error.strerror or error}") from None
    return file


reading_commands.register(cli)
memory_commands.register(cli)
synth_command.register(cli)
eval_command.register(cli)
train_command.register(cli)
bench_command.register(cli)


def main(arguments: list[str] | None = None) -> None:
    """The entry point: turns our errors into one sentence and an exit code."""
    try:
        cli.main(arguments, standalone_mode=False)
    except OptmemError as error:
        click.echo(f"optmem: {error}", err=True)
        sys.exit(error.exit_code)
    except click.ClickException as error:
        error.show()
        sys.exit(error.exit_code)
    except (click.Abort, KeyboardInterrupt):
        sys.exit(130)
    except BrokenPipeError:
        _drop_stdout()
        sys.exit(141)
    except OSError as error:  # a disk that is full, a terminal that is gone
        _drop_stdout()
        click.echo(f"optmem: {f'{error.filename}: ' if error.filename else ''}{error.strerror or error}", err=True)
        sys.exit(74)


def _drop_stdout() -> None:
    """What stdout did not take, it is not offered again when Python ends, which would say so in its own words."""
    with suppress(OSError, ValueError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
