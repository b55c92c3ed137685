"""Whole models: pictures and a prompt to tokens, beside transformers; saving and loading; any family at any scale."""

import time
from dataclasses import replace

import pytest
import torch

from optmem import reference
from optmem.errors import CheckpointError, InputError
from optmem.model.cache import Cache
from optmem.model.config import scaled
from optmem.model.config_json import public_config
from optmem.model.decoder import greedy
from optmem.model.keys import to_transformers
from optmem.model.model import Model
from optmem.pixels import MODES, Mode, Views
from optmem.testing import assert_equal, generator
from optmem.testing_checkpoint import random_weights, special_ids, tiny_config, tokenizer_json

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


def transformers_of(model, window):
    """transformers' model with all of our weights in it."""
    pytest.importorskip("transformers", "5.23")
    config, one, text = model.config, model.config.stage_one, model.config.decoder
    sam = {
        "hidden_size": one.width,
        "output_channels": one.neck_width,
        "num_hidden_layers": one.layers,
        "num_attention_heads": one.heads,
        "global_attn_indexes": list(one.global_layers),
        "mlp_dim": one.mlp_width,
        "downsample_channels": list(one.channels),
    }
    words = {
        "vocab_size": text.vocab_size,
        "hidden_size": text.hidden,
        "intermediate_size": text.dense_width,
        "num_hidden_layers": text.layers,
        "num_attention_heads": text.heads,
        "num_key_value_heads": text.heads,
        "n_routed_experts": text.experts,
        "n_shared_experts": text.shared_experts,
        "num_experts_per_tok": text.top_k,
        "moe_intermediate_size": text.expert_width,
        "max_position_embeddings": text.max_positions,
    }
    second = config.clip or config.query
    body = {
        "hidden_size": second.width,
        "intermediate_size": second.mlp_width,
        "num_hidden_layers": second.layers,
        "num_attention_heads": second.heads,
    }
    if config.clip is not None:
        from transformers.models.unlimited_ocr import UnlimitedOcrConfig as Config
        from transformers.models.unlimited_ocr import UnlimitedOcrForConditionalGeneration as Whole

        words |= {"first_k_dense_replace": text.dense_layers, "sliding_window": window}
    else:
        from transformers.models.deepseek_ocr2 import DeepseekOcr2Config as Config
        from transformers.models.deepseek_ocr2 import DeepseekOcr2ForConditionalGeneration as Whole

        words |= {"mlp_layer_types": ["dense"] * text.dense_layers + ["sparse"] * (text.layers - text.dense_layers)}
        body |= {
            "num_key_value_heads": config.query.kv_heads,
            "rope_parameters": {"rope_type": "default", "rope_theta": config.query.rope_theta},
        }
    whole = Whole(
        Config(vision_config={"sam_config": sam, "encoder_config": body}, text_config=words, image_token_id=config.image_id)
    )
    weights = {f"model.{name}": value for name, value in to_transformers(model.encoder.state_dict()).items()}
    for name, value in model.decoder.state_dict().items():
        name = name + "_proj" if name.endswith((".experts.gate_up", ".experts.down")) else name
        weights[name.replace("model.", "model.language_model.", 1)] = value
    whole.load_state_dict(weights, strict=True)
    return whole.eval()


def picture(name, mode, grid=(1, 1)):
    def noise(*shape):
        return torch.randint(0, 256, shape, generator=generator(f"{name} {shape}"), dtype=torch.uint8)

    tiles = grid[0] * grid[1] if grid != (1, 1) else 0
    return Views(noise(mode.size, mode.size, 3), noise(tiles, mode.tile_size, mode.tile_size, 3), grid)


def as_floats(pixels):
    return reference.normalise(pixels, torch.float32).permute(0, 3, 1, 2)


SINGLE = Mode("tiny", 512)
TILED = Mode("tiled", 512, tile_size=320, max_tiles=6)
QUERIES = MODES["ocr2"]


@pytest.mark.parametrize(
    ("family", "mode", "grids", "window"),
    [
        ("unlimited-ocr", SINGLE, [(1, 1)], 128),
        ("unlimited-ocr", SINGLE, [(1, 1), (1, 1)], 16),
        ("deepseek-ocr", SINGLE, [(1, 1)], 10_000),
        ("deepseek-ocr", TILED, [(3, 2), (1, 1)], 10_000),
        ("deepseek-ocr-2", QUERIES, [(1, 2)], None),
    ],
)
@torch.no_grad()
def test_logits_and_64_greedy_tokens_are_those_of_transformers(family, mode, grids, window):
    random = Model.random(family, scale=0.08, seed=3)  # tables keep their stored sides, so that they are resized
    config = random.config
    if family == "unlimited-ocr":
        config = replace(config, decoder=replace(config.decoder, window=window))
    model = Model(config, random.weights())
    oracle = transformers_of(model, window)
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
