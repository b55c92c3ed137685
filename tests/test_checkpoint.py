"""Checkpoints: what is saved is loaded bit for bit; what is damaged, foreign or dangerous is refused before memory is taken."""

import contextlib
import errno
import json
import os
import struct
import subprocess
import sys
from dataclasses import replace
from math import prod
from pathlib import Path

import pytest
import safetensors
import safetensors.torch
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from optmem.errors import CheckpointError, InputError, SourceNotFoundError
from optmem.files import checkpoint_folder, open_inside, read_inside
from optmem.model import weights as weights_module
from optmem.model.config_json import public_config, write_config
from optmem.model.decoder import Decoder
from optmem.model.encoder import Encoder
from optmem.model.layout import expected_tensors, packed_tensors, stored_view
from optmem.model.tensor_file import MAX_HEADER, all_finite, read_header, write_file
from optmem.model.weights import INDEX, SINGLE, check_tokenizer, load_weights, save_pretrained, verify
from optmem.testing import assert_equal
from optmem.testing.checkpoints import random_weights, special_ids, tiny_config, tokenizer_json
from optmem.text.tokenizer import IMAGE, BytePairTokenizer, tokenizer_file

FAMILIES = ["deepseek-ocr", "unlimited-ocr", "deepseek-ocr-2"]
TOKENIZER = tokenizer_json()
CONFIG = tiny_config("deepseek-ocr", image_id=special_ids(TOKENIZER)[IMAGE])
WEIGHTS = random_weights(CONFIG)
FILES = {"tokenizer.json": TOKENIZER}


@pytest.fixture
def folder(tmp_path):
    save_pretrained(tmp_path / "model", CONFIG, WEIGHTS, files=FILES)
    return tmp_path / "model"


def assert_same(loaded, saved):
    assert loaded.keys() == saved.keys()
    for name in saved:
        assert_equal(loaded[name], saved[name])


# --- the layout ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("family", "num_tensors", "num_bytes"),
    [("deepseek-ocr", 2710, 6_672_212_480), ("unlimited-ocr", 2710, 6_672_212_480), ("deepseek-ocr-2", 2707, 6_778_238_720)],
)
def test_the_public_models_have_as_many_tensors_and_bytes(family, num_tensors, num_bytes):
    shapes = expected_tensors(public_config(family))
    assert len(shapes) == num_tensors
    assert sum(map(prod, shapes.values())) * 2 == num_bytes
    assert sum(map(prod, packed_tensors(public_config(family)).values())) * 2 == num_bytes


@pytest.mark.parametrize(
    ("family", "name", "shape"),
    [
        ("deepseek-ocr", "model.view_seperator", (1280,)),
        ("deepseek-ocr", "model.image_newline", (1280,)),
        ("deepseek-ocr", "model.vision_model.pre_layrnorm.weight", (1024,)),
        ("deepseek-ocr", "model.vision_model.embeddings.patch_embedding.weight", (1024, 3, 14, 14)),
        ("deepseek-ocr", "model.vision_model.embeddings.position_embedding.weight", (257, 1024)),
        ("deepseek-ocr", "model.sam_model.blocks.4.attn.rel_pos_h", (27, 64)),
        ("deepseek-ocr", "model.sam_model.blocks.5.attn.rel_pos_w", (127, 64)),
        ("deepseek-ocr", "model.layers.0.mlp.down_proj.weight", (1280, 6848)),
        ("unlimited-ocr", "model.layers.11.mlp.experts.63.down_proj.weight", (1280, 896)),
        ("unlimited-ocr", "model.layers.1.mlp.shared_experts.gate_proj.weight", (1792, 1280)),
        ("deepseek-ocr-2", "model.qwen2_model.query_768.weight", (144, 896)),
        ("deepseek-ocr-2", "model.qwen2_model.query_1024.weight", (256, 896)),
        ("deepseek-ocr-2", "model.qwen2_model.model.model.layers.23.self_attn.k_proj.bias", (128,)),
        ("deepseek-ocr-2", "model.sam_model.net_3.weight", (896, 512, 3, 3)),
        ("deepseek-ocr-2", "model.projector.layers.weight", (1280, 896)),
    ],
)
def test_original_names_and_shapes(family, name, shape):
    assert expected_tensors(public_config(family))[name] == shape


