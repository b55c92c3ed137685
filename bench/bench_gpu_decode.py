"""The decoder's operators on a GPU in bf16, at batches of a decode step and lengths of its context, beside their floors and torch.

    python bench/bench_gpu_decode.py [--only paged_attention] [--list]

Weights and routing are random, pages are scattered.  Answers are compared with fp64 first, on the first rows of the batch that is
timed.  Torch's ways are given what ours have to find: keys in one piece for every sequence, pairs already sorted.  Figures:
gpu_timing.py.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from gpu_e4m3 import linear_case
from gpu_timing import Case, Errors, Plan, compare, main
from torch import Tensor
from torch.nn.functional import linear, rms_norm, scaled_dot_product_attention, silu

from optmem import ops, reference
from optmem.engine.buckets import table_bucket
from optmem.model.cache import GONE

BATCHES = (1, 8, 64, 256, 1024)
CONTEXTS = (300, 800, 1300)
CHECKED = 4  # rows or sequences that are compared with fp64
MOST_PAGES = 512  # of a text: 8,192 tokens
EPS = 1e-6
GUARD = (20, 50)  # the n-gram guard of the family's scripts


@dataclass(frozen=True)
class Sizes:
    """A decoder's; those of the family."""

    hidden: int = 1280
    heads: int = 10
    dense_width: int = 6848
    experts: int = 64
    expert_width: int = 896
    top_k: int = 6
    vocab: int = 129280
    page: int = 16
    dtype: torch.dtype = torch.bfloat16


def noise(device: torch.device, *shape: int, seed: int = 0) -> Tensor:
    """Made where it is used: a cache of 1,024 sequences is gigabytes."""
    return torch.randn(shape, generator=torch.Generator(device).manual_seed(seed + sum(shape)), device=device)


def doubled(tensors: tuple[Any, ...]) -> tuple[Any, ...]:
    return tuple(tensor.double() if isinstance(tensor, Tensor) and tensor.is_floating_point() else tensor for tensor in tensors)


def rowwise(
    operator: str, rows: int, inputs: tuple[Any, ...], count: int, others: dict[str, Callable[[], Any]], flops: int
) -> Case:
    """An operator whose first `count` inputs have a row for every token."""
    run, meaning = getattr(ops, operator), getattr(reference, operator)

    def first(result: Any) -> Tensor:
        """The first rows; of several results the last."""
        tensor: Tensor = (result if isinstance(result, Tensor) else result[-1])[:CHECKED]
        return tensor

    def check() -> Errors:
        few = (*(tensor[:CHECKED] for tensor in inputs[:count]), *inputs[count:])
        return compare(first(run(*inputs)), first(meaning(*few)), first(meaning(*doubled(few))))

    moved = sum(tensor.nbytes for tensor in inputs if isinstance(tensor, Tensor))
    done = run(*inputs)
    moved += sum(tensor.nbytes for tensor in ((done,) if isinstance(done, Tensor) else done))
    return Case(operator, f"{rows} rows", inputs[0].dtype, partial(run, *inputs), others, check, moved, flops)


def norm(rows: int, device: torch.device, sizes: Sizes) -> Case:
    x, weight = (noise(device, *shape).to(sizes.dtype) for shape in ((rows, sizes.hidden), (sizes.hidden,)))
    return rowwise("rms_norm", rows, (x, weight, EPS), 1, {"rms_norm": lambda: rms_norm(x, weight.shape, weight, EPS)}, 0)


def add_norm(rows: int, device: torch.device, sizes: Sizes) -> Case:
    x, residual = (noise(device, rows, sizes.hidden, seed=seed).to(sizes.dtype) for seed in (1, 2))
    weight = noise(device, sizes.hidden).to(sizes.dtype)
    others = {"add, rms_norm": lambda: rms_norm(x + residual, weight.shape, weight, EPS)}
    return rowwise("add_rms_norm", rows, (x, residual, weight, EPS), 2, others, 0)


