"""`python -m optmem.train.run recipes/nano.toml runs/nano`: a recipe from where its run stands, to its end."""

from __future__ import annotations

from pathlib import Path

import click
import torch

from optmem.model.config_json import public_config
from optmem.train.alignment import Parts
from optmem.train.corpus import open_corpus
from optmem.train.feed import SynthFeed
from optmem.train.recipe import read_recipe
from optmem.train.trainer import Run, Trainer


@click.command()
@click.argument("recipe", type=click.Path(path_type=Path))
@click.argument("folder", type=click.Path(path_type=Path))
@click.option("--corpus", type=click.Path(path_type=Path), default=Path("runs/corpus"), help="Made there where it is not yet.")
@click.option("--minutes", type=float, help="All stages together; each keeps its share.")
@click.option("--device", default="cpu", show_default=True)
@click.option("--threads", type=int, default=0, help="Of torch; 0 is all cores.")
def train(recipe: Path, folder: Path, corpus: Path, minutes: float | None, device: str, threads: int) -> None:
    """Train by RECIPE in FOLDER, or go on with the training that is there."""
    if threads:
        torch.set_num_threads(threads)
    plan = read_recipe(recipe)
    if minutes is not None:
        plan = plan.scaled(minutes)
    Trainer(Parts(public_config("nano"), plan.seed), plan, SynthFeed(open_corpus(corpus)), Run(folder), device=device).train()


if __name__ == "__main__":
    train()