def test_v2_has_no_newline_and_no_clip():
    names = expected_tensors(public_config("deepseek-ocr-2"))
    assert "model.image_newline" not in names
    assert not any(name.startswith("model.vision_model") for name in names)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_modules_have_these_parameters_and_no_others(family):
    config = tiny_config(family)
    with torch.device("meta"):
        parameters = Decoder(config.decoder).state_dict() | {f"model.{n}": p for n, p in Encoder(config).state_dict().items()}
    assert {name: tuple(parameter.shape) for name, parameter in parameters.items()} == packed_tensors(config)


# --- there and back -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("family", FAMILIES)
def test_saved_weights_load_bit_for_bit(family, dtype, tmp_path):
    config = tiny_config(family)
    saved = random_weights(config, dtype)
    save_pretrained(tmp_path / "model", config, saved)
    assert_same(load_weights(tmp_path / "model", config), saved)


@pytest.mark.parametrize("max_shard_bytes", [1, 5_000, 100_000])
def test_shards_hold_the_same(max_shard_bytes, tmp_path):
    save_pretrained(tmp_path / "model", CONFIG, WEIGHTS, files=FILES, max_shard_bytes=max_shard_bytes)
    assert len(list((tmp_path / "model").glob("*.safetensors"))) > 1
    assert verify(tmp_path / "model") == []
    assert_same(load_weights(tmp_path / "model", CONFIG), WEIGHTS)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_weights_are_converted_as_torch_does(dtype, folder):
    expected = {name: tensor.to(dtype) for name, tensor in WEIGHTS.items()}
    assert_same(load_weights(folder, CONFIG, dtype=dtype), expected)


def test_the_library_reads_our_files_and_we_read_the_librarys(folder, tmp_path):
    [ours] = folder.glob("*.safetensors")
    theirs = safetensors.torch.load_file(ours)
    assert theirs.keys() == expected_tensors(CONFIG).keys()
    for name, tensor in theirs.items():
        assert_equal(tensor, stored_view(WEIGHTS, name))
    other = tmp_path / "other"
    other.mkdir()
    safetensors.torch.save_file(theirs, other / SINGLE, {"format": "pt"})
    assert_same(load_weights(other, CONFIG), WEIGHTS)


def test_experts_are_packed_gate_before_up(folder):
    loaded = load_weights(folder, CONFIG)
    stored = safetensors.torch.load_file(next(folder.glob("*.safetensors")))
    prefix = "model.layers.2.mlp.experts."
    width = CONFIG.decoder.expert_width
    assert loaded[prefix + "gate_up"].shape == (4, 2 * width, 32)
    assert loaded[prefix + "down"].shape == (4, 32, width)
    assert_equal(loaded[prefix + "gate_up"][3, :width], stored[prefix + "3.gate_proj.weight"])
    assert_equal(loaded[prefix + "gate_up"][3, width:], stored[prefix + "3.up_proj.weight"])
    assert_equal(loaded[prefix + "down"][3], stored[prefix + "3.down_proj.weight"])


def test_a_complete_checkpoint_has_no_problems(folder):
    assert verify(folder) == []
    assert verify(str(folder)) == []


def test_strided_weights_are_saved_as_what_they_say(tmp_path):
    name = "model.sam_model.neck.2.weight"
    strided = {
        **WEIGHTS,
        name: WEIGHTS[name].to(memory_format=torch.channels_last),
        "lm_head.weight": torch.zeros(32, 512).bfloat16().T,
    }
    save_pretrained(tmp_path / "model", CONFIG, strided)
    assert_equal(load_weights(tmp_path / "model", CONFIG)[name], WEIGHTS[name])


# --- saving that fails --------------------------------------------------------------------------------------------------------


class Killed(BaseException):
    """The process ends here: nothing after this runs, not even the cleaning up."""


def saving_steps(monkeypatch, at, failure):
    """Count the steps of a save; the one with number ``at`` and, after a kill, all later ones fail."""
    steps = []

    def failing(function):
        def step(*arguments, **keywords):
            steps.append(function.__name__)
            if len(steps) == at or (len(steps) > at and failure is Killed):
                raise failure if failure is Killed else OSError(failure, os.strerror(failure))
            return function(*arguments, **keywords)

        return step

    monkeypatch.setattr(os, "write", failing(os.write))
    monkeypatch.setattr(os, "fsync", failing(os.fsync))
    monkeypatch.setattr(Path, "open", failing(Path.open))
    monkeypatch.setattr(Path, "rename", failing(Path.rename))
    monkeypatch.setattr(weights_module.shutil, "rmtree", failing(weights_module.shutil.rmtree))
    return steps


