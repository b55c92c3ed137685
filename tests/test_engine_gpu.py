"""On a GPU: recorded passes are what the same passes are when they are called, bit for bit, and near to those of a plain runner.

Every pass must have been recorded: one that waits for the host, of whatever operator, fails here by its name.
"""

import logging
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch

from optmem import document_text, paginate
from optmem.engine import Engine
from optmem.engine.graphs import GraphRunner
from optmem.engine.lanes import CudaLane, Lanes, Recordings
from optmem.engine.loop import Loop
from optmem.engine.runner import Runner
from optmem.engine.sampling import Sampling
from optmem.engine.scheduler import Limits, Scheduler
from optmem.engine.view_encoder import ViewEncoder
from optmem.machine import E4M3_CAPABILITY
from optmem.model.cache import Cache
from optmem.model.decoder import Decoder
from optmem.model.model import Model
from optmem.pixels import make_views
from optmem.testing import assert_equal, generator
from optmem.text.ngram import NgramGuard

from .test_nano import tiny_model
from .test_scheduler import run, said, talkative, texts

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")]
DEVICE = torch.device("cuda")
TEXTS = 13


class Called(CudaLane):
    """Streams and memory as ever, and nothing is recorded."""

    def record(self, act):
        return act


def lane(way, *, is_urgent=True):
    return (CudaLane if way == "recorded" else Called)(DEVICE, is_urgent=is_urgent)


