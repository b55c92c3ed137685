"""Which tensors a checkpoint holds, under its original names, and how the routed experts lie in memory.

The names are those of the public files, misspellings and all (``view_seperator``, ``pre_layrnorm``, V2's ``model.model``).
In memory the experts of a layer are two tensors, so that one grouped product serves them all:

    model.layers.L.mlp.experts.gate_up   [E, 2F, H]   of each expert the gate's F rows, then those of up
    model.layers.L.mlp.experts.down      [E, H, F]

Every other tensor keeps its name and shape.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from math import isqrt

from torch import Tensor

from optmem.model.config import ClipConfig, DecoderConfig, GlanceConfig, ModelConfig, QueryConfig, StageOneConfig

Shapes = Iterator[tuple[str, tuple[int, ...]]]

PLACE_HEIGHT, PLACE_WIDTH = 8, 4  # pixels; what the glance tells apart inside a vision token of 64 x 64
PLACES = (64 // PLACE_HEIGHT) * (64 // PLACE_WIDTH)
_CLIP_PATCH = 14  # pixels; CLIP's own patch projection is stored and never used
_EXPERT = re.compile(r"(model\.layers\.\d+\.mlp\.experts\.)(\d+)\.(gate|up|down)_proj\.weight")


def expected_tensors(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Name and shape of every tensor in a checkpoint of this model."""
    shapes = dict(_stage_one("model.sam_model.", config.stage_one))
    if config.clip is not None:
        shapes.update(_clip("model.vision_model.", config.clip))
    if config.query is not None:
        shapes.update(_query("model.qwen2_model.", config.query))
    shapes.update(_linear("model.projector.layers", config.decoder.hidden, config.feature_width))
    if config.has_newlines:
        shapes["model.image_newline"] = (config.decoder.hidden,)
    shapes["model.view_seperator"] = (config.decoder.hidden,)
    shapes.update(_decoder(config.decoder))
    if config.glance is not None:
        shapes.update(_glance("glance.", config.glance, config.decoder))
    return shapes


