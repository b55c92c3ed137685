"""`optmem eval`: how well a checkpoint reads, with intervals, controls and calibration."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import get_args

import click
import torch

from optmem.config import check_choice
from optmem.engine.checkpoint import find_checkpoint, load_model
from optmem.errors import OutputError
from optmem.files import check_writable
from optmem.inputs import Given, read_inputs
from optmem.items import watched
from optmem.train.evaluate import EVERY_FORM, Plan, evaluate
from optmem.train.evaluate_pages import parse_form, unspoken
from optmem.train.evaluate_reading import Nano
from optmem.train.evaluate_report import save, table
from optmem.train.fidelity import Cell
from optmem.train.kinds import PageKind
from optmem.train.synth import Form
from optmem.train.synth_command import CORPUS, collected

DEFAULTS = Plan()
CELLS = "cells.jsonl"  # as they are measured: what a run that is stopped has found
_SHOWN = 20  # characters named in a note


def register(cli: click.Group) -> None:
    """Adds the command."""
    cli.add_command(eval_command)


@click.command("eval")
@click.argument("model", default="nano")
@click.option(
    "-o",
    "--output",
    "--out",
    type=click.Path(path_type=Path, file_okay=False),
    default=Path("evaluation"),
    show_default=True,
    help="Folder for fidelity.json, the report and the charts.",
)
@click.option("--pages", type=click.IntRange(1), default=DEFAULTS.pages, show_default=True, help="Pages of each kind and form.")
@click.option(
    "--rows", type=click.IntRange(0), default=DEFAULTS.rows, show_default=True, help="Consecutive rows read of each page; 0 is all."
)
@click.option("--kinds", help=f"Kinds of text, with commas: {', '.join(get_args(PageKind))}.  [default: all, or none with --text]")
@click.option("--forms", default=EVERY_FORM, help="Pages as size:cell, and size:cell:side for a lower tier.  [default: every tier]")
@click.option("--text", "texts", multiple=True, help="A text of your own, drawn as nano's pages; give it again for more.")
@click.option(
    "--corpus", type=click.Path(path_type=Path, file_okay=False), default=CORPUS, show_default=True, help="Text; made when missing."
)
@click.option("--seed", type=click.IntRange(0), default=0, show_default=True, help="Fixes pages, rows and intervals.")
@click.option("--json", "as_json", is_flag=True, help="Print the result as JSON.")
def eval_command(
    model: str,
    output: Path,
    pages: int,
    rows: int,
    kinds: str | None,
    forms: str,
    texts: tuple[str, ...],
    corpus: Path,
    seed: int,
    as_json: bool,
) -> None:
    """Measure how well MODEL reads held-out pages: a shipped checkpoint by its name, or a folder.

    By tier, density and kind of text: score, exact lines, digits and identifiers with 95 % intervals, compression, the glance, and
    how often confidence misleads; then controls with nothing to read.
    """
    given = tuple(read_inputs(texts))
    plan = Plan(tuple(map(parse_form, forms.split(","))), _kinds(kinds, given), given, pages, rows, seed)
    loaded = load_model(find_checkpoint(model), torch.device("cpu"))
    Nano.of(loaded)  # before minutes of collecting text
    check_writable(output)
    _say_escapes(given, plan.forms)
    text = collected(corpus, "held-out") if plan.kinds else None
    found = evaluate(loaded, plan, text, watch=partial(watched, what="reading", unit="cell"), tell=_teller(output / CELLS))
    files = save(found, output)
    if as_json:
        click.echo(json.dumps(found.summary(), indent=2))
        return
    click.echo(table(found))
    click.echo(f"\n{', '.join(file.name for file in files)} in {output}")


def _kinds(names: str | None, given: Sequence[Given]) -> tuple[PageKind, ...]:
    if names is None:
        return () if given else DEFAULTS.kinds
    chosen = [name.strip() for name in names.split(",")]
    for name in chosen:
        check_choice("kind", name, PageKind)
    known: dict[str, PageKind] = {kind: kind for kind in get_args(PageKind)}
    return tuple(known[name] for name in chosen)


def _say_escapes(given: Sequence[Given], forms: Sequence[Form]) -> None:
    """What no cell can draw is no error, but costs several cells each."""
    for text in given:
        chars = unspoken(text, [form.cell for form in forms])
        if chars:
            shown = " ".join(chars[:_SHOWN]) + (" …" if len(chars) > _SHOWN else "")
            note = f"{text.name} has {len(chars)} characters that not every cell has a picture of"
            click.echo(f"{note}; they are read as escapes: {shown}", err=True)


def _teller(file: Path) -> Callable[[Cell], None]:
    """Writes every cell to a file of its own as soon as it is measured, and says its score where no bar is seen."""

    def write(mode: str, text: str) -> None:
        try:
            with file.open(mode, encoding="utf-8") as lines:
                lines.write(text)
        except OSError as error:
            raise OutputError(f"cannot write to {file.parent}: {error.strerror or error}") from None

    def tell(cell: Cell) -> None:
        write("a", json.dumps(asdict(cell)) + "\n")
        if not sys.stderr.isatty():
            score = "-" if cell.score is None else f"{cell.score:.4f}"
            click.echo(f"{cell.size}:{cell.cell}:{cell.side} {cell.kind} {score}", err=True)

    write("w", "")
    return tell
