"""The operator that ends a step: pick_token, from logits to the next token of every row."""

from __future__ import annotations

import torch
from torch import Tensor

from optmem import reference
from optmem.errors import InputError
from optmem.ops.registry import (
    as_array,
    check,
    check_index,
    check_like,
    cpp_for,
    cpp_or_reference,
    described,
    library,
    triton_for,
    triton_or_reference,
)

library.define(
    "pick_token(Tensor logits, Tensor history, Tensor guard_size, Tensor guard_window, Tensor allowed, Tensor temperature, "
    "Tensor top_p, Tensor chance, int most_guard, bool is_sampled, float confidence_temperature=1.0) -> (Tensor, Tensor, Tensor)"
)

_COLDEST, _HOTTEST = torch.finfo(torch.float32).tiny, torch.finfo(torch.float32).max  # of confidence: what fp32 can divide by


def pick_token(
    logits: Tensor,
    history: Tensor,
    guard_size: Tensor,
    guard_window: Tensor,
    allowed: Tensor,
    temperature: Tensor,
    top_p: Tensor,
    chance: Tensor,
    *,
    most_guard: int,
    is_sampled: bool,
    confidence_temperature: float = 1.0,
) -> tuple[Tensor, Tensor, Tensor]:
    """The next token of every row, its log-probability among the logits as they came, and how sure one may be of it.

    logits        fp32 [N, V]
    history       int64 [N, L]   tokens said before, the last one last; negative on the left where there are fewer than L
    guard_size    int64 [N]      n of the n-grams that may not repeat; 0 guards nothing
    guard_window  int64 [N]      only n-grams that lie within so many last tokens count; a window below n guards nothing
    allowed       int64 [N, A]   tokens that the guard never bans; negative where there are fewer than A
    temperature   fp32 [N]       0 takes the likeliest token, of equals the lower id; above 0 one is drawn
    top_p         fp32 [N]       drawn from the likeliest tokens: the first, and others while the mass before them is below top_p
    chance        fp64 [N]       in [0, 1): the token drawn is the first whose kept mass, with all before it, exceeds this share
    most_guard                   no guard_size is above it; 0 says that no row is guarded
    is_sampled                   False says that every temperature is 0, and nothing is sorted
    confidence_temperature       what the logits as they came are divided by for the confidence, which is e^logprob where it is 1
    -> ids int64 [N], logprobs fp32 [N], confidence fp32 [N]: the probability of the token at that temperature

    The guard bans what would repeat an n-gram: for every one in the window that begins with the last n - 1 tokens, its last token.
    Where no finite logit would be left, nothing is banned.  Temperature and top_p act behind the guard; logprobs
    and confidence know of none.

    A row fails alone, with id -1 and the rest NaN: its logits hold NaN or +inf or nothing finite, its temperature is negative or
    not finite, or it belies most_guard or is_sampled.  No value is checked otherwise, for that would wait for the device; of a
    top_p or a chance out of range comes some token of the row.

    A row's result does not depend on other rows or on padding: its id on any device; on CPU all of it, bit for bit.
    The reference's guard takes N * L * most_guard bytes, so pass no more history than the longest window; drawing takes about
    32 * V bytes for every row that draws.
    Raises InputError where shapes, types or devices do not fit together, or confidence_temperature is not a number above 0.
    """
    check(logits.dim() == 2 and logits.shape[1] > 0, f"pick_token: logits must be [N, V], V at least 1, got {list(logits.shape)}")
    check(logits.dtype == torch.float32, f"pick_token: logits must be torch.float32, got {logits.dtype}")
    if most_guard < 0:  # messages of numbers that a graph may not know are made only where they are said
        raise InputError(f"pick_token: most_guard must not be negative, got {most_guard}")
    if not _COLDEST <= confidence_temperature <= _HOTTEST:
        raise InputError(f"pick_token: confidence_temperature must be finite and above 0 in fp32, got {confidence_temperature}")
    rows = logits.shape[0]
    for name, table, letter in (("history", history, "L"), ("allowed", allowed, "A")):
        fits = table.dim() == 2 and table.shape[0] == rows
        check(fits, f"pick_token: {name} must be [{rows}, {letter}], got {list(table.shape)}")
        check_index("pick_token", name, table, torch.int64, list(table.shape))
    check_index("pick_token", "guard_size", guard_size, torch.int64, [rows])
    check_index("pick_token", "guard_window", guard_window, torch.int64, [rows])
    check_index("pick_token", "chance", chance, torch.float64, [rows])
    check_like("pick_token", logits, {"temperature": (temperature, [rows]), "top_p": (top_p, [rows])})
    others = {"history": history, "guard_size": guard_size, "guard_window": guard_window, "allowed": allowed, "chance": chance}
    for name, tensor in others.items():
        check(tensor.device == logits.device, f"pick_token: {name} must be on {logits.device}, got {tensor.device}")
    guard = (history, guard_size, guard_window, allowed)
    picked: tuple[Tensor, Tensor, Tensor] = torch.ops.optmem.pick_token(
        logits.contiguous(), *guard, temperature, top_p, chance, most_guard, is_sampled, confidence_temperature
    )
    return picked


