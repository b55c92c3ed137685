"""expert_mlp: every instruction set and the Triton kernels against the reference, with experts that nobody or everybody wants."""

import itertools
from importlib import import_module

import pytest
import torch

from optmem import ops, reference
from optmem.errors import InputError
from optmem.kernels.launch import (
    EXPERT_E4M3,
    EXPERT_FEW,
    EXPERT_MANY,
    EXPERT_SOME,
    VECTOR_ROWS,
    expert_blocks,
    expert_tile,
    expert_tiles,
)
from optmem.ops import experts as expert_ops
from optmem.testing import assert_close, assert_equal, available_isas, every_other, fenced, forced_isa, generator, guarded

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


@pytest.mark.parametrize("isa", available_isas())
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("hidden", [8, 33, 70])
def test_a_token_without_numbers_spoils_no_other(isa, dtype, hidden):
    """The last columns of a row of sums lie beside the first ones of the next row."""
    x, gate_up, down, routing = inputs(3, hidden, 8, 4, 2, dtype)
    weights = routing.weights.clone()
    weights[1] = torch.nan
    with forced_isa(isa):
        actual = ops.expert_mlp(x, gate_up, down, routing._replace(weights=weights))
        whole = ops.expert_mlp(x, gate_up, down, routing)
    assert actual[1].isnan().all()
    assert_equal(actual[[0, 2]], whole[[0, 2]])


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


# --- Triton ---------------------------------------------------------------------------------------------------------------------

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


def triton_kernel():
    pytest.importorskip("triton")
    return import_module("optmem.kernels.expert_mlp")


def run_triton(x, gate_up, down, routing):
    """The launcher itself; what it reads and what it writes lies between guard bands."""
    given = (x, gate_up, down, routing.weights, routing.order, routing.starts)
    kernel = triton_kernel()
    with guarded(x.shape, x.dtype, DEVICE) as out:
        kernel.expert_mlp(*(fenced(tensor.to(DEVICE)) for tensor in given), out)
    return out.cpu()


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float16], ids=str)
@pytest.mark.parametrize(
    ("tokens", "hidden", "width", "experts", "top_k"),
    [
        (1, 8, 1, 1, 1),
        (3, 33, 35, 4, 4),
        (VECTOR_ROWS, 20, 9, 64, 6),
        (VECTOR_ROWS + 1, 20, 9, 3, 2),
        (40, 70, 33, 8, 3),
        (18, 24, 40, 1, 1),  # one past a tile
    ],
)
def test_triton_matches_reference(dtype, tokens, hidden, width, experts, top_k):
    arguments = inputs(tokens, hidden, width, experts, top_k, dtype)
    assert_close(run_triton(*arguments), expected(*arguments), exact=exact(*arguments))


@pytest.mark.parametrize("tile", [EXPERT_FEW, EXPERT_SOME, EXPERT_MANY], ids=lambda tile: str(tile.BLOCK_M))
def test_triton_every_tile(tile, monkeypatch):
    """Experts with none, with a few and with more than a tile of pairs, and matrices of more than a block each way."""
    monkeypatch.setattr(triton_kernel(), "expert_tile", lambda *_: tile)
    arguments = inputs(140, 150, 70, 5, 2, torch.bfloat16)
    assert_close(run_triton(*arguments), expected(*arguments), exact=exact(*arguments))


def test_triton_wide_rows_of_few_tokens():
    arguments = inputs(1, 300, 1030, 3, 2, torch.bfloat16)
    assert_close(run_triton(*arguments), expected(*arguments), exact=exact(*arguments))


@pytest.mark.parametrize("tokens", [VECTOR_ROWS, 20])
def test_triton_experts_that_nobody_wants_are_not_read(tokens):
    x, gate_up, down, routing = inputs(tokens, 20, 9, 8, 2, torch.bfloat16)
    ids = routing.ids % 4 + 4  # the upper four
    ids[:, 1] = (ids[:, 0] + 1) % 4 + 4
    order = ids.flatten().argsort(stable=True).int()
    starts = torch.nn.functional.pad(torch.bincount(ids.flatten(), minlength=8).cumsum(0), (1, 0)).int()
    routing = ops.Routing(ids, routing.weights, order, starts)
    want = run_triton(x, gate_up, down, routing)
    assert_close(want, expected(x, gate_up, down, routing), exact=exact(x, gate_up, down, routing))
    gate_up, down = gate_up.clone(), down.clone()
    gate_up[:4], down[:4] = torch.nan, torch.nan
    assert_equal(run_triton(x, gate_up, down, routing), want)


