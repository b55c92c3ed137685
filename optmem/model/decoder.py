"""The decoder of all families: embeddings to text, over a paged cache.  Multi-head attention, and after the first layer a mixture
of experts; UL's is the same with a window behind the prompt.

    x = x + attention(norm(x));  x = x + mlp(norm(x))       for every layer
    logits = lm_head(norm(x))

Every parameter has the name that it has in a checkpoint, but for the packed experts (layout.py), and none is trained here.
The matrices may be held as int8 or e4m3, with a scale for every row (quantize.py).
On CPU a token's numbers do not depend on its batch mates or on how a prompt is cut into chunks, bit for bit.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from optmem import ops
from optmem.errors import InputError
from optmem.model.cache import Batch, Cache
from optmem.model.config import DecoderConfig
from optmem.model.layers import RMSNorm, rope_table


def _parameter(*shape: int) -> nn.Parameter:
    return nn.Parameter(torch.empty(shape), requires_grad=False)


Rows = Tensor | ops.E4m3Rows


class Linear(nn.Module):
    """x weight^T; no layer of the decoder has a bias."""

    weight: Tensor
    scales: Tensor | None  # fp32 [out]  of a weight of int8 or e4m3

    def __init__(self, width_in: int, width_out: int) -> None:
        super().__init__()
        self.weight = _parameter(width_out, width_in)
        self.register_buffer("scales", None)

    def taken(self, x: Tensor) -> Rows:
        """Tokens as this weight takes them, which others of its kind may share."""
        return ops.e4m3_rows(x) if self.weight.dtype == ops.E4M3 else x

    def forward(self, x: Rows) -> Tensor:
        """[T, in] -> [T, out]."""
        x = self.taken(x) if isinstance(x, Tensor) else x
        if isinstance(x, Tensor):
            return ops.linear_rows(x, self.weight, scales=self.scales)
        assert self.scales is not None, "a weight of e4m3 has scales"
        return ops.linear_e4m3(x, self.weight, self.scales)


class Attention(nn.Module):
    """Plain multi-head attention over the cache, half-split RoPE on the whole head."""

    def __init__(self, config: DecoderConfig, layer: int) -> None:
        super().__init__()
        self.config, self.layer = config, layer
        self.q_proj, self.k_proj, self.v_proj, self.o_proj = (Linear(config.hidden, config.hidden) for _ in range(4))

    def forward(self, x: Tensor, batch: Batch, cache: Cache, rope: tuple[Tensor, Tensor]) -> Tensor:
        """[T, hidden] -> [T, hidden]; writes this layer's keys and values to the cache."""
        heads, dim = self.config.heads, self.config.head_dim
        taken = self.q_proj.taken(x)
        q, k, v = (project(taken).view(-1, heads, dim) for project in (self.q_proj, self.k_proj, self.v_proj))
        keys, values, scales = cache.keys[self.layer], cache.values[self.layer], cache.scales_of(self.layer)
        ops.rope_cache(q, k, v, *rope, batch.slots, keys, values, scales)
        places = (batch.table, batch.starts, batch.lengths, batch.prompts)
        mixed = ops.paged_attention(q, keys, values, *places, self.config.window, dim**-0.5, scales)
        out: Tensor = self.o_proj(mixed.flatten(1))
        return out


class MLP(nn.Module):
    """SwiGLU."""

    def __init__(self, hidden: int, width: int) -> None:
        super().__init__()
        self.gate_proj, self.up_proj, self.down_proj = Linear(hidden, width), Linear(hidden, width), Linear(width, hidden)

    def forward(self, x: Tensor) -> Tensor:
        """[T, hidden] -> [T, hidden]."""
        taken = self.gate_proj.taken(x)
        out: Tensor = self.down_proj(ops.silu_mul(self.gate_proj(taken), self.up_proj(taken)))
        return out


class Router(nn.Module):
    """Chooses experts by the raw softmax: the weights of the chosen ones do not sum to one."""

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        self.top_k = config.top_k
        self.weight = _parameter(config.experts, config.hidden)

    def forward(self, x: Tensor) -> ops.Routing:
        """[T, hidden] -> ids, weights and the grouping by expert."""
        return ops.route(x, self.weight, self.top_k)


