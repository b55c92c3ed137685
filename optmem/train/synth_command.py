"""`optmem synth`: labelled pages into tar archives."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import get_args

import click
from tqdm import tqdm

from optmem.config import Cell
from optmem.errors import InputError
from optmem.files import check_writable
from optmem.train.corpus import Corpus, Split, open_corpus
from optmem.train.degrade import EVERYTHING
from optmem.train.kinds import Mix, PageKind
from optmem.train.shards import write_shards
from optmem.train.synth import Form, SynthConfig

DEFAULTS = Form()
CORPUS = Path("~/.cache/optmem/corpus")


def register(cli: click.Group) -> None:
    """Adds the command."""
    cli.add_command(synth)


@click.command()
@click.option("-o", "--output", type=click.Path(path_type=Path, file_okay=False), required=True, help="Folder for the archives.")
@click.option("--pages", type=click.IntRange(1), default=1024, show_default=True, help="How many pages.")
@click.option("--seed", type=int, default=0, show_default=True, help="Fixes every page.")
@click.option("--kinds", help=f"What pages say, with commas: {', '.join(get_args(PageKind))}.  [default: all]")
@click.option("--size", type=int, default=DEFAULTS.size, show_default=True, help="Pixels: one side of a page.")
@click.option(
    "--cell", type=click.Choice(get_args(Cell)), default=DEFAULTS.cell, show_default=True, help="Width x height of a character."
)
@click.option("--view", type=int, default=0, help="Pixels: a lower tier at which the page is shown.  [default: its own size]")
@click.option("--degrade", is_flag=True, help="Rotate, shift, blur, add noise, compress.")
@click.option("--split", type=click.Choice(get_args(Split)), default="train", show_default=True, help="Which documents.")
@click.option(
    "--corpus", type=click.Path(path_type=Path, file_okay=False), default=CORPUS, show_default=True, help="Text; made when missing."
)
@click.option("--json", "as_json", is_flag=True, help="Print the result as JSON.")
def synth(
    output: Path,
    pages: int,
    seed: int,
    kinds: str | None,
    size: int,
    cell: Cell,
    view: int,
    degrade: bool,
    split: Split,
    corpus: Path,
    as_json: bool,
) -> None:
    """Draw labelled pages: PNG, text and line boxes in tar archives of 1,024 pages.  Run again to go on."""
    config = SynthConfig((Form(size, cell, view),), read_kinds(kinds), EVERYTHING if degrade else ())
    check_writable(output)
    text = collected(corpus, split)
    with tqdm(total=pages, desc="drawing", unit="page", file=sys.stderr, disable=not sys.stderr.isatty()) as bar:
        for done in write_shards(output, config, text, seed, pages):
            bar.update(done - bar.n)
    result = {"folder": str(output), "pages": pages, "seed": seed, "corpus": text.fingerprint}
    click.echo(json.dumps(result, indent=2) if as_json else f"{pages} page{'s' * (pages != 1)} in {output}")


def collected(folder: Path, side: Split = "train") -> Corpus:
    """One side of the corpus in a folder; where it has to be made first, that is said, for it takes minutes."""
    folder = folder.expanduser()
    if not (folder / "corpus.json").is_file():
        check_writable(folder)
        click.echo(f"collecting text in {folder}: a minute or two, once", err=True)
    return open_corpus(folder, side)


def read_kinds(kinds: str | None) -> Mix:
    """The usual mix, or the part of it that was asked for."""
    names = [name.strip() for name in kinds.split(",")] if kinds is not None else list(get_args(PageKind))
    if not all(names):
        raise InputError(f"kinds are names with commas between them, got {kinds!r}")
    return Mix.only(names)
