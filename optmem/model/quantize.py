"""Matrices in 8 bits with a scale for every row, so that half of bf16 is held and read: two ways.

    int8   weight[row] = scales[row] * q[row],   scales[row] = max |weight[row]| / 127,   q to the nearest      a decoder's
    e4m3   the same with max |weight[row]| / 448, and q to the nearest 8-bit float                  an encoder's and a decoder's

With int8 tokens stay what they are; with e4m3 they are rounded as rows are, so that tensor cores multiply 8 bits.
Attention's projections, MLPs, experts and lm_head are quantised; router, embeddings, norms and convolutions are not: they are
small, or are not read as a whole.  Nor is the encoder's projector: under a hundredth of its products, and behind it nothing else
is added that would make its error small (docs/notes/kernels.md).
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from optmem import ops
from optmem.errors import InputError
from optmem.machine import empty_weight
from optmem.model import layers
from optmem.model.decoder import Decoder, Experts, Linear
from optmem.model.encoder import Encoder
from optmem.model.tensor_file import all_finite

Rounding = Callable[[Tensor], tuple[Tensor, Tensor]]
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
    _check_finite(scales)
    return steps.view(weight.shape), scales.view(weight.shape[:-1])


def _check_finite(scales: Tensor) -> None:
    if not scales.isfinite().all():
        raise InputError("weights that are NaN or infinite cannot be quantised")


def quantize_rows_e4m3(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Rows to the nearest 8-bit floats: [..., in] -> e4m3 [..., in] and fp32 [...].

    Raises InputError where a value is not finite.
    """
    rows = weight.detach().flatten(0, -2)
    steps = torch.empty(rows.shape, dtype=ops.E4M3, device=rows.device)
    scales = torch.empty(len(rows), dtype=torch.float32, device=rows.device)
    for first in range(0, len(rows), ROWS_AT_ONCE):
        part = slice(first, first + ROWS_AT_ONCE)
        steps[part], scales[part], _ = ops.e4m3_rows(rows[part])
    _check_finite(scales)
    return steps.view(weight.shape), scales.view(weight.shape[:-1])


def quantize(decoder: Decoder) -> None:
    """Hold a decoder's matrices as int8 from now on, one after the other; what shares its weights keeps them as they are.

    Raises InputError where they already are, are not on a CPU, or hold what is not finite.
    """
    device = decoder.lm_head.weight.device
    if device.type != "cpu":
        raise InputError(f"int8 weights are for a CPU, the decoder is on {device}")
    _check_new(decoder)
    _quantize_all(decoder, quantize_rows)


def quantize_e4m3(*parts: Encoder | Decoder) -> None:
    """Hold the matrices of encoders and decoders as e4m3 from now on, one after the other; what shares its weights keeps them as
    they are.

    Raises InputError where they are quantised already, or hold what is not finite; BackendError on a GPU that has no such products.
    """
    for part in parts:
        _check_new(part)
    for part in parts:
        _quantize_all(part, quantize_rows_e4m3)


def _check_new(part: Decoder | Encoder) -> None:
    """Before anything is changed."""
    if part.is_quantized:
        raise InputError(f"the {type(part).__name__.lower()}'s weights are quantised already")
    for name, parameter in part.named_parameters():
        if not all_finite(parameter):
            raise InputError(f"weights that are NaN or infinite cannot be quantised: {name}")


def _quantize_all(part: Encoder | Decoder, rounded: Rounding) -> None:
    kept = part.projector.layers if isinstance(part, Encoder) else None
    for module in part.modules():
        if isinstance(module, Linear | layers.Linear) and module is not kept:
            _quantize(module, "weight", "scales", rounded)
        elif isinstance(module, Experts):
            _quantize(module, "gate_up", "gate_up_scales", rounded)
            _quantize(module, "down", "down_scales", rounded)


def _quantize(module: nn.Module, weight: str, scales: str, rounded: Rounding) -> None:
    """The parameter becomes a buffer of 8 bits; the buffer of scales is filled."""
    steps, of_rows = rounded(getattr(module, weight))
    delattr(module, weight)
    module.register_buffer(weight, steps)
    setattr(module, scales, of_rows)