@pytest.mark.parametrize("failure", [Killed, errno.ENOSPC], ids=["killed", "disk full"])
def test_a_save_interrupted_anywhere_is_no_checkpoint(failure, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        steps = saving_steps(patch, 0, errno.EIO)  # none fails
        save_pretrained(tmp_path / "whole", CONFIG, WEIGHTS, files=FILES, max_shard_bytes=200_000)
    assert steps[-2:] == ["rename", "fsync"], "the folder gets its name when all in it is durable, and the name is made durable"
    places = [*range(1, 12), *range(12, len(steps), 37), *range(len(steps) - 12, len(steps))]  # of about 400
    for at in places:
        parent = tmp_path / str(at)
        with monkeypatch.context() as patch:
            saving_steps(patch, at, failure)
            with pytest.raises((Killed, OSError)):
                save_pretrained(parent / "model", CONFIG, WEIGHTS, files=FILES, max_shard_bytes=200_000)
        left = list(parent.iterdir())
        assert (parent / "model") not in left
        assert failure is Killed or left == [], "a save that fails leaves nothing"
        for unfinished in left:
            is_complete = verify(unfinished) == []
            assert not is_complete or steps[at - 1] in ("fsync", "rename"), f"step {at}"
            if is_complete:  # everything was written, only its name was missing
                assert_same(load_weights(unfinished, CONFIG), WEIGHTS)


def test_no_checkpoint_is_saved_over_another(folder):
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    with pytest.raises(InputError, match="exists already"):
        save_pretrained(folder, CONFIG, WEIGHTS)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


def test_an_empty_folder_may_be_saved_to(tmp_path):
    (tmp_path / "model").mkdir()
    save_pretrained(tmp_path / "model", CONFIG, WEIGHTS, files=FILES)
    assert verify(tmp_path / "model") == []


@pytest.mark.parametrize("name", ["../x", "a/b", "/x", "..", "", "config.json", INDEX, "evil.safetensors"])
def test_extra_files_have_plain_names(name, tmp_path):
    with pytest.raises(InputError, match="plain file name"):
        save_pretrained(tmp_path / "model", CONFIG, WEIGHTS, files={name: b""})
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_weights_that_are_not_finite_are_not_saved(value, tmp_path):
    broken = {**WEIGHTS, "model.norm.weight": torch.full_like(WEIGHTS["model.norm.weight"], value)}
    with pytest.raises(InputError, match="NaN"):
        save_pretrained(tmp_path / "model", CONFIG, broken)
    assert list(tmp_path.iterdir()) == []


def test_weights_of_another_model_are_not_saved(tmp_path):
    missing = {name: tensor for name, tensor in WEIGHTS.items() if name != "lm_head.weight"}
    for wrong in (missing, {**WEIGHTS, "x": torch.zeros(1)}, {**WEIGHTS, "model.norm.weight": torch.zeros(7)}):
        with pytest.raises(InputError, match="not those of this config"):
            save_pretrained(tmp_path / "model", CONFIG, wrong)
    assert list(tmp_path.iterdir()) == []


# --- checkpoints of another model ---------------------------------------------------------------------------------------------


def stored():
    return {name: stored_view(WEIGHTS, name).clone() for name in expected_tensors(CONFIG)}


def refused(folder, match, config=CONFIG):
    """The checkpoint is refused, by verify too, and nothing of a tensor's size is allocated."""
    allocated = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "empty", lambda *arguments, **_: allocated.append(arguments))
        with pytest.raises(CheckpointError, match=match) as caught:
            load_weights(folder, config)
    assert not allocated, "refused before memory is taken"
    assert len(str(caught.value)) < 2000
    assert str(folder.parent) not in str(caught.value), "messages hold no private paths"
    assert verify(folder), "verify sees it too"


def one_file(folder, tensors):
    folder.mkdir()
    write_config(folder, CONFIG)
    (folder / "tokenizer.json").write_bytes(TOKENIZER)
    safetensors.torch.save_file(tensors, folder / SINGLE)
    return folder


