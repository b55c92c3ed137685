"""attention: every implementation against the reference, what its mask means, what it refuses, and the choice of tiles.

The Triton kernel runs on the GPU, or in the interpreter where there is none: a step for every 64 keys.
"""

import itertools
import subprocess
import sys
import types
from importlib import import_module

import pytest
import torch

from optmem import ops, reference
from optmem.errors import InputError
from optmem.kernels.launch import ATTENTION_NARROW, ATTENTION_WIDE, WIDEST_HEAD, attention_tile, attention_tiles
from optmem.native import native
from optmem.ops import attending
from optmem.ops.attending import AttentionCall, attention_server
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
    assert_equal(attending._attention_cuda(*inputs, 2), attending._attention(*inputs, 2))


def test_cuda_takes_the_kernel(monkeypatch):
    asked = []
    monkeypatch.setattr(triton_kernel(), "attention", lambda *arguments: asked.append(arguments))
    inputs = attention_inputs(2, 5, 7, (4, 2), 8, torch.float32, DEVICE)
    out = attending._attention_cuda(*inputs, 3)
    ((*given, prefix, target),) = asked
    assert all(a is b for a, b in zip(given, inputs, strict=True))
    assert (prefix, target.data_ptr()) == (3, out.data_ptr())


# --- flash-attn ---------------------------------------------------------------------------------------------------------------

HALF = AttentionCall(torch.bfloat16, 64, 257, 257, 257)


@pytest.mark.parametrize(
    ("call", "server"),
    [
        (HALF, "flash-attn"),
        (HALF._replace(dtype=torch.float16), "flash-attn"),
        (HALF._replace(dtype=torch.float32), "triton"),
        (HALF._replace(prefix=0), "flash-attn"),  # causal
        (HALF._replace(num_keys=300, prefix=0), "flash-attn"),  # the last of a longer sequence
        (HALF._replace(num_keys=300, prefix=44), "flash-attn"),  # a prefix that ends with the first query
        (HALF._replace(num_keys=300, prefix=45), "triton"),  # the first query sees one key behind it
        (HALF._replace(prefix=128), "triton"),  # the second generation's mixed mask
        (HALF._replace(prefix=256), "triton"),  # all but one
        (HALF._replace(num_queries=1), "triton"),
        (HALF._replace(head_dim=128), "flash-attn"),
        (HALF._replace(head_dim=256), "flash-attn"),  # wider than our own kernel takes
        (HALF._replace(head_dim=264), "torch"),
        (HALF._replace(head_dim=68), "triton"),
        (HALF._replace(head_dim=200, dtype=torch.float32), "torch"),
    ],
)  # fmt: skip
def test_who_serves_a_call(call, server):
    assert attention_server(call, has_flash=True, has_triton=True) == server
    own = "triton" if call.head_dim <= WIDEST_HEAD else "torch"
    assert attention_server(call, has_flash=False, has_triton=True) == own
    assert attention_server(call, has_flash=False, has_triton=False) == "torch"
    assert attention_server(call, has_flash=True, has_triton=False) == ("flash-attn" if server == "flash-attn" else "torch")


def test_what_is_called_full_and_causal_is_what_the_mask_says():
    for num_keys, num_queries in itertools.product(range(1, 7), repeat=2):
        for prefix in range(num_keys + 1) if num_queries <= num_keys else ():
            mask = reference.attention_mask(num_queries, num_keys, prefix, CPU)
            call = HALF._replace(num_queries=num_queries, num_keys=num_keys, prefix=prefix)
            assert call.is_causal == torch.equal(mask, reference.attention_mask(num_queries, num_keys, 0, CPU))
            assert bool(mask.all()) == (call.is_full or num_queries == 1)


class StandIn(types.ModuleType):
    """In the place of flash-attn, which is not installed here: the signature of its function and its meaning, in torch.

    It says nothing of the package itself.  Sequences are packed one behind the other, and a causal mask ends with the last query
    at the last key.
    """

    __version__ = "0.0"

    def __init__(self):
        super().__init__("flash_attn")
        self.asked = []

    def flash_attn_varlen_func(
        self, q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, dropout_p=0.0, softmax_scale=None, causal=False
    ):  # fmt: skip
        assert q.dim() == k.dim() == v.dim() == 3
        assert q.stride(2) == k.stride(2) == v.stride(2) == 1
        assert cu_seqlens_q.dtype == cu_seqlens_k.dtype == torch.int32
        assert dropout_p == 0
        self.asked.append((q, k, v))
        groups, out = q.shape[1] // k.shape[1], torch.full_like(q, torch.nan)
        edges = (list(itertools.pairwise(edges.tolist())) for edges in (cu_seqlens_q, cu_seqlens_k))
        for (first, end), (first_key, end_key) in zip(*edges, strict=True):
            assert end - first <= max_seqlen_q
            assert end_key - first_key <= max_seqlen_k
            keys, values = (x[first_key:end_key].double().repeat_interleave(groups, 1) for x in (k, v))
            logits = torch.einsum("qhd,khd->hqk", q[first:end].double(), keys) * softmax_scale
            if causal:
                seen = torch.ones(end - first, end_key - first_key).tril(end_key - first_key - (end - first)).bool()
                logits = logits.masked_fill(~seen, -torch.inf)
            out[first:end] = torch.einsum("hqk,khd->qhd", logits.softmax(-1), values).to(q.dtype)
        return out


