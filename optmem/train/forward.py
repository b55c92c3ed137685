"""The modules of the model once more, as training sees them: differentiable, fast in bf16 autocast, and open where a loss looks in.

Inference runs operators in C++ or Triton over a paged cache; here is the same arithmetic in plain torch over the same parameters,
and tests hold the two together.  Two liberties are taken: tables of relative positions are zero and left out, and of the neck's
3 x 3 convolution only the centre is used, so the other eight taps must be (and stay) zero.

A batch for the decoder is B prefixes and K stretches of text for each.  A stretch sees its page's prefix and itself.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from optmem.model import decoder as text
from optmem.model.clip import Clip, Layer
from optmem.model.encoder import Encoder
from optmem.model.layers import RMSNorm
from optmem.model.stage_one import Block, StageOne
from optmem.reference import normalise, to_windows


class Vision(NamedTuple):
    """What the encoder makes of pages."""

    patches: Tensor  # [B, g * g, width]  of stage one, before the compressor
    tokens: Tensor  # [B, m * m, hidden]


class Reading(NamedTuple):
    """What the decoder makes of stretches, layer by layer."""

    hidden: list[Tensor]  # [B, K, T, hidden]  after each layer, not normalised
    looks: list[Tensor]  # [B, heads, K, T, P]  how much each layer looks at the prefix
    routes: list[Tensor]  # [B, K, T, experts]  log probabilities, of the layers that have experts


# --- the encoder --------------------------------------------------------------------------------------------------------------


def encode(encoder: Encoder, pixels: Tensor) -> Vision:
    """uint8 [B, S, S, 1] -> patches and vision tokens."""
    patches, cells = stage_one(encoder.sam_model, pixels)
    assert encoder.vision_model is not None, "nano has V1's second stage"
    features = torch.cat([clip(encoder.vision_model, cells), cells.flatten(1, 2)], dim=-1)
    return Vision(patches.flatten(1, 2), encoder.projector(features))


def stage_one(stage: StageOne, pixels: Tensor) -> tuple[Tensor, Tensor]:
    """uint8 [B, S, S, 1] -> patches [B, g, g, D] and cells [B, m, m, C]."""
    projection, grid = stage.patch_embed.proj, pixels.shape[1] // 16
    images = normalise(pixels, torch.float32).view(-1, grid, 16, grid, 16)
    squares = images.transpose(2, 3).flatten(3)  # [B, g, g, 256]
    x = functional.linear(squares, projection.weight.sum(1).flatten(1), projection.bias)
    x = x + stage._positions.at(stage.pos_embed[0], grid)
    for block in stage.blocks:
        assert isinstance(block, Block)
        x = x + window_attention(block, block.norm1(x))
        x = x + block.mlp(block.norm2(x))
    return x, compress(stage, x)


def window_attention(block: Block, x: Tensor) -> Tensor:
    """[B, h, w, D] -> [B, h, w, D], without relative positions."""
    attention = block.attn
    batch, height, width, channels = x.shape
    qkv = attention.qkv(x)
    side = height if attention.is_global else (attention.rel_pos_h.shape[0] + 1) // 2
    windows = to_windows(qkv, attention.qkv.bias.to(qkv.dtype), side)  # [B, rows, columns, side, side, 3 D]
    rows, columns = windows.shape[1:3]
    heads = channels // attention.rel_pos_h.shape[1]
    q, k, v = windows.view(-1, side * side, 3, heads, channels // heads).permute(2, 0, 3, 1, 4)
    mixed = attend(q, k, v).transpose(1, 2).reshape(batch, rows, columns, side, side, channels)
    mixed = mixed.transpose(2, 3).reshape(batch, rows * side, columns * side, channels)[:, :height, :width]
    out: Tensor = attention.proj(mixed)
    return out


def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Everything sees everything, all [N, heads, T, d].  Three products: faster here than torch's own in bf16 on CPU."""
    mixed: Tensor = ((q * q.shape[-1] ** -0.5) @ k.transpose(-1, -2)).softmax(-1) @ v
    return mixed


def compress(stage: StageOne, x: Tensor) -> Tensor:
    """[B, g, g, D] -> [B, g / 4, g / 4, C]."""
    into, norm_1, centre, last = stage.neck
    assert isinstance(into, nn.Conv2d)
    assert isinstance(centre, nn.Conv2d)
    x = norm_1(functional.linear(x, into.weight.flatten(1)))
    x = last(functional.linear(x, centre.weight[:, :, 1, 1]))
    return halve(halve(x, stage.net_2.weight), stage.net_3.weight)


