"""Every operator by its name: schema, checks, fake, and which implementation serves it.

A function here checks what a caller can get wrong and calls ``torch.ops.optmem.<name>``, which eager mode, torch.compile and CUDA
graphs all understand.  What the operator means is written in reference.py; the C++ is in csrc/, the Triton in kernels/.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache, lru_cache, partial
from importlib import import_module
from math import prod
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from optmem import blockwise, reference
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


def _check_same_kind(operator: str, **tensors: Tensor) -> None:
    """All of one floating type and on one device, those of the first."""
    first, *_ = tensors
    dtype, device = tensors[first].dtype, tensors[first].device
    allowed = (torch.float32, torch.bfloat16, torch.float16)
    _check(dtype in allowed, f"{operator}: {first} must be torch.float32, torch.bfloat16 or torch.float16, got {dtype}")
    for name, tensor in tensors.items():
        _check(tensor.dtype == dtype, f"{operator}: {name} must be {dtype} as {first} is, got {tensor.dtype}")
        _check(tensor.device == device, f"{operator}: {name} must be on {device} as {first} is, got {tensor.device}")


def _differentiate(operator: str, meaning: Callable[..., Tensor]) -> None:
    """Gives an operator the gradient of its reference, computed again in the backward pass; only training needs it."""

    def keep(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.save_for_backward(*(value for value in inputs if isinstance(value, Tensor)))
        ctx.others = [None if isinstance(value, Tensor) else value for value in inputs]

    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        wanted = ctx.needs_input_grad
        saved = iter(ctx.saved_tensors)
        inputs = [next(saved).detach() if other is None else other for other in ctx.others]
        leaves = [value.requires_grad_() for value, needed in zip(inputs, wanted, strict=True) if needed]
        with torch.enable_grad():
            gradients = iter(torch.autograd.grad(meaning(*inputs), leaves, gradient))
        return tuple(next(gradients) if needed else None for needed in wanted)

    torch.library.register_autograd(f"optmem::{operator}", backward, setup_context=keep)


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


_differentiate("patch_embed", reference.patch_embed)
_described.append(lambda: Implementation("patch_embed", "cpu", "reference", "plain torch, where a projection is already good"))
_described.append(_triton_or_reference("patch_embed"))


# --- attention ----------------------------------------------------------------------------------------------------------------

library.define("attention(Tensor query, Tensor key, Tensor value, int prefix) -> Tensor")


def attention(query: Tensor, key: Tensor, value: Tensor, prefix: int) -> Tensor:
    """Scaled dot-product attention: query i stands at place S - T + i and sees the first `prefix` keys and all up to its place.

    query       [B, T, H, d]     fp32, bf16 or fp16; so are key and value
    key, value  [B, S, K, d]     S >= T; H a multiple of K, of which H / K neighbours share one
    prefix      S: everything is seen (CLIP).  0: causal.  n: n image tokens, then queries in order (the second generation)
    -> [B, T, H, d]

    Raises InputError where shapes, types or devices do not fit together.
    """
    _check(query.dim() == 4, f"attention: query must be [B, T, H, d], got {list(query.shape)}")
    batch, num_queries, heads, head_dim = query.shape
    for name, tensor in (("key", key), ("value", value)):
        _check(
            tensor.dim() == 4 and tensor.shape[0] == batch and tensor.shape[3] == head_dim,
            f"attention: {name} must be [{batch}, S, K, {head_dim}], got {list(tensor.shape)}",
        )
    _check(key.shape == value.shape, f"attention: key is {list(key.shape)}, but value is {list(value.shape)}")
    num_keys, kv_heads = key.shape[1:3]
    _check(kv_heads > 0 and heads % kv_heads == 0, f"attention: {kv_heads} heads of keys cannot serve {heads} heads of queries")
    _check(num_keys >= num_queries, f"attention: {num_queries} queries cannot be the last of {num_keys} keys")
    _check(0 <= prefix <= num_keys, f"attention: prefix must be 0 to {num_keys}, got {prefix}")
    _check_same_kind("attention", query=query, key=key, value=value)
    # Slices of one projection stay as they are; only the numbers of a head must lie side by side.
    inputs = [tensor if tensor.stride(3) == 1 else tensor.contiguous() for tensor in (query, key, value)]
    mixed: Tensor = torch.ops.optmem.attention(*inputs, prefix)
    return mixed


@torch.library.impl(library, "attention", "CompositeExplicitAutograd")
def _attention(query: Tensor, key: Tensor, value: Tensor, prefix: int) -> Tensor:
    mask = None
    if prefix < key.shape[1]:
        mask = reference.attention_mask(query.shape[1], key.shape[1], prefix, query.device)
    q, k, v = (tensor.transpose(1, 2) for tensor in (query, key, value))
    # torch's own kernel: no logits in memory, strided inputs as they are
    mixed = torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=q.shape[1] != k.shape[1])
    return mixed.transpose(1, 2).contiguous()


@torch.library.register_fake("optmem::attention")
def _attention_fake(query: Tensor, key: Tensor, value: Tensor, prefix: int) -> Tensor:
    return query.new_empty(query.shape)


_differentiate("attention", reference.attention)
_described.append(lambda: Implementation("attention", "cpu", "torch", "scaled_dot_product_attention"))
_described.append(lambda: Implementation("attention", "cuda", "torch", "scaled_dot_product_attention"))


# --- global_attention ---------------------------------------------------------------------------------------------------------

library.define("global_attention(Tensor qkv, Tensor rel_pos_h, Tensor rel_pos_w) -> Tensor")


def global_attention(qkv: Tensor, rel_pos_h: Tensor, rel_pos_w: Tensor) -> Tensor:
    """Attention over a whole grid with decomposed relative positions, which bias the logits by the q that is not scaled.

    qkv         [B, h, w, 3 D]   of one projection: q, k, v, each D = heads * d; fp32, bf16 or fp16, so are the tables
    rel_pos_h   [2 h - 1, d]     row i - j + h - 1 for a query in row i and a key in row j; all heads share it
    rel_pos_w   [2 w - 1, d]     the same for columns
    -> [B, h, w, D]

    Raises InputError where shapes, types or devices do not fit together.
    """
    _check_grid("global_attention", qkv, rel_pos_h, rel_pos_w)
    for name, table, side in (("rel_pos_h", rel_pos_h, qkv.shape[1]), ("rel_pos_w", rel_pos_w, qkv.shape[2])):
        wanted = [2 * side - 1, rel_pos_h.shape[1]]
        _check(list(table.shape) == wanted, f"global_attention: {name} must be {wanted}, got {list(table.shape)}")
    mixed: Tensor = torch.ops.optmem.global_attention(qkv.contiguous(), rel_pos_h.contiguous(), rel_pos_w.contiguous())
    return mixed


def _check_grid(operator: str, qkv: Tensor, rel_pos_h: Tensor, rel_pos_w: Tensor) -> None:
    _check(
        qkv.dim() == 4 and qkv.shape[1] > 0 and qkv.shape[2] > 0,
        f"{operator}: qkv must be [B, h, w, 3 D] with h and w at least 1, got {list(qkv.shape)}",
    )
    for name, table in (("rel_pos_h", rel_pos_h), ("rel_pos_w", rel_pos_w)):
        _check(table.dim() == 2 and table.shape[1] > 0, f"{operator}: {name} must be [2 side - 1, d], got {list(table.shape)}")
    _check(
        qkv.shape[3] > 0 and qkv.shape[3] % (3 * rel_pos_h.shape[1]) == 0,
        f"{operator}: channels of qkv must be a multiple of 3 * {rel_pos_h.shape[1]}, got {qkv.shape[3]}",
    )
    _check_same_kind(operator, qkv=qkv, rel_pos_h=rel_pos_h, rel_pos_w=rel_pos_w)


@torch.library.impl(library, "global_attention", "CPU")
def _global_attention_cpu(qkv: Tensor, rel_pos_h: Tensor, rel_pos_w: Tensor) -> Tensor:
    return blockwise.global_attention(qkv, rel_pos_h, rel_pos_w)


@torch.library.impl(library, "global_attention", "CUDA")
def _global_attention_cuda(qkv: Tensor, rel_pos_h: Tensor, rel_pos_w: Tensor) -> Tensor:
    return reference.global_attention(qkv, rel_pos_h, rel_pos_w)


@torch.library.register_fake("optmem::global_attention")
def _global_attention_fake(qkv: Tensor, rel_pos_h: Tensor, rel_pos_w: Tensor) -> Tensor:
    return qkv.new_empty((*qkv.shape[:3], qkv.shape[3] // 3))


_differentiate("global_attention", reference.global_attention)
_described.append(lambda: Implementation("global_attention", "cpu", "torch", "blockwise.py, logits that stay in the cache"))
_described.append(lambda: Implementation("global_attention", "cuda", "reference", "no kernel yet"))


# --- window_attention ---------------------------------------------------------------------------------------------------------

library.define("window_attention(Tensor qkv, Tensor bias, Tensor rel_pos_h, Tensor rel_pos_w) -> Tensor")


def window_attention(qkv: Tensor, bias: Tensor, rel_pos_h: Tensor, rel_pos_w: Tensor) -> Tensor:
    """global_attention inside windows of the tables' side, which start in the upper left corner.

    qkv         [B, h, w, 3 D]    of the grid alone; fp32, bf16 or fp16, and so is the rest
    bias        [3 D]             of the projection that made qkv: what stands wherever a window goes beyond the grid,
                                  as a key like any other
    rel_pos_h   [2 side - 1, d]   as for global_attention; so is rel_pos_w
    -> [B, h, w, D]

    Raises InputError where shapes, types or devices do not fit together.
    """
    _check_grid("window_attention", qkv, rel_pos_h, rel_pos_w)
    _check(
        rel_pos_w.shape == rel_pos_h.shape,
        f"window_attention: rel_pos_w must be {list(rel_pos_h.shape)} as rel_pos_h is, got {list(rel_pos_w.shape)}",
    )
    _check(rel_pos_h.shape[0] % 2 == 1, f"window_attention: rel_pos_h must have 2 side - 1 rows, got {rel_pos_h.shape[0]}")
    _check(list(bias.shape) == [qkv.shape[3]], f"window_attention: bias must be [{qkv.shape[3]}], got {list(bias.shape)}")
    _check_same_kind("window_attention", qkv=qkv, bias=bias)
    inputs = [tensor.contiguous() for tensor in (qkv, bias, rel_pos_h, rel_pos_w)]
    mixed: Tensor = torch.ops.optmem.window_attention(*inputs)
    return mixed


@torch.library.impl(library, "window_attention", "CPU")
def _window_attention_cpu(qkv: Tensor, bias: Tensor, rel_pos_h: Tensor, rel_pos_w: Tensor) -> Tensor:
    return blockwise.window_attention(qkv, bias, rel_pos_h, rel_pos_w)


@torch.library.impl(library, "window_attention", "CUDA")
def _window_attention_cuda(qkv: Tensor, bias: Tensor, rel_pos_h: Tensor, rel_pos_w: Tensor) -> Tensor:
    return reference.window_attention(qkv, bias, rel_pos_h, rel_pos_w)


@torch.library.register_fake("optmem::window_attention")
def _window_attention_fake(qkv: Tensor, bias: Tensor, rel_pos_h: Tensor, rel_pos_w: Tensor) -> Tensor:
    return qkv.new_empty((*qkv.shape[:3], qkv.shape[3] // 3))


_differentiate("window_attention", reference.window_attention)
_described.append(lambda: Implementation("window_attention", "cpu", "torch", "blockwise.py, logits that stay in the cache"))
_described.append(lambda: Implementation("window_attention", "cuda", "reference", "no kernel yet"))


# --- compress -----------------------------------------------------------------------------------------------------------------

library.define(
    "compress(Tensor patches, Tensor neck_0, Tensor scale_1, Tensor shift_1, Tensor neck_2, Tensor scale_3, Tensor shift_3, "
    "Tensor net_2, Tensor net_3) -> Tensor"
)


def compress(
    patches: Tensor,
    neck_0: Tensor,
    scale_1: Tensor,
    shift_1: Tensor,
    neck_2: Tensor,
    scale_3: Tensor,
    shift_3: Tensor,
    net_2: Tensor,
    net_3: Tensor,
) -> Tensor:
    """A sixteenth of the patches, each wider: the neck (1 x 1, norm, 3 x 3, norm), then two 3 x 3 convolutions of stride 2.

    patches           [B, h, w, D]      fp32, bf16 or fp16; so are the weights
    neck_0            [N, D, 1, 1]
    scale_1, shift_1  [N]               of a norm over channels; so are scale_3 and shift_3
    neck_2            [N, N, 3, 3]
    net_2             [M, N, 3, 3]
    net_3             [C, M, 3, 3]
    -> [B, ceil(h / 4), ceil(w / 4), C]

    Raises InputError where shapes, types or devices do not fit together.
    """
    weights = {"neck_0": neck_0, "scale_1": scale_1, "shift_1": shift_1, "neck_2": neck_2}
    weights |= {"scale_3": scale_3, "shift_3": shift_3, "net_2": net_2, "net_3": net_3}
    _check(
        patches.dim() == 4 and 0 not in patches.shape[1:],
        f"compress: patches must be [B, h, w, D] with h, w and D at least 1, got {list(patches.shape)}",
    )
    neck = neck_0.shape[0]
    wanted = {name: [neck] for name in ("scale_1", "shift_1", "scale_3", "shift_3")}
    wanted |= {"neck_0": [neck, patches.shape[3], 1, 1], "neck_2": [neck, neck, 3, 3]}
    wanted |= {"net_2": [net_2.shape[0], neck, 3, 3], "net_3": [net_3.shape[0], net_2.shape[0], 3, 3]}
    for name, tensor in weights.items():
        _check(list(tensor.shape) == wanted[name], f"compress: {name} must be {wanted[name]}, got {list(tensor.shape)}")
    _check_same_kind("compress", patches=patches, **weights)
    inputs = [tensor.contiguous() for tensor in (patches, *weights.values())]
    compressed: Tensor = torch.ops.optmem.compress(*inputs)
    return compressed


@torch.library.impl(library, "compress", "CompositeExplicitAutograd")
def _compress(*inputs: Tensor) -> Tensor:
    return reference.compress(*inputs)


@torch.library.register_fake("optmem::compress")
def _compress_fake(patches: Tensor, *weights: Tensor) -> Tensor:
    num_grids, height, width, _ = patches.shape
    return patches.new_empty((num_grids, (height + 3) // 4, (width + 3) // 4, weights[-1].shape[0]))


_differentiate("compress", reference.compress)
_described.append(lambda: Implementation("compress", "cpu", "reference", "plain torch, where a convolution is already good"))
_described.append(lambda: Implementation("compress", "cuda", "reference", "plain torch, where a convolution is already good"))


# --- the decoder: what its operators share ---------------------------------------------------------------------------------------

_CPP_TYPES = (torch.float32, torch.bfloat16)


def _cpp_for(tensor: Tensor) -> ModuleType | None:
    """optmem._cpu, where it is built and speaks the tensor's type."""
    return native("_cpu").module if tensor.dtype in _CPP_TYPES else None


