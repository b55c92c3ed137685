"""A decoder's matrices as int8: weights alone, a scale for every row, so that a token reads half of what bf16 would.

    weight[row] = scales[row] * q[row],   scales[row] = max |weight[row]| / 127,   q to the nearest

Attention's projections, MLPs, experts and lm_head are quantised; router, embeddings and norms are not: they are small, or are
not read as a whole.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from optmem.errors import InputError
from optmem.machine import empty_weight
from optmem.model.decoder import Decoder, Experts, Linear
from optmem.model.tensor_file import all_finite

LARGEST = 127  # -128 is not used: the grid is symmetric
ROWS_AT_ONCE = 4096  # of a matrix: their fp32 copies are all that is held beside it


def quantize_rows(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Rows to the nearest of 255 steps: [..., in] -> int8 [..., in] and fp32 [...].  A row of zeros has the scale 0.

    Raises InputError where a value is not finite.
    """
    rows = weight.detach().flatten(0, -2)
    steps = empty_weight(rows.shape, torch.int8, rows.device)
    scales = torch.empty(len(rows), dtype=torch.float32, device=rows.device)
    for first in range(0, len(rows), ROWS_AT_ONCE):
        part = slice(first, first + ROWS_AT_ONCE)
        wide = rows[part].float()
        scale = wide.abs().amax(-1) / LARGEST
        divisor = torch.where(scale == 0, 1.0, scale)[:, None]
        steps[part] = (wide / divisor).round_().clamp_(-LARGEST, LARGEST)  # a subnormal scale may be too small by half
        scales[part] = scale
    if not scales.isfinite().all():
        raise InputError("weights that are NaN or infinite cannot be quantised")
    return steps.view(weight.shape), scales.view(weight.shape[:-1])


def quantize(decoder: Decoder) -> None:
    """Hold a decoder's matrices as int8 from now on, one after the other; what shares its weights keeps them as they are.

    Raises InputError where they already are, are not on a CPU, or hold what is not finite.
    """
    device = decoder.lm_head.weight.device
    if device.type != "cpu":
        raise InputError(f"int8 weights are for a CPU, the decoder is on {device}")
    if decoder.is_quantized:
        raise InputError("the decoder's weights are quantised already")
    for name, parameter in decoder.named_parameters():
        if not all_finite(parameter):  # before any is changed
            raise InputError(f"weights that are NaN or infinite cannot be quantised: {name}")
    for module in decoder.modules():
        if isinstance(module, Linear):
            _quantize(module, "weight", "scales")
        elif isinstance(module, Experts):
            _quantize(module, "gate_up", "gate_up_scales")
            _quantize(module, "down", "down_scales")


def _quantize(module: nn.Module, weight: str, scales: str) -> None:
    """The parameter becomes a buffer of int8; the buffer of scales is filled."""
    steps, of_rows = quantize_rows(getattr(module, weight))
    delattr(module, weight)
    module.register_buffer(weight, steps)
    setattr(module, scales, of_rows)
