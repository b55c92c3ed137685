"""config.json: the public files are read, what is written reads back, and absurd or unknown models are refused."""

import contextlib
import copy
import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from optmem.errors import CheckpointError, SourceNotFoundError
from optmem.model.config import ModelConfig
from optmem.model.config_json import config_fields, parse_config, public_config, read_config, write_config
from optmem.testing.checkpoints import tiny_config

FAMILIES = ["deepseek-ocr", "unlimited-ocr", "deepseek-ocr-2"]

# The fields of the public files, written down here by hand from their description.
TEXT = {
    "bos_token_id": 0, "eos_token_id": 1, "first_k_dense_replace": 1, "hidden_size": 1280, "intermediate_size": 6848,
    "kv_lora_rank": None, "lm_head": True, "max_position_embeddings": 8192, "moe_intermediate_size": 896, "n_group": 1,
    "n_routed_experts": 64, "n_shared_experts": 2, "num_attention_heads": 10, "num_experts_per_tok": 6, "num_hidden_layers": 12,
    "num_key_value_heads": 10, "q_lora_rank": None, "qk_nope_head_dim": 0, "qk_rope_head_dim": 0, "rm_head": False, "topk_group": 1,
    "topk_method": "greedy", "torch_dtype": "bfloat16", "use_mla": False, "v_head_dim": 0, "vocab_size": 129280,
}  # fmt: skip
SAM = {"width": 768, "layers": 12, "heads": 12, "global_attn_indexes": [2, 5, 8, 11], "downsample_channels": [512, 1024]}
CLIP = {"heads": 16, "image_size": 224, "layers": 24, "patch_size": 14, "width": 1024}
V1 = {
    "_name_or_path": "deepseek-ai/DeepSeek-OCR",
    "architectures": ["DeepseekOCRForCausalLM"],
    "auto_map": {
        "AutoConfig": "modeling_deepseekocr.DeepseekOCRConfig",
        "AutoModel": "modeling_deepseekocr.DeepseekOCRForCausalLM",
    },
    "candidate_resolutions": [[1024, 1024]],
    "global_view_pos": "head",
    "language_config": {
        "architectures": ["DeepseekV2ForCausalLM"],
        "auto_map": {"AutoConfig": "configuration_deepseekv2.DeepseekV2Config", "AutoModel": "modeling_deepseek.DeepseekV2Model"},
        **TEXT,
    },
    "model_type": "deepseek_vl_v2",
    "projector_config": {"input_dim": 2048, "model_type": "mlp_projector", "n_embed": 1280, "projector_type": "linear"},
    "tile_tag": "2D",
    "transformers_version": "4.46.3",
    "vision_config": {
        "image_size": 1024, "mlp_ratio": 3.7362, "model_name": "deeplip_b_l", "model_type": "vision",
        "width": {"clip-l-14-224": CLIP, "sam_vit_b": SAM},
    },
    **TEXT,
}  # fmt: skip


def changed(base, changes):
    """A copy with fields set by their dotted names; None takes the field away."""
    fields = copy.deepcopy(base)
    for name, value in changes.items():
        *path, last = name.split("/")
        place = fields
        for step in path:
            place = place[step]
        if value is None:
            place.pop(last, None)
        else:
            place[last] = value
    return fields


def both(name, value):
    """A text field changed at both of its places."""
    return {name: value, f"language_config/{name}": value}


UL = changed(
    V1,
    {
        "architectures": ["UnlimitedOCRForCausalLM"], "model_type": "unlimited-ocr", "sliding_window": 128, "auto_map": None,
        **both("max_position_embeddings", 32768), **both("v_head_dim", 128), **both("sliding_window_size", 128),
    },
)  # fmt: skip
V2 = changed(
    V1,
    {
        "architectures": ["DeepseekOCR2ForCausalLM"], "projector_config/input_dim": 896,
        "vision_config/model_name": "deepencoderv2",
        "vision_config/width/clip-l-14-224": None, "vision_config/width/qwen2-0-5b": {"dim": 896}, **both("kv_lora_rank", None),
    },
)  # fmt: skip
PUBLIC = {"deepseek-ocr": V1, "unlimited-ocr": UL, "deepseek-ocr-2": V2}


@pytest.mark.parametrize("family", FAMILIES)
def test_the_public_files_are_the_public_models(family):
    assert parse_config(PUBLIC[family]) == public_config(family)


