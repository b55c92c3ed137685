"""What a model is, as frozen dataclasses with the numbers of the public families, read from and written to their config.json.

deepseek-ocr    V1: windowed and global stage, compressor, CLIP stage, newlines
unlimited-ocr   UL: V1's shapes; the decoder sees the prompt and its last 128 tokens
deepseek-ocr-2  V2: the second stage is a causal decoder over learned queries; no newlines
nano            V1 at a small size with the vocabulary of pages/symbols.py, read row by row, and the glance (glance.py)
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

from optmem.errors import InputError

Family = Literal["deepseek-ocr", "unlimited-ocr", "deepseek-ocr-2", "nano"]


@dataclass(frozen=True, slots=True)
class StageOneConfig:
    """SAM's image encoder and the 16x compressor: pixels to one vector for every 64x64 pixels."""

    width: int = 768
    layers: int = 12
    heads: int = 12
    mlp_width: int = 3072
    global_layers: tuple[int, ...] = (2, 5, 8, 11)  # all others attend inside windows
    window: int = 14  # patches
    patch: int = 16  # pixels
    table_side: int = 64  # side of the stored position table, in patches
    neck_width: int = 256
    channels: tuple[int, int] = (512, 1024)  # of the two stride-2 convolutions
    crops_table: bool = False  # smaller views take the upper left corner of the position table instead of all of it, resized


@dataclass(frozen=True, slots=True)
class ClipConfig:
    """The second stage of V1 and UL: CLIP's body over the compressed map, without its patch projection."""

    width: int = 1024
    layers: int = 24
    heads: int = 16
    mlp_width: int = 4096
    table_side: int = 16  # side of the stored position table, in compressed cells
    crops_table: bool = False  # as for stage one


@dataclass(frozen=True, slots=True)
class QueryConfig:
    """The second stage of V2: Qwen2's body over image tokens and as many learned queries, which alone are kept."""

    width: int = 896
    layers: int = 24
    heads: int = 14
    kv_heads: int = 2
    mlp_width: int = 4864
    rope_theta: float = 1e6
    query_counts: tuple[int, ...] = (144, 256)  # one learned table for every side: 768 and 1024 pixels


@dataclass(frozen=True, slots=True)
class DecoderConfig:
    """The mixture-of-experts decoder that all families share."""

    vocab_size: int = 129280
    hidden: int = 1280
    layers: int = 12
    heads: int = 10
    dense_layers: int = 1  # the first layers have one dense MLP
    dense_width: int = 6848
    experts: int = 64
    expert_width: int = 896
    shared_experts: int = 2  # stored as one MLP of shared_experts * expert_width
    top_k: int = 6
    rope_theta: float = 10000.0
    norm_eps: float = 1e-6
    max_positions: int = 8192
    window: int | None = None  # UL: generated tokens seen besides the prompt, the current one counted

    @property
    def head_dim(self) -> int:
        """Width of one head."""
        return self.hidden // self.heads


@dataclass(frozen=True, slots=True)
class GlanceConfig:
    """The read-out of vision tokens: which symbol stands at a place, and how large this page's cells are."""

    code: int = 24  # numbers a place inside the token is read into
    width: int = 256
    cells: tuple[tuple[int, int], ...] = ((16, 8), (8, 8), (12, 6), (8, 4))  # height and width in pixels, of cells it knows


@dataclass(frozen=True, slots=True)
class ModelConfig:
    """A model: exactly one of clip and query is its second stage."""

    family: Family
    stage_one: StageOneConfig = StageOneConfig()
    clip: ClipConfig | None = ClipConfig()
    query: QueryConfig | None = None
    decoder: DecoderConfig = DecoderConfig()
    glance: GlanceConfig | None = None
    base_side: int = 1024  # pixels of a global view
    tile_side: int = 640
    max_tiles: int = 9
    bos_id: int = 0
    eos_id: int = 1
    image_id: int = 128815

    @property
    def has_newlines(self) -> bool:
        """Whether a learned vector ends every row of vision tokens."""
        return self.clip is not None

    @property
    def feature_width(self) -> int:
        """Channels that the projector takes."""
        if self.query is not None:
            return self.query.width
        assert self.clip is not None
        return self.clip.width + self.stage_one.channels[-1]


def scaled(config: ModelConfig, scale: float) -> ModelConfig:
    """A model with its structure kept and its sizes multiplied: widths in whole heads, depths, experts and vocabulary.

    scale 1 changes nothing; a tenth of a public model has about ten million weights.
    """
    if not 0 < scale <= 1:
        raise InputError(f"scale must be above 0 and at most 1, got {scale}")

    if scale == 1:
        return config

    def part(whole: int, least: int = 1, multiple: int = 1) -> int:
        return max(round(whole * scale / multiple), least) * multiple

    one, decoder, clip, query = config.stage_one, config.decoder, config.clip, config.query
    layers = part(one.layers, 3)
    second = part(one.channels[1], 1, 64)
    if clip is not None:
        heads = second // (clip.width // clip.heads)
        clip = replace(clip, width=second, heads=heads, layers=part(clip.layers), mlp_width=part(clip.mlp_width, 1, 64))
    if query is not None:
        groups = part(query.kv_heads)
        second = query.width // query.kv_heads * groups
        heads = query.heads // query.kv_heads * groups
        query = replace(query, width=second, heads=heads, kv_heads=groups, layers=part(query.layers))
        query = replace(query, mlp_width=part(query.mlp_width, 1, 64))
    vocab_size = part(decoder.vocab_size, 8, 128)
    return replace(
        config,
        stage_one=replace(
            one,
            width=one.width // one.heads * part(one.heads),
            heads=part(one.heads),
            layers=layers,
            mlp_width=part(one.mlp_width, 1, 64),
            global_layers=tuple(layer for layer in one.global_layers if layer < layers),
            neck_width=part(one.neck_width, 1, 16),
            channels=(part(one.channels[0], 1, 32), second),
        ),
        clip=clip,
        query=query,
        decoder=replace(
            decoder,
            vocab_size=vocab_size,
            hidden=decoder.head_dim * part(decoder.heads),
            heads=part(decoder.heads),
            layers=part(decoder.layers, 2),
            dense_width=part(decoder.dense_width, 1, 32),
            experts=part(decoder.experts, decoder.top_k + 2),
            expert_width=part(decoder.expert_width, 1, 16),
        ),
        image_id=min(config.image_id, vocab_size - 1),
    )
