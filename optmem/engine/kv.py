"""How much memory keys and values get."""

from __future__ import annotations

import torch

from optmem.errors import InputError
from optmem.model.cache import Cache
from optmem.model.decoder import Decoder
from optmem.ops import PAGE_UNIT

ON_CPU = 2 << 30  # bytes; only pages that are used become resident
ON_GPU = 0.8  # of what is free behind the weights
MOST_ON_CPU = 1 << 16  # tokens: 128 rows of nano, or 50 pages of the public models


def make_cache(decoder: Decoder, num_bytes: int | None = None) -> Cache:
    """The cache of an engine.

    num_bytes   None is 2 GiB on a CPU, and most of what is free on a GPU

    Raises InputError for less than one page of tokens.
    """
    config, device, dtype = decoder.config, decoder.lm_head.weight.device, decoder.dtype
    token = 2 * config.layers * config.heads * config.head_dim * dtype.itemsize
    if num_bytes is None:
        num_bytes = int(ON_GPU * torch.cuda.mem_get_info(device)[0]) if device.type == "cuda" else min(ON_CPU, MOST_ON_CPU * token)
    num_pages = num_bytes // (token * PAGE_UNIT)
    if num_pages < 1:
        raise InputError(f"cache_bytes must be at least {token * PAGE_UNIT:,}, a page of {PAGE_UNIT} tokens, got {num_bytes:,}")
    return Cache(config, num_pages, dtype=dtype, device=device)
