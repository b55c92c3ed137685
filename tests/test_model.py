"""Whole models: pictures and a prompt to tokens, beside transformers; saving and loading; any family at any scale."""

import time
from dataclasses import replace

import pytest
import torch

from optmem.errors import CheckpointError, InputError
from optmem.model.cache import Cache
from optmem.model.config import scaled
from optmem.model.config_json import public_config
from optmem.model.decoder import greedy
from optmem.model.model import Model
from optmem.pixels import MODES, Mode, Views
from optmem.testing import assert_equal, generator
from optmem.testing.checkpoints import random_weights, special_ids, tiny_config, tokenizer_json
from optmem.testing.oracle import as_floats, build_oracle

FAMILIES = ("deepseek-ocr", "unlimited-ocr", "deepseek-ocr-2")


@pytest.mark.parametrize("family", FAMILIES)
def test_scale_one_is_the_public_model(family):
    assert scaled(public_config(family), 1) == public_config(family)


@pytest.mark.parametrize("scale", [0, -1, 1.5, float("nan")])
def test_scales_outside_zero_and_one_are_refused(scale):
    with pytest.raises(InputError, match="scale must be"):
        scaled(public_config("deepseek-ocr"), scale)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_saved_model_comes_back_bit_for_bit_in_under_a_second(tmp_path, family):
    model = Model.random(family, scale=0.1, dtype=torch.bfloat16)
    assert 5e6 < sum(weight.numel() for weight in model.weights().values()) < 4e7
    model.save(tmp_path / "model")
    start = time.perf_counter()
    loaded = Model.load(tmp_path / "model")
    assert time.perf_counter() - start < 1
    assert loaded.config == model.config
    assert loaded.weights().keys() == model.weights().keys()
    for name, weight in model.weights().items():
        assert_equal(loaded.weights()[name], weight)


def test_a_tokenizer_travels_with_its_model(tmp_path):
    content = tokenizer_json()
    config = tiny_config("deepseek-ocr", image_id=special_ids(content)["<image>"])
    Model(config, random_weights(config)).save(tmp_path / "good", files={"tokenizer.json": content})
    assert Model.load(tmp_path / "good").tokenizer is not None
    small = replace(config, decoder=replace(config.decoder, vocab_size=410))
    Model(small, random_weights(small)).save(tmp_path / "small", files={"tokenizer.json": content})
    with pytest.raises(CheckpointError):
        Model.load(tmp_path / "small")


# --- beside transformers ------------------------------------------------------------------------------------------------------


def picture(name, mode, grid=(1, 1)):
    def noise(*shape):
        return torch.randint(0, 256, shape, generator=generator(f"{name} {shape}"), dtype=torch.uint8)

    tiles = grid[0] * grid[1] if grid != (1, 1) else 0
    return Views(noise(mode.size, mode.size, 3), noise(tiles, mode.tile_size, mode.tile_size, 3), grid)


SINGLE = Mode("tiny", 512)
TILED = Mode("tiled", 512, tile_size=320, max_tiles=6)
QUERIES = MODES["ocr2"]


@pytest.mark.parametrize(
    ("family", "mode", "grids", "window"),
    [
        ("unlimited-ocr", SINGLE, [(1, 1)], 128),
        ("unlimited-ocr", SINGLE, [(1, 1), (1, 1)], 16),
        ("deepseek-ocr", SINGLE, [(1, 1)], None),
        ("deepseek-ocr", TILED, [(3, 2), (1, 1)], None),
        ("deepseek-ocr-2", QUERIES, [(1, 2)], None),
    ],
)
@torch.no_grad()
def test_logits_and_64_greedy_tokens_are_those_of_transformers(family, mode, grids, window):
    pytest.importorskip("transformers", "5.23")
    random = Model.random(family, scale=0.08, seed=3)  # tables keep their stored sides, so that they are resized
    config = random.config
    if family == "unlimited-ocr":
        config = replace(config, decoder=replace(config.decoder, window=window))
    model = Model(config, random.weights())
    oracle = build_oracle(model)
    pictures = [picture(f"{family} {i}", mode, grid) for i, grid in enumerate(grids)]
    ids = [0, *(token for grid in grids for token in [config.image_id] * mode.fed_tokens(grid)), 7, 11, 5]
    embeddings = model.embed_prompt(ids, model.encode(pictures), mode, grids).clone()
    tokens = list(greedy(model.decoder, embeddings, 64))
    inputs = {
        "pixel_values": as_floats(torch.stack([found.global_view for found in pictures])),
        "num_local_patches": [len(found.tiles) for found in pictures],
    }
    if any(len(found.tiles) for found in pictures):
        inputs["pixel_values_local"] = as_floats(torch.cat([found.tiles for found in pictures]))
    if config.has_newlines:
        inputs["patches_grid"] = [list(grid) for grid in grids]
    prompt = torch.tensor([ids])
    theirs = oracle(input_ids=prompt, **inputs).logits[0]
    ours = logits_of(model, embeddings)
    assert (ours - theirs).abs().max() < 2e-4 * theirs.abs().max()
    made = oracle.generate(input_ids=prompt, **inputs, max_new_tokens=64, min_new_tokens=64, do_sample=False, eos_token_id=None)
    assert tokens == made[0, -64:].tolist()


def logits_of(model, embeddings):
    cache = Cache.for_tokens(model.config.decoder, len(embeddings), model.decoder.dtype)
    sequence = cache.new_sequence(prompt=len(embeddings))
    return model.decoder.logits(model.decoder(embeddings, cache.batch([sequence], [len(embeddings)]), cache))
