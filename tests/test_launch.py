"""Block sizes over all shapes that the families produce: what is chosen was compiled by the gate, and fits on a multiprocessor.

Shapes are those of the three public models and of nano: views of every size in batches of 1 to 64, decode steps of 1 to 2,048 texts
and prompts beside them.  A launch is compared with the gate's cases by its kernel, the width of its numbers and its tile.
"""

import itertools
from importlib import import_module
from pathlib import Path

import pytest
import torch

from optmem.kernels import launch
from optmem.model import layers as layers_of_encoders
from optmem.model.config_json import public_config
from optmem.model.decoder import Decoder, Linear
from optmem.model.encoder import Encoder

pytest.importorskip("triton")

ROOT = Path(__file__).resolve().parents[1]
MODELS = [public_config(family) for family in ("deepseek-ocr", "unlimited-ocr", "deepseek-ocr-2", "nano")]
SIDES = (512, 640, 768, 1024, 1280)
VIEWS = range(1, 65)
TOKENS = (*range(1, 2049), 2560, 3072, 4096)  # of a pass: up to 2,048 texts, and the prompts of some beside them
TYPES = (torch.bfloat16, torch.float32)
SHARED = {"sm_80": 163 * 1024, "sm_90": 227 * 1024}  # bytes that one block may have
OF_SHAPE = {"C", "D", "E", "F", "H", "K", "N", "S", "W", "STRIDE", "GROUP", "TOP_K", "PAGE"}  # not of the tile

MODULES = {path.stem: import_module(f"optmem.kernels.{path.stem}") for path in sorted((ROOT / "kernels").glob("*.py"))}


def meta(*shape, dtype=torch.bfloat16):
    return torch.empty(shape, dtype=dtype, device="meta")


def tile_of(options):
    return tuple(sorted((name, value) for name, value in options.items() if name not in OF_SHAPE))


def described(kernel, arguments, options):
    """What is compared: two that are equal are compiled to the same code but for the sizes that it counts to."""
    widths = tuple(value.element_size() if isinstance(value, torch.Tensor) else None for value in arguments)
    return kernel.fn.__name__, widths, tile_of(options)


def gate(name):
    return {described(case.kernel, case.arguments, case.options) for case in MODULES[name].gate_cases()}


# --- what the operators are given -----------------------------------------------------------------------------------------------


def global_attention(dtype):
    module = MODULES["global_attention"]
    for model in MODELS:
        one = model.stage_one
        for side in SIDES if one.global_layers else ():
            grid, head_dim = side // 16, one.width // one.heads
            qkv, table = meta(1, grid, grid, 3 * one.width, dtype=dtype), meta(2 * grid - 1, head_dim, dtype=dtype)
            tiles = {launch.global_attention_tile(views * one.heads, grid, grid, dtype.itemsize) for views in VIEWS}
            for tile in tiles:
                yield module.global_attention_kernel, *module.specialise(qkv, table, table, qkv[..., : one.width], tile)