class Experts(nn.Module):
    """The routed experts of a layer, packed."""

    gate_up: Tensor
    down: Tensor
    gate_up_scales: Tensor | None  # fp32 [E, 2 * F]  of weights of int8 or e4m3
    down_scales: Tensor | None  # fp32 [E, D]

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        self.gate_up = _parameter(config.experts, 2 * config.expert_width, config.hidden)
        self.down = _parameter(config.experts, config.hidden, config.expert_width)
        self.register_buffer("gate_up_scales", None)
        self.register_buffer("down_scales", None)

    def forward(self, x: Tensor, routing: ops.Routing) -> Tensor:
        """[T, hidden] -> [T, hidden]."""
        gate_up, down = self.gate_up_scales, self.down_scales
        scales = None if gate_up is None or down is None else ops.ExpertScales(gate_up, down)
        return ops.expert_mlp(x, self.gate_up, self.down, routing, scales)


class MixtureOfExperts(nn.Module):
    """Some experts for every token, chosen by the router, and one for all."""

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        self.gate = Router(config)
        self.experts = Experts(config)
        self.shared_experts = MLP(config.hidden, config.expert_width * config.shared_experts)

    def forward(self, x: Tensor) -> Tensor:
        """[T, hidden] -> [T, hidden]."""
        out: Tensor = self.experts(x, self.gate(x)) + self.shared_experts(x)
        return out


class Layer(nn.Module):
    """Attention and MLP, each behind a norm.  What was not yet added to x travels along, to be added inside the next norm."""

    def __init__(self, config: DecoderConfig, layer: int) -> None:
        super().__init__()
        self.self_attn = Attention(config, layer)
        self.mlp = MLP(config.hidden, config.dense_width) if layer < config.dense_layers else MixtureOfExperts(config)
        self.input_layernorm = RMSNorm(config.hidden, config.norm_eps)
        self.post_attention_layernorm = RMSNorm(config.hidden, config.norm_eps)

    def forward(
        self, x: Tensor, pending: Tensor | None, batch: Batch, cache: Cache, rope: tuple[Tensor, Tensor]
    ) -> tuple[Tensor, Tensor]:
        """x and what is to be added to it, both [T, hidden] -> the same, one layer later."""
        x, normed = (x, self.input_layernorm(x)) if pending is None else self.input_layernorm.add(x, pending)
        x, normed = self.post_attention_layernorm.add(x, self.self_attn(normed, batch, cache, rope))
        return x, self.mlp(normed)


class Embedding(nn.Module):
    """A vector for every token id."""

    def __init__(self, count: int, width: int) -> None:
        super().__init__()
        self.weight = _parameter(count, width)

    def forward(self, ids: Tensor) -> Tensor:
        """int64 [T] -> [T, hidden]."""
        return nn.functional.embedding(ids, self.weight)


class Body(nn.Module):
    """What a checkpoint calls `model`."""

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        self.embed_tokens = Embedding(config.vocab_size, config.hidden)
        self.layers = nn.ModuleList([Layer(config, layer) for layer in range(config.layers)])
        self.norm = RMSNorm(config.hidden, config.norm_eps)


