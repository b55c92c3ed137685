"""int8 weights: the kernels against the reference for every instruction set, and a decoder whose matrices are held so."""

import math
import random
import string

import pytest
import torch

import optmem
from optmem import ops, reference
from optmem.engine.checkpoint import choose_precision
from optmem.errors import InputError
from optmem.model.cache import Cache
from optmem.model.config import DecoderConfig
from optmem.model.decoder import Experts, Linear
from optmem.model.model import Model
from optmem.model.quantize import LARGEST, quantize, quantize_rows
from optmem.model.random import random_decoder
from optmem.native import native
from optmem.testing import assert_close, assert_equal, available_isas, every_other, fenced, forced_isa, generator, guarded
from optmem.train.scores import likeness

DTYPES = [torch.float32, torch.bfloat16]
SHAPES = [(1, 1, 1), (1, 5, 31), (2, 33, 33), (3, 7, 65), (6, 64, 16), (7, 4, 100), (13, 37, 65)]  # tokens, rows, in
SMALL = DecoderConfig(vocab_size=301, hidden=96, layers=4, heads=3, dense_width=200, experts=16, expert_width=40, top_k=4)


pytestmark = pytest.mark.usefixtures("one_thread")


def inputs(tokens, rows, width, dtype):
    """Tokens, int8 rows with all that int8 can be, and scales, one of them 0."""
    rng = generator(f"int8 {tokens} {rows} {width}")
    x = torch.randn(tokens, width, generator=rng).to(dtype)
    weight = torch.randint(-128, 128, (rows, width), generator=rng, dtype=torch.int8)
    weight[0], weight[-1] = LARGEST, -LARGEST
    scales = torch.rand(rows, generator=rng) * width**-0.5 / LARGEST
    scales[rows // 2] = 0
    return x, weight, scales


def expert_inputs(tokens, hidden, width, experts, top_k, dtype):
    rng = generator(f"int8 experts {tokens} {hidden} {width} {experts} {top_k}")
    x = torch.randn(tokens, hidden, generator=rng).to(dtype)
    router = torch.randn(experts, hidden, generator=rng).to(dtype)
    gate_up, gate_up_scales = quantize_rows(torch.randn(experts, 2 * width, hidden, generator=rng) * hidden**-0.5)
    down, down_scales = quantize_rows(torch.randn(experts, hidden, width, generator=rng) * width**-0.5)
    return x, gate_up, down, ops.route(x, router, top_k), ops.ExpertScales(gate_up_scales, down_scales)


def meaning(x, gate_up, down, routing, scales):
    weights = routing.weights.double() if x.dtype == torch.float64 else routing.weights
    return reference.expert_mlp(x, gate_up, down, weights, routing.order, routing.starts, *scales)


# --- linear_rows ----------------------------------------------------------------------------------------------------------------


def takes_fixed(dtype):
    """Whether tokens of this type meet int8 as 16-bit integers, with the instruction set in force."""
    return dtype == torch.bfloat16 and native("_cpu").require().has_fixed()


def fixed(x):
    """Tokens as the kernel takes them: integers below 2^15, or less in long rows, and what a step of every row is worth."""
    columns_of_a_lane = -(-x.shape[1] // 64) * 64 // 16
    bits_less = max(0, math.ceil(math.log2(columns_of_a_lane / 512)))
    step = 2.0 ** (x.double().abs().amax(1, keepdim=True).log2().floor() - 14 + bits_less)
    return (x.double() / step).round().long(), step


@pytest.mark.parametrize("isa", available_isas())
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_linear_rows_matches_reference(isa, dtype, shape):
    x, weight, scales = map(fenced, inputs(*shape, dtype))
    exact = reference.linear_rows(x.double(), weight, torch.float64, scales)
    with forced_isa(isa):
        for out in {dtype, torch.float32}:
            said = ops.linear_rows(x, weight, out, scales)
            if takes_fixed(dtype):
                check_steps(said, exact, x, weight, scales)
            else:
                assert_close(said, reference.linear_rows(x, weight, out, scales), exact=exact, slack=4.0)


def check_steps(said, exact, x, weight, scales):
    """Off by half a step of every number of a token at most, and by the roundings of fp32 and of the result's type."""
    step = fixed(x)[1]
    sizes = weight.double().abs().sum(1) * scales
    numbers = (x.double().abs() @ weight.double().abs().T) * scales
    bound = 0.501 * step * sizes + 2e-6 * numbers + torch.finfo(said.dtype).eps * exact.abs()
    assert ((said.double() - exact).abs() <= bound).all()


@pytest.mark.parametrize("width", [1, 64, 1280, 8192, 8193, 16384, 40000])
def test_tokens_of_bf16_are_integers(width):
    """The sums are those of integers, also where all are as large as they can be, and a lane's sum of them nearly 2^31."""
    if not takes_fixed(torch.bfloat16):
        pytest.skip("this machine has no products of 16-bit integers")
    x, weight, _ = inputs(5, 9, width, torch.bfloat16)
    x[1], x[2], weight[1] = 255 / 128, -255 / 128, -128
    x[3, 0] = 1e4  # beside it the others are of few steps
    steps, step = fixed(x)
    said = ops.linear_rows(x, weight, torch.float32, torch.ones(9))
    assert steps.abs().max() < 2**15
    sums = (steps @ weight.long().T) * step
    assert ((said.double() - sums).abs() <= 2e-7 * (steps.abs() @ weight.long().abs().T) * step).all()


def test_what_is_not_small_beside_the_largest_is_exact():
    """Numbers down to a 128th of a token's largest: the answer is that of bf16 weights, to the last bit of these small sums."""
    rng = generator("kept")
    x = (torch.randint(1, 256, (4, 100), generator=rng) * 2.0 ** torch.randint(-7, 1, (4, 100), generator=rng)).bfloat16()
    x[:, 0] = 255.0
    weight = torch.randint(-128, 128, (6, 100), generator=rng, dtype=torch.int8)
    said = ops.linear_rows(x, weight, torch.float32, torch.ones(6))
    assert_equal(said.double(), x.double() @ weight.double().T)


def test_tokens_without_steps():
    """Zeros and what is as good as zero give zeros; a NaN or an infinity spoils its own token alone."""
    weight, scales = torch.full((3, 70), 100, dtype=torch.int8), torch.ones(3)
    x = torch.ones(6, 70, dtype=torch.bfloat16)
    x[0], x[1], x[2, 69], x[3, 0], x[4, 7] = 0.0, 1e-39, torch.nan, torch.inf, -torch.inf
    said = ops.linear_rows(fenced(x), fenced(weight), torch.float32, scales)
    assert_equal(said[0], torch.zeros(3))
    assert (said[1].abs() < 1e-34).all()
    assert not said[2:5].isfinite().any()
    assert_equal(said[5], torch.full((3,), 7000.0))


@pytest.mark.parametrize("isa", available_isas())
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("threads", [1, 2])
def test_a_row_does_not_know_of_the_others(isa, dtype, threads):
    x, weight, scales = inputs(23, 75, 201, dtype)
    torch.set_num_threads(threads)
    with forced_isa(isa):
        alone = torch.cat([ops.linear_rows(row, weight, scales=scales) for row in x.split(1)])
        for count in (2, 3, 4, 6, 7, 23):
            assert_equal(ops.linear_rows(x[:count], weight, scales=scales), alone[:count])


@pytest.mark.parametrize("isa", available_isas())
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("tokens", [1, 8])
def test_weights_of_int8_are_summed_as_those_of_the_tokens_type(isa, dtype, tokens):
    x, weight, scales = inputs(tokens, 40, 1280, dtype)
    with forced_isa(isa):
        if takes_fixed(dtype):
            pytest.skip("integers: test_tokens_of_bf16_are_integers")
        sums = ops.linear_rows(x, weight.to(dtype), torch.float32)
        assert_equal(ops.linear_rows(x, weight, torch.float32, scales), sums * scales)


@pytest.mark.parametrize("isa", available_isas())
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("tokens", [1, 9])
def test_every_int8_is_exact(isa, dtype, tokens):
    """Every value in every column of a step, and what lies behind a row's end is not read."""
    weight = torch.arange(-128, 128).to(torch.int8)[:, None].expand(256, 33).contiguous()
    for column in (0, 1, 15, 16, 31, 32):
        x = torch.zeros(tokens, 33, dtype=dtype)
        x[:, column] = 1.0
        with forced_isa(isa):
            said = ops.linear_rows(fenced(x), fenced(weight), torch.float32, torch.ones(256))
        assert_equal(said, torch.arange(-128.0, 128.0).expand(tokens, 256))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_strided_inputs_empty_sides_and_other_types(dtype):
    x, weight, scales = inputs(6, 20, 64, dtype)
    expected = ops.linear_rows(x, weight, scales=scales)
    assert_equal(ops.linear_rows(every_other(x), every_other(weight), scales=every_other(scales)), expected)
    half = ops.linear_rows(x.half(), weight, scales=scales)  # no C++ for fp16: the reference serves it
    assert_equal(half, reference.linear_rows(x.half(), weight, torch.float16, scales))
    assert ops.linear_rows(x[:0], weight, scales=scales).shape == (0, 20)
    assert_equal(ops.linear_rows(x[:, :0], weight[:, :0], scales=scales), torch.zeros(6, 20, dtype=dtype))


def test_writes_its_output_and_nothing_else():
    x, weight, scales = inputs(7, 35, 48, torch.float32)
    with guarded((7, 35), torch.float32, x.device) as out:
        native("_cpu").require().linear_rows(x.numpy(), weight.numpy(), scales.numpy(), out.numpy(), 2)


@pytest.mark.parametrize(
    ("weight", "scales", "words"),
    [
        (torch.ones(4, 3).char(), None, "weight must be torch.float32, got torch.int8"),
        (torch.ones(4, 3), torch.ones(4), "weight must be torch.int8, got torch.float32"),
        (torch.ones(4, 5).char(), torch.ones(4), r"weight must be \[4, 3\], got \[4, 5\]"),
        (torch.ones(4, 3).char(), torch.ones(3), r"scales must be \[4\], got \[3\]"),
        (torch.ones(4, 3).char(), torch.ones(4, 1), r"scales must be \[4\], got \[4, 1\]"),
        (torch.ones(4, 3).char(), torch.ones(4).bfloat16(), "scales must be torch.float32, got torch.bfloat16"),
        (torch.ones(4, 3).char(), torch.ones(4, device="meta"), "scales must be on cpu, got meta"),
    ],
)
def test_refuses_wrong_scales(weight, scales, words):
    with pytest.raises(InputError, match=f"linear_rows: {words}"):
        ops.linear_rows(torch.ones(2, 3), weight, None, scales)


# --- expert_mlp -----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("isa", available_isas())
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("tokens", "hidden", "width", "experts", "top_k"),
    [(1, 8, 1, 1, 1), (3, 33, 35, 4, 4), (1, 64, 96, 64, 6), (13, 31, 65, 3, 2), (40, 70, 33, 8, 3)],
)
def test_expert_mlp_matches_reference(isa, dtype, tokens, hidden, width, experts, top_k):
    x, gate_up, down, routing, scales = expert_inputs(tokens, hidden, width, experts, top_k, dtype)
    gate_up, down, scales = fenced(gate_up), fenced(down), ops.ExpertScales(*map(fenced, scales))
    with forced_isa(isa):
        actual = ops.expert_mlp(x, gate_up, down, routing, scales)
    exact = meaning(x.double(), gate_up, down, routing, scales)
    assert_close(actual, meaning(x, gate_up, down, routing, scales), exact=exact)


@pytest.mark.parametrize("isa", available_isas())
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_token_does_not_know_of_the_others(isa, dtype):
    """Three experts of four for each of 17 tokens: more than a tile for every expert."""
    x, gate_up, down, routing, scales = expert_inputs(17, 49, 41, 4, 3, dtype)
    with forced_isa(isa):
        together = ops.expert_mlp(x, gate_up, down, routing, scales)
        for t in range(17):
            ids = routing.ids[t].long()
            starts = torch.nn.functional.pad(torch.bincount(ids, minlength=4).cumsum(0), (1, 0)).int()
            alone = ops.Routing(routing.ids[t : t + 1], routing.weights[t : t + 1], ids.argsort().int(), starts)
            assert_equal(ops.expert_mlp(x[t : t + 1], gate_up, down, alone, scales), together[t : t + 1])


def test_experts_strided_and_of_other_types():
    x, gate_up, down, routing, scales = expert_inputs(5, 16, 24, 4, 2, torch.float32)
    expected = ops.expert_mlp(x, gate_up, down, routing, scales)
    apart = ops.ExpertScales(*map(every_other, scales))
    assert_equal(ops.expert_mlp(every_other(x), every_other(gate_up), every_other(down), routing, apart), expected)
    assert_equal(ops.expert_mlp(x.half(), gate_up, down, routing, scales), meaning(x.half(), gate_up, down, routing, scales))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda *_: None, "gate_up must be torch.float32, got torch.int8"),
        (lambda gate_up, down: (gate_up[:, :3], down), r"gate_up_scales must be \[3, 16\], got \[3, 3\]"),
        (lambda gate_up, down: (gate_up, down[:2]), r"down_scales must be \[3, 8\], got \[2, 8\]"),
        (lambda gate_up, down: (gate_up.double(), down), "gate_up_scales must be torch.float32, got torch.float64"),
    ],
)
def test_experts_refuse_wrong_scales(change, words):
    x, gate_up, down, routing, scales = expert_inputs(2, 8, 8, 3, 2, torch.float32)
    with pytest.raises(InputError, match=f"expert_mlp: {words}"):
        ops.expert_mlp(x, gate_up, down, routing, change(*scales))


