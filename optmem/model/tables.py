"""Position tables for another side than the one they were trained for: resized as the reference resizes them, and kept."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor


def resize_positions(table: Tensor, side: int) -> Tensor:
    """A square table [t, t, D] for side x side: bicubic and antialiased, enlarging too, in fp32.  -> [side, side, D]

    Antialiased is another kernel (a = -0.5, weights renormalised at the borders) than torch's plain bicubic (a = -0.75).
    """
    if table.shape[0] == side:
        return table
    images = table.permute(2, 0, 1)[None].float()
    resized = torch.nn.functional.interpolate(images, (side, side), mode="bicubic", align_corners=False, antialias=True)
    return resized[0].permute(1, 2, 0).to(table.dtype).contiguous()


def crop_positions(table: Tensor, side: int) -> Tensor:
    """The upper left corner, so that a place has the same vector on every page; resized where the page is larger."""
    return table[:side, :side].contiguous() if side <= table.shape[0] else resize_positions(table, side)


def resize_relative(table: Tensor, side: int) -> Tensor:
    """A table of relative positions [2 t - 1, d] for a grid of another side: linear, in fp32.  -> [2 side - 1, d]"""
    length = 2 * side - 1
    if table.shape[0] == length:
        return table
    resized = torch.nn.functional.interpolate(table.T[None].float(), length, mode="linear", align_corners=False)
    return resized[0].T.to(table.dtype).contiguous()


@dataclass(slots=True)
class _Kept:
    source: Tensor  # shares its storage, and with it the count of its changes, with the parameter
    version: int
    resized: Tensor


class ResizedTable:
    """A table at every side asked for; each is computed once and again after the parameter has changed.

    Nothing is kept where a gradient must flow through, while compiling, or of an inference tensor, which counts no changes.
    """

    def __init__(self, resize: Callable[[Tensor, int], Tensor]) -> None:
        self._resize = resize
        self._kept: dict[int, _Kept] = {}

    def at(self, table: Tensor, side: int) -> Tensor:
        """The table for this side, in the table's type."""
        needs_gradient = torch.is_grad_enabled() and table.requires_grad
        if needs_gradient or torch.compiler.is_compiling() or table.is_inference():
            return self._resize(table, side)
        kept = self._kept.get(side)
        if kept is None or not _is_unchanged(kept, table):
            with torch.inference_mode(False), torch.no_grad():  # usable later, whoever asks first
                source = table.detach()
                kept = _Kept(source, source._version, self._resize(source, side))
            self._kept[side] = kept
        return kept.resized

    def clear(self) -> None:
        """Forgets every side."""
        self._kept.clear()


def _is_unchanged(kept: _Kept, table: Tensor) -> bool:
    same_place = kept.source.data_ptr() == table.data_ptr() and kept.source.device == table.device
    return same_place and kept.source.dtype == table.dtype and kept.version == table._version
