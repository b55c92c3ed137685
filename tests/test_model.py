"""Whole models: pictures and a prompt to tokens, beside transformers; saving and loading; any family at any scale."""

import time
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps

from optmem.errors import CheckpointError, InputError
from optmem.model import assembly
from optmem.model.assembly import assemble
from optmem.model.cache import Cache
from optmem.model.config import scaled
from optmem.model.config_json import public_config
from optmem.model.decoder import greedy
from optmem.model.model import Model
from optmem.model.modes import modes_of
from optmem.model.weights import verify
from optmem.pixels import MODES, Mode, Views, make_views
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
    Model(config, random_weights(config), files={"tokenizer.json": content}).save(tmp_path / "good")
    loaded = Model.load(tmp_path / "good")
    assert loaded.tokenizer is not None
    loaded.save(tmp_path / "again")
    assert Model.load(tmp_path / "again").files == {"tokenizer.json": content}
    assert verify(tmp_path / "again") == []
    small = replace(config, decoder=replace(config.decoder, vocab_size=410))
    Model(small, random_weights(small), files={"tokenizer.json": content}).save(tmp_path / "small")
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
        ("unlimited-ocr", TILED, [(1, 2)], 16),
        ("unlimited-ocr", MODES["large"], [(1, 1)], 16),
        ("deepseek-ocr", SINGLE, [(1, 1)], None),
        ("deepseek-ocr", MODES["small"], [(1, 1)], None),
        ("deepseek-ocr", MODES["base"], [(1, 1)], None),
        ("deepseek-ocr", TILED, [(3, 2), (1, 1)], None),
        ("deepseek-ocr", TILED, [(1, 6)], None),
        ("deepseek-ocr-2", QUERIES, [(1, 2)], None),
        ("deepseek-ocr-2", QUERIES, [(1, 1), (3, 2)], None),
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
    assert len(set(tokens)) > 8, "64 times the same token would prove nothing"
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


def by_pillow(image, mode, grid):
    """What the reference's processors do, by Pillow alone: the global view and the tiles, as uint8."""
    size = (mode.size, mode.size)
    if mode.keeps_proportions:
        view = ImageOps.pad(image, size, Image.Resampling.BICUBIC, color=(127, 127, 127))
    else:
        view = image.resize(size, Image.Resampling.BICUBIC)
    tiles = []
    if grid != (1, 1):
        (columns, rows), side = grid, mode.tile_size
        whole = image.resize((columns * side, rows * side), Image.Resampling.BICUBIC)
        tiles = [whole.crop((c * side, r * side, c * side + side, r * side + side)) for r in range(rows) for c in range(columns)]
    return torch.from_numpy(np.asarray(view).copy())[None], tiles


@pytest.mark.parametrize("mode", [SINGLE, Mode("fitted", 704), TILED], ids=lambda mode: mode.name)
@torch.no_grad()
def test_a_picture_has_the_features_that_pillow_and_transformers_give_it(mode):
    pytest.importorskip("transformers", "5.23")
    model = Model.random("unlimited-ocr", scale=0.08)
    pixels = torch.randint(0, 256, (301, 517, 3), generator=generator("picture"), dtype=torch.uint8).numpy()
    views = make_views(pixels, mode)
    view, tiles = by_pillow(Image.fromarray(pixels), mode, views.grid)
    inputs = {"pixel_values": as_floats(view), "num_local_patches": [len(tiles)], "patches_grid": [list(views.grid)]}
    if tiles:
        inputs["pixel_values_local"] = as_floats(torch.from_numpy(np.stack([np.asarray(tile) for tile in tiles])))
    (theirs,) = build_oracle(model).model.get_image_features(**inputs).pooler_output
    (found,) = model.encode([views])
    ours = assemble(found, mode, views.grid, model.encoder.image_newline, model.encoder.view_seperator)
    assert (ours - theirs).abs().max() < 2e-4 * theirs.abs().max()


@pytest.mark.parametrize("family", FAMILIES)
def test_no_two_random_weights_are_alike(family):
    """Else a test could not tell a mix-up of two tensors."""
    seen = {}
    for name, weight in Model.random(family, scale=0.05).weights().items():
        head = tuple(weight.flatten()[:8].tolist())
        assert head not in seen, f"{name} begins as {seen[head]} does"
        seen[head] = name


@pytest.mark.parametrize(("family", "names", "most"), [("deepseek-ocr", 5, 9), ("unlimited-ocr", 5, 32), ("deepseek-ocr-2", 1, 6)])
def test_the_modes_of_a_model(family, names, most):
    modes = modes_of(public_config(family))
    assert len(modes) == names
    tiled = next(mode for mode in modes.values() if mode.is_tiled)
    assert (tiled.max_tiles, tiled.has_newlines) == (most, family != "deepseek-ocr-2")


def test_a_mode_of_another_family_is_refused():
    model = Model.random("deepseek-ocr-2", scale=0.05)
    with pytest.raises(InputError, match="another family"):
        model.embed_prompt([model.config.image_id] * 257, [torch.zeros(256, 128)], MODES["base"], [(1, 1)])


def test_many_views_go_through_in_several_passes(monkeypatch):
    model = Model.random("deepseek-ocr", scale=0.05)
    pictures = [picture(f"pass {i}", Mode("square 64", 64)) for i in range(5)]
    whole = model.encode(pictures)
    monkeypatch.setattr(assembly, "PIXELS_AT_ONCE", 2 * 64 * 64)
    for one, other in zip(whole, model.encode(pictures), strict=True):
        torch.testing.assert_close(one, other)


def logits_of(model, embeddings):
    cache = Cache.for_tokens(model.config.decoder, len(embeddings), model.decoder.dtype)
    sequence = cache.new_sequence(prompt=len(embeddings))
    return model.decoder.logits(model.decoder(embeddings, cache.batch([sequence], [len(embeddings)]), cache))
