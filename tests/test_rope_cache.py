"""rope_cache: every instruction set and the Triton kernel against the reference, in place and nowhere else."""

from importlib import import_module

import pytest
import torch

from optmem import ops, reference
from optmem.errors import InputError
from optmem.kernels.launch import rope_tile
from optmem.model.decoder import rope_table
from optmem.ops import decoding
from optmem.testing import assert_close, assert_equal, available_isas, every_other, fenced, forced_isa, generator

DTYPES = [torch.float32, torch.bfloat16]


def inputs(tokens, heads, dim, dtype, pages=3):
    """Queries, keys, values, cos, sin, slots and two caches of NaN; the second token is nowhere in the cache."""
    rng = generator(f"rope_cache {tokens} {heads} {dim}")
    q, k, v = (torch.randn(tokens, heads, dim, generator=rng).to(dtype) for _ in range(3))
    positions = torch.randint(0, 8192, (tokens,), generator=rng)
    slots = torch.randperm(pages * 16, generator=rng)[:tokens]
    slots[1:2] = -1
    caches = [torch.full((pages, 16, heads, dim), torch.nan, dtype=dtype) for _ in range(2)]
    return [fenced(t) for t in (q, k, v, *rope_table(positions, dim, 10000.0, dtype), slots, *caches)]


def run(op, arguments):
    arguments = [t.clone() for t in arguments]
    op(*arguments)
    return arguments[0], arguments[6], arguments[7]


@pytest.mark.parametrize("isa", available_isas())
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("tokens", "heads", "dim"), [(1, 1, 2), (3, 2, 10), (5, 10, 128), (40, 3, 34)])
def test_matches_reference(isa, dtype, tokens, heads, dim):
    arguments = inputs(tokens, heads, dim, dtype)
    with forced_isa(isa):
        assert_right(run(ops.rope_cache, arguments), arguments)


def assert_right(got, arguments):
    queries, keys, values = got
    expected_queries, expected_keys, expected_values = run(reference.rope_cache, arguments)
    exact = run(reference.rope_cache, [t.double() if t.is_floating_point() else t for t in arguments])
    assert_equal(values.nan_to_num(7.0), expected_values.nan_to_num(7.0))
    assert_equal(keys.isnan(), expected_keys.isnan())
    assert_close(queries, expected_queries, exact=exact[0])
    assert_close(keys.nan_to_num(7.0), expected_keys.nan_to_num(7.0), exact=exact[1].nan_to_num(7.0))


def test_turns_the_two_halves_of_the_whole_head():
    """Half-split, not interleaved: at position p channel i and channel i + D / 2 turn by p / theta^(2 i / D)."""
    positions = torch.tensor([5])
    q = torch.zeros(1, 1, 128)
    q[0, 0, 3] = 1.0
    cache = torch.zeros(1, 16, 1, 128)
    ops.rope_cache(
        q, q.clone(), q.clone(), *rope_table(positions, 128, 1e4, torch.float32), torch.tensor([0]), cache, cache.clone()
    )
    angle = torch.tensor(5 / 10000 ** (6 / 128))
    assert torch.allclose(q[0, 0, [3, 67]], torch.stack([angle.cos(), angle.sin()]), atol=1e-6)
    assert q.count_nonzero() == 2
    assert_equal(cache[0, 0], q[0])


