"""What every operator means, in plain torch.  Every implementation is compared with this page; nothing here is meant to be fast."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

PAPER = 255


def draw_text(ink: Tensor, glyphs: Tensor, placements: Tensor, starts: Tensor, height: int, width: int) -> Tensor:
    """Draw glyphs black on white; where they overlap the darker pixel wins.  Shapes as in ops.draw_text."""
    num_pages = starts.numel() - 1
    pages = torch.full((num_pages, height, width), PAPER, dtype=torch.uint8)
    for page in range(num_pages):
        for glyph, top, left in placements[starts[page] : starts[page + 1]].tolist():
            offset, h, w = glyphs[glyph].tolist()
            patch = pages[page, top : top + h, left : left + w]
            patch.copy_(torch.minimum(patch, PAPER - ink[offset : offset + h * w].view(h, w)))
    return pages


RESAMPLE_BITS = 22  # fraction bits of a weight


def resample(images: Tensor, height: int, width: int) -> Tensor:
    """Pillow 13's 8-bit antialiased bicubic: one axis, back to bytes, the other axis.  Shapes as in ops.resample."""
    for axis in resample_order(images.shape[1], images.shape[2], height, width):
        images = _resample_axis(images, axis, (height, width)[axis - 1])
    return images


def contact_sheet(
    pages: Sequence[Tensor],
    boxes: Sequence[tuple[int, int, int, int]],
    size: int,
    resampled: Callable[[Tensor, int, int], Tensor] = resample,
) -> Tensor:
    """Every page resampled into its box (top, left, height, width) of a white sheet.  Shapes as in ops.contact_sheet.

    resampled   another implementation of resample
    """
    sheet = pages[0].new_full((size, size, max(page.shape[2] for page in pages)), PAPER)
    for page, (top, left, height, width) in zip(pages, boxes, strict=True):
        sheet[top : top + height, left : left + width] = resampled(page[None], height, width)[0]
    return sheet


def resample_order(height_in: int, width_in: int, height: int, width: int) -> tuple[int, int]:
    """The axes 1 (height) and 2 (width) in the order of their passes.  Up to Pillow 12 the width always went first."""
    shrinks_height = height_in > height and height_in - height > 2 * (width_in - width)
    return (1, 2) if shrinks_height else (2, 1)


def resample_weights(size_in: int, size_out: int) -> Tensor:
    """The weight of every input pixel in every output pixel, in units of 2^-22: int64 [size_out, size_in]."""
    scale = size_in / size_out
    stretch = max(scale, 1.0)  # when pixels are thrown away the cubic is widened to average over all of them
    center = (torch.arange(size_out, dtype=torch.float64)[:, None] + 0.5) * scale
    first = (center - 2.0 * stretch + 0.5).trunc()
    end = (center + 2.0 * stretch + 0.5).trunc()
    pixel = torch.arange(size_in, dtype=torch.float64)
    weights = _bicubic((pixel - center + 0.5) * (1.0 / stretch)) * ((pixel >= first) & (pixel < end))
    # Summed from left to right: another order would round the sum, and with it a weight, differently.
    weights = weights / weights.cumsum(1)[:, -1:]
    fixed = weights * 2.0**RESAMPLE_BITS
    return (fixed + torch.where(fixed < 0, -0.5, 0.5)).trunc().long()


def _bicubic(x: Tensor) -> Tensor:
    """The cubic of Keys with a = -1/2."""
    x = x.abs()
    near = (1.5 * x - 2.5) * x * x + 1.0
    far = (((x - 5.0) * x + 8.0) * x - 4.0) * -0.5
    return torch.where(x < 1.0, near, torch.where(x < 2.0, far, 0.0))


def _resample_axis(images: Tensor, axis: int, size: int) -> Tensor:
    """One pass, in bytes.  fp64 holds every product and sum here exactly."""
    weights = resample_weights(images.shape[axis], size).to(images.device, torch.float64)
    sums = (images.double().movedim(axis, -1) @ weights.T).movedim(-1, axis).long() + (1 << (RESAMPLE_BITS - 1))
    return (sums >> RESAMPLE_BITS).clamp(0, 255).to(torch.uint8)