def test_the_numbers_of_the_families():
    assert public_config("deepseek-ocr") == ModelConfig("deepseek-ocr")
    assert public_config("unlimited-ocr").decoder.window == 128
    assert public_config("unlimited-ocr").decoder.max_positions == 32768
    v2 = public_config("deepseek-ocr-2")
    assert (v2.stage_one.channels, v2.feature_width, v2.has_newlines, v2.tile_side) == ((512, 896), 896, False, 768)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("place", ["top only", "language_config only"])
def test_text_fields_may_stand_in_either_place(family, place):
    fields = copy.deepcopy(PUBLIC[family])
    if place == "top only":
        del fields["language_config"]
    else:
        for name in TEXT:
            fields.pop(name, None)
    assert parse_config(fields) == public_config(family)


@pytest.mark.parametrize("family", FAMILIES)
def test_what_is_left_out_has_the_public_number(family):
    assert parse_config({"architectures": PUBLIC[family]["architectures"]}) == public_config(family)


@pytest.mark.parametrize(
    "config", [maker(family) for family in FAMILIES for maker in (public_config, tiny_config)], ids=lambda c: c.family
)
def test_what_is_written_reads_back(config, tmp_path):
    write_config(tmp_path, config)
    assert read_config(tmp_path) == config


@pytest.mark.parametrize("family", FAMILIES)
def test_written_files_have_the_public_layout(family):
    """Whoever reads the public files reads ours: the same numbers under the same names, and nothing renamed."""

    def compare(ours, theirs, where):
        for name, value in theirs.items():
            if name in (
                "_name_or_path",
                "auto_map",
                "mlp_ratio",
                "transformers_version",
                "torch_dtype",
                "architectures",
                "v_head_dim",
            ):
                continue
            if isinstance(value, dict):
                compare(ours[name], value, f"{where}{name}/")
            elif (family, name) != ("deepseek-ocr-2", "downsample_channels"):  # stale in the public file
                assert ours[name] == value, where + name

    compare(config_fields(public_config(family)), PUBLIC[family], "")