def packed_tensors(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Name and shape of every tensor in memory: as in the checkpoint, but the experts of a layer in two tensors."""
    decoder = config.decoder
    gate_up = (decoder.experts, 2 * decoder.expert_width, decoder.hidden)
    down = (decoder.experts, decoder.hidden, decoder.expert_width)
    shapes = {}
    for name, shape in expected_tensors(config).items():
        packed = packed_name(name)
        shapes[packed] = shape if packed == name else (down if packed.endswith("down") else gate_up)
    return shapes


def packed_name(name: str) -> str:
    """The tensor in memory that holds the checkpoint's tensor ``name``."""
    expert = _EXPERT.fullmatch(name)
    if expert is None:
        return name
    return expert[1] + ("down" if expert[3] == "down" else "gate_up")


def stored_view(weights: Mapping[str, Tensor], name: str) -> Tensor:
    """The part of the tensors in memory that is the checkpoint's tensor ``name``; contiguous, shared with them."""
    whole = weights[packed_name(name)]
    expert = _EXPERT.fullmatch(name)
    if expert is None:
        return whole
    matrix = whole[int(expert[2])]
    if expert[3] == "down":
        return matrix
    gate, up = matrix.chunk(2)
    return gate if expert[3] == "gate" else up


def _linear(name: str, out: int, into: int) -> Shapes:
    yield f"{name}.weight", (out, into)
    yield f"{name}.bias", (out,)


def _norm(name: str, width: int) -> Shapes:
    yield f"{name}.weight", (width,)
    yield f"{name}.bias", (width,)


def _stage_one(prefix: str, config: StageOneConfig) -> Shapes:
    width, neck = config.width, config.neck_width
    yield f"{prefix}pos_embed", (1, config.table_side, config.table_side, width)
    yield f"{prefix}patch_embed.proj.weight", (width, 3, config.patch, config.patch)
    yield f"{prefix}patch_embed.proj.bias", (width,)
    for layer in range(config.layers):
        block = f"{prefix}blocks.{layer}."
        side = config.table_side if layer in config.global_layers else config.window
        yield from _norm(block + "norm1", width)
        yield f"{block}attn.rel_pos_h", (2 * side - 1, width // config.heads)
        yield f"{block}attn.rel_pos_w", (2 * side - 1, width // config.heads)
        yield from _linear(block + "attn.qkv", 3 * width, width)
        yield from _linear(block + "attn.proj", width, width)
        yield from _norm(block + "norm2", width)
        yield from _linear(block + "mlp.lin1", config.mlp_width, width)
        yield from _linear(block + "mlp.lin2", width, config.mlp_width)
    yield f"{prefix}neck.0.weight", (neck, width, 1, 1)
    yield from _norm(prefix + "neck.1", neck)
    yield f"{prefix}neck.2.weight", (neck, neck, 3, 3)
    yield from _norm(prefix + "neck.3", neck)
    yield f"{prefix}net_2.weight", (config.channels[0], neck, 3, 3)
    yield f"{prefix}net_3.weight", (config.channels[1], config.channels[0], 3, 3)


def _clip(prefix: str, config: ClipConfig) -> Shapes:
    width = config.width
    yield f"{prefix}embeddings.class_embedding", (width,)
    yield f"{prefix}embeddings.patch_embedding.weight", (width, 3, _CLIP_PATCH, _CLIP_PATCH)
    yield f"{prefix}embeddings.position_embedding.weight", (config.table_side**2 + 1, width)
    yield from _norm(prefix + "pre_layrnorm", width)
    for layer in range(config.layers):
        block = f"{prefix}transformer.layers.{layer}."
        yield from _linear(block + "self_attn.qkv_proj", 3 * width, width)
        yield from _linear(block + "self_attn.out_proj", width, width)
        yield from _norm(block + "layer_norm1", width)
        yield from _linear(block + "mlp.fc1", config.mlp_width, width)
        yield from _linear(block + "mlp.fc2", width, config.mlp_width)
        yield from _norm(block + "layer_norm2", width)


def _query(prefix: str, config: QueryConfig) -> Shapes:
    for count in config.query_counts:
        yield f"{prefix}query_{64 * isqrt(count)}.weight", (count, config.width)  # named by the pixels of its view's side
    for layer in range(config.layers):
        block = f"{prefix}model.model.layers.{layer}."
        narrow = config.kv_heads * (config.width // config.heads)
        yield f"{block}input_layernorm.weight", (config.width,)
        yield from _linear(block + "self_attn.q_proj", config.width, config.width)
        yield from _linear(block + "self_attn.k_proj", narrow, config.width)
        yield from _linear(block + "self_attn.v_proj", narrow, config.width)
        yield f"{block}self_attn.o_proj.weight", (config.width, config.width)
        yield f"{block}post_attention_layernorm.weight", (config.width,)
        yield from _swiglu(block + "mlp", config.mlp_width, config.width)
    yield f"{prefix}model.model.norm.weight", (config.width,)


def _decoder(config: DecoderConfig) -> Shapes:
    hidden = config.hidden
    yield "model.embed_tokens.weight", (config.vocab_size, hidden)
    for layer in range(config.layers):
        block = f"model.layers.{layer}."
        yield f"{block}input_layernorm.weight", (hidden,)
        for letter in "qkvo":
            yield f"{block}self_attn.{letter}_proj.weight", (hidden, hidden)
        yield f"{block}post_attention_layernorm.weight", (hidden,)
        if layer < config.dense_layers:
            yield from _swiglu(block + "mlp", config.dense_width, hidden)
        else:
            yield from _experts(block + "mlp.", config)
    yield "model.norm.weight", (hidden,)
    yield "lm_head.weight", (config.vocab_size, hidden)


def _experts(prefix: str, config: DecoderConfig) -> Shapes:
    yield f"{prefix}gate.weight", (config.experts, config.hidden)
    for expert in range(config.experts):
        yield from _swiglu(f"{prefix}experts.{expert}", config.expert_width, config.hidden)
    yield from _swiglu(f"{prefix}shared_experts", config.shared_experts * config.expert_width, config.hidden)


def _swiglu(name: str, width: int, hidden: int) -> Shapes:
    yield f"{name}.gate_proj.weight", (width, hidden)
    yield f"{name}.up_proj.weight", (width, hidden)
    yield f"{name}.down_proj.weight", (hidden, width)


def _glance(prefix: str, config: GlanceConfig, decoder: DecoderConfig) -> Shapes:
    yield from _norm(prefix + "norm", decoder.hidden)
    yield from _linear(prefix + "places", PLACES * config.code, decoder.hidden)
    yield f"{prefix}rows.weight", (PLACE_HEIGHT, config.code)
    yield f"{prefix}columns.weight", (PLACE_WIDTH, config.code)
    yield from _linear(prefix + "mix", config.width, config.code)
    yield from _linear(prefix + "symbols", decoder.vocab_size, config.width)
    yield from _linear(prefix + "cells", len(config.cells), decoder.hidden)
