"""The vision encoder's operators on a GPU in bf16, at the shapes of full-size views, beside their floors and what torch offers.

    python bench/bench_gpu_vision.py [--only global_attention] [--list]

Answers are compared with fp64 first, on the last page of the batch that is timed.  Figures: gpu_timing.py.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from functools import partial

import torch
from gpu_e4m3 import linear_case
from gpu_timing import Case, Errors, Plan, compare, main
from torch import Tensor
from torch.nn.functional import conv2d, scaled_dot_product_attention

from optmem import ops, reference
from optmem.testing import (
    attention_inputs,
    compress_inputs,
    generator,
    global_attention_inputs,
    layer_norm_inputs,
    patch_embed_inputs,
    window_attention_inputs,
)

PAGES = {512: 16, 640: 16, 1024: 16, 1280: 8}  # views of a batch by their pixels
COMPILED = 1024  # the views at which torch.compile is measured too: it takes seconds for every shape
DTYPE = torch.bfloat16
HEADS, HEAD_DIM, WIDTH, WINDOW = 12, 64, 768, 14
CLIP_HEADS, CLIP_WIDTH = 16, 1024
Operator = Callable[..., Tensor | tuple[Tensor, ...]]


def results(of: Tensor | tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return (of,) if isinstance(of, Tensor) else of


def case(
    operator: str,
    side: int,
    inputs: Sequence[Tensor],
    others: dict[str, Operator],
    flops: int,
    per_page: int = 1,
    more: tuple[object, ...] = (),
) -> Case:
    """ops.<operator> over inputs, of which the first per_page have an entry for every page, beside other ways to the same.

    Of several results the last is compared.
    """
    run, meaning = getattr(ops, operator), getattr(reference, operator)
    pages = len(inputs[0])
    outs = results(run(*inputs, *more))
    if side == COMPILED and inputs[0].is_cuda:
        others = others | {"compiled": torch.compile(meaning, dynamic=False)}

    def check() -> Errors:
        last = [*(tensor[-1:] for tensor in inputs[:per_page]), *inputs[per_page:]]
        exact = meaning(*(tensor.double() if tensor.is_floating_point() else tensor for tensor in last), *more)
        ours, theirs, truth = (results(each)[-1] for each in (run(*inputs, *more), meaning(*last, *more), exact))
        return compare(ours[-1:], theirs, truth)

    theirs = {name: partial(other, *inputs, *more) for name, other in others.items()}
    moved = sum(tensor.nbytes for tensor in (*inputs, *outs))
    return Case(operator, f"{side} px x {pages}, bf16", DTYPE, partial(run, *inputs, *more), theirs, check, moved, flops)


# --- what torch offers ----------------------------------------------------------------------------------------------------------


def convolve_floats(pixels: Tensor, weight: Tensor, bias: Tensor, positions: Tensor) -> Tensor:
    images = reference.normalise(pixels.expand(-1, -1, -1, 3), weight.dtype).permute(0, 3, 1, 2)
    return conv2d(images, weight, bias, stride=16).permute(0, 2, 3, 1) + positions


def attention_with_bias(qkv: Tensor, rel_pos_h: Tensor, rel_pos_w: Tensor) -> Tensor:
    """The bias of every pair of patches in memory, and torch's own attention."""
    num_grids, height, width, channels = qkv.shape
    head_dim = rel_pos_h.shape[1]
    q, k, v = qkv.view(num_grids, height * width, 3, -1, head_dim).permute(2, 0, 3, 1, 4)
    on_grid = q.unflatten(2, (height, width))
    by_row = torch.einsum("bnhwd,hkd->bnhwk", on_grid, reference.relative_rows(rel_pos_h))
    by_column = torch.einsum("bnhwd,wkd->bnhwk", on_grid, reference.relative_rows(rel_pos_w))
    bias = (by_row[..., None] + by_column[..., None, :]).flatten(4).flatten(2, 3)
    return scaled_dot_product_attention(q, k, v, attn_mask=bias).transpose(1, 2).reshape(num_grids, height, width, channels // 3)


def windows_with_bias(qkv: Tensor, bias: Tensor, rel_pos_h: Tensor, rel_pos_w: Tensor) -> Tensor:
    """The same over windows that are padded and copied."""
    num_grids, height, width, channels = qkv.shape
    window = (rel_pos_h.shape[0] + 1) // 2
    windows = reference.to_windows(qkv, bias, window)
    rows, columns = windows.shape[1:3]
    mixed = attention_with_bias(windows.flatten(0, 2), rel_pos_h, rel_pos_w)
    mixed = mixed.view(num_grids, rows, columns, window, window, channels // 3).transpose(2, 3)
    return mixed.reshape(num_grids, rows * window, columns * window, channels // 3)[:, :height, :width].contiguous()


def torch_attention(query: Tensor, key: Tensor, value: Tensor, prefix: int) -> Tensor:
    mask = None
    if prefix < key.shape[1]:
        mask = reference.attention_mask(query.shape[1], key.shape[1], prefix, query.device)
    q, k, v = (tensor.transpose(1, 2) for tensor in (query, key, value))
    return scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=q.shape[1] != k.shape[1]).transpose(1, 2).contiguous()


# --- cases ----------------------------------------------------------------------------------------------------------------------


def patch_embed(side: int, pages: int, device: torch.device) -> Case:
    grid = side // 16
    inputs = patch_embed_inputs(pages, (grid, grid), 3, WIDTH, DTYPE, device)
    flops = 2 * pages * grid**2 * 768 * WIDTH

    def check() -> Errors:
        pixels, *parameters = inputs
        exact = reference.project_patches(
            reference.normalise(pixels[-1:], DTYPE).double(), *(tensor.double() for tensor in parameters)
        )
        return compare(ops.patch_embed(*inputs)[-1:], reference.patch_embed(pixels[-1:], *parameters), exact)

    made = case("patch_embed", side, inputs, {"convolution": convolve_floats}, flops)
    return Case(**(vars(made) | {"check": check}))  # exact arithmetic starts from pixels that the type can hold


def global_attention(side: int, pages: int, device: torch.device) -> Case:
    grid = side // 16
    inputs = global_attention_inputs(pages, (grid, grid), HEADS, HEAD_DIM, DTYPE, device)
    flops = pages * HEADS * HEAD_DIM * grid**2 * (4 * grid**2 + 2 * 2 * grid)  # products; rows and columns
    return case("global_attention", side, inputs, {"sdpa, bias in memory": attention_with_bias}, flops)


def window_attention(side: int, pages: int, device: torch.device) -> Case:
    grid = side // 16
    inputs = window_attention_inputs(pages, (grid, grid), WINDOW, HEADS, HEAD_DIM, DTYPE, device)
    lengths = [min(WINDOW, grid - start) for start in range(0, grid, WINDOW)]
    pairs = sum((height * width) ** 2 for height in lengths for width in lengths)  # that exist: padding has a closed form
    flops = pages * HEADS * HEAD_DIM * (4 * pairs + 2 * 2 * WINDOW * grid**2)
    return case("window_attention", side, inputs, {"sdpa, bias in memory": windows_with_bias}, flops)


def attention(side: int, pages: int, device: torch.device) -> Case:
    """CLIP's: a class vector before the cells."""
    tokens = (side // 64) ** 2 + 1
    inputs = attention_inputs(pages, tokens, tokens, (CLIP_HEADS, CLIP_HEADS), HEAD_DIM, DTYPE, device)
    flops = 4 * pages * tokens**2 * CLIP_WIDTH
    return case("attention", side, inputs, {"sdpa": torch_attention}, flops, per_page=3, more=(tokens,))


def mixed_attention(side: int, pages: int, device: torch.device) -> Case:
    """The second generation's: image tokens, then as many queries in order."""
    image = (side // 64) ** 2
    inputs = attention_inputs(pages, 2 * image, 2 * image, (14, 2), HEAD_DIM, DTYPE, device)
    pairs = 2 * image * image + image * (image + 1) // 2
    made = case("attention", side, inputs, {"sdpa": torch_attention}, 4 * pages * pairs * 896, per_page=3, more=(image,))
    return Case(**(vars(made) | {"shape": f"{side} px x {pages}, mixed mask, bf16"}))


def layer_norm(side: int, pages: int, device: torch.device) -> Case:
    x, *parameters = layer_norm_inputs(pages * (side // 16) ** 2, WIDTH, DTYPE, device)
    return case("layer_norm", side, [x.view(pages, -1, WIDTH), *parameters], {"torch": reference.layer_norm}, 0, more=(1e-6,))


def add_layer_norm(side: int, pages: int, device: torch.device) -> Case:
    x, *parameters = layer_norm_inputs(pages * (side // 16) ** 2, WIDTH, DTYPE, device)
    x = x.view(pages, -1, WIDTH)
    others: dict[str, Operator] = {"add, layer_norm": reference.add_layer_norm}
    return case("add_layer_norm", side, [x, x.flip(0), *parameters], others, 0, per_page=2, more=(1e-6,))


def linear(activation: ops.Activation, side: int, pages: int, device: torch.device) -> Case:
    """The first layer of an MLP: SAM's with the exact function, CLIP's with the quick one."""
    rows, width = ((side // 16) ** 2, WIDTH) if activation == "gelu" else ((side // 64) ** 2 + 1, CLIP_WIDTH)
    rng = generator(f"linear {side}")
    x = torch.randn(pages, rows, width, generator=rng)
    weight = torch.randn(4 * width, width, generator=rng) / width**0.5
    bias = torch.randn(4 * width, generator=rng)
    inputs = [tensor.to(device, DTYPE) for tensor in (x, weight, bias)]
    flops = 2 * pages * rows * width * 4 * width
    made = case("linear", side, inputs, {"torch": reference.linear}, flops, more=(activation,))
    return Case(**(vars(made) | {"shape": f"{side} px x {pages}, {activation}, bf16"}))


def linear_e4m3(activation: ops.Activation, side: int, pages: int, device: torch.device) -> Case:
    """The same layers of 8-bit floats."""
    rows, width = ((side // 16) ** 2, WIDTH) if activation == "gelu" else ((side // 64) ** 2 + 1, CLIP_WIDTH)
    shape = f"{side} px x {pages}, {activation}"
    return linear_case(shape, (pages * rows, width, 4 * width), activation, device, DTYPE, has_bias=True)


def compress(side: int, pages: int, device: torch.device) -> Case:
    grid, neck, middle, last = side // 16, 256, 512, 1024
    inputs = compress_inputs(pages, (grid, grid), (WIDTH, neck, middle, last), DTYPE, device)
    per_patch = WIDTH * neck + 9 * neck * neck + 9 * neck * middle // 4 + 9 * middle * last // 16
    return case("compress", side, inputs, {"cudnn": reference.compress}, 2 * pages * grid**2 * per_patch)


MAKERS = {
    "patch_embed": patch_embed,
    "window_attention": window_attention,
    "global_attention": global_attention,
    "compress": compress,
    "attention": attention,
    "attention, mixed mask": mixed_attention,
    "layer_norm": layer_norm,
    "add_layer_norm": add_layer_norm,
    "linear, gelu": partial(linear, "gelu"),
    "linear, quick_gelu": partial(linear, "quick_gelu"),
    "linear_e4m3, gelu": partial(linear_e4m3, "gelu"),
    "linear_e4m3, quick_gelu": partial(linear_e4m3, "quick_gelu"),
}


def plans(device: torch.device) -> list[Plan]:
    return [(f"{name} {side} px", partial(make, side, PAGES[side], device)) for name, make in MAKERS.items() for side in PAGES]


if __name__ == "__main__":
    sys.exit(main("vision", plans(torch.device("cuda"))))
