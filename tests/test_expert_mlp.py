"""expert_mlp: every instruction set against the reference, with experts that nobody or everybody wants."""

import pytest
import torch

from optmem import ops, reference
from optmem.errors import InputError
from optmem.testing import assert_close, assert_equal, available_isas, fenced, forced_isa, generator

DTYPES = [torch.float32, torch.bfloat16]


def inputs(tokens, hidden, width, experts, top_k, dtype):
    rng = generator(f"expert_mlp {tokens} {hidden} {width} {experts} {top_k}")
    x = torch.randn(tokens, hidden, generator=rng)
    gate_up = torch.randn(experts, 2 * width, hidden, generator=rng) * hidden**-0.5
    down = torch.randn(experts, hidden, width, generator=rng) * width**-0.5
    router = torch.randn(experts, hidden, generator=rng)
    router[0] = 0.0
    x, gate_up, down = (fenced(t.to(dtype)) for t in (x, gate_up, down))
    return x, gate_up, down, ops.route(x, router.to(dtype), top_k)


def expected(x, gate_up, down, routing):
    return reference.expert_mlp(x, gate_up, down, routing.weights, routing.order, routing.starts)


def exact(x, gate_up, down, routing):
    return reference.expert_mlp(
        x.double(), gate_up.double(), down.double(), routing.weights.double(), routing.order, routing.starts
    )


@pytest.mark.parametrize("isa", available_isas())
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("tokens", "hidden", "width", "experts", "top_k"), [(1, 8, 1, 1, 1), (3, 33, 35, 4, 4), (1, 64, 96, 64, 6), (40, 70, 33, 8, 3)]
)
def test_matches_reference(isa, dtype, tokens, hidden, width, experts, top_k):
    arguments = inputs(tokens, hidden, width, experts, top_k, dtype)
    with forced_isa(isa):
        actual = ops.expert_mlp(*arguments)
    assert_close(actual, expected(*arguments), exact=exact(*arguments))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_token_does_not_know_of_the_others(dtype):
    x, gate_up, down, routing = inputs(17, 48, 40, 8, 3, dtype)
    together = ops.expert_mlp(x, gate_up, down, routing)
    for t in range(17):
        order = routing.ids[t].long().argsort().int()
        counts = torch.bincount(routing.ids[t].long(), minlength=8)
        alone = ops.Routing(
            routing.ids[t : t + 1], routing.weights[t : t + 1], order, torch.nn.functional.pad(counts.cumsum(0), (1, 0)).int()
        )
        assert_equal(ops.expert_mlp(x[t : t + 1], gate_up, down, alone), together[t : t + 1])


def test_large_gates_neither_overflow_nor_vanish():
    x = torch.tensor([[1.0], [-1.0]])
    gate_up = torch.tensor([[[500.0], [1.0]]])
    routing = ops.Routing(
        torch.zeros(2, 1, dtype=torch.int32), torch.ones(2, 1), torch.tensor([0, 1]).int(), torch.tensor([0, 2]).int()
    )
    outputs = ops.expert_mlp(x, gate_up, torch.ones(1, 1, 1), routing).flatten()
    assert outputs[0] == 500.0
    assert 0.0 <= outputs[1] < 1e-30


def test_no_tokens_strided_and_other_types():
    x, gate_up, down, routing = inputs(5, 16, 24, 4, 2, torch.float32)
    nobody = ops.route(x[:0], torch.ones(4, 16), 2)
    assert ops.expert_mlp(x[:0], gate_up, down, nobody).shape == (0, 16)
    wide = torch.stack([x, torch.full_like(x, torch.nan)], -1)[..., 0]
    assert_equal(ops.expert_mlp(wide, gate_up, down, routing), ops.expert_mlp(x, gate_up, down, routing))
    half = (x.half(), gate_up.half(), down.half(), routing)
    assert_equal(ops.expert_mlp(*half), expected(*half))


def changed(routing, **fields):
    return routing._replace(**{name: torch.tensor(value, dtype=torch.int32) for name, value in fields.items()})


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"order": [0, 1, 2, 9]}, "names pair 9 of 4"),
        ({"order": [0, 1, 2]}, r"order must be \[4\], got \[3\]"),
        ({"starts": [0, 3, 2, 4]}, "must not decrease, but do at expert 1"),
        ({"starts": [0, 1, 2, 3]}, "must run from 0 to 4, got 0 to 3"),
        ({"starts": [0, 4]}, r"starts must be \[4\], got \[2\]"),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=["cpp", "reference"])
def test_refuses_a_wrong_grouping(fields, words, dtype):
    x, gate_up, down, routing = inputs(2, 8, 8, 3, 2, dtype)
    with pytest.raises(InputError, match=words):
        ops.expert_mlp(x, gate_up, down, changed(routing, **fields))


def test_refuses_other_shapes():
    x, gate_up, down, routing = inputs(2, 8, 8, 3, 2, torch.float32)
    with pytest.raises(InputError, match=r"gate_up must be \[3, 16, 8\]"):
        ops.expert_mlp(x, gate_up[:, :8], down, routing)
    with pytest.raises(InputError, match=r"weights must be \[1, top_k\]"):
        ops.expert_mlp(x[:1], gate_up, down, routing)


@pytest.mark.parametrize(
    ("dtype", "weights", "words"),
    [
        (torch.float32, torch.float64, "weights must be torch.float32, got torch.float64"),
        (torch.bfloat16, torch.bfloat16, "weights must be torch.float32, got torch.bfloat16"),
        (torch.float16, torch.float16, "weights must be torch.float32, got torch.float16"),
        (torch.float64, torch.float32, "weights must be torch.float64, got torch.float32"),
        (torch.float32, torch.device("meta"), "weights must be on cpu, got meta"),
    ],
)
def test_refuses_other_weights(dtype, weights, words):
    """They are fp32, or fp64 where x is, as route makes them."""
    x, gate_up, down, routing = inputs(2, 8, 8, 3, 2, dtype)
    assert ops.expert_mlp(x, gate_up, down, routing).dtype == dtype
    with pytest.raises(InputError, match=words):
        ops.expert_mlp(x, gate_up, down, routing._replace(weights=routing.weights.to(weights)))


def test_opcheck():
    x, gate_up, down, routing = inputs(3, 8, 8, 3, 2, torch.float32)
    torch.library.opcheck(torch.ops.optmem.expert_mlp, (x, gate_up, down, routing.weights, routing.order, routing.starts))
