"""route: the chosen experts, their raw weights and the grouping; in C++ and in Triton."""

from importlib import import_module

import pytest
import torch

from optmem import ops, reference
from optmem.errors import InputError
from optmem.kernels.launch import GROUP_TILES, group_tile, route_tile
from optmem.ops import experts as expert_ops
from optmem.testing import assert_equal, available_isas, every_other, fenced, forced_isa, generator

DTYPES = [torch.float32, torch.bfloat16]


def inputs(tokens, experts, width, dtype):
    rng = generator(f"route {tokens} {experts} {width}")
    return torch.randn(tokens, width, generator=rng).to(dtype), torch.randn(experts, width, generator=rng).div(width**0.5).to(dtype)


@pytest.mark.parametrize("isa", available_isas())
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("tokens", "experts", "width", "top_k"), [(1, 1, 4, 1), (3, 7, 33, 7), (50, 64, 256, 6), (0, 8, 16, 2)])
def test_matches_reference(isa, dtype, tokens, experts, width, top_k):
    x, weight = inputs(tokens, experts, width, dtype)
    with forced_isa(isa):
        assert_right(ops.route(x, weight, top_k), x, weight, top_k)


def assert_right(routing, x, weight, top_k):
    expected = ops.Routing(*reference.route(x.double(), weight.double(), top_k))
    assert_equal(routing.ids, expected.ids)
    assert_equal(routing.order, expected.order)
    assert_equal(routing.starts, expected.starts)
    assert torch.allclose(routing.weights.double(), expected.weights, rtol=1e-5, atol=0)


def test_weights_are_the_raw_softmax():
    x, weight = inputs(20, 64, 64, torch.float32)
    routing = ops.route(x, weight, 6)
    assert (routing.weights.sum(1) < 0.9).all()
    assert (routing.weights.diff(dim=1) <= 0).all()


def test_of_equals_the_lower_id():
    x = torch.ones(2, 8)
    routing = ops.route(x, torch.ones(5, 8), 3)
    assert routing.ids.tolist() == [[0, 1, 2], [0, 1, 2]]
    assert routing.order.tolist() == [0, 3, 1, 4, 2, 5]
    assert routing.starts.tolist() == [0, 2, 4, 6, 6, 6]


def test_a_token_does_not_know_of_the_others():
    x, weight = inputs(19, 64, 200, torch.bfloat16)
    together = ops.route(x, weight, 6)
    alone = [ops.route(row, weight, 6) for row in x.split(1)]
    assert_equal(together.ids, torch.cat([one.ids for one in alone]))
    assert_equal(together.weights, torch.cat([one.weights for one in alone]))


@pytest.mark.parametrize(
    ("x", "weight", "top_k", "words"),
    [
        (torch.ones(2, 3), torch.ones(4, 3), 5, "top_k must be 1 to 4, got 5"),
        (torch.ones(2, 3), torch.ones(4, 3), 0, "top_k must be 1 to 4, got 0"),
        (torch.ones(2, 3), torch.ones(4, 2), 1, r"weight must be \[4, 3\]"),
    ],
)
def test_refuses_wrong_arguments(x, weight, top_k, words):
    with pytest.raises(InputError, match=words):
        ops.route(x, weight, top_k)


def test_opcheck():
    torch.library.opcheck(torch.ops.optmem.route, (*inputs(5, 8, 16, torch.float32), 2))


# --- Triton ---------------------------------------------------------------------------------------------------------------------

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


def run_triton(x, weight, top_k):
    """The launcher itself; what it writes is full of absurd numbers before, and guarded on both sides."""
    pytest.importorskip("triton")
    kernel = import_module("optmem.kernels.route")
    likes = expert_ops._route_fake(x, weight, top_k)
    buffers = [torch.full((like.numel() + 512,), -7, dtype=like.dtype, device=DEVICE) for like in likes]
    outputs = [buffer[256:-256].view(like.shape) for buffer, like in zip(buffers, likes, strict=True)]
    kernel.route(fenced(x.to(DEVICE)), fenced(weight.to(DEVICE)), *outputs)
    for buffer in buffers:
        assert (buffer[:256] == -7).all()
        assert (buffer[-256:] == -7).all()
    return ops.Routing(*(output.cpu() for output in outputs))


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float16], ids=str)
@pytest.mark.parametrize(
    ("tokens", "experts", "width", "top_k"),
    [(1, 1, 4, 1), (3, 7, 33, 7), (17, 64, 130, 6), (50, 64, 64, 1), (0, 8, 16, 2), (2, 65, 20, 3)],
)
def test_triton_matches_reference(dtype, tokens, experts, width, top_k):
    x, weight = inputs(tokens, experts, width, dtype)
    assert_right(run_triton(x, weight, top_k), x, weight, top_k)


