"""The operator that ends a step: pick_token, from logits to the next token of every row."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from optmem import reference
from optmem.ops.registry import Implementation, check, check_index, check_like, described, library, torch_on_cuda

library.define(
    "pick_token(Tensor logits, Tensor history, Tensor guard_size, Tensor guard_window, Tensor allowed, Tensor temperature, "
    "Tensor top_p, Tensor chance, int most_guard, bool is_sampled) -> (Tensor, Tensor)"
)


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
) -> tuple[Tensor, Tensor]:
    """The next token of every row, and its log-probability among the logits as they came.

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
    -> ids int64 [N], logprobs fp32 [N]

    The guard bans what would repeat an n-gram: for every one in the window that begins with the last n - 1 tokens, its last token.
    Where no finite logit would be left, nothing is banned.  Temperature and top_p act behind the guard, logprobs knows of none.

    A row fails alone, with id -1 and logprob NaN: its logits hold NaN or +inf or nothing finite, its temperature is negative or not
    finite, or it belies most_guard or is_sampled.  No value is checked otherwise, for that would wait for the device; of a top_p or
    a chance out of range comes some token of the row.

    A row's result does not depend on other rows or on padding: its id on any device, its logprob on CPU, bit for bit.
    The guard takes N * L * most_guard bytes, so pass no more history than the longest window; drawing takes about 32 * N * V.
    Raises InputError where shapes, types or devices do not fit together.
    """
    check(logits.dim() == 2 and logits.shape[1] > 0, f"pick_token: logits must be [N, V], V at least 1, got {list(logits.shape)}")
    check(logits.dtype == torch.float32, f"pick_token: logits must be torch.float32, got {logits.dtype}")
    check(most_guard >= 0, f"pick_token: most_guard must not be negative, got {most_guard}")
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
    picked: tuple[Tensor, Tensor] = torch.ops.optmem.pick_token(
        logits.contiguous(), *guard, temperature, top_p, chance, most_guard, is_sampled
    )
    return picked


torch.library.impl(library, "pick_token", "CPU")(reference.pick_token)
torch.library.impl(library, "pick_token", "CUDA")(reference.pick_token)


@torch.library.register_fake("optmem::pick_token")
def _pick_token_fake(logits: Tensor, *others: Tensor | int) -> tuple[Tensor, Tensor]:
    rows = logits.shape[:1]
    return logits.new_empty(rows, dtype=torch.int64), logits.new_empty(rows)


described.append(lambda: Implementation("pick_token", "cpu", "reference", "plain torch, a few passes over the logits"))
described.append(partial(torch_on_cuda, "pick_token"))