@pytest.fixture
def stand_in(monkeypatch):
    module = StandIn()
    monkeypatch.setitem(sys.modules, "flash_attn", module)
    attending.flash_attn.cache_clear()
    yield module
    attending.flash_attn.cache_clear()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(
    ("batch", "num_queries", "num_keys", "heads", "prefix"),
    [(2, 65, 65, (2, 2), 65), (3, 33, 33, (3, 1), 0), (2, 5, 17, (4, 2), 0), (1, 5, 17, (4, 2), 13), (0, 4, 4, (1, 1), 4)],
)
def test_what_flash_attn_is_asked(stand_in, dtype, batch, num_queries, num_keys, heads, prefix):
    """The arguments, through a stand-in.  The package itself has not run here."""
    inputs = attention_inputs(batch, num_queries, num_keys, heads, 16, dtype, CPU)
    call = AttentionCall(dtype, 16, num_queries, num_keys, prefix)
    server = attention_server(call, has_flash=True, has_triton=True)
    assert server == "flash-attn"
    mixed = attending.serve_attention(server, *inputs, prefix)
    exact = reference.attention(*(tensor.double() for tensor in inputs), prefix)
    assert_close(mixed, reference.attention(*inputs, prefix), exact=exact)
    assert len(stand_in.asked) == (batch > 0)


def test_flash_attn_is_given_slices_as_they_are(stand_in):
    qkv = torch.randn(2, 9, 3, 2, 8, generator=generator("slices")).bfloat16()
    mixed = attending.serve_attention("flash-attn", *qkv.unbind(2), 9)
    assert [each.data_ptr() for each in stand_in.asked[0]] == [each.data_ptr() for each in qkv.unbind(2)]
    assert mixed.is_contiguous()


@pytest.mark.usefixtures("stand_in")
def test_says_that_flash_attn_serves_it(caplog):
    pytest.importorskip("triton")
    with caplog.at_level("INFO"):
        row = attending._attention_served()
    assert (row.name, row.reason[:5]) == ("flash-attn", "0.0: ")
    assert "kernels/attention.py up to 128, scaled_dot_product_attention" in row.reason
    assert [record.getMessage() for record in caplog.records] == [
        "attention: flash-attn 0.0 serves full and causal attention in 16 bits on CUDA"
    ]


def test_a_flash_attn_that_does_not_load_is_said(tmp_path, monkeypatch, caplog):
    """Built for another torch, as it often is: the package is there, and its import fails."""
    (tmp_path / "flash_attn.py").write_text("raise ImportError('undefined symbol: _ZN3c10')")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "flash_attn", raising=False)
    attending.flash_attn.cache_clear()
    try:
        row = attending._attention_served()
    finally:
        attending.flash_attn.cache_clear()
    assert row.name != "flash-attn"
    assert row.reason.endswith("; flash-attn does not load: undefined symbol: _ZN3c10")
    assert [record.levelname for record in caplog.records] == ["WARNING"]


def test_flash_attn_is_not_imported_with_the_package(tmp_path):
    """One that ends the process when it is imported: the package lives, asking who serves does not."""
    (tmp_path / "flash_attn.py").write_text("raise SystemExit(3)")
    before = f"import sys; sys.path.insert(0, {str(tmp_path)!r}); import optmem; from optmem import ops"
    for code, ends in ((before, 0), (f"{before}; ops.implementations()", 3)):
        assert subprocess.run([sys.executable, "-c", code], check=False).returncode == ends


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available() or attending.flash_attn().module is None, reason="no GPU with flash-attn")
@pytest.mark.parametrize(("num_queries", "num_keys", "prefix"), [(257, 257, 257), (129, 129, 0), (5, 300, 0)])
def test_flash_attn_itself(num_queries, num_keys, prefix):
    inputs = attention_inputs(2, num_queries, num_keys, (4, 2), 64, torch.bfloat16, DEVICE)
    exact = reference.attention(*(tensor.double() for tensor in inputs), prefix)
    mixed = attending.serve_attention("flash-attn", *inputs, prefix)
    assert_close(mixed, reference.attention(*inputs, prefix), exact=exact)
    alone = [tensor[1:] for tensor in inputs]
    assert_equal(attending.serve_attention("flash-attn", *alone, prefix), mixed[1:])  # no batch mates


# --- the kernel's tiles -------------------------------------------------------------------------------------------------------


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


@pytest.mark.parametrize("count", [1, 2, 15, 16, 17, 101, 257])
@pytest.mark.parametrize("head_dim", [16, 64])
def test_all_see_all_in_16_bits(count, head_dim):
    """What CLIP asks of a CPU: slices of one projection, and a page that holds a NaN beside one that does not."""
    packed = torch.randn(2, count, 3, 2, head_dim, generator=generator(f"all {count} {head_dim}")).bfloat16()
    query, key, value = packed.unbind(2)
    exact = reference.attention(query.double(), key.double(), value.double(), count)
    assert_close(ops.attention(query, key, value, count), reference.attention(query, key, value, count), exact=exact)
    packed[1, -1] = torch.nan
    mixed = ops.attention(query, key, value, count)
    assert mixed[1].isnan().all()
    assert_equal(mixed[0], ops.attention(query[:1], key[:1], value[:1], count)[0])


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


@pytest.mark.skipif(attending.flash_attn().module is not None, reason="flash-attn is installed, and serves it")
def test_says_who_serves_it():
    rows = {row.device: row.name for row in ops.implementations() if row.operator == "attention"}
    pytest.importorskip("triton")
    cpu = native("_cpu").module
    has_cpp = cpu is not None and cpu.has_grid_attention(64)
    assert rows == {"cpu": "cpp" if has_cpp else "torch", "cuda": "triton"}
