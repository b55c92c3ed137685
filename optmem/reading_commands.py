"""`optmem encode`, `decode` and `ocr`: pictures to files of vision tokens, those to text, and both at once."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, cast, get_args

import click

from optmem.engine import Completion, Engine, VisionTokens
from optmem.engine.options import Asked, DraftName
from optmem.errors import InputError, OptmemError, SourceNotFoundError
from optmem.files import check_writable, is_there
from optmem.images import SUFFIXES as PICTURES
from optmem.images import LoadedImage, load_images
from optmem.inputs import check_name
from optmem.items import in_parts, watched
from optmem.pixels import find_mode
from optmem.reading_output import Texts, warn

Command = Callable[..., None]
AT_ONCE = 16  # pictures that are encoded together


def register(cli: click.Group) -> None:
    """Adds the commands."""
    for command in (encode, decode, ocr):
        cli.add_command(command)


def _model(command: Command) -> Command:
    chosen = click.option("--model", default="nano", show_default=True, help="nano, or a folder in the hub layout.")
    on = click.option("--device", default="auto", show_default=True, help="auto, cpu or cuda.")
    held = click.option(
        "--dtype", default="auto", show_default=True, help="auto, float32, bfloat16, float16, int8 (CPU), fp8 (GPU)."
    )
    return chosen(on(held(command)))


def _shown(command: Command) -> Command:
    mode = click.option("--mode", help="tiny, small, base, large, gundam or 'square <pixels>'.  [default: a picture's own size]")
    dpi = click.option("--dpi", type=float, default=144, show_default=True, help="Of the pages of a PDF.")
    return mode(dpi(command))


def _asked(command: Command) -> Command:
    rows = click.option("--rows", metavar="FIRST:END", help="Only these rows, for nano: 12:15 is three of them, 12 is one.")
    prompt = click.option("--prompt", help="A task such as text or document, or your own words; for the public models.")
    most = click.option("--max-tokens", type=int, help="Of a page.")
    listed = click.option("--json", "as_json", is_flag=True, help="Print the results as JSON.")
    return rows(prompt(most(listed(command))))


@click.command()
@click.argument("sources", nargs=-1, required=True)
@click.option(
    "-o",
    "--output",
    type=click.Path(path_type=Path, file_okay=False),
    default=Path("tokens"),
    show_default=True,
    help="Folder for the files.",
)
@click.option("--int8", is_flag=True, help="A byte a number: half the size.")
@_shown
@_model
@click.option("--json", "as_json", is_flag=True, help="Print the result as JSON.")
def encode(
    sources: Sequence[str],
    output: Path,
    int8: bool,
    mode: str | None,
    dpi: float,
    as_json: bool,
    model: str,
    device: str,
    dtype: str,
) -> None:
    """Write the vision tokens of pictures, PDFs and folders of them, a file for each page.  One that cannot be read is named at the
    end; the others are written."""
    check_writable(output)
    _check_there(sources)
    engine = Engine.from_pretrained(model, device=device, dtype=dtype)
    written: list[dict[str, Any]] = []
    failed: list[tuple[str, Exception]] = []
    images = load_images(sources, dpi=dpi, on_error="yield")
    for number, (name, tokens) in enumerate(watched(_encoded(engine, images, mode), "encoding"), 1):
        if isinstance(tokens, OptmemError):
            failed.append((name, tokens))
            continue
        file = output / f"{_file_name(name)}-{number:04}.safetensors"
        tokens.save(file, int8=int8)
        written.append({"file": str(file), "source": name, "mode": tokens.mode.name, "tokens": tokens.features.shape[0]})
    count = sum(each["tokens"] for each in written)
    if as_json:
        click.echo(json.dumps(written, indent=2))
    elif written:
        click.echo(f"{len(written)} page{'s' * (len(written) != 1)}, {count:,} vision tokens in {output}")
    _raise_last(failed)


def _encoded(engine: Engine, images: Iterator[LoadedImage], mode: str | None) -> Iterator[tuple[str, VisionTokens | OptmemError]]:
    """The vision tokens of pictures, or what is wrong with them; where some fail together, each is tried alone."""
    for some in in_parts(images, AT_ONCE):
        names = [image.name for image in some]
        try:
            yield from zip(names, engine.encode(some, mode), strict=True)
        except OptmemError:
            for image in some:
                try:
                    yield image.name, engine.encode(image, mode)[0]
                except OptmemError as error:
                    yield image.name, error


@click.command()
@click.argument("files", nargs=-1, required=True)
@_asked
@_model
def decode(
    files: Sequence[str],
    rows: str | None,
    prompt: str | None,
    max_tokens: int | None,
    as_json: bool,
    model: str,
    device: str,
    dtype: str,
) -> None:
    """Read files of vision tokens, as `optmem encode` writes them.

    Consecutive pages of a text that `optmem render` drew are joined: the text comes back as it was.  A page that nano hardly reads
    is named on stderr.
    """
    wanted = _wanted(rows, prompt, max_tokens)
    _check_tokens(files)
    engine = Engine.from_pretrained(model, device=device, dtype=dtype)
    sides: list[int] = []

    def loaded() -> Iterator[VisionTokens]:
        for file in watched(files, "reading"):
            tokens = VisionTokens.load(file)
            sides.append(tokens.mode.size)
            yield tokens

    output = _Output(engine, model, wanted, as_json)
    with output:
        for file, side, done in zip(files, sides, engine.decode(loaded(), **wanted), strict=True):
            output.add(file, Path(file).name, side, done)


@click.command()
@click.argument("sources", nargs=-1, required=True)
@_shown
@_asked
@click.option(
    "--draft",
    type=click.Choice(get_args(DraftName)),
    default="auto",
    show_default=True,
    help="A guess to be verified, which changes no answer: text is what a PDF says of its page, ngrams what was said before.",
)
@_model
def ocr(
    sources: Sequence[str],
    mode: str | None,
    dpi: float,
    rows: str | None,
    prompt: str | None,
    max_tokens: int | None,
    as_json: bool,
    draft: str,
    model: str,
    device: str,
    dtype: str,
) -> None:
    """Read pictures, PDFs and folders of them.  One that cannot be read is named at the end; the others are read.

    Consecutive pages of a text that `optmem render` drew are joined: the text comes back as it was.  A page that nano hardly reads
    is named on stderr.
    """
    wanted = _wanted(rows, prompt, max_tokens)
    wanted["draft"] = cast(DraftName, draft)
    _check_there(sources)
    engine = Engine.from_pretrained(model, device=device, dtype=dtype)
    names: list[str] = []

    def named() -> Iterator[LoadedImage]:
        for image in load_images(sources, dpi=dpi, on_error="yield"):
            names.append(image.name)
            yield image

    failed: list[tuple[str, Exception]] = []
    output = _Output(engine, model, wanted, as_json)
    with output:
        for number, done in enumerate(engine.ocr(named(), mode, **wanted)):
            name = names[number]
            output.add(name, name, find_mode(done.attempts[-1].mode).size if done.attempts else 0, done)
            if done.error is not None:
                failed.append((name, done.error))
    _raise_last(failed)


def _raise_last(failed: Sequence[tuple[str, Exception]]) -> None:
    """Names what could not be read; the last of it decides the exit code."""
    for name, error in failed:
        said = str(error)
        click.echo(f"optmem: {said}" if name in said else f"optmem: {name}: {said}", err=True)
    if failed:
        last = failed[-1][1]
        raise SystemExit(last.exit_code if isinstance(last, OptmemError) else InputError.exit_code)


def _check_there(sources: Sequence[str]) -> None:
    """Before a model is loaded: leaves where none of the sources is there, and raises InputError for one without a name."""
    for source in sources:
        check_name(source)
    if not any(map(is_there, sources)):
        found = load_images(sources, on_error="yield")
        _raise_last([(image.name, image.error) for image in found if image.error is not None])


def _check_tokens(files: Sequence[str]) -> None:
    """Before a model is loaded.  Raises SourceNotFoundError where a file is not there, InputError for one that is a picture."""
    for file in files:
        check_name(file)
        if not is_there(file):
            raise SourceNotFoundError(f"there is no file {file}")
        if Path(file).suffix.lower() in PICTURES:
            raise InputError(f"{file} is a picture or PDF: `optmem ocr` reads it, `optmem encode` makes vision tokens of it")


def _wanted(rows: str | None, prompt: str | None, max_tokens: int | None) -> Asked:
    return {"rows": None if rows is None else read_rows(rows), "prompt": prompt, "max_tokens": max_tokens}


def read_rows(rows: str) -> range:
    """FIRST:END as a range.  Raises InputError for anything else."""
    found = re.fullmatch(r"([0-9]{1,4})(?::([0-9]{1,4}))?", rows)
    if found is None:
        raise InputError(f"rows are FIRST:END such as 12:15, or one number, got {rows!r}")
    first = int(found[1])
    end = int(found[2]) if found[2] else first + 1
    if end <= first:
        raise InputError(f"rows are FIRST:END with END behind FIRST, got {rows!r}")
    return range(first, end)


class _Output:
    """What is printed of the pages that were read: texts as they come, or all of them as JSON at the end; doubts on stderr."""

    def __init__(self, engine: Engine, model: str, wanted: Asked, as_json: bool) -> None:
        self.most = wanted.get("max_tokens")
        self.is_nano = engine.model.config.family == "nano"
        self.is_shipped = model == "nano"
        self.texts = Texts(joins=self.is_nano and wanted.get("rows") is None)
        self.listed: list[dict[str, Any]] | None = [] if as_json else None

    def add(self, source: str, name: str, side: int, done: Completion) -> None:
        """One page more: as it was given, by its file's name, as wide as it was shown."""
        if self.listed is not None:
            self.listed.append(_described(source, done))
        else:
            self.texts.add(name, done)
        if done.finish_reason == "length" and self.most is not None:
            click.echo(f"optmem: {name}: cut by --max-tokens {self.most}", err=True)
        elif self.is_nano and done.error is None:
            warn(name, done, side if self.is_shipped else None)

    def __enter__(self) -> None:
        """Nothing is open yet."""

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if self.listed is None:
            self.texts.close()
        elif kind is None:
            click.echo(json.dumps(self.listed, indent=2))


def _described(name: str, done: Completion) -> dict[str, Any]:
    return {
        "source": name,
        "text": done.text,
        "finish_reason": done.finish_reason,
        "error": None if done.error is None else str(done.error),
        "confidence": round(done.confidence, 4),
        "prompt_tokens": done.prompt_tokens,
        "output_tokens": done.output_tokens,
        "boxes": [[box.left, box.top, box.right, box.bottom] for box in done.boxes],
        "attempts": [{"mode": attempt.mode, "reason": attempt.reason} for attempt in done.attempts],
    }


def _file_name(name: str) -> str:
    """A name that any file system takes."""
    return re.sub(r"[^\w.-]+", "-", name)[-100:].strip("-.") or "page"  # the end tells which page of a text it is
