"""Every operator by its name: schema, checks, fake, and which implementation serves it.

A function here checks what a caller can get wrong and calls ``torch.ops.optmem.<name>``, which eager mode, torch.compile and CUDA
graphs all understand.  What the operator means is written in reference.py; the C++ is in csrc/, the Triton in kernels/.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, lru_cache
from importlib import import_module
from math import prod
from types import ModuleType

import torch
from torch import Tensor

from optmem import reference
from optmem.errors import InputError
from optmem.native import native

library = torch.library.Library("optmem", "DEF")
log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Implementation:
    """Which code serves an operator on a device, and why that one."""

    operator: str
    device: str
    name: str
    reason: str


def implementations() -> list[Implementation]:
    """One row for every operator and device type, in the order of this file."""
    return [describe() for describe in _described]


_described: list[Callable[[], Implementation]] = []


def _cpp_or_reference(operator: str) -> Callable[[], Implementation]:
    """How the CPU rows read: C++ where optmem._cpu is built, else the reference, and it says so."""

    def describe() -> Implementation:
        cpu = native("_cpu")
        if cpu.module is None:
            return Implementation(operator, "cpu", "reference", f"optmem._cpu: {cpu.reason}")
        return Implementation(operator, "cpu", "cpp", f"optmem._cpu, {cpu.module.isa()}")

    return describe


@cache
def _triton(operator: str) -> ModuleType | None:
    """kernels/<operator>.py, imported when first needed; None where Triton is not installed, which is logged once."""
    try:
        return import_module(f"optmem.kernels.{operator}")
    except ModuleNotFoundError as error:
        if error.name != "triton":
            raise
        log.warning("%s: triton is not installed, so plain torch serves it on CUDA; pip install 'optmem[gpu]'", operator)
        return None


def _triton_or_reference(operator: str) -> Callable[[], Implementation]:
    """How the CUDA rows read: Triton where it is installed, else the reference, and it says so."""

    def describe() -> Implementation:
        if _triton(operator) is None:
            return Implementation(operator, "cuda", "reference", "triton is not installed")
        return Implementation(operator, "cuda", "triton", f"kernels/{operator}.py")

    return describe


def _check(holds: bool, message: str) -> None:
    if not holds:
        raise InputError(message)


# --- draw_text ----------------------------------------------------------------------------------------------------------------

library.define("draw_text(Tensor ink, Tensor glyphs, Tensor placements, Tensor starts, int height, int width) -> Tensor")


def draw_text(ink: Tensor, glyphs: Tensor, placements: Tensor, starts: Tensor, height: int, width: int) -> Tensor:
    """Draw glyphs on white pages, many pages in parallel; where glyphs overlap the darker pixel wins.

    ink         uint8 [N]      coverage of all glyphs, each row by row; 255 is black
    glyphs      int32 [G, 3]   offset into ink, height, width
    placements  int32 [M, 3]   glyph, top, left; in the order of pages
    starts      int64 [P + 1]  page p owns placements starts[p] .. starts[p + 1]
    -> uint8 [P, height, width]

    Raises InputError where a glyph lies outside the ink or a placement outside its page.
    """
    for name, tensor, dtype in (("ink", ink, torch.uint8), ("glyphs", glyphs, torch.int32)):
        _check(tensor.dtype == dtype, f"draw_text: {name} must be {dtype}, got {tensor.dtype}")
    _check(placements.dtype == torch.int32, f"draw_text: placements must be torch.int32, got {placements.dtype}")
    _check(starts.dtype == torch.int64, f"draw_text: starts must be torch.int64, got {starts.dtype}")
    _check(ink.dim() == 1, f"draw_text: ink must be [N], got {list(ink.shape)}")
    _check(glyphs.dim() == 2 and glyphs.shape[1] == 3, f"draw_text: glyphs must be [G, 3], got {list(glyphs.shape)}")
    _check(
        placements.dim() == 2 and placements.shape[1] == 3, f"draw_text: placements must be [M, 3], got {list(placements.shape)}"
    )
    _check(starts.dim() == 1 and starts.numel() > 0, f"draw_text: starts must be [P + 1], got {list(starts.shape)}")
    _check(height > 0 and width > 0, f"draw_text: a page must have at least one pixel, got {height}x{width}")
    try:
        pages: Tensor = torch.ops.optmem.draw_text(ink, glyphs, placements, starts, height, width)
    except ValueError as error:
        raise InputError(str(error)) from None
    return pages


@torch.library.impl(library, "draw_text", "CPU")
def _draw_text_cpu(ink: Tensor, glyphs: Tensor, placements: Tensor, starts: Tensor, height: int, width: int) -> Tensor:
    cpu = native("_cpu").module
    if cpu is None:
        return reference.draw_text(ink, glyphs, placements, starts, height, width)
    pages = torch.empty((starts.numel() - 1, height, width), dtype=torch.uint8)
    arrays = (t.contiguous().numpy() for t in (ink, glyphs, placements, starts))
    cpu.draw_text(*arrays, pages.numpy(), torch.get_num_threads())
    return pages


@torch.library.register_fake("optmem::draw_text")
def _draw_text_fake(ink: Tensor, glyphs: Tensor, placements: Tensor, starts: Tensor, height: int, width: int) -> Tensor:
    return ink.new_empty((starts.shape[0] - 1, height, width))


_described.append(_cpp_or_reference("draw_text"))


# --- resample -----------------------------------------------------------------------------------------------------------------

library.define("resample(Tensor images, int height, int width) -> Tensor")

MAX_SIDE = 65_535  # pixels


def resample(images: Tensor, height: int, width: int) -> Tensor:
    """Resize images as the antialiased bicubic of Pillow 13 does, equal to it bit for bit.

    images  uint8 [N, H, W, C]   C is 1 or 3, a side 1 to 65,535 pixels
    -> uint8 [N, height, width, C]

    Raises InputError where a type, a shape or a size is not one of these.
    """
    _check(images.dtype == torch.uint8, f"resample: images must be torch.uint8, got {images.dtype}")
    _check(
        images.dim() == 4 and images.shape[3] in (1, 3),
        f"resample: images must be [N, H, W, C] with C 1 or 3, got {list(images.shape)}",
    )
    for name, rows, columns in (("images", images.shape[1], images.shape[2]), ("the result", height, width)):
        _check(
            1 <= rows <= MAX_SIDE and 1 <= columns <= MAX_SIDE,
            f"resample: a side of {name} must be 1 to {MAX_SIDE} pixels, got {rows}x{columns}",
        )
    _check(height * width * images.shape[3] < 2**31, f"resample: {height}x{width} pixels are too many for one image")
    resized: Tensor = torch.ops.optmem.resample(images, height, width)
    return resized


@torch.library.impl(library, "resample", "CPU")
def _resample_cpu(images: Tensor, height: int, width: int) -> Tensor:
    cpu = native("_cpu").module
    if cpu is None:
        return reference.resample(images, height, width)
    out = images.new_empty((images.shape[0], height, width, images.shape[3]))
    cpu.resample(images.contiguous().numpy(), out.numpy(), torch.get_num_threads())
    return out


@torch.library.impl(library, "resample", "CUDA")
def _resample_cuda(images: Tensor, height: int, width: int) -> Tensor:
    if native("_cuda").module is None or native("_cpu").module is None:  # the weights are computed by _cpu
        return reference.resample(images, height, width)
    height_in, width_in = images.shape[1:3]
    if (height, width) == (height_in, width_in):
        return images.clone(memory_format=torch.contiguous_format)  # an operator may not return its input
    for axis in reference.resample_order(height_in, width_in, height, width):
        images = _resample_axis_cuda(images, axis, (height, width)[axis - 1])
    return images


def _resample_axis_cuda(images: Tensor, axis: int, size: int) -> Tensor:
    """One pass on the device: axis 1 is the height, axis 2 the width."""
    if images.shape[axis] == size:
        return images
    images = images.contiguous()
    out = images.new_empty((*images.shape[:axis], size, *images.shape[axis + 1 :]))
    with torch.cuda.device(images.device):
        bounds, weights = _resample_coefficients(images.shape[axis], size, images.device)
        pointers = (tensor.data_ptr() for tensor in (images, bounds, weights, out))
        outer, inner = prod(images.shape[:axis]), prod(images.shape[axis + 1 :])
        stream = torch.cuda.current_stream().cuda_stream
        cuda = native("_cuda").require()
        cuda.resample_pass(*pointers, outer, images.shape[axis], size, inner, weights.shape[1], stream)
    return out


@lru_cache(maxsize=256)
def _resample_coefficients(size_in: int, size_out: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Bounds int32 [out, 2] and weights int32 [out, taps]; kept on the device, where a captured graph may read them again."""
    bounds, weights = native("_cpu").require().resample_coefficients(size_in, size_out)
    return torch.from_numpy(bounds).to(device), torch.from_numpy(weights).to(device)


