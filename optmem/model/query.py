"""Stage two of V2: Qwen2's body over the map of stage one and as many learned queries, which alone are kept.

The cells of the map see one another; a query sees all cells and the queries up to itself.  That is one mask: everything sees the
first n places and all up to its own.  Names are those of the checkpoints, with their doubled ``model.model``.
"""

from __future__ import annotations

from math import isqrt

import torch
from torch import Tensor, nn

from optmem import ops
from optmem.errors import InputError
from optmem.model.config import QueryConfig
from optmem.model.layers import Linear, RMSNorm, rope_table
from optmem.reference import rotate_half_split

NORM_EPS = 1e-6
Rotation = tuple[Tensor, Tensor]  # cosines and sines, each [T, head_dim / 2]


class QueryStage(nn.Module):
    """As many vectors as the map has cells, in the order of the learned queries."""

    def __init__(self, config: QueryConfig) -> None:
        super().__init__()
        self.config = config
        for count in config.query_counts:
            self.add_module(_table(count), nn.Embedding(count, config.width))
        self.model = Outer(config)

    def forward(self, cells: Tensor) -> Tensor:
        """[B, m, m, D] -> [B, m * m, D]; raises InputError where the family has no queries for this side."""
        batch, side = cells.shape[:2]
        count = side * side
        if count not in self.config.query_counts:
            sides = " or ".join(str(64 * isqrt(known)) for known in self.config.query_counts)
            raise InputError(f"this model encodes views of {sides} pixels, got {64 * side}")
        queries: Tensor = self.get_submodule(_table(count)).weight  # type: ignore[assignment]
        x = torch.cat([cells.flatten(1, 2), queries.expand(batch, -1, -1)], dim=1)
        body = self.model.model
        head_dim = self.config.width // self.config.heads
        rotation = rope_table(torch.arange(2 * count, device=x.device), head_dim, self.config.rope_theta, x.dtype)
        for layer in body.layers:
            x = layer(x, rotation, prefix=count)
        kept: Tensor = body.norm(x[:, count:])
        return kept


def _table(count: int) -> str:
    """A table is named by the pixels of the view that it serves."""
    return f"query_{64 * isqrt(count)}"


class Outer(nn.Module):
    """Holds the body under the name that the checkpoints give it."""

    def __init__(self, config: QueryConfig) -> None:
        super().__init__()
        self.model = Body(config)


class Body(nn.Module):
    """Holds layers and norm."""

    def __init__(self, config: QueryConfig) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Layer(config) for _ in range(config.layers))
        self.norm = RMSNorm(config.width, NORM_EPS)


class Layer(nn.Module):
    """Attention, then an MLP, each after a norm and added to what came in."""

    def __init__(self, config: QueryConfig) -> None:
        super().__init__()
        self.input_layernorm = RMSNorm(config.width, NORM_EPS)
        self.self_attn = Attention(config)
        self.post_attention_layernorm = RMSNorm(config.width, NORM_EPS)
        self.mlp = SwiGlu(config)

    def forward(self, x: Tensor, rotation: Rotation, prefix: int) -> Tensor:
        """[B, T, D] -> [B, T, D]."""
        x = x + self.self_attn(self.input_layernorm(x), rotation, prefix)
        out: Tensor = x + self.mlp(self.post_attention_layernorm(x))
        return out


class Attention(nn.Module):
    """Heads of queries in groups, each of which shares one head of keys and values."""

    def __init__(self, config: QueryConfig) -> None:
        super().__init__()
        self.head_dim = config.width // config.heads
        narrow = config.kv_heads * self.head_dim
        self.q_proj = Linear(config.width, config.width)
        self.k_proj = Linear(config.width, narrow)
        self.v_proj = Linear(config.width, narrow)
        self.o_proj = Linear(config.width, config.width, bias=False)

    def forward(self, x: Tensor, rotation: Rotation, prefix: int) -> Tensor:
        """[B, T, D] -> [B, T, D]."""
        heads = (-1, self.head_dim)
        q = rotate_half_split(self.q_proj(x).unflatten(2, heads), *rotation)
        k = rotate_half_split(self.k_proj(x).unflatten(2, heads), *rotation)
        v = self.v_proj(x).unflatten(2, heads)
        out: Tensor = self.o_proj(ops.attention(q, k, v, prefix).flatten(2))
        return out


class SwiGlu(nn.Module):
    """One projection gates another."""

    def __init__(self, config: QueryConfig) -> None:
        super().__init__()
        self.gate_proj = Linear(config.width, config.mlp_width, bias=False)
        self.up_proj = Linear(config.width, config.mlp_width, bias=False)
        self.down_proj = Linear(config.mlp_width, config.width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """[..., D] -> [..., D]."""
        out: Tensor = self.down_proj(nn.functional.silu(self.gate_proj(x)) * self.up_proj(x))
        return out