def normalise(pixels: Tensor, dtype: torch.dtype) -> Tensor:
    """Bytes 0 .. 255 to -1 .. 1 in fp32, then rounded to dtype: mean and deviation are 0.5 in every checkpoint of the family."""
    return ((pixels.float() / 255 - 0.5) / 0.5).to(dtype)


def patch_embed(pixels: Tensor, weight: Tensor, bias: Tensor, positions: Tensor) -> Tensor:
    """Project 16 x 16 patches and add positions.  Shapes as in ops.patch_embed; a one-channel page is repeated to the weight's."""
    return project_patches(normalise(pixels, weight.dtype), weight, bias, positions)


def project_patches(images: Tensor, weight: Tensor, bias: Tensor, positions: Tensor) -> Tensor:
    """patch_embed of normalised pixels [B, H, W, 1 or C], with weight [D, C, 16, 16]."""
    num_pages, height, width, _ = images.shape
    channels = weight.shape[1]
    images = images.expand(-1, -1, -1, channels)
    patches = images.reshape(num_pages, height // 16, 16, width // 16, 16, channels)
    patches = patches.permute(0, 1, 3, 5, 2, 4).flatten(3)  # [B, H / 16, W / 16, C * 256], the weight's order
    return torch.nn.functional.linear(patches, weight.flatten(1), bias) + positions


# --- attention ----------------------------------------------------------------------------------------------------------------


def _softmax(logits: Tensor) -> Tensor:
    """At least fp32 inside, then rounded to the type that it came in."""
    return logits.softmax(-1, dtype=torch.promote_types(logits.dtype, torch.float32)).to(logits.dtype)


def attention(query: Tensor, key: Tensor, value: Tensor, prefix: int) -> Tensor:
    """Every query sees the first keys and all up to its own place.  Shapes as in ops.attention."""
    num_queries, num_keys = query.shape[1], key.shape[1]
    groups = query.shape[2] // key.shape[2]
    q = query.transpose(1, 2)  # [B, H, T, d]
    k, v = (tensor.repeat_interleave(groups, 2).transpose(1, 2) for tensor in (key, value))
    logits = (q * q.shape[-1] ** -0.5) @ k.transpose(-1, -2)
    logits = logits.masked_fill(~attention_mask(num_queries, num_keys, prefix, query.device), -torch.inf)
    mixed: Tensor = (_softmax(logits) @ v).transpose(1, 2)
    return mixed.contiguous()


def attention_mask(num_queries: int, num_keys: int, prefix: int, device: torch.device) -> Tensor:
    """True where query i, the last of which stands at the last key, sees key j: bool [T, S]."""
    place = torch.arange(num_keys - num_queries, num_keys, device=device)[:, None]
    key = torch.arange(num_keys, device=device)
    return (key < prefix) | (key <= place)


def relative_rows(table: Tensor) -> Tensor:
    """Row [i, j] is the table's for query i and key j: [2 K - 1, d] -> [K, K, d]."""
    side = (table.shape[0] + 1) // 2
    place = torch.arange(side, device=table.device)
    return table[place[:, None] - place + side - 1]


def global_attention(qkv: Tensor, rel_pos_h: Tensor, rel_pos_w: Tensor) -> Tensor:
    """Attention over a grid; query and key are also apart by rows and columns.  Shapes as in ops.global_attention."""
    num_grids, height, width, channels = qkv.shape
    head_dim = rel_pos_h.shape[1]
    heads = channels // 3 // head_dim
    q, k, v = qkv.view(num_grids, height * width, 3, heads, head_dim).permute(2, 0, 3, 1, 4)  # [B, heads, h * w, d]
    on_grid = q.unflatten(2, (height, width))
    by_row = torch.einsum("bnhwd,hkd->bnhwk", on_grid, relative_rows(rel_pos_h))  # of the q that is not scaled
    by_column = torch.einsum("bnhwd,wkd->bnhwk", on_grid, relative_rows(rel_pos_w))
    bias = by_row[..., None] + by_column[..., None, :]  # [B, heads, h, w, h, w]
    logits = (q * head_dim**-0.5) @ k.transpose(-1, -2) + bias.flatten(4).flatten(2, 3)
    mixed: Tensor = (_softmax(logits) @ v).transpose(1, 2)
    return mixed.reshape(num_grids, height, width, channels // 3)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None, activation: str) -> Tensor:
    """x weight^T + bias, and a function of it.  Shapes as in ops.linear."""
    return activated(torch.nn.functional.linear(x, weight, bias), activation)


def activated(x: Tensor, activation: str) -> Tensor:
    """The function that follows a product."""
    if activation == "gelu":
        return torch.nn.functional.gelu(x)
    return x * torch.sigmoid(1.702 * x) if activation == "quick_gelu" else x


LARGEST_E4M3 = 448.0


def e4m3_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    """Rows to the nearest 8-bit floats of their scale: the largest becomes 448.  Shapes as in ops.e4m3_rows."""
    wide = x.float()
    scales = (wide.abs().amax(-1) / LARGEST_E4M3).clamp(min=torch.finfo(torch.float32).tiny)
    steps = wide / scales[..., None]
    return steps.clamp(-LARGEST_E4M3, LARGEST_E4M3).to(torch.float8_e4m3fn), scales


def linear_e4m3(
    x: Tensor, x_scales: Tensor, weight: Tensor, scales: Tensor, bias: Tensor | None, activation: str, dtype: torch.dtype
) -> Tensor:
    """The product of what both stand for, in the scales' type, rounded once.  Shapes as in ops.linear_e4m3."""
    product: Tensor = torch.nn.functional.linear(x.to(scales.dtype), weight.to(scales.dtype)) * x_scales[..., None] * scales
    return activated(product if bias is None else product + bias, activation).to(dtype)


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    """Rows to mean 0 and variance 1, scaled and shifted.  Shapes as in ops.layer_norm."""
    return torch.nn.functional.layer_norm(x, x.shape[-1:], weight, bias, eps)


def add_layer_norm(x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """The rounded sum, and its norm."""
    total = x + residual
    return total, layer_norm(total, weight, bias, eps)


def window_attention(qkv: Tensor, bias: Tensor, rel_pos_h: Tensor, rel_pos_w: Tensor) -> Tensor:
    """global_attention inside windows; what a window has beyond the grid holds the bias.  Shapes as in ops.window_attention."""
    num_grids, height, width, channels = qkv.shape
    window = (rel_pos_h.shape[0] + 1) // 2
    windows = to_windows(qkv, bias, window)
    mixed = global_attention(windows.flatten(0, 2), rel_pos_h, rel_pos_w)
    rows, columns = windows.shape[1:3]
    mixed = mixed.view(num_grids, rows, columns, window, window, channels // 3).transpose(2, 3)
    return mixed.reshape(num_grids, rows * window, columns * window, channels // 3)[:, :height, :width].contiguous()


def to_windows(qkv: Tensor, bias: Tensor, window: int) -> Tensor:
    """[B, h, w, C] to [B, rows, columns, window, window, C], continued to the right and below with the bias [C].

    The family pads after the norm and masks nothing: a projected zero is the projection's bias, and takes part as a key.
    """
    num_grids, height, width, channels = qkv.shape
    rows, columns = -(-height // window), -(-width // window)
    padded = bias.expand(num_grids, rows * window, columns * window, channels).clone()
    padded[:, :height, :width] = qkv
    return padded.view(num_grids, rows, window, columns, window, channels).transpose(2, 3).contiguous()


# --- compress -----------------------------------------------------------------------------------------------------------------

NECK_EPS = 1e-6


def compress(
    patches: Tensor,
    neck_0: Tensor,
    scale_1: Tensor,
    shift_1: Tensor,
    neck_2: Tensor,
    scale_3: Tensor,
    shift_3: Tensor,
    net_2: Tensor,
    net_3: Tensor,
) -> Tensor:
    """The neck, then two convolutions of stride 2 with nothing between them.  Shapes as in ops.compress."""
    x = torch.nn.functional.linear(patches, neck_0.flatten(1))  # a 1 x 1 convolution
    x = layer_norm(x, scale_1, shift_1, NECK_EPS)
    x = _convolve(x, neck_2, stride=1)
    x = layer_norm(x, scale_3, shift_3, NECK_EPS)
    return _convolve(_convolve(x, net_2, stride=2), net_3, stride=2).contiguous()


def _convolve(x: Tensor, weight: Tensor, stride: int) -> Tensor:
    """A 3 x 3 convolution with padding 1 of [B, h, w, C]."""
    return torch.nn.functional.conv2d(x.permute(0, 3, 1, 2), weight, stride=stride, padding=1).permute(0, 2, 3, 1)


# --- the decoder ----------------------------------------------------------------------------------------------------------------


def _at_least_fp32(tensor: Tensor) -> Tensor:
    """Sums of 16-bit numbers are kept in fp32; fp64 stays, so that these functions also say what is exact."""
    return tensor if tensor.dtype == torch.float64 else tensor.float()


def scaled_rows(weight: Tensor, scales: Tensor | None, dtype: torch.dtype) -> Tensor:
    """A weight in this type, its rows times their scales where it has any: weight [..., out, in], scales [..., out]."""
    return weight.to(dtype) if scales is None else weight.to(dtype) * scales[..., None]


def linear_rows(x: Tensor, weight: Tensor, dtype: torch.dtype, scales: Tensor | None = None) -> Tensor:
    """x weight^T, rounded once to dtype.  Shapes as in ops.linear_rows."""
    inside = torch.promote_types(x.dtype, dtype if scales is None else torch.float32)
    product: Tensor = torch.nn.functional.linear(x.to(inside), scaled_rows(weight, scales, inside))
    return product.to(dtype)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Divide by the root of the mean square, round to x's type, and only then multiply by the weight."""
    wide = _at_least_fp32(x)
    return (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)).to(x.dtype) * weight


def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """The rounded sum, and its norm."""
    total = x + residual
    return total, rms_norm(total, weight, eps)


def silu_mul(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) * up, rounded once."""
    return (torch.nn.functional.silu(_at_least_fp32(gate)) * up).to(gate.dtype)


def rotate_half_split(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """RoPE over the whole head: channel i turns with channel i + D / 2.  x [T, H, D], cos and sin [T, D / 2]."""
    left, right = x.chunk(2, dim=-1)
    cos, sin = cos[:, None], sin[:, None]
    return torch.cat((left * cos - right * sin, right * cos + left * sin), dim=-1)


def rope_cache(
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
    """Rotate the queries in place, write rotated keys and values to their cells.  Shapes as in ops.rope_cache."""
    queries.copy_(rotate_half_split(queries, cos, sin))
    is_kept = slots >= 0
    cells = slots[is_kept]
    written = ((rotate_half_split(keys, cos, sin), key_cache, key_scales), (values, value_cache, value_scales))
    for numbers, cache, scales in written:
        if scales is None:
            cache.flatten(0, 1)[cells] = numbers[is_kept]
        else:
            cache.flatten(0, 1)[cells], scales.flatten(0, 1)[cells] = quantize_heads(numbers[is_kept])


def quantize_heads(numbers: Tensor) -> tuple[Tensor, Tensor]:
    """[T, H, D] as int8 with a scale for every head of every token: steps [T, H, D], fp32 [T, H].  Ties go to even steps."""
    numbers = numbers.float()
    scales = numbers.abs().amax(-1) / 127
    return (numbers / scales.clamp(min=torch.finfo(torch.float32).tiny)[..., None]).round().to(torch.int8), scales


def paged_attention(
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
    """Every sequence's last tokens over its pages, one sequence after the other.  Shapes as in ops.paged_attention."""
    out = torch.empty_like(queries)
    page_size = keys.shape[1]
    for b, (start, end, length, prompt) in enumerate(
        zip(starts[:-1].tolist(), starts[1:].tolist(), lengths.tolist(), prompts.tolist(), strict=True)
    ):
        if start == end:
            continue
        allowed = allowed_keys(length - (end - start), length, prompt, window, queries.device)  # [end - start, length]
        key = allowed.any(0).nonzero().flatten()  # what no query sees may have been given back
        cells = table[b].long()[key // page_size] * page_size + key % page_size
        seen_keys, seen_values = (_at(cells, *cache) for cache in ((keys, key_scales), (values, value_scales)))
        scores = torch.einsum("qhd,khd->hqk", _at_least_fp32(queries[start:end]), seen_keys) * scale
        weights = scores.masked_fill(~allowed[:, key], -torch.inf).softmax(-1)
        out[start:end] = torch.einsum("hqk,khd->qhd", weights, seen_values).to(out.dtype)
    return out


def _at(cells: Tensor, cache: Tensor, scales: Tensor | None) -> Tensor:
    """What stands in these cells: [cells, H, D], in fp32 at least."""
    found = cache.flatten(0, 1)[cells]
    return _at_least_fp32(found) if scales is None else found.float() * scales.flatten(0, 1)[cells][..., None]


def allowed_keys(first: int, length: int, prompt: int, window: int, device: torch.device) -> Tensor:
    """What queries first .. length see: bool [length - first, length].  A window never hides the prompt and counts the query."""
    i = torch.arange(first, length, device=device)[:, None]
    j = torch.arange(length, device=device)
    is_past = j <= i
    return is_past if window == 0 else is_past & ((j < prompt) | (j > i - window))


def route(x: Tensor, weight: Tensor, top_k: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Softmax over the experts, the top_k likeliest, not renormalised; and the pairs sorted by expert.  As in ops.route."""
    scores = torch.nn.functional.linear(_at_least_fp32(x), _at_least_fp32(weight)).softmax(-1)
    weights, ids = scores.sort(dim=-1, descending=True, stable=True)  # of equals the lower id, which topk does not promise
    weights, ids = weights[:, :top_k].contiguous(), ids[:, :top_k].contiguous()
    order = ids.flatten().argsort(stable=True)
    counts = torch.bincount(ids.flatten(), minlength=weight.shape[0])
    starts = torch.nn.functional.pad(counts.cumsum(0), (1, 0))
    return ids.int(), weights, order.int(), starts.int()


def expert_mlp(
    x: Tensor,
    gate_up: Tensor,
    down: Tensor,
    weights: Tensor,
    order: Tensor,
    starts: Tensor,
    gate_up_scales: Tensor | None = None,
    down_scales: Tensor | None = None,
) -> Tensor:
    """SwiGLU of every used expert over its tokens; sums in fp32, rounded once.  Shapes as in ops.expert_mlp."""
    sums, dtype = torch.zeros_like(_at_least_fp32(x)), x.dtype
    inside = gate_up.dtype if gate_up_scales is None else sums.dtype
    is_e4m3 = gate_up.dtype == torch.float8_e4m3fn
    x = scaled_rows(*e4m3_rows(x), inside) if is_e4m3 else x
    top_k = weights.shape[1]
    edges = starts.tolist()
    for expert, (start, end) in enumerate(itertools.pairwise(edges)):
        if start == end:
            continue
        pairs = order[start:end].long()
        tokens = pairs // top_k
        into, out_of = gate_up[expert], down[expert]
        if gate_up_scales is not None and down_scales is not None:
            into, out_of = scaled_rows(into, gate_up_scales[expert], inside), scaled_rows(out_of, down_scales[expert], inside)
        gate, up = torch.nn.functional.linear(x[tokens].to(inside), into).chunk(2, dim=-1)
        inner = (torch.nn.functional.silu(gate) * up).to(dtype)
        inner = scaled_rows(*e4m3_rows(inner), inside) if is_e4m3 else inner.to(inside)
        outputs = torch.nn.functional.linear(inner, out_of)
        sums.index_add_(0, tokens, (outputs * weights.flatten()[pairs, None]).to(sums.dtype))
    return sums.to(dtype)


# --- the next token -------------------------------------------------------------------------------------------------------------


def pick_token(
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
    """Guard, the likeliest or a drawn token, and how likely it is; nothing waits for the device.  As in ops.pick_token."""
    guarded = guard_repeats(logits, history, guard_size, guard_window, allowed, most_guard)
    ids = guarded.argmax(-1)  # of equals the lower id
    is_sound = temperature == 0
    if is_sampled:
        ids = torch.where(is_sound, ids, draw_token(guarded, temperature, top_p, chance))
        is_sound = (temperature >= 0) & temperature.isfinite()
    del guarded  # or log_softmax is the second copy alive, for which a CPU asks the system: 59 ms for 64 rows of 129,280, not 26
    logprobs = logits.log_softmax(-1).gather(1, ids[:, None])[:, 0]  # NaN where a logit is NaN or +inf, or all are -inf
    confidence = logprobs.exp() if confidence_temperature == 1 else _probability(logits, ids, confidence_temperature)
    is_sound = is_sound & (guard_size <= most_guard) & ~logprobs.isnan()
    return ids.masked_fill(~is_sound, -1), logprobs.masked_fill(~is_sound, torch.nan), confidence.masked_fill(~is_sound, torch.nan)


def _probability(logits: Tensor, ids: Tensor, temperature: float) -> Tensor:
    """Of the ids [N] at a temperature.  The highest logit is taken away first, or a low temperature makes large ones infinite."""
    heated = (logits - logits.amax(-1, keepdim=True)).div_(temperature)
    return heated.log_softmax(-1).gather(1, ids[:, None])[:, 0].exp()


def guard_repeats(
    logits: Tensor, history: Tensor, guard_size: Tensor, guard_window: Tensor, allowed: Tensor, most_guard: int
) -> Tensor:
    """The logits, -inf for what would repeat an n-gram and is not allowed; where that leaves nothing, nothing is banned."""
    if most_guard == 0 or history.shape[1] == 0:
        return logits
    is_banned = ends_of_repeats(history, guard_size, guard_window, most_guard)
    places = history.clamp(0, logits.shape[1] - 1)
    bans = torch.where(is_banned & (history == places), -torch.inf, torch.inf).to(logits.dtype)
    guarded = logits.clone()
    guarded.scatter_reduce_(1, places, bans, "amin")
    _give_back(guarded, logits, allowed, torch.ones_like(allowed, dtype=torch.bool))
    _give_back(guarded, logits, history, guarded.amax(-1, keepdim=True) == -torch.inf)
    return guarded


def ends_of_repeats(history: Tensor, guard_size: Tensor, guard_window: Tensor, most_guard: int) -> Tensor:
    """True where an n-gram of the window ends whose first n - 1 tokens are the last n - 1 of the history: bool [N, L]."""
    length = history.shape[1]
    width = min(most_guard, length) - 1  # of the longest prefix; a longer n-gram is not in the history
    before = torch.nn.functional.pad(history, (width, 0), value=-1).unfold(1, width, 1)  # [N, L + 1, width]: before every place
    back = torch.arange(width, 0, -1, device=history.device)
    is_same = before[:, :-1] == before[:, -1:]
    is_same |= back >= guard_size[:, None, None]  # a shorter n-gram does not ask so far back
    first = length - torch.minimum((history >= 0).sum(1), guard_window).clamp(min=0)  # the place where the window begins
    place = torch.arange(length, device=history.device)
    is_inside = (place - first[:, None] >= guard_size[:, None] - 1) & (guard_size > 0)[:, None]
    return is_same.all(-1) & is_inside


def _give_back(guarded: Tensor, logits: Tensor, ids: Tensor, is_given: Tensor) -> None:
    """In place: the ids [N, K] have their own logits again where is_given says so.  An id that no token has is passed over."""
    places = ids.clamp(0, logits.shape[1] - 1)
    raw = logits.gather(1, places).masked_fill(~(is_given & (ids == places)), -torch.inf)
    guarded.scatter_reduce_(1, places, raw, "amax")


def draw_token(logits: Tensor, temperature: Tensor, top_p: Tensor, chance: Tensor) -> Tensor:
    """A token of every row's nucleus: int64 [N].  Masses are whole numbers, whose sums are the same in any order."""
    scores, ids = logits.sort(dim=-1, descending=True, stable=True)
    highest, heat = scores[:, :1].double(), torch.where(temperature > 0, temperature, 1.0).double()[:, None]
    unit = 2.0 ** (62 - logits.shape[1].bit_length())  # the likeliest token's mass; all together stay below 2^62
    mass = scores.double().sub_(highest).div_(heat).exp_().mul_(unit).round_().long().cumsum(-1)
    total, last = mass[:, -1:], mass.shape[1] - 1  # a row of NaN has no order, and what is found there may be behind the last
    share = torch.where(top_p[:, None] < 1, (top_p.double()[:, None] * total).ceil().long(), total)
    kept = mass.gather(1, torch.searchsorted(mass, share).clamp(max=last))
    passed = (chance[:, None] * kept).long().clamp(min=0).minimum(kept - 1)
    return ids.gather(1, torch.searchsorted(mass, passed, right=True).clamp(max=last))[:, 0]
