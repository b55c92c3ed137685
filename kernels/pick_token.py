"""pick_token: the n-gram guard, the likeliest token, and how likely it is.

    banned[v]      v ends an n-gram of the window whose first n - 1 tokens are the last n - 1 said, and is not allowed
    id             the highest logit that is not banned, of equals the lower id; where nothing finite is left, nothing is banned
    logprob        x[id] - max - log(sum of exp(x - max)), of the logits as they came
    confidence     the same at a temperature, and its exponential

    logits   fp32 [N, V]
    ids      int64 [N]: where a row draws, the token that was drawn, and left as it is;  logprobs, confidence  fp32 [N]

Three kernels.  The guard sets bits of banned tokens, a row a program; the second reads 4,096 logits a program, all that there is to
read, and leaves maxima and sums; the third puts them together, a row a program.  Drawing needs the logits in order, and is done
before, by torch's sort.

A row fails alone, with id -1 and NaN, as ops.pick_token says.

Assumes contiguous tensors on one device, and a vocabulary below 2^30.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from optmem.kernels.launch import PICK, GateCase, cdiv, power_of_two


@triton.jit(do_not_specialize=["L", "A", "most_guard"])
def pick_guard_kernel(
    history,  # [N, L]
    guard_size,  # [N]
    guard_window,  # [N]
    allowed,  # [N, A]
    banned,  # [N, words], a bit for every token
    L,
    A,
    V,
    words,
    most_guard,
    BLOCK_L: tl.constexpr,
    BLOCK_W: tl.constexpr,
) -> None:
    i_n = tl.program_id(0).to(tl.int64)
    p_banned = banned + i_n * words
    for first in range(0, words, BLOCK_W):
        o_w = first + tl.arange(0, BLOCK_W)
        tl.store(p_banned + o_w, tl.zeros([BLOCK_W], dtype=tl.int32), mask=o_w < words)
    tl.debug_barrier()  # the words are clear before a bit is set by another thread
    p_history = history + i_n * L
    size = tl.load(guard_size + i_n)
    said = tl.zeros([BLOCK_L], dtype=tl.int32)
    for first in range(0, L, BLOCK_L):
        o_l = first + tl.arange(0, BLOCK_L)
        said += (tl.load(p_history + o_l, mask=o_l < L, other=-1) >= 0).to(tl.int32)
    begin = L - tl.maximum(tl.minimum(tl.sum(said, axis=0), tl.load(guard_window + i_n)), 0)  # of the window
    if (size > 0) & (size <= most_guard) & (size <= L):
        for first in range(0, L, BLOCK_L):
            o_l = first + tl.arange(0, BLOCK_L)
            m_end = (o_l < L) & (o_l - begin >= size - 1)  # an n-gram that ends here lies in the window
            for back in range(1, size.to(tl.int32)):
                b_said = tl.load(p_history + o_l - back, mask=m_end, other=-1)  # [BLOCK_L]
                m_end = m_end & (b_said == tl.load(p_history + L - back))
            b_token = tl.load(p_history + o_l, mask=m_end, other=-1)  # [BLOCK_L]
            m_end = (b_token >= 0) & (b_token < V)
            for a in range(A):
                m_end = m_end & (b_token != tl.load(allowed + i_n * A + a))
            b_token = tl.where(m_end, b_token, 0).to(tl.int32)
            tl.atomic_or(p_banned + b_token // 32, (tl.full([BLOCK_L], 1, dtype=tl.int32) << (b_token % 32)), mask=m_end)


@triton.jit(do_not_specialize=["chunks"])
def pick_scan_kernel(
    logits,  # [N, V]
    banned,  # [N, words], may be None
    stats,  # fp32 [N, chunks, 4]: highest, sum, sum at the temperature of confidence, highest that is not banned
    likeliest,  # int32 [N, chunks, 2]: of all, and of those that are not banned
    V,
    words,
    chunks,
    heat,
    IS_HEATED: tl.constexpr,
    BLOCK_V: tl.constexpr,
) -> None:
    i_n = (tl.program_id(0) // chunks).to(tl.int64)
    i_c = tl.program_id(0) % chunks
    o_v = i_c * BLOCK_V + tl.arange(0, BLOCK_V)
    b_x = tl.load(logits + i_n * V + o_v, mask=o_v < V, other=-float("inf"))  # [BLOCK_V]
    b_high, b_id = tl.max(b_x, axis=0, return_indices=True, return_indices_tie_break_left=True)
    b_far = b_x - tl.where(b_high == -float("inf"), 0.0, b_high)  # NaN where a logit is NaN or +inf, and so is the sum
    b_sum = tl.sum(tl.exp(b_far), axis=0)
    p_stats = stats + tl.program_id(0).to(tl.int64) * 4
    p_id = likeliest + tl.program_id(0).to(tl.int64) * 2
    tl.store(p_stats, b_high)
    tl.store(p_stats + 1, b_sum)
    tl.store(p_id, i_c * BLOCK_V + b_id)
    if IS_HEATED:
        b_sum = tl.sum(tl.exp(b_far / heat), axis=0)
    tl.store(p_stats + 2, b_sum)
    if banned is not None:
        b_word = tl.load(banned + i_n * words + o_v // 32, mask=o_v < V, other=0)  # [BLOCK_V]
        b_x = tl.where((b_word >> (o_v % 32)) & 1 > 0, -float("inf"), b_x)
        b_high, b_id = tl.max(b_x, axis=0, return_indices=True, return_indices_tie_break_left=True)
    tl.store(p_stats + 3, b_high)
    tl.store(p_id + 1, i_c * BLOCK_V + b_id)


@triton.jit(do_not_specialize=["most_guard"])
def pick_finish_kernel(
    logits,  # [N, V]
    stats,  # [N, chunks, 4]
    likeliest,  # [N, chunks, 2]
    guard_size,  # [N]
    temperature,  # [N]
    ids,  # [N]
    logprobs,  # [N]
    confidence,  # [N]
    V,
    chunks,
    most_guard,
    heat,
    IS_HEATED: tl.constexpr,
    IS_SAMPLED: tl.constexpr,
    BLOCK_C: tl.constexpr,
) -> None:
    i_n = tl.program_id(0).to(tl.int64)
    o_c = tl.arange(0, BLOCK_C)
    m_c = o_c < chunks
    p_stats = stats + (i_n * chunks + o_c) * 4  # [BLOCK_C]
    p_ids = likeliest + (i_n * chunks + o_c) * 2  # [BLOCK_C]
    b_high = tl.load(p_stats, mask=m_c, other=-float("inf"))  # [BLOCK_C]
    b_sum = tl.load(p_stats + 1, mask=m_c, other=0.0)  # [BLOCK_C]
    highest, c_raw = tl.max(b_high, axis=0, return_indices=True, return_indices_tie_break_left=True)
    b_far = b_high - tl.where(highest == -float("inf"), 0.0, highest)  # [BLOCK_C]
    total = tl.sum(b_sum * tl.exp(b_far), axis=0)

    b_free = tl.load(p_stats + 3, mask=m_c, other=-float("inf"))  # [BLOCK_C]
    free, c_free = tl.max(b_free, axis=0, return_indices=True, return_indices_tie_break_left=True)
    raw_id = tl.sum(tl.where(o_c == c_raw, tl.load(p_ids, mask=m_c, other=0), 0), axis=0)
    free_id = tl.sum(tl.where(o_c == c_free, tl.load(p_ids + 1, mask=m_c, other=0), 0), axis=0)
    i_token = tl.where(free == -float("inf"), raw_id, free_id).to(tl.int64)

    warmth = tl.load(temperature + i_n)
    is_sound = (warmth == 0.0) & (tl.load(guard_size + i_n) <= most_guard)
    if IS_SAMPLED:
        i_token = tl.where(warmth > 0.0, tl.load(ids + i_n), i_token)
        is_sound = (warmth >= 0.0) & (warmth < float("inf")) & (tl.load(guard_size + i_n) <= most_guard)
    is_sound = is_sound & (i_token >= 0) & (i_token < V)
    b_near = tl.load(logits + i_n * V + tl.where(is_sound, i_token, 0)) - highest
    logprob = b_near - tl.log(total)
    sure = tl.exp(logprob)
    if IS_HEATED:
        b_heated = tl.load(p_stats + 2, mask=m_c, other=0.0)  # [BLOCK_C]
        sure = tl.exp(b_near / heat - tl.log(tl.sum(b_heated * tl.exp(b_far / heat), axis=0)))
    is_sound = is_sound & (logprob == logprob)
    tl.store(ids + i_n, tl.where(is_sound, i_token, -1))
    tl.store(logprobs + i_n, tl.where(is_sound, logprob, float("nan")))
    tl.store(confidence + i_n, tl.where(is_sound, sure, float("nan")))


def pick_token(
    logits: Tensor,
    history: Tensor,
    guard_size: Tensor,
    guard_window: Tensor,
    allowed: Tensor,
    temperature: Tensor,
    most_guard: int,
    is_sampled: bool,
    confidence_temperature: float,
    ids: Tensor,
    logprobs: Tensor,
    confidence: Tensor,
) -> None:
    """Fills ids, where they were not drawn, logprobs and confidence.  ops.pick_token is the checked way in."""
    rows, vocab = logits.shape
    if rows == 0:
        return
    told = (history, guard_size, guard_window, allowed)
    assert all(tensor.is_contiguous() for tensor in (logits, *told, temperature, ids, logprobs, confidence))
    assert vocab < 2**30
    chunks = cdiv(vocab, PICK.BLOCK_V)
    stats = logits.new_empty((rows, chunks, 4))
    likeliest = logits.new_empty((rows, chunks, 2), dtype=torch.int32)
    banned = None
    with torch.cuda.device_of(logits):
        if most_guard > 0 and history.shape[1] > 0:
            banned = logits.new_empty((rows, cdiv(vocab, 32)), dtype=torch.int32)
            arguments, options = specialise_guard(told, banned, vocab, most_guard)
            pick_guard_kernel[(rows,)](*arguments, **options)
        arguments, options = specialise_scan(logits, banned, stats, likeliest, confidence_temperature)
        pick_scan_kernel[(rows * chunks,)](*arguments, **options)
        outputs = (ids, logprobs, confidence)
        arguments, options = specialise_finish(
            (logits, stats, likeliest, guard_size, temperature, *outputs), most_guard, is_sampled, confidence_temperature
        )
        pick_finish_kernel[(rows,)](*arguments, **options)


Launch = tuple[tuple[Any, ...], dict[str, Any]]  # arguments in the kernel's order, then constexprs and launch options by name


def specialise_guard(told: tuple[Tensor, ...], banned: Tensor, vocab: int, most_guard: int) -> Launch:
    history, _, _, allowed = told
    sizes = (history.shape[1], allowed.shape[1], vocab, banned.shape[1], most_guard)
    return (*told, banned, *sizes), {"BLOCK_L": PICK.BLOCK_L, "BLOCK_W": PICK.BLOCK_W, "num_warps": PICK.num_warps}


def specialise_scan(logits: Tensor, banned: Tensor | None, stats: Tensor, likeliest: Tensor, heat: float) -> Launch:
    sizes = (logits.shape[1], cdiv(logits.shape[1], 32), stats.shape[1], heat)
    options = {"IS_HEATED": heat != 1, "BLOCK_V": PICK.BLOCK_V, "num_warps": PICK.num_warps}
    return (logits, banned, stats, likeliest, *sizes), options


def specialise_finish(tensors: tuple[Tensor, ...], most_guard: int, is_sampled: bool, heat: float) -> Launch:
    logits, stats = tensors[:2]
    chunks = stats.shape[1]
    options = {"IS_HEATED": heat != 1, "IS_SAMPLED": is_sampled, "BLOCK_C": power_of_two(chunks), "num_warps": 1}
    return (*tensors, logits.shape[1], chunks, most_guard, heat), options


def gate_cases() -> Iterator[GateCase]:
    """The vocabulary of the family, and one of a single chunk that allows no vector loads, as nano's, heated."""
    for vocab, heat in ((129280, 1.0), (131, 2.0)):
        rows, chunks, width = 4, cdiv(vocab, PICK.BLOCK_V), cdiv(vocab, 32)
        logits, stats = (torch.empty(shape, device="meta") for shape in ((rows, vocab), (rows, chunks, 4)))
        likeliest, banned = (torch.empty(shape, dtype=torch.int32, device="meta") for shape in ((rows, chunks, 2), (rows, width)))
        history, allowed = (torch.empty(rows, length, dtype=torch.int64, device="meta") for length in (90, 2))
        whole, floats = (torch.empty(rows, dtype=dtype, device="meta") for dtype in (torch.int64, torch.float32))
        guard = specialise_guard((history, whole, whole, allowed), banned, vocab, 30)
        yield GateCase(f"guard-V{vocab}", pick_guard_kernel, *guard, tensor_cores=False)
        for bits in (None, banned):
            name = f"scan-V{vocab}{'-guarded' if bits is not None else ''}"
            scan = specialise_scan(logits, bits, stats, likeliest, heat)
            yield GateCase(name, pick_scan_kernel, *scan, tensor_cores=False)
        tensors = (logits, stats, likeliest, whole, floats, whole, floats, floats)
        for is_sampled, confidence in itertools.product((False, True), (1.0, 2.0)):
            name = f"finish-V{vocab}{'-drawn' if is_sampled else ''}{'-heated' if confidence != 1 else ''}"
            finish = specialise_finish(tensors, 30, is_sampled, confidence)
            yield GateCase(name, pick_finish_kernel, *finish, tensor_cores=False)
