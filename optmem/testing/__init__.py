"""What tests and benches share: comparison, input makers, guard bands.  A bench never measures a shape no test knows."""

from __future__ import annotations

import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from optmem import reference
from optmem.native import native
from optmem.pages.atlas import CellAtlas
from optmem.pages.symbols import LINE_END


def generator(name: str) -> torch.Generator:
    """Random numbers seeded by a name, so that a failing case can be run alone."""
    return torch.Generator().manual_seed(zlib.crc32(name.encode()))


def available_isas() -> list[str]:
    """The instruction sets of this machine that the C++ kernels have a copy for."""
    cpu = native("_cpu").require()
    best = ["plain", "avx2", "avx512"]
    return best[: best.index(cpu.isa()) + 1]


@contextmanager
def forced_isa(name: str) -> Iterator[None]:
    """The C++ kernels run with this instruction set inside the block."""
    cpu = native("_cpu").require()
    before = cpu.isa()
    cpu.force_isa(name)
    try:
        yield
    finally:
        cpu.force_isa(before)


def assert_equal(actual: Tensor, expected: Tensor) -> None:
    """Bit for bit: same shape, same type, same values."""
    assert actual.shape == expected.shape, f"shape {list(actual.shape)} is not {list(expected.shape)}"
    assert actual.dtype == expected.dtype, f"{actual.dtype} is not {expected.dtype}"
    if not torch.equal(actual, expected):
        wrong = (actual != expected).nonzero()
        first = tuple(wrong[0].tolist())
        raise AssertionError(
            f"{len(wrong)} of {expected.numel()} values differ; first at {first}: {actual[first]} is not {expected[first]}"
        )


def assert_close(actual: Tensor, expected: Tensor, *, exact: Tensor, slack: float = 2.0) -> None:
    """Our error against fp64 is at most ``slack`` times that of torch in the same dtype (``expected``), plus one rounding."""
    assert actual.shape == exact.shape, f"shape {list(actual.shape)} is not {list(exact.shape)}"
    assert actual.dtype == expected.dtype, f"{actual.dtype} is not {expected.dtype}"
    ours = (actual.double() - exact).abs().max().item() if exact.numel() else 0.0
    theirs = (expected.double() - exact).abs().max().item() if exact.numel() else 0.0
    scale = exact.abs().max().item() if exact.numel() else 0.0
    bound = slack * theirs + torch.finfo(actual.dtype).eps * scale
    assert ours <= bound, f"error {ours:.3g} against fp64 is above {bound:.3g} (torch's own is {theirs:.3g})"


def read_pixels(image: NDArray[np.uint8], atlas: CellAtlas, *, break_rows: bool) -> str:
    """The symbols of a page of cells, from its pixels alone: every cell is looked up among the atlas's glyphs."""
    table = atlas.store.table()
    h, w = atlas.font.height, atlas.font.width
    known = {bytes(h * w): " "}
    for (offset, height, width), symbol in zip(table.glyphs.tolist(), table.symbols.tolist(), strict=True):
        known.setdefault(table.ink[offset : offset + height * width].tobytes(), chr(symbol))
    rows, columns = image.shape[0] // h, image.shape[1] // w
    cells = (255 - image[: rows * h, : columns * w]).reshape(rows, h, columns, w).swapaxes(1, 2)
    said = []
    for row in cells:
        line = "".join(known[cell.tobytes()] for cell in row)
        said.append(line.split(LINE_END)[0] + LINE_END if break_rows and LINE_END in line else line)
    return "".join(said)


BAND = 256  # elements of guard on either side: keeps a tensor as aligned as torch itself would


def fenced(tensor: Tensor) -> Tensor:
    """A copy between two guard bands, NaN or 0xA5: an operator that reads too far shows it in its answer."""
    return _between_bands(tensor)[1]


