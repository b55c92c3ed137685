"""Operators of the decoder: linear_rows, norms, rope_cache, paged_attention, route and expert_mlp."""

from __future__ import annotations

from functools import partial
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from optmem import reference
from optmem.errors import InputError
from optmem.ops.registry import (
    Implementation,
    as_array,
    as_input_error,
    check,
    check_float,
    check_index,
    check_like,
    cpp_for,
    cpp_or_reference,
    described,
    library,
    torch_on_cuda,
)


def _check_place(operator: str, first: Tensor, **tensors: Tensor) -> None:
    for name, tensor in tensors.items():
        check(tensor.device == first.device, f"{operator}: {name} must be on {first.device}, got {tensor.device}")


# --- linear_rows ----------------------------------------------------------------------------------------------------------------

library.define("linear_rows(Tensor x, Tensor weight, ScalarType dtype) -> Tensor")


def linear_rows(x: Tensor, weight: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """x weight^T, summed in fp32; on CPU a row's result does not depend on the other rows, bit for bit.

    x       [T, in]     weight  [out, in] of the same type
    dtype               of the result: x's own, or torch.float32
    -> [T, out]
    """
    check_float("linear_rows", "x", x, 2)
    if weight.dim() != 2:
        raise InputError(f"linear_rows: weight must be [out, {x.shape[1]}], got {list(weight.shape)}")
    check_like("linear_rows", x, {"weight": (weight, [weight.shape[0], x.shape[1]])})
    dtype = dtype or x.dtype
    if dtype not in (x.dtype, torch.float32):
        raise InputError(f"linear_rows: dtype must be {x.dtype} or torch.float32, got {dtype}")
    rows: Tensor = torch.ops.optmem.linear_rows(x, weight, dtype)
    return rows


@torch.library.impl(library, "linear_rows", "CPU")
def _linear_rows_cpu(x: Tensor, weight: Tensor, dtype: torch.dtype) -> Tensor:
    cpu = cpp_for(x)
    if cpu is None:
        return reference.linear_rows(x, weight, dtype)
    out: Tensor = _linear_rows_fake(x, weight, dtype)
    cpu.linear_rows(as_array(x), as_array(weight), as_array(out), torch.get_num_threads())
    return out


@torch.library.register_fake("optmem::linear_rows")
def _linear_rows_fake(x: Tensor, weight: Tensor, dtype: torch.dtype) -> Tensor:
    return x.new_empty((x.shape[0], weight.shape[0]), dtype=dtype)


torch.library.impl(library, "linear_rows", "CUDA")(reference.linear_rows)
described.append(cpp_or_reference("linear_rows"))
described.append(lambda: Implementation("linear_rows", "cuda", "reference", "cuBLAS is already good"))


# --- rms_norm -------------------------------------------------------------------------------------------------------------------

library.define("rms_norm(Tensor x, Tensor weight, float eps) -> Tensor")
library.define("add_rms_norm(Tensor x, Tensor residual, Tensor weight, float eps) -> (Tensor, Tensor)")


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Divide every row by the root of its mean square: fp32 inside, rounded to x's type, then times the weight.

    x [T, D], weight [D] -> [T, D]
    """
    check_float("rms_norm", "x", x, 2)
    check_like("rms_norm", x, {"weight": (weight, [x.shape[1]])})
    normed: Tensor = torch.ops.optmem.rms_norm(x, weight, eps)
    return normed


def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """rms_norm of x + residual.  All [T, D] but the weight [D].  -> the sum, rounded to x's type, and its norm."""
    check_float("add_rms_norm", "x", x, 2)
    check_like("add_rms_norm", x, {"residual": (residual, list(x.shape)), "weight": (weight, [x.shape[1]])})
    both: tuple[Tensor, Tensor] = torch.ops.optmem.add_rms_norm(x, residual, weight, eps)
    return both


@torch.library.impl(library, "rms_norm", "CPU")
def _rms_norm_cpu(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    cpu = cpp_for(x)
    if cpu is None:
        return reference.rms_norm(x, weight, eps)
    out: Tensor = _rms_norm_fake(x, weight, eps)
    cpu.rms_norm(as_array(x), as_array(weight), as_array(out), eps, torch.get_num_threads())
    return out


@torch.library.impl(library, "add_rms_norm", "CPU")
def _add_rms_norm_cpu(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    cpu = cpp_for(x)
    if cpu is None:
        return reference.add_rms_norm(x, residual, weight, eps)
    total, out = _add_rms_norm_fake(x, residual, weight, eps)
    cpu.add_rms_norm(*map(as_array, (x, residual, weight, total, out)), eps, torch.get_num_threads())
    return total, out


@torch.library.register_fake("optmem::rms_norm")
def _rms_norm_fake(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return x.new_empty(x.shape)


@torch.library.register_fake("optmem::add_rms_norm")
def _add_rms_norm_fake(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape), x.new_empty(x.shape)


torch.library.impl(library, "rms_norm", "CUDA")(reference.rms_norm)
torch.library.impl(library, "add_rms_norm", "CUDA")(reference.add_rms_norm)
for _name in ("rms_norm", "add_rms_norm"):
    described.append(cpp_or_reference(_name))
    described.append(partial(torch_on_cuda, _name))


# --- silu_mul -------------------------------------------------------------------------------------------------------------------

library.define("silu_mul(Tensor gate, Tensor up) -> Tensor")


def silu_mul(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) * up, rounded once, both [T, F].  torch's own differs in the last bit with a value's place in memory."""
    check_float("silu_mul", "gate", gate, 2)
    check_like("silu_mul", gate, {"up": (up, list(gate.shape))})
    product: Tensor = torch.ops.optmem.silu_mul(gate, up)
    return product


@torch.library.impl(library, "silu_mul", "CPU")
def _silu_mul_cpu(gate: Tensor, up: Tensor) -> Tensor:
    cpu = cpp_for(gate)
    if cpu is None:
        return reference.silu_mul(gate, up)
    out = gate.new_empty(gate.shape)
    cpu.silu_mul(*map(as_array, (gate, up, out)), torch.get_num_threads())
    return out


@torch.library.register_fake("optmem::silu_mul")
def _silu_mul_fake(gate: Tensor, up: Tensor) -> Tensor:
    return gate.new_empty(gate.shape)


torch.library.impl(library, "silu_mul", "CUDA")(reference.silu_mul)
described.append(cpp_or_reference("silu_mul"))
described.append(partial(torch_on_cuda, "silu_mul"))


# --- rope_cache -----------------------------------------------------------------------------------------------------------------

library.define(
    "rope_cache(Tensor(a!) queries, Tensor keys, Tensor values, Tensor cos, Tensor sin, Tensor slots, "
    "Tensor(b!) key_cache, Tensor(c!) value_cache) -> ()"
)


def rope_cache(
    queries: Tensor,
    keys: Tensor,
    values: Tensor,
    cos: Tensor,
    sin: Tensor,
    slots: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
) -> None:
    """Rotate queries and keys by their positions; the queries stay where they are, keys and values go into the cache.

    queries, keys, values    [T, H, D]     queries are rotated in place and must be contiguous
    cos, sin                 [T, D / 2]    of every position, rounded to the same type: channel i turns with channel i + D / 2
    slots                    int64 [T]     cell page * page_size + offset of every token; a negative one writes nothing
    key_cache, value_cache   [pages, page_size, H, D], contiguous
    """
    check_float("rope_cache", "queries", queries, 3)
    tokens, heads, dim = queries.shape
    check(dim % 2 == 0, f"rope_cache: a head must have an even width, got {dim}")
    check(key_cache.dim() == 4, f"rope_cache: key_cache must be [pages, page_size, H, D], got {list(key_cache.shape)}")
    cache_shape = [*key_cache.shape[:2], heads, dim]
    wanted = {name: (tensor, [tokens, heads, dim]) for name, tensor in (("keys", keys), ("values", values))}
    wanted |= {name: (tensor, [tokens, dim // 2]) for name, tensor in (("cos", cos), ("sin", sin))}
    wanted |= {"key_cache": (key_cache, cache_shape), "value_cache": (value_cache, cache_shape)}
    check_like("rope_cache", queries, wanted)
    check_index("rope_cache", "slots", slots, torch.int64, [tokens])
    _check_place("rope_cache", queries, slots=slots)
    for name, tensor in (("queries", queries), ("key_cache", key_cache), ("value_cache", value_cache)):
        check(tensor.is_contiguous(), f"rope_cache: {name} is written in place and must be contiguous")
    with as_input_error():
        torch.ops.optmem.rope_cache(queries, keys, values, cos, sin, slots, key_cache, value_cache)


@torch.library.impl(library, "rope_cache", "CPU")
def _rope_cache_cpu(
    queries: Tensor,
    keys: Tensor,
    values: Tensor,
    cos: Tensor,
    sin: Tensor,
    slots: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
) -> None:
    cpu = cpp_for(queries)
    arguments = (queries, keys, values, cos, sin, slots, key_cache, value_cache)
    if cpu is None:
        return _rope_cache_checked(*arguments)
    cpu.rope_cache(*map(as_array, arguments), torch.get_num_threads())
    return None


@torch.library.impl(library, "rope_cache", "CUDA")
def _rope_cache_checked(
    queries: Tensor,
    keys: Tensor,
    values: Tensor,
    cos: Tensor,
    sin: Tensor,
    slots: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
) -> None:
    """The reference, behind the checks that the native code makes: nothing is written where a slot lies outside."""
    cells = key_cache.shape[0] * key_cache.shape[1]
    outside = (slots >= cells).nonzero().flatten().tolist()
    if outside:
        raise InputError(f"rope_cache: token {outside[0]} goes to cell {int(slots[outside[0]])} of {cells}")
    reference.rope_cache(queries, keys, values, cos, sin, slots, key_cache, value_cache)


@torch.library.register_fake("optmem::rope_cache")
def _rope_cache_fake(
    queries: Tensor,
    keys: Tensor,
    values: Tensor,
    cos: Tensor,
    sin: Tensor,
    slots: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
) -> None:
    return None


described.append(cpp_or_reference("rope_cache"))
described.append(partial(torch_on_cuda, "rope_cache"))


# --- paged_attention ------------------------------------------------------------------------------------------------------------

library.define(
    "paged_attention(Tensor queries, Tensor keys, Tensor values, Tensor table, Tensor starts, Tensor lengths, Tensor prompts, "
    "int window, float scale) -> Tensor"
)

PAGE_UNIT = 16  # a page holds a multiple of this many tokens


def paged_attention(
    queries: Tensor,
    keys: Tensor,
    values: Tensor,
    table: Tensor,
    starts: Tensor,
    lengths: Tensor,
    prompts: Tensor,
    window: int | None,
    scale: float,
) -> Tensor:
    """Causal attention of every sequence's last tokens over its pages: prefill, a chunk of it, one token, or drafts to verify.

    queries       [T, H, D]                    rotated; sequence b asks with starts[b] .. starts[b + 1]
    keys, values  [pages, page_size, H, D]     the queries' own are already in them; page_size is a multiple of 16
    table         int32 [B, max_pages]         page of every page_size tokens; entries that are not attended to may be anything
    starts        int64 [B + 1]
    lengths       int64 [B]                    tokens of the sequence in the cache, those asking counted
    prompts       int64 [B]                    its first tokens, which no window hides
    window                                     query i sees key j <= i if j < prompt or j > i - window; None sees all
    -> [T, H, D]

    Softmax and sums in fp32.  On CPU a query's result does not depend on what else is asked, bit for bit.  Cells of a page that
    is attended to must hold finite numbers up to the sequence's length.  Raises InputError where the table points outside.
    """
    check_float("paged_attention", "queries", queries, 3)
    check(keys.dim() == 4, f"paged_attention: keys must be [pages, page_size, H, D], got {list(keys.shape)}")
    page_size = keys.shape[1]
    check(
        page_size > 0 and page_size % PAGE_UNIT == 0,
        f"paged_attention: a page must hold a multiple of {PAGE_UNIT} tokens, got {page_size}",
    )
    shape = [*keys.shape[:2], *queries.shape[1:]]
    check_like("paged_attention", queries, {"keys": (keys, shape), "values": (values, shape)})
    check(table.dim() == 2, f"paged_attention: table must be [B, max_pages], got {list(table.shape)}")
    sequences = table.shape[0]
    check_index("paged_attention", "table", table, torch.int32, list(table.shape))
    check_index("paged_attention", "starts", starts, torch.int64, [sequences + 1])
    for name, tensor in (("lengths", lengths), ("prompts", prompts)):
        check_index("paged_attention", name, tensor, torch.int64, [sequences])
    _check_place("paged_attention", queries, table=table, starts=starts, lengths=lengths, prompts=prompts)
    check(window is None or window > 0, f"paged_attention: window must be positive or None, got {window}")
    with as_input_error():
        out: Tensor = torch.ops.optmem.paged_attention(queries, keys, values, table, starts, lengths, prompts, window or 0, scale)
    return out


@torch.library.impl(library, "paged_attention", "CPU")
def _paged_attention_cpu(
    queries: Tensor,
    keys: Tensor,
    values: Tensor,
    table: Tensor,
    starts: Tensor,
    lengths: Tensor,
    prompts: Tensor,
    window: int,
    scale: float,
) -> Tensor:
    cpu = cpp_for(queries)
    inputs = (queries, keys, values, table, starts, lengths, prompts)
    if cpu is None:
        return _paged_attention_checked(*inputs, window, scale)
    out = queries.new_empty(queries.shape)
    cpu.paged_attention(*map(as_array, inputs), window, scale, as_array(out), torch.get_num_threads())
    return out


@torch.library.impl(library, "paged_attention", "CUDA")
def _paged_attention_checked(
    queries: Tensor,
    keys: Tensor,
    values: Tensor,
    table: Tensor,
    starts: Tensor,
    lengths: Tensor,
    prompts: Tensor,
    window: int,
    scale: float,
) -> Tensor:
    """The reference, behind the checks that the native code makes."""
    pages, page_size = keys.shape[:2]
    edges, named = starts.tolist(), table.cpu()
    _check_starts("paged_attention", edges, queries.shape[0], "sequence")
    for b, (length, prompt) in enumerate(zip(lengths.tolist(), prompts.tolist(), strict=True)):
        count = edges[b + 1] - edges[b]
        check(count <= length, f"paged_attention: sequence {b} asks with {count} tokens of {length}")
        check(prompt >= 0, f"paged_attention: prompts must not be negative, got {prompt}")
        if count == 0:
            continue
        needed = -(-length // page_size)
        check(needed <= table.shape[1], f"paged_attention: sequence {b} needs {needed} pages, its table has {table.shape[1]}")
        behind = -(-min(prompt, length) // page_size)
        recent = max(length - count - window + 1, 0) // page_size if window else 0
        seen = torch.cat((named[b, :behind], named[b, max(behind, recent) : needed]))
        outside = seen[(seen < 0) | (seen >= pages)].tolist()
        if outside:
            raise InputError(f"paged_attention: sequence {b} names page {outside[0]} of {pages}")
    return reference.paged_attention(queries, keys, values, table, starts, lengths, prompts, window, scale)


def _check_starts(operator: str, edges: list[int], count: int, owner: str) -> None:
    ends = f"{edges[0]} to {edges[-1]}"
    check(edges[0] == 0 and edges[-1] == count, f"{operator}: starts must run from 0 to {count}, got {ends}")
    for at, (start, end) in enumerate(pairwise(edges)):
        check(start <= end, f"{operator}: starts must not decrease, but do at {owner} {at}")


@torch.library.register_fake("optmem::paged_attention")
def _paged_attention_fake(
    queries: Tensor,
    keys: Tensor,
    values: Tensor,
    table: Tensor,
    starts: Tensor,
    lengths: Tensor,
    prompts: Tensor,
    window: int,
    scale: float,
) -> Tensor:
    return queries.new_empty(queries.shape)


described.append(cpp_or_reference("paged_attention"))
described.append(partial(torch_on_cuda, "paged_attention"))


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
    check(1 <= top_k <= weight.shape[0], f"route: top_k must be 1 to {weight.shape[0]}, got {top_k}")
    return Routing(*torch.ops.optmem.route(x, weight, top_k))


@torch.library.impl(library, "route", "CPU")
def _route_cpu(x: Tensor, weight: Tensor, top_k: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    cpu = cpp_for(x)
    if cpu is None:
        return reference.route(x, weight, top_k)
    scores = _linear_rows_cpu(x, weight, torch.float32)
    out: tuple[Tensor, Tensor, Tensor, Tensor] = _route_fake(x, weight, top_k)
    cpu.route(as_array(scores), *map(as_array, out), torch.get_num_threads())
    return out


@torch.library.register_fake("optmem::route")
def _route_fake(x: Tensor, weight: Tensor, top_k: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    shape, wide = (x.shape[0], top_k), torch.float64 if x.dtype == torch.float64 else torch.float32
    ids, weights = x.new_empty(shape, dtype=torch.int32), x.new_empty(shape, dtype=wide)
    order = x.new_empty((x.shape[0] * top_k,), dtype=torch.int32)
    return ids, weights, order, x.new_empty((weight.shape[0] + 1,), dtype=torch.int32)


torch.library.impl(library, "route", "CUDA")(reference.route)
described.append(cpp_or_reference("route"))
described.append(partial(torch_on_cuda, "route"))


# --- expert_mlp -----------------------------------------------------------------------------------------------------------------

library.define("expert_mlp(Tensor x, Tensor gate_up, Tensor down, Tensor weights, Tensor order, Tensor starts) -> Tensor")


def expert_mlp(x: Tensor, gate_up: Tensor, down: Tensor, routing: Routing) -> Tensor:
    """Every token through its experts: sum of weight * down(silu(gate(x)) * up(x)), in fp32, rounded once.

    x        [T, D]
    gate_up  [E, 2 * F, D]    an expert's gate rows, then its up rows
    down     [E, D, F]
    -> [T, D]

    On CPU a token's result does not depend on the others, bit for bit.
    """
    check_float("expert_mlp", "x", x, 2)
    check(down.dim() == 3, f"expert_mlp: down must be [E, {x.shape[1]}, F], got {list(down.shape)}")
    tokens, hidden = x.shape
    experts, _, width = down.shape
    shapes = {"gate_up": (gate_up, [experts, 2 * width, hidden]), "down": (down, [experts, hidden, width])}
    check_like("expert_mlp", x, shapes)
    check(
        routing.weights.dim() == 2 and routing.weights.shape[0] == tokens and routing.weights.shape[1] > 0,
        f"expert_mlp: weights must be [{tokens}, top_k], got {list(routing.weights.shape)}",
    )
    weights_type = torch.float64 if x.dtype == torch.float64 else torch.float32
    check(routing.weights.dtype == weights_type, f"expert_mlp: weights must be {weights_type}, got {routing.weights.dtype}")
    check_index("expert_mlp", "order", routing.order, torch.int32, [routing.weights.numel()])
    check_index("expert_mlp", "starts", routing.starts, torch.int32, [experts + 1])
    _check_place("expert_mlp", x, weights=routing.weights, order=routing.order, starts=routing.starts)
    with as_input_error():
        out: Tensor = torch.ops.optmem.expert_mlp(x, gate_up, down, routing.weights, routing.order, routing.starts)
    return out


@torch.library.impl(library, "expert_mlp", "CPU")
def _expert_mlp_cpu(x: Tensor, gate_up: Tensor, down: Tensor, weights: Tensor, order: Tensor, starts: Tensor) -> Tensor:
    cpu = cpp_for(x)
    inputs = (x, gate_up, down, weights, order, starts)
    if cpu is None:
        return _expert_mlp_checked(*inputs)
    out = x.new_empty(x.shape)
    cpu.expert_mlp(*map(as_array, inputs), as_array(out), torch.get_num_threads())
    return out


@torch.library.impl(library, "expert_mlp", "CUDA")
def _expert_mlp_checked(x: Tensor, gate_up: Tensor, down: Tensor, weights: Tensor, order: Tensor, starts: Tensor) -> Tensor:
    """The reference, behind the checks that the native code makes."""
    pairs = weights.numel()
    _check_starts("expert_mlp", starts.tolist(), pairs, "expert")
    outside = order[(order < 0) | (order >= pairs)].tolist()
    if outside:
        raise InputError(f"expert_mlp: order names pair {outside[0]} of {pairs}")
    return reference.expert_mlp(x, gate_up, down, weights, order, starts)


@torch.library.register_fake("optmem::expert_mlp")
def _expert_mlp_fake(x: Tensor, gate_up: Tensor, down: Tensor, weights: Tensor, order: Tensor, starts: Tensor) -> Tensor:
    return x.new_empty(x.shape)


described.append(cpp_or_reference("expert_mlp"))
described.append(partial(torch_on_cuda, "expert_mlp"))
