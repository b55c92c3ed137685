"""linear: every implementation against the reference, and what it refuses."""

from importlib import import_module

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from optmem import ops, reference
from optmem.errors import InputError
from optmem.native import native
from optmem.testing import assert_close, assert_equal, every_other, fenced, forced_isa, generator, guarded

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
DEVICES = ["cpu", "cuda"] if DEVICE.type == "cuda" else ["cpu"]
ACTIVATIONS = ["none", "gelu", "quick_gelu"]
cpu = native("_cpu").module
with_bf16 = pytest.mark.skipif(cpu is None or not cpu.has_linear(2), reason="no bf16 products here")


def inputs_of(rows, width_in, width_out, dtype=torch.bfloat16, *, has_bias=True, device="cpu"):
    rng = generator(f"linear {rows} {width_in} {width_out}")
    x = torch.randn(rows, width_in, generator=rng) * 3
    weight = torch.randn(width_out, width_in, generator=rng) / width_in**0.5
    bias = torch.randn(width_out, generator=rng) if has_bias else None
    return tuple(None if tensor is None else tensor.to(device, dtype) for tensor in (x, weight, bias))


def check_against_reference(inputs, activation):
    exact = reference.linear(*(None if tensor is None else tensor.double() for tensor in inputs), activation)
    out = ops.linear(*(None if tensor is None else fenced(tensor) for tensor in inputs), activation)
    assert_close(out, reference.linear(*inputs, activation), exact=exact, slack=1.0)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("has_bias", [True, False], ids=["bias", "no bias"])
def test_matches_reference(device, dtype, activation, has_bias):
    check_against_reference(inputs_of(37, 96, 130, dtype, has_bias=has_bias, device=device), activation)


@settings(max_examples=80, deadline=None)
@given(st.integers(1, 40), st.integers(1, 80), st.integers(1, 200), st.booleans(), st.sampled_from(ACTIVATIONS))
def test_any_shape_matches_the_reference(rows, width_in, width_out, has_bias, activation):
    check_against_reference(inputs_of(rows, width_in, width_out, has_bias=has_bias), activation)


@pytest.mark.parametrize("shape", [(101, 1024, 1024), (257, 4096, 128), (1600, 768, 768), (1, 5000, 64)])
def test_full_sizes_match_the_reference(shape):
    """More weights than one panel holds, more rows than one stretch."""
    check_against_reference(inputs_of(*shape), "gelu")


@with_bf16
def test_a_row_does_not_know_what_else_is_computed():
    x, weight, bias = inputs_of(400, 64, 96)
    together = ops.linear(x, weight, bias, "gelu")
    threads = torch.get_num_threads()
    for count in (1, 2, 5):
        torch.set_num_threads(count)
        try:
            assert_equal(ops.linear(x, weight, bias, "gelu"), together)
            for row in (0, 5, 6, 399):
                alone = ops.linear(x[row : row + 1], weight, bias, "gelu")
                assert_equal(alone, together[row : row + 1])
        finally:
            torch.set_num_threads(threads)


@with_bf16
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_functions_at_every_bf16(activation):
    """The weight one passes x through: all finite numbers, both zeros, and NaN."""
    bits = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16)
    x = bits.view(torch.bfloat16)
    x = x[~x.isinf() & (x.abs() < 1e30)][:, None]
    pairs = torch.cat([x, torch.zeros_like(x)], 1)  # an even number of inputs
    out = ops.linear(pairs, torch.tensor([[1.0, 0.0]], dtype=torch.bfloat16), None, activation)[:, 0]
    exact = reference.linear(pairs.double(), torch.tensor([[1.0, 0.0]]).double(), None, activation)[:, 0]
    normal = exact.abs() > 1e-37
    close = (out.double() - exact).abs() <= 2.0**-8 * exact.abs() + 1e-6
    assert close[normal].all(), x[normal][~close[normal]][:5]


@with_bf16
def test_a_nan_stays_in_its_row():
    x, weight, bias = inputs_of(20, 64, 96)
    before = ops.linear(x, weight, bias, "gelu")
    x[7, 3] = torch.nan
    after = ops.linear(x, weight, bias, "gelu")
    assert after[7].isnan().all()
    after[7] = before[7]
    assert_equal(after, before)


