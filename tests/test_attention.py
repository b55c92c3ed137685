"""attention: every implementation against the reference, what its mask means, what it refuses, and the choice of tiles.

The Triton kernel runs on the GPU, or in the interpreter where there is none: a step for every 64 keys.
"""

import itertools
from importlib import import_module

import pytest
import torch

from optmem import ops, reference
from optmem.errors import InputError
from optmem.kernels.launch import ATTENTION_NARROW, ATTENTION_WIDE, WIDEST_HEAD, attention_tile, attention_tiles
from optmem.ops import vision
from optmem.testing import assert_close, assert_equal, attention_inputs, every_other, fenced, generator, guarded

CPU = torch.device("cpu")
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def triton_kernel():
    pytest.importorskip("triton")
    return import_module("optmem.kernels.attention")


def run_triton(query, key, value, prefix):
    """The launcher itself, with an output between guard bands."""
    kernel = triton_kernel()
    with guarded(query.shape, query.dtype, query.device) as out:
        kernel.attention(query, key, value, prefix, out)
    return out


IMPLEMENTATIONS = {"triton": (run_triton, DEVICE), "cpu": (ops.attention, CPU)}
if DEVICE.type == "cuda":
    IMPLEMENTATIONS["cuda"] = (ops.attention, DEVICE)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("batch", "num_queries", "num_keys", "heads", "head_dim", "prefix"),
    [
        (1, 1, 1, (1, 1), 1, 0),
        (2, 65, 65, (2, 2), 16, 65),  # CLIP: everything is seen
        (1, 33, 33, (3, 1), 8, 0),  # causal
        (2, 18, 18, (14, 2), 16, 9),  # the second generation: image tokens, then as many queries
        (1, 5, 17, (4, 2), 8, 3),  # the last five of a longer sequence
        (1, 3, 130, (1, 1), 96, 0),  # a wider head, steps that every query sees and one that not all do
        (1, 40, 70, (2, 1), 5, 66),  # the mask begins inside a step
    ],
)
def test_matches_reference(implementation, dtype, batch, num_queries, num_keys, heads, head_dim, prefix):
    run, device = IMPLEMENTATIONS[implementation]
    inputs = attention_inputs(batch, num_queries, num_keys, heads, head_dim, dtype, device)
    exact = reference.attention(*(tensor.double() for tensor in inputs), prefix)
    fences = [fenced(tensor) for tensor in inputs]
    assert_close(run(*fences, prefix), reference.attention(*inputs, prefix), exact=exact)


@pytest.mark.parametrize("tile", [ATTENTION_WIDE, ATTENTION_NARROW], ids=["wide", "narrow"])
@pytest.mark.parametrize("prefix", [0, 70, 131, 193])
def test_triton_tiles(tile, prefix, monkeypatch):
    """Two tiles of queries and four steps of keys, whatever the mask is."""
    monkeypatch.setattr(triton_kernel(), "attention_tile", lambda *_: tile)
    inputs = attention_inputs(1, 129, 193, (1, 1), 16, torch.bfloat16, DEVICE)
    exact = reference.attention(*(tensor.double() for tensor in inputs), prefix)
    assert_close(run_triton(*map(fenced, inputs), prefix), reference.attention(*inputs, prefix), exact=exact)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_triton_takes_slices_of_a_projection_as_they_are(dtype):
    """Query, key and value side by side, and a batch of every other sequence, between bands of NaN."""
    qkv = torch.full((4, 11, 5, 2, 8), torch.nan, dtype=dtype, device=DEVICE)
    qkv[::2, 1:10, 1:4] = torch.randn(2, 9, 3, 2, 8, generator=generator("slices")).to(DEVICE, dtype)
    query, key, value = qkv[::2, 1:10, 1:4].unbind(2)
    apart = [tensor.contiguous() for tensor in (query, key, value)]
    assert_equal(run_triton(query, key, value, 4), run_triton(*apart, 4))


@pytest.mark.filterwarnings("ignore:All-NaN slice")  # the interpreter says of the queries that do see them
def test_triton_reads_no_key_that_no_query_sees():
    """Causal: behind the tile's last query come NaN, which a step that read them could not hide."""
    query, key, value = attention_inputs(1, 200, 200, (1, 1), 16, torch.float32, DEVICE)
    expected = run_triton(query, key, value, 0)
    key[:, 160:], value[:, 160:] = torch.nan, torch.nan
    out = torch.empty_like(expected)
    triton_kernel().attention(query, key, value, 0, out)
    assert_equal(out[:, :160], expected[:, :160])
    assert out[:, 160:].isnan().all()


def test_wider_heads_are_torchs():
    inputs = attention_inputs(1, 3, 4, (2, 1), WIDEST_HEAD + 8, torch.float32, DEVICE)
    assert_equal(vision._attention_cuda(*inputs, 2), vision._attention(*inputs, 2))


def test_cuda_takes_the_kernel(monkeypatch):
    asked = []
    monkeypatch.setattr(triton_kernel(), "attention", lambda *arguments: asked.append(arguments))
    inputs = attention_inputs(2, 5, 7, (4, 2), 8, torch.float32, DEVICE)
    out = vision._attention_cuda(*inputs, 3)
    ((*given, prefix, target),) = asked
    assert all(a is b for a, b in zip(given, inputs, strict=True))
    assert (prefix, target.data_ptr()) == (3, out.data_ptr())


