"""The glance: what stands on a page, read from its vision tokens in one pass, with a probability for every cell.

    code   = places(norm(token))[place]            a place is 4 x 8 pixels of a token's 64 x 64, and has a projection of its own
    symbol = symbols(gelu(mix(code * (1 + rows[y] + columns[x]))))          y, x: the pixel inside the place

A place's own projection is what makes this trainable: with one projection for all places and their positions added, nothing is
learned for minutes.  Nobody says how large the cells are: the tokens vote (`cells`), and the page is read at the centres of the
cells that win.  Training asks the same head about known cells, so its words are those of the decoder: symbols, `<eol>` right of a
line's end, `<end>` below the text.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from optmem import ops
from optmem.errors import InputError
from optmem.model.config import DecoderConfig, GlanceConfig
from optmem.model.layout import PLACE_HEIGHT, PLACE_WIDTH
from optmem.pixels import PIXELS_PER_TOKEN

NORM_EPS = 1e-5


class ReadOut(nn.Module):
    """The symbol at a pixel, from the vector of the square that the pixel lies in."""

    def __init__(self, side: int, width_in: int, code: int, width: int, num_symbols: int) -> None:
        super().__init__()
        self.side, self.code = side, code
        self.norm = nn.LayerNorm(width_in, NORM_EPS)
        self.places = nn.Linear(width_in, side * side // (PLACE_HEIGHT * PLACE_WIDTH) * code)
        self.rows = nn.Embedding(PLACE_HEIGHT, code)
        self.columns = nn.Embedding(PLACE_WIDTH, code)
        self.mix = nn.Linear(code, width)
        self.symbols = nn.Linear(width, num_symbols)

    def forward(self, squares: Tensor, pixels: Tensor) -> Tensor:
        """Vectors of squares [B, m * m, D], row by row, and pixels int64 [B, N, 2], y and x -> logits [B, N, symbols]."""
        across = round(squares.shape[1] ** 0.5)
        y, x = pixels.unbind(-1)
        square = y // self.side * across + x // self.side
        place = y % self.side // PLACE_HEIGHT * (self.side // PLACE_WIDTH) + x % self.side // PLACE_WIDTH
        codes = self.places(self.norm(squares)).view(squares.shape[0], -1, self.code)  # [B, m * m * places, code]
        index = square * (self.side**2 // (PLACE_HEIGHT * PLACE_WIDTH)) + place
        read = codes.gather(1, index[..., None].expand(-1, -1, self.code))
        read = read * (1 + self.rows(y % PLACE_HEIGHT) + self.columns(x % PLACE_WIDTH))
        logits: Tensor = self.symbols(nn.functional.gelu(self.mix(read)))
        return logits


@dataclass(frozen=True, slots=True)
class Glimpse:
    """What a glance saw of one page."""

    ids: Tensor  # int64 [rows, columns]  token ids; right of a line's end `<eol>`, below the text `<end>`
    probabilities: Tensor  # fp32 [rows, columns]  of each of them
    cell: tuple[int, int]  # height and width in pixels
    confidence: float  # that the cells are this large


class Glance(ReadOut):
    """The read-out of vision tokens, and the vote on the size of cells."""

    def __init__(self, config: GlanceConfig, decoder: DecoderConfig) -> None:
        super().__init__(PIXELS_PER_TOKEN, decoder.hidden, config.code, config.width, decoder.vocab_size)
        self.known = config.cells
        self.cells = nn.Linear(decoder.hidden, len(config.cells))

    def vote(self, tokens: Tensor) -> Tensor:
        """Vision tokens [B, n, hidden] -> logits of the known cells, [B, cells]."""
        votes: Tensor = self.cells(self.norm(tokens)).mean(1)
        return votes

    @torch.inference_mode()
    def read(self, tokens: Tensor, rows: range | None = None, *, temperature: float = 1.0) -> Glimpse:
        """The vision tokens of a square page, [n, hidden] -> what it says, or what these rows say.

        temperature   of the probabilities; the ids do not depend on it

        Raises InputError where the tokens are not those of one square view.
        """
        cell, confidence = self._cell(tokens)
        logits, shape = self._logits(tokens, cell, rows, temperature)
        probabilities, ids = logits.softmax(-1).max(-1)
        return Glimpse(ids.view(shape), probabilities.view(shape), cell, confidence)

    @torch.inference_mode()
    def chances(self, tokens: Tensor, ids: Tensor, *, temperature: float = 1.0) -> Tensor:
        """How likely each of these ids stands in each cell of a page: logarithms, fp32 [rows, columns, len(ids)].

        Raises InputError where the tokens are not those of one square view.
        """
        logits, shape = self._logits(tokens, self._cell(tokens)[0], None, temperature)
        return logits.log_softmax(-1)[:, ids].view(*shape, -1)

    @torch.inference_mode()
    def hidden(self, tokens: Tensor, cell: tuple[int, int]) -> Iterator[Tensor]:
        """What stands before the last projection at every cell of pages, [B, n, D] -> of some pages at a time [b, n, cells, width].

        Only the places at the centres of cells are computed: of cells of 16 x 8, a quarter.  Cells must divide a token's square.
        A CPU gets one page at a time: 1 MB stays in a core's own memory, and takes half the time of 32 pages at once.
        """
        height, width = cell
        down, across = PIXELS_PER_TOKEN // height, PIXELS_PER_TOKEN // width
        y, x = torch.meshgrid(torch.arange(down) * height + height // 2, torch.arange(across) * width + width // 2, indexing="ij")
        y, x = y.flatten().to(tokens.device), x.flatten().to(tokens.device)
        place = y // PLACE_HEIGHT * (self.side // PLACE_WIDTH) + x // PLACE_WIDTH  # [cells of a token]
        weight = self.places.weight.view(-1, self.code, tokens.shape[-1])[place].flatten(0, 1)
        bias = self.places.bias.view(-1, self.code)[place].flatten()
        codes = nn.functional.linear(self.norm(tokens), weight, bias).view(*tokens.shape[:2], len(place), self.code)
        read = codes * (1 + self.rows(y % PLACE_HEIGHT) + self.columns(x % PLACE_WIDTH))
        for some in read.split(1 if tokens.device.type == "cpu" else len(read)):
            yield ops.linear(some, self.mix.weight, self.mix.bias, "gelu")

    def _cell(self, tokens: Tensor) -> tuple[tuple[int, int], float]:
        """Height and width of a page's cells, and how sure the tokens are of it."""
        if tokens.dim() != 2 or not tokens.shape[0] or round(tokens.shape[0] ** 0.5) ** 2 != tokens.shape[0]:
            raise InputError(f"a glance takes the tokens of one square view, [n * n, hidden], got {list(tokens.shape)}")
        confidence, winner = self.vote(tokens[None])[0].float().softmax(-1).max(-1)
        return self.known[int(winner)], float(confidence)

    def _logits(
        self, tokens: Tensor, cell: tuple[int, int], rows: range | None, temperature: float
    ) -> tuple[Tensor, tuple[int, int]]:
        """Of every cell, one after the other, fp32 [rows * columns, symbols]; rows and columns."""
        pixels, shape = centres(round(tokens.shape[0] ** 0.5) * PIXELS_PER_TOKEN, cell, rows)
        return self(tokens[None], pixels[None].to(tokens.device))[0].float() / temperature, shape


def centres(side: int, cell: tuple[int, int], rows: range | None = None) -> tuple[Tensor, tuple[int, int]]:
    """The middle pixels of the cells of a page, or of these rows of it, int64 [rows * columns, 2]; rows and columns."""
    height, width = cell
    wanted = range(side // height) if rows is None else range(side // height)[rows.start : rows.stop : rows.step]
    y = torch.tensor([row * height + height // 2 for row in wanted], dtype=torch.int64)
    x = torch.arange(side // width) * width + width // 2
    return torch.cartesian_prod(y, x), (len(y), len(x))
