"""Stage one of every family: SAM's image encoder and the 16x compressor.  Names are those of the checkpoints.

pixels uint8 [B, S, S, C] -> patches [B, g, g, 768], g = S / 16
-> 12 blocks, windowed but for four -> map [B, m, m, 1024], m = S / 64
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from optmem import ops
from optmem.model.config import StageOneConfig
from optmem.model.layers import LayerNorm, Linear
from optmem.model.tables import ResizedTable, crop_positions, resize_positions, resize_relative

NORM_EPS = 1e-6


class StageOne(nn.Module):
    """The map of a view: one vector for every 64 x 64 pixels."""

    def __init__(self, config: StageOneConfig) -> None:
        super().__init__()
        width, neck = config.width, config.neck_width
        self.patch_embed = PatchEmbed(config)
        self.pos_embed = nn.Parameter(torch.zeros(1, config.table_side, config.table_side, width))
        self.blocks = nn.ModuleList(Block(config, is_global=i in config.global_layers) for i in range(config.layers))
        self.neck = nn.Sequential(  # holds weights for ops.compress
            nn.Conv2d(width, neck, 1, bias=False),
            nn.LayerNorm(neck, NORM_EPS),
            nn.Conv2d(neck, neck, 3, padding=1, bias=False),
            nn.LayerNorm(neck, NORM_EPS),
        )
        self.net_2 = nn.Conv2d(neck, config.channels[0], 3, stride=2, padding=1, bias=False)
        self.net_3 = nn.Conv2d(config.channels[0], config.channels[1], 3, stride=2, padding=1, bias=False)
        self._positions = ResizedTable(crop_positions if config.crops_table else resize_positions)

    def forward(self, pixels: Tensor) -> Tensor:
        """uint8 [B, S, S, C] -> [B, m, m, channels], row by row."""
        side = pixels.shape[1] // 16
        projection = self.patch_embed.proj
        assert projection.bias is not None
        x = ops.patch_embed(pixels, projection.weight, projection.bias, self._positions.at(self.pos_embed[0], side))
        pending: Tensor | None = None
        for block in self.blocks:
            x, pending = block(x, pending)
        x = x if pending is None else x + pending
        weights = [parameter for layer in (*self.neck, self.net_2, self.net_3) for parameter in layer.parameters()]
        return ops.compress(x, *weights)


class PatchEmbed(nn.Module):
    """Holds the projection for ops.patch_embed."""

    def __init__(self, config: StageOneConfig) -> None:
        super().__init__()
        self.proj = nn.Conv2d(3, config.width, config.patch, config.patch)


class Block(nn.Module):
    """Attention and MLP, each behind a norm.  What was not yet added to x travels along, to be added inside the next norm."""

    def __init__(self, config: StageOneConfig, *, is_global: bool) -> None:
        super().__init__()
        self.norm1 = LayerNorm(config.width, NORM_EPS)
        self.attn = Attention(config, is_global=is_global)
        self.norm2 = LayerNorm(config.width, NORM_EPS)
        self.mlp = Mlp(config)

    def forward(self, x: Tensor, pending: Tensor | None) -> tuple[Tensor, Tensor]:
        """x and what is to be added to it, both [B, g, g, D] -> the same, one block later."""
        x, normed = (x, self.norm1(x)) if pending is None else self.norm1.add(x, pending)
        x, normed = self.norm2.add(x, self.attn(normed))
        return x, self.mlp(normed)


class Attention(nn.Module):
    """Attention with decomposed relative positions, over the grid or inside windows."""

    def __init__(self, config: StageOneConfig, *, is_global: bool) -> None:
        super().__init__()
        side = config.table_side if is_global else config.window
        head_dim = config.width // config.heads
        self.is_global = is_global
        self.qkv = Linear(config.width, 3 * config.width)
        self.proj = Linear(config.width, config.width)
        self.rel_pos_h = nn.Parameter(torch.zeros(2 * side - 1, head_dim))
        self.rel_pos_w = nn.Parameter(torch.zeros(2 * side - 1, head_dim))
        self._rows, self._columns = ResizedTable(resize_relative), ResizedTable(resize_relative)

    def forward(self, x: Tensor) -> Tensor:
        """[B, h, w, D] -> [B, h, w, D]."""
        qkv = self.qkv(x)
        if self.is_global:
            rows = self._rows.at(self.rel_pos_h, x.shape[1])
            columns = self._columns.at(self.rel_pos_w, x.shape[2])
            mixed = ops.global_attention(qkv, rows, columns)
        else:
            # Windows are padded after the norm: what the projection makes of the padding is its bias, and costs nothing.
            mixed = ops.window_attention(qkv, self.qkv.bias, self.rel_pos_h, self.rel_pos_w)
        out: Tensor = self.proj(mixed)
        return out


class Mlp(nn.Module):
    """Two layers with the exact GELU between them."""

    def __init__(self, config: StageOneConfig) -> None:
        super().__init__()
        self.lin1 = Linear(config.width, config.mlp_width, activation="gelu")
        self.lin2 = Linear(config.mlp_width, config.width)

    def forward(self, x: Tensor) -> Tensor:
        """[..., D] -> [..., D]."""
        out: Tensor = self.lin2(self.lin1(x))
        return out