WRONG_TENSORS = {
    "missing": (lambda t: t.pop("model.norm.weight"), "model.norm.weight is missing"),
    "an expert missing": (lambda t: t.pop("model.layers.1.mlp.experts.3.up_proj.weight"), "experts.3.up_proj.weight is missing"),
    "tied": (lambda t: t.pop("lm_head.weight"), "lm_head.weight is missing"),
    "extra": (lambda t: t.update(rotary=torch.zeros(3)), "'rotary' is not one"),
    "an expert too many": (lambda t: t.update({"model.layers.1.mlp.experts.4.up_proj.weight": torch.zeros(16, 32)}), "is not one"),
    "packed already": (lambda t: t.update({"model.layers.1.mlp.experts.down": torch.zeros(4, 32, 16)}), "is not one"),
    "mis-shaped": (lambda t: t.update({"model.norm.weight": torch.zeros(33)}), r"has the shape \[33\]"),
    "transposed": (lambda t: t.update({"lm_head.weight": torch.zeros(32, 512)}), r"has the shape \[32, 512\]"),
    "a dimension more": (lambda t: t.update({"model.norm.weight": torch.zeros(1, 32)}), r"has the shape \[1, 32\]"),
    "whole numbers": (lambda t: t.update({"model.norm.weight": torch.zeros(32, dtype=torch.int32)}), "int32"),
    "doubles": (lambda t: t.update({"model.norm.weight": torch.zeros(32, dtype=torch.float64)}), "float64"),
    "bytes": (lambda t: t.update({"model.norm.weight": torch.zeros(32, dtype=torch.uint8)}), "uint8"),
    "float8": (lambda t: t.update({"model.norm.weight": torch.zeros(32).to(torch.float8_e4m3fn)}), "unknown type 'F8_E4M3'"),
    "experts of two types": (
        lambda t: t.update({"model.layers.1.mlp.experts.3.up_proj.weight": torch.zeros(16, 32)}), "bfloat16 and float32",
    ),
    "vectors of another type": (
        lambda t: t.update({n: x.float() for n, x in t.items() if x.dim() == 1}),
        "bfloat16 and float32, float32 among them model.sam_model.patch_embed.proj.bias",
    ),
    "a matrix of another type": (lambda t: t.update({"lm_head.weight": t["lm_head.weight"].half()}), "among them lm_head.weight"),
}  # fmt: skip


@pytest.mark.parametrize("case", WRONG_TENSORS)
def test_tensors_of_another_model_are_refused(case, tmp_path):
    change, match = WRONG_TENSORS[case]
    tensors = stored()
    change(tensors)
    refused(one_file(tmp_path / "model", tensors), match)


def test_every_problem_is_listed_at_once(tmp_path):
    tensors = stored()
    tensors.pop("lm_head.weight")
    tensors["model.norm.weight"] = torch.zeros(33)
    tensors["more"] = torch.zeros(1)
    folder = one_file(tmp_path / "model", tensors)
    (folder / "tokenizer.json").write_bytes(b"{}")
    problems = verify(folder)
    for match in ("lm_head.weight is missing", "shape [33]", "'more' is not one", "bfloat16 and float32", "tokenizer.json"):
        assert sum(match in problem for problem in problems) == 1, match
    assert len(problems) == 5


def test_several_types_are_loaded_as_the_one_that_is_asked_for(tmp_path):
    tensors = {name: tensor.float() if tensor.dim() == 1 else tensor for name, tensor in stored().items()}
    folder = one_file(tmp_path / "model", tensors)
    for dtype in (torch.bfloat16, torch.float32):
        assert_same(load_weights(folder, CONFIG, dtype=dtype), {name: tensor.to(dtype) for name, tensor in WEIGHTS.items()})
    assert len(verify(folder)) == 1
    assert "load them as one type" in verify(folder)[0]


def test_several_types_are_not_saved(tmp_path):
    mixed = {**WEIGHTS, "model.norm.weight": WEIGHTS["model.norm.weight"].float()}
    with pytest.raises(InputError, match="bfloat16 and float32"):
        save_pretrained(tmp_path / "model", CONFIG, mixed)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("at", [0, -1])
def test_weights_that_are_not_finite_are_refused(value, dtype, at, tmp_path):
    tensors = {name: tensor.to(dtype) for name, tensor in stored().items()}
    tensors["lm_head.weight"].view(-1)[at] = value
    folder = one_file(tmp_path / "model", tensors)
    for wanted in (None, torch.float32, torch.bfloat16):
        with pytest.raises(CheckpointError, match=r"lm_head\.weight holds NaN or infinite"):
            load_weights(folder, CONFIG, dtype=wanted)


def test_weights_that_overflow_the_wanted_type_are_refused(tmp_path):
    tensors = {name: tensor.float() for name, tensor in stored().items()}
    tensors["lm_head.weight"][0, 0] = 1e6
    folder = one_file(tmp_path / "model", tensors)
    load_weights(folder, CONFIG, dtype=torch.bfloat16)
    with pytest.raises(CheckpointError, match="as float16"):
        load_weights(folder, CONFIG, dtype=torch.float16)


