"""config.json of the three public families and of nano, read into ModelConfig and written back.

The text fields stand twice in the public files: at the top and under ``language_config``.  Either place will do; where both have a
field they must agree.  What a file leaves out has the public number of its family.  Fields that the public layout has no name for
(``mlp_width``, ``window_size``, ``tile_size``, ...) stand beside those it has, so that smaller models fit the same file.
"""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from optmem.errors import CheckpointError
from optmem.files import checkpoint_folder, read_json
from optmem.model.config import ClipConfig, DecoderConfig, Family, GlanceConfig, ModelConfig, QueryConfig, StageOneConfig
from optmem.pixels import PIXELS_PER_TOKEN

CONFIG = "config.json"
MAX_CONFIG = 1 << 20  # bytes
_SHOWN = 40  # characters of a bad value in a message
_CLIP_PATCH = 14  # pixels; only the quotient of image_size and patch_size means anything here
_PATCH = 16  # pixels; what the patch operator cuts a page into

_FAMILIES: dict[str, Family] = {
    "DeepseekOCRForCausalLM": "deepseek-ocr",
    "UnlimitedOCRForCausalLM": "unlimited-ocr",
    "DeepseekOCR2ForCausalLM": "deepseek-ocr-2",
    "OptmemNanoForCausalLM": "nano",
}
_ARCHITECTURES = {family: name for name, family in _FAMILIES.items()}
_MODEL_TYPES = {
    "deepseek-ocr": "deepseek_vl_v2",
    "unlimited-ocr": "unlimited-ocr",
    "deepseek-ocr-2": "deepseek_vl_v2",
    "nano": "optmem-nano",
}

# auto_map names Python code beside the weights.  No code of a checkpoint is ever imported here; the names of the public files
# are let through because their config.json has them, and any other is refused as a checkpoint that wants code of its own.
_PUBLIC_CODE = re.compile(r"(modeling_(deepseekocr2?|unlimitedocr|deepseek|deepseekv2)|configuration_deepseek_?v2)\.\w+")

# What this implementation does not do, by the only value that it can mean.
_FIXED: dict[str, object] = {
    "use_mla": False,
    "lm_head": True,
    "rm_head": False,
    "q_lora_rank": None,
    "kv_lora_rank": None,
    "n_group": 1,
    "topk_group": 1,
    "topk_method": "greedy",
    "scoring_func": "softmax",
    "norm_topk_prob": False,
    "routed_scaling_factor": 1.0,
    "moe_layer_freq": 1,
    "attention_bias": False,
    "tie_word_embeddings": False,
    "mlp_bias": False,
    "hidden_act": "silu",
    "partial_rotary_factor": 1.0,
    "qk_nope_head_dim": 0,  # this and the next are of latent attention, which use_mla turns off
    "qk_rope_head_dim": 0,
    "quantization_config": None,
    "global_view_pos": "head",
    "tile_tag": "2D",
}
_ROTATIONS = ("rope_parameters", "rope_scaling")  # the newer and the older name of one object

MAX_WIDTH = 65_536
_MAX_CELL = 64  # pixels
MAX_LAYERS = 512
MAX_EXPERTS = 65_536  # in all layers together
MAX_VOCABULARY = 1 << 21
MAX_POSITIONS = 1 << 24


def public_config(family: Family) -> ModelConfig:
    """The numbers of the published model."""
    if family == "unlimited-ocr":
        return ModelConfig(family, decoder=DecoderConfig(max_positions=32768, window=128), max_tiles=32)
    if family == "deepseek-ocr-2":
        stage_one, query = StageOneConfig(channels=(512, 896)), QueryConfig()
        return ModelConfig(family, stage_one=stage_one, clip=None, query=query, tile_side=768, max_tiles=6)
    return nano_config() if family == "nano" else ModelConfig(family)