def test_opcheck_and_compile():
    x, weight, scales = inputs(3, 8, 16, torch.bfloat16)
    torch.library.opcheck(torch.ops.optmem.linear_rows, (x, weight, torch.float32, scales))
    compiled = torch.compile(ops.linear_rows, fullgraph=True, backend="aot_eager")
    assert_equal(compiled(x, weight, None, scales), ops.linear_rows(x, weight, None, scales))
    x, gate_up, down, routing, of_experts = expert_inputs(3, 8, 8, 3, 2, torch.float32)
    arguments = (x, gate_up, down, routing.weights, routing.order, routing.starts, *of_experts)
    torch.library.opcheck(torch.ops.optmem.expert_mlp, arguments)


# --- a quantised decoder --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_rows_are_rounded_to_the_nearest_of_255_steps(dtype):
    weight = torch.randn(2, 37, 65, generator=generator("rows")).to(dtype)
    weight[0, 3], weight[1, 0] = 0.0, 1e-44  # zeros, and what is too small for a scale
    steps, scales = quantize_rows(weight)
    assert steps.dtype == torch.int8
    assert steps.shape == weight.shape
    assert scales.shape == weight.shape[:-1]
    assert scales[0, 3] == 0
    assert (steps[0, 3] == 0).all()
    error = (steps.double() * scales.double()[..., None] - weight.double()).abs()
    assert (error <= scales.double()[..., None] * 0.5001 + 1e-43).all()
    assert (steps.abs().amax(-1) == LARGEST)[scales > 1e-40].all()