@given(st.integers(0, 2**16 - 1), st.sampled_from([torch.bfloat16, torch.float16]))
def test_finite_is_what_torch_calls_finite(bits, dtype):
    value = torch.tensor([0, bits - 2**16 if bits >= 2**15 else bits], dtype=torch.int16).view(dtype)
    assert all_finite(value) == bool(value.isfinite().all())


def test_only_weight_types_can_be_asked_for(folder):
    with pytest.raises(InputError, match="float64"):
        load_weights(folder, CONFIG, dtype=torch.float64)


def test_a_tokenizer_of_another_model_is_refused(folder):
    tokenizer = BytePairTokenizer(TOKENIZER)
    check_tokenizer(tokenizer, CONFIG)
    small = replace(CONFIG, decoder=replace(CONFIG.decoder, vocab_size=402))
    for config, match in (
        (small, "402 rows"),
        (replace(CONFIG, image_id=7), "takes 7 for <image>"),
        (replace(CONFIG, image_id=2), "takes 2 for"),
        (replace(CONFIG, eos_id=9), "eos"),
    ):
        with pytest.raises(CheckpointError, match=match):
            check_tokenizer(tokenizer, config)
    write_config(folder, small)
    assert any("402 rows" in problem for problem in verify(folder))


def test_a_model_can_do_without_a_tokenizer_but_not_with_a_broken_one(folder):
    file = folder / "tokenizer.json"
    assert tokenizer_file(folder) == TOKENIZER
    file.unlink()
    assert verify(folder) == []
    file.symlink_to("nowhere.json")
    assert verify(folder) == ["'tokenizer.json' is a link to a file that is not there"]
    file.unlink()
    file.mkdir()
    assert verify(folder) == ["'tokenizer.json' is not a regular file"]
    file.rmdir()
    file.write_bytes(TOKENIZER[:-1])
    assert len(verify(folder)) == 1


# --- files and folders --------------------------------------------------------------------------------------------------------


def index_of(folder, weight_map):
    (folder / INDEX).write_text(json.dumps({"weight_map": weight_map}))


BAD_SHARDS = [
    "../model.safetensors", "/etc/passwd", "..", ".", "", "a/b.safetensors", "a\\b.safetensors", "C:\\x.safetensors",
    "~/x.safetensors", "x\0.safetensors", ".hidden.safetensors", "model.bin", "model.safetensors.bin", "model.safetensors/",
    "..safetensors", "a" * 300 + ".safetensors", "mödel.safetensors", 7, None, ["a.safetensors"],
]  # fmt: skip


@pytest.mark.parametrize("name", BAD_SHARDS, ids=lambda name: repr(name)[:30])
def test_shards_outside_the_folder_are_refused(name, folder):
    [shard] = folder.glob("*.safetensors")
    index_of(folder, {**dict.fromkeys(expected_tensors(CONFIG), shard.name), "lm_head.weight": name})
    refused(folder, "not the plain name")


def test_a_shard_that_is_not_there(folder):
    next(folder.glob("*.safetensors")).unlink()
    with pytest.raises(SourceNotFoundError, match="model-00001-of-000001"):
        load_weights(folder, CONFIG)
    assert any("model-00001-of-000001" in problem for problem in verify(folder))


def test_a_tensor_in_two_shards(folder):
    [shard] = folder.glob("*.safetensors")
    safetensors.torch.save_file({"lm_head.weight": stored()["lm_head.weight"]}, folder / "twice.safetensors")
    mapped = dict.fromkeys(expected_tensors(CONFIG), shard.name)
    index_of(folder, {**mapped, "lm_head.weight": "twice.safetensors"})
    refused(folder, "lies in two files")


@pytest.mark.parametrize(
    ("content", "match"),
    [
        ("{}", "no weight_map"),
        ('{"weight_map": []}', "no weight_map"),
        ('{"weight_map": {}}', "no weight_map"),
        ("[]", "must hold a JSON object"),
        ("{", "cannot be read as JSON"),
        ('{"weight_map": {"a": "x.safetensors", "a": "y.safetensors"}}', "stands twice"),
        ("[" * 100_000, "nested too deeply"),
        ('{"weight_map": {"lm_head.weight": "SHARD"}}', "disagree about"),
    ],
)
def test_bad_indexes_are_refused(content, match, folder):
    [shard] = folder.glob("*.safetensors")
    (folder / INDEX).write_text(content.replace("SHARD", shard.name))
    refused(folder, match)


