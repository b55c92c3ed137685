"""What only training has: read-outs that ask every part of the model what it should know, and are not shipped.

patches    the symbol at a place of a 16-pixel patch, before the compressor
cursors    after each of the first layers, the x and y of the symbol to be said next
looks      the reading layers must look at the vision token that holds it          (no weights: a loss on their attention)
routes     and choose the expert of its place inside that token                    (no weights: a loss on their routers)

And `graft`: what the glance has learned to read from a vision token is planted into the experts, once.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from optmem.errors import InputError
from optmem.model.config import ModelConfig
from optmem.model.decoder import Decoder, Layer, MixtureOfExperts
from optmem.model.encoder import Encoder
from optmem.model.glance import Glance, ReadOut
from optmem.model.layout import PLACE_WIDTH
from optmem.model.model import Model

READING = (1, 2)  # the layers that look at vision tokens, by supervision
CURSORS = (0, 1, 2)  # the layers that must know where the next symbol stands
X_STEP, Y_STEP = 4, 8  # pixels
MAX_SIDE = 1024  # pixels
EXPERT_SIDE = 8  # pixels: an expert is a square of these inside a vision token
EXPERTS_ACROSS = 64 // EXPERT_SIDE
QUIET = 0.1  # what a graft leaves of the layer before the reading ones
TAUGHT = 2  # heads that an alignment teaches where to look; a graft makes the others look like them


class Helpers(nn.Module):
    """The read-outs that are not shipped."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.patches = ReadOut(16, config.stage_one.width, 32, 256, config.decoder.vocab_size)
        classes = MAX_SIDE // X_STEP + MAX_SIDE // Y_STEP
        self.cursors = nn.ModuleList(nn.Linear(config.decoder.hidden, classes) for _ in CURSORS)


class Parts(nn.Module):
    """Everything that is trained."""

    def __init__(self, config: ModelConfig, seed: int = 0) -> None:
        super().__init__()
        assert config.glance is not None, "only nano is trained here"
        self.config = config
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.encoder, self.decoder = Encoder(config), Decoder(config.decoder)
            self.glance, self.helpers = Glance(config.glance, config.decoder), Helpers(config)
            begin_encoder(self.encoder)
            begin_decoder(self.decoder)

    @torch.no_grad()
    def start_from(self, model: Model) -> None:
        """Copies the weights of a trained model, to go on from there.  The helpers, which are not shipped, begin anew, and so do
        the votes for cells that the model does not know.

        Raises InputError where the model is of another shape.
        """
        theirs = model.weights()
        for name, value in self.weights().items():
            given = theirs.get(name)
            ours = value[: len(given)] if given is not None and name.startswith("glance.cells.") else value
            if given is None or given.shape != ours.shape:
                raise InputError(f"cannot start from this model: {name!r} is not there or of another shape")
            ours.copy_(given)

    def weights(self) -> dict[str, Tensor]:
        """What is shipped, by the names of the checkpoint."""
        named = {f"model.{name}": value for name, value in self.encoder.named_parameters()}
        named |= dict(self.decoder.named_parameters())
        named |= {f"glance.{name}": value for name, value in self.glance.named_parameters()}
        return {name: value.detach() for name, value in named.items()}


@torch.no_grad()
def begin_encoder(encoder: Encoder) -> None:
    """Tables begin as a row's vector plus a column's; the neck's convolution as its centre alone, relative positions as nothing."""
    stage, second = encoder.sam_model, encoder.vision_model
    assert second is not None, "nano has V1's second stage"
    stage.pos_embed.copy_(_grid(stage.pos_embed.shape[1], stage.pos_embed.shape[3]))
    table, side = second.embeddings.position_embedding.weight, second.embeddings.side
    table[1:] = _grid(side, table.shape[1]).flatten(0, 2)
    table[0] = 0
    nn.init.normal_(second.embeddings.class_embedding, std=0.02)
    second.embeddings.patch_embedding.weight.zero_()
    neck = stage.neck[2]
    assert isinstance(neck, nn.Conv2d)
    centre = nn.init.kaiming_uniform_(torch.empty(neck.out_channels, neck.in_channels), a=5**0.5)
    neck.weight.zero_()[:, :, 1, 1] = centre
    for name, parameter in stage.named_parameters():
        if "rel_pos" in name:
            parameter.requires_grad = False
    for vector in (encoder.image_newline, encoder.view_seperator):
        assert vector is not None, "nano has newlines"
        nn.init.normal_(vector, std=0.03)