def passes(decoder, dtype, lengths):
    """Logits of 12 tokens, so many in each pass."""
    embeddings = decoder.embed(torch.randint(0, 301, (12,), generator=generator("tokens")))
    cache = Cache.for_tokens(SMALL, 12, dtype, prompt=12)
    sequence = cache.new_sequence(prompt=12)
    parts = embeddings.split(lengths)
    return torch.cat([decoder.logits(decoder(part, cache.batch([sequence], [len(part)]), cache)) for part in parts])


def widened(decoder):
    """The decoder with fp32 weights of the same values as the quantised one's."""
    plain = random_decoder(SMALL, seed=0)
    for name, module in decoder.named_modules():
        if isinstance(module, Linear):
            plain.get_submodule(name).weight.copy_(reference.scaled_rows(module.weight, module.scales, torch.float32))
        elif isinstance(module, Experts):
            plain.get_submodule(name).gate_up.copy_(module.gate_up.float() * module.gate_up_scales[..., None])
            plain.get_submodule(name).down.copy_(module.down.float() * module.down_scales[..., None])
    return plain


@torch.inference_mode()
def test_a_quantised_decoder_is_that_of_its_rounded_weights():
    decoder = random_decoder(SMALL, seed=0)
    before = passes(decoder, torch.float32, 12)
    quantize(decoder)
    assert decoder.is_quantized
    assert decoder.dtype == torch.float32
    logits = passes(decoder, torch.float32, 12)
    torch.testing.assert_close(logits, passes(widened(decoder), torch.float32, 12), rtol=1e-4, atol=1e-4)
    error = (logits - before).norm() / before.norm()
    assert 0 < error < 0.05
    kept = {name for name, parameter in decoder.named_parameters()}
    assert {name.rsplit(".", 2)[-2] for name in kept} == {
        "embed_tokens",
        "gate",
        "input_layernorm",
        "post_attention_layernorm",
        "norm",
    }


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@torch.inference_mode()
def test_a_prompt_may_be_cut_anywhere(dtype):
    decoder = random_decoder(SMALL, seed=0, dtype=dtype)
    quantize(decoder)
    assert decoder.dtype == dtype
    assert_equal(passes(decoder, dtype, 1), passes(decoder, dtype, 12))
    assert_equal(passes(decoder, dtype, 5), passes(decoder, dtype, 12))