def test_an_index_that_names_more_than_there_is(folder):
    [shard] = folder.glob("*.safetensors")
    index_of(folder, dict.fromkeys([*expected_tensors(CONFIG), "ghost"], shard.name))
    refused(folder, "disagree about 1 tensors, among them 'ghost'")


def test_an_index_too_large_is_not_read(folder):
    with (folder / INDEX).open("wb") as file:
        file.truncate(1 << 40)  # sparse: takes no room on the disk
    refused(folder, "larger than")


def test_one_file_or_an_index_but_not_both(folder):
    [shard] = folder.glob("*.safetensors")
    (folder / SINGLE).write_bytes(shard.read_bytes())
    refused(folder, "has both")
    (folder / INDEX).unlink()
    refused(folder, "no model.safetensors.index.json")
    shard.unlink()
    assert verify(folder) == []


@pytest.mark.parametrize(
    "name", ["pytorch_model.bin", "model.pt", "model.pth", "weights.npy", "weights.npz", "x.pkl", "model.ckpt"]
)
def test_pickles_are_never_opened(name, folder):
    (folder / INDEX).unlink()
    next(folder.glob("*.safetensors")).unlink()
    os.mkfifo(folder / name)  # opening it would block for ever
    refused(folder, "can run code")


@pytest.mark.parametrize("start", [b"PK\x03\x04", b"\x80\x02}q\x00", b"\x93NUMPY\x01"])
def test_pickles_by_another_name_are_refused(start, folder):
    next(folder.glob("*.safetensors")).write_bytes(start + b"\xff" * 100)
    refused(folder, "never opens")


def test_links_that_lead_out_are_refused(folder, tmp_path):
    [shard] = folder.glob("*.safetensors")
    outside = tmp_path / "outside.safetensors"
    shard.rename(outside)
    shard.symlink_to(outside)
    refused(folder, "leads out of its folder")
    shard.unlink()
    shard.symlink_to(Path("../outside.safetensors"))
    refused(folder, "leads out of its folder")
    shard.unlink()
    shard.symlink_to(shard.name)
    refused(folder, "loop|cannot be opened")
    shard.unlink()
    outside.rename(folder / "inside.blob")
    shard.symlink_to("inside.blob")
    assert verify(folder) == []


def test_the_hub_cache_is_made_of_links_and_works(folder, tmp_path):
    snapshot, blobs = tmp_path / "models--x" / "snapshots" / "abc", tmp_path / "models--x" / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    for number, path in enumerate(folder.iterdir()):
        path.rename(blobs / str(number))
        (snapshot / path.name).symlink_to(Path("../../blobs") / str(number))
    assert verify(snapshot) == []
    assert_same(load_weights(snapshot, CONFIG), WEIGHTS)
    (snapshot / "config.json").unlink()
    (tmp_path / "evil.json").write_text("{}")
    (snapshot / "config.json").symlink_to("../../../evil.json")
    assert any("leads out" in problem for problem in verify(snapshot))


def test_devices_pipes_and_folders_are_no_files(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "sub").mkdir()
    for name in ("pipe", "sub"):
        with pytest.raises(CheckpointError, match="not a regular file"), open_inside(tmp_path, name):
            pass
    with pytest.raises(SourceNotFoundError):
        read_inside(tmp_path, "nothing", limit=1)


def test_a_file_is_not_a_folder(folder, tmp_path):
    with pytest.raises(CheckpointError, match="is a folder"):
        checkpoint_folder(next(folder.glob("*.safetensors")))
    with pytest.raises(SourceNotFoundError):
        verify(tmp_path / "nowhere")


def test_a_file_cut_while_it_is_read_is_an_error(folder, monkeypatch):
    """Mapped, it would have killed the process with SIGBUS."""
    [shard] = folder.glob("*.safetensors")
    allocate = torch.empty

    def cutting(*arguments, **keywords):
        os.truncate(shard, 1000)
        return allocate(*arguments, **keywords)

    monkeypatch.setattr(torch, "empty", cutting)
    with pytest.raises(CheckpointError, match="became shorter"):
        load_weights(folder, CONFIG)


# --- malformed files (fault 77) -----------------------------------------------------------------------------------------------


def packed(header, data=b"", length=None):
    content = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(content) if length is None else length) + content + data


def f32(shape, start, end, **more):
    return {"dtype": "F32", "shape": shape, "data_offsets": [start, end], **more}


