"""The optimiser: Muon for matrices, AdamW for tables, vectors and what reads or chooses.

Muon's step is the momentum with all its singular values brought near one, by five steps of a quintic iteration
(K. Jordan, https://kellerjordan.github.io/posts/muon/).  Fused matrices are taken apart first; those of one shape go through the
iteration together.  What writes into the decoder's residual takes smaller steps: at full ones the residual grows until what
attention writes into it is lost in the norm.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from optmem.machine import fast_dtype

_PLAIN = re.compile(
    r"(embed|position|view_seperator|image_newline|patch_embed|lm_head|mlp\.gate\.|places|\.rows\.|\.columns\.|cursors|symbols|cells)"
)
_RESIDUAL = re.compile(r"decoder\.model\..*(o_proj|down_proj|experts\.down)")
_ENCODER = re.compile(r"^(encoder|glance|helpers\.patches)\.")
_QUINTIC = (3.4445, -4.7750, 2.0315)
_STEPS = 5


@dataclass(frozen=True, slots=True)
class Rates:
    """How far one step goes."""

    muon: float
    adam: float
    residual: float = 1.0  # factor on Muon's steps of what writes into the decoder's residual
    encoder: float = 1.0  # factor on all steps of the encoder and its read-outs

    def paced(self, pace: float) -> Rates:
        """The same, so many times as fast."""
        return replace(self, muon=self.muon * pace, adam=self.adam * pace)

    def for_matrix(self, name: str) -> float:
        """Muon's rate for a parameter."""
        return self.muon * self._share(name) * (self.residual if _RESIDUAL.search(name) else 1.0)

    def for_table(self, name: str) -> float:
        """AdamW's rate for a parameter."""
        return self.adam * self._share(name)

    def _share(self, name: str) -> float:
        return self.encoder if _ENCODER.search(name) else 1.0


class Optimizer:
    """Parameters by name, their momenta, and how many steps were taken."""

    def __init__(self, parameters: Mapping[str, nn.Parameter], *, decay: float = 0.01) -> None:
        self.parameters, self.decay, self.taken = dict(parameters), decay, 0
        self.state: dict[str, Tensor] = {}
        for name, parameter in self.parameters.items():
            for kind in ("momentum",) if takes_muon(name, parameter) else ("mean", "square"):
                self.state[f"{kind} {name}"] = torch.zeros_like(parameter)

    @torch.no_grad()
    def step(self, rates: Rates) -> None:
        """Moves every parameter that has a gradient, and forgets the gradients."""
        self.taken += 1
        together: dict[torch.Size, list[tuple[str, Tensor]]] = {}
        for name, parameter in self.parameters.items():
            if parameter.grad is None:
                continue
            if takes_muon(name, parameter):
                matrices = apart(name, self._momentum(name, parameter.grad))
                together.setdefault(matrices.shape[1:], []).append((name, matrices))
            else:
                self._adam(name, parameter, rates.for_table(name))
        for group in together.values():
            self._muon(group, rates)
        for parameter in self.parameters.values():
            parameter.grad = None

    def _momentum(self, name: str, gradient: Tensor) -> Tensor:
        """Nesterov's."""
        momentum = self.state[f"momentum {name}"].lerp_(gradient, 0.05)
        return gradient.lerp(momentum, 0.95)

    def _muon(self, group: list[tuple[str, Tensor]], rates: Rates) -> None:
        steps = orthogonal(torch.cat([matrices for _, matrices in group]))
        height, width = steps.shape[1:]
        scale = max(1.0, height / width) ** 0.5
        for (name, _), step in zip(group, torch.split(steps, [len(matrices) for _, matrices in group]), strict=True):
            rate, parameter = rates.for_matrix(name), self.parameters[name]
            parameter.mul_(1 - rate * self.decay).add_(step.reshape(parameter.shape), alpha=-rate * scale)

    def _adam(self, name: str, parameter: nn.Parameter, rate: float) -> None:
        assert parameter.grad is not None
        mean, square = self.state[f"mean {name}"], self.state[f"square {name}"]
        mean.lerp_(parameter.grad, 0.1)
        square.lerp_(parameter.grad.square(), 0.05)
        debiased = (square / (1 - 0.95**self.taken)).sqrt_().add_(1e-10)
        parameter.mul_(1 - rate * self.decay).addcdiv_(mean, debiased, value=-rate / (1 - 0.9**self.taken))


def takes_muon(name: str, parameter: Tensor) -> bool:
    """Whether this is a matrix that multiplies, and not a table, a vector, or what reads symbols and chooses experts."""
    return parameter.dim() > 1 and not _PLAIN.search(name)


def apart(name: str, tensor: Tensor) -> Tensor:
    """The matrices of a parameter: [n, out, in]."""
    if name.endswith("experts.gate_up"):
        return tensor.reshape(-1, tensor.shape[1] // 2, tensor.shape[2])
    if name.endswith(("qkv.weight", "qkv_proj.weight")):
        return tensor.reshape(3, -1, tensor.shape[1])
    if tensor.dim() == 3:
        return tensor
    return tensor.flatten(1)[None]


def orthogonal(matrices: Tensor) -> Tensor:
    """[n, a, b] -> the same with singular values between about 0.7 and 1.2, in the fast type of their device."""
    a, b, c = _QUINTIC
    is_tall = matrices.shape[1] > matrices.shape[2]
    x = (matrices.transpose(1, 2) if is_tall else matrices).to(fast_dtype(matrices.device))
    x = x / (x.float().norm(dim=(1, 2), keepdim=True) + 1e-7).to(x.dtype)
    for _ in range(_STEPS):
        square = x @ x.transpose(1, 2)
        x = torch.baddbmm(x, torch.baddbmm(square, square, square, beta=b, alpha=c), x, beta=a)
    return x.transpose(1, 2) if is_tall else x