def test_what_cannot_be_quantised_is_refused():
    with pytest.raises(InputError, match="NaN or infinite"):
        quantize_rows(torch.tensor([[1.0, torch.nan]]))
    with pytest.raises(InputError, match="NaN or infinite"):
        quantize_rows(torch.tensor([[1.0, torch.inf]]))
    decoder = random_decoder(SMALL, seed=0)
    quantize(decoder)
    with pytest.raises(InputError, match="quantised already"):
        quantize(decoder)
    with pytest.raises(InputError, match="int8 weights are for a CPU"):
        quantize(random_decoder(SMALL, seed=0).to("meta"))


# --- the engine -----------------------------------------------------------------------------------------------------------------

PROSE = """The lamp on the landing had been out for a week before anyone thought to mention it, and by then the whole house had
learned to climb the stairs by the sound of its own feet. Edna counted fourteen steps, her brother counted thirteen, and
neither would give way: it was agreed, on Sunday (the 3rd), that the stairs themselves would have to be asked.
"""


def noise():
    draw = random.Random(11)
    letters = string.ascii_letters + string.digits + ".,;:!?()"
    return "\n".join("".join(draw.choices(letters, k=60)) for _ in range(12)) + "\n"


@pytest.fixture(scope="module")
def engines():
    return [optmem.Engine.from_pretrained("nano", device="cpu", dtype=dtype) for dtype in ("float32", "int8")]


