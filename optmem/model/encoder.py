"""Pixels to vision tokens, for every family.

    pixels uint8 [B, S, S, C] -> sam_model -> map [B, m, m, C1], m = S / 64
    V1, UL:  vision_model -> [B, m * m, C2], beside the map -> projector -> [B, m * m, hidden]
    V2:      qwen2_model  -> [B, m * m, C2]                 -> projector -> [B, m * m, hidden]

Parameters carry the names of the checkpoints (without their ``model.``), misspellings included.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from optmem.errors import InputError
from optmem.model.clip import Clip
from optmem.model.config import ModelConfig
from optmem.model.layers import Linear
from optmem.model.query import QueryStage
from optmem.model.stage_one import StageOne
from optmem.pixels import PIXELS_PER_TOKEN


class Encoder(nn.Module):
    """The vision encoder of a model, with the two learned vectors that assembly puts among its tokens."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        hidden = config.decoder.hidden
        self.sam_model = StageOne(config.stage_one)
        self.vision_model = Clip(config.clip) if config.clip is not None else None
        self.qwen2_model = QueryStage(config.query) if config.query is not None else None
        self.projector = Projector(config.feature_width, hidden)
        self.image_newline = nn.Parameter(torch.zeros(hidden)) if config.has_newlines else None
        self.view_seperator = nn.Parameter(torch.zeros(hidden))

    @property
    def is_quantized(self) -> bool:
        """Whether linear layers are held as e4m3."""
        return any(isinstance(module, Linear) and module.scales is not None for module in self.modules())

    def forward(self, pixels: Tensor) -> Tensor:
        """Vision tokens of square views of one size, row by row.

        pixels  uint8 [B, S, S, C]   C is 1 or 3, S a multiple of 64
        -> [B, (S / 64) ** 2, hidden] in the weights' type

        Raises InputError where the pixels are not of this kind, or the family has no views of this size.
        """
        if pixels.dim() != 4 or pixels.shape[1] != pixels.shape[2] or pixels.shape[1] % PIXELS_PER_TOKEN or not pixels.shape[1]:
            raise InputError(f"views must be [B, S, S, C] with S a multiple of {PIXELS_PER_TOKEN}, got {list(pixels.shape)}")
        pixels = pixels.to(self.view_seperator.device)
        tokens: Tensor = self.projector(self._second_stage(self.sam_model(pixels)))
        return tokens

    def _second_stage(self, cells: Tensor) -> Tensor:
        """[B, m, m, C1] -> [B, m * m, features]."""
        if self.vision_model is not None:
            return torch.cat([self.vision_model(cells), cells.flatten(1, 2)], dim=-1)
        assert self.qwen2_model is not None
        queries: Tensor = self.qwen2_model(cells)
        return queries


class Projector(nn.Module):
    """One linear layer to the decoder's width, under the name that the checkpoints give it."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.layers = Linear(width, hidden)

    def forward(self, x: Tensor) -> Tensor:
        """[B, n, features] -> [B, n, hidden]."""
        out: Tensor = self.layers(x)
        return out
