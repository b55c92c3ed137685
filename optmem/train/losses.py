"""What a batch costs: every loss with its weight, and beside it the share of right answers."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.nn import functional

from optmem.model.config import ModelConfig
from optmem.train import forward
from optmem.train.alignment import CURSORS, MAX_SIDE, READING, X_STEP, Y_STEP, Parts, expert_of
from optmem.train.labels import NOTHING, Labels


@dataclass(frozen=True, slots=True)
class Weights:
    """How much each loss counts."""

    glance: float = 1.0  # symbols from vision tokens
    patches: float = 0.5  # symbols from patches
    cells: float = 0.1  # the size of cells
    text: float = 1.0
    deep: float = 0.2  # text from the reading layers
    look: float = 0.3
    cursor: float = 0.1
    route: float = 0.1
    heads: int = 0  # of each reading layer that must look; 0 is all


@dataclass(slots=True)
class Score:
    """The sum of the losses, and what they were made of."""

    total: Tensor
    losses: dict[str, Tensor] = field(default_factory=dict)
    right: dict[str, Tensor] = field(default_factory=dict)  # shares between 0 and 1, and the gradient's norm

    def add(self, name: str, weight: float, loss: Tensor, right: Tensor | None = None) -> None:
        """Counts one loss."""
        self.total = self.total + weight * loss
        self.losses[name] = loss.detach()
        if right is not None:
            self.right[name] = right.detach()

    def numbers(self) -> dict[str, float]:
        """All of it, for the log."""
        named = {"loss": self.total.detach()} | {f"{name} loss": value for name, value in self.losses.items()} | self.right
        return {name: round(float(value), 4) for name, value in named.items()}


def score(parts: Parts, labels: Labels, weights: Weights, bos: int, *, is_encoder_frozen: bool = False) -> Score:
    """The losses of a batch; those of the decoder where it has stretches."""
    with torch.set_grad_enabled(not is_encoder_frozen):
        vision = forward.encode(parts.encoder, labels.pixels)
    total = Score(torch.zeros((), device=labels.pixels.device))
    if not is_encoder_frozen:
        _see(total, parts, labels, weights, vision)
    if labels.ids.shape[1]:
        prefix = forward.prefixes(parts.encoder, parts.decoder, vision.tokens, bos)
        reading = forward.read(parts.decoder, prefix, labels.ids, labels.positions)
        _say(total, parts, labels, weights, reading)
        _align(total, parts, labels, weights, reading)
    return total


def _see(total: Score, parts: Parts, labels: Labels, weights: Weights, vision: forward.Vision) -> None:
    """The read-outs of patches and tokens."""
    total.add("glance", weights.glance, *_compare(parts.glance(vision.tokens, labels.spots), labels.symbols))
    if weights.patches:
        total.add("patches", weights.patches, *_compare(parts.helpers.patches(vision.patches, labels.spots), labels.symbols))
    if (labels.cells != NOTHING).any():
        total.add("cells", weights.cells, *_compare(parts.glance.vote(vision.tokens), labels.cells))


def _say(total: Score, parts: Parts, labels: Labels, weights: Weights, reading: forward.Reading) -> None:
    """Text, from the last layer and from the reading ones."""
    is_asked = labels.targets != NOTHING
    targets = labels.targets[is_asked]
    last = len(reading.hidden) - 1
    total.add("text", weights.text, *_compare(forward.logits(parts.decoder, reading.hidden[last][is_asked]), targets))
    if weights.deep:
        for layer in READING:
            total.add(
                f"deep {layer}", weights.deep, *_compare(forward.logits(parts.decoder, reading.hidden[layer][is_asked]), targets)
            )


def _align(total: Score, parts: Parts, labels: Labels, weights: Weights, reading: forward.Reading) -> None:
    """Where the layers look, what they know of the next symbol's place, and which expert they choose."""
    is_placed = labels.places[..., 0] >= 0
    pixels = labels.places[is_placed]  # [n, 2]
    side = labels.pixels.shape[1]
    seen = forward.prefix_places(pixels, side)
    config: ModelConfig = parts.config
    for layer in READING:
        look = reading.looks[layer][:, : weights.heads or None].permute(0, 2, 3, 1, 4)[is_placed]  # [n, heads, P]
        mass = look.float().gather(2, seen[:, None, None].expand(-1, look.shape[1], 1))
        total.add(f"look {layer}", weights.look, -(mass + 1e-6).log().mean(), mass.mean())
        routes = reading.routes[layer - config.decoder.dense_layers][is_placed]
        if weights.route:
            total.add(f"route {layer}", weights.route, *_compare(routes, expert_of(pixels)))
    if not weights.cursor:
        return
    columns = MAX_SIDE // X_STEP
    for layer, cursor in zip(CURSORS, parts.helpers.cursors, strict=True):
        x, y = cursor(reading.hidden[layer][is_placed]).split([columns, MAX_SIDE // Y_STEP], dim=-1)
        total.add(f"x {layer}", weights.cursor, *_compare(x, pixels[:, 1] // X_STEP))
        total.add(f"y {layer}", weights.cursor, *_compare(y, pixels[:, 0] // Y_STEP))


def _compare(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Cross entropy and the share of right answers."""
    logits, targets = logits.flatten(0, -2).float(), targets.flatten()
    loss = functional.cross_entropy(logits, targets, ignore_index=NOTHING)
    is_asked = targets != NOTHING
    return loss, ((logits.argmax(-1) == targets) & is_asked).sum() / is_asked.sum()
