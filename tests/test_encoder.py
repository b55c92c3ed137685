"""The vision encoders beside those of transformers 5.23, with random weights of the true structure and small widths.

transformers takes normalised floats; both sides start from the same bytes.  Its processors take no part: they differ from the
reference (deepseek-ocr.md, section 4).
"""

import copy
from functools import cache

import numpy as np
import pytest
import torch
from PIL import Image

from optmem import reference
from optmem.errors import InputError
from optmem.model.assembly import assemble, encode_views, insert
from optmem.model.config import ClipConfig, DecoderConfig, ModelConfig, QueryConfig, StageOneConfig
from optmem.model.encoder import Encoder
from optmem.model.keys import to_transformers
from optmem.model.layout import expected_tensors
from optmem.model.stage_one import Block
from optmem.model.tables import ResizedTable, resize_positions, resize_relative
from optmem.pixels import Mode, Views
from optmem.testing import assert_equal, generator

TOLERANCE = 2e-4  # of the largest output, in fp32
HIDDEN, WIDTH, IMAGE_ID = 24, 32, 7

STAGE_ONE = {"width": 32, "layers": 3, "heads": 2, "mlp_width": 48, "global_layers": (1,), "neck_width": 16}
DECODER = DecoderConfig(vocab_size=16, hidden=HIDDEN)
V1 = ModelConfig("deepseek-ocr", StageOneConfig(**STAGE_ONE, channels=(20, WIDTH)), ClipConfig(WIDTH, 2, 2, 40), decoder=DECODER)
V2 = ModelConfig(
    "deepseek-ocr-2", StageOneConfig(**STAGE_ONE, channels=(20, WIDTH)), None, QueryConfig(WIDTH, 2, 4, 2, 40), DECODER
)


@torch.no_grad()
def with_random_weights(module, name):
    """Every parameter random, also those that start as zeros or ones; products keep their scale."""
    rng = generator(name)
    for key, parameter in sorted(module.named_parameters()):
        noise = torch.randn(parameter.shape, generator=rng)
        if parameter.dim() > 1 and "pos" not in key and "query" not in key:
            noise /= parameter[0].numel() ** 0.5
        is_scale = parameter.dim() == 1 and key.endswith("weight")
        parameter.copy_(1 + 0.2 * noise if is_scale else 0.3 * noise if "pos" in key or parameter.dim() == 1 else noise)
    return module.eval()


@cache
def ours(config):
    return with_random_weights(Encoder(config), config.family)