REFUSED = {
    "unknown architecture": {"architectures": ["LlamaForCausalLM"]},
    "no architecture": {"architectures": None},
    "two architectures": {"architectures": ["DeepseekOCRForCausalLM", "DeepseekOCR2ForCausalLM"]},
    "the same architecture twice": {"architectures": ["DeepseekOCRForCausalLM"] * 2},
    "an architecture as text": {"architectures": "DeepseekOCRForCausalLM"},
    "an architecture as list": {"architectures": [["DeepseekOCRForCausalLM"]]},
    "foreign code": {"auto_map": {"AutoModel": "evil.Model"}},
    "foreign repository": {"auto_map": {"AutoModel": "someone/evil--modeling_deepseekocr.DeepseekOCRForCausalLM"}},
    "code that looks public": {"auto_map": {"AutoModel": "modeling_deepseekocr.x.y"}},
    "code in a list": {"auto_map": {"AutoTokenizer": ["modeling_deepseekocr.A", None]}},
    "code for the language model": {"language_config/auto_map": {"AutoModel": "evil.Model"}},
    "auto_map no object": {"auto_map": ["evil.Model"]},
    "places disagree": {"hidden_size": 640},
    "places disagree in type": {"hidden_size": 1280.0},
    "places disagree, true is not 1": {"n_group": True},
    "zero width": both("hidden_size", 0),
    "negative width": both("hidden_size", -1280),
    "huge width": both("hidden_size", 2**31),
    "width as float": both("hidden_size", 1280.0),
    "width as text": both("hidden_size", "1280"),
    "width true": both("hidden_size", True),
    "width infinite": both("hidden_size", float("inf")),
    "width NaN": both("hidden_size", float("nan")),
    "width a list": both("hidden_size", [1280]),
    "negative layers": both("num_hidden_layers", -1),
    "a billion layers": both("num_hidden_layers", 10**9),
    "huge vocabulary": both("vocab_size", 10**12),
    "experts beyond memory": {**both("n_routed_experts", 4096), **both("num_hidden_layers", 512)},
    "more experts per token than experts": both("num_experts_per_tok", 65),
    "no experts": both("n_routed_experts", 0),
    "heads that do not divide": both("num_attention_heads", 9),
    "shared keys": both("num_key_value_heads", 2),
    "odd head width": {**both("hidden_size", 10), "projector_config/n_embed": 10},
    "more dense layers than layers": both("first_k_dense_replace", 13),
    "latent attention": both("use_mla", True),
    "latent rank": both("kv_lora_rank", 512),
    "grouped routing": both("n_group", 8),
    "another routing": both("topk_method", "noaux_tc"),
    "another score": both("scoring_func", "sigmoid"),
    "renormalised": both("norm_topk_prob", True),
    "scaled routing": both("routed_scaling_factor", 2.5),
    "tied": {"tie_word_embeddings": True},
    "no head": both("lm_head", False),
    "another activation": both("hidden_act", "gelu"),
    "scaled positions": {"rope_scaling": {"type": "yarn"}},
    "scaled positions by their new name": both("rope_parameters", {"rope_type": "yarn", "rope_theta": 10000.0}),
    "a factor": both("rope_scaling", {"rope_type": "default", "factor": 40}),
    "positions no object": both("rope_parameters", [10000.0]),
    "two thetas": both("rope_parameters", {"rope_type": "default", "rope_theta": 1e6}),
    "two thetas, neither the public one": {**both("rope_theta", 1e6), **both("rope_parameters", {"rope_theta": 10000.0})},
    "half a head rotated": both("partial_rotary_factor", 0.5),
    "half a head rotated, by its new name": both("rope_parameters", {"partial_rotary_factor": 0.5}),
    "quantised": {"quantization_config": {"quant_method": "fp8"}},
    "the language model quantised": {"language_config/quantization_config": {"quant_method": "fp8"}},
    "wider heads": both("head_dim", 256),
    "latent rotation": both("qk_rope_head_dim", 64),
    "latent rest": both("qk_nope_head_dim", 128),
    "wider values": both("v_head_dim", 64),
    "a bias in the MLP": both("mlp_bias", True),
    "views in another order": {"global_view_pos": "tail"},
    "tiles in a row": {"tile_tag": "1D"},
    "larger patches": {"vision_config/width/sam_vit_b/patch_size": 32},
    "a view that is no multiple of a token": {"vision_config/image_size": 1000},
    "tiles that are no multiple of a token": {"vision_config/tile_size": 650},
    "one tile": {"vision_config/max_tiles": 1},
    "theta zero": both("rope_theta", 0),
    "theta infinite": both("rope_theta", 1e999),
    "eps negative": both("rms_norm_eps", -1e-6),
    "a window in V1": {"sliding_window": 128},
    "eos outside": both("eos_token_id", 129280),
    "bos negative": both("bos_token_id", -1),
    "bos is eos": both("bos_token_id", 1),
    "image outside": {"image_token_id": 129280},
    "small vocabulary without an image id": both("vocab_size", 256),
    "projector of another width": {"projector_config/input_dim": 896},
    "projector of another model": {"projector_config/n_embed": 2048},
    "another projector": {"projector_config/projector_type": "mlp_gelu"},
    "vision no object": {"vision_config": [1]},
    "width no object": {"vision_config/width": 768},
    "global layer outside": {"vision_config/width/sam_vit_b/global_attn_indexes": [12]},
    "global layer twice": {"vision_config/width/sam_vit_b/global_attn_indexes": [2, 2]},
    "one channel": {"vision_config/width/sam_vit_b/downsample_channels": [512]},
    "channels unlike clip": {"vision_config/width/sam_vit_b/downsample_channels": [512, 896]},
    "sam heads": {"vision_config/width/sam_vit_b/heads": 7},
    "clip heads": {"vision_config/width/clip-l-14-224/heads": 3},
    "clip side": {"vision_config/width/clip-l-14-224/image_size": 225},
    "no pixels": {"vision_config/image_size": 0},
    "too many pixels": {"vision_config/image_size": 10**6},
}


@pytest.mark.parametrize("case", REFUSED)
def test_other_models_are_refused(case):
    with pytest.raises(CheckpointError) as caught:
        parse_config(changed(V1, REFUSED[case]))
    assert len(str(caught.value)) < 300


