"""How much memory keys and values get, and how large a pass may be.

On a GPU, behind the weights:   | what passes hold meanwhile | keys and values | a rest, for what torch cannot put together again |
"""

from __future__ import annotations

import torch

from optmem.engine.scheduler import Limits
from optmem.errors import InputError
from optmem.model.assembly import PIXELS_AT_ONCE
from optmem.model.cache import Cache, Kv
from optmem.model.config import DecoderConfig, ModelConfig
from optmem.model.decoder import Decoder
from optmem.ops import PAGE_UNIT

ON_CPU = 2 << 30  # bytes; only pages that are used become resident
ON_GPU = 0.9  # of what is free behind the weights and the passes
MOST_ON_CPU = 1 << 16  # tokens: 128 rows of nano, or 50 pages of the public models

# Of a GPU, the largest first.  A step reads all experts from 64 texts on, and from 1,024 on it gains little: keys and values are
# what it reads then.  A page's prompt has some 300 tokens, so a pass takes the prompts of several pages beside its texts.
GPU_LIMITS = tuple(Limits(texts, max(4 * texts, 512)) for texts in (1024, 512, 256, 128, 64, 16))
FOR_PASSES = 0.25  # of what is free, at most


def token_bytes(config: DecoderConfig, dtype: torch.dtype, kv: Kv = "auto") -> int:
    """Of a token's keys and values, in all layers."""
    head = config.head_dim + 4 if kv == "8bit" else config.head_dim * dtype.itemsize  # steps and their scale
    return 2 * config.layers * config.heads * head


def pass_bytes(config: ModelConfig, limits: Limits, itemsize: int) -> int:
    """What passes of decoder and encoder hold while they run, at most, those that are recorded counted for themselves.

    Of kernels that keep what is inside attention on the chip; plain torch holds more.
    """
    decoder = _decoder_bytes(config.decoder, limits.tokens, itemsize) + _decoder_bytes(config.decoder, limits.texts, itemsize)
    decoder += limits.texts * _chunk_bytes(config.decoder)
    logits = limits.texts * config.decoder.vocab_size * 4  # fp32, which recorded passes leave for guards and sampling
    return decoder + logits + 2 * _encoder_bytes(config, itemsize)


def _decoder_bytes(config: DecoderConfig, tokens: int, itemsize: int) -> int:
    stream = 8 * config.hidden * itemsize  # of a token: the sum and its norm, q, k, v, what is mixed, and two results
    dense = 3 * config.dense_width * itemsize  # gate, up and their product
    routed = config.top_k * (3 * config.expert_width * itemsize + 4 * config.hidden)
    shared = 3 * config.shared_experts * config.expert_width * itemsize
    picked = config.vocab_size * (itemsize + 3 * 4)  # logits, in fp32 too, and two copies for log-probability and confidence
    return tokens * (stream + dense + routed + shared + 16 * config.experts + picked)


def _chunk_bytes(config: DecoderConfig) -> int:
    """Of a text whose attention goes by chunks of 256 tokens, in the widest table: what each chunk mixed, its sum and its most."""
    return -(-config.max_positions // 256) * config.heads * (config.head_dim + 2) * 4  # fp32


def _encoder_bytes(config: ModelConfig, itemsize: int) -> int:
    one, patches = config.stage_one, PIXELS_AT_ONCE // 256
    wide = (7 * one.width + 2 * one.mlp_width) * itemsize  # of a patch: x, its norm, qkv, what is mixed, a result; the MLP
    near = one.heads * 2 * 64 * 4  # fp32, of a patch: by the rows and columns of a view of 1,024 pixels
    return patches * (wide + near) + 2 * PIXELS_AT_ONCE


def gpu_limits(free: int, config: ModelConfig, itemsize: int) -> Limits:
    """The largest passes that leave most of so many free bytes to keys and values."""
    fitting = (limits for limits in GPU_LIMITS if pass_bytes(config, limits, itemsize) <= FOR_PASSES * free)
    return next(fitting, GPU_LIMITS[-1])


def gpu_cache_bytes(free: int, config: ModelConfig, limits: Limits, dtype: torch.dtype, kv: Kv = "auto") -> int:
    """Of keys and values, where so many bytes are free behind the weights; no more than all texts of a pass can fill.

    Raises InputError where the passes leave nothing.
    """
    taken, token = pass_bytes(config, limits, dtype.itemsize), token_bytes(config.decoder, dtype, kv)
    left = int(ON_GPU * (free - taken))
    if left < PAGE_UNIT * token:
        asked = f"{limits.texts} texts and {limits.tokens} tokens"
        raise InputError(f"passes of {asked} take {taken:,} bytes, and of the GPU {free:,} are free: give smaller limits")
    return min(left, limits.texts * config.decoder.max_positions * token)


def make_cache(decoder: Decoder, num_bytes: int | None = None, kv: Kv = "auto") -> Cache:
    """The cache of an engine.

    num_bytes   None is 2 GiB, of which only what is used is taken: for a CPU
    kv          how keys and values are held

    Raises InputError for less than one page of tokens.
    """
    config, device, dtype = decoder.config, decoder.lm_head.weight.device, decoder.dtype
    token = token_bytes(config, dtype, kv)
    if num_bytes is None:
        num_bytes = min(ON_CPU, MOST_ON_CPU * token)
    num_pages = num_bytes // (token * PAGE_UNIT)
    if num_pages < 1:
        raise InputError(f"cache_bytes must be at least {token * PAGE_UNIT:,}, a page of {PAGE_UNIT} tokens, got {num_bytes:,}")
    return Cache(config, num_pages, dtype=dtype, device=device, kv=kv)