@pytest.mark.parametrize("tokens", [VECTOR_ROWS, 20])
def test_triton_a_token_of_nan_fails_alone(tokens):
    x, gate_up, down, routing = inputs(tokens, 20, 9, 4, 2, torch.bfloat16)
    want = run_triton(x, gate_up, down, routing)
    x = x.clone()
    x[3] = torch.nan
    out = torch.zeros_like(x, device=DEVICE)
    given = (x, gate_up, down, routing.weights, routing.order, routing.starts)
    triton_kernel().expert_mlp(*(tensor.to(DEVICE) for tensor in given), out)
    assert out[3].isnan().all()
    others = torch.arange(tokens) != 3
    assert_equal(out.cpu()[others], want[others])


@pytest.mark.filterwarnings("ignore:.*encountered in:RuntimeWarning")  # of numpy: pairs that no expert has are whatever memory held
@pytest.mark.parametrize("tokens", [3, 20])
@pytest.mark.parametrize("hostile", [-(2**31), 2**31 - 1, 99])
def test_triton_a_wrong_grouping_touches_nothing_else(tokens, hostile):
    """Whatever order and starts say: no address outside is read or written.  (The interpreter would crash on the large ones.)"""
    x, gate_up, down, routing = inputs(tokens, 9, 9, 4, 2, torch.float32)
    for field in ("order", "starts"):
        for at in (0, 2, -1):
            wrong = getattr(routing, field).clone()
            wrong[at] = hostile
            told = routing._replace(**{field: wrong})
            given = (x, gate_up, down, told.weights, told.order, told.starts)
            buffer = torch.full((x.numel() + 512,), 7.0, device=DEVICE)
            triton_kernel().expert_mlp(*(fenced(tensor.to(DEVICE)) for tensor in given), buffer[256:-256].view(x.shape))
            assert (buffer[:256] == 7).all()
            assert (buffer[-256:] == 7).all()


# --- of 8-bit floats ------------------------------------------------------------------------------------------------------------


def e4m3_inputs(tokens, hidden, width, experts, top_k, dtype):
    """Tokens, matrices and routing, and the matrices' scales."""
    x, gate_up, down, routing = inputs(tokens, hidden, width, experts, top_k, dtype)
    (gate_up, into, _), (down, out_of, _) = ops.e4m3_rows(gate_up), ops.e4m3_rows(down)
    return x, gate_up, down, routing, ops.ExpertScales(into, out_of)


def run_e4m3(x, gate_up, down, routing, scales):
    """As run_triton."""
    given = (x, gate_up, down, routing.weights, routing.order, routing.starts)
    fences = [fenced(tensor.to(DEVICE)) for tensor in (*given, *scales)]
    with guarded(x.shape, x.dtype, DEVICE) as out:
        triton_kernel().expert_mlp(*fences[:6], out, *fences[6:])
    return out.cpu()


def check_e4m3(actual, x, gate_up, down, routing, scales):
    """Both round what stands between the products: in 16 bits an exact answer would round it elsewhere.

    Tensor cores keep about 14 bits of 128 columns' sum, and so round some of it elsewhere too.
    """
    expected = ops.expert_mlp(x, gate_up, down, routing, scales)
    if DEVICE.type == "cuda":
        assert (actual.double() - expected.double()).norm() <= 2.0**-7 * expected.double().norm()
        return
    wide = routing._replace(weights=routing.weights.double())
    exact = expected if x.dtype != torch.float32 else ops.expert_mlp(x.double(), gate_up, down, wide, scales)
    assert_close(actual, expected, exact=exact.double())


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float16], ids=str)
@pytest.mark.parametrize(
    ("tokens", "hidden", "width", "experts", "top_k"),
    [(1, 8, 1, 1, 1), (3, 33, 35, 4, 4), (VECTOR_ROWS, 20, 9, 64, 6), (VECTOR_ROWS + 1, 20, 9, 3, 2), (40, 70, 33, 8, 3)],
)
def test_triton_of_e4m3_matches_reference(dtype, tokens, hidden, width, experts, top_k):
    arguments = e4m3_inputs(tokens, hidden, width, experts, top_k, dtype)
    check_e4m3(run_e4m3(*arguments), *arguments)


@pytest.mark.parametrize("tile", EXPERT_E4M3, ids=lambda tile: str(tile.BLOCK_M))
def test_triton_of_e4m3_every_tile(tile, monkeypatch):
    monkeypatch.setattr(triton_kernel(), "expert_tile", lambda *_: tile)
    arguments = e4m3_inputs(140, 290, 150, 5, 2, torch.bfloat16)
    check_e4m3(run_e4m3(*arguments), *arguments)


@pytest.mark.parametrize("tokens", [VECTOR_ROWS, 20])
def test_triton_of_e4m3_a_token_of_nan_fails_alone(tokens):
    x, gate_up, down, routing, scales = e4m3_inputs(tokens, 20, 9, 4, 2, torch.bfloat16)
    want = run_e4m3(x, gate_up, down, routing, scales)
    x = x.clone()
    x[3, 5] = torch.nan
    out = torch.zeros_like(x, device=DEVICE)
    given = (x, gate_up, down, routing.weights, routing.order, routing.starts)
    triton_kernel().expert_mlp(*(tensor.to(DEVICE) for tensor in given), out, *(tensor.to(DEVICE) for tensor in scales))
    assert out[3].isnan().all()
    others = torch.arange(tokens) != 3
    assert_equal(out.cpu()[others], want[others])


