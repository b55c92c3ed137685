"""The loop: pages in, losses down, weights out.

A run is a folder:  log.jsonl  one object a line, what was seen and when      curves.svg  the same as a page of curves
                    state/     where the training stands (state.py)           model/      the shipped weights, at the end of a stage

Every step draws its chance from the recipe's seed, the stage and the step, so a run that was killed goes on as if it had not been.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from optmem.machine import fast_dtype
from optmem.model.model import Model
from optmem.text.characters import BOS, CHARACTERS, CharacterTokenizer, characters_json
from optmem.train.alignment import Parts, graft
from optmem.train.curves import draw_curves
from optmem.train.feed import Feed, seed_of
from optmem.train.labels import Labels, label
from optmem.train.losses import Score, score
from optmem.train.muon import Optimizer
from optmem.train.recipe import Recipe, Stage
from optmem.train.state import TENSORS, Place, check_recipe, load_place, load_tensors, save_state


@dataclass(frozen=True, slots=True)
class Run:
    """The files of a training."""

    folder: Path

    @property
    def state(self) -> Path:
        return self.folder / "state"

    @property
    def log(self) -> Path:
        return self.folder / "log.jsonl"

    def model(self, stage: Stage) -> Path:
        """Where the weights go at the end of a stage."""
        return self.folder / f"model-{stage.name}"


class Trainer:
    """A model in training."""

    def __init__(
        self,
        parts: Parts,
        recipe: Recipe,
        feed: Feed,
        run: Run,
        *,
        device: str = "cpu",
        tokenizer: CharacterTokenizer | None = None,
        watch: Callable[[Trainer, Stage, Score], None] = lambda *_: None,
    ) -> None:
        """
        watch   told after every step
        """
        self.watch = watch
        self.is_stopping = False
        self.parts, self.recipe, self.feed, self.run = parts.to(device), recipe, feed, run
        self.device = torch.device(device)
        self.is_narrow = recipe.autocast and fast_dtype(self.device) == torch.bfloat16
        self.tokenizer = tokenizer or CharacterTokenizer(characters_json())
        self.place = Place()
        self.optimizer = Optimizer(self._trained(recipe.stages[0]))
        run.folder.mkdir(parents=True, exist_ok=True)
        if (run.state / TENSORS).exists():
            self._resume()

    def train(self, *, until: int | None = None) -> None:
        """All stages, from where the training stands.  `until` stops before that step of the present stage, the state saved."""
        while self.place.stage < len(self.recipe.stages):
            stage = self.recipe.stages[self.place.stage]
            if not self._run_stage(stage, until):
                break
            self._next_stage(stage)
        self._save()
        draw_curves(self.run.log, self.run.folder / "curves.svg")

    def stop(self) -> None:
        """Ends the training after the step it is at, its state saved; for a signal or another thread."""
        self.is_stopping = True

    # --- stages ---------------------------------------------------------------------------------------------------------------

    def _trained(self, stage: Stage) -> dict[str, nn.Parameter]:
        """The parameters that a stage moves."""
        groups = {"encoder": ("encoder.", "glance.", "helpers.patches."), "decoder": ("decoder.", "helpers.cursors."), "all": ("",)}
        fronts = groups[stage.trains] + (("encoder.image_newline", "encoder.view_seperator") if stage.trains == "decoder" else ())
        named = {name: value for name, value in self.parts.named_parameters() if name.startswith(fronts)}
        return {name: value for name, value in named.items() if not _is_fixed(name)}

    def _next_stage(self, stage: Stage) -> None:
        if not self.run.model(stage).exists():
            self.export(torch.bfloat16).save(self.run.model(stage))
        self.place = Place(stage=self.place.stage + 1, pages=self.place.pages)
        if self.place.stage < len(self.recipe.stages):
            self.optimizer = Optimizer(self._trained(self.recipe.stages[self.place.stage]))
        self._save()

    def _run_stage(self, stage: Stage, until: int | None) -> bool:
        """Whether the stage is over."""
        if stage.begins == "graft" and self.place.step == 0:
            graft(self.parts.decoder, self.parts.glance)
        logged = saved = time.monotonic()
        with ThreadPoolExecutor(1) as drawing:
            waiting = drawing.submit(self._labels, stage, self.place.step)
            while (share := progress(stage, self.place)) < 1:
                if self.is_stopping or self.place.step == until:
                    return False
                start = time.monotonic()
                labels = waiting.result().to(self.device)
                waiting = drawing.submit(self._labels, stage, self.place.step + 1)
                found = self.step(stage, labels, share)
                now = time.monotonic()
                self.place = replace(
                    self.place,
                    step=self.place.step + 1,
                    seconds=self.place.seconds + now - start,
                    pages=self.place.pages + len(labels.pixels),
                    taken=self.optimizer.taken,
                )
                self.watch(self, stage, found)
                if now - logged >= self.recipe.log_seconds or progress(stage, self.place) >= 1:
                    self._log(stage, found)
                    logged = now
                if now - saved >= 60 * self.recipe.save_minutes:
                    self._save()
                    saved = now
        return True

    # --- steps ----------------------------------------------------------------------------------------------------------------

    def _labels(self, stage: Stage, step: int) -> Labels:
        """The batch of a step, the same whenever it is asked for."""
        seed = seed_of(self.recipe.seed, self.place.stage, step)
        rng = np.random.default_rng(seed)
        shares = np.array([form.share for form in stage.pages])
        form = stage.pages[int(rng.choice(len(shares), p=shares / shares.sum()))]
        is_document = rng.random() < stage.document
        glance = self.parts.config.glance
        assert glance is not None, "only nano is trained here"
        return label(
            self.feed.batch(form, stage.pages_at_once(form), seed, stage.mix),
            self.tokenizer,
            glance.cells,
            rng,
            num_spots=stage.spots,
            num_stretches=-(-stage.stretches // stage.document_rows) if is_document else stage.stretches,
            rows_each=stage.document_rows if is_document else 1,
        )

    def step(self, stage: Stage, labels: Labels, share: float = 0.0) -> Score:
        """One step: losses, gradients clipped, parameters moved.  `share` of the stage is over."""
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.is_narrow):
            found = score(
                self.parts, labels, stage.losses, self.tokenizer.special(BOS), is_encoder_frozen=stage.trains == "decoder"
            )
        found.total.backward()  # type: ignore[no-untyped-call]
        norm = nn.utils.clip_grad_norm_(self.optimizer.parameters.values(), self.recipe.clip)
        found.right["gradient"] = norm
        pace = stage.pace(self.place.step, share)
        if torch.isfinite(norm):
            self.optimizer.step(stage.rates.paced(pace))
        self.parts.zero_grad(set_to_none=True)
        return found

    def _log(self, stage: Stage, found: Score) -> None:
        line = {
            "stage": stage.name,
            "step": self.place.step,
            "seconds": round(self.place.seconds, 1),
            "pages": self.place.pages,
            **found.numbers(),
        }
        with self.run.log.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")

    # --- state ----------------------------------------------------------------------------------------------------------------

    def export(self, dtype: torch.dtype = torch.float32) -> Model:
        """The model as inference has it; shares memory with the training where the type is the same."""
        weights = {name: value.to(dtype) for name, value in self.parts.weights().items()}
        files = {CHARACTERS: characters_json(self.tokenizer.alphabet, self.tokenizer.num_rows)}
        return Model(self.parts.config, weights, self.tokenizer, files)

    def _tensors(self) -> dict[str, Tensor]:
        """All that a state holds; between two stages no momentum, so that stages can be added to a finished run."""
        weights = {f"weight {name}": value.data for name, value in self.parts.named_parameters()}
        return weights | (self.optimizer.state if self.place.step else {})

    def _save(self) -> None:
        save_state(self.run.state, self.place, self._tensors(), self.recipe.note())

    def _resume(self) -> None:
        """Raises InputError where the training that is there was begun with another recipe."""
        check_recipe(self.run.state, self.recipe)
        self.place = load_place(self.run.state)
        stage = self.recipe.stages[min(self.place.stage, len(self.recipe.stages) - 1)]
        self.optimizer = Optimizer(self._trained(stage))
        self.optimizer.taken = self.place.taken
        load_tensors(self.run.state, self._tensors())


def _is_fixed(name: str) -> bool:
    """What is stored for the public layout and means nothing here."""
    return "rel_pos" in name or "patch_embedding" in name


def progress(stage: Stage, place: Place) -> float:
    """The share of a stage that is over."""
    by_time = place.seconds / (60 * stage.minutes) if stage.minutes else 0.0
    return max(by_time, place.step / stage.steps if stage.steps else 0.0)


def read_log(path: Path) -> Iterator[dict[str, object]]:
    """The lines of a run's log."""
    with path.open(encoding="utf-8") as file:
        for line in file:
            yield json.loads(line)