@pytest.mark.parametrize("tile", GROUP_TILES, ids=str)
def test_triton_groups_in_rounds(tile):
    """Pairs of one round more than there is room for, and the order within an expert is theirs."""
    tokens = tile.BLOCK_P // 4 + 1
    ids = torch.randint(0, 5, (tokens, 4), generator=generator(f"rounds {tile}"), dtype=torch.int32)
    ids[ids == 3] = 2  # an expert that nobody wants
    order, starts = torch.empty(ids.numel(), dtype=torch.int32, device=DEVICE), torch.empty(6, dtype=torch.int32, device=DEVICE)
    kernel = import_module("optmem.kernels.route")
    arguments, options = kernel.specialise_group(fenced(ids.to(DEVICE)), order, starts, tile)
    kernel.route_group_kernel[(6,)](*arguments, **options)
    assert_equal(order.cpu(), ids.flatten().argsort(stable=True).int())
    counts = torch.bincount(ids.flatten(), minlength=5)
    assert_equal(starts.cpu(), torch.nn.functional.pad(counts.cumsum(0), (1, 0)).int())


def test_triton_of_equals_the_lower_id():
    routing = run_triton(torch.ones(2, 8), torch.ones(5, 8), 3)
    assert routing.ids.tolist() == [[0, 1, 2], [0, 1, 2]]
    assert routing.order.tolist() == [0, 3, 1, 4, 2, 5]
    assert routing.starts.tolist() == [0, 2, 4, 6, 6, 6]
    far = run_triton(
        torch.ones(1, 1), torch.tensor([[0.0], [-900.0], [900.0], [-800.0]]), 4
    )  # all but one are 0 behind the softmax
    assert far.ids.tolist() == [[2, 0, 1, 3]]


def test_triton_a_token_does_not_know_of_the_others():
    x, weight = inputs(19, 64, 100, torch.bfloat16)
    together = run_triton(x, weight, 6)
    for at in (0, 18):
        alone = run_triton(x[at : at + 1], weight, 6)
        assert_equal(alone.ids, together.ids[at : at + 1])
        assert_equal(alone.weights, together.weights[at : at + 1])


def test_triton_a_token_of_nan_goes_to_the_first_experts():
    x, weight = inputs(3, 8, 16, torch.float32)
    good = run_triton(x, weight, 2)
    x[1, 3] = torch.nan
    routing = run_triton(x, weight, 2)
    assert routing.ids[1].tolist() == [0, 1]
    assert routing.weights[1].isnan().all()
    assert_equal(routing.ids[::2], good.ids[::2])
    assert routing.order.sort().values.tolist() == list(range(6))
    assert routing.starts[-1] == 6


def test_what_cuda_runs():
    """The function that is registered for it, which needs no CUDA where the interpreter runs: strided inputs, and fp64 in torch."""
    x, weight = inputs(5, 8, 16, torch.bfloat16)
    strided = [every_other(tensor.to(DEVICE)) for tensor in (x, weight)]
    for got, want in zip(expert_ops._route_cuda(*strided, 2), run_triton(x, weight, 2), strict=True):
        assert_equal(got.cpu(), want)
    for got, want in zip(
        expert_ops._route_cuda(x.double(), weight.double(), 2), reference.route(x.double(), weight.double(), 2), strict=True
    ):
        assert_equal(got, want)
    rows = {row.device: row.name for row in ops.implementations() if row.operator == "route"}
    assert rows == {"cpu": "cpp", "cuda": "triton"}


def test_the_choosers_keep_their_promises():
    for experts, itemsize in ((1, 2), (8, 4), (64, 2), (64, 4), (256, 2)):
        tile = route_tile(experts, itemsize)
        assert experts <= tile.BLOCK_E
        assert tile.BLOCK_E >= 16  # what a dot needs
        assert 16 <= tile.BLOCK_K <= 128
        assert 3 * tile.BLOCK_K * (tile.BLOCK_E + tile.BLOCK_T) * itemsize <= 100 * 1024
    for pairs in (0, 1, 6, 48, 128, 129, 1024, 1025, 6144, 200_000):
        tile = group_tile(pairs)
        assert tile in GROUP_TILES
        assert pairs <= tile.BLOCK_P or tile == GROUP_TILES[-1]