def test_other_instruction_sets_take_torch():
    inputs = inputs_of(9, 64, 70)
    with forced_isa("plain"):
        assert not cpu.has_linear(64)
        assert_equal(ops.linear(*inputs, "gelu"), reference.linear(*inputs, "gelu"))


def test_strided_inputs_more_axes_and_nothing():
    x, weight, bias = inputs_of(24, 32, 48)
    expected = ops.linear(x, weight, bias)
    assert_equal(ops.linear(every_other(x), every_other(weight), every_other(bias)), expected)
    assert_equal(ops.linear(x.view(2, 3, 4, 32), weight, bias), expected.view(2, 3, 4, 48))
    assert_equal(ops.linear(x[0], weight, bias), expected[0])
    assert ops.linear(x[:0], weight, bias).shape == (0, 48)
    assert ops.linear(x.view(2, 12, 32)[:, :0], weight, bias).shape == (2, 0, 48)
    assert ops.linear(x, weight[:0], bias[:0]).shape == (24, 0)


@pytest.mark.parametrize(
    ("position", "wrong", "words"),
    [
        (0, torch.zeros(3, 7), r"weight must be \[out, 7\], got \[5, 8\]"),
        (0, torch.zeros(3, 0), r"x must be \[..., in\] with in at least 1"),
        (0, torch.zeros(3, 8, dtype=torch.float64), "got torch.float64"),
        (1, torch.zeros(5), r"weight must be \[out, 8\], got \[5\]"),
        (1, torch.zeros(5, 8, dtype=torch.bfloat16), "weight must be torch.float32, got torch.bfloat16"),
        (2, torch.zeros(4), r"bias must be \[5\], got \[4\]"),
        (2, torch.zeros(5, device="meta"), "bias must be on cpu, got meta"),
        (3, "relu", "activation must be one of .*, got 'relu'"),
    ],
)
def test_refuses_wrong_arguments(position, wrong, words):
    inputs = [*inputs_of(3, 8, 5, torch.float32), "none"]
    inputs[position] = wrong
    with pytest.raises(InputError, match=words):
        ops.linear(*inputs)


def test_opcheck_gradients_and_graphs():
    inputs = inputs_of(3, 8, 5, device=DEVICE)
    torch.library.opcheck(torch.ops.optmem.linear, (*inputs, "gelu"))
    compiled = torch.compile(ops.linear, fullgraph=True, backend="aot_eager")
    assert_equal(compiled(*inputs, "gelu"), ops.linear(*inputs, "gelu"))
    leaves = [tensor.float().requires_grad_() for tensor in inputs]
    ours, theirs = (torch.autograd.grad(run(*leaves, "gelu").sum(), leaves) for run in (ops.linear, reference.linear))
    for actual, expected in zip(ours, theirs, strict=True):
        assert_equal(actual, expected)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("activation", ["gelu", "quick_gelu"])
@pytest.mark.parametrize("count", [0, 1, 2047, 2049])
def test_triton_activation(dtype, activation, count):
    """In place, between guard bands: the launcher alone, on the GPU or in the interpreter."""
    pytest.importorskip("triton")
    x = torch.linspace(-12, 12, count, device=DEVICE).to(dtype)
    weight = torch.ones(1, 1, device=DEVICE)
    expected, exact = (
        reference.linear(x[:, None].to(inside), weight.to(inside), None, activation)[:, 0] for inside in (dtype, torch.float64)
    )
    with guarded((count,), dtype, DEVICE) as out:
        out.copy_(x)
        import_module("optmem.kernels.linear").activate(out, activation)
    assert_close(out, expected, exact=exact)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_cuda_is_the_product_and_then_the_function(activation):
    pytest.importorskip("triton")
    inputs = inputs_of(5, 16, 24, torch.float32, device=DEVICE)
    exact = reference.linear(*(tensor.double() for tensor in inputs), activation)
    on_cuda = import_module("optmem.ops.linear")._linear_cuda
    assert_close(on_cuda(*inputs, activation), reference.linear(*inputs, activation), exact=exact)


def test_says_who_serves_it():
    rows = {row.device: row.name for row in ops.implementations() if row.operator == "linear"}
    assert rows == {"cpu": "cpp" if cpu is not None and cpu.has_linear(2) else "torch", "cuda": "torch"}
