"""The command line.  Results go to stdout, progress and errors to stderr; an error of ours is one sentence and an exit code."""

from __future__ import annotations

import glob
import json
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any, TypeVar, get_args

import click
from PIL import Image
from tqdm import tqdm

from optmem import __version__, env
from optmem.config import Cell, Kind, PageConfig, Style
from optmem.demo import run_demo
from optmem.errors import InputError, OptmemError, OutputError, SourceNotFoundError
from optmem.pages import Page, draw_pages, lay_out, read_source
from optmem.pixels import MODES
from optmem.text.count import estimate_tokens

T = TypeVar("T")
CODE = (
    ".py .pyi .c .h .cc .cpp .hpp .cu .rs .go .java .js .jsx .ts .tsx .sh .sql .toml .yaml .yml .css .html .xml .rb .php .lua .zig"
)
SUFFIXES: dict[str, Kind] = {".md": "markdown", ".markdown": "markdown", ".json": "chat", **dict.fromkeys(CODE.split(), "code")}
PAGES_AT_ONCE = 64
DEFAULTS = PageConfig()
as_json = click.option("--json", "as_json", is_flag=True, help="Print the result as JSON.")


def progress(items: Iterable[T], total: int, what: str) -> Iterable[T]:
    """A bar on stderr when a person watches."""
    bar: Iterable[T] = tqdm(items, total=total, desc=what, unit="page", file=sys.stderr, disable=not sys.stderr.isatty())
    return bar


def print_json(result: Any) -> None:
    """One JSON value on stdout; lone surrogates are escaped, so any text passes."""
    click.echo(json.dumps(result, indent=2))


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(__version__)
def cli() -> None:
    """Optical memory for language models: text as pages, pages as vision tokens, tokens read back on demand."""


@cli.command("env")
@as_json
def env_command(as_json: bool) -> None:
    """Say what this machine has and which code serves each operator."""
    facts = env.report()
    print_json(facts) if as_json else click.echo(env.describe(facts))


def read_input(file: str) -> str:
    """The text of a file, or of stdin for "-"; what is not UTF-8 is refused, not guessed."""
    try:
        data = sys.stdin.buffer.read() if file == "-" else Path(file).read_bytes()
    except OSError as error:
        raise SourceNotFoundError(f"cannot read {file}: {error.strerror}") from None
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise InputError(f"{file} is not UTF-8 text (byte {error.start}); convert it first") from None


def parse_chat(text: str, file: str) -> Any:
    """The messages of a JSON file: a list, or an object with a list under "messages"."""
    try:
        found = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise InputError(f"{file} is not JSON that can be read ({error}); name another --kind to draw it as text") from None
    messages = found["messages"] if isinstance(found, dict) and "messages" in found else found
    if not isinstance(messages, list):
        raise InputError(f"{file} is JSON but not a list of messages; draw it as text with --kind text")
    return messages


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


def save_pages(pages: list[Page], folder: Path, stem: str) -> list[dict[str, Any]]:
    """Writes a PNG for every page, a batch at a time, and returns their descriptions."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for stale in folder.glob(f"{glob.escape(stem)}-*-[0-9][0-9][0-9][0-9].png"):
            stale.unlink()  # a longer run before this one must not leave its last pages beside ours
        described = []
        batches = [pages[start : start + PAGES_AT_ONCE] for start in range(0, len(pages), PAGES_AT_ONCE)]
        watched = iter(progress(range(len(pages)), len(pages), "drawing"))
        for batch in batches:
            for page, pixels in zip(batch, draw_pages(batch), strict=True):
                file = folder / f"{stem}-{page.style}-{page.index + 1:04}.png"
                Image.fromarray(pixels).save(file)
                described.append(describe_page(page, file))
                next(watched)
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
@click.option("--font-size", type=int, default=DEFAULTS.font_size, show_default=True, help="document: pixels per em.")
@click.option("--kind", type=click.Choice(get_args(Kind)), help="What FILE holds.  [default: by its suffix, else text]")
@as_json
def render(
    file: str,
    output: Path,
    style: Style,
    mode: str | None,
    size: int | None,
    cell: Cell,
    font_size: int,
    kind: Kind | None,
    as_json: bool,
) -> None:
    """Draw FILE (or - for stdin) as pages: text, Markdown, code, or a chat as JSON."""
    if mode is not None and size is not None:
        raise click.UsageError("--mode and --size both set the size of a page: give one")
    side = MODES[mode].size if mode is not None else DEFAULTS.height if size is None else size
    config = PageConfig(style, side, side, cell, font_size)
    kind = kind or SUFFIXES.get(Path(file).suffix.lower(), "text")
    text = read_input(file)
    source = parse_chat(text, file) if kind == "chat" else text
    name = "stdin" if file == "-" else Path(file).name
    pages = lay_out(read_source(source, kind, rich=style == "document", name=name), config)
    described = save_pages(pages, output, Path(name).stem)
    tokens = estimate_tokens("".join(page.text() for page in pages))
    missing = "".join(sorted({char for page in pages for char in page.missing}))
    if as_json:
        print_json({"pages": described, "text_tokens_estimated": tokens, "missing": missing})
        return
    click.echo(f"{len(pages)} pages, about {tokens} text tokens, in {output}")
    if missing:
        click.echo(f"no font here has {missing}: drawn as escapes (U+XXXX)", err=True)


@cli.command()
@click.argument("files", nargs=-1)
@click.option(
    "-o",
    "--output",
    type=click.Path(path_type=Path, file_okay=False),
    default=Path("demo"),
    show_default=True,
    help="Folder for the PNGs.",
)
@as_json
def demo(files: tuple[str, ...], output: Path, as_json: bool) -> None:
    """Draw a sample chat and FILES as pages, and say what they cost in text tokens and in vision tokens."""
    texts = {file: read_input(file) for file in files}
    results = run_demo(texts)
    for result in results:
        save_pages(result.pages, output, result.stem)
    if as_json:
        print_json([result.summary() for result in results])
        return
    for result in results:
        click.echo(result.describe() + "\n")
    click.echo(f"The pages are in {output}")


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
        sys.exit(141)