@torch.library.impl(library, "pick_token", "CPU")
def _pick_token_cpu(
    logits: Tensor,
    history: Tensor,
    guard_size: Tensor,
    guard_window: Tensor,
    allowed: Tensor,
    temperature: Tensor,
    top_p: Tensor,
    chance: Tensor,
    most_guard: int,
    is_sampled: bool,
    confidence_temperature: float = 1.0,
) -> tuple[Tensor, Tensor, Tensor]:
    guard = (history, guard_size, guard_window, allowed)
    cpu = cpp_for(logits) if logits.dtype == torch.float32 else None
    if cpu is None:
        heat = (temperature, top_p, chance)
        return reference.pick_token(logits, *guard, *heat, most_guard, is_sampled, confidence_temperature)
    out: tuple[Tensor, Tensor, Tensor] = _pick_token_fake(logits)
    if is_sampled:
        _draw(out[0], logits, *guard, temperature, top_p, chance, most_guard)
    inputs = map(as_array, (logits, *guard, temperature))
    cpu.pick_token(*inputs, most_guard, is_sampled, confidence_temperature, *map(as_array, out), torch.get_num_threads())
    return out


def _draw(
    ids: Tensor,
    logits: Tensor,
    history: Tensor,
    guard_size: Tensor,
    guard_window: Tensor,
    allowed: Tensor,
    temperature: Tensor,
    top_p: Tensor,
    chance: Tensor,
    most_guard: int,
) -> None:
    """Writes the ids of the rows that draw, and of no others: a sort, which torch does well, and only for them."""
    rows = ((temperature > 0) & temperature.isfinite()).nonzero()[:, 0]
    guard = (history[rows], guard_size[rows], guard_window[rows], allowed[rows])
    guarded = reference.guard_repeats(logits[rows], *guard, most_guard)
    ids[rows] = reference.draw_token(guarded, temperature[rows], top_p[rows], chance[rows])


@torch.library.impl(library, "pick_token", "CUDA")
def _pick_token_cuda(
    logits: Tensor,
    history: Tensor,
    guard_size: Tensor,
    guard_window: Tensor,
    allowed: Tensor,
    temperature: Tensor,
    top_p: Tensor,
    chance: Tensor,
    most_guard: int,
    is_sampled: bool,
    confidence_temperature: float = 1.0,
) -> tuple[Tensor, Tensor, Tensor]:
    guard = (history, guard_size, guard_window, allowed)
    kernel = triton_for("pick_token", logits) if logits.dtype == torch.float32 else None
    if kernel is None:
        heat = (temperature, top_p, chance)
        return reference.pick_token(logits, *guard, *heat, most_guard, is_sampled, confidence_temperature)
    out: tuple[Tensor, Tensor, Tensor] = _pick_token_fake(logits)
    if is_sampled:  # for all rows: to know which of them draw, the host would have to wait
        guarded = reference.guard_repeats(logits, *guard, most_guard)
        out[0].copy_(reference.draw_token(guarded, temperature, top_p, chance))
    inputs = (tensor.contiguous() for tensor in (logits, *guard, temperature))
    kernel.pick_token(*inputs, most_guard, is_sampled, confidence_temperature, *out)
    return out


@torch.library.register_fake("optmem::pick_token")
def _pick_token_fake(logits: Tensor, *others: Tensor | float) -> tuple[Tensor, Tensor, Tensor]:
    rows = logits.shape[:1]
    return logits.new_empty(rows, dtype=torch.int64), logits.new_empty(rows), logits.new_empty(rows)


described.append(cpp_or_reference("pick_token"))
described.append(triton_or_reference("pick_token", but="; what is drawn is sorted by torch"))
