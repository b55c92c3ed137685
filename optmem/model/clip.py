"""Stage two of V1 and UL: CLIP's body over the map of stage one.  Names are those of the checkpoints, misspelling and all."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from optmem import ops
from optmem.model.config import ClipConfig
from optmem.model.layers import LayerNorm, Linear
from optmem.model.tables import ResizedTable, crop_positions, resize_positions

NORM_EPS = 1e-5
PATCH = 14  # pixels of CLIP's own projection, which is stored and not used


class Clip(nn.Module):
    """Every cell of the map sees every other."""

    def __init__(self, config: ClipConfig) -> None:
        super().__init__()
        self.embeddings = Embeddings(config)
        self.pre_layrnorm = LayerNorm(config.width, NORM_EPS)
        self.transformer = Transformer(config)

    def forward(self, cells: Tensor) -> Tensor:
        """[B, m, m, D] -> [B, m * m, D]; the class vector takes part and is dropped, and no norm follows the last layer."""
        x = self.pre_layrnorm(self.embeddings(cells))
        pending: Tensor | None = None
        for layer in self.transformer.layers:
            x, pending = layer(x, pending)
        kept: Tensor = x[:, 1:] if pending is None else x[:, 1:] + pending[:, 1:]
        return kept


class Embeddings(nn.Module):
    """The class vector before the cells, and positions on all."""

    def __init__(self, config: ClipConfig) -> None:
        super().__init__()
        self.side = config.table_side
        self.class_embedding = nn.Parameter(torch.zeros(config.width))
        self.patch_embedding = nn.Conv2d(3, config.width, PATCH, PATCH, bias=False)  # never called: the map takes its place
        self.patch_embedding.requires_grad_(False)
        self.position_embedding = nn.Embedding(config.table_side**2 + 1, config.width)
        self._positions = ResizedTable(crop_positions if config.crops_table else resize_positions)

    def forward(self, cells: Tensor) -> Tensor:
        """[B, m, m, D] -> [B, 1 + m * m, D]."""
        positions = self.position_embedding.weight
        grid = self._positions.at(positions[1:].view(self.side, self.side, -1), cells.shape[1])
        first = (self.class_embedding + positions[0]).expand(cells.shape[0], 1, -1)
        return torch.cat([first, (cells + grid).flatten(1, 2)], dim=1)


class Transformer(nn.Module):
    """Holds the layers under the name that the checkpoints give them."""

    def __init__(self, config: ClipConfig) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Layer(config) for _ in range(config.layers))


class Layer(nn.Module):
    """Attention and MLP, each behind a norm.  What was not yet added to x travels along, to be added inside the next norm."""

    def __init__(self, config: ClipConfig) -> None:
        super().__init__()
        self.layer_norm1 = LayerNorm(config.width, NORM_EPS)
        self.self_attn = Attention(config)
        self.layer_norm2 = LayerNorm(config.width, NORM_EPS)
        self.mlp = Mlp(config)

    def forward(self, x: Tensor, pending: Tensor | None) -> tuple[Tensor, Tensor]:
        """x and what is to be added to it, both [B, T, D] -> the same, one layer later."""
        x, normed = (x, self.layer_norm1(x)) if pending is None else self.layer_norm1.add(x, pending)
        x, normed = self.layer_norm2.add(x, self.self_attn(normed))
        return x, self.mlp(normed)


class Attention(nn.Module):
    """Everything sees everything."""

    def __init__(self, config: ClipConfig) -> None:
        super().__init__()
        self.heads = config.heads
        self.qkv_proj = Linear(config.width, 3 * config.width)
        self.out_proj = Linear(config.width, config.width)

    def forward(self, x: Tensor) -> Tensor:
        """[B, T, D] -> [B, T, D]."""
        q, k, v = self.qkv_proj(x).unflatten(2, (3, self.heads, -1)).unbind(2)  # each [B, T, heads, d]
        out: Tensor = self.out_proj(ops.attention(q, k, v, prefix=x.shape[1]).flatten(2))
        return out


class Mlp(nn.Module):
    """Two layers with the quick GELU between them."""

    def __init__(self, config: ClipConfig) -> None:
        super().__init__()
        self.fc1 = Linear(config.width, config.mlp_width, activation="quick_gelu")
        self.fc2 = Linear(config.mlp_width, config.width)

    def forward(self, x: Tensor) -> Tensor:
        """[..., D] -> [..., D]."""
        out: Tensor = self.fc2(self.fc1(x))
        return out
