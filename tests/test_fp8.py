"""dtype="fp8": a model whose linear layers and experts are 8-bit floats, what it sees and says, and what is refused."""

import logging
import random
import string

import pytest
import torch

import optmem
from optmem import ops, reference
from optmem.engine.checkpoint import choose_precision, encoder_fingerprint, find_checkpoint
from optmem.errors import BackendError, InputError
from optmem.model import layers
from optmem.model.cache import Cache
from optmem.model.decoder import Experts, Linear
from optmem.model.model import Model
from optmem.model.quantize import quantize, quantize_e4m3
from optmem.testing import assert_equal, generator
from optmem.train.scores import likeness

DTYPES = [torch.float32, torch.bfloat16]


pytestmark = pytest.mark.usefixtures("one_thread")


def quantized(family, dtype=torch.float32):
    """A random model as it is, and the same as 8-bit floats."""
    plain, held = (Model.random(family, scale=0.3 if family == "nano" else 0.05, dtype=dtype) for _ in range(2))
    quantize_e4m3(held.encoder, held.decoder)
    return plain, held


def logits_of(model, tokens=12):
    decoder = model.decoder
    ids = torch.randint(0, decoder.config.vocab_size, (tokens,), generator=generator("tokens"))
    cache = Cache.for_tokens(decoder.config, tokens, decoder.dtype, prompt=tokens)
    batch = cache.batch([cache.new_sequence(prompt=tokens)], [tokens])
    return decoder.logits(decoder(decoder.embed(ids), batch, cache))


def error(actual, expected):
    return ((actual.double() - expected.double()).norm() / expected.double().norm()).item()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("family", ["deepseek-ocr", "unlimited-ocr", "deepseek-ocr-2", "nano"])
@torch.inference_mode()
def test_every_family_sees_and_says_nearly_the_same(family, dtype):
    plain, held = quantized(family, dtype)
    side = 1024 if family == "deepseek-ocr-2" else 256
    pixels = torch.randint(0, 256, (1, side, side, 1), generator=generator("pixels"), dtype=torch.uint8)
    features, exact = held.encoder(pixels), plain.encoder(pixels)
    assert features.dtype == exact.dtype == dtype
    assert 0.001 < error(features, exact) < 0.2
    assert 0.001 < error(logits_of(held), logits_of(plain)) < 0.2


def test_what_is_held_as_what():
    plain, held = quantized("deepseek-ocr")
    for part in (held.encoder, held.decoder):
        assert part.is_quantized
        names = {name for name, module in part.named_modules() if isinstance(module, (layers.Linear, Linear))}
        as_floats = {name for name in names if part.get_submodule(name).scales is not None}
        assert names - as_floats == ({"projector.layers"} if part is held.encoder else set())
        for name in as_floats:
            weight, scales = part.get_submodule(name).weight, part.get_submodule(name).scales
            was = getattr(plain, "encoder" if part is held.encoder else "decoder").get_submodule(name).weight
            assert weight.dtype == ops.E4M3
            assert error(reference.scaled_rows(weight, scales, torch.float32), was) < 0.04
    experts = [module for module in held.decoder.modules() if isinstance(module, Experts)]
    assert experts
    assert all(module.gate_up.dtype == module.down.dtype == ops.E4M3 for module in experts)
    left = {name.rsplit(".", 2)[-2] for name, _ in held.decoder.named_parameters()}
    assert left == {"embed_tokens", "gate", "input_layernorm", "post_attention_layernorm", "norm"}
    assert held.decoder.dtype == torch.float32
    assert not plain.encoder.is_quantized


@torch.inference_mode()
def test_tokens_are_rounded_once_for_all_that_take_them(monkeypatch):
    """q, k and v share theirs, and so do gate and up."""
    _, held = quantized("nano")
    widths, made = [], ops.e4m3_rows
    monkeypatch.setattr(ops, "e4m3_rows", lambda x: widths.append(x.shape[-1]) or made(x))
    logits_of(held)
    config = held.decoder.config
    of_attention, of_mlp = 2, 2
    assert len(widths) == config.layers * (of_attention + of_mlp) + 1


def test_what_cannot_be_quantised_changes_nothing():
    model = Model.random("nano", scale=0.2)
    weight = model.encoder.vision_model.transformer.layers[-1].mlp.fc2.weight
    with torch.no_grad():
        weight[0, 0] = torch.inf
    with pytest.raises(InputError, match=r"NaN or infinite cannot be quantised: .*fc2\.weight"):
        quantize_e4m3(model.encoder, model.decoder)
    assert not model.encoder.is_quantized
    assert not model.decoder.is_quantized
    with torch.no_grad():
        weight[0, 0] = 0.0
    quantize_e4m3(model.encoder, model.decoder)
    fresh = Model.random("nano", scale=0.2)
    for again in (lambda: quantize_e4m3(fresh.encoder, model.decoder), lambda: quantize(model.decoder)):
        with pytest.raises(InputError, match="the decoder's weights are quantised already"):
            again()
    with pytest.raises(InputError, match="the encoder's weights are quantised already"):
        quantize_e4m3(model.encoder, fresh.decoder)
    assert not fresh.encoder.is_quantized
    assert not fresh.decoder.is_quantized


