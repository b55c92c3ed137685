"""Operators of the decoder's experts: route and expert_mlp."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from optmem import reference
from optmem.errors import InputError
from optmem.machine import require_e4m3
from optmem.ops.e4m3 import E4M3
from optmem.ops.linear import linear_rows_cpu
from optmem.ops.registry import (
    as_array,
    as_input_error,
    check,
    check_float,
    check_index,
    check_like,
    check_place,
    check_starts,
    check_weights,
    cpp_for,
    cpp_or_reference,
    described,
    library,
    triton_for,
    triton_or_reference,
)

# --- route ----------------------------------------------------------------------------------------------------------------------

library.define("route(Tensor x, Tensor weight, int top_k) -> (Tensor, Tensor, Tensor, Tensor)")


class Routing(NamedTuple):
    """Which experts every token goes to.  A pair is token * top_k + slot."""

    ids: Tensor  # int32 [T, top_k]   the likeliest expert first, of equals the lower id
    weights: Tensor  # fp32 [T, top_k]   their softmax over all experts, not renormalised
    order: Tensor  # int32 [T * top_k]  the pairs, by expert
    starts: Tensor  # int32 [E + 1]     expert e owns order[starts[e]] .. order[starts[e + 1]]


def route(x: Tensor, weight: Tensor, top_k: int) -> Routing:
    """Choose experts: logits x weight^T and softmax in fp32, the top_k likeliest, greedily.

    x [T, D], weight [E, D] of the same type
    """
    check_float("route", "x", x, 2)
    check(weight.dim() == 2, f"route: weight must be [E, {x.shape[1]}], got {list(weight.shape)}")
    check_like("route", x, {"weight": (weight, [weight.shape[0], x.shape[1]])})
    if not 1 <= top_k <= weight.shape[0]:  # no message of a number that a graph may not know
        raise InputError(f"route: top_k must be 1 to {weight.shape[0]}, got {top_k}")
    return Routing(*torch.ops.optmem.route(x, weight, top_k))


@torch.library.impl(library, "route", "CPU")
def _route_cpu(x: Tensor, weight: Tensor, top_k: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    cpu = cpp_for(x)
    if cpu is None:
        return reference.route(x, weight, top_k)
    scores = linear_rows_cpu(x, weight, torch.float32)
    out: tuple[Tensor, Tensor, Tensor, Tensor] = _route_fake(x, weight, top_k)
    cpu.route(as_array(scores), *map(as_array, out), torch.get_num_threads())
    return out


@torch.library.register_fake("optmem::route")
def _route_fake(x: Tensor, weight: Tensor, top_k: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    shape, wide = (x.shape[0], top_k), torch.float64 if x.dtype == torch.float64 else torch.float32
    ids, weights = x.new_empty(shape, dtype=torch.int32), x.new_empty(shape, dtype=wide)
    order = x.new_empty((x.shape[0] * top_k,), dtype=torch.int32)
    return ids, weights, order, x.new_empty((weight.shape[0] + 1,), dtype=torch.int32)


@torch.library.impl(library, "route", "CUDA")
def _route_cuda(x: Tensor, weight: Tensor, top_k: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    kernel = triton_for("route", x)
    if kernel is None:
        return reference.route(x, weight, top_k)
    out: tuple[Tensor, Tensor, Tensor, Tensor] = _route_fake(x, weight, top_k)
    kernel.route(x.contiguous(), weight.contiguous(), *out)
    return out


described.append(cpp_or_reference("route"))
described.append(triton_or_reference("route"))


# --- expert_mlp -----------------------------------------------------------------------------------------------------------------

library.define(
    "expert_mlp(Tensor x, Tensor gate_up, Tensor down, Tensor weights, Tensor order, Tensor starts, "
    "Tensor? gate_up_scales=None, Tensor? down_scales=None) -> Tensor"
)


class ExpertScales(NamedTuple):
    """What the rows of experts of int8 or e4m3 are multiplied by."""

    gate_up: Tensor  # fp32 [E, 2 * F]
    down: Tensor  # fp32 [E, D]


def expert_mlp(x: Tensor, gate_up: Tensor, down: Tensor, routing: Routing, scales: ExpertScales | None = None) -> Tensor:
    """Every token through its experts: sum of weight * down(silu(gate(x)) * up(x)), in fp32, rounded once.

    x        [T, D]
    gate_up  [E, 2 * F, D]    an expert's gate rows, then its up rows
    down     [E, D, F]        both of x's type, or of int8 or e4m3 with scales
    -> [T, D]

    On CPU a token's result does not depend on the others, bit for bit.
    Experts of int8 take bf16 tokens as `linear_rows` does, before each of the two products; to those of e4m3 tokens, and what
    stands between the two products, are rounded as `e4m3_rows` does.
    Raises InputError where order or starts point outside; on CUDA the host does not wait to see that, and such pairs are undefined.
    """
    check_float("expert_mlp", "x", x, 2)
    check(down.dim() == 3, f"expert_mlp: down must be [E, {x.shape[1]}, F], got {list(down.shape)}")
    _check_experts(x, gate_up, down, scales)
    _check_routing(x, down.shape[0], routing)
    with as_input_error():
        out: Tensor = torch.ops.optmem.expert_mlp(
            x, gate_up, down, routing.weights, routing.order, routing.starts, *(scales or (None, None))
        )
    return out


def _check_experts(x: Tensor, gate_up: Tensor, down: Tensor, scales: ExpertScales | None) -> None:
    hidden = x.shape[1]
    experts, _, width = down.shape
    weights = {"gate_up": (gate_up, [experts, 2 * width, hidden]), "down": (down, [experts, hidden, width])}
    if scales is None:
        check_weights("expert_mlp", x, weights, {})
    else:
        gate_up_scales, down_scales = scales
        of_rows = {"gate_up_scales": (gate_up_scales, [experts, 2 * width]), "down_scales": (down_scales, [experts, hidden])}
        check_weights("expert_mlp", x, weights, of_rows, E4M3 if gate_up.dtype == E4M3 else torch.int8)


def _check_routing(x: Tensor, experts: int, routing: Routing) -> None:
    tokens = x.shape[0]
    check(
        routing.weights.dim() == 2 and routing.weights.shape[0] == tokens and routing.weights.shape[1] > 0,
        f"expert_mlp: weights must be [{tokens}, top_k], got {list(routing.weights.shape)}",
    )
    weights_type = torch.float64 if x.dtype == torch.float64 else torch.float32
    check(routing.weights.dtype == weights_type, f"expert_mlp: weights must be {weights_type}, got {routing.weights.dtype}")
    check_index("expert_mlp", "order", routing.order, torch.int32, [routing.weights.numel()])
    check_index("expert_mlp", "starts", routing.starts, torch.int32, [experts + 1])
    check_place("expert_mlp", x, weights=routing.weights, order=routing.order, starts=routing.starts)


@torch.library.impl(library, "expert_mlp", "CPU")
def _expert_mlp_cpu(
    x: Tensor,
    gate_up: Tensor,
    down: Tensor,
    weights: Tensor,
    order: Tensor,
    starts: Tensor,
    gate_up_scales: Tensor | None = None,
    down_scales: Tensor | None = None,
) -> Tensor:
    cpu = None if gate_up.dtype == E4M3 else cpp_for(x)
    if cpu is None:
        return _expert_mlp_checked(x, gate_up, down, weights, order, starts, gate_up_scales, down_scales)
    given = (x, gate_up, down, weights, order, starts, gate_up_scales, down_scales)
    out = x.new_empty(x.shape)
    cpu.expert_mlp(*(as_array(tensor) for tensor in given if tensor is not None), as_array(out), torch.get_num_threads())
    return out


@torch.library.impl(library, "expert_mlp", "CUDA")
def _expert_mlp_cuda(
    x: Tensor,
    gate_up: Tensor,
    down: Tensor,
    weights: Tensor,
    order: Tensor,
    starts: Tensor,
    gate_up_scales: Tensor | None = None,
    down_scales: Tensor | None = None,
) -> Tensor:
    kernel = triton_for("expert_mlp", x) if gate_up.dtype in (x.dtype, E4M3) else None
    if kernel is None:
        return _expert_mlp_checked(x, gate_up, down, weights, order, starts, gate_up_scales, down_scales)
    if gate_up.dtype == E4M3:
        require_e4m3(x.device)
    given = [tensor.contiguous() for tensor in (x, gate_up, down, weights, order, starts)]
    scales = [None if tensor is None else tensor.contiguous() for tensor in (gate_up_scales, down_scales)]
    out = x.new_empty(x.shape)
    kernel.expert_mlp(*given, out, *scales)
    return out


def _expert_mlp_checked(
    x: Tensor,
    gate_up: Tensor,
    down: Tensor,
    weights: Tensor,
    order: Tensor,
    starts: Tensor,
    gate_up_scales: Tensor | None = None,
    down_scales: Tensor | None = None,
) -> Tensor:
    """The reference, behind the checks that the native code makes."""
    pairs = weights.numel()
    check_starts("expert_mlp", starts.tolist(), pairs, "expert")
    outside = order[(order < 0) | (order >= pairs)].tolist()
    if outside:
        raise InputError(f"expert_mlp: order names pair {outside[0]} of {pairs}")
    return reference.expert_mlp(x, gate_up, down, weights, order, starts, gate_up_scales, down_scales)


@torch.library.register_fake("optmem::expert_mlp")
def _expert_mlp_fake(
    x: Tensor,
    gate_up: Tensor,
    down: Tensor,
    weights: Tensor,
    order: Tensor,
    starts: Tensor,
    gate_up_scales: Tensor | None = None,
    down_scales: Tensor | None = None,
) -> Tensor:
    return x.new_empty(x.shape)


described.append(cpp_or_reference("expert_mlp", but="; e4m3 in plain torch"))
described.append(triton_or_reference("expert_mlp", but="; int8 in plain torch"))
