"""paged_attention: every instruction set and the Triton kernels against the reference over hostile pages, windows included.

The kernels run on the GPU, or in the interpreter where there is none: a block of keys takes it 3 ms, few cases have more than 50.
"""

import itertools
from importlib import import_module

import pytest
import torch

from optmem import ops, reference
from optmem.errors import InputError
from optmem.kernels.launch import PAGED_CHUNK, PAGED_FEW, paged_plan, paged_tile
from optmem.ops import decoding
from optmem.testing import assert_close, assert_equal, available_isas, every_other, fenced, forced_isa, generator, guarded

DTYPES = [torch.float32, torch.bfloat16]
PAGES = 12
# queries, length and prompt of every sequence
BATCHES = {
    "one token": [(1, 1, 1)],
    "prefill": [(37, 37, 37)],
    "decode": [(1, 50, 20), (1, 16, 16), (1, 33, 3)],
    "mixed": [(20, 40, 40), (1, 17, 9), (3, 64, 10), (0, 5, 5)],
}


def inputs(spans, heads=2, dim=24, dtype=torch.float32, window=None, page_size=16, pages=PAGES, entries=5):
    """Scattered pages; what no query sees is NaN, and its page a number that no cache has."""
    rng = generator(f"paged_attention {spans} {heads} {dim} {window}")
    starts = torch.tensor([0, *torch.tensor([queries for queries, _, _ in spans]).cumsum(0).tolist()])
    lengths, prompts = (torch.tensor([span[i] for span in spans]) for i in (1, 2))
    keys, values = (torch.randn(pages, page_size, heads, dim, generator=rng).to(dtype) for _ in range(2))
    free = torch.randperm(pages, generator=rng).tolist()
    table = torch.full((len(spans), entries), 1_000_000, dtype=torch.int32)
    used = torch.zeros(pages, page_size, dtype=torch.bool)
    for b, (queries, length, prompt) in enumerate(spans):
        seen = reference.allowed_keys(length - queries, length, prompt, window or 0, keys.device).any(0)
        for entry in sorted({key // page_size for key in seen.nonzero().flatten().tolist()}):
            table[b, entry] = free.pop()
            used[table[b, entry], : length - page_size * entry] = True
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


# --- Triton ---------------------------------------------------------------------------------------------------------------------

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
LONG = PAGED_CHUNK + 44  # keys in two chunks


def run_triton(arguments):
    """The launcher itself; what it reads and what it writes lies between guard bands."""
    pytest.importorskip("triton")
    kernel = import_module("optmem.kernels.paged_attention")
    *tensors, window, scale = arguments
    q = tensors[0]
    with guarded(q.shape, q.dtype, DEVICE) as out:
        kernel.paged_attention(*(fenced(tensor.to(DEVICE)) for tensor in tensors), window or 0, scale, out)
    return out.cpu()


def assert_right(actual, arguments):
    plain = [*arguments[:7], arguments[7] or 0, arguments[8]]
    exact = reference.paged_attention(*(t.double() if i < 3 else t for i, t in enumerate(plain)))
    assert_close(actual, reference.paged_attention(*plain), exact=exact)


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float16], ids=str)
@pytest.mark.parametrize("window", [None, 1, 7, 40])
@pytest.mark.parametrize("batch", BATCHES)
def test_triton_matches_reference(dtype, window, batch):
    arguments = inputs(BATCHES[batch], dtype=dtype, window=window)
    assert_right(run_triton(arguments), arguments)


@pytest.mark.parametrize("window", [None, 20, 300])
@pytest.mark.parametrize(
    "spans",
    [
        [(1, LONG, 3), (1, PAGED_CHUNK + 1, PAGED_CHUNK)],  # one past a chunk, and a window that begins in either
        [(PAGED_FEW, LONG, 30)],  # drafts, of which the first see other chunks than the last
        [(PAGED_FEW + 1, LONG, 30), (1, 20, 20)],  # a prompt's tile, and one past it
    ],
    ids=str,
)
def test_triton_in_chunks(spans, window):
    arguments = inputs(spans, heads=1, dim=8, dtype=torch.bfloat16, window=window, pages=40, entries=25)
    assert_right(run_triton(arguments), arguments)


