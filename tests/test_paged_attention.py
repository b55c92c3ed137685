"""paged_attention: every instruction set against the reference over hostile pages, windows included."""

import pytest
import torch

from optmem import ops, reference
from optmem.errors import InputError
from optmem.testing import assert_close, assert_equal, available_isas, fenced, forced_isa, generator

DTYPES = [torch.float32, torch.bfloat16]
PAGES = 12
# queries, length and prompt of every sequence
BATCHES = {
    "one token": [(1, 1, 1)],
    "prefill": [(37, 37, 37)],
    "decode": [(1, 50, 20), (1, 16, 16), (1, 33, 3)],
    "mixed": [(20, 40, 40), (1, 17, 9), (3, 64, 10), (0, 5, 5)],
}


def inputs(spans, heads=2, dim=24, dtype=torch.float32, window=None):
    """Scattered pages; what no query sees is NaN, and its page a number that no cache has."""
    rng = generator(f"paged_attention {spans} {heads} {dim} {window}")
    starts = torch.tensor([0, *torch.tensor([queries for queries, _, _ in spans]).cumsum(0).tolist()])
    lengths, prompts = (torch.tensor([span[i] for span in spans]) for i in (1, 2))
    keys, values = (torch.randn(PAGES, 16, heads, dim, generator=rng).to(dtype) for _ in range(2))
    free = torch.randperm(PAGES, generator=rng).tolist()
    table = torch.full((len(spans), 5), 1_000_000, dtype=torch.int32)
    used = torch.zeros(PAGES, 16, dtype=torch.bool)
    for b, (queries, length, prompt) in enumerate(spans):
        seen = reference.allowed_keys(length - queries, length, prompt, window or 0, keys.device).any(0)
        for entry in sorted({key // 16 for key in seen.nonzero().flatten().tolist()}):
            table[b, entry] = free.pop()
            used[table[b, entry], : length - 16 * entry] = True
    for cache in (keys, values):
        cache[~used] = torch.nan
    q = torch.randn(int(starts[-1]), heads, dim, generator=rng).to(dtype)
    return [fenced(t) for t in (q, keys, values)] + [table, starts, lengths, prompts, window, dim**-0.5]


@pytest.mark.parametrize("isa", available_isas())
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("window", [None, 1, 7, 16, 40])
@pytest.mark.parametrize("batch", BATCHES)
def test_matches_reference(isa, dtype, window, batch):
    arguments = inputs(BATCHES[batch], dtype=dtype, window=window)
    with forced_isa(isa):
        actual = ops.paged_attention(*arguments)
    plain = [*arguments[:7], window or 0, arguments[8]]
    exact = reference.paged_attention(*(t.double() if i < 3 else t for i, t in enumerate(plain)))
    assert_close(actual, reference.paged_attention(*plain), exact=exact)


@pytest.mark.parametrize("dim", [1, 31, 128])
def test_widths_of_a_head(dim):
    arguments = inputs(BATCHES["mixed"], heads=3, dim=dim, dtype=torch.bfloat16)
    exact = reference.paged_attention(*(t.double() if i < 3 else t for i, t in enumerate([*arguments[:7], 0, arguments[8]])))
    assert_close(ops.paged_attention(*arguments), reference.paged_attention(*arguments[:7], 0, arguments[8]), exact=exact)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("window", [None, 5])
def test_a_query_does_not_know_what_else_is_asked(dtype, window):
    """A prompt in chunks of every size, bit for bit what it is at once."""
    q, keys, values, table, _, _, prompts, _, scale = inputs([(45, 45, 20)], dtype=dtype)
    whole = {}
    for chunk in (45, 1, 4, 7, 16):
        parts = []
        for first in range(0, 45, chunk):
            part = q[first : first + chunk]
            spans = torch.tensor([0, len(part)]), torch.tensor([first + len(part)])
            parts.append(ops.paged_attention(part, keys, values, table, *spans, prompts, window, scale))
        whole[chunk] = torch.cat(parts)
        assert_equal(whole[chunk], whole[45])


def test_the_window_counts_the_query_and_spares_the_prompt():
    allowed = reference.allowed_keys(9, 10, 3, 2, torch.device("cpu"))
    assert allowed.nonzero()[:, 1].tolist() == [0, 1, 2, 8, 9]


@pytest.mark.parametrize(
    ("position", "wrong", "words"),
    [
        (0, torch.zeros(3, 2, 8), r"keys must be \[12, 16, 2, 8\]"),
        (1, torch.zeros(12, 8, 2, 24), "a multiple of 16 tokens, got 8"),
        (3, torch.zeros(3, 5, dtype=torch.int64), "table must be torch.int32"),
        (3, torch.full((3, 5), 12, dtype=torch.int32), "names page 12 of 12"),
        (3, torch.full((3, 5), -1, dtype=torch.int32), "names page -1 of 12"),
        (3, torch.zeros(3, 2, dtype=torch.int32), "sequence 0 needs 4 pages, its table has 2"),
        (4, torch.tensor([0, 1, 2]), r"starts must be \[4\]"),
        (4, torch.tensor([0, 2, 1, 3]), "must not decrease, but do at sequence 1"),
        (4, torch.tensor([0, 2**63 - 1, -2, 3]), "must not decrease, but do at sequence 1"),
        (4, torch.tensor([0, 1, 2, 4]), "must run from 0 to 3, got 0 to 4"),
        (5, torch.tensor([0, 16, 33]), "asks with 1 tokens of 0"),
        (5, torch.tensor([50, 81, 33]), "sequence 1 needs 6 pages, its table has 5"),
        (5, torch.tensor([50, 16, 2**63 - 1]), "sequence 2 needs 576460752303423488 pages, its table has 5"),
        (6, torch.tensor([-1, 16, 3]), "prompts must not be negative"),
        (7, 0, "window must be positive or None"),
        (5, torch.zeros(3, dtype=torch.int64, device="meta"), "lengths must be on cpu, got meta"),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=["cpp", "reference"])
def test_refuses_wrong_arguments(position, wrong, words, dtype):
    arguments = inputs(BATCHES["decode"], dtype=dtype)
    arguments[position] = wrong.to(dtype) if position < 2 else wrong
    with pytest.raises(InputError, match=words):
        ops.paged_attention(*arguments)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=["cpp", "reference"])
@pytest.mark.parametrize("window", [1, 2**63 - 1])
def test_a_window_does_not_make_a_length_possible(dtype, window):
    """A query sees itself, so its own page is asked for whatever lies before it."""
    arguments = inputs(BATCHES["decode"], dtype=dtype)
    arguments[5], arguments[7] = torch.tensor([50, 16, 2**63 - 1]), window
    with pytest.raises(InputError, match="sequence 2 needs 576460752303423488 pages, its table has 5"):
        ops.paged_attention(*arguments)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=["cpp", "reference"])
def test_pages_that_no_query_sees_are_not_looked_at(dtype):
    """Prompt of 20 and window of 7: the pages between, and the length of a sequence that asks nothing, may be anything."""
    arguments = inputs([(1, 80, 20), (0, 5, 5)], dtype=dtype, window=7)
    assert arguments[3][0].tolist()[2:4] == [1_000_000] * 2
    expected = ops.paged_attention(*arguments)
    arguments[5][1] = 2**63 - 1
    assert_equal(ops.paged_attention(*arguments), expected)
    for entry in (0, 1, 4):
        wrong = list(arguments)
        wrong[3] = arguments[3].index_fill(1, torch.tensor([entry]), -1)
        with pytest.raises(InputError, match="sequence 0 names page -1 of 12"):
            ops.paged_attention(*wrong)


def test_strided_other_types_and_opcheck():
    arguments = inputs(BATCHES["mixed"])
    q, *others = arguments
    wide = torch.stack([q, torch.full_like(q, torch.nan)], -1)[..., 0]
    assert_equal(ops.paged_attention(wide, *others), ops.paged_attention(*arguments))
    half = [t.half() if i < 3 else t for i, t in enumerate(arguments)]
    assert_equal(ops.paged_attention(*half), reference.paged_attention(*half[:7], 0, half[8]))
    clean = [t.nan_to_num() if i < 3 else t for i, t in enumerate(arguments)]
    torch.library.opcheck(torch.ops.optmem.paged_attention, (*clean[:7], 0, clean[8]))
