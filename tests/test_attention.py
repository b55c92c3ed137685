"""attention: every implementation against the reference, its mask, and what it refuses."""

import pytest
import torch

from optmem import ops, reference
from optmem.errors import InputError
from optmem.testing import assert_close, assert_equal, attention_inputs, every_other, fenced, generator

CPU = torch.device("cpu")
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
IMPLEMENTATIONS = {"cpu": (ops.attention, CPU)}
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
    ],
)
def test_matches_reference(implementation, dtype, batch, num_queries, num_keys, heads, head_dim, prefix):
    run, device = IMPLEMENTATIONS[implementation]
    inputs = attention_inputs(batch, num_queries, num_keys, heads, head_dim, dtype, device)
    exact = reference.attention(*(tensor.double() for tensor in inputs), prefix)
    fences = [fenced(tensor) for tensor in inputs]
    assert_close(run(*fences, prefix), reference.attention(*inputs, prefix), exact=exact)


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
    assert rows == {"cpu": "torch", "cuda": "torch"}
