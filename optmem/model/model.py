"""A whole model: its encoder, its decoder and its tokenizer, from a folder in the hub layout and back."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import TypeVar

import torch
from torch import Tensor, nn

from optmem.errors import InputError
from optmem.model.assembly import assemble, encode_views, insert
from optmem.model.config import Family, ModelConfig, scaled
from optmem.model.config_json import public_config, read_config
from optmem.model.decoder import Decoder
from optmem.model.encoder import Encoder
from optmem.model.glance import Glance
from optmem.model.random import random_state
from optmem.model.weights import check_tokenizer, load_weights, save_pretrained
from optmem.pixels import Grid, Mode, Views
from optmem.text.tokenizer import Tokenizer, has_tokenizer, load_tokenizer, tokenizer_file, tokenizer_name

M = TypeVar("M", bound=nn.Module)
_GLANCE = "glance."
_VISION = "model."  # what the checkpoints put before the names of the vision tensors


class Model:
    """Encoder, decoder and, where the folder has one, tokenizer.  Weights are shared with whoever made it, never copied."""

    def __init__(
        self,
        config: ModelConfig,
        weights: Mapping[str, Tensor],
        tokenizer: Tokenizer | None = None,
        files: Mapping[str, bytes] | None = None,
    ) -> None:
        """
        weights   by name, as load_weights returns them
        files     what is saved beside the weights, such as the tokenizer's file, by plain name
        """
        self.config = config
        self.tokenizer = tokenizer
        self.files = dict(files or {})
        with torch.device("meta"):
            encoder, decoder = Encoder(config), Decoder(config.decoder)
            glance = None if config.glance is None else Glance(config.glance, config.decoder)
        self.encoder = _filled(encoder, weights, _VISION)
        self.decoder = _filled(decoder, weights, "")
        self.glance = None if glance is None else _filled(glance, weights, _GLANCE)

    @classmethod
    def load(cls, folder: str | os.PathLike[str], *, device: torch.device | str = "cpu", dtype: torch.dtype | None = None) -> Model:
        """A model from a folder in the hub layout.  Raises CheckpointError where its files are not those of a known model."""
        config = read_config(folder)
        tokenizer, files = None, {}
        if has_tokenizer(folder):
            tokenizer, files = load_tokenizer(folder), {tokenizer_name(folder): tokenizer_file(folder)}
            check_tokenizer(tokenizer, config)
        return cls(config, load_weights(folder, config, device=device, dtype=dtype), tokenizer, files)

    @classmethod
    def random(cls, family: Family, *, scale: float = 1.0, seed: int = 0, dtype: torch.dtype = torch.float32) -> Model:
        """A family at any scale with random weights and an even router, for tests and benches."""
        config = scaled(public_config(family), scale)
        with torch.device("meta"):
            encoder, decoder = Encoder(config), Decoder(config.decoder)
            glance = None if config.glance is None else Glance(config.glance, config.decoder)
        parts = {_VISION: encoder, "": decoder} | ({} if glance is None else {_GLANCE: glance})
        states = {prefix: random_state(part, seed + i, dtype) for i, (prefix, part) in enumerate(parts.items())}
        return cls(config, {prefix + name: value for prefix, state in states.items() for name, value in state.items()})

    def weights(self) -> dict[str, Tensor]:
        """Every weight by the name that load_weights gives it.  Raises InputError where the model is quantised."""
        if self.decoder.is_quantized or self.encoder.is_quantized:
            raise InputError("a quantised model has no weights to save or compare: load it again without dtype='int8' or 'fp8'")
        vision = {_VISION + name: parameter.data for name, parameter in self.encoder.named_parameters()}
        glance = {} if self.glance is None else {_GLANCE + name: value.data for name, value in self.glance.named_parameters()}
        return vision | {name: parameter.data for name, parameter in self.decoder.named_parameters()} | glance

    def save(self, folder: str | os.PathLike[str], *, files: Mapping[str, bytes] | None = None) -> None:
        """Write the model to a new folder; its files, and more if given, beside the weights."""
        save_pretrained(folder, self.config, self.weights(), files=self.files | dict(files or {}))

    @torch.inference_mode()
    def encode(self, pictures: Sequence[Views]) -> list[Tensor]:
        """Vision tokens of every picture, [n, hidden], as they are stored: without newlines and separator."""
        return encode_views(self.encoder, pictures)

    @torch.inference_mode()
    def embed_prompt(self, ids: Sequence[int], features: Sequence[Tensor], mode: Mode, grids: Sequence[Grid]) -> Tensor:
        """A prompt's embeddings [T, hidden]: words from the table, pictures in place of their placeholders, in order."""
        tokens = torch.tensor(ids, device=self.decoder.lm_head.weight.device)
        newline, separator = self.encoder.image_newline, self.encoder.view_seperator
        pictures = [assemble(found, mode, grid, newline, separator) for found, grid in zip(features, grids, strict=True)]
        return insert(self.decoder.embed(tokens), tokens == self.config.image_id, pictures)


def _filled(module: M, weights: Mapping[str, Tensor], prefix: str) -> M:
    """A module whose parameters, on the meta device so far, are these tensors."""
    module.load_state_dict({name: weights[prefix + name] for name, _ in module.named_parameters()}, assign=True)
    return module.requires_grad_(requires_grad=False).eval()
