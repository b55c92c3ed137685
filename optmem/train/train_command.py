"""`optmem train`: a recipe from where its run stands, to its end."""

from __future__ import annotations

import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import click
import torch
from tqdm import tqdm

from optmem.engine.checkpoint import choose_device, find_checkpoint
from optmem.files import check_writable
from optmem.model.config_json import public_config
from optmem.model.model import Model
from optmem.train.alignment import Parts
from optmem.train.feed import SynthFeed
from optmem.train.losses import Score
from optmem.train.recipe import Recipe, Stage, read_recipe
from optmem.train.state import check_recipe
from optmem.train.synth_command import CORPUS, collected
from optmem.train.trainer import Run, Trainer, progress

SHOWN = ("glance", "text", "look 1", "look 2")  # of a step's scores, those that say most
STOPPED = 130  # the exit code of what a signal ended
TICKS = 1000  # of the bar, for a whole stage


def register(cli: click.Group) -> None:
    """Adds the command."""
    cli.add_command(train)


@click.command()
@click.argument("recipe", type=click.Path(path_type=Path))
@click.argument("folder", type=click.Path(path_type=Path, file_okay=False))
@click.option("--start", help="A checkpoint to begin with: nano, or a folder.  [default: from nothing]")
@click.option("--minutes", type=float, help="All stages together; each keeps its share.  [default: the recipe's]")
@click.option("--device", default="cpu", show_default=True, help="Where to train: cpu or cuda.")
@click.option("--threads", type=click.IntRange(0), default=0, show_default=True, help="Of torch on CPU; 0 is every core.")
@click.option(
    "--corpus", type=click.Path(path_type=Path, file_okay=False), default=CORPUS, show_default=True, help="Text; made when missing."
)
def train(recipe: Path, folder: Path, start: str | None, minutes: float | None, device: str, threads: int, corpus: Path) -> None:
    """Train a reader by RECIPE in FOLDER, or go on with the training that is there.

    FOLDER gets log.jsonl, curves.svg, the state to go on from, and after each stage model-<stage>, a checkpoint to load.  It takes
    one recipe, whose minutes, steps and rates may change and which may get further stages.
    """
    plan = read_recipe(recipe)
    if minutes is not None:
        plan = plan.scaled(minutes)
    place, run = choose_device(device), Run(folder)
    checkpoint = None if start is None else find_checkpoint(start)
    check_writable(folder)  # this and the next before a minute of collecting text
    check_recipe(run.state, plan)
    if threads:
        torch.set_num_threads(threads)
    text = collected(corpus)
    with Bar(plan) as bar:
        parts, feed = Parts(public_config("nano"), plan.seed), SynthFeed(text)
        if checkpoint is not None:
            parts.start_from(Model.load(checkpoint))
        trainer = Trainer(parts, plan, feed, run, device=str(place), watch=bar.show)
        with stopped_by_signals(trainer):
            trainer.train()
    if trainer.place.stage < len(plan.stages):
        stage = plan.stages[trainer.place.stage].name
        click.echo(f"stopped at step {trainer.place.step} of stage {stage}; the same command goes on", err=True)
        raise SystemExit(STOPPED)
    click.echo(f"trained: the checkpoint is {run.model(plan.stages[-1])}, the curves are {folder / 'curves.svg'}")


@contextmanager
def stopped_by_signals(trainer: Trainer) -> Iterator[None]:
    """The first SIGINT or SIGTERM ends the training after its step; a second one is what it always was."""
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

    def restore() -> None:
        for number, handler in before.items():
            signal.signal(number, handler if handler is not None else signal.SIG_DFL)  # None: set by somebody not Python

    def stop(*_: object) -> None:
        trainer.stop()
        restore()

    for number in before:
        signal.signal(number, stop)
    try:
        yield
    finally:
        restore()


class Bar:
    """The stages as a bar on stderr, when a person watches."""

    def __init__(self, plan: Recipe) -> None:
        self.plan = plan
        is_hidden = not sys.stderr.isatty()
        shape = "{desc}: {percentage:3.0f}% |{bar}| {elapsed}{postfix}"
        self.bar = tqdm(total=TICKS * len(plan.stages), file=sys.stderr, disable=is_hidden, bar_format=shape)

    def __enter__(self) -> Bar:
        return self

    def __exit__(self, *_: object) -> None:
        self.bar.close()

    def show(self, trainer: Trainer, stage: Stage, found: Score) -> None:
        """One step more."""
        if self.bar.disable:
            return
        done = self.plan.stages.index(stage) + min(1.0, progress(stage, trainer.place))
        self.bar.set_description(stage.name, refresh=False)
        scores = {name: f"{float(found.right[name]):.3f}" for name in SHOWN if name in found.right}
        self.bar.set_postfix({"step": str(trainer.place.step)} | scores, refresh=False)
        self.bar.update(int(TICKS * done) - self.bar.n)