@pytest.mark.parametrize(
    ("position", "wrong", "words"),
    [
        (0, torch.zeros(4, 2, 7), "even width, got 7"),
        (1, torch.zeros(4, 2, 6), r"keys must be \[4, 2, 8\]"),
        (3, torch.zeros(4, 8), r"cos must be \[4, 4\]"),
        (5, torch.zeros(4, dtype=torch.int32), "slots must be torch.int64"),
        (5, torch.tensor([0, 1, 2, 48]), "token 3 goes to cell 48 of 48"),
        (6, torch.zeros(3, 16, 8, 2).transpose(2, 3), "key_cache is written in place and must be contiguous"),
        (5, torch.zeros(4, dtype=torch.int64, device="meta"), "slots must be on cpu, got meta"),
        (7, torch.zeros(2, 16, 2, 8), r"value_cache must be \[3, 16, 2, 8\]"),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=["cpp", "reference"])
def test_refuses_wrong_arguments(position, wrong, words, dtype):
    """And writes nothing, not even the queries."""
    arguments = inputs(4, 2, 8, dtype)
    arguments[position] = wrong if position == 5 else wrong.to(dtype)
    before = [t.clone() for t in arguments if t.device.type == "cpu"]
    with pytest.raises(InputError, match=words):
        ops.rope_cache(*arguments)
    for t, was in zip((t for t in arguments if t.device.type == "cpu"), before, strict=True):
        assert_equal(t.nan_to_num(7.0), was.nan_to_num(7.0))


def test_no_tokens_other_types_and_opcheck():
    arguments = [t.nan_to_num(0.5) for t in inputs(4, 2, 8, torch.float32)]
    empty = [t[:0] for t in arguments[:6]] + arguments[6:]
    ops.rope_cache(*empty)
    half = [t.half() if t.is_floating_point() else t for t in arguments]
    assert_equal(run(ops.rope_cache, half)[1], run(reference.rope_cache, half)[1])
    torch.library.opcheck(torch.ops.optmem.rope_cache, arguments)


# --- Triton ---------------------------------------------------------------------------------------------------------------------

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


def triton_kernel():
    pytest.importorskip("triton")
    return import_module("optmem.kernels.rope_cache")


def run_triton(arguments):
    """The launcher itself; all that it reads lies between guard bands, and so do the caches and queries that it writes."""
    buffers = [torch.full((t.numel() + 512,), 7, dtype=t.dtype, device=DEVICE) for t in arguments]
    inside = [buffer[256:-256].view(t.shape).copy_(t) for buffer, t in zip(buffers, arguments, strict=True)]
    triton_kernel().rope_cache(*inside)
    for buffer in buffers:
        assert (buffer[:256] == 7).all()
        assert (buffer[-256:] == 7).all()
    return [inside[at].cpu() for at in (0, 6, 7)]


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float16], ids=str)
@pytest.mark.parametrize(
    ("tokens", "heads", "dim"), [(1, 1, 2), (3, 2, 10), (5, 10, 128), (4, 6, 64), (9, 3, 34), (1, 33, 130), (2, 0, 8), (0, 2, 8)]
)
def test_triton_matches_reference(dtype, tokens, heads, dim):
    arguments = inputs(tokens, heads, dim, dtype)
    assert_right(run_triton(arguments), arguments)


def test_triton_writes_no_cell_that_is_not_there():
    """Such a token's query is NaN, and nothing else has changed; absurd negative slots are nowhere, like any other."""
    arguments = inputs(5, 2, 8, torch.bfloat16)
    expected = run(reference.rope_cache, [t[[0, 1, 4]] if at < 6 else t for at, t in enumerate(arguments)])
    arguments[5][[1, 2, 3]] = torch.tensor([-(2**62), 48, 2**62])
    queries, *caches = run_triton(arguments)
    assert queries.isnan().flatten(1).all(1).tolist() == [False, False, True, True, False]
    assert_close(queries[[0, 1, 4]], expected[0], exact=expected[0].double())
    for got, want in zip(caches, expected[1:], strict=True):
        assert_equal(got.isnan(), want.isnan())


def test_what_cuda_runs():
    """The function that is registered for it, which needs no CUDA where the interpreter runs: strided inputs, and fp64 in torch."""
    arguments = [t.to(DEVICE) for t in inputs(5, 2, 8, torch.bfloat16)]
    strided = [every_other(t) if 1 <= at <= 5 else t.clone() for at, t in enumerate(arguments)]
    decoding._rope_cache_cuda(*strided)
    for at, want in zip((0, 6, 7), run_triton(arguments), strict=True):
        assert_equal(strided[at].cpu().nan_to_num(7), want.nan_to_num(7))
    wide = [t.double() if t.is_floating_point() else t for t in arguments]
    for got, want in zip(run(decoding._rope_cache_cuda, wide), run(reference.rope_cache, wide), strict=True):
        assert_equal(got.nan_to_num(7), want.nan_to_num(7))
    rows = {row.device: row.name for row in ops.implementations() if row.operator == "rope_cache"}
    assert rows["cuda"] == "triton"


@pytest.mark.parametrize(("heads", "dim"), [(1, 2), (10, 128), (6, 64), (3, 34), (33, 130), (7, 4096), (200, 64)])
def test_the_chooser_keeps_its_promises(heads, dim):
    tile = rope_tile(heads, dim)
    assert tile.BLOCK_D // 2 < dim // 2 <= tile.BLOCK_D
    values = tile.BLOCK_H * tile.BLOCK_D
    assert values <= max(2048, tile.BLOCK_D)
    assert 1 <= tile.num_warps <= 8
    assert heads <= tile.BLOCK_H or values >= 2048