@pytest.mark.parametrize("text", [PROSE, noise()], ids=["prose", "noise"])
def test_nano_reads_alike(engines, text):
    pages = optmem.paginate(text)
    wide, narrow = (optmem.document_text(engine.decode(engine.encode(pages))) for engine in engines)
    print(
        f"\nlikeness: to the page {likeness(wide, text):.4f} fp32, {likeness(narrow, text):.4f} int8; {likeness(narrow, wide):.4f}"
    )
    assert likeness(narrow, wide) >= 0.99


def test_an_engine_of_int8_keeps_its_type_and_cannot_be_saved(engines, tmp_path):
    wide, narrow = engines
    assert narrow.model.decoder.is_quantized
    assert not wide.model.decoder.is_quantized
    assert narrow.model.decoder.dtype in DTYPES
    assert narrow.model.decoder.lm_head.weight.dtype == torch.int8
    assert narrow.temperatures == wide.temperatures
    with pytest.raises(InputError, match="a quantised model has no weights to save"):
        narrow.model.save(tmp_path / "nano")


def test_int8_is_for_a_cpu():
    with pytest.raises(InputError, match="dtype int8 is for a CPU, not for cuda:0"):
        choose_precision("int8", torch.device("cuda:0"))
    with pytest.raises(InputError, match="must be auto, bfloat16, float16, float32, int8 or fp8, got 'int4'"):
        choose_precision("int4", torch.device("cpu"))


def test_what_cannot_be_quantised_changes_nothing():
    model = Model.random("deepseek-ocr", scale=0.05)
    last = model.decoder.model.layers[-1].mlp.experts.down
    with torch.no_grad():
        last[0, 0, 0] = torch.nan
    with pytest.raises(InputError, match=r"experts\.down"):
        quantize(model.decoder)
    assert not model.decoder.is_quantized
    assert all(parameter.dtype == torch.float32 for parameter in model.decoder.parameters())
    with torch.no_grad():
        last[0, 0, 0] = 0.0
    quantize(model.decoder)
    with pytest.raises(InputError, match="already"):
        quantize(model.decoder)
