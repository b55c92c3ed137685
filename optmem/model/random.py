"""Random weights for tests and benches: any size, sane activations, and a router that uses its experts evenly."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from optmem.model.config import DecoderConfig
from optmem.model.decoder import Decoder

_PERIOD = 4_194_301  # values; a prime, so that the rows of a matrix are all different


def random_decoder(config: DecoderConfig, seed: int, dtype: torch.dtype = torch.float32) -> Decoder:
    """A decoder of random weights.  The full size, 2.9e9 parameters in bf16, takes seconds."""
    with torch.device("meta"):
        decoder = Decoder(config)
    decoder.load_state_dict(random_state(decoder, seed, dtype), assign=True)
    return decoder.requires_grad_(requires_grad=False)


def random_state(module: nn.Module, seed: int, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    """A value for every parameter of a module, which may be on the meta device.

    Vectors are norms and lie about 1, embeddings have deviation 1, and a matrix keeps the variance of what it multiplies.
    A router's rows are as long as each other, so over normalised tokens no expert is favoured, and its logits have deviation 1.
    """
    rng = torch.Generator().manual_seed(seed)
    noise = torch.randn(_PERIOD, generator=rng)
    return {name: _values(name, noise, parameter.shape, rng, dtype) for name, parameter in module.named_parameters()}


def _values(name: str, noise: Tensor, shape: torch.Size, rng: torch.Generator, dtype: torch.dtype) -> Tensor:
    if len(shape) == 1:
        return (1.0 + 0.1 * noise[: shape[0]]).to(dtype)
    deviation = 1.0 if "embed_tokens" in name else shape[-1] ** -0.5
    return _tiled((noise * deviation).to(dtype), shape, rng)


def _tiled(noise: Tensor, shape: torch.Size, rng: torch.Generator) -> Tensor:
    """The noise over and over, from a random place on."""
    noise = noise.roll(int(torch.randint(_PERIOD, (), generator=rng)))
    values = noise.new_empty(shape.numel())
    for first in range(0, values.numel(), _PERIOD):
        part = values[first : first + _PERIOD]
        part.copy_(noise[: part.numel()])
    return values.view(shape)