def halve(x: Tensor, weight: Tensor) -> Tensor:
    """A 3 x 3 convolution of stride 2 and padding 1 as one product: [B, h, w, C] -> [B, h / 2, w / 2, D], h and w even."""
    padded = functional.pad(x, (0, 0, 1, 0, 1, 0))
    height, width = x.shape[1:3]
    taps = [padded[:, dy : dy + height : 2, dx : dx + width : 2] for dy in range(3) for dx in range(3)]
    return functional.linear(torch.cat(taps, dim=-1), weight.permute(0, 2, 3, 1).flatten(1))


def clip(stage: Clip, cells: Tensor) -> Tensor:
    """[B, m, m, D] -> [B, m * m, D]."""
    x = stage.pre_layrnorm(stage.embeddings(cells))
    for layer in stage.transformer.layers:
        assert isinstance(layer, Layer)
        attention = layer.self_attn
        q, k, v = attention.qkv_proj(layer.layer_norm1(x)).unflatten(2, (3, attention.heads, -1)).permute(2, 0, 3, 1, 4)
        x = x + attention.out_proj(attend(q, k, v).transpose(1, 2).flatten(2))
        x = x + layer.mlp(layer.layer_norm2(x))
    kept: Tensor = x[:, 1:]
    return kept


# --- the decoder --------------------------------------------------------------------------------------------------------------


def prefixes(encoder: Encoder, decoder: text.Decoder, tokens: Tensor, bos: int) -> Tensor:
    """Vision tokens [B, m * m, hidden] -> what the decoder is given of every page, [B, 1 + m * (m + 1) + 1, hidden]."""
    assert encoder.image_newline is not None, "nano has newlines"
    batch, count, hidden = tokens.shape
    across = round(count**0.5)
    ends = encoder.image_newline.expand(batch, across, 1, hidden)
    picture = torch.cat([tokens.view(batch, across, across, hidden), ends], dim=2).flatten(1, 2)
    begin = decoder.model.embed_tokens.weight[bos].expand(batch, 1, hidden)
    return torch.cat([begin, picture, encoder.view_seperator.expand(batch, 1, hidden)], dim=1)


def prefix_places(pixels: Tensor, side: int) -> Tensor:
    """Where the vision token of a pixel lies in a prefix: int64 [..., 2], y and x -> int64 [...]."""
    across = side // 64
    return 1 + pixels[..., 0] // 64 * (across + 1) + pixels[..., 1] // 64