def _array(tensor: Tensor) -> Any:
    """The tensor's memory as numpy sees it, which knows no bf16: it becomes uint16.  Contiguous tensors are not copied."""
    tensor = tensor.detach().contiguous()
    return (tensor.view(torch.uint16) if tensor.dtype == torch.bfloat16 else tensor).numpy()


def _check_like(operator: str, first: Tensor, wanted: dict[str, tuple[Tensor, list[int]]]) -> None:
    """Every tensor has the first one's type and device, and the shape given for it."""
    for name, (tensor, shape) in wanted.items():
        _check(tensor.dtype == first.dtype, f"{operator}: {name} must be {first.dtype}, got {tensor.dtype}")
        _check(tensor.device == first.device, f"{operator}: {name} must be on {first.device}, got {tensor.device}")
        _check(list(tensor.shape) == shape, f"{operator}: {name} must be {shape}, got {list(tensor.shape)}")


def _check_float(operator: str, name: str, tensor: Tensor, dims: int) -> None:
    _check(tensor.is_floating_point(), f"{operator}: {name} must be floating point, got {tensor.dtype}")
    _check(tensor.dim() == dims, f"{operator}: {name} must have {dims} axes, got {list(tensor.shape)}")


def _check_index(operator: str, name: str, tensor: Tensor, dtype: torch.dtype, shape: list[int]) -> None:
    _check(tensor.dtype == dtype, f"{operator}: {name} must be {dtype}, got {tensor.dtype}")
    _check(list(tensor.shape) == shape, f"{operator}: {name} must be {shape}, got {list(tensor.shape)}")


