"""route: the chosen experts, their raw weights and the grouping."""

import pytest
import torch

from optmem import ops, reference
from optmem.errors import InputError
from optmem.testing import assert_equal, available_isas, forced_isa, generator

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
        routing = ops.route(x, weight, top_k)
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