MALFORMED = {
    "empty file": b"",
    "seven bytes": b"\x00" * 7,
    "header length zero": struct.pack("<Q", 0),
    "header beyond the file": packed({"a": f32([1], 0, 4)}, b"0000", length=10_000),
    "header of 2**64 - 1 bytes": packed(b"{}", length=2**64 - 1),
    "header one byte short": packed({"a": f32([1], 0, 4)}, b"0000", length=50),
    "no brace first": packed(b" {}"),
    "not JSON": packed(b"{nonsense}"),
    "not UTF-8": packed(b'{"\xff\xfe": 1}'),
    "a byte order mark": packed(b"\xef\xbb\xbf{}"),
    "a list": packed(b"[]"),
    "two objects": packed(b"{}{}"),
    "deep nesting": packed(b'{"a":' * 200_000),
    "a huge number": packed(b'{"a":' + b"9" * 100_000 + b"}"),
    "duplicate names": packed(b'{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]},"a":{"dtype":"U8","shape":[4],'
                              b'"data_offsets":[0,4]}}', b"0000"),
    "duplicate fields": packed(b'{"a":{"dtype":"F32","dtype":"F32","shape":[1],"data_offsets":[0,4]}}', b"0000"),
    "overlap": packed({"a": f32([2], 0, 8), "b": f32([2], 4, 12)}, b"0" * 12),
    "the same bytes twice": packed({"a": f32([2], 0, 8), "b": f32([2], 0, 8)}, b"0" * 8),
    "a hole": packed({"a": f32([1], 0, 4), "b": f32([1], 8, 12)}, b"0" * 12),
    "a hole first": packed({"a": f32([1], 4, 8)}, b"0" * 8),
    "bytes behind": packed({"a": f32([1], 0, 4)}, b"0" * 5),
    "truncated data": packed({"a": f32([2], 0, 8)}, b"0" * 7),
    "offsets beyond the file": packed({"a": f32([1 << 40], 0, 4 << 40)}, b"0" * 8),
    "negative offsets": packed({"a": f32([1], -4, 0)}, b"0000"),
    "offsets backwards": packed({"a": f32([1], 4, 0)}, b"0000"),
    "three offsets": packed({"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4, 8]}}, b"0000"),
    "offsets as floats": packed({"a": f32([1], 0.0, 4.0)}, b"0000"),
    "offsets as texts": packed({"a": f32([1], "0", "4")}, b"0000"),
    "offset true": packed({"a": {"dtype": "U8", "shape": [1], "data_offsets": [False, True]}}, b"0"),
    "offset NaN": packed(b'{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,NaN]}}', b"0000"),
    "size unlike the shape": packed({"a": f32([3], 0, 8)}, b"0" * 8),
    "unknown type": packed({"a": {"dtype": "F4", "shape": [1], "data_offsets": [0, 4]}}, b"0000"),
    "type of a list": packed({"a": {"dtype": ["F32"], "shape": [1], "data_offsets": [0, 4]}}, b"0000"),
    "negative shape": packed({"a": f32([-1, -1], 0, 4)}, b"0000"),
    "absurd shape": packed({"a": f32([2**62, 2**62], 0, 0)}),
    "shape that wraps around": packed({"a": f32([2**63, 2], 0, 0)}),
    "a thousand dimensions": packed({"a": f32([1] * 1000, 0, 4)}, b"0000"),
    "zero-size tensors at one offset": packed({"a": f32([0], 0, 0), "b": f32([0], 0, 0)}),
    "no shape": packed({"a": {"dtype": "F32", "data_offsets": [0, 4]}}, b"0000"),
    "a field more": packed({"a": f32([1], 0, 4, module="os")}, b"0000"),
    "a tensor that is a text": packed({"a": "F32"}),
    "metadata of numbers": packed({"__metadata__": {"a": 1}, "a": f32([1], 0, 4)}, b"0000"),
    "metadata as a list": packed({"__metadata__": [], "a": f32([1], 0, 4)}, b"0000"),
}  # fmt: skip


def header_of(path):
    with path.open("rb") as file:
        return read_header(file.fileno(), "file")


@pytest.mark.parametrize("case", MALFORMED)
def test_malformed_files_are_refused(case, tmp_path):
    (tmp_path / "a").write_bytes(MALFORMED[case])
    with pytest.raises(CheckpointError):
        header_of(tmp_path / "a")


def test_a_header_over_the_limit_is_not_read(tmp_path):
    (tmp_path / "a").write_bytes(struct.pack("<Q", MAX_HEADER + 1))
    os.truncate(tmp_path / "a", 1 << 30)
    with pytest.raises(CheckpointError, match="header would take"):
        header_of(tmp_path / "a")


@settings(max_examples=300)
@given(st.data())
def test_a_damaged_header_is_refused_or_means_what_the_library_reads(tmp_path_factory, data):
    good = packed(
        {"__metadata__": {"format": "pt"}, "a": f32([2, 3], 0, 24), "b": {"dtype": "BF16", "shape": [5], "data_offsets": [24, 34]}},
        bytes(34),
    )
    content = bytearray(good)
    for _ in range(data.draw(st.integers(1, 3))):
        at = data.draw(st.integers(0, len(content) - 1))
        change = data.draw(st.sampled_from(["set", "cut", "insert"]))
        new = [] if change == "cut" else [data.draw(st.one_of(st.sampled_from(b'{}[]",:0123456789-.e '), st.integers(0, 255)))]
        content[at : at + (change != "insert")] = new
    path = tmp_path_factory.mktemp("fuzz") / "a"
    path.write_bytes(content)
    try:
        ours = header_of(path)
    except CheckpointError:
        return
    theirs = safetensors.torch.load(bytes(content))
    assert {name: (entry.dtype, entry.shape) for name, entry in ours.tensors.items()} == {
        name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in theirs.items()
    }


@settings(max_examples=100)
@given(st.binary(max_size=200))
def test_any_bytes_are_refused_or_read(tmp_path_factory, content):
    path = tmp_path_factory.mktemp("fuzz") / "a"
    path.write_bytes(struct.pack("<Q", len(content)) + content)
    with contextlib.suppress(CheckpointError):
        header_of(path)


def test_files_are_written_as_the_format_says(tmp_path):
    tensors = {"b": torch.arange(6).view(2, 3), "a": torch.tensor(True), "ü": torch.ones(3, dtype=torch.bfloat16)}
    write_file(tmp_path / "a", tensors, {"by": "optmem"})
    content = (tmp_path / "a").read_bytes()
    assert struct.unpack("<Q", content[:8])[0] % 8 == 0
    read = safetensors.torch.load(content)
    assert all(torch.equal(read[name], tensors[name]) for name in tensors)
    assert header_of(tmp_path / "a").metadata == {"by": "optmem"}
    with pytest.raises(FileExistsError):
        write_file(tmp_path / "a", tensors, {})


# --- memory -------------------------------------------------------------------------------------------------------------------

LOAD = r"""
import re, sys, time, torch
from pathlib import Path
from optmem.model.weights import load_weights
from optmem.model.config_json import read_config
config = read_config(sys.argv[1])
dtype = getattr(torch, sys.argv[2])
def memory(what):  # ru_maxrss would begin with the peak of the process that started this one
    return int(re.search(what + r":\s*(\d+) kB", Path("/proc/self/status").read_text())[1]) * 1024
Path("/proc/self/clear_refs").write_text("5")  # forget the peak so far
before = memory("VmRSS")
start = time.perf_counter()
weights = load_weights(sys.argv[1], config, dtype=dtype)
seconds = time.perf_counter() - start
after = memory("VmHWM")
assert not {"transformers", "safetensors"} & sys.modules.keys(), "weights are read without them"
size = sum(tensor.numel() * tensor.element_size() for tensor in weights.values())
print((after - before) / size, size / seconds / 1e9)
"""


def peak(folder, dtype):
    """Peak memory above that before loading as a share of the weights' bytes, and GB/s."""
    command = [sys.executable, "-c", LOAD, str(folder), dtype]
    done = subprocess.run(command, capture_output=True, text=True, check=True, env={**os.environ, "PYTHONPATH": str(Path.cwd())})
    share, speed = map(float, done.stdout.split())
    print(f"{dtype}: peak {share:.3f} of the weights, {speed:.2f} GB/s")
    return share


def sized_config(experts):
    decoder = replace(CONFIG.decoder, hidden=512, experts=experts, expert_width=256, layers=3, vocab_size=8192)
    return replace(CONFIG, decoder=decoder)


def test_loading_takes_the_memory_of_the_weights(tmp_path):
    config = sized_config(64)  # 0.12 GB
    save_pretrained(tmp_path / "model", config, random_weights(config))
    assert peak(tmp_path / "model", "bfloat16") < 1.15
    assert peak(tmp_path / "model", "float32") < 1.15


@pytest.mark.slow
def test_loading_a_gigabyte_takes_the_memory_of_the_weights(tmp_path):
    config = sized_config(600)
    save_pretrained(tmp_path / "model", config, random_weights(config))
    for dtype in ("bfloat16", "float16", "float32"):
        assert peak(tmp_path / "model", dtype) < 1.15
