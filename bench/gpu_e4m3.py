"""A linear layer of 8-bit floats, for both benches on a GPU: its rows rounded and multiplied, beside cuBLAS and torch's own way."""

from __future__ import annotations

from functools import partial

import torch
from gpu_timing import Case, Errors, compare
from torch import Tensor

from optmem import ops, reference
from optmem.testing import linear_e4m3_inputs

CHECKED = 64  # rows, the last ones, that are compared with fp64


def linear_case(
    shape: str, sizes: tuple[int, int, int], activation: ops.Activation, device: torch.device, dtype: torch.dtype, *, has_bias: bool
) -> Case:
    """sizes   rows, in and out.  Torch's product of scaled rows is given rows that our kernel rounded, and knows no function."""
    rows, width_in, width_out = sizes
    x, weight, bias = linear_e4m3_inputs(*sizes, dtype, device)
    added = bias if has_bias else None
    steps, scales, _ = ops.e4m3_rows(weight)

    def ours() -> Tensor:
        return ops.linear_e4m3(ops.e4m3_rows(x), steps, scales, added, activation)

    def scaled() -> Tensor:
        taken = ops.e4m3_rows(x)
        out = torch._scaled_mm(
            taken.steps, steps.t(), scale_a=taken.scales[:, None], scale_b=scales[None], bias=added, out_dtype=dtype
        )
        return reference.activated(out, activation)

    def check() -> Errors:
        taken = ops.e4m3_rows(x[-CHECKED:])
        wide = (taken.scales.double(), steps, scales.double(), None if added is None else added.double())
        exact = reference.linear_e4m3(taken.steps, *wide, activation, torch.float64)
        return compare(ours()[-CHECKED:], reference.linear_e4m3(*taken[:2], steps, scales, added, activation, dtype), exact)

    others = {"cuBLAS, 16 bits": partial(reference.linear, x, weight, added, activation), "_scaled_mm": scaled}
    moved = x.nbytes + steps.nbytes + scales.nbytes + rows * width_out * dtype.itemsize + (bias.nbytes if has_bias else 0)
    return Case("linear_e4m3", shape, ops.E4M3, ours, others, check, moved, 2 * rows * width_in * width_out)