@pytest.mark.parametrize("itemsize", [2, 4])
def test_the_chooser_keeps_its_promises(itemsize):
    for num_queries, head_dim in itertools.product((1, 65, 101, 145, 257, 288, 401, 512, 4000), (5, 48, 64, 96, 128)):
        assert attention_tile(num_queries, head_dim, itemsize) in attention_tiles(head_dim, itemsize)


def test_tiles_of_the_families():
    """CLIP's 257 are five tiles of 64; the second generation's 512 fill four of 128."""
    rows = {n: attention_tile(n, 64, 2).BLOCK_M for n in (65, 101, 257, 288, 401, 512)}
    assert rows == {65: 128, 101: 128, 257: 64, 288: 64, 401: 64, 512: 128}


def test_the_mask_of_the_second_generation():
    """Image tokens see all image tokens and no query; query i sees all image tokens and the queries 0 .. i."""
    mask = reference.attention_mask(6, 6, 3, CPU).int().tolist()
    assert mask == [
        [1, 1, 1, 0, 0, 0],
        [1, 1, 1, 0, 0, 0],
        [1, 1, 1, 0, 0, 0],
        [1, 1, 1, 1, 0, 0],
        [1, 1, 1, 1, 1, 0],
        [1, 1, 1, 1, 1, 1],
    ]


def test_what_is_not_seen_does_not_matter():
    query, key, value = attention_inputs(1, 8, 8, (2, 1), 8, torch.float32, DEVICE)
    before = ops.attention(query, key, value, 4)
    key[:, 6:], value[:, 6:] = 1e4, -1e4
    assert_equal(ops.attention(query, key, value, 4)[:, :6], before[:, :6])


def test_accepts_strided_inputs_and_an_empty_batch():
    """Three slices of one projection, as the models give them, and cells apart."""
    qkv = torch.randn(2, 9, 3, 2, 8, generator=generator("strided")).to(DEVICE)
    apart = [tensor.contiguous() for tensor in qkv.unbind(2)]
    assert_equal(ops.attention(*qkv.unbind(2), 9), ops.attention(*apart, 9))
    assert_equal(ops.attention(*map(every_other, apart), 9), ops.attention(*apart, 9))
    assert ops.attention(*(tensor[:0] for tensor in apart), 9).shape == (0, 9, 2, 8)


@pytest.mark.parametrize(
    ("position", "wrong", "words"),
    [
        (0, torch.zeros(2, 5, 32), r"query must be \[B, T, H, d\]"),
        (0, torch.zeros(2, 5, 3, 8), "2 heads of keys cannot serve 3 heads of queries"),
        (0, torch.zeros(2, 8, 4, 8), "8 queries cannot be the last of 7 keys"),
        (0, torch.zeros(2, 5, 4, 8, dtype=torch.float64), "got torch.float64"),
        (1, torch.zeros(2, 7, 2, 9), r"key must be \[2, S, K, 8\]"),
        (1, torch.zeros(2, 6, 2, 8), r"key is \[2, 6, 2, 8\], but value is \[2, 7, 2, 8\]"),
        (1, torch.zeros(2, 7, 2, 8, dtype=torch.float16), "key must be torch.float32 as query is"),
        (2, torch.zeros(2, 7, 2, 8, device="meta"), "value must be on cpu as query is, got meta"),
        (3, 8, "prefix must be 0 to 7, got 8"),
        (3, -1, "prefix must be 0 to 7, got -1"),
    ],
)
def test_refuses_wrong_arguments(position, wrong, words):
    inputs = [*attention_inputs(2, 5, 7, (4, 2), 8, torch.float32, CPU), 3]
    inputs[position] = wrong
    with pytest.raises(InputError, match=words):
        ops.attention(*inputs)


@pytest.mark.parametrize("prefix", [0, 3, 7])
def test_opcheck(prefix):
    inputs = attention_inputs(2, 5, 7, (4, 2), 8, torch.float32, DEVICE)
    torch.library.opcheck(torch.ops.optmem.attention, (*inputs, prefix))
    leaves = tuple(tensor.requires_grad_() for tensor in inputs)  # traced with gradients in test_encoder.py
    torch.library.opcheck(
        torch.ops.optmem.attention, (*leaves, prefix), test_utils=("test_autograd_registration", "test_faketensor")
    )


def test_gradient_is_that_of_the_reference():
    inputs = [tensor.requires_grad_() for tensor in attention_inputs(2, 5, 7, (4, 2), 8, torch.float32, DEVICE)]
    weight = torch.randn(2, 5, 4, 8, generator=generator("gradient")).to(DEVICE)
    ours, theirs = (torch.autograd.grad((run(*inputs, 3) * weight).sum(), inputs) for run in (ops.attention, reference.attention))
    for actual, expected in zip(ours, theirs, strict=True):
        torch.testing.assert_close(actual, expected)


def test_compiles_into_one_graph():
    inputs = attention_inputs(2, 5, 7, (4, 2), 8, torch.float32, DEVICE)
    compiled = torch.compile(ops.attention, fullgraph=True, backend="aot_eager")
    assert_equal(compiled(*inputs, 3), ops.attention(*inputs, 3))


def test_says_who_serves_it():
    rows = {row.device: row.name for row in ops.implementations() if row.operator == "attention"}
    pytest.importorskip("triton")
    assert rows == {"cpu": "torch", "cuda": "triton"}