def _grid(side: int, width: int) -> Tensor:
    return 0.05 * (torch.randn(1, side, 1, width) + torch.randn(1, 1, side, width))


@torch.no_grad()
def begin_decoder(decoder: Decoder) -> None:
    """Small embeddings and a quiet first layer, so that what is copied from a vision token is most of the residual."""
    decoder.requires_grad_(requires_grad=True)
    for name, parameter in decoder.named_parameters():
        if parameter.dim() == 1:
            parameter.fill_(1.0)
        else:
            is_table = "embed" in name or "lm_head" in name
            nn.init.normal_(parameter, std=0.03 if is_table else (3 * parameter.shape[-1]) ** -0.5)
        if name.startswith("model.layers.0.") and name.endswith(("o_proj.weight", "down_proj.weight")):
            parameter.mul_(0.1)
        elif name.endswith(("down_proj.weight", "experts.down")):
            parameter.mul_(0.3)


def expert_of(pixels: Tensor) -> Tensor:
    """The expert that reads a pixel: [..., 2], y and x -> [...]."""
    y, x = (pixels % 64 // EXPERT_SIDE).unbind(-1)
    return y * EXPERTS_ACROSS + x


@torch.no_grad()
def graft(decoder: Decoder, glance: Glance) -> None:
    """Plants the glance into the reading layers of a decoder that knows where to look.

    Their heads look where the taught ones do and begin by copying what they see (values and outputs are the identity), the layer
    before them by saying little, so that the copy is most of the residual.  An expert's up rows become what the glance reads at
    its place, its gate rows the router's row for it, so that a chosen expert is open, and all experts write alike.
    """
    code = glance.code
    rows = glance.places.weight * glance.norm.weight  # the norm's scale folded in,
    places = (rows - rows.mean(1, keepdim=True)).view(-1, code, glance.places.in_features)  # and that it takes the mean away
    for name, parameter in decoder.model.layers[0].named_parameters():
        if name.endswith(("o_proj.weight", "down_proj.weight")):
            parameter.mul_(QUIET)
    for number in READING:
        layer = decoder.model.layers[number]
        assert isinstance(layer, Layer)
        assert isinstance(layer.mlp, MixtureOfExperts), "reading layers have experts"
        for part in (layer.self_attn.v_proj, layer.self_attn.o_proj):
            nn.init.eye_(part.weight)
        for part in (layer.self_attn.q_proj, layer.self_attn.k_proj):
            heads = part.weight.view(layer.self_attn.config.heads, -1, part.weight.shape[1])
            for head in range(TAUGHT, len(heads)):
                heads[head] = heads[head % TAUGHT]
        experts, width = layer.mlp.experts, layer.mlp.experts.down.shape[2]
        for expert in range(experts.down.shape[0]):
            y, x = divmod(expert, EXPERTS_ACROSS)
            place = y * (64 // PLACE_WIDTH) + (x * EXPERT_SIDE + EXPERT_SIDE // 2) // PLACE_WIDTH  # of a cell's middle
            gate, up = experts.gate_up[expert].chunk(2)
            up[: min(code, width)] = places[place, : min(code, width)]
            gate.copy_(0.25 * layer.mlp.gate.weight[expert])
        experts.down.copy_(experts.down[:1].expand_as(experts.down).clone())
