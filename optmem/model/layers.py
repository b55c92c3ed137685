"""What several stages share: linear layers, norms and the angles of rotary positions."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from optmem import ops


class Linear(nn.Linear):
    """A linear layer and the function that follows it."""

    scales: Tensor | None  # fp32 [width_out]  of a weight of e4m3

    def __init__(self, width_in: int, width_out: int, *, bias: bool = True, activation: ops.Activation = "none") -> None:
        super().__init__(width_in, width_out, bias=bias)
        self.activation: ops.Activation = activation
        self.register_buffer("scales", None)

    def forward(self, x: Tensor) -> Tensor:
        """[..., width_in] -> [..., width_out]."""
        if self.scales is not None:
            return ops.linear_e4m3(ops.e4m3_rows(x), self.weight, self.scales, self.bias, self.activation)
        return ops.linear(x, self.weight, self.bias, self.activation)


class LayerNorm(nn.LayerNorm):
    """Rows to mean 0 and variance 1, scaled and shifted; with a residual, their sum."""

    def forward(self, x: Tensor) -> Tensor:
        """[..., width] -> [..., width]."""
        return ops.layer_norm(x, self.weight, self.bias, self.eps)

    def add(self, x: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
        """The sum and its norm."""
        return ops.add_layer_norm(x, residual, self.weight, self.bias, self.eps)


class RMSNorm(nn.Module):
    """Normalises rows; with a residual, their sum."""

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(width))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        """[..., width] -> [..., width]."""
        return ops.rms_norm(x.flatten(0, -2), self.weight, self.eps).view(x.shape)

    def add(self, x: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
        """The sum and its norm."""
        return ops.add_rms_norm(x, residual, self.weight, self.eps)


def rope_table(positions: Tensor, head_dim: int, theta: float, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """cos and sin of every position's angles, [T, head_dim / 2]: computed in fp32, then rounded to dtype as the references do."""
    exponent = torch.arange(0, head_dim, 2, dtype=torch.float32, device=positions.device) / head_dim
    angles = positions[:, None].float() * (1.0 / theta**exponent)
    return angles.cos().to(dtype), angles.sin().to(dtype)
