"""Every operator at once: torch's own checks of schema, fake and mutation, and a graph without a break through the checked way in.

A row for each way that an operator is called, and a test that none is left out.  What one computes is in its own file.
"""

from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._pytree import tree_map_only

from optmem import ops
from optmem.ops.registry import library
from optmem.testing import assert_equal, generator


@dataclass(frozen=True)
class Call:
    """One way to call an operator: through ops, which checks, and what that hands on."""

    name: str
    function: Any
    arguments: tuple[Any, ...]
    handed: tuple[Any, ...] | None = None  # where they are not the same
    options: dict[str, Any] | None = None

    def __call__(self, function):
        """With copies of the tensors, some of which an operator may write to: its results, and what became of them."""
        arguments = tree_map_only(torch.Tensor, torch.clone, list(self.arguments))
        results = function(*arguments, **(self.options or {}))
        return tensors_in(results) + tensors_in(arguments)


def tensors_in(value):
    if isinstance(value, torch.Tensor):
        return [value]
    return [tensor for each in value for tensor in tensors_in(each)] if isinstance(value, (tuple, list)) else []


def random(*shape):
    return torch.randn(shape, generator=generator(str(shape)))


def integers(*values, dtype=torch.int64):
    return torch.tensor(values, dtype=dtype)


def steps(*shape):
    return torch.randint(-127, 128, shape, generator=generator(str(shape)), dtype=torch.int8)


def calls():
    x, wide = random(5, 8), random(12, 8)
    scales = torch.rand(12, generator=generator("scales"))
    yield Call("linear", ops.linear, (x, wide, random(12), "gelu"))
    yield Call("linear", ops.linear, (x, wide, None, "none"))
    yield Call("linear_rows", ops.linear_rows, (x, wide, torch.float32))
    yield Call("linear_rows", ops.linear_rows, (x, steps(12, 8), torch.float32, scales))
    eight = ops.e4m3_rows(x)
    floats = random(12, 8).to(ops.E4M3)
    yield Call("e4m3_rows", lambda x: ops.e4m3_rows(x)[:2], (x,))
    for more in ((random(12), "gelu"), (None, "none")):
        handed = (*eight[:2], floats, scales, *more, torch.float32)
        yield Call("linear_e4m3", ops.linear_e4m3, (eight, floats, scales, *more), handed)
    yield Call("rms_norm", ops.rms_norm, (x, x[0], 1e-6))
    yield Call("add_rms_norm", ops.add_rms_norm, (x, x + 1, x[0], 1e-6))
    yield Call("layer_norm", ops.layer_norm, (x, x[0], x[1], 1e-6))
    yield Call("add_layer_norm", ops.add_layer_norm, (x, x + 1, x[0], x[1], 1e-6))
    yield Call("silu_mul", ops.silu_mul, (x, x + 1))
    yield from of_the_cache()
    yield from of_experts()
    yield from of_pages()
    yield from of_grids()
    told = (integers([1, 2], [1, 2]), integers(2, 0), integers(2, 0), integers([3], [4]))
    for is_sampled, confidence in ((False, 1.0), (True, 2.0)):
        heat = (torch.tensor([0.0, 0.5 * is_sampled]), torch.ones(2), torch.tensor([0.0, 0.5], dtype=torch.float64))
        options = {"most_guard": 3, "is_sampled": is_sampled, "confidence_temperature": confidence}
        handed = (random(2, 9), *told, *heat)
        yield Call("pick_token", ops.pick_token, handed, (*handed, *options.values()), options)


def of_the_cache():
    """Three tokens of two sequences, the last of which is written nowhere; heads of 8."""
    q, k, v, keys, values = random(3, 2, 8), random(3, 2, 8), random(3, 2, 8) + 1, random(4, 16, 2, 8), random(4, 16, 2, 8) + 1
    turned = (q, k, v, random(3, 4), random(3, 4), integers(0, 17, -1))
    yield Call("rope_cache", ops.rope_cache, (*turned, keys, values))
    table = integers([1, -7], [2, 0], dtype=torch.int32)
    places = (table, integers(0, 2, 3), integers(2, 18), integers(2, 5))
    yield Call("paged_attention", ops.paged_attention, (q, keys, values, *places, 7, 0.35))
    yield Call("paged_attention", ops.paged_attention, (q, keys, values, *places, None, 0.35), (q, keys, values, *places, 0, 0.35))
    eight = (steps(4, 16, 2, 8), steps(4, 16, 2, 8))
    scales = ops.CacheScales(random(4, 16, 2).abs(), random(4, 16, 2).abs())
    yield Call("rope_cache", ops.rope_cache, (*turned, *eight, scales), (*turned, *eight, *scales))
    handed = (q, *eight, *places, 7, 0.35, *scales)
    yield Call("paged_attention", ops.paged_attention, (q, *eight, *places, 7, 0.35, scales), handed)


