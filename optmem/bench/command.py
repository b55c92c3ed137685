"""`optmem bench`: suites that measure the whole, a command each."""

from __future__ import annotations

import os
import platform
from dataclasses import replace
from pathlib import Path
from time import perf_counter, process_time

import click

from optmem.bench import memory_report
from optmem.bench.memory_run import QUICK, Plan, run, to_json
from optmem.engine import Engine
from optmem.files import check_writable
from optmem.train.synth_command import CORPUS, collected


def register(cli: click.Group) -> None:
    """Adds the command."""
    cli.add_command(bench)


@click.group()
def bench() -> None:
    """Measure what optmem is good for, beside what else could be done."""


@bench.command()
@click.option("--quick", is_flag=True, help="Few histories, two budgets: a look in less than a minute.")
@click.option(
    "-o",
    "--output",
    type=click.Path(path_type=Path, file_okay=False),
    default=Path("bench-memory"),
    show_default=True,
    help="Folder for the report, the chart (SVG and PNG) and the JSON.",
)
@click.option("--checkpoint", default="nano", show_default=True, help="What reads: the shipped checkpoint, or a folder.")
@click.option("--histories", type=click.IntRange(1), help="Histories of each class of text.  [default: 2, or 1 with --quick]")
@click.option("--seed", type=click.IntRange(0), default=0, show_default=True, help="Fixes histories and needles.")
@click.option(
    "--corpus", type=click.Path(path_type=Path, file_okay=False), default=CORPUS, show_default=True, help="Text; made when missing."
)
@click.option("--json", "as_json", is_flag=True, help="Print the result as one line of JSON, and no table.")
def memory(quick: bool, output: Path, checkpoint: str, histories: int | None, seed: int, corpus: Path, as_json: bool) -> None:
    """Recall against tokens kept: a memory beside truncation, retrieval over text, and means of its tokens.

    Passkeys, keys and values, similar keys, values set again, what nobody told, JSON, tables, code and plain lines, in natural,
    shuffled and random text; how a page fades; needles by depth, pages and tier; confidence; bytes.  The last line is JSON.
    """
    plan = QUICK if quick else Plan()
    plan = replace(plan, seed=seed, histories=histories or plan.histories)
    check_writable(output)
    text = collected(corpus, "held-out")
    with Engine.from_pretrained(checkpoint) as engine:
        start, worked = perf_counter(), process_time()
        result = run(engine, text, plan, engine.encoder_fingerprint[:8])
    result.seconds, result.cpu_seconds = perf_counter() - start, process_time() - worked
    files = memory_report.save(result, output, _machine())
    if not as_json:
        click.echo(memory_report.table(result))
        click.echo(f"{', '.join(file.name for file in files)} in {output}")
    click.echo(to_json(result))


def _machine() -> str:
    cores = len(os.sched_getaffinity(0))
    return f"{platform.machine()} {platform.system()}, {cores} core{'s' * (cores != 1)}, Python {platform.python_version()}"
