"""linear_rows: every instruction set against the reference; what it promises is that a row does not know of the others."""

import pytest
import torch

from optmem import ops, reference
from optmem.errors import InputError
from optmem.native import native
from optmem.testing import assert_close, assert_equal, available_isas, fenced, forced_isa, generator, guarded

DTYPES = [torch.float32, torch.bfloat16]
SHAPES = [(1, 1, 1), (1, 5, 31), (2, 33, 32), (7, 4, 65), (6, 64, 16), (13, 37, 100), (25, 70, 17)]  # tokens, rows, in


def inputs(tokens, rows, width, dtype):
    rng = generator(f"linear_rows {tokens} {rows} {width}")
    return torch.randn(tokens, width, generator=rng).to(dtype), (torch.randn(rows, width, generator=rng) * width**-0.5).to(dtype)


@pytest.mark.parametrize("isa", available_isas())
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_matches_reference(isa, dtype, shape):
    x, weight = map(fenced, inputs(*shape, dtype))
    with forced_isa(isa):
        actual = ops.linear_rows(x, weight)
    exact = reference.linear_rows(x.double(), weight.double(), torch.float64)
    assert_close(actual, reference.linear_rows(x, weight, dtype), exact=exact)


@pytest.mark.parametrize("isa", available_isas())
def test_16_bits_in_32_bits_out(isa):
    x, weight = inputs(5, 64, 320, torch.bfloat16)
    exact = reference.linear_rows(x.double(), weight.double(), torch.float64)
    with forced_isa(isa):
        actual = ops.linear_rows(x, weight, torch.float32)
    assert_close(actual, reference.linear_rows(x, weight, torch.float32), exact=exact, slack=4.0)


@pytest.mark.parametrize("isa", available_isas())
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("threads", [1, 2])
def test_a_row_does_not_know_of_the_others(isa, dtype, threads):
    x, weight = inputs(23, 75, 200, dtype)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        with forced_isa(isa):
            alone = torch.cat([ops.linear_rows(row, weight) for row in x.split(1)])
            assert_equal(ops.linear_rows(x, weight), alone)
            assert_equal(ops.linear_rows(x[3:10], weight), alone[3:10])
    finally:
        torch.set_num_threads(before)


def test_writes_its_output_and_nothing_else():
    x, weight = inputs(7, 35, 48, torch.float32)
    with guarded((7, 35), torch.float32, x.device) as out:
        native("_cpu").require().linear_rows(x.numpy(), weight.numpy(), out.numpy(), 2)


@pytest.mark.parametrize("shape", [(0, 4, 8), (3, 0, 8), (3, 4, 0)], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_empty_sides(shape, dtype):
    x, weight = (torch.ones(shape[0], shape[2], dtype=dtype), torch.ones(shape[1], shape[2], dtype=dtype))
    assert_equal(ops.linear_rows(x, weight), torch.zeros(shape[0], shape[1], dtype=dtype))


def test_bf16_rounds_to_even_and_keeps_what_is_not_finite():
    x = torch.tensor([[1.0 + 2**-8], [1.0 + 3 * 2**-8], [torch.inf], [-torch.inf], [torch.nan], [3.4e38]], dtype=torch.float32)
    wide = torch.cat([x, x], 1)
    assert_equal(
        ops.linear_rows(wide.bfloat16()[:, :1].contiguous(), torch.ones(1, 1, dtype=torch.bfloat16)).isnan(),
        torch.tensor([[False], [False], [False], [False], [True], [False]]),
    )
    halves = torch.tensor([[1.0, 2**-8], [1.0 + 2**-7, 2**-8]], dtype=torch.bfloat16)  # sums halfway between two bf16
    summed = ops.linear_rows(halves, torch.ones(1, 2, dtype=torch.bfloat16))
    assert summed.flatten().tolist() == [1.0, 1.0 + 2**-6]


def test_strided_inputs_and_other_types():
    x, weight = inputs(6, 20, 64, torch.bfloat16)
    wide = torch.full((6, 128), torch.nan, dtype=torch.bfloat16)
    wide[:, ::2] = x
    assert_equal(ops.linear_rows(wide[:, ::2], weight), ops.linear_rows(x, weight))
    half = ops.linear_rows(x.half(), weight.half())  # no C++ for fp16: the reference serves it
    assert_equal(half, reference.linear_rows(x.half(), weight.half(), torch.float16))


@pytest.mark.parametrize(
    ("x", "weight", "dtype", "words"),
    [
        (torch.ones(2, 3), torch.ones(4, 5), None, r"weight must be \[4, 3\], got \[4, 5\]"),
        (torch.ones(3), torch.ones(4, 3), None, "x must have 2 axes"),
        (torch.ones(2, 3), torch.ones(4, 3).bfloat16(), None, "weight must be torch.float32, got torch.bfloat16"),
        (torch.ones(2, 3).int(), torch.ones(4, 3).int(), None, "x must be floating point"),
        (torch.ones(2, 3), torch.ones(4, 3), torch.bfloat16, "dtype must be torch.float32"),
        (torch.ones(2, 3), torch.ones(4, 3, device="meta"), None, "weight must be on cpu, got meta"),
    ],
)
def test_refuses_wrong_arguments(x, weight, dtype, words):
    with pytest.raises(InputError, match=words):
        ops.linear_rows(x, weight, dtype)


def test_opcheck_and_compile():
    x, weight = inputs(3, 8, 16, torch.bfloat16)
    torch.library.opcheck(torch.ops.optmem.linear_rows, (x, weight, torch.float32))
    compiled = torch.compile(ops.linear_rows, fullgraph=True, backend="aot_eager")
    assert_equal(compiled(x, weight), ops.linear_rows(x, weight))


def test_says_who_serves_it():
    assert {row.device: row.name for row in ops.implementations() if row.operator == "linear_rows"} == {
        "cpu": "cpp",
        "cuda": "reference",
    }
