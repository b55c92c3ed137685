"""The vision tensors' names in transformers, for checkpoints converted to it and for tests against it."""

from __future__ import annotations

import re
from collections.abc import Mapping

from torch import Tensor

_UNUSED = "vision_model.embeddings.patch_embedding.weight"
_RENAMES = (
    (r"^sam_model\.", "vision_tower.sam_encoder."),
    (r"(sam_encoder)\.blocks\.(\d+)\.norm([12])\.", r"\1.layers.\2.layer_norm\3."),
    (r"(sam_encoder)\.blocks\.", r"\1.layers."),
    (r"patch_embed\.proj\.", "patch_embed.projection."),
    (r"neck\.0\.", "neck.conv1."),
    (r"neck\.1\.", "neck.layer_norm1."),
    (r"neck\.2\.", "neck.conv2."),
    (r"neck\.3\.", "neck.layer_norm2."),
    (r"(sam_encoder)\.net_2\.", r"\1.proj.conv1."),
    (r"(sam_encoder)\.net_3\.", r"\1.proj.conv2."),
    (r"^vision_model\.transformer\.", "vision_tower.vision_encoder.encoder."),
    (r"^vision_model\.", "vision_tower.vision_encoder."),
    (r"^qwen2_model\.model\.model\.", "vision_tower.vision_encoder."),
    (r"^qwen2_model\.query_(\d+)\.", r"vision_tower.query_\1_resolution."),
    (r"^projector\.layers\.", "multi_modal_projector."),
    (r"^view_seperator$", "view_separator"),
)


def to_transformers(vision: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """An Encoder's state dict under the names of transformers 5.23's ``model``: CLIP's qkv in three, its unused projection gone."""
    renamed: dict[str, Tensor] = {}
    for name, tensor in vision.items():
        if name == _UNUSED:
            continue
        new = _rename(name)
        if ".qkv_proj." in new:
            renamed |= {new.replace("qkv_proj", f"{part}_proj"): rows for part, rows in zip("qkv", tensor.chunk(3), strict=True)}
        else:
            renamed[new] = tensor
    return renamed


def _rename(name: str) -> str:
    for old, new in _RENAMES:
        name = re.sub(old, new, name)
    return name