def nano_config() -> ModelConfig:
    """Nano's numbers: 19.6 million weights.  Its special ids are the first of its tokenizer (text/characters.py)."""
    return ModelConfig(
        "nano",
        stage_one=StageOneConfig(
            width=192, layers=2, heads=4, mlp_width=768, global_layers=(), window=8, neck_width=192, channels=(256, 384),
            crops_table=True,
        ),
        clip=ClipConfig(width=384, layers=2, heads=4, mlp_width=1536, table_side=16, crops_table=True),
        decoder=DecoderConfig(
            vocab_size=704, hidden=384, layers=4, heads=6, dense_width=768, experts=64, expert_width=24, shared_experts=16,
            top_k=1, max_positions=8192,
        ),
        glance=GlanceConfig(),
        tile_side=512, max_tiles=0, bos_id=0, eos_id=3, image_id=2,
    )  # fmt: skip


def read_config(folder: str | os.PathLike[str]) -> ModelConfig:
    """What model a folder holds.  Raises CheckpointError for one that is unknown, inconsistent or absurd; allocates nothing."""
    return parse_config(read_json(checkpoint_folder(folder), CONFIG, limit=MAX_CONFIG))


def write_config(folder: str | os.PathLike[str], config: ModelConfig, dtype: str = "bfloat16") -> None:
    """Write config.json in the public layout, durably.  ``dtype`` is that of most weights, for readers other than optmem."""
    check_config(config)
    content = json.dumps({**config_fields(config), "torch_dtype": dtype}, indent=2, allow_nan=False)
    with (Path(folder) / CONFIG).open("w", encoding="utf-8") as file:
        file.write(content + "\n")
        file.flush()
        os.fsync(file.fileno())


# --- reading ------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Fields:
    """One object of config.json, or several that must agree, read field by field with the type and range that each must have."""

    where: str
    places: tuple[dict[str, object], ...]

    def value(self, name: str) -> object:
        """What the file says, None where it says nothing."""
        said = [place[name] for place in self.places if place.get(name) is not None]
        if any(type(other) is not type(said[0]) or other != said[0] for other in said[1:]):
            raise CheckpointError(f"{self.where}: {name} stands there twice with different values")
        return said[0] if said else None

    def whole(self, name: str, default: int, most: int, least: int = 1) -> int:
        value = self.value(name)
        if value is None:
            return default
        if type(value) is not int or not least <= value <= most:
            raise self.bad(name, f"a whole number from {least} to {most:,}", value)
        return value

    def positive(self, name: str, default: float) -> float:
        value = self.value(name)
        if value is None:
            return default
        if type(value) not in (int, float) or not 0 < float(str(value)) < 1e12:  # also refuses 1e999, which is read as infinity
            raise self.bad(name, "a positive number", value)
        return float(str(value))

    def wholes(self, name: str, default: Sequence[int], most: int, least: int) -> tuple[int, ...]:
        value = self.value(name)
        if value is None:
            return tuple(default)
        if not isinstance(value, list) or not all(type(item) is int and least <= item <= most for item in value):
            raise self.bad(name, f"a list of whole numbers from {least} to {most:,}", value)
        return tuple(value)

    def child(self, name: str) -> _Fields:
        value = self.value(name)
        if value is not None and not isinstance(value, dict):
            raise self.bad(name, "an object", value)
        return _Fields(f"{self.where}: {name}", (value or {},))

    def bad(self, name: str, wanted: str, value: object) -> CheckpointError:
        return CheckpointError(f"{self.where}: {name} must be {wanted}, got {repr(value)[:_SHOWN]}")


