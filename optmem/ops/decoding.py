"""Operators of the decoder: norms, rope_cache and paged_attention; its matrices are in linear.py, its experts in experts.py."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from optmem import reference
from optmem.errors import InputError
from optmem.ops.registry import (
    as_array,
    as_input_error,
    check,
    check_float,
    check_index,
    check_like,
    check_place,
    check_starts,
    cpp_for,
    cpp_or_reference,
    described,
    library,
    triton_for,
    triton_or_reference,
)

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


@torch.library.impl(library, "rms_norm", "CUDA")
def _rms_norm_cuda(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    kernel = triton_for("rms_norm", x)
    if kernel is None:
        return reference.rms_norm(x, weight, eps)
    out: Tensor = _rms_norm_fake(x, weight, eps)
    kernel.rms_norm(x.contiguous(), weight.contiguous(), eps, out)
    return out


@torch.library.impl(library, "add_rms_norm", "CUDA")
def _add_rms_norm_cuda(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    kernel = triton_for("rms_norm", x)
    if kernel is None:
        return reference.add_rms_norm(x, residual, weight, eps)
    total, out = _add_rms_norm_fake(x, residual, weight, eps)
    kernel.add_rms_norm(x.contiguous(), residual.contiguous(), weight.contiguous(), eps, total, out)
    return total, out


for _name in ("rms_norm", "add_rms_norm"):
    described.append(cpp_or_reference(_name))
    described.append(triton_or_reference(_name, "rms_norm"))


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


@torch.library.impl(library, "silu_mul", "CUDA")
def _silu_mul_cuda(gate: Tensor, up: Tensor) -> Tensor:
    kernel = triton_for("silu_mul", gate)
    if kernel is None:
        return reference.silu_mul(gate, up)
    out: Tensor = gate.new_empty(gate.shape)
    kernel.silu_mul(gate.contiguous(), up.contiguous(), out)
    return out


described.append(cpp_or_reference("silu_mul"))
described.append(triton_or_reference("silu_mul"))


# --- rope_cache -----------------------------------------------------------------------------------------------------------------

library.define(
    "rope_cache(Tensor(a!) queries, Tensor keys, Tensor values, Tensor cos, Tensor sin, Tensor slots, "
    "Tensor(b!) key_cache, Tensor(c!) value_cache, Tensor(d!)? key_scales=None, Tensor(e!)? value_scales=None) -> ()"
)


class CacheScales(NamedTuple):
    """Of keys and values that are held as int8: what a step of every head of every cell is worth."""

    keys: Tensor  # fp32 [pages, page_size, H]
    values: Tensor


def _check_scales(operator: str, cache: Tensor, scales: CacheScales) -> None:
    wanted = list(cache.shape[:3])
    check_like(operator, cache, {"key_scales": (scales.keys, wanted), "value_scales": (scales.values, wanted)}, torch.float32)
    for name, tensor in (("key_scales", scales.keys), ("value_scales", scales.values)):
        check(tensor.is_contiguous(), f"{operator}: {name} must be contiguous")


def rope_cache(
    queries: Tensor,
    keys: Tensor,
    values: Tensor,
    cos: Tensor,
    sin: Tensor,
    slots: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    scales: CacheScales | None = None,
) -> None:
    """Rotate queries and keys by their positions; the queries stay where they are, keys and values go into the cache.

    queries, keys, values    [T, H, D]     queries are rotated in place and must be contiguous
    cos, sin                 [T, D / 2]    of every position, rounded to the same type: channel i turns with channel i + D / 2
    slots                    int64 [T]     cell page * page_size + offset of every token; a negative one writes nothing
    key_cache, value_cache   [pages, page_size, H, D], contiguous; of the same type, or int8 with scales
    scales                   are written with them: a head's largest number becomes 127 steps, the others the nearest whole ones

    Raises InputError where a slot lies behind the cache.  On CUDA the host does not wait to see that: the token is written nowhere
    and its query becomes NaN.
    """
    check_float("rope_cache", "queries", queries, 3)
    tokens, heads, dim = queries.shape
    check(dim % 2 == 0, f"rope_cache: a head must have an even width, got {dim}")
    check(key_cache.dim() == 4, f"rope_cache: key_cache must be [pages, page_size, H, D], got {list(key_cache.shape)}")
    cache_shape = [*key_cache.shape[:2], heads, dim]
    wanted = {name: (tensor, [tokens, heads, dim]) for name, tensor in (("keys", keys), ("values", values))}
    wanted |= {name: (tensor, [tokens, dim // 2]) for name, tensor in (("cos", cos), ("sin", sin))}
    check_like("rope_cache", queries, wanted)
    caches = {"key_cache": (key_cache, cache_shape), "value_cache": (value_cache, cache_shape)}
    check_like("rope_cache", queries, caches, None if scales is None else torch.int8)
    check_index("rope_cache", "slots", slots, torch.int64, [tokens])
    check_place("rope_cache", queries, slots=slots)
    for name, tensor in (("queries", queries), ("key_cache", key_cache), ("value_cache", value_cache)):
        check(tensor.is_contiguous(), f"rope_cache: {name} is written in place and must be contiguous")
    if scales is not None:
        _check_scales("rope_cache", key_cache, scales)
    with as_input_error():
        torch.ops.optmem.rope_cache(queries, keys, values, cos, sin, slots, key_cache, value_cache, *(scales or ()))


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
    key_scales: Tensor | None = None,
    value_scales: Tensor | None = None,
) -> None:
    cpu = cpp_for(queries) if key_scales is None else None
    arguments = (queries, keys, values, cos, sin, slots, key_cache, value_cache)
    if cpu is None:
        return _rope_cache_checked(*arguments, key_scales, value_scales)
    cpu.rope_cache(*map(as_array, arguments), torch.get_num_threads())
    return None


@torch.library.impl(library, "rope_cache", "CUDA")
def _rope_cache_cuda(
    queries: Tensor,
    keys: Tensor,
    values: Tensor,
    cos: Tensor,
    sin: Tensor,
    slots: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    key_scales: Tensor | None = None,
    value_scales: Tensor | None = None,
) -> None:
    kernel = triton_for("rope_cache", queries)
    if kernel is None:
        return _rope_cache_checked(queries, keys, values, cos, sin, slots, key_cache, value_cache, key_scales, value_scales)
    read = (tensor.contiguous() for tensor in (keys, values, cos, sin, slots))
    kernel.rope_cache(queries, *read, key_cache, value_cache, key_scales, value_scales)
    return None


def _rope_cache_checked(
    queries: Tensor,
    keys: Tensor,
    values: Tensor,
    cos: Tensor,
    sin: Tensor,
    slots: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    key_scales: Tensor | None = None,
    value_scales: Tensor | None = None,
) -> None:
    """The reference, behind the checks that the native code makes: nothing is written where a slot lies outside."""
    cells = key_cache.shape[0] * key_cache.shape[1]
    outside = (slots >= cells).nonzero().flatten().tolist()
    if outside:
        raise InputError(f"rope_cache: token {outside[0]} goes to cell {int(slots[outside[0]])} of {cells}")
    reference.rope_cache(queries, keys, values, cos, sin, slots, key_cache, value_cache, key_scales, value_scales)


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
    key_scales: Tensor | None = None,
    value_scales: Tensor | None = None,
) -> None:
    return None


described.append(cpp_or_reference("rope_cache"))
described.append(triton_or_reference("rope_cache"))


# --- paged_attention ------------------------------------------------------------------------------------------------------------

library.define(
    "paged_attention(Tensor queries, Tensor keys, Tensor values, Tensor table, Tensor starts, Tensor lengths, Tensor prompts, "
    "int window, float scale, Tensor? key_scales=None, Tensor? value_scales=None) -> Tensor"
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
    scales: CacheScales | None = None,
) -> Tensor:
    """Causal attention of every sequence's last tokens over its pages: prefill, a chunk of it, one token, or drafts to verify.

    queries       [T, H, D]                    rotated; sequence b asks with starts[b] .. starts[b + 1]
    keys, values  [pages, page_size, H, D]     the queries' own are already in them; page_size is a multiple of 16;
                                               of the queries' type, or int8 with scales
    table         int32 [B, max_pages]         page of every page_size tokens; entries that are not attended to may be anything
    starts        int64 [B + 1]
    lengths       int64 [B]                    tokens of the sequence in the cache, those asking counted
    prompts       int64 [B]                    its first tokens, which no window hides
    window                                     query i sees key j <= i if j < prompt or j > i - window; None sees all
    -> [T, H, D]

    Softmax and sums in fp32.  On CPU a query's result does not depend on what else is asked, bit for bit; on CUDA not on batch
    mates, nor on whether a sequence asks with one token or with a few.  Cells of a page that is attended to must hold finite
    numbers up to the sequence's length.
    Raises InputError where the table points outside; on CUDA the host does not wait to see that, and such a query becomes NaN.
    """
    check_float("paged_attention", "queries", queries, 3)
    check(keys.dim() == 4, f"paged_attention: keys must be [pages, page_size, H, D], got {list(keys.shape)}")
    page_size = keys.shape[1]
    check(
        page_size > 0 and page_size % PAGE_UNIT == 0,
        f"paged_attention: a page must hold a multiple of {PAGE_UNIT} tokens, got {page_size}",
    )
    shape = [*keys.shape[:2], *queries.shape[1:]]
    caches = {"keys": (keys, shape), "values": (values, shape)}
    check_like("paged_attention", queries, caches, None if scales is None else torch.int8)
    if scales is not None:
        _check_scales("paged_attention", keys, scales)
    check(table.dim() == 2, f"paged_attention: table must be [B, max_pages], got {list(table.shape)}")
    sequences = table.shape[0]
    check_index("paged_attention", "table", table, torch.int32, list(table.shape))
    check_index("paged_attention", "starts", starts, torch.int64, [sequences + 1])
    for name, tensor in (("lengths", lengths), ("prompts", prompts)):
        check_index("paged_attention", name, tensor, torch.int64, [sequences])
    check_place("paged_attention", queries, table=table, starts=starts, lengths=lengths, prompts=prompts)
    if window is not None and window <= 0:  # a message is made of a number only where it is said: a graph's may have no value yet
        raise InputError(f"paged_attention: window must be positive or None, got {window}")
    inputs = (queries, keys, values, table, starts, lengths, prompts, window or 0, scale)
    with as_input_error():
        out: Tensor = torch.ops.optmem.paged_attention(*inputs, *(scales or ()))
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
    key_scales: Tensor | None = None,
    value_scales: Tensor | None = None,
) -> Tensor:
    cpu = cpp_for(queries) if key_scales is None else None
    inputs = (queries, keys, values, table, starts, lengths, prompts)
    if cpu is None:
        return _paged_attention_checked(*inputs, window, scale, key_scales, value_scales)
    out = queries.new_empty(queries.shape)
    cpu.paged_attention(*map(as_array, inputs), window, scale, as_array(out), torch.get_num_threads())
    return out


@torch.library.impl(library, "paged_attention", "CUDA")
def _paged_attention_cuda(
    queries: Tensor,
    keys: Tensor,
    values: Tensor,
    table: Tensor,
    starts: Tensor,
    lengths: Tensor,
    prompts: Tensor,
    window: int,
    scale: float,
    key_scales: Tensor | None = None,
    value_scales: Tensor | None = None,
) -> Tensor:
    kernel = triton_for("paged_attention", queries)
    inputs = (queries, keys, values, table, starts, lengths, prompts)
    if kernel is None:
        return _paged_attention_checked(*inputs, window, scale, key_scales, value_scales)
    out = queries.new_empty(queries.shape)
    kernel.paged_attention(*(tensor.contiguous() for tensor in inputs), window, scale, out, key_scales, value_scales)
    return out


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
    key_scales: Tensor | None = None,
    value_scales: Tensor | None = None,
) -> Tensor:
    """The reference, behind the checks that the native code makes."""
    pages, page_size = keys.shape[:2]
    edges, named = starts.tolist(), table.cpu()
    check_starts("paged_attention", edges, queries.shape[0], "sequence")
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
    inputs = (queries, keys, values, table, starts, lengths, prompts, window, scale)
    return reference.paged_attention(*inputs, key_scales, value_scales)


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
    key_scales: Tensor | None = None,
    value_scales: Tensor | None = None,
) -> Tensor:
    return queries.new_empty(queries.shape)


described.append(cpp_or_reference("paged_attention"))
described.append(triton_or_reference("paged_attention"))