def of_experts():
    x, gate_up, down = random(3, 6), random(4, 10, 6), random(4, 6, 5)
    routing = ops.route(x, random(4, 6), 2)
    yield Call("route", ops.route, (x, random(4, 6), 2))
    handed = (routing.weights, routing.order, routing.starts)
    yield Call("expert_mlp", ops.expert_mlp, (x, gate_up, down, routing), (x, gate_up, down, *handed))
    small, scales = (steps(4, 10, 6), steps(4, 6, 5)), ops.ExpertScales(random(4, 10).abs(), random(4, 6).abs())
    yield Call("expert_mlp", ops.expert_mlp, (x, *small, routing, scales), (x, *small, *handed, *scales))
    floats = [tensor.to(ops.E4M3) for tensor in (gate_up, down)]
    yield Call("expert_mlp", ops.expert_mlp, (x, *floats, routing, scales), (x, *floats, *handed, *scales))


def of_pages():
    bytes_of = {channels: torch.randint(0, 256, (2, 32, 48, channels), dtype=torch.uint8) for channels in (1, 3)}
    for pixels in bytes_of.values():
        yield Call("patch_embed", ops.patch_embed, (pixels, random(8, 3, 16, 16), random(8), random(2, 3, 8)))
    yield Call("resample", ops.resample, (bytes_of[3], 20, 7))
    boxes = [ops.SheetBox(0, 0, 9, 20), ops.SheetBox(0, 20, 20, 4)]
    sides = [side for box in boxes for side in box]
    pages = [bytes_of[1][0], bytes_of[3][1]]
    yield Call("contact_sheet", ops.contact_sheet, (pages, boxes, 24), (pages, sides, 24))
    glyphs = integers([0, 2, 3], [6, 1, 1], dtype=torch.int32)
    placed = integers([0, 1, 1], [1, 0, 4], dtype=torch.int32)
    yield Call("draw_text", ops.draw_text, (torch.full((7,), 9, dtype=torch.uint8), glyphs, placed, integers(0, 1, 2), 4, 5))


def of_grids():
    qkv = random(2, 3, 5, 24)
    yield Call("global_attention", ops.global_attention, (qkv, random(5, 4), random(9, 4)))
    yield Call("window_attention", ops.window_attention, (qkv, random(24), random(7, 4), random(7, 4) + 1))
    for prefix in (6, 0, 2):
        yield Call("attention", ops.attention, (random(2, 4, 6, 8), random(2, 6, 3, 8), random(2, 6, 3, 8) + 1, prefix))
    scale = random(4)
    weights = (random(4, 6, 1, 1), scale, scale, random(4, 4, 3, 3), scale, scale, random(8, 4, 3, 3), random(10, 8, 3, 3))
    yield Call("compress", ops.compress, (random(1, 5, 6, 6), *weights))


OTHER_CHECKS = ("test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")


def comparable(tensor):
    """Without NaN; of 8-bit floats the bits."""
    return tensor.view(torch.uint8) if tensor.dtype == ops.E4M3 else tensor.nan_to_num()


LAYOUT = (lambda tensor: tensor.shape, lambda tensor: tensor.dtype, lambda tensor: tensor.stride())
CALLS = list(calls())
IDS = [f"{call.name}-{at}" for at, call in enumerate(CALLS)]


def test_every_operator_is_here():
    defined = {name.partition("::")[2].partition(".")[0] for name in library._op_defs}
    assert {call.name for call in CALLS} == defined


@pytest.mark.parametrize("call", CALLS, ids=IDS)
def test_opcheck(call):
    operator, handed = getattr(torch.ops.optmem, call.name), call.handed or call.arguments
    if not any(tensor.dtype == ops.E4M3 for tensor in tensors_in(list(handed))):
        torch.library.opcheck(operator, handed)
        return
    # Torch compares arguments before and after by a product that it does not have for this type.
    torch.library.opcheck(operator, handed, test_utils=OTHER_CHECKS)
    before = [tensor.clone() for tensor in tensors_in(list(handed))]
    operator(*handed)
    for tensor, was in zip(tensors_in(list(handed)), before, strict=True):
        assert_equal(comparable(tensor), comparable(was))


@pytest.mark.parametrize("is_dynamic", [False, True], ids=["fixed", "dynamic"])
@pytest.mark.parametrize("call", CALLS, ids=IDS)
def test_a_graph_has_no_break(call, is_dynamic):
    torch._dynamo.reset()
    compiled = torch.compile(call.function, fullgraph=True, backend="aot_eager", dynamic=is_dynamic)
    with torch.no_grad():
        for actual, expected in zip(call(compiled), call(call.function), strict=True):
            assert_equal(comparable(actual), comparable(expected))


@pytest.mark.parametrize("call", CALLS, ids=IDS)
def test_a_fake_says_what_comes(call):
    """Shape, type and strides, without a number in memory: what a graph is recorded with."""
    expected = call(call.function)
    with FakeTensorMode() as mode, torch.no_grad():
        arguments = tree_map_only(torch.Tensor, mode.from_tensor, list(call.arguments))
        results = call.function(*arguments, **(call.options or {}))
    found = tensors_in(results) + tensors_in(arguments)
    shapes, types, strides = ([[getter(each) for each in tensors] for tensors in (found, expected)] for getter in LAYOUT)
    assert shapes[0] == shapes[1]
    assert types[0] == types[1]
    assert strides[0] == strides[1]