@contextmanager
def _as_input_error() -> Iterator[None]:
    """What the native code refuses is as much the caller's as what is refused here."""
    try:
        yield
    except InputError:
        raise
    except ValueError as error:
        raise InputError(str(error)) from None


def _torch_on_cuda(operator: str) -> Implementation:
    return Implementation(operator, "cuda", "reference", "no kernel yet")


# --- linear_rows ----------------------------------------------------------------------------------------------------------------

library.define("linear_rows(Tensor x, Tensor weight, ScalarType dtype) -> Tensor")


def linear_rows(x: Tensor, weight: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """x weight^T, summed in fp32; on CPU a row's result does not depend on the other rows, bit for bit.

    x       [T, in]     weight  [out, in] of the same type
    dtype               of the result: x's own, or torch.float32
    -> [T, out]
    """
    _check_float("linear_rows", "x", x, 2)
    _check(weight.dim() == 2, f"linear_rows: weight must be [out, {x.shape[1]}], got {list(weight.shape)}")
    _check_like("linear_rows", x, {"weight": (weight, [weight.shape[0], x.shape[1]])})
    dtype = dtype or x.dtype
    _check(dtype in (x.dtype, torch.float32), f"linear_rows: dtype must be {x.dtype} or torch.float32, got {dtype}")
    rows: Tensor = torch.ops.optmem.linear_rows(x, weight, dtype)
    return rows


@torch.library.impl(library, "linear_rows", "CPU")
def _linear_rows_cpu(x: Tensor, weight: Tensor, dtype: torch.dtype) -> Tensor:
    cpu = _cpp_for(x)
    if cpu is None:
        return reference.linear_rows(x, weight, dtype)
    out: Tensor = _linear_rows_fake(x, weight, dtype)
    cpu.linear_rows(_array(x), _array(weight), _array(out), torch.get_num_threads())
    return out


@torch.library.register_fake("optmem::linear_rows")
def _linear_rows_fake(x: Tensor, weight: Tensor, dtype: torch.dtype) -> Tensor:
    return x.new_empty((x.shape[0], weight.shape[0]), dtype=dtype)


torch.library.impl(library, "linear_rows", "CUDA")(reference.linear_rows)
_described.append(_cpp_or_reference("linear_rows"))
_described.append(lambda: Implementation("linear_rows", "cuda", "reference", "cuBLAS is already good"))


# --- rms_norm -------------------------------------------------------------------------------------------------------------------

library.define("rms_norm(Tensor x, Tensor weight, float eps) -> Tensor")
library.define("add_rms_norm(Tensor x, Tensor residual, Tensor weight, float eps) -> (Tensor, Tensor)")


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Divide every row by the root of its mean square: fp32 inside, rounded to x's type, then times the weight.

    x [T, D], weight [D] -> [T, D]
    """
    _check_float("rms_norm", "x", x, 2)
    _check_like("rms_norm", x, {"weight": (weight, [x.shape[1]])})
    normed: Tensor = torch.ops.optmem.rms_norm(x, weight, eps)
    return normed


def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """rms_norm of x + residual.  All [T, D] but the weight [D].  -> the sum, rounded to x's type, and its norm."""
    _check_float("add_rms_norm", "x", x, 2)
    _check_like("add_rms_norm", x, {"residual": (residual, list(x.shape)), "weight": (weight, [x.shape[1]])})
    both: tuple[Tensor, Tensor] = torch.ops.optmem.add_rms_norm(x, residual, weight, eps)
    return both


@torch.library.impl(library, "rms_norm", "CPU")
def _rms_norm_cpu(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    cpu = _cpp_for(x)
    if cpu is None:
        return reference.rms_norm(x, weight, eps)
    out: Tensor = _rms_norm_fake(x, weight, eps)
    cpu.rms_norm(_array(x), _array(weight), _array(out), eps, torch.get_num_threads())
    return out


@torch.library.impl(library, "add_rms_norm", "CPU")
def _add_rms_norm_cpu(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    cpu = _cpp_for(x)
    if cpu is None:
        return reference.add_rms_norm(x, residual, weight, eps)
    total, out = _add_rms_norm_fake(x, residual, weight, eps)
    cpu.add_rms_norm(*map(_array, (x, residual, weight, total, out)), eps, torch.get_num_threads())
    return total, out


@torch.library.register_fake("optmem::rms_norm")
def _rms_norm_fake(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return x.new_empty(x.shape)


@torch.library.register_fake("optmem::add_rms_norm")
def _add_rms_norm_fake(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape), x.new_empty(x.shape)


torch.library.impl(library, "rms_norm", "CUDA")(reference.rms_norm)
torch.library.impl(library, "add_rms_norm", "CUDA")(reference.add_rms_norm)
for _name in ("rms_norm", "add_rms_norm"):
    _described.append(_cpp_or_reference(_name))
    _described.append(partial(_torch_on_cuda, _name))


# --- silu_mul -------------------------------------------------------------------------------------------------------------------

library.define("silu_mul(Tensor gate, Tensor up) -> Tensor")


def silu_mul(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) * up, rounded once, both [T, F].  torch's own differs in the last bit with a value's place in memory."""
    _check_float("silu_mul", "gate", gate, 2)
    _check_like("silu_mul", gate, {"up": (up, list(gate.shape))})
    product: Tensor = torch.ops.optmem.silu_mul(gate, up)
    return product


@torch.library.impl(library, "silu_mul", "CPU")
def _silu_mul_cpu(gate: Tensor, up: Tensor) -> Tensor:
    cpu = _cpp_for(gate)
    if cpu is None:
        return reference.silu_mul(gate, up)
    out = gate.new_empty(gate.shape)
    cpu.silu_mul(*map(_array, (gate, up, out)), torch.get_num_threads())
    return out


@torch.library.register_fake("optmem::silu_mul")
def _silu_mul_fake(gate: Tensor, up: Tensor) -> Tensor:
    return gate.new_empty(gate.shape)


torch.library.impl(library, "silu_mul", "CUDA")(reference.silu_mul)
_described.append(_cpp_or_reference("silu_mul"))
_described.append(partial(_torch_on_cuda, "silu_mul"))


# --- rope_cache -----------------------------------------------------------------------------------------------------------------

library.define(
    "rope_cache(Tensor(a!) queries, Tensor keys, Tensor values, Tensor cos, Tensor sin, Tensor slots, "
    "Tensor(b!) key_cache, Tensor(c!) value_cache) -> ()"
)


def rope_cache(
    queries: Tensor,
    keys: Tensor,
    values: Tensor,
    cos: Tensor,
    sin: Tensor,
    slots: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
) -> None:
    """Rotate queries and keys by their positions; the queries stay where they are, keys and values go into the cache.

    queries, keys, values    [T, H, D]     queries are rotated in place and must be contiguous
    cos, sin                 [T, D / 2]    of every position, rounded to the same type: channel i turns with channel i + D / 2
    slots                    int64 [T]     cell page * page_size + offset of every token; a negative one writes nothing
    key_cache, value_cache   [pages, page_size, H, D], contiguous
    """
    _check_float("rope_cache", "queries", queries, 3)
    tokens, heads, dim = queries.shape
    _check(dim % 2 == 0, f"rope_cache: a head must have an even width, got {dim}")
    _check(key_cache.dim() == 4, f"rope_cache: key_cache must be [pages, page_size, H, D], got {list(key_cache.shape)}")
    cache_shape = [*key_cache.shape[:2], heads, dim]
    wanted = {name: (tensor, [tokens, heads, dim]) for name, tensor in (("keys", keys), ("values", values))}
    wanted |= {name: (tensor, [tokens, dim // 2]) for name, tensor in (("cos", cos), ("sin", sin))}
    wanted |= {"key_cache": (key_cache, cache_shape), "value_cache": (value_cache, cache_shape)}
    _check_like("rope_cache", queries, wanted)
    _check_index("rope_cache", "slots", slots, torch.int64, [tokens])
    for name, tensor in (("queries", queries), ("key_cache", key_cache), ("value_cache", value_cache)):
        _check(tensor.is_contiguous(), f"rope_cache: {name} is written in place and must be contiguous")
    with _as_input_error():
        torch.ops.optmem.rope_cache(queries, keys, values, cos, sin, slots, key_cache, value_cache)


@torch.library.impl(library, "rope_cache", "CPU")
def _rope_cache_cpu(
    queries: Tensor,
    keys: Tensor,
    values: Tensor,
    cos: Tensor,
    sin: Tensor,
    slots: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
) -> None:
    cpu = _cpp_for(queries)
    arguments = (queries, keys, values, cos, sin, slots, key_cache, value_cache)
    if cpu is None:
        return reference.rope_cache(*arguments)
    cpu.rope_cache(*map(_array, arguments), torch.get_num_threads())
    return None


@torch.library.register_fake("optmem::rope_cache")
def _rope_cache_fake(
    queries: Tensor,
    keys: Tensor,
    values: Tensor,
    cos: Tensor,
    sin: Tensor,
    slots: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
) -> None:
    return None


torch.library.impl(library, "rope_cache", "CUDA")(reference.rope_cache)
_described.append(_cpp_or_reference("rope_cache"))
_described.append(partial(_torch_on_cuda, "rope_cache"))


# --- paged_attention ------------------------------------------------------------------------------------------------------------

library.define(
    "paged_attention(Tensor queries, Tensor keys, Tensor values, Tensor table, Tensor starts, Tensor lengths, Tensor prompts, "
    "int window, float scale) -> Tensor"
)

PAGE_UNIT = 16  # a page holds a multiple of this many tokens


def paged_attention(
    queries: Tensor,
    keys: Tensor,
    values: Tensor,
    table: Tensor,
    starts: Tensor,
    lengths: Tensor,
    prompts: Tensor,
    window: int | None,
    scale: float,
) -> Tensor:
    """Causal attention of every sequence's last tokens over its pages: prefill, a chunk of it, one token, or drafts to verify.

    queries       [T, H, D]                    rotated; sequence b asks with starts[b] .. starts[b + 1]
    keys, values  [pages, page_size, H, D]     the queries' own are already in them; page_size is a multiple of 16
    table         int32 [B, max_pages]         page of every page_size tokens; entries that are not attended to may be anything
    starts        int64 [B + 1]
    lengths       int64 [B]                    tokens of the sequence in the cache, those asking counted
    prompts       int64 [B]                    its first tokens, which no window hides
    window                                     query i sees key j <= i if j < prompt or j > i - window; None sees all
    -> [T, H, D]

    Softmax and sums in fp32.  On CPU a query's result does not depend on what else is asked, bit for bit.  Cells of a page that
    is attended to must hold finite numbers up to the sequence's length.  Raises InputError where the table points outside.
    """
    _check_float("paged_attention", "queries", queries, 3)
    _check(keys.dim() == 4, f"paged_attention: keys must be [pages, page_size, H, D], got {list(keys.shape)}")
    page_size = keys.shape[1]
    _check(
        page_size > 0 and page_size % PAGE_UNIT == 0,
        f"paged_attention: a page must hold a multiple of {PAGE_UNIT} tokens, got {page_size}",
    )
    shape = [*keys.shape[:2], *queries.shape[1:]]
    _check_like("paged_attention", queries, {"keys": (keys, shape), "values": (values, shape)})
    _check(table.dim() == 2, f"paged_attention: table must be [B, max_pages], got {list(table.shape)}")
    sequences = table.shape[0]
    _check_index("paged_attention", "table", table, torch.int32, list(table.shape))
    _check_index("paged_attention", "starts", starts, torch.int64, [sequences + 1])
    for name, tensor in (("lengths", lengths), ("prompts", prompts)):
        _check_index("paged_attention", name, tensor, torch.int64, [sequences])
    _check(window is None or window > 0, f"paged_attention: window must be positive or None, got {window}")
    with _as_input_error():
        out: Tensor = torch.ops.optmem.paged_attention(queries, keys, values, table, starts, lengths, prompts, window or 0, scale)
    return out


@torch.library.impl(library, "paged_attention", "CPU")
def _paged_attention_cpu(
    queries: Tensor,
    keys: Tensor,
    values: Tensor,
    table: Tensor,
    starts: Tensor,
    lengths: Tensor,
    prompts: Tensor,
    window: int,
    scale: float,
) -> Tensor:
    cpu = _cpp_for(queries)
    inputs = (queries, keys, values, table, starts, lengths, prompts)
    if cpu is None:
        return reference.paged_attention(*inputs, window, scale)
    out = queries.new_empty(queries.shape)
    cpu.paged_attention(*map(_array, inputs), window, scale, _array(out), torch.get_num_threads())
    return out


@torch.library.register_fake("optmem::paged_attention")
def _paged_attention_fake(
    queries: Tensor,
    keys: Tensor,
    values: Tensor,
    table: Tensor,
    starts: Tensor,
    lengths: Tensor,
    prompts: Tensor,
    window: int,
    scale: float,
) -> Tensor:
    return queries.new_empty(queries.shape)


torch.library.impl(library, "paged_attention", "CUDA")(reference.paged_attention)
_described.append(_cpp_or_reference("paged_attention"))
_described.append(partial(_torch_on_cuda, "paged_attention"))


# --- route ----------------------------------------------------------------------------------------------------------------------

library.define("route(Tensor x, Tensor weight, int top_k) -> (Tensor, Tensor, Tensor, Tensor)")


class Routing(NamedTuple):
    """Which experts every token goes to.  A pair is token * top_k + slot."""

    ids: Tensor  # int32 [T, top_k]   the likeliest expert first, of equals the lower id
    weights: Tensor  # fp32 [T, top_k]   their softmax over all experts, not renormalised
    order: Tensor  # int32 [T * top_k]  the pairs, by expert
    starts: Tensor  # int32 [E + 1]     expert e owns order[starts[e]] .. order[starts[e + 1]]


def route(x: Tensor, weight: Tensor, top_k: int) -> Routing:
    """Choose experts: logits x weight^T and softmax in fp32, the top_k likeliest, greedily.

    x [T, D], weight [E, D] of the same type
    """
    _check_float("route", "x", x, 2)
    _check(weight.dim() == 2, f"route: weight must be [E, {x.shape[1]}], got {list(weight.shape)}")
    _check_like("route", x, {"weight": (weight, [weight.shape[0], x.shape[1]])})
    _check(1 <= top_k <= weight.shape[0], f"route: top_k must be 1 to {weight.shape[0]}, got {top_k}")
    return Routing(*torch.ops.optmem.route(x, weight, top_k))


@torch.library.impl(library, "route", "CPU")
def _route_cpu(x: Tensor, weight: Tensor, top_k: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    cpu = _cpp_for(x)
    if cpu is None:
        return reference.route(x, weight, top_k)
    scores = _linear_rows_cpu(x, weight, torch.float32)
    out: tuple[Tensor, Tensor, Tensor, Tensor] = _route_fake(x, weight, top_k)
    cpu.route(_array(scores), *map(_array, out), torch.get_num_threads())
    return out


@torch.library.register_fake("optmem::route")
def _route_fake(x: Tensor, weight: Tensor, top_k: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    shape, wide = (x.shape[0], top_k), torch.float64 if x.dtype == torch.float64 else torch.float32
    ids, weights = x.new_empty(shape, dtype=torch.int32), x.new_empty(shape, dtype=wide)
    order = x.new_empty((x.shape[0] * top_k,), dtype=torch.int32)
    return ids, weights, order, x.new_empty((weight.shape[0] + 1,), dtype=torch.int32)


torch.library.impl(library, "route", "CUDA")(reference.route)
_described.append(_cpp_or_reference("route"))
_described.append(partial(_torch_on_cuda, "route"))


# --- expert_mlp -----------------------------------------------------------------------------------------------------------------

library.define("expert_mlp(Tensor x, Tensor gate_up, Tensor down, Tensor weights, Tensor order, Tensor starts) -> Tensor")


def expert_mlp(x: Tensor, gate_up: Tensor, down: Tensor, routing: Routing) -> Tensor:
    """Every token through its experts: sum of weight * down(silu(gate(x)) * up(x)), in fp32, rounded once.

    x        [T, D]
    gate_up  [E, 2 * F, D]    an expert's gate rows, then its up rows
    down     [E, D, F]
    -> [T, D]

    On CPU a token's result does not depend on the others, bit for bit.
    """
    _check_float("expert_mlp", "x", x, 2)
    _check(down.dim() == 3, f"expert_mlp: down must be [E, {x.shape[1]}, F], got {list(down.shape)}")
    tokens, hidden = x.shape
    experts, _, width = down.shape
    shapes = {"gate_up": (gate_up, [experts, 2 * width, hidden]), "down": (down, [experts, hidden, width])}
    _check_like("expert_mlp", x, shapes)
    _check(
        routing.weights.dim() == 2 and routing.weights.shape[0] == tokens and routing.weights.shape[1] > 0,
        f"expert_mlp: weights must be [{tokens}, top_k], got {list(routing.weights.shape)}",
    )
    _check_index("expert_mlp", "order", routing.order, torch.int32, [routing.weights.numel()])
    _check_index("expert_mlp", "starts", routing.starts, torch.int32, [experts + 1])
    with _as_input_error():
        out: Tensor = torch.ops.optmem.expert_mlp(x, gate_up, down, routing.weights, routing.order, routing.starts)
    return out


@torch.library.impl(library, "expert_mlp", "CPU")
def _expert_mlp_cpu(x: Tensor, gate_up: Tensor, down: Tensor, weights: Tensor, order: Tensor, starts: Tensor) -> Tensor:
    cpu = _cpp_for(x)
    inputs = (x, gate_up, down, weights, order, starts)
    if cpu is None:
        return reference.expert_mlp(*inputs)
    out = x.new_empty(x.shape)
    cpu.expert_mlp(*map(_array, inputs), _array(out), torch.get_num_threads())
    return out


@torch.library.register_fake("optmem::expert_mlp")
def _expert_mlp_fake(x: Tensor, gate_up: Tensor, down: Tensor, weights: Tensor, order: Tensor, starts: Tensor) -> Tensor:
    return x.new_empty(x.shape)


torch.library.impl(library, "expert_mlp", "CUDA")(reference.expert_mlp)
_described.append(_cpp_or_reference("expert_mlp"))
_described.append(partial(_torch_on_cuda, "expert_mlp"))