def test_what_e4m3_means():
    """Near the experts as they were: three roundings of 1/16 at most, most of which cancel each other."""
    x, gate_up, down, routing = inputs(40, 256, 128, 8, 3, torch.float32)
    exact = expected(x, gate_up, down, routing)
    said = ops.expert_mlp(*e4m3_inputs(40, 256, 128, 8, 3, torch.float32))
    assert 0.01 < (said - exact).norm() / exact.norm() < 0.08


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda gate_up, down, _: (gate_up, down, None), "gate_up must be torch.float32, got torch.float8_e4m3fn"),
        (lambda gate_up, down, scales: (gate_up, down.float(), scales), "down must be torch.float8_e4m3fn, got torch.float32"),
        (lambda gate_up, down, scales: (gate_up, down.char(), scales), "down must be torch.float8_e4m3fn, got torch.int8"),
        (lambda gate_up, down, scales: (gate_up.float(), down, scales), "gate_up must be torch.int8, got torch.float32"),
        (lambda gate_up, down, scales: (gate_up, down, scales._replace(down=scales.down[:2])), "down_scales must be"),
    ],
)
def test_refuses_other_matrices_beside_e4m3(change, words):
    x, gate_up, down, routing, scales = e4m3_inputs(2, 8, 8, 3, 2, torch.float32)
    gate_up, down, scales = change(gate_up, down, scales)
    with pytest.raises(InputError, match=f"expert_mlp: {words}"):
        ops.expert_mlp(x, gate_up, down, routing, scales)


def test_what_cuda_runs_of_e4m3():
    x, gate_up, down, routing, scales = e4m3_inputs(5, 16, 24, 4, 2, torch.bfloat16)
    want = run_e4m3(x, gate_up, down, routing, scales)
    given = (x, gate_up, down, routing.weights, routing.order, routing.starts, *scales)
    assert_equal(expert_ops._expert_mlp_cuda(*(every_other(tensor.to(DEVICE)) for tensor in given)).cpu(), want)


def test_what_cuda_runs():
    """The function that is registered for it, which needs no CUDA where the interpreter runs: strided inputs, and fp64 in torch."""
    x, gate_up, down, routing = inputs(5, 16, 24, 4, 2, torch.bfloat16)
    want = run_triton(x, gate_up, down, routing)
    given = (x, gate_up, down, routing.weights, routing.order, routing.starts)
    assert_equal(expert_ops._expert_mlp_cuda(*(every_other(tensor.to(DEVICE)) for tensor in given)).cpu(), want)
    wide = [tensor.double() if tensor.is_floating_point() else tensor for tensor in given]
    assert_equal(expert_ops._expert_mlp_cuda(*wide), reference.expert_mlp(*wide))
    whole = [(tensor * 10).round().clamp(-127, 127).to(torch.int8) for tensor in (gate_up, down)]
    scales = torch.full((4, 48), 0.1), torch.full((4, 16), 0.1)
    assert_equal(expert_ops._expert_mlp_cuda(x, *whole, *given[3:], *scales), reference.expert_mlp(x, *whole, *given[3:], *scales))
    rows = {row.device: row for row in ops.implementations() if row.operator == "expert_mlp"}
    assert (rows["cpu"].name, rows["cuda"].name) == ("cpp", "triton")
    assert "int8 in plain torch" in rows["cuda"].reason


def test_the_chooser_follows_the_rows_of_an_expert():
    for tokens, top_k, itemsize in itertools.product((1, 8, 9, 64, 256, 1024, 2048, 18_000), (1, 6), (1, 2, 4)):
        assert expert_tile(tokens * top_k, 64, itemsize) in expert_tiles(itemsize)
    assert [expert_tile(6 * tokens, 64, 2) for tokens in (9, 170, 171, 1024, 2048)] == [
        EXPERT_FEW,
        EXPERT_FEW,
        EXPERT_SOME,
        EXPERT_SOME,
        EXPERT_MANY,
    ]


def test_there_are_blocks_enough_for_any_starts():
    rng = generator("expert_blocks")
    for block_m in (16, 64, 128):
        for _ in range(50):
            counts = torch.randint(0, 200, (8,), generator=rng) * (torch.rand(8, generator=rng) < 0.6)
            starts = torch.nn.functional.pad(counts.cumsum(0), (1, 0)).tolist()
            blocks = [(starts[e] // block_m + e, -(-int(counts[e]) // block_m)) for e in range(8)]
            for (first, needed), (following, _) in itertools.pairwise(blocks):
                assert first + needed <= following
            assert sum(blocks[-1]) <= expert_blocks(starts[-1], 8, block_m)