@contextmanager
def guarded(shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> Iterator[Tensor]:
    """An output of NaN between bands of NaN: leaving the block checks that all of it was written, and nothing else."""
    buffer, out = _between_bands(torch.full(tuple(shape), torch.nan, dtype=dtype, device=device))
    yield out
    assert not out.isnan().any(), f"{int(out.isnan().sum())} of {out.numel()} values were not written, or are NaN"
    assert buffer[:BAND].isnan().all(), "something was written before the output"
    assert buffer[BAND + out.numel() :].isnan().all(), "something was written behind the output"


def _filling(dtype: torch.dtype, byte: int) -> float:
    """NaN, or a byte, which int8 reads as a negative number."""
    if dtype.is_floating_point:
        return torch.nan
    return byte - 256 if dtype == torch.int8 else byte


def _between_bands(tensor: Tensor) -> tuple[Tensor, Tensor]:
    filling = _filling(tensor.dtype, 0xA5)
    buffer = torch.full((tensor.numel() + 2 * BAND,), filling, dtype=tensor.dtype, device=tensor.device)
    inside = buffer[BAND : BAND + tensor.numel()].view(tensor.shape)
    return buffer, inside.copy_(tensor)


def patch_embed_inputs(
    num_pages: int, grid: tuple[int, int], channels: int, width: int, dtype: torch.dtype, device: torch.device
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Pixels, weight, bias and positions: noise with black and white pages among it, and weights as a trained model has them."""
    rng = generator(f"patch_embed {num_pages} {grid} {channels} {width}")
    height, across = grid
    pixels = torch.randint(0, 256, (num_pages, height * 16, across * 16, channels), generator=rng, dtype=torch.uint8)
    pixels[1::3] = 0
    pixels[2::3] = 255
    weight = torch.randn(width, 3, 16, 16, generator=rng) / 768**0.5
    bias = torch.randn(width, generator=rng)
    positions = torch.randn(height, across, width, generator=rng)
    weight, bias, positions = (tensor.to(device, dtype) for tensor in (weight, bias, positions))
    return pixels.to(device), weight, bias, positions


def global_attention_inputs(
    num_grids: int, grid: tuple[int, int], heads: int, head_dim: int, dtype: torch.dtype, device: torch.device
) -> tuple[Tensor, Tensor, Tensor]:
    """qkv and both tables; relative positions move the logits as much as queries and keys do."""
    rng = generator(f"global_attention {num_grids} {grid} {heads} {head_dim}")
    height, width = grid
    qkv = torch.randn(num_grids, height, width, 3 * heads * head_dim, generator=rng)
    rel_pos_h, rel_pos_w = (torch.randn(2 * side - 1, head_dim, generator=rng) / head_dim**0.5 for side in grid)
    qkv, rel_pos_h, rel_pos_w = (tensor.to(device, dtype) for tensor in (qkv, rel_pos_h, rel_pos_w))
    return qkv, rel_pos_h, rel_pos_w


def window_attention_inputs(
    num_grids: int, grid: tuple[int, int], window: int, heads: int, head_dim: int, dtype: torch.dtype, device: torch.device
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """qkv, the bias that fills windows beyond the grid, and both tables."""
    rng = generator(f"window_attention {num_grids} {grid} {window} {heads} {head_dim}")
    qkv, _, _ = global_attention_inputs(num_grids, grid, heads, head_dim, dtype, device)
    bias = torch.randn(3 * heads * head_dim, generator=rng)
    rel_pos_h, rel_pos_w = (torch.randn(2 * window - 1, head_dim, generator=rng) / head_dim**0.5 for _ in "hw")
    bias, rel_pos_h, rel_pos_w = (tensor.to(device, dtype) for tensor in (bias, rel_pos_h, rel_pos_w))
    return qkv, bias, rel_pos_h, rel_pos_w


def attention_inputs(
    batch: int, num_queries: int, num_keys: int, heads: tuple[int, int], head_dim: int, dtype: torch.dtype, device: torch.device
) -> tuple[Tensor, Tensor, Tensor]:
    """Query, key and value; heads are those of queries and of keys."""
    rng = generator(f"attention {batch} {num_queries} {num_keys} {heads} {head_dim}")
    shapes = ((num_queries, heads[0]), (num_keys, heads[1]), (num_keys, heads[1]))
    query, key, value = (torch.randn(batch, *shape, head_dim, generator=rng).to(device, dtype) for shape in shapes)
    return query, key, value


def compress_inputs(
    num_grids: int, grid: tuple[int, int], widths: tuple[int, int, int, int], dtype: torch.dtype, device: torch.device
) -> tuple[Tensor, ...]:
    """Patches and eight weights; widths are those of patches, neck and the two convolutions."""
    rng = generator(f"compress {num_grids} {grid} {widths}")
    patch, neck, middle, last = widths
    norm = ((neck,), (neck,))
    shapes = ((neck, patch, 1, 1), *norm, (neck, neck, 3, 3), *norm, (middle, neck, 3, 3), (last, middle, 3, 3))
    weights = [torch.randn(shape, generator=rng) / max(1, shape[1:].numel()) ** 0.5 for shape in map(torch.Size, shapes)]
    patches = torch.randn(num_grids, *grid, patch, generator=rng)
    return tuple(tensor.to(device, dtype) for tensor in (patches, *weights))


def layer_norm_inputs(rows: int, width: int, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """Rows far from zero and of different sizes, weight and bias."""
    rng = generator(f"layer_norm {rows} {width}")
    x = torch.randn(rows, width, generator=rng) * torch.logspace(-1, 1, rows)[:, None] + 3 * torch.randn(rows, 1, generator=rng)
    weight, bias = (torch.randn(width, generator=rng) for _ in "wb")
    x, weight, bias = (tensor.to(device, dtype) for tensor in (x, weight, bias))
    return x, weight, bias


def linear_e4m3_inputs(
    rows: int, width_in: int, width_out: int, dtype: torch.dtype, device: torch.device
) -> tuple[Tensor, Tensor, Tensor]:
    """Rows, weight and bias of which 8-bit floats of a row's scale lose nothing but what dtype rounds."""
    rng = generator(f"linear_e4m3 {rows} {width_in} {width_out}")
    x = torch.randn(rows, width_in, generator=rng) * 3
    weight = torch.randn(width_out, width_in, generator=rng) / width_in**0.5
    bias = torch.randn(width_out, generator=rng)
    x, weight = (reference.scaled_rows(*reference.e4m3_rows(tensor), torch.float32) for tensor in (x, weight))
    x, weight, bias = (tensor.to(device, dtype) for tensor in (x, weight, bias))
    return x, weight, bias


def every_other(tensor: Tensor) -> Tensor:
    """The same values, one cell apart, with 255 or NaN between them."""
    filling = _filling(tensor.dtype, 255)
    wide = torch.full((*tensor.shape, 2), filling, dtype=tensor.dtype, device=tensor.device)
    wide[..., 0] = tensor
    return wide[..., 0]