@pytest.mark.parametrize(("heads", "dim", "page_size"), [(1, 1, 16), (3, 31, 32), (2, 64, 16), (1, 128, 48), (1, 200, 64)])
def test_triton_heads_and_pages(heads, dim, page_size):
    spans = [(20, 40, 40), (1, 63, 9), (3, 64, 10)]
    arguments = inputs(spans, heads=heads, dim=dim, dtype=torch.bfloat16, page_size=page_size)
    assert_right(run_triton(arguments), arguments)


@pytest.mark.parametrize(("dtype", "window"), [(torch.float32, 5), (torch.bfloat16, None)], ids=str)
def test_triton_a_row_knows_neither_of_its_mates_nor_of_the_table(dtype, window):
    """Drafts bit for bit as asked one by one; sequences as alone, over a table of any width; a prompt as next to others."""
    spans = [(5, 40, 12), (1, 33, 3), (20, 20, 20), (16, 64, 30)]
    arguments = inputs(spans, heads=1, dim=24, dtype=dtype, window=window)
    q, keys, values, table, starts, lengths, prompts, *others = arguments
    together = run_triton(arguments)
    wide = torch.nn.functional.pad(table, (0, 40), value=-7)
    for b, (queries, length, _) in enumerate(spans):
        own = slice(int(starts[b]), int(starts[b + 1]))
        told = torch.tensor([0, queries]), lengths[b : b + 1], prompts[b : b + 1]
        alone = run_triton([q[own], keys, values, wide[b : b + 1], *told, *others])
        if queries <= PAGED_FEW:
            for at in {0, queries // 2, queries - 1}:
                told = torch.tensor([0, 1]), torch.tensor([length - queries + at + 1]), prompts[b : b + 1]
                one = run_triton([q[own][at : at + 1], keys, values, table[b : b + 1], *told, *others])
                assert_equal(one, together[own][at : at + 1])
        assert_equal(alone, together[own])


def test_triton_a_step_with_empty_sequences():
    """As many tokens as sequences, and yet more of one than a tile has."""
    spans = [(18, 40, 12), *[(0, 5, 5)] * 20, *[(1, 17, 9)] * 3]
    arguments = inputs(spans, heads=1, dim=8)
    assert arguments[0].shape[0] + 3 == len(spans)
    assert_right(run_triton(arguments), arguments)
    padded = inputs([(18, 40, 12), *[(0, 5, 5)] * 17], heads=1, dim=8)
    assert padded[0].shape[0] == padded[3].shape[0]
    assert_right(run_triton(padded), padded)


@pytest.mark.parametrize("queries", [1, 20])
@pytest.mark.parametrize("page", [-1, PAGES, 2**31 - 1, -(2**31)])
def test_triton_a_page_that_is_not_there_is_seen_in_its_rows_alone(queries, page):
    arguments = inputs([(queries, 50, 20), (1, 33, 3)], dtype=torch.bfloat16)
    expected = run_triton(arguments)
    table = arguments[3] = arguments[3].clone()
    table[0, 1] = page
    q, *tensors = (tensor.to(DEVICE) for tensor in arguments[:7])
    out = torch.zeros_like(q)
    import_module("optmem.kernels.paged_attention").paged_attention(q, *tensors, 0, arguments[8], out)
    assert out[:queries].isnan().all()
    assert_equal(out[queries:].cpu(), expected[queries:])


@pytest.mark.parametrize(("length", "prompt"), [(81, 3), (2**62, 3), (0, 3), (-5, 2**62), (-(2**62), 3)])
@pytest.mark.parametrize("queries", [2, 20])
def test_triton_lengths_that_cannot_be(length, prompt, queries):
    """Longer than the table, or with fewer tokens than are asked with: NaN in those rows, and no absent cell is touched."""
    arguments = inputs([(queries, 50, 20), (1, 33, 3)])
    expected = run_triton(arguments)
    lengths, prompts = arguments[5].clone(), arguments[6].clone()
    lengths[0], prompts[0] = length, prompt
    q, keys, values, table, starts, *_ = (tensor.to(DEVICE) for tensor in arguments[:7])
    out = torch.zeros_like(q)
    kernel = import_module("optmem.kernels.paged_attention")
    kernel.paged_attention(q, keys, values, table, starts, lengths.to(DEVICE), prompts.to(DEVICE), 0, arguments[8], out)
    assert out[:queries].isnan().all()
    assert_equal(out[queries:].cpu(), expected[queries:])


def test_triton_nobody_asks():
    arguments = inputs([(0, 5, 5), (0, 0, 0)])
    assert run_triton(arguments).shape == (0, 2, 24)


def test_what_cuda_runs():
    """The function that is registered for it, which needs no CUDA where the interpreter runs: strided inputs, and fp64 in torch."""
    arguments = inputs(BATCHES["mixed"], dtype=torch.bfloat16, window=7)
    *tensors, window, scale = arguments
    strided = [every_other(tensor.to(DEVICE)) for tensor in tensors]
    assert_equal(decoding._paged_attention_cuda(*strided, window, scale).cpu(), run_triton(arguments))
    wide = [t.double() if i < 3 else t for i, t in enumerate(tensors)]
    assert_equal(decoding._paged_attention_cuda(*wide, window, scale), reference.paged_attention(*wide, window, scale))
    rows = {row.device: row.name for row in ops.implementations() if row.operator == "paged_attention"}
    assert rows == {"cpu": "cpp", "cuda": "triton"}


@pytest.mark.parametrize("itemsize", [2, 4])
@pytest.mark.parametrize("head_dim", [1, 24, 31, 64, 128, 200, 256, 512])
@pytest.mark.parametrize("is_prompt", [False, True])
@pytest.mark.parametrize("is_8bit", [False, True])
def test_the_tiles_keep_their_promises(itemsize, head_dim, is_prompt, is_8bit):
    tile = paged_tile(head_dim, itemsize, is_prompt=is_prompt, is_8bit=is_8bit)
    assert PAGED_CHUNK % tile.BLOCK_N == 0
    assert tile.BLOCK_M >= 16
    assert tile.BLOCK_N >= 16  # what a dot needs
    assert is_prompt or tile.BLOCK_M == PAGED_FEW  # a row's tile is that of its sequence
    if head_dim <= 256:
        assert 2 * (tile.num_stages - 1) * tile.BLOCK_N * max(16, head_dim) * itemsize <= 128 * 1024


def test_the_plan_follows_from_shapes():
    """Decode steps of all batches, drafts, prompts and both together: rows of partial sums never overlap, and tiles suffice."""
    for batch, context in itertools.product((1, 8, 64, 256, 1024, 2048), (300, 800, 1300, 32768)):
        plan = paged_plan(batch, batch, context, 64)
        assert plan == (batch, batch, -(-context // PAGED_CHUNK), 0)
    assert paged_plan(5, 1, 300, 64) == (5, 5, 2, 0)
    assert paged_plan(285, 1, 288, 64) == (PAGED_FEW, PAGED_FEW, 2, 5)
    rng = generator("paged_plan")
    for _ in range(50):
        counts = torch.randint(0, 70, (9,), generator=rng) * (torch.rand(9, generator=rng) < 0.7)
        starts = torch.nn.functional.pad(counts.cumsum(0), (1, 0)).tolist()
        plan = paged_plan(starts[-1], 9, 300, 64)
        assert plan.rows <= starts[-1]
        end = 0
        for b, count in enumerate(counts.tolist()):
            if count <= plan.few:
                first = min(starts[b], plan.few * b)
                assert first >= end
                end = first + count
            elif count:
                assert starts[b] // 64 + b + -(-count // 64) <= min(plan.prompt_tiles, starts[b + 1] // 64 + b + 1)
        assert end <= plan.rows
