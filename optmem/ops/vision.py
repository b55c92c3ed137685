"""Operators of the vision encoder: patch_embed, attention over grids in its two forms, and compress."""

from __future__ import annotations

from types import ModuleType

import torch
from torch import Tensor

from optmem import blockwise, reference
from optmem.kernels.launch import WIDEST_GRID, WIDEST_GRID_HEAD, WIDEST_WINDOW
from optmem.native import native
from optmem.ops.registry import (
    Implementation,
    as_array,
    check,
    check_same_kind,
    cpp_for,
    described,
    differentiate,
    library,
    triton_module,
    triton_or_reference,
)

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
    check(pixels.dtype == torch.uint8, f"patch_embed: pixels must be torch.uint8, got {pixels.dtype}")
    check(
        pixels.dim() == 4 and pixels.shape[3] in (1, 3),
        f"patch_embed: pixels must be [B, H, W, C] with C 1 or 3, got {list(pixels.shape)}",
    )
    height, width = pixels.shape[1:3]
    check(
        height > 0 and width > 0 and height % 16 == 0 and width % 16 == 0,
        f"patch_embed: height and width must be multiples of 16, got {height}x{width}",
    )
    check(
        weight.dtype in (torch.float32, torch.bfloat16, torch.float16),
        f"patch_embed: weight must be torch.float32, torch.bfloat16 or torch.float16, got {weight.dtype}",
    )
    check(
        weight.dim() == 4 and weight.shape[1:] == (3, 16, 16),
        f"patch_embed: weight must be [D, 3, 16, 16], got {list(weight.shape)}",
    )
    wanted = {"bias": [weight.shape[0]], "positions": [height // 16, width // 16, weight.shape[0]]}
    for name, tensor in (("bias", bias), ("positions", positions)):
        check(tensor.dtype == weight.dtype, f"patch_embed: {name} must be {weight.dtype} as the weight is, got {tensor.dtype}")
        check(list(tensor.shape) == wanted[name], f"patch_embed: {name} must be {wanted[name]}, got {list(tensor.shape)}")
    for name, tensor in (("weight", weight), ("bias", bias), ("positions", positions)):
        check(tensor.device == pixels.device, f"patch_embed: {name} must be on {pixels.device}, got {tensor.device}")
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
    kernel = triton_module("patch_embed")
    if kernel is None:
        return reference.patch_embed(pixels, weight, bias, positions)
    out: Tensor = _patch_embed_fake(pixels, weight, bias, positions)
    kernel.patch_embed(pixels, weight, bias, positions, out)
    return out


@torch.library.register_fake("optmem::patch_embed")
def _patch_embed_fake(pixels: Tensor, weight: Tensor, bias: Tensor, positions: Tensor) -> Tensor:
    return weight.new_empty((pixels.shape[0], *positions.shape))


differentiate("patch_embed", reference.patch_embed)
described.append(lambda: Implementation("patch_embed", "cpu", "reference", "plain torch, where a projection is already good"))
described.append(triton_or_reference("patch_embed"))


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
        check(list(table.shape) == wanted, f"global_attention: {name} must be {wanted}, got {list(table.shape)}")
    mixed: Tensor = torch.ops.optmem.global_attention(qkv.contiguous(), rel_pos_h.contiguous(), rel_pos_w.contiguous())
    return mixed


def _check_grid(operator: str, qkv: Tensor, rel_pos_h: Tensor, rel_pos_w: Tensor) -> None:
    check(
        qkv.dim() == 4 and qkv.shape[1] > 0 and qkv.shape[2] > 0,
        f"{operator}: qkv must be [B, h, w, 3 D] with h and w at least 1, got {list(qkv.shape)}",
    )
    for name, table in (("rel_pos_h", rel_pos_h), ("rel_pos_w", rel_pos_w)):
        check(table.dim() == 2 and table.shape[1] > 0, f"{operator}: {name} must be [2 side - 1, d], got {list(table.shape)}")
    check(
        qkv.shape[3] > 0 and qkv.shape[3] % (3 * rel_pos_h.shape[1]) == 0,
        f"{operator}: channels of qkv must be a multiple of 3 * {rel_pos_h.shape[1]}, got {qkv.shape[3]}",
    )
    check_same_kind(operator, qkv=qkv, rel_pos_h=rel_pos_h, rel_pos_w=rel_pos_w)


def _grid_attention_for(qkv: Tensor, rel_pos_h: Tensor) -> ModuleType | None:
    """optmem._cpu, where its attention over grids serves this type and width of a head."""
    cpu = cpp_for(qkv) if qkv.dtype == torch.bfloat16 else None
    return cpu if cpu is not None and cpu.has_grid_attention(rel_pos_h.shape[1]) else None


def _in_cpp(cpu: ModuleType, qkv: Tensor, bias: Tensor, rel_pos_h: Tensor, rel_pos_w: Tensor) -> Tensor:
    """Attention inside windows of the tables' sides."""
    out = qkv.new_empty((*qkv.shape[:3], qkv.shape[3] // 3))
    cpu.grid_attention(*map(as_array, (qkv, bias, rel_pos_h, rel_pos_w, out)), torch.get_num_threads())
    return out


def _grid_attention_served(operator: str) -> Implementation:
    """bf16 in C++ where the instructions are; else, and for other types, plain torch in blocks."""
    cpu = native("_cpu").module
    if cpu is not None and cpu.has_grid_attention(64):
        return Implementation(operator, "cpu", "cpp", "bf16 with heads of 16 to 64; else blockwise.py")
    return Implementation(operator, "cpu", "torch", "blockwise.py, logits that stay in the cache")


def _grid_attention_on_cuda(operator: str, what: str) -> Implementation:
    """Triton for what its registers hold, and for anything else plain torch in blocks."""
    if triton_module(operator) is None:
        return Implementation(operator, "cuda", "torch", "blockwise.py: triton is not installed")
    reason = f"kernels/{operator}.py: {what}, heads up to {WIDEST_GRID_HEAD}; else blockwise.py"
    return Implementation(operator, "cuda", "triton", reason)


@torch.library.impl(library, "global_attention", "CPU")
def _global_attention_cpu(qkv: Tensor, rel_pos_h: Tensor, rel_pos_w: Tensor) -> Tensor:
    cpu = _grid_attention_for(qkv, rel_pos_h)
    if cpu is not None:
        nothing_beyond = qkv.new_empty(qkv.shape[3])
        return _in_cpp(cpu, qkv, nothing_beyond, rel_pos_h, rel_pos_w)
    return blockwise.global_attention(qkv, rel_pos_h, rel_pos_w)


@torch.library.impl(library, "global_attention", "CUDA")
def _global_attention_cuda(qkv: Tensor, rel_pos_h: Tensor, rel_pos_w: Tensor) -> Tensor:
    kernel = triton_module("global_attention")
    if kernel is None or qkv.shape[2] > WIDEST_GRID or rel_pos_h.shape[1] > WIDEST_GRID_HEAD:
        return blockwise.global_attention(qkv, rel_pos_h, rel_pos_w)
    out: Tensor = _global_attention_fake(qkv, rel_pos_h, rel_pos_w)
    kernel.global_attention(qkv, rel_pos_h, rel_pos_w, out)
    return out


@torch.library.register_fake("optmem::global_attention")
def _global_attention_fake(qkv: Tensor, rel_pos_h: Tensor, rel_pos_w: Tensor) -> Tensor:
    return qkv.new_empty((*qkv.shape[:3], qkv.shape[3] // 3))


differentiate("global_attention", reference.global_attention)
described.append(lambda: _grid_attention_served("global_attention"))
described.append(lambda: _grid_attention_on_cuda("global_attention", f"grids up to {WIDEST_GRID} across"))


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
    check(
        rel_pos_w.shape == rel_pos_h.shape,
        f"window_attention: rel_pos_w must be {list(rel_pos_h.shape)} as rel_pos_h is, got {list(rel_pos_w.shape)}",
    )
    check(rel_pos_h.shape[0] % 2 == 1, f"window_attention: rel_pos_h must have 2 side - 1 rows, got {rel_pos_h.shape[0]}")
    check(list(bias.shape) == [qkv.shape[3]], f"window_attention: bias must be [{qkv.shape[3]}], got {list(bias.shape)}")
    check_same_kind("window_attention", qkv=qkv, bias=bias)
    inputs = [tensor.contiguous() for tensor in (qkv, bias, rel_pos_h, rel_pos_w)]
    mixed: Tensor = torch.ops.optmem.window_attention(*inputs)
    return mixed


@torch.library.impl(library, "window_attention", "CPU")
def _window_attention_cpu(qkv: Tensor, bias: Tensor, rel_pos_h: Tensor, rel_pos_w: Tensor) -> Tensor:
    cpu = _grid_attention_for(qkv, rel_pos_h)
    if cpu is not None:
        return _in_cpp(cpu, qkv, bias, rel_pos_h, rel_pos_w)
    return blockwise.window_attention(qkv, bias, rel_pos_h, rel_pos_w)


@torch.library.impl(library, "window_attention", "CUDA")
def _window_attention_cuda(qkv: Tensor, bias: Tensor, rel_pos_h: Tensor, rel_pos_w: Tensor) -> Tensor:
    kernel = triton_module("window_attention")
    if kernel is None or rel_pos_h.shape[0] > 2 * WIDEST_WINDOW - 1 or rel_pos_h.shape[1] > WIDEST_GRID_HEAD:
        return blockwise.window_attention(qkv, bias, rel_pos_h, rel_pos_w)
    out: Tensor = _window_attention_fake(qkv, bias, rel_pos_h, rel_pos_w)
    kernel.window_attention(qkv, bias, rel_pos_h, rel_pos_w, out)
    return out


@torch.library.register_fake("optmem::window_attention")
def _window_attention_fake(qkv: Tensor, bias: Tensor, rel_pos_h: Tensor, rel_pos_w: Tensor) -> Tensor:
    return qkv.new_empty((*qkv.shape[:3], qkv.shape[3] // 3))


differentiate("window_attention", reference.window_attention)
described.append(lambda: _grid_attention_served("window_attention"))
described.append(lambda: _grid_attention_on_cuda("window_attention", f"windows up to {WIDEST_WINDOW} across"))


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
    check(
        patches.dim() == 4 and 0 not in patches.shape[1:],
        f"compress: patches must be [B, h, w, D] with h, w and D at least 1, got {list(patches.shape)}",
    )
    neck = neck_0.shape[0]
    wanted = {name: [neck] for name in ("scale_1", "shift_1", "scale_3", "shift_3")}
    wanted |= {"neck_0": [neck, patches.shape[3], 1, 1], "neck_2": [neck, neck, 3, 3]}
    wanted |= {"net_2": [net_2.shape[0], neck, 3, 3], "net_3": [net_3.shape[0], net_2.shape[0], 3, 3]}
    for name, tensor in weights.items():
        check(list(tensor.shape) == wanted[name], f"compress: {name} must be {wanted[name]}, got {list(tensor.shape)}")
    check_same_kind("compress", patches=patches, **weights)
    # Weights that are stored channels last stay so: on CUDA that saves a copy of each.
    inputs = [tensor if _is_channels_last(tensor) else tensor.contiguous() for tensor in (patches, *weights.values())]
    compressed: Tensor = torch.ops.optmem.compress(*inputs)
    return compressed


def _is_channels_last(weight: Tensor) -> bool:
    return weight.shape[2:] == (3, 3) and weight.dim() == 4 and weight.is_contiguous(memory_format=torch.channels_last)


@torch.library.impl(library, "compress", "CompositeExplicitAutograd")
def _compress(*inputs: Tensor) -> Tensor:
    return reference.compress(*inputs)


@torch.library.impl(library, "compress", "CUDA")
def _compress_cuda(*inputs: Tensor) -> Tensor:
    kernel = triton_module("compress")
    compressed: Tensor = reference.compress(*inputs) if kernel is None else kernel.compress(*inputs)
    return compressed


@torch.library.register_fake("optmem::compress")
def _compress_fake(patches: Tensor, *weights: Tensor) -> Tensor:
    num_grids, height, width, _ = patches.shape
    return patches.new_empty((num_grids, (height + 3) // 4, (width + 3) // 4, weights[-1].shape[0]))


differentiate("compress", reference.compress)
described.append(lambda: Implementation("compress", "cpu", "reference", "plain torch, where a convolution is already good"))
described.append(triton_or_reference("compress"))