class _Shape(NamedTuple):
    """B prefixes of P tokens, then K stretches of T for each, one after the other in one tensor of tokens."""

    batch: int
    prefix: int
    stretches: int
    length: int

    def split(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """[B P + B K T, ...] -> [B, P, ...] and [B, K, T, ...]."""
        first = self.batch * self.prefix
        rest = x.shape[1:]
        shared = x[:first].reshape(self.batch, self.prefix, *rest)
        return shared, x[first:].reshape(self.batch, self.stretches, self.length, *rest)


def read(decoder: text.Decoder, prefix: Tensor, ids: Tensor, positions: Tensor) -> Reading:
    """Teacher-forced stretches.

    prefix     [B, P, hidden]
    ids        int64 [B, K, T]
    positions  int64 [B, K, T]   P is the first behind the prefix
    """
    shape = _Shape(*prefix.shape[:2], *ids.shape[1:])
    x = torch.cat([prefix.flatten(0, 1), functional.embedding(ids, decoder.model.embed_tokens.weight).flatten(0, 2)])
    places = torch.cat([torch.arange(shape.prefix, device=ids.device).repeat(shape.batch), positions.flatten()])
    turn = _turns(places, decoder.config.head_dim, decoder.config.rope_theta)
    reading = Reading([], [], [])
    for layer in decoder.model.layers:
        assert isinstance(layer, text.Layer)
        mixed, look = _attention(layer.self_attn, norm(layer.input_layernorm, x), turn, shape)
        x = x + mixed
        normed = norm(layer.post_attention_layernorm, x)
        if isinstance(layer.mlp, text.MixtureOfExperts):
            out, routes = mixture(layer.mlp, normed)
            reading.routes.append(shape.split(routes)[1])
        else:
            out = swiglu(layer.mlp, normed)
        x = x + out
        reading.hidden.append(shape.split(x)[1])
        reading.looks.append(look)
    return reading


def logits(decoder: text.Decoder, hidden: Tensor) -> Tensor:
    """[N, hidden] -> [N, vocab]."""
    return functional.linear(norm(decoder.model.norm, hidden), decoder.lm_head.weight)


def norm(layer: RMSNorm, x: Tensor) -> Tensor:
    """RMSNorm, in fp32."""
    return functional.rms_norm(x, x.shape[-1:], layer.weight, layer.eps)


def _turns(positions: Tensor, head_dim: int, theta: float) -> tuple[Tensor, Tensor]:
    exponent = torch.arange(0, head_dim, 2, dtype=torch.float32, device=positions.device) / head_dim
    angles = positions[:, None, None].float() * (1.0 / theta**exponent)  # [N, 1, d / 2]
    return angles.cos(), angles.sin()


def _rotate(x: Tensor, turn: tuple[Tensor, Tensor]) -> Tensor:
    """[N, heads, d]; in fp32, rounded once."""
    cos, sin = turn
    left, right = x.float().chunk(2, dim=-1)
    return torch.cat([left * cos - right * sin, right * cos + left * sin], dim=-1).to(x.dtype)


def _attention(layer: text.Attention, x: Tensor, turn: tuple[Tensor, Tensor], shape: _Shape) -> tuple[Tensor, Tensor]:
    """[N, hidden] -> what is added to it, and the stretches' probabilities over the prefix [B, heads, K, T, P]."""
    heads = layer.config.heads
    q, k, v = (functional.linear(x, part.weight).view(len(x), heads, -1) for part in (layer.q_proj, layer.k_proj, layer.v_proj))
    q, k = _rotate(q * layer.config.head_dim**-0.5, turn), _rotate(k, turn)
    (pq, rq), (pk, rk), (pv, rv) = (shape.split(part) for part in (q, k, v))
    pq, pk, pv = (part.transpose(1, 2) for part in (pq, pk, pv))  # [B, heads, P, d]
    rq, rk, rv = (part.permute(0, 3, 1, 2, 4) for part in (rq, rk, rv))  # [B, heads, K, T, d]
    seen = _causal(pq @ pk.transpose(-1, -2)).softmax(-1)
    grid = (shape.batch, heads, shape.stretches, shape.length, -1)
    on_prefix = (rq.flatten(2, 3) @ pk.transpose(-1, -2)).view(grid)
    weights = torch.cat([on_prefix, _causal(rq @ rk.transpose(-1, -2))], dim=-1).softmax(-1)
    look, within = torch.split(weights, [shape.prefix, shape.length], dim=-1)
    mixed = (look.flatten(2, 3) @ pv).view(grid) + within.to(rv.dtype) @ rv
    joined = torch.cat([(seen @ pv).permute(0, 2, 1, 3).flatten(0, 1), mixed.permute(0, 2, 3, 1, 4).flatten(0, 2)])
    return functional.linear(joined.flatten(1), layer.o_proj.weight), look


def _causal(scores: Tensor) -> Tensor:
    """Minus infinity where a key comes after its query; [..., T, T]."""
    later = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).triu(1)
    return scores.masked_fill(later, -torch.inf)


def swiglu(mlp: text.MLP, x: Tensor) -> Tensor:
    """[N, hidden] -> [N, hidden]."""
    gate, up = functional.linear(x, mlp.gate_proj.weight), functional.linear(x, mlp.up_proj.weight)
    return functional.linear(functional.silu(gate) * up, mlp.down_proj.weight)


def mixture(mlp: text.MixtureOfExperts, x: Tensor) -> tuple[Tensor, Tensor]:
    """[N, hidden] -> [N, hidden] and the router's log probabilities, fp32 [N, experts]."""
    with torch.autocast(x.device.type, enabled=False):
        routes = functional.linear(x.float(), mlp.gate.weight.float()).log_softmax(-1)
    weights, ids = routes.exp().topk(mlp.gate.top_k, dim=-1)
    order = ids.flatten().argsort(stable=True)
    ends = torch.bincount(ids.flatten(), minlength=routes.shape[1]).cumsum(0).int()
    tokens = order // mlp.gate.top_k
    dtype = torch.get_autocast_dtype(x.device.type) if torch.is_autocast_enabled(x.device.type) else x.dtype
    gate, up = grouped(x[tokens].to(dtype), mlp.experts.gate_up.to(dtype), ends).chunk(2, dim=-1)
    each = grouped(functional.silu(gate) * up, mlp.experts.down.to(dtype), ends).float() * weights.flatten()[order, None]
    routed = torch.zeros(x.shape, device=x.device).index_add(0, tokens, each)
    return routed + swiglu(mlp.shared_experts, x), routes


def grouped(x: Tensor, weights: Tensor, ends: Tensor) -> Tensor:
    """Rows of x [N, in], group by group, times their own matrix of weights [E, out, in]; group e ends before row ends[e]."""
    return functional.grouped_mm(x, weights.transpose(1, 2), offs=ends)