def transformers_model(config):
    """The whole model of transformers with our vision weights in it, and a decoder that nothing here looks at."""
    pytest.importorskip("transformers", "5.23")
    one = config.stage_one
    sam = {
        "hidden_size": one.width,
        "output_channels": one.neck_width,
        "num_hidden_layers": one.layers,
        "num_attention_heads": one.heads,
        "global_attn_indexes": list(one.global_layers),
        "mlp_dim": one.mlp_width,
        "downsample_channels": list(one.channels),
    }
    text = {
        "vocab_size": config.decoder.vocab_size,
        "hidden_size": config.decoder.hidden,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "mlp_layer_types": ["dense"],
        "intermediate_size": 16,
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
        from transformers.models.unlimited_ocr import UnlimitedOcrModel as Model
    else:
        from transformers.models.deepseek_ocr2 import DeepseekOcr2Config as Config
        from transformers.models.deepseek_ocr2 import DeepseekOcr2Model as Model

        body |= {
            "num_key_value_heads": config.query.kv_heads,
            "rope_parameters": {"rope_type": "default", "rope_theta": config.query.rope_theta},
        }
    vision = {"sam_config": sam, "encoder_config": body}
    model = Model(Config(vision_config=vision, text_config=text, image_token_id=IMAGE_ID)).eval()
    missing, unexpected = model.load_state_dict(to_transformers(ours(config).state_dict()), strict=False)
    assert not unexpected
    assert all(name.startswith("language_model.") for name in missing)
    return model


@cache
def theirs(config):
    return transformers_model(config)


def noise_pages(name, num_pages, side, channels=3):
    return torch.randint(0, 256, (num_pages, side, side, channels), generator=generator(name), dtype=torch.uint8)


def as_floats(pixels):
    """What transformers takes: normalised, three channels, channels first."""
    return reference.normalise(pixels, torch.float32).expand(-1, -1, -1, 3).permute(0, 3, 1, 2)


def assert_within(actual, expected, tolerance=TOLERANCE):
    assert actual.shape == expected.shape
    error = ((actual - expected).abs().max() / expected.abs().max()).item()
    print(f"error {error:.2g}")
    assert error <= tolerance


CASES = [(V1, side) for side in (512, 640, 1024, 1280)] + [(V2, side) for side in (768, 1024)]


@pytest.mark.parametrize(("config", "side"), CASES, ids=lambda value: value.family if isinstance(value, ModelConfig) else value)
@torch.no_grad()
def test_features_equal_those_of_transformers(config, side):
    pixels = noise_pages(f"features {side}", 1, side)
    model = theirs(config)
    expected = model.multi_modal_projector(model.vision_tower(as_floats(pixels)).last_hidden_state)
    assert expected.shape == (1, (side // 64) ** 2, HIDDEN)
    assert_within(ours(config)(pixels), expected)


@torch.no_grad()
def test_a_grey_page_is_three_equal_channels():
    grey = noise_pages("grey", 2, 192, channels=1)
    assert_within(ours(V1)(grey), ours(V1)(grey.expand(-1, -1, -1, 3)), 1e-5)


@torch.no_grad()
def test_a_page_does_not_depend_on_its_batch_mates():
    pages = noise_pages("batch", 3, 192)
    together = ours(V1)(pages)
    for page, features in zip(pages, together, strict=True):
        assert_within(ours(V1)(page[None])[0], features, 1e-5)
    assert ours(V1)(pages[:0]).shape == (0, 9, HIDDEN)


TILED = Mode("tiled", 192, tile_size=128, max_tiles=9)
QUERIES = Mode("queries", 1024, tile_size=768, max_tiles=6, has_newlines=False)


def pictures_of(mode, grids):
    """A picture for every grid, (1, 1) being one without tiles."""
    views = []
    for number, (columns, rows) in enumerate(grids):
        tiles = columns * rows if columns * rows > 1 else 0
        view = noise_pages(f"view {number}", 1, mode.size)[0]
        views.append(Views(view, noise_pages(f"tiles {number}", tiles, mode.tile_size), (columns, rows)))
    return views


@pytest.mark.parametrize(
    ("config", "mode", "grids"),
    [
        (V1, TILED, [(1, 2)]),
        (V1, TILED, [(3, 2)]),
        (V1, TILED, [(1, 6)]),
        (V1, TILED, [(1, 1), (3, 2), (1, 1), (2, 1)]),  # several pictures in one prompt, with tiles and without
        (V1, Mode("single", 192), [(1, 1), (1, 1)]),
        (V2, QUERIES, [(1, 2), (1, 1)]),
    ],
)
@torch.no_grad()
def test_a_prompt_holds_what_transformers_would_put_there(config, mode, grids):
    pictures, encoder, model = pictures_of(mode, grids), ours(config), theirs(config)
    newline = encoder.image_newline
    stored = encode_views(encoder, pictures)
    sequences = [assemble(f, mode, p.grid, newline, encoder.view_seperator) for f, p in zip(stored, pictures, strict=True)]
    counts = [mode.fed_tokens(picture.grid) for picture in pictures]
    assert [len(sequence) for sequence in sequences] == counts

    ids = torch.tensor([0, *(token for count in counts for token in (*[IMAGE_ID] * count, 3)), 5])
    tiles = torch.cat([picture.tiles for picture in pictures])
    extra = {"patches_grid": [list(grid) for grid in grids]} if config.has_newlines else {}
    expected = merged_by_transformers(
        model,
        input_ids=ids[None],
        pixel_values=as_floats(torch.stack([picture.global_view for picture in pictures])),
        pixel_values_local=as_floats(tiles) if len(tiles) else None,
        num_local_patches=[len(picture.tiles) for picture in pictures],
        **extra,
    )
    embeddings = model.get_input_embeddings()(ids)
    assert_within(insert(embeddings, ids == IMAGE_ID, sequences), expected[0])


def merged_by_transformers(model, **inputs):
    """The embeddings that its decoder is given."""
    caught = {}

    def catch(_module, _arguments, options):
        caught["embeddings"] = options["inputs_embeds"]

    handle = model.language_model.register_forward_pre_hook(catch, with_kwargs=True)
    try:
        model(**inputs)
    finally:
        handle.remove()
    return caught["embeddings"]


@pytest.mark.parametrize("grid", [(20, 20), pytest.param((64, 64), marks=pytest.mark.slow)], ids=str)
@pytest.mark.parametrize("is_global", [False, True], ids=["windowed", "global"])
@torch.no_grad()
def test_a_block_of_full_width(grid, is_global):
    pytest.importorskip("transformers", "5.23")
    from transformers.models.unlimited_ocr.configuration_unlimited_ocr import UnlimitedOcrSamVisionConfig
    from transformers.models.unlimited_ocr.modeling_unlimited_ocr import UnlimitedOcrSamVisionLayer

    block = with_random_weights(Block(StageOneConfig(), is_global=is_global), f"full {is_global}")
    config = UnlimitedOcrSamVisionConfig()
    config._attn_implementation = "sdpa"
    layer = UnlimitedOcrSamVisionLayer(config, window_size=0 if is_global else 14).eval()
    layer.load_state_dict(
        {
            name.replace("norm1", "layer_norm1").replace("norm2", "layer_norm2"): tensor
            for name, tensor in block.state_dict().items()
        }
    )
    x = torch.randn(1, *grid, 768, generator=generator("full"))
    assert_within(sum(block(x, None)), layer(x))
    half = x / 2  # what was not yet added to it: exact, so that the sum is x
    assert_equal(sum(block(half, half)), sum(block(x, None)))


# --- what it is made of -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("config", [V1, V2, ModelConfig("unlimited-ocr")], ids=lambda config: config.family)
def test_parameters_carry_the_names_of_the_checkpoints(config):
    with torch.device("meta"):
        encoder = Encoder(config)
    names = {f"model.{name}": tuple(tensor.shape) for name, tensor in encoder.state_dict().items()}
    of_the_decoder = ("model.layers.", "model.embed_tokens.", "model.norm.", "lm_head.")
    assert names == {name: shape for name, shape in expected_tensors(config).items() if not name.startswith(of_the_decoder)}


def test_the_full_model_has_the_published_size():
    with torch.device("meta"):
        encoder = Encoder(ModelConfig("deepseek-ocr"))
    sizes = {name: sum(p.numel() for p in module.parameters()) for name, module in encoder.named_children()}
    assert sizes == {"sam_model": 95_569_152, "vision_model": 303_177_728, "projector": 2_622_720}


@pytest.mark.parametrize("shape", [(1, 96, 96, 3), (1, 64, 128, 3), (1, 0, 0, 3), (64, 64, 3)], ids=str)
def test_refuses_views_that_are_not_square_multiples_of_64(shape):
    with pytest.raises(InputError, match="S a multiple of 64"):
        ours(V1)(torch.zeros(shape, dtype=torch.uint8))


def test_the_second_generation_refuses_sides_without_queries():
    with pytest.raises(InputError, match="views of 768 or 1024 pixels, got 640"):
        ours(V2)(torch.zeros(1, 640, 640, 3, dtype=torch.uint8))


def test_compiles_into_one_graph():
    pages = noise_pages("compile", 1, 128)
    with torch.no_grad():
        compiled = torch.compile(ours(V1), fullgraph=True, backend="aot_eager")
        assert_within(compiled(pages), ours(V1)(pages), 1e-6)


@pytest.mark.parametrize("is_compiled", [False, True], ids=["eager", "compiled"])
def test_gradients_reach_every_parameter(is_compiled):
    encoder = copy.deepcopy(ours(V1))
    run = torch.compile(encoder, fullgraph=True, backend="aot_eager") if is_compiled else encoder
    run(noise_pages("gradients", 1, 320)).square().sum().backward()
    without = {name for name, p in encoder.named_parameters() if p.grad is None or not p.grad.any()}
    assert without == {"image_newline", "view_seperator", "vision_model.embeddings.patch_embedding.weight"}


# --- position tables ----------------------------------------------------------------------------------------------------------

GRIDS = (32, 40, 64, 80)  # patches a side, of 512, 640, 1024 and 1280 pixels


@pytest.mark.parametrize("side", GRIDS)
@torch.no_grad()
def test_positions_are_resized_as_transformers_does(side):
    table = ours(V1).sam_model.pos_embed
    expected = theirs(V1).vision_tower.sam_encoder.interpolate_pos_encoding(side, side)
    assert_equal(resize_positions(table[0], side), expected[0].contiguous())
    clip, embeddings = ours(V1).vision_model.embeddings, theirs(V1).vision_tower.vision_encoder.embeddings
    cells = side // 4
    whole = embeddings.interpolate_pos_encoding(torch.zeros(1, 1 + cells**2, WIDTH), cells * 14, cells * 14)
    grid = clip.position_embedding.weight[1:].view(16, 16, WIDTH)
    assert_equal(resize_positions(grid, cells).flatten(0, 1), whole[0, 1:].contiguous())


@pytest.mark.parametrize("side", GRIDS)
def test_positions_are_resized_with_the_kernel_of_pillow(side):
    """The antialiased cubic, a = -0.5: torch's plain bicubic is 0.3 away from it even when a table grows."""
    table = torch.randn(64, 64, 1, generator=generator("pillow"))
    expected = np.asarray(Image.fromarray(table[..., 0].numpy()).resize((side, side), Image.Resampling.BICUBIC))
    torch.testing.assert_close(resize_positions(table, side)[..., 0], torch.from_numpy(expected.copy()), atol=2e-5, rtol=0)


@pytest.mark.parametrize("side", GRIDS)
@torch.no_grad()
def test_relative_positions_are_resized_as_transformers_does(side):
    attention = ours(V1).sam_model.blocks[1].attn
    expected = theirs(V1).vision_tower.sam_encoder.layers[1].attn.get_rel_pos(side, side, attention.rel_pos_h)
    assert_equal(reference.relative_rows(resize_relative(attention.rel_pos_h, side)), expected)


@pytest.mark.parametrize(("resize", "shape"), [(resize_positions, (64, 64, 8)), (resize_relative, (127, 8))])
def test_tables_are_resized_in_fp32(resize, shape):
    """transformers resizes relative positions in the weights' type, which costs bf16 another rounding; the reference does not."""
    table = torch.randn(shape, generator=generator("bf16")).bfloat16()
    for side in GRIDS:
        assert_equal(resize(table, side), resize(table.float(), side).bfloat16())


def test_a_resized_table_is_kept_until_the_weights_change():
    table = torch.nn.Parameter(torch.randn(8, 8, 4, generator=generator("kept")))
    tables = ResizedTable(resize_positions)
    with torch.inference_mode():
        first = tables.at(table, 12)
        assert tables.at(table, 12) is first
        assert not first.is_inference()
    with torch.no_grad():
        assert tables.at(table, 12) is first
        table.mul_(2)
        assert_equal(tables.at(table, 12), resize_positions(table, 12))
        table.data = table.data.clone() + 1
        assert_equal(tables.at(table, 12), resize_positions(table, 12))
        table.data = table.data.bfloat16()
        assert_equal(tables.at(table, 12), resize_positions(table, 12))
    assert tables.at(table, 12).requires_grad  # a gradient flows through: nothing is kept


@torch.no_grad()
def test_new_weights_change_the_next_answer():
    encoder, other = copy.deepcopy(ours(V1)), with_random_weights(Encoder(V1), "other weights")
    page = noise_pages("reload", 1, 320)
    before = encoder(page)
    encoder.load_state_dict(other.state_dict())
    assert_equal(encoder(page), other(page))
    assert not torch.equal(encoder(page), before)
