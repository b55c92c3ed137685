"""transformers' models around our weights: the other side of every comparison.  It is a test extra, imported when asked for."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from optmem import reference
from optmem.model.config import ModelConfig
from optmem.model.keys import to_transformers
from optmem.model.model import Model


def as_floats(pixels: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """uint8 [B, S, S, C] -> what transformers takes: normalised, three channels, channels first."""
    return reference.normalise(pixels, torch.float32).expand(-1, -1, -1, 3).permute(0, 3, 1, 2).to(dtype)


def build_oracle(model: Model) -> Any:
    """transformers' model of the same family with our tensors in it; nothing is copied but the rotary tables.

    V1 has no class there: it is UL with a window beyond any length.
    """
    with torch.device("meta"):
        whole = _build(model.config, model.decoder.dtype).eval()
    weights = {f"model.{name}": value for name, value in to_transformers(model.encoder.state_dict()).items()}
    whole.load_state_dict(weights | _decoder_weights(model), strict=True, assign=True)
    _fill_buffers(whole)
    return whole


def build_decoder_oracle(model: Model) -> Any:
    """The same without a vision tower, for embeddings alone: of nano, whose encoder transformers has not."""
    with torch.device("meta"):
        whole = _build(model.config, model.decoder.dtype).eval()
    for name in ("vision_tower", "multi_modal_projector", "image_newline", "view_separator"):
        if hasattr(whole.model, name):
            delattr(whole.model, name)
    whole.load_state_dict(_decoder_weights(model), strict=True, assign=True)
    _fill_buffers(whole)
    return whole


def _decoder_weights(model: Model) -> dict[str, Tensor]:
    weights = {}
    for name, value in model.decoder.state_dict().items():
        packed = f"{name}_proj" if name.endswith((".experts.gate_up", ".experts.down")) else name
        weights[packed.replace("model.", "model.language_model.", 1)] = value
    return weights


def _build(config: ModelConfig, dtype: torch.dtype) -> Any:
    vision = {"sam_config": _stage_one(config), "encoder_config": _second_stage(config)}
    text = _decoder(config)
    if config.clip is not None:
        from transformers.models.unlimited_ocr import UnlimitedOcrConfig, UnlimitedOcrForConditionalGeneration

        text |= {"first_k_dense_replace": config.decoder.dense_layers, "sliding_window": config.decoder.window or 1 << 20}
        return UnlimitedOcrForConditionalGeneration(
            UnlimitedOcrConfig(vision_config=vision, text_config=text, image_token_id=config.image_id, dtype=dtype)
        )
    from transformers.models.deepseek_ocr2 import DeepseekOcr2Config, DeepseekOcr2ForConditionalGeneration

    sparse = config.decoder.layers - config.decoder.dense_layers
    text |= {"mlp_layer_types": ["dense"] * config.decoder.dense_layers + ["sparse"] * sparse}
    return DeepseekOcr2ForConditionalGeneration(
        DeepseekOcr2Config(vision_config=vision, text_config=text, image_token_id=config.image_id, dtype=dtype)
    )


def _stage_one(config: ModelConfig) -> dict[str, Any]:
    one = config.stage_one
    return {
        "hidden_size": one.width,
        "output_channels": one.neck_width,
        "num_hidden_layers": one.layers,
        "num_attention_heads": one.heads,
        "global_attn_indexes": list(one.global_layers),
        "mlp_dim": one.mlp_width,
        "downsample_channels": list(one.channels),
    }


def _second_stage(config: ModelConfig) -> dict[str, Any]:
    second = config.clip or config.query
    assert second is not None
    body: dict[str, Any] = {
        "hidden_size": second.width,
        "intermediate_size": second.mlp_width,
        "num_hidden_layers": second.layers,
        "num_attention_heads": second.heads,
    }
    if config.query is not None:
        rope = {"rope_type": "default", "rope_theta": config.query.rope_theta}
        body |= {"num_key_value_heads": config.query.kv_heads, "rope_parameters": rope}
    return body


def _decoder(config: ModelConfig) -> dict[str, Any]:
    text = config.decoder
    return {
        "vocab_size": text.vocab_size,
        "hidden_size": text.hidden,
        "intermediate_size": text.dense_width,
        "num_hidden_layers": text.layers,
        "num_attention_heads": text.heads,
        "num_key_value_heads": text.heads,
        "n_routed_experts": text.experts,
        "n_shared_experts": text.shared_experts,
        "num_experts_per_tok": text.top_k,
        "moe_intermediate_size": text.expert_width,
        "max_position_embeddings": text.max_positions,
    }


def _fill_buffers(whole: Any) -> None:
    """Buffers are in no checkpoint: rotary modules make theirs when they are built, places are counted."""
    for parent in list(whole.modules()):
        for name, module in list(parent.named_children()):
            if any(buffer.is_meta for key, buffer in module.named_buffers(recurse=False) if "inv_freq" in key):
                setattr(parent, name, type(module)(module.config))
        for name, buffer in list(parent.named_buffers(recurse=False)):
            if buffer.is_meta and name == "position_ids":
                parent.position_ids = torch.arange(buffer.shape[-1]).expand(buffer.shape)
    assert not any(buffer.is_meta for buffer in whole.buffers()), "a buffer of transformers is still without values"