def parse_config(fields: dict[str, object]) -> ModelConfig:
    """A model from the object that config.json holds."""
    top = _Fields(CONFIG, (fields,))
    language = top.child("language_config")
    for place in (top, language):
        _check_code(place)
    family = _family(top)
    public = public_config(family)
    vision = top.child("vision_config")
    widths = vision.child("width")
    base_side = vision.whole("image_size", public.base_side, 8192, least=64)
    text = _Fields(CONFIG, (fields, *language.places))
    decoder = _read_decoder(text, public.decoder)
    clip = None if public.clip is None else _read_clip(widths.child("clip-l-14-224"), public.clip)
    query = None if public.query is None else _read_query(widths.child("qwen2-0-5b"), public.query)
    config = ModelConfig(
        family=family,
        stage_one=_read_stage_one(widths.child("sam_vit_b"), public.stage_one, base_side, query),
        clip=clip,
        query=query,
        decoder=decoder,
        glance=None if public.glance is None else _read_glance(top.child("glance_config"), public.glance),
        base_side=base_side,
        tile_side=vision.whole("tile_size", public.tile_side, 8192, least=64),
        max_tiles=vision.whole("max_tiles", public.max_tiles, 1024, least=0),
        bos_id=text.whole("bos_token_id", public.bos_id, decoder.vocab_size - 1, least=0),
        eos_id=text.whole("eos_token_id", public.eos_id, decoder.vocab_size - 1, least=0),
        image_id=top.whole("image_token_id", public.image_id, decoder.vocab_size - 1, least=0),
    )
    _check_projector(top.child("projector_config"), config)
    check_config(config)
    return config


def _family(top: _Fields) -> Family:
    names = top.value("architectures")
    known = [_FAMILIES[name] for name in names if isinstance(name, str) and name in _FAMILIES] if isinstance(names, list) else []
    if len(known) != 1 or not isinstance(names, list) or len(names) != 1:
        raise top.bad("architectures", f"one of {', '.join(_FAMILIES)}", names)
    return known[0]


def _check_code(fields: _Fields) -> None:
    """Refuse a checkpoint that wants code of its own; see _PUBLIC_CODE."""
    [named] = fields.child("auto_map").places
    for value in named.values():
        if not isinstance(value, str) or not _PUBLIC_CODE.fullmatch(value):
            message = "names code that no public model has, and optmem never runs code from a checkpoint: remove auto_map"
            raise CheckpointError(f"{fields.where}: auto_map {message}")