UNLIKE_OURS = {  # fields that change what the weights compute, and are refused by their name
    "rope_scaling": [{"type": "linear", "factor": 2.0}, {"long_factor": [1.0]}, {"x" * 999: 1}, "yarn"],
    "rope_parameters": [{"rope_theta": 1e6}, {"full_attention": {"rope_theta": 10000.0}}, {"rope_theta": True}],
    "quantization_config": [{}, {"quant_method": "gptq"}, "fp8"],
    "partial_rotary_factor": [0.25, True],
    "head_dim": [64, 256, "128"],
    "qk_rope_head_dim": [64, False],
    "qk_nope_head_dim": [128],
    "v_head_dim": [64, True],
    "mlp_bias": [True, 0],
    "global_view_pos": ["tail"],
    "tile_tag": ["1D"],
    "vision_config/image_size": [65, 1000, 1088.0],
    "vision_config/tile_size": [63, 672],
    "vision_config/max_tiles": [1, -1],
    "vision_config/width/sam_vit_b/patch_size": [8, 14, 32],
}


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(("name", "value"), [(name, value) for name, values in UNLIKE_OURS.items() for value in values])
def test_what_would_change_the_numbers_is_refused_by_name(family, name, value):
    with pytest.raises(CheckpointError, match=name.split("/")[-1]) as caught:
        parse_config(changed(PUBLIC[family], {name: value} if "/" in name else both(name, value)))
    assert len(str(caught.value)) < 300


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(
    "changes",
    [
        both("rope_parameters", {"rope_type": "default", "rope_theta": 10000}), both("rope_scaling", {"type": "default"}),
        both("rope_scaling", {}), both("head_dim", 128), both("v_head_dim", 128), both("v_head_dim", 0), both("mlp_bias", False),
        both("partial_rotary_factor", 1.0), both("partial_rotary_factor", 1), {"vision_config/width/sam_vit_b/patch_size": 16},
    ],
    ids=str,
)  # fmt: skip
def test_what_says_the_same_is_read(family, changes):
    assert parse_config(changed(PUBLIC[family], changes)) == public_config(family)


@pytest.mark.parametrize("max_tiles", [0, 2, 32])
def test_no_tiles_or_several(max_tiles):
    assert parse_config(changed(V1, {"vision_config/max_tiles": max_tiles})).max_tiles == max_tiles


@pytest.mark.parametrize(
    "changes",
    [
        {"sliding_window": 64},
        {"vision_config/width/qwen2-0-5b": {"dim": 1000}},
        {"vision_config/width/qwen2-0-5b": {"dim": 896, "kv_heads": 3}},
        {"vision_config/width/qwen2-0-5b": {"dim": 896, "query_counts": [144, 255]}},
        {"vision_config/width/qwen2-0-5b": {"dim": 896, "query_counts": []}},
        {"vision_config/width/qwen2-0-5b": {"dim": 896, "rope_scaling": {"type": "yarn"}}},
    ],
)
def test_other_second_stages_and_windows_are_refused(changes):
    with pytest.raises(CheckpointError):
        parse_config(changed(UL if "sliding_window" in changes else V2, changes))


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"{",
        b"[]",
        b"null",
        b"\xff\xfe{\x00}\x00",
        b'{"a": NaN}',
        b'{"architectures": 1, "architectures": 2}',
        b'{"a":' * 10**5,
        b" " * 2**21,
    ],
    ids=lambda content: repr(content[:20]),
)
def test_files_that_are_no_config(content, tmp_path):
    (tmp_path / "config.json").write_bytes(content)
    with pytest.raises(CheckpointError):
        read_config(tmp_path)


def test_no_config_at_all(tmp_path):
    with pytest.raises(SourceNotFoundError, match=r"config\.json"):
        read_config(tmp_path)


def test_an_infinite_number_in_the_file_is_refused(tmp_path):
    text = json.dumps(V1).replace('"hidden_size": 1280', '"hidden_size": 1e999')
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(CheckpointError, match="hidden_size"):
        read_config(tmp_path)


def paths(fields, prefix=""):
    for name, value in fields.items():
        yield prefix + name
        if isinstance(value, dict):
            yield from paths(value, f"{prefix}{name}/")


JSON = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=5)),
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(st.text(max_size=5), inner, max_size=3)),
    max_leaves=4,
)


@settings(max_examples=300)
@given(st.sampled_from(list(PUBLIC.values())), st.data())
def test_any_value_anywhere_is_read_or_refused(base, data):
    fields = changed(base, {})
    name = data.draw(st.sampled_from(list(paths(fields))))
    fields = changed(fields, {name: data.draw(JSON)})
    with contextlib.suppress(CheckpointError):
        assert isinstance(parse_config(fields), ModelConfig)