@pytest.fixture(scope="module", params=[torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def decoder(request) -> Decoder:
    return talkative().to(DEVICE, request.param)


@dataclass
class Read:
    """What was said, and by whom."""

    texts: list
    runner: Runner


def read(decoder, way, seed, **changes):
    """Texts that all begin at once, by hand, on the stream that this thread has."""
    cache = Cache(decoder.config, 64, dtype=decoder.dtype, device=DEVICE)
    limits = Limits(texts=TEXTS)
    scheduler = Scheduler(cache, decoder.config.vocab_size, decoder.config.max_positions, limits)
    runner = Runner(decoder, cache) if way == "plain" else GraphRunner(decoder, cache, lane(way), texts=TEXTS)
    speeches = texts(decoder, 20, seed=seed, **changes)
    moved = {}
    for speech in speeches:  # prefixes are shared, each length by its own
        there = replace(speech.prefix, embeddings=speech.prefix.embeddings.to(DEVICE))
        speech.prefix, speech.own = moved.setdefault(there.length, there), speech.own.to(DEVICE)
    run(Loop(scheduler, runner), speeches)
    return Read(said(speeches), runner)


# --- a lane -------------------------------------------------------------------------------------------------------------------


def test_a_recording_reads_its_memory_anew():
    passes, x = Recordings(lane("recorded"), "test"), torch.zeros(3, device=DEVICE)
    for number in range(5):
        x.fill_(number)
        assert passes.run("twice", lambda: 2 * x + 1).tolist() == [2 * number + 1] * 3
    assert passes.plain == []


def test_what_waits_for_the_host_is_called_and_the_lane_goes_on(caplog):
    way, x = lane("recorded"), torch.ones(3, device=DEVICE)
    passes, stream = Recordings(way, "test"), torch.cuda.current_stream()
    with caplog.at_level(logging.WARNING):
        for number in range(4):
            x.fill_(number)
            assert passes.run("waits", lambda: x * float(x.sum())).tolist() == [3 * number**2] * 3
    assert (passes.plain, len(caplog.records)) == (["waits"], 1)
    assert torch.cuda.current_stream() == stream
    for number in range(4):
        x.fill_(number)
        assert passes.run("fine", lambda: x + 1).tolist() == [number + 1] * 3
    assert passes.plain == ["waits"]


def test_what_is_taken_from_a_lane_is_done():
    way, big = lane("recorded", is_urgent=False), torch.randn(4096, 4096, device=DEVICE)
    wanted = big @ big
    for _ in range(20):
        with way.working(follows=True):
            found = big @ big
        way.use(found)
        assert_equal(found, wanted)
        del found


# --- decoding -----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "sampling", [Sampling(), Sampling(guard=NgramGuard(2, 30)), Sampling(temperature=0.8, seed=5)], ids=["greedy", "guard", "drawn"]
)
def test_recorded_passes_say_what_called_ones_say(decoder, sampling):
    called, recorded = (read(decoder, way, 1, sampling=sampling) for way in ("called", "recorded"))
    assert recorded.texts == called.texts
    assert recorded.runner.passes.plain == []
    assert len(recorded.runner.passes._known) > 3


def test_and_nearly_what_a_plain_runner_says(decoder):
    """A row's sums may have another order in a batch of another size, and a text goes its own way from the first near tie on."""
    plain, recorded = (read(decoder, way, 2) for way in ("plain", "recorded"))
    same = [one[0] == other[0] for one, other in zip(plain.texts, recorded.texts, strict=True)]
    assert sum(same) >= (20 if decoder.dtype == torch.float32 else 15)
    for (_, wanted), (_, found), is_same in zip(plain.texts, recorded.texts, same, strict=True):
        if is_same:
            assert found == pytest.approx(wanted, abs=1e-3 if decoder.dtype == torch.float32 else 0.2)


# --- encoding -----------------------------------------------------------------------------------------------------------------


def views(number, side=256):
    pixels = torch.randint(0, 256, (side, side), generator=generator(f"picture {number}"), dtype=torch.uint8)
    return make_views(pixels.numpy(), f"square {side}")


def on_gpu(model):
    return Model(model.config, {name: weight.to(DEVICE) for name, weight in model.weights().items()}, model.tokenizer, model.files)


@pytest.mark.parametrize("family", ["nano", "deepseek-ocr"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_recorded_views_are_called_views(family, dtype):
    model = on_gpu(Model.random(family, scale=1 if family == "nano" else 0.1, dtype=dtype))
    called, recorded = (ViewEncoder(model.encoder, lane(way, is_urgent=False)) for way in ("called", "recorded"))
    for first, count in ((0, 1), (1, 3), (9, 3), (20, 7), (2, 1), (30, 7), (40, 3)):
        pictures = [views(first + at) for at in range(count)]
        for found, wanted in zip(recorded.encode(pictures), called.encode(pictures), strict=True):
            assert found.isfinite().all()
            assert_equal(found, wanted)
    assert recorded.passes.plain == []


# --- both at once -------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def model():
    made = tiny_model(seed=3)
    with torch.no_grad():
        made.decoder.lm_head.weight.mul_(20)
        made.decoder.model.embed_tokens.weight.mul_(20)
    return on_gpu(made)


def grey(count, side=128):
    rng = np.random.default_rng(count)
    return [rng.integers(0, 256, (side, side), dtype=np.uint8) for _ in range(count)]


def test_an_engine_reads_the_same_again_and_again_while_others_encode(model):
    """Two streams: features are whole before a prompt is made of them, and nobody's memory is given away while it is read."""
    with Engine(model, cache_bytes=1 << 26) as engine:
        first = engine.encode(grey(6))
        wanted = [engine.decode(page, rows=range(4), draft=None)[0] for page in first]
        with ThreadPoolExecutor(4) as pool:
            noise = [pool.submit(engine.encode, grey(30 + at)) for at in range(12)]
            for _ in range(4):
                again = engine.encode(grey(6))
                for one, other in zip(again, first, strict=True):
                    torch.testing.assert_close(one.features, other.features, atol=1e-4, rtol=1e-3)
                found = [engine.decode(page, rows=range(4), draft=None)[0] for page in first]
                assert [each.text for each in found] == [each.text for each in wanted]
            assert [len(each.result(60)) for each in noise] == [30 + at for at in range(12)]
        assert engine._loop.runner.passes.plain == []


def test_an_engine_reads_pictures_and_encodes_the_next_meanwhile(model):
    """What `ocr` reads is what its pages read alone, by an engine that records nothing."""
    pictures, lanes = grey(40), Lanes(Called(DEVICE, is_urgent=True), Called(DEVICE, is_urgent=False))
    with Engine(model, cache_bytes=1 << 26) as engine, Engine(model, cache_bytes=1 << 26, lanes=lanes) as plain:
        for _ in range(2):
            found = list(engine.ocr(pictures, rows=range(3), draft=None))
            wanted = list(plain.ocr(pictures, rows=range(3), draft=None))
            assert [done.error for done in found] == [None] * 40
            same = sum(one.text == other.text for one, other in zip(found, wanted, strict=True))
            assert same >= 36  # batches are not the same in both, and a near tie may fall the other way


@pytest.mark.skipif(
    torch.cuda.is_available() and torch.cuda.get_device_capability() < E4M3_CAPABILITY, reason="this GPU has no products of e4m3"
)
def test_an_engine_of_8_bit_floats_reads_and_records_its_passes():
    text = "A page of words,\nand of 8-bit floats.\n"
    with Engine.from_pretrained("nano", device="cuda", dtype="fp8") as engine:
        for _ in range(3):
            assert document_text(engine.decode(engine.encode(paginate(text)), draft=None)) == text
        assert engine._loop.runner.passes.plain == []


def test_an_engine_finds_room_by_itself(model):
    with Engine(model) as engine:
        assert engine.decode(engine.encode(grey(1)), rows=[0], max_tokens=3)[0].output_tokens >= 1
        cache = engine._loop.scheduler.cache
        assert cache.num_pages * cache.page_size >= 128 * 1024
        assert isinstance(engine._loop.runner, GraphRunner)