def gated(rows: int, device: torch.device, sizes: Sizes) -> Case:
    gate, up = (noise(device, rows, sizes.dense_width, seed=seed).to(sizes.dtype) for seed in (1, 2))
    return rowwise("silu_mul", rows, (gate, up), 2, {"silu, mul": lambda: silu(gate) * up}, 0)


def rope(rows: int, device: torch.device, sizes: Sizes) -> Case:
    dim = sizes.hidden // sizes.heads
    queries, keys, values = (noise(device, rows, sizes.heads, dim, seed=seed).to(sizes.dtype) for seed in range(3))
    angles = noise(device, rows, dim // 2)
    cos, sin = angles.cos().to(sizes.dtype), angles.sin().to(sizes.dtype)
    slots = torch.randperm(rows * sizes.page, device=device)[:rows]
    caches = [torch.zeros(rows, sizes.page, sizes.heads, dim, dtype=sizes.dtype, device=device) for _ in range(2)]
    arguments = (queries, keys, values, cos, sin, slots, *caches)

    def check() -> Errors:
        rotated, exact = (
            tuple(t.clone() if isinstance(t, Tensor) else t for t in kind) for kind in (arguments, doubled(arguments))
        )
        expected = tuple(t.clone() for t in arguments)
        ops.rope_cache(*rotated)
        reference.rope_cache(*expected)
        reference.rope_cache(*exact)
        compare(rotated[6], expected[6], exact[6])
        return compare(rotated[0], expected[0], exact[0])

    moved = 2 * 3 * queries.nbytes + cos.nbytes + sin.nbytes + slots.nbytes
    others = {"eager": partial(reference.rope_cache, *arguments)}
    # reference.rope_cache asks which slots are kept, for which the host waits: no graph holds that.
    run = partial(ops.rope_cache, *arguments)
    return Case("rope_cache", f"{rows} rows", sizes.dtype, run, others if device.type == "cpu" else {}, check, moved, 0)


def paged(rows: int, context: int, device: torch.device, sizes: Sizes) -> Case:
    """One token of every sequence, over scattered pages; torch has every sequence's keys in one piece."""
    dim, entries = sizes.hidden // sizes.heads, -(-context // sizes.page)
    shape = (rows * entries, sizes.page, sizes.heads, dim)
    keys, values = (noise(device, *shape, seed=seed).to(sizes.dtype) for seed in (1, 2))
    queries = noise(device, rows, sizes.heads, dim).to(sizes.dtype)
    table = torch.full((rows, table_bucket(entries, MOST_PAGES)), GONE, dtype=torch.int32, device=device)  # as the engine has it
    table[:, :entries] = torch.randperm(rows * entries, device=device).int().view(rows, entries)
    told = [torch.arange(rows + 1, device=device), *(torch.full((rows,), count, device=device) for count in (context, context))]
    run = partial(ops.paged_attention, queries, keys, values, table, *told, None, dim**-0.5)
    few = min(rows, CHECKED)

    def check() -> Errors:
        seen = table[:few, :entries].flatten().long()
        renamed = torch.arange(few * entries, device=device).int().view(few, entries)
        inputs = (queries[:few], keys[seen], values[seen], renamed, told[0][: few + 1], told[1][:few], told[2][:few], 0, dim**-0.5)
        return compare(run()[:few], reference.paged_attention(*inputs), reference.paged_attention(*doubled(inputs)))

    dense = [cache.view(rows, entries * sizes.page, sizes.heads, dim)[:, :context].transpose(1, 2) for cache in (keys, values)]
    others = {"sdpa": lambda: scaled_dot_product_attention(queries[:, :, None], *dense)}
    moved = 2 * queries.nbytes + 2 * rows * context * sizes.hidden * sizes.dtype.itemsize
    return Case("paged_attention", f"{rows} x {context}", sizes.dtype, run, others, check, moved, 4 * rows * context * sizes.hidden)


def routing_inputs(rows: int, device: torch.device, sizes: Sizes) -> tuple[Tensor, Tensor]:
    return noise(device, rows, sizes.hidden).to(sizes.dtype), router_of(device, sizes)


def router_of(device: torch.device, sizes: Sizes) -> Tensor:
    return (noise(device, sizes.experts, sizes.hidden) / sizes.hidden**0.5).to(sizes.dtype)


def choosing(rows: int, device: torch.device, sizes: Sizes) -> Case:
    """The highest weights are compared; which experts they are of follows, and where two are near each other may not."""
    x, weight = routing_inputs(rows, device, sizes)

    def check() -> Errors:
        meant = [reference.route(*(t[:CHECKED] if t is x else t for t in pair), sizes.top_k)[1] for pair in ((x, weight),)]
        exact = reference.route(x[:CHECKED].double(), weight.double(), sizes.top_k)[1]
        return compare(ops.route(x, weight, sizes.top_k).weights[:CHECKED], meant[0], exact)

    def torchs() -> tuple[Tensor, ...]:
        weights, ids = linear(x.float(), weight.float()).softmax(-1).topk(sizes.top_k)
        order = ids.flatten().argsort(stable=True)
        counts = (ids.flatten()[:, None] == torch.arange(sizes.experts, device=device)).sum(0)
        return weights, order, counts.cumsum(0)

    moved = x.nbytes + weight.nbytes + 12 * rows * sizes.top_k + 4 * sizes.experts
    run = partial(ops.route, x, weight, sizes.top_k)
    return Case("route", f"{rows} rows", sizes.dtype, run, {"topk, argsort": torchs}, check, moved, 2 * x.numel() * sizes.experts)


def experts(rows: int, device: torch.device, sizes: Sizes) -> Case:
    x, router = routing_inputs(rows, device, sizes)
    into = (noise(device, sizes.experts, 2 * sizes.expert_width, sizes.hidden) / sizes.hidden**0.5).to(sizes.dtype)
    out_of = (noise(device, sizes.experts, sizes.hidden, sizes.expert_width) / sizes.expert_width**0.5).to(sizes.dtype)
    routing = ops.route(x, router, sizes.top_k)
    run = partial(ops.expert_mlp, x, into, out_of, routing)

    def check() -> Errors:
        few = ops.route(x[:CHECKED], router, sizes.top_k)
        inputs = (x[:CHECKED], into, out_of, few.weights, few.order, few.starts)
        return compare(run()[:CHECKED], reference.expert_mlp(*inputs), reference.expert_mlp(*doubled(inputs)))

    order, ends = routing.order.long(), routing.starts[1:]
    tokens, scales = order // sizes.top_k, routing.weights.flatten()[order, None]

    def grouped() -> Tensor:
        gate, up = torch._grouped_mm(x[tokens], into.transpose(1, 2), offs=ends).chunk(2, -1)
        outputs = torch._grouped_mm(silu(gate) * up, out_of.transpose(1, 2), offs=ends) * scales
        return torch.zeros_like(x, dtype=torch.float32).index_add_(0, tokens, outputs).to(x.dtype)

    used = int((routing.starts.diff() > 0).sum())
    pairs, weight = rows * sizes.top_k, 3 * sizes.expert_width * sizes.hidden
    moved = 2 * x.nbytes + used * weight * sizes.dtype.itemsize + 8 * pairs
    others = {"_grouped_mm": grouped} if device.type == "cuda" else {}
    return Case("expert_mlp", f"{rows} rows", sizes.dtype, run, others, check, moved, 2 * pairs * weight)


def experts_e4m3(rows: int, device: torch.device, sizes: Sizes) -> Case:
    """The same of 8-bit floats; torch's way is that of 16 bits, for it has none that rounds between the products."""
    made = experts(rows, device, sizes)
    x, into, out_of, routing = made.ours.args  # type: ignore[attr-defined]
    (into, into_scales, _), (out_of, out_of_scales, _) = ops.e4m3_rows(into), ops.e4m3_rows(out_of)
    run = partial(ops.expert_mlp, x, into, out_of, routing, ops.ExpertScales(into_scales, out_of_scales))

    def check() -> Errors:
        few = ops.route(x[:CHECKED], router_of(device, sizes), sizes.top_k)
        inputs = (x[:CHECKED], into, out_of, few.weights, few.order, few.starts, into_scales, out_of_scales)
        expected = reference.expert_mlp(*inputs)
        return compare(run()[:CHECKED], expected, expected.double())  # an exact sum would be rounded elsewhere between the products

    used = int((routing.starts.diff() > 0).sum())
    halved = used * 3 * sizes.expert_width * sizes.hidden * (sizes.dtype.itemsize - 1)
    scales = 4 * used * (2 * sizes.expert_width + sizes.hidden)
    shape = f"{rows} rows, e4m3"
    return Case("expert_mlp", shape, ops.E4M3, run, made.theirs, check, made.bytes - halved + scales, made.flops)


def layer_e4m3(rows: int, device: torch.device, sizes: Sizes) -> Case:
    """One of the dense MLP's."""
    of_layer = (rows, sizes.hidden, sizes.dense_width)
    return linear_case(f"{rows} rows", of_layer, "none", device, sizes.dtype, has_bias=False)


def picking(rows: int, device: torch.device, sizes: Sizes) -> Case:
    """Greedy, behind the guard, of which torch's way knows nothing."""
    logits = 4 * noise(device, rows, sizes.vocab)
    size, window = GUARD
    history = torch.randint(0, sizes.vocab, (rows, window), device=device)
    history[::2] = history[::2, :7].repeat(1, window)[:, :window]  # every other text loops
    whole = [torch.full((rows,), value, device=device) for value in GUARD]
    allowed = torch.full((rows, 2), -1, device=device)
    numbers = [torch.zeros(rows, device=device), torch.ones(rows, device=device)]
    inputs = (logits, history, *whole, allowed, *numbers, torch.zeros(rows, dtype=torch.float64, device=device))
    run = partial(ops.pick_token, *inputs, most_guard=size, is_sampled=False)

    def check() -> Errors:
        ids, logprobs, _ = run()
        expected, same, _ = reference.pick_token(*inputs, size, False)
        assert torch.equal(ids, expected), "another token than the reference's"
        exact = logits[:CHECKED].double().log_softmax(-1).gather(1, ids[:CHECKED, None])[:, 0]
        return compare(logprobs[:CHECKED], same[:CHECKED], exact)

    def torchs() -> tuple[Tensor, Tensor]:
        ids = logits.argmax(-1)
        return ids, logits.log_softmax(-1).gather(1, ids[:, None])

    return Case("pick_token", f"{rows} rows", torch.float32, run, {"argmax, log_softmax": torchs}, check, logits.nbytes, 0)


SIMPLE = {
    "rms_norm": norm,
    "add_rms_norm": add_norm,
    "silu_mul": gated,
    "rope_cache": rope,
    "route": choosing,
    "expert_mlp": experts,
    "linear_e4m3": layer_e4m3,
    "pick_token": picking,
}


def plans(device: torch.device, sizes: Sizes) -> list[Plan]:
    made: list[Plan] = []
    for operator, make in SIMPLE.items():
        made += [(f"{operator} {rows} rows", partial(make, rows, device, sizes)) for rows in BATCHES]
    made += [(f"expert_mlp {rows} rows, e4m3", partial(experts_e4m3, rows, device, sizes)) for rows in BATCHES]
    for context in CONTEXTS:
        made += [(f"paged_attention {rows} x {context}", partial(paged, rows, context, device, sizes)) for rows in BATCHES]
    return made


if __name__ == "__main__":
    sys.exit(main("decode", plans(torch.device("cuda"), Sizes())))