def _read_decoder(text: _Fields, public: DecoderConfig) -> DecoderConfig:
    _check_fixed(text, _FIXED)
    layers = text.whole("num_hidden_layers", public.layers, MAX_LAYERS)
    heads = text.whole("num_attention_heads", public.heads, 1024)
    if text.whole("num_key_value_heads", heads, 1024) != heads:
        raise CheckpointError(f"{CONFIG}: num_key_value_heads must be num_attention_heads ({heads}): these models share no keys")
    hidden = text.whole("hidden_size", public.hidden, MAX_WIDTH)
    _check_fixed(text, {"head_dim": hidden // heads})
    if text.value("v_head_dim") != hidden // heads:  # as UL's file has it, the others have 0; neither is used
        _check_fixed(text, {"v_head_dim": 0})
    theta = text.positive("rope_theta", public.rope_theta)
    _check_rotation(text, theta)
    return DecoderConfig(
        vocab_size=text.whole("vocab_size", public.vocab_size, MAX_VOCABULARY),
        hidden=hidden,
        layers=layers,
        heads=heads,
        dense_layers=text.whole("first_k_dense_replace", public.dense_layers, layers, least=0),
        dense_width=text.whole("intermediate_size", public.dense_width, MAX_WIDTH),
        experts=text.whole("n_routed_experts", public.experts, 4096),
        expert_width=text.whole("moe_intermediate_size", public.expert_width, MAX_WIDTH),
        shared_experts=text.whole("n_shared_experts", public.shared_experts, 1024),
        top_k=text.whole("num_experts_per_tok", public.top_k, 4096),
        rope_theta=theta,
        norm_eps=text.positive("rms_norm_eps", public.norm_eps),
        max_positions=text.whole("max_position_embeddings", public.max_positions, MAX_POSITIONS),
        window=_read_window(text, public.window),
    )


def _check_fixed(fields: _Fields, fixed: Mapping[str, object]) -> None:
    """Refuse a field that says anything else than the one value that is supported; it may be left out."""
    for name, only in fixed.items():
        value = fields.value(name)
        if value is not None and (isinstance(value, bool) != isinstance(only, bool) or value != only):
            raise fields.bad(name, f"{json.dumps(only)}, the only value that is supported", value)


def _check_rotation(fields: _Fields, theta: float) -> None:
    """Positions are rotated over the whole head and unscaled; an object that says just this is let through."""
    plain: dict[str, object] = {"rope_type": "default", "type": "default", "rope_theta": theta, "partial_rotary_factor": 1.0}
    for name in _ROTATIONS:
        rotation = fields.child(name)
        unknown = rotation.places[0].keys() - plain.keys()
        if unknown:
            raise CheckpointError(f"{rotation.where}: {min(unknown)[:_SHOWN]!r} is not supported: positions are not scaled")
        _check_fixed(rotation, plain)


def _read_window(text: _Fields, public: int | None) -> int | None:
    """The window stands under two names, and only UL has one."""
    if public is None:
        for name in ("sliding_window", "sliding_window_size"):
            if text.value(name) is not None:
                raise text.bad(name, "left out: only Unlimited-OCR has a window", text.value(name))
        return None
    window = text.whole("sliding_window_size", public, MAX_POSITIONS)
    if text.whole("sliding_window", window, MAX_POSITIONS) != window:
        raise CheckpointError(f"{CONFIG}: sliding_window and sliding_window_size differ")
    return window


def _read_stage_one(sam: _Fields, public: StageOneConfig, base_side: int, query: QueryConfig | None) -> StageOneConfig:
    width = sam.whole("width", public.width, MAX_WIDTH)
    patch = sam.whole("patch_size", public.patch, 256)
    channels = sam.wholes("downsample_channels", public.channels, MAX_WIDTH, least=1)
    if len(channels) != 2:
        raise sam.bad("downsample_channels", "two numbers", list(channels))
    if query is not None:  # V2's files still have V1's last number; the second stage takes what its own width says
        channels = (channels[0], query.width)
    layers = sam.whole("layers", public.layers, MAX_LAYERS)
    return StageOneConfig(
        width=width,
        layers=layers,
        heads=sam.whole("heads", public.heads, 1024),
        mlp_width=sam.whole("mlp_width", 4 * width, MAX_WIDTH * 4),
        global_layers=sam.wholes("global_attn_indexes", public.global_layers, layers - 1, least=0),
        window=sam.whole("window_size", public.window, 1024),
        patch=patch,
        table_side=sam.whole("table_side", max(base_side // patch, 1), 4096),
        neck_width=sam.whole("neck_width", public.neck_width, MAX_WIDTH),
        channels=(channels[0], channels[1]),
        crops_table=public.crops_table,
    )


def _read_clip(clip: _Fields, public: ClipConfig) -> ClipConfig:
    width = clip.whole("width", public.width, MAX_WIDTH)
    patch = clip.whole("patch_size", _CLIP_PATCH, 256)
    side = clip.whole("image_size", public.table_side * patch, 4096 * patch)
    if side % patch:
        raise clip.bad("image_size", f"a multiple of patch_size ({patch})", side)
    return ClipConfig(
        width=width,
        layers=clip.whole("layers", public.layers, MAX_LAYERS),
        heads=clip.whole("heads", public.heads, 1024),
        mlp_width=clip.whole("mlp_width", 4 * width, MAX_WIDTH * 4),
        table_side=side // patch,
        crops_table=public.crops_table,
    )


def _read_query(query: _Fields, public: QueryConfig) -> QueryConfig:
    theta = query.positive("rope_theta", public.rope_theta)
    _check_rotation(query, theta)
    return QueryConfig(
        width=query.whole("dim", public.width, MAX_WIDTH),
        layers=query.whole("layers", public.layers, MAX_LAYERS),
        heads=query.whole("heads", public.heads, 1024),
        kv_heads=query.whole("kv_heads", public.kv_heads, 1024),
        mlp_width=query.whole("mlp_width", public.mlp_width, MAX_WIDTH * 4),
        rope_theta=theta,
        query_counts=query.wholes("query_counts", public.query_counts, 1 << 16, least=1),
    )


def _read_glance(glance: _Fields, public: GlanceConfig) -> GlanceConfig:
    sides = glance.wholes("cells", [side for cell in public.cells for side in cell], _MAX_CELL, least=1)
    if not sides or len(sides) % 2:
        raise glance.bad("cells", "heights and widths by turns", list(sides))
    return GlanceConfig(
        code=glance.whole("code", public.code, MAX_WIDTH),
        width=glance.whole("width", public.width, MAX_WIDTH),
        cells=tuple(zip(sides[::2], sides[1::2], strict=True)),
    )


def _check_projector(projector: _Fields, config: ModelConfig) -> None:
    wanted = {"input_dim": config.feature_width, "n_embed": config.decoder.hidden}
    for name, width in wanted.items():
        if projector.whole(name, width, MAX_WIDTH * 2) != width:
            raise projector.bad(name, f"{width}, as the other widths make it", projector.value(name))
    if projector.value("projector_type") not in (None, "linear"):
        raise projector.bad("projector_type", "linear", projector.value("projector_type"))


# --- checking and writing -----------------------------------------------------------------------------------------------------


def check_config(config: ModelConfig) -> None:
    """Refuse numbers that contradict each other, whoever wrote them."""
    stage_one, decoder = config.stage_one, config.decoder
    heads = {"stage one": (stage_one.width, stage_one.heads), "decoder": (decoder.hidden, decoder.heads)}
    if config.clip is not None:
        heads["clip"] = (config.clip.width, config.clip.heads)
        _check(config.clip.width == stage_one.channels[1], "clip's width must be stage one's last downsample_channels")
    if config.query is not None:
        query = config.query
        heads["query"] = (query.width, query.heads)
        _check(query.width == stage_one.channels[1], "the query stage's width must be stage one's last channels")
        _check(query.heads % query.kv_heads == 0, f"{query.heads} heads cannot share {query.kv_heads} key heads")
        _check(len({*query.query_counts}) == len(query.query_counts) > 0, "query_counts must be distinct")
        _check(all(math.isqrt(count) ** 2 == count for count in query.query_counts), "query_counts must be squares")
    _check((config.clip is None) != (config.query is None), "a model has one second stage, clip or query")
    _check((config.glance is None) == (config.family != "nano"), "nano has a glance, and no other family has")
    crops = (stage_one.crops_table, config.clip is not None and config.clip.crops_table)
    _check(crops == (config.family == "nano",) * 2, "nano crops its position tables, and no other family does")
    for name, (width, count) in heads.items():
        _check(width % count == 0, f"{name}: a width of {width} cannot be split into {count} heads")
    _check(stage_one.patch == _PATCH, f"sam_vit_b: patch_size must be {_PATCH}, got {stage_one.patch}")
    for name, side in {"image_size": config.base_side, "tile_size": config.tile_side}.items():
        _check(side % PIXELS_PER_TOKEN == 0, f"{name} must be a multiple of {PIXELS_PER_TOKEN} pixels, got {side}")
    _check(config.max_tiles != 1, "max_tiles must be 0 or at least 2: a single tile would be the global view again")
    _check(decoder.head_dim % 2 == 0, f"decoder: rotation needs an even head width, got {decoder.head_dim}")
    _check(decoder.top_k <= decoder.experts, f"decoder: {decoder.top_k} experts per token of {decoder.experts}")
    _check(decoder.layers * decoder.experts <= MAX_EXPERTS, f"decoder: more than {MAX_EXPERTS:,} experts in all layers")
    _check(len(set(stage_one.global_layers)) == len(stage_one.global_layers), "global_attn_indexes names a layer twice")
    _check(
        all(layer < stage_one.layers for layer in stage_one.global_layers), "global_attn_indexes names a layer that is not there"
    )
    ids = (config.bos_id, config.eos_id, config.image_id)
    _check(
        all(0 <= special < decoder.vocab_size for special in ids),
        f"special ids {ids} lie outside the vocabulary; give image_token_id",
    )
    _check(len(set(ids)) == len(ids), f"special ids {ids} must be distinct")


def _check(holds: bool, message: str) -> None:
    if not holds:
        raise CheckpointError(f"{CONFIG}: {message}")


def config_fields(config: ModelConfig) -> dict[str, object]:
    """The object that config.json holds, in the public layout."""
    text = _text_fields(config)
    return {
        "architectures": [_ARCHITECTURES[config.family]],
        "model_type": _MODEL_TYPES[config.family],
        "candidate_resolutions": [[config.base_side, config.base_side]],
        "global_view_pos": "head",
        "tile_tag": "2D",
        "image_token_id": config.image_id,
        "language_config": {"architectures": ["DeepseekV2ForCausalLM"], **text},
        "projector_config": {
            "input_dim": config.feature_width,
            "model_type": "mlp_projector",
            "n_embed": config.decoder.hidden,
            "projector_type": "linear",
        },
        "vision_config": {
            "image_size": config.base_side,
            "max_tiles": config.max_tiles,
            "model_name": "deeplip_b_l" if config.query is None else "deepencoderv2",
            "model_type": "vision",
            "tile_size": config.tile_side,
            "width": _width_fields(config),
        },
        **({} if config.glance is None else {"glance_config": _glance_fields(config.glance)}),
        **text,
    }


def _glance_fields(glance: GlanceConfig) -> dict[str, object]:
    return {"code": glance.code, "width": glance.width, "cells": [side for cell in glance.cells for side in cell]}


def _text_fields(config: ModelConfig) -> dict[str, object]:
    decoder = config.decoder
    fields: dict[str, object] = {
        "bos_token_id": config.bos_id,
        "eos_token_id": config.eos_id,
        "first_k_dense_replace": decoder.dense_layers,
        "hidden_size": decoder.hidden,
        "intermediate_size": decoder.dense_width,
        "kv_lora_rank": None,
        "lm_head": True,
        "max_position_embeddings": decoder.max_positions,
        "moe_intermediate_size": decoder.expert_width,
        "n_group": 1,
        "n_routed_experts": decoder.experts,
        "n_shared_experts": decoder.shared_experts,
        "num_attention_heads": decoder.heads,
        "num_experts_per_tok": decoder.top_k,
        "num_hidden_layers": decoder.layers,
        "num_key_value_heads": decoder.heads,
        "q_lora_rank": None,
        "qk_nope_head_dim": 0,
        "qk_rope_head_dim": 0,
        "rm_head": False,
        "rms_norm_eps": decoder.norm_eps,
        "rope_theta": decoder.rope_theta,
        "topk_group": 1,
        "topk_method": "greedy",
        "use_mla": False,
        "v_head_dim": 0,
        "vocab_size": decoder.vocab_size,
    }
    if decoder.window is not None:
        fields |= {"sliding_window": decoder.window, "sliding_window_size": decoder.window}
    return fields


def _width_fields(config: ModelConfig) -> dict[str, object]:
    sam = config.stage_one
    fields: dict[str, object] = {
        "sam_vit_b": {
            "downsample_channels": list(sam.channels),
            "global_attn_indexes": list(sam.global_layers),
            "heads": sam.heads,
            "layers": sam.layers,
            "mlp_width": sam.mlp_width,
            "neck_width": sam.neck_width,
            "patch_size": sam.patch,
            "table_side": sam.table_side,
            "width": sam.width,
            "window_size": sam.window,
        }
    }
    if config.clip is not None:
        clip = config.clip
        fields["clip-l-14-224"] = {
            "heads": clip.heads,
            "image_size": clip.table_side * _CLIP_PATCH,
            "layers": clip.layers,
            "mlp_width": clip.mlp_width,
            "patch_size": _CLIP_PATCH,
            "width": clip.width,
        }
    if config.query is not None:
        query = config.query
        fields["qwen2-0-5b"] = {
            "dim": query.width,
            "heads": query.heads,
            "kv_heads": query.kv_heads,
            "layers": query.layers,
            "mlp_width": query.mlp_width,
            "query_counts": list(query.query_counts),
            "rope_theta": query.rope_theta,
        }
    return fields