def window_attention(dtype):
    module = MODULES["window_attention"]
    for one in (model.stage_one for model in MODELS):
        qkv = meta(1, 64, 64, 3 * one.width, dtype=dtype)
        table = meta(2 * one.window - 1, one.width // one.heads, dtype=dtype)
        tile = launch.window_attention_tile(one.window, dtype.itemsize)
        yield module.window_attention_kernel, *module.specialise(qkv, qkv[0, 0, 0], table, table, qkv[..., : one.width], tile)


def attention(dtype):
    module = MODULES["attention"]
    for model in MODELS:
        for side in SIDES:
            cells = (side // 64) ** 2
            if model.clip is not None:
                queries, heads, kv_heads, width = cells + 1, model.clip.heads, model.clip.heads, model.clip.width
            else:
                queries, heads, kv_heads, width = 2 * cells, model.query.heads, model.query.kv_heads, model.query.width
            query = meta(1, queries, heads, width // heads, dtype=dtype)
            tile = launch.attention_tile(queries, width // heads, dtype.itemsize)
            yield module.attention_kernel, *module.specialise(query, query[:, :, :kv_heads], query[:, :, :kv_heads], 0, query, tile)


def layer_norm(dtype):
    module = MODULES["layer_norm"]
    widths = {width for model in MODELS for width in (model.stage_one.width, model.stage_one.neck_width)}
    for width in widths | {model.clip.width for model in MODELS if model.clip is not None}:
        x = meta(2, width, dtype=dtype)
        for more in (None, x):
            yield module.layer_norm_kernel, *module.specialise(x, more, x[0], x[0], 1e-6, more, x, launch.layer_norm_tile(width))


def compress(dtype):
    module = MODULES["compress"]
    for one in {model.stage_one for model in MODELS}:
        for side in SIDES:
            grid = side // 16
            for stride, channels, width in (
                (1, one.neck_width, one.neck_width),
                (2, one.neck_width, one.channels[0]),
                (2, *one.channels),
            ):
                grid //= stride
                for tile in {launch.convolution_tile(views * grid * grid, width, channels, dtype.itemsize) for views in VIEWS}:
                    pixels, weight = (
                        meta(1, stride * grid, stride * grid, channels, dtype=dtype),
                        meta(width, 3, 3, channels, dtype=dtype),
                    )
                    yield (
                        module.convolve_kernel,
                        *module.specialise(pixels, weight, meta(1, grid, grid, width, dtype=dtype), stride, tile),
                    )


def patch_embed(dtype):
    module = MODULES["patch_embed"]
    for width in {model.stage_one.width for model in MODELS}:
        for side in SIDES:
            grid = side // 16
            weights = (meta(width, 3, 16, 16, dtype=dtype), meta(width, dtype=dtype), meta(grid, grid, width, dtype=dtype))
            for tile in {launch.patch_embed_tile(views * grid * grid, width, dtype.itemsize) for views in VIEWS}:
                for channels in (1, 3):
                    pixels = meta(1, side, side, channels, dtype=torch.uint8)
                    arguments, options = module.specialise(pixels, *weights, meta(1, grid, grid, width, dtype=dtype), tile)
                    yield module.patch_embed_kernel, arguments, options


def linear(dtype):
    module = MODULES["linear"]
    for is_quick in (False, True):
        yield module.linear_activation_kernel, (meta(1, dtype=dtype), 1), {"IS_QUICK": is_quick, "BLOCK_N": module.BLOCK}


def e4m3_rows(dtype):
    """The tokens of every linear layer that may be held as 8-bit floats, and what stands between the products of experts."""
    module = MODULES["e4m3_rows"]
    for width in {width_in for _, width_in, _, _ in layers()} | {model.decoder.expert_width for model in MODELS}:
        x, steps = meta(2, width, dtype=dtype), meta(2, width, dtype=torch.float8_e4m3fn)
        scales = meta(2, dtype=torch.float32)
        yield module.e4m3_rows_kernel, *module.specialise(x, steps, scales, launch.norm_tile(width))


def layers():
    """Out, in, whether it has a bias, and the function behind it, of every such layer: as quantize_e4m3 finds them."""
    with torch.device("meta"):
        parts = [part for model in MODELS for part in (Encoder(model), Decoder(model.decoder))]
    linear = [module for part in parts for module in part.modules() if isinstance(module, (layers_of_encoders.Linear, Linear))]
    return {
        (*module.weight.shape, getattr(module, "bias", None) is not None, getattr(module, "activation", "none"))
        for module in linear
    }


def linear_e4m3(dtype):
    module, held = MODULES["linear_e4m3"], torch.float8_e4m3fn
    for width, width_in, has_bias, activation in layers():
        bias = meta(width, dtype=dtype) if has_bias else None
        scales = meta(width, dtype=torch.float32)
        given = (meta(1, width_in, dtype=held), scales, meta(width, width_in, dtype=held), scales, bias)
        for tile in {launch.e4m3_tile(rows, width, width_in) for rows in (*TOKENS, 4096 * 64)}:
            yield module.linear_e4m3_kernel, *module.specialise(given, activation, meta(1, width, dtype=dtype), tile)


def rms_norm(dtype):
    module = MODULES["rms_norm"]
    sizes = {(model.decoder.hidden, is_sum) for model in MODELS for is_sum in (False, True)}
    for width, is_sum in sizes | {(model.query.width, False) for model in MODELS if model.query is not None}:
        x = meta(2, width, dtype=dtype)
        more = x if is_sum else None
        yield module.rms_norm_kernel, *module.specialise(x, more, x[0], more, x, 1e-6, launch.norm_tile(width))


def silu_mul(dtype):
    module = MODULES["silu_mul"]
    yield module.silu_mul_kernel, *module.specialise(*[meta(1, 6848, dtype=dtype)] * 3)


def rope_cache(dtype):
    module = MODULES["rope_cache"]
    for text in (model.decoder for model in MODELS):
        token, half = meta(1, text.heads, text.head_dim, dtype=dtype), meta(1, text.head_dim // 2, dtype=dtype)
        slots, cells = meta(1, dtype=torch.int64), meta(2, 16, text.heads, text.head_dim, dtype=dtype)
        yield module.rope_cache_kernel, *module.specialise(token, token, token, half, half, slots, cells, cells, None, None)


def paged_attention(dtype):
    module = MODULES["paged_attention"]
    for text, is_8bit in itertools.product((model.decoder for model in MODELS), {False, dtype.itemsize == 2}):
        queries = meta(80, text.heads, text.head_dim, dtype=dtype)
        cells = meta(2, 16, text.heads, text.head_dim, dtype=torch.int8 if is_8bit else dtype)
        scales = meta(2, 16, text.heads, dtype=torch.float32) if is_8bit else None
        told = [meta(size, dtype=torch.int64) for size in (5, 4, 4)]
        inputs = (queries, cells, cells, meta(4, 20, dtype=torch.int32), *told, scales, scales)
        tile = launch.paged_tile(text.head_dim, dtype.itemsize, is_prompt=True, is_8bit=is_8bit)
        plan = launch.paged_plan(80, 4, 320, tile.BLOCK_M)
        mixed = meta(1, dtype=torch.float32)
        yield module.paged_chunk_kernel, *module.specialise_chunk(inputs, mixed, mixed, plan, 0, 1.0)
        yield module.paged_combine_kernel, *module.specialise_combine(inputs, mixed, mixed, queries, plan, 0)
        yield module.paged_prompt_kernel, *module.specialise_prompt(inputs, queries, plan, 0, 1.0, tile)


def route(dtype):
    module = MODULES["route"]
    for text in (model.decoder for model in MODELS):
        x, weight = meta(1, text.hidden, dtype=dtype), meta(text.experts, text.hidden, dtype=dtype)
        ids = meta(1, text.top_k, dtype=torch.int32)
        yield module.route_choose_kernel, *module.specialise_choose(x, weight, ids, meta(1, text.top_k, dtype=torch.float32))
        pairs, starts = meta(1, dtype=torch.int32), meta(text.experts + 1, dtype=torch.int32)
        for tile in {launch.group_tile(tokens * text.top_k) for tokens in TOKENS}:
            yield module.route_group_kernel, *module.specialise_group(pairs, pairs, starts, tile)


def expert_mlp(dtype):
    yield from experts_held_as(dtype, dtype)
    yield from experts_held_as(dtype, torch.float8_e4m3fn)


def experts_held_as(dtype, held):
    module = MODULES["expert_mlp"]
    is_e4m3 = held != dtype
    for text in (model.decoder for model in MODELS):
        hidden, width, pairs = text.hidden, text.expert_width, text.top_k
        shapes = ((1, hidden), (text.experts, 2 * width, hidden), (text.experts, hidden, width), (pairs, width), (pairs, hidden))
        x, gate_up, down, inner, outputs = (meta(*shape, dtype=dtype) for shape in shapes)
        order, starts = (meta(size, dtype=torch.int32) for size in (pairs, text.experts + 1))
        taken, read, gate_up, down = (tensor.to(held) for tensor in (x, inner, gate_up, down))
        given = (taken, gate_up, down, meta(1, text.top_k, dtype=torch.float32), order, starts)
        scales = (meta(1, dtype=torch.float32),) * 2 if is_e4m3 else (None, None)
        yield module.expert_vector_into_kernel, *module.specialise_vector_into(given, inner, scales)
        yield module.expert_vector_out_of_kernel, *module.specialise_vector_out_of(given, read, x, scales)
        yield module.expert_sum_kernel, *module.specialise_sum(given, outputs, x)
        for tile in {launch.expert_tile(tokens * text.top_k, text.experts, held.itemsize) for tokens in TOKENS}:
            yield module.expert_into_kernel, *module.specialise_into(given, inner, tile, scales)
            yield module.expert_out_of_kernel, *module.specialise_out_of(given, read, outputs, tile, scales)


def pick_token(_dtype):
    module = MODULES["pick_token"]
    for vocab in {model.decoder.vocab_size for model in MODELS}:
        logits, whole, bits = meta(1, vocab, dtype=torch.float32), meta(1, dtype=torch.int64), meta(1, 1, dtype=torch.int32)
        stats = meta(1, launch.cdiv(vocab, launch.PICK.BLOCK_V), 4, dtype=torch.float32)
        for is_sampled, heat in ((False, 1.0), (False, 2.0), (True, 1.0), (True, 2.0)):
            yield module.pick_guard_kernel, *module.specialise_guard((whole[None], whole, whole, whole[None]), bits, vocab, 30)
            for banned in (None, bits):
                yield module.pick_scan_kernel, *module.specialise_scan(logits, banned, stats, bits, heat)
            tensors = (logits, stats, bits, whole, logits, whole, logits, logits)
            yield module.pick_finish_kernel, *module.specialise_finish(tensors, 30, is_sampled, heat)


OPERATORS = {
    function.__name__: function
    for function in (
        attention, compress, e4m3_rows, expert_mlp, global_attention, layer_norm, linear, linear_e4m3, paged_attention, patch_embed,
        pick_token, rms_norm, rope_cache, route, silu_mul, window_attention,
    )
}  # fmt: skip


def test_every_kernel_is_here():
    assert set(OPERATORS) == set(MODULES) - {"launch"}


@pytest.mark.parametrize("dtype", TYPES, ids=["bf16", "fp32"])
@pytest.mark.parametrize("name", OPERATORS)
def test_what_is_chosen_was_compiled(name, dtype):
    chosen = {described(*each) for each in OPERATORS[name](dtype)}
    assert chosen
    assert not chosen - gate(name), f"kernels/{name}.py: gate_cases() leaves out what its launcher chooses"


# --- what fits ------------------------------------------------------------------------------------------------------------------


def operand_bytes(kernel, options, itemsize):
    """Of the tiles that a pipeline keeps in shared memory: what is read in a step, as many times as there are stages."""
    size = {"BLOCK_M": 0, "BLOCK_K": 0, "num_stages": 1, **options}
    if "attention" in kernel or "paged" in kernel:  # queries once, keys and values in every stage
        keys = max(size.get("BLOCK_N", 0), size.get("TAIL", 0))
        return (size["BLOCK_M"] + 2 * size["num_stages"] * keys) * size["BLOCK_D"] * itemsize
    rows = size.get("BLOCK_T", size["BLOCK_M"])
    columns = size.get("BLOCK_N", size.get("BLOCK_E", size.get("BLOCK_D", 0)))
    matrices = 2 if "into" in kernel else 1  # gate and up
    return size["num_stages"] * (rows + matrices * columns) * size["BLOCK_K"] * itemsize


@pytest.mark.parametrize("dtype", TYPES, ids=["bf16", "fp32"])
@pytest.mark.parametrize("name", OPERATORS)
def test_what_is_chosen_fits(name, dtype):
    """By arithmetic; what the compiler makes of it is the gate's to say."""
    for kernel, arguments, options in OPERATORS[name](dtype):
        is_e4m3 = getattr(arguments[0], "dtype", None) == torch.float8_e4m3fn
        needed = operand_bytes(kernel.fn.__name__, options, 1 if is_e4m3 else dtype.itemsize)
        assert needed <= min(SHARED.values()), f"{kernel.fn.__name__} {options}: {needed} bytes"


def test_the_arithmetic_sees_a_tile_that_is_too_large():
    attention = {"BLOCK_M": 128, "BLOCK_N": 128, "BLOCK_D": 128, "num_stages": 3}
    assert operand_bytes("attention_kernel", attention, 2) == 224 * 1024
    assert operand_bytes("convolve_kernel", {"BLOCK_M": 128, "BLOCK_N": 256, "BLOCK_K": 64, "num_stages": 4}, 2) == 192 * 1024


@pytest.mark.parametrize("count", [*range(1, 18), 63, 64, 65, 257, 401, 1023, 1024, 1025, 6400])
def test_tiles_cover_what_they_are_chosen_for(count):
    assert count <= launch.power_of_two(count) < 2 * count
    assert max(16, count) <= launch.tile_side(count) < max(17, 2 * count)
    assert (launch.cdiv(count, 16) - 1) * 16 < count <= launch.cdiv(count, 16) * 16


def test_a_decode_step_is_planned_for_every_batch():
    """One token of every sequence: no kernel for prompts, a row for each, and chunks for the longest of 8,192 tokens."""
    for tokens in TOKENS:
        plan = launch.paged_plan(tokens, tokens, 8192, 64)
        assert (plan.rows, plan.chunks, plan.prompt_tiles) == (tokens, 32, 0)


def test_experts_get_blocks_for_any_spread():
    for tokens in TOKENS:
        pairs, tile = 6 * tokens, launch.expert_tile(6 * tokens, 64, 2)
        blocks = launch.expert_blocks(pairs, 64, tile.BLOCK_M)
        uneven = [pairs - 63, *[1] * 63] if pairs > 63 else [pairs, *[0] * 63]
        assert blocks >= sum(launch.cdiv(rows, tile.BLOCK_M) for rows in uneven)