@pytest.mark.parametrize("capability", [(8, 0), (8, 9)], ids=str)
def test_a_gpu_without_such_products_is_refused(monkeypatch, capability):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: capability)
    with pytest.raises(BackendError, match=r"need a GPU of compute capability 9\.0 or later"):
        choose_precision("fp8", torch.device("cuda:0"))


def test_what_the_name_means(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (9, 0))
    chosen = choose_precision("fp8", torch.device("cuda:0"))
    assert (chosen.dtype, chosen.held) == (torch.bfloat16, "fp8")
    assert choose_precision("fp8", torch.device("cpu")).dtype in DTYPES
    for wrong in (torch.float8_e4m3fn, "float8", "fp4"):
        with pytest.raises(InputError, match="must be auto, bfloat16, float16, float32, int8 or fp8, got"):
            choose_precision(wrong, torch.device("cpu"))


# --- the engine -----------------------------------------------------------------------------------------------------------------

PROSE = """Nobody had wound the clock in the hall since the funeral, and yet it went on striking, a little late and always one too
many. Aunt Sibyl blamed the damp; the twins blamed each other; the plumber, who had come about something else (invoice 2041), put
his ear to the case, listened to the end, and said that in his opinion it was counting us.
"""


def noise():
    draw = random.Random(5)
    letters = string.ascii_letters + string.digits + ".,;:!?()"
    return "\n".join("".join(draw.choices(letters, k=60)) for _ in range(12)) + "\n"


@pytest.fixture(scope="module")
def engines():
    return [optmem.Engine.from_pretrained("nano", device="cpu", dtype=dtype) for dtype in ("float32", "fp8")]


@pytest.mark.parametrize("text", [PROSE, noise()], ids=["prose", "noise"])
def test_nano_reads_alike(engines, text):
    pages = optmem.paginate(text)
    wide, narrow = (optmem.document_text(engine.decode(engine.encode(pages))) for engine in engines)
    print(f"\nto the page {likeness(wide, text):.4f} fp32, {likeness(narrow, text):.4f} fp8; {likeness(narrow, wide):.4f}")
    assert likeness(narrow, wide) >= 0.98


def test_vision_tokens_are_those_of_the_weights_it_was_made_of(engines):
    """Either engine reads the other's; a quantised encoder alone cannot say which it was."""
    wide, narrow = engines
    assert narrow.encoder_fingerprint == wide.encoder_fingerprint
    pages = optmem.paginate("a line\n")
    seen = [engine.encode(pages)[0] for engine in engines]
    assert 0 < error(seen[1].features, seen[0].features) < 0.1
    assert {engine.decode(tokens)[0].text for engine in engines for tokens in seen} == {"a line\n"}
    with pytest.raises(InputError, match="a quantised encoder cannot be compared"):
        encoder_fingerprint(narrow.model.encoder)
    with pytest.raises(InputError, match="give the engine the fingerprint"):
        optmem.Engine(narrow.model).encode(pages)


def test_it_keeps_its_temperatures_and_cannot_be_saved(engines, tmp_path):
    wide, narrow = engines
    assert narrow.temperatures == wide.temperatures
    assert narrow.model.decoder.dtype in DTYPES
    with pytest.raises(InputError, match="a quantised model has no weights to save"):
        narrow.model.save(tmp_path / "nano")


def test_int8_leaves_the_encoder_as_it_is():
    engine = optmem.Engine.from_pretrained("nano", device="cpu", dtype="int8")
    assert engine.model.decoder.is_quantized
    assert not engine.model.encoder.is_quantized
    assert engine.encoder_fingerprint == encoder_fingerprint(Model.load(find_checkpoint("nano")).encoder)


def test_a_cpu_says_that_it_is_slow(caplog):
    with caplog.at_level(logging.WARNING):
        optmem.Engine.from_pretrained("nano", device="cpu", dtype="fp8")
    assert "fp8 on a CPU is served by plain torch, for proof and not for speed" in caplog.text


def test_both_kinds_of_8_bits_go_together():
    engine = optmem.Engine.from_pretrained("nano", device="cpu", dtype="fp8", kv="8bit")
    pages = optmem.paginate("two lines\nof text\n")
    assert engine.decode(engine.encode(pages))[0].text == "two lines\nof text\n"


def test_a_model_that_is_not_quantised_takes_the_path_it_took(monkeypatch):
    """No operator of 8-bit floats is called for it."""
    model = Model.random("nano", scale=0.2)
    before = logits_of(model)
    monkeypatch.setattr(ops, "e4m3_rows", None)
    monkeypatch.setattr(ops, "linear_e4m3", None)
    assert_equal(logits_of(model), before)