class Decoder(nn.Module):
    """Embeddings of a packed batch to hidden states, hidden states to logits.  It keeps no state: cache and batch are arguments."""

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        self.config = config
        self.model = Body(config)
        self.lm_head = Linear(config.hidden, config.vocab_size)

    @property
    def dtype(self) -> torch.dtype:
        """The type of embeddings, activations and cache, and of all weights that are not quantised."""
        return self.model.embed_tokens.weight.dtype

    @property
    def is_quantized(self) -> bool:
        """Whether the matrices are held as int8 or e4m3."""
        return self.lm_head.scales is not None

    def embed(self, ids: Tensor, *, is_checked: bool = False) -> Tensor:
        """int64 [T] -> [T, hidden].  Raises InputError where an id is not in the vocabulary.

        is_checked   the caller has seen to that, so that no device has to be waited for
        """
        if ids.dtype != torch.int64 or ids.dim() != 1:
            raise InputError(f"token ids must be torch.int64 [T], got {ids.dtype} {list(ids.shape)}")
        if ids.device.type != "cpu" and not is_checked:  # where an id outside would end more than this call
            self._check_ids(ids)
        try:
            vectors: Tensor = self.model.embed_tokens(ids)
        except IndexError:
            self._check_ids(ids)
            raise
        return vectors

    def _check_ids(self, ids: Tensor) -> None:
        outside = (ids < 0) | (ids >= self.config.vocab_size)
        if outside.any():
            at = int(outside.nonzero()[0])
            raise InputError(f"token ids must be 0 to {self.config.vocab_size - 1}, got {int(ids[at])} at {at}")

    def forward(self, embeddings: Tensor, batch: Batch, cache: Cache) -> Tensor:
        """[T, hidden] of all sequences, one after the other -> normalised hidden states [T, hidden]; fills the cache.

        Raises InputError where the tokens are not those that the batch describes.
        """
        expected = [batch.positions.numel(), self.config.hidden]
        if list(embeddings.shape) != expected or embeddings.dtype != self.dtype:
            raise InputError(f"embeddings must be {self.dtype} {expected}, got {embeddings.dtype} {list(embeddings.shape)}")
        rope = rope_table(batch.positions, self.config.head_dim, self.config.rope_theta, self.dtype)
        x: Tensor = embeddings
        pending: Tensor | None = None
        for layer in self.model.layers:
            x, pending = layer(x, pending, batch, cache, rope)
        assert pending is not None, "a decoder has at least one layer"
        return self.model.norm.add(x, pending)[1]

    def logits(self, hidden: Tensor) -> Tensor:
        """[T, hidden] -> fp32 [T, vocab]: rounded to the activations' type first, as the references do, so that ties are theirs."""
        logits: Tensor = self.lm_head(hidden)
        return logits.float()


def greedy(
    decoder: Decoder, embeddings: Tensor, max_tokens: int, eos_id: int | None = None, *, chunk: int | None = None
) -> Iterator[int]:
    """The likeliest token after a prompt [T, hidden], and again, until the end of text, which is yielded too, or max_tokens.

    chunk   prompt tokens of a pass; None takes them all at once

    Raises InputError, before anything is computed, where prompt and max_tokens are more than the decoder's positions.
    """
    if embeddings.dim() != 2 or len(embeddings) < 1:
        raise InputError(f"a prompt must be [T, {decoder.config.hidden}] with at least one token, got {list(embeddings.shape)}")
    length, most = len(embeddings), decoder.config.max_positions
    if max_tokens < 0:
        raise InputError(f"max_tokens must be 0 or more, got {max_tokens}")
    if chunk is not None and chunk < 1:
        raise InputError(f"chunk must be at least 1, or None for the whole prompt at once, got {chunk}")
    if length + max_tokens > most:
        raise InputError(f"prompt and max_tokens must be at most {most} together, got {length} and {max_tokens}")
    return _greedy(decoder, embeddings, max_tokens, eos_id, chunk or length)


def _greedy(decoder: Decoder, embeddings: Tensor, max_tokens: int, eos_id: int | None, chunk: int) -> Iterator[int]:
    length = len(embeddings)
    cache = Cache.for_tokens(decoder.config, length + max_tokens, decoder.dtype, embeddings.device, prompt=length)
    sequence = cache.new_sequence(prompt=length)
    hidden = embeddings[:0]
    for first in range(0, length, chunk):
        part = embeddings[first : first + chunk]
        hidden = decoder(part, cache.batch([sequence], [part.shape[0]]), cache)
    for step in range(max_tokens):
        token = decoder.logits(hidden[-1:]).argmax(-1)
        yield int(token)
        if int(token) == eos_id or step + 1 == max_tokens:
            return
        hidden = decoder(decoder.embed(token), cache.batch([sequence], [1]), cache)
