"""An encoder whose passes over views are recorded once for every size and number of views, and replayed.

    views ──> pinned ──copy──> pixels of the device, always in the same place ──replay──> features ──copy──> the caller's own

What is left in a place that no view takes is encoded with the rest, and dropped: a view's features depend on no other.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from optmem.engine.buckets import view_buckets
from optmem.engine.lanes import Lane, Recordings
from optmem.model.assembly import PIXELS_AT_ONCE, encode_views
from optmem.pixels import Views

log = logging.getLogger(__name__)
MOST_SIZES = 8  # of views, that are recorded: each holds PIXELS_AT_ONCE bytes or three times that, and what its passes leave


class ViewEncoder:
    """An encoder on a lane, for one caller at a time, as the encode queue lets them in."""

    def __init__(self, encoder: Callable[[Tensor], Tensor], lane: Lane) -> None:
        """
        encoder   uint8 [B, S, S, C] of the device -> [B, n, hidden]
        """
        self.encoder, self.lane = encoder, lane
        self.passes = Recordings(lane, "encode")
        self._pixels: dict[torch.Size, Tensor | None] = {}  # by a view's shape: uint8 [most, S, S, C]

    @torch.inference_mode()
    def encode(self, pictures: Sequence[Views]) -> list[Tensor]:
        """Features of every picture, [n, hidden], as a model's `encode` has them."""
        with self.lane.working():
            features = encode_views(self._encoded, pictures)
        for each in features:
            self.lane.use(each)
        return features

    def _encoded(self, views: Tensor) -> Tensor:
        """uint8 [B, S, S, C] of the host -> [B, n, hidden]."""
        static = self._place(views.shape[1:])
        if static is None or not len(views):
            return self.encoder(self.lane.staged(views).to(self.lane.device, non_blocking=True))
        parts, end = list[Tensor](), 0
        for size, count in view_buckets(len(views), len(static)):
            first, end = end, end + count
            static[:count].copy_(self.lane.staged(views[first:end]), non_blocking=True)
            act = _pass(self.encoder, static[:size])
            parts.append(self.passes.run(tuple(static[:size].shape), act)[:count].clone())
        return torch.cat(parts) if len(parts) > 1 else parts[0]

    def _place(self, shape: torch.Size) -> Tensor | None:
        """Where views of this shape are put; None where there are too many shapes already."""
        if shape not in self._pixels and len(self._pixels) >= MOST_SIZES:
            log.warning("encode: views of %s are not recorded, for those of %d other shapes are", list(shape), MOST_SIZES)
            self._pixels[shape] = None
        if shape not in self._pixels:
            most = max(PIXELS_AT_ONCE // (shape[0] * shape[1]), 1)
            self._pixels[shape] = torch.zeros(most, *shape, dtype=torch.uint8, device=self.lane.device)
        return self._pixels[shape]


def _pass(encoder: Callable[[Tensor], Tensor], pixels: Tensor) -> Callable[[], Tensor]:
    return lambda: encoder(pixels)