@torch.library.register_fake("optmem::resample")
def _resample_fake(images: Tensor, height: int, width: int) -> Tensor:
    return images.new_empty((images.shape[0], height, width, images.shape[3]))


def _describe_resample_cuda() -> Implementation:
    for needed in (native("_cuda"), native("_cpu")):
        if needed.module is None:
            return Implementation("resample", "cuda", "reference", f"optmem.{needed.name}: {needed.reason}")
    return Implementation("resample", "cuda", "cuda", "optmem._cuda")


_described.append(_cpp_or_reference("resample"))
_described.append(_describe_resample_cuda)


# --- patch_embed --------------------------------------------------------------------------------------------------------------

library.define("patch_embed(Tensor pixels, Tensor weight, Tensor bias, Tensor positions) -> Tensor")


def patch_embed(pixels: Tensor, weight: Tensor, bias: Tensor, positions: Tensor) -> Tensor:
    """Pages of bytes to patch embeddings: normalise to -1 .. 1, project 16 x 16 patches, add positions; sums in fp32.

    pixels      uint8 [B, H, W, C]        C is 1 or 3, H and W multiples of 16; one channel means three equal ones
    weight      [D, 3, 16, 16]            fp32, bf16 or fp16; so are bias and positions
    bias        [D]
    positions   [H / 16, W / 16, D]
    -> [B, H / 16, W / 16, D] in the weight's type

    Raises InputError where shapes, types or devices do not fit together.
    """
    _check(pixels.dtype == torch.uint8, f"patch_embed: pixels must be torch.uint8, got {pixels.dtype}")
    _check(
        pixels.dim() == 4 and pixels.shape[3] in (1, 3),
        f"patch_embed: pixels must be [B, H, W, C] with C 1 or 3, got {list(pixels.shape)}",
    )
    height, width = pixels.shape[1:3]
    _check(
        height > 0 and width > 0 and height % 16 == 0 and width % 16 == 0,
        f"patch_embed: height and width must be multiples of 16, got {height}x{width}",
    )
    _check(
        weight.dtype in (torch.float32, torch.bfloat16, torch.float16),
        f"patch_embed: weight must be torch.float32, torch.bfloat16 or torch.float16, got {weight.dtype}",
    )
    _check(
        weight.dim() == 4 and weight.shape[1:] == (3, 16, 16),
        f"patch_embed: weight must be [D, 3, 16, 16], got {list(weight.shape)}",
    )
    wanted = {"bias": [weight.shape[0]], "positions": [height // 16, width // 16, weight.shape[0]]}
    for name, tensor in (("bias", bias), ("positions", positions)):
        _check(tensor.dtype == weight.dtype, f"patch_embed: {name} must be {weight.dtype} as the weight is, got {tensor.dtype}")
        _check(list(tensor.shape) == wanted[name], f"patch_embed: {name} must be {wanted[name]}, got {list(tensor.shape)}")
    for name, tensor in (("weight", weight), ("bias", bias), ("positions", positions)):
        _check(tensor.device == pixels.device, f"patch_embed: {name} must be on {pixels.device}, got {tensor.device}")
    # Contiguous here, for torch too: from strided bf16 its products take another path on CPU and differ in the last bit.
    inputs = [tensor.contiguous() for tensor in (pixels, weight, bias, positions)]
    embeddings: Tensor = torch.ops.optmem.patch_embed(*inputs)
    return embeddings


@torch.library.impl(library, "patch_embed", "CPU")
def _patch_embed_cpu(pixels: Tensor, weight: Tensor, bias: Tensor, positions: Tensor) -> Tensor:
    # Three equal channels times three weights are one channel times their sum.  In fp32 the sum costs no more precision than the
    # order of adding does and saves two thirds of the work (31 -> 12 ms for 1024 px, D=768, two cores); 16 bits would round it.
    if pixels.shape[3] == 1 and weight.dtype == torch.float32:
        weight = weight.sum(1, keepdim=True)
    return reference.patch_embed(pixels, weight, bias, positions)


@torch.library.impl(library, "patch_embed", "CUDA")
def _patch_embed_cuda(pixels: Tensor, weight: Tensor, bias: Tensor, positions: Tensor) -> Tensor:
    kernel = _triton("patch_embed")
    if kernel is None:
        return reference.patch_embed(pixels, weight, bias, positions)
    out: Tensor = _patch_embed_fake(pixels, weight, bias, positions)
    kernel.patch_embed(pixels, weight, bias, positions, out)
    return out


@torch.library.register_fake("optmem::patch_embed")
def _patch_embed_fake(pixels: Tensor, weight: Tensor, bias: Tensor, positions: Tensor) -> Tensor:
    return weight.new_empty((pixels.shape[0], *positions.shape))


_described.append(lambda: Implementation("patch_embed", "cpu", "reference", "plain torch, where a projection is already good"))
_described.append(_triton_or_reference("patch_embed"))
