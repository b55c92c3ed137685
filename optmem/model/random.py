"""Random weights for tests and benches: any size, sane activations, no two tensors alike, and a router that favours no expert."""

from __future__ import annotations

import zlib

import torch
from torch import Tensor, nn

from optmem.machine import empty_weight
from optmem.model.config import DecoderConfig
from optmem.model.decoder import Decoder

_PERIOD = 4_194_301  # values; a prime, so that the rows of a matrix are all different
_TABLES = {"embed_tokens": 1.0, "query_": 1.0, "position_embedding": 0.5, "pos_embed": 0.5, "rel_pos": 0.1}  # name -> deviation


def random_decoder(config: DecoderConfig, seed: int, dtype: torch.dtype = torch.float32) -> Decoder:
    """A decoder of random weights.  The full size, 2.9e9 parameters in bf16, takes seconds."""
    with torch.device("meta"):
        decoder = Decoder(config)
    decoder.load_state_dict(random_state(decoder, seed, dtype), assign=True)
    return decoder.requires_grad_(requires_grad=False)


def random_state(module: nn.Module, seed: int, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    """A value for every parameter of a module, which may be on the meta device.

    Scales of norms lie about 1, biases about 0, learned vectors and tables of words have deviation 1, and a product keeps the
    variance of what it multiplies.  A router's rows are equally long, so over random tokens no expert is favoured, and its logits
    have deviation 1; the tokens of one page are alike, and share their experts.
    """
    noise = torch.randn(_PERIOD, generator=torch.Generator().manual_seed(seed))
    return {name: _values(name, noise, parameter.shape, dtype) for name, parameter in module.named_parameters()}


def _values(name: str, noise: Tensor, shape: torch.Size, dtype: torch.dtype) -> Tensor:
    noise = noise.roll(zlib.crc32(name.encode()) % _PERIOD)  # every parameter begins elsewhere
    if len(shape) == 1:
        own = noise[: shape[0]]
        return (1.0 + 0.1 * own if name.endswith("weight") else 0.1 * own if name.endswith("bias") else own).to(dtype)
    values = _tiled((noise * _deviation(name, shape)).to(dtype), shape)
    if name.endswith("mlp.gate.weight"):
        values = nn.functional.normalize(values.float(), dim=1).to(dtype)
    return values


def _deviation(name: str, shape: torch.Size) -> float:
    table = next((deviation for part, deviation in _TABLES.items() if part in name), None)
    if table is not None:
        return table
    fan_in = shape[-1] if len(shape) == 3 else shape[1:].numel()  # packed experts are matrices side by side
    return float(fan_in**-0.5)


def _tiled(noise: Tensor, shape: torch.Size) -> Tensor:
    """The noise over and over."""
    values = empty_weight([shape.numel()], noise.dtype)
    for first in range(0, values.numel(), _PERIOD):
        part = values[first : first + _PERIOD]
        part.copy_(noise[: part.numel()])
    return values.view(shape)
