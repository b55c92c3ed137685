"""The engine: vision tokens that travel and are refused where they do not fit, rows and glances as text, one door for it all."""

import json
import weakref
from contextlib import suppress
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

import optmem
from optmem import Engine, VisionTokens, document_text
from optmem.engine.checkpoint import FIDELITY, Temperatures, find_checkpoint, fingerprint, read_temperatures
from optmem.engine.lanes import Lanes, PlainLane
from optmem.engine.modes import choose_mode
from optmem.engine.reading import complete, saw
from optmem.errors import BackendError, CheckpointError, InputError, OptmemError, OutputError, SourceNotFoundError
from optmem.model.config_json import public_config
from optmem.model.glance import Glimpse
from optmem.model.model import Model
from optmem.model.nano import Row
from optmem.model.tensor_file import write_file
from optmem.pages import Page, read_symbols
from optmem.pixels import MODES, NO_TILES, Mode, find_mode
from optmem.testing import assert_equal
from optmem.text.characters import END, EOL, MAX_ROWS, CharacterTokenizer, characters_json

from .test_nano import TOKENIZER, pages, tiny_model

EOL_ID, END_ID = TOKENIZER.special(EOL), TOKENIZER.special(END)


@pytest.fixture(scope="module", params=[None, Lanes(PlainLane(), PlainLane())], ids=["plain", "recorded"])
def engine(request):
    """A tiny nano that says something; on one thread."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    model = tiny_model(seed=3)
    with torch.no_grad():
        model.decoder.lm_head.weight.mul_(20)
        model.decoder.model.embed_tokens.weight.mul_(20)
        model.decoder.lm_head.weight[EOL_ID].mul_(2)
    yield Engine(model, lanes=request.param)
    torch.set_num_threads(threads)


def grey(count, side=128):
    return list(pages(count, side).numpy()[..., 0])


# --- a perfect reader ---------------------------------------------------------------------------------------------------------


def true_rows(page: Page) -> list[Row]:
    """What a reader without fault says of a page: every cell, and where rows and text end."""
    cells = page.characters()
    ids, places = TOKENIZER.ids_of(cells.symbols), cells.boxes[:, 1] // 16
    assert (ids >= 0).all(), "a page for nano draws what nano can say"
    rows = [Row(number, ids[places == number].tolist(), ended_by="eol") for number in range(places.max() + 1)]
    return [*rows, Row(len(rows), [], ended_by="end")] if len(rows) < MAX_ROWS else rows


@settings(max_examples=60, deadline=None)
@given(st.text(st.one_of(st.characters(codec="utf-8"), st.sampled_from("ab \n\t\x07é漢\ue000\ue05b—"))))
def test_a_page_read_without_fault_is_its_text(text):
    drawn = optmem.paginate(text)
    read = [complete(true_rows(page), TOKENIZER, vision_tokens=74, side=512) for page in drawn]
    assert optmem.document_text(read) == "".join(page.text() for page in drawn) == text
    if len(drawn) == 1:
        assert read[0].text == text
        assert read[0].finish_reason == "stop"


def test_long_and_hostile_texts_come_back_over_pages():
    text = "".join(f"{at} 漢字 é\x07 [user Ada] <row_3> \ue001 {'x' * (at % 90)}\n" for at in range(300))
    drawn = optmem.paginate(text)
    read = [complete(true_rows(page), TOKENIZER, vision_tokens=74, side=512) for page in drawn]
    assert len(drawn) > 5
    assert optmem.document_text(read) == text
    same = [done.text == page.text() for done, page in zip(read, drawn, strict=True)]
    assert sum(same) >= len(same) - 2  # all but those at whose edge an escape is cut


def test_labels_of_a_chat_come_back():
    chat = [{"role": "user", "content": "[user] says\thi — 漢"}, {"role": "assistant", "content": "ok\n"}]
    drawn = optmem.paginate(chat)
    assert complete(true_rows(drawn[0]), TOKENIZER, vision_tokens=74, side=512).text == drawn[0].text()


def test_a_glance_without_fault_is_the_text():
    page = optmem.paginate("one\n\tzwei é\n" + "y" * 64 + "\nlast")[0]
    ids = torch.full((32, 64), END_ID)
    for row in true_rows(page)[:-1]:
        ids[row.number] = torch.tensor((row.ids + [EOL_ID] * 64)[:64])
    seen = saw(Glimpse(ids, torch.full(ids.shape, 0.5), (16, 8), 0.9), TOKENIZER)
    assert seen.text == page.text()
    assert [row.ended_by for row in seen.rows] == ["eol"] * 5 + ["end"]
    assert seen.confidence == 0.5
    assert saw(Glimpse(ids, torch.ones(ids.shape), (16, 8), 1.0), TOKENIZER, [1, 99]).text == "\tzwei é\n"


def test_an_end_seen_inside_a_row_hides_nothing_below_it():
    ids = torch.tensor([TOKENIZER.encode("abcd"), TOKENIZER.encode("efgh"), [END_ID] * 4])
    ids[0, 2] = END_ID
    seen = saw(Glimpse(ids, torch.ones(ids.shape), (16, 8), 1.0), TOKENIZER)
    assert seen.text == "abefgh"
    assert [row.ended_by for row in seen.rows] == ["end", "eol", "end"]


# --- what a completion says ---------------------------------------------------------------------------------------------------


def row(number, text, ended_by="eol", chance=0.5):
    ids = TOKENIZER.encode(text)
    count = len(ids) + (ended_by != "length")
    return Row(number, ids, [-0.7] * count, ended_by, [chance] * count)


def test_a_completion_counts_what_was_said():
    done = complete([row(0, "ab\n"), row(1, "c", chance=1.0), row(2, "", "end")], TOKENIZER, vision_tokens=74, side=512)
    assert (done.text, done.finish_reason) == ("ab\nc", "stop")
    assert done.token_ids[-3:] == (*TOKENIZER.encode("c"), EOL_ID, END_ID)
    assert (done.prompt_tokens, done.output_tokens) == (77, 7)
    assert len(done.logprobs) == len(done.probabilities) == 7
    assert done.confidence == pytest.approx((5 * 0.5 + 2) / 7)


@pytest.mark.parametrize(
    ("most", "text", "count", "reason"),
    [
        (1, "a", 1, "length"),
        (4, "ab\n", 4, "length"),
        (5, "ab\nc", 5, "length"),
        (7, "ab\nc", 7, "stop"),
        (None, "ab\nc", 7, "stop"),
    ],
)
def test_no_more_tokens_are_kept_than_asked_for(most, text, count, reason):
    rows = [row(0, "ab\n"), row(1, "c"), row(2, "", "end")]
    done = complete(rows, TOKENIZER, vision_tokens=74, side=512, most=most)
    assert (done.text, done.output_tokens, done.finish_reason) == (text, count, reason)
    assert len(done.logprobs) == len(done.probabilities) == count


def test_a_page_that_does_not_end_is_not_finished():
    assert complete([row(0, "aa", "length")], TOKENIZER, vision_tokens=1, side=512).finish_reason == "length"
    full = [row(at, "a") for at in range(MAX_ROWS)]
    found = {side: complete(full, TOKENIZER, vision_tokens=1, side=side).finish_reason for side in (1024, 1280)}
    assert found == {1024: "stop", 1280: "length"}  # 128 rows are all that 1024 pixels can have
    fewer = CharacterTokenizer(characters_json(rows=4))
    assert [complete(full[:count], fewer, vision_tokens=1, side=64).finish_reason for count in (3, 4)] == ["stop", "length"]
    assert complete([], TOKENIZER, vision_tokens=1, side=512).confidence == 1


# --- vision tokens ------------------------------------------------------------------------------------------------------------


def tokens(side=128, hidden=32, dtype=torch.bfloat16, fill=0.5):
    mode = find_mode(f"square {side}")
    return VisionTokens(torch.full((mode.paper_tokens(), hidden), fill, dtype=dtype), mode, NO_TILES, "0" * 32)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_vision_tokens_come_back_from_their_file(tmp_path, dtype):
    features = torch.randn(2 * 4 + 9, 16).to(dtype)
    mode = Mode("odd", 192, 128, 4, 100, has_newlines=True)
    saved = VisionTokens(features, mode, (2, 1), "a1" * 16)
    saved.save(tmp_path / "page.safetensors")
    tokens(64).save(tmp_path / "page.safetensors")  # replaced
    saved.save(str(tmp_path / "page.safetensors"))
    loaded = VisionTokens.load(tmp_path / "page.safetensors")
    assert_equal(loaded.features, features)
    assert (loaded.mode, loaded.grid, loaded.encoder, loaded.tiles) == (mode, (2, 1), "a1" * 16, 2)
    assert [file.name for file in tmp_path.iterdir()] == ["page.safetensors"]


def test_as_int8_they_take_half_the_room_and_are_off_by_half_a_step(tmp_path):
    rows = torch.logspace(-20, 4, 256)[:, None] * torch.randn(256, 384, generator=torch.Generator().manual_seed(1)).clamp(-3, 3)
    rows[7] = 0
    saved = VisionTokens(rows, find_mode("square 1024"), NO_TILES, "a1" * 16, (1000, 800))
    saved.save(tmp_path / "whole", int8=True)
    replace(saved, features=rows.bfloat16()).save(tmp_path / "half")
    loaded = VisionTokens.load(tmp_path / "whole")
    assert loaded.picture == (1000, 800)
    step = rows.abs().amax(1, keepdim=True) / 127
    assert ((loaded.features - rows).abs() <= step * 0.501).all()
    assert (loaded.features[7] == 0).all()
    assert (tmp_path / "whole").stat().st_size < 0.52 * (tmp_path / "half").stat().st_size
    with pytest.raises(InputError, match="no place in int8"):
        tokens(dtype=torch.float32, fill=1e30).save(tmp_path / "absurd", int8=True)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"features": torch.zeros(5, 32)}, "has .4, hidden. features, got .5, 32."),
        ({"features": torch.zeros(4)}, "got .4."),
        ({"features": torch.zeros(4, 32, dtype=torch.int8)}, "must be dense"),
        ({"features": torch.zeros(4, 32).to_sparse()}, "must be dense"),
        ({"grid": (3, 1)}, "tiles"),
        ({"encoder": "../../etc"}, "32 hexadecimal digits"),
        ({"encoder": None}, "fingerprint, got NoneType"),
        ({"features": [[0.0]]}, "features, .*, got list"),
        ({"mode": "tiny"}, "features, .*, got str"),
        ({"grid": None}, "a grid has"),
        ({"grid": (2,)}, "a grid has"),
        ({"grid": (-1, 1)}, "a grid has"),
        ({"picture": 5}, "a picture has"),
        ({"picture": (0, 5)}, "a picture has"),
        ({"picture": (1.0, 5)}, "a picture has"),
    ],
)
def test_vision_tokens_are_what_their_mode_says(change, message):
    with pytest.raises(InputError, match=message):
        replace(tokens(), **change)


def metadata(**changes):
    mode = {"name": "m", "size": 128, "tile_size": 0, "max_tiles": 0, "tile_above": 0, "has_newlines": True}
    fields = {"format": "optmem vision tokens 1", "mode": json.dumps(mode), "grid": "[1, 1]", "encoder": "0" * 32}
    return {name: value for name, value in (fields | changes).items() if value is not None}


GOOD = {"features": torch.zeros(4, 32)}
WHOLE = {"features": torch.ones(4, 32, dtype=torch.int8)}


@pytest.mark.parametrize(
    ("tensors", "fields", "message"),
    [
        (GOOD, {"format": "pt"}, "not a file of vision tokens"),
        (GOOD, {"format": None}, "not a file of vision tokens"),
        (GOOD, {"more": "x"}, "metadata must be exactly"),
        (GOOD, {"mode": "[]"}, "JSON object"),
        (GOOD, {"mode": "{}"}, "mode must have exactly"),
        (GOOD, {"mode": '{"name": "m", "size": true}'}, "mode must have exactly"),
        (GOOD, {"mode": metadata()["mode"].replace("128", "true")}, "each of its type"),
        (GOOD, {"mode": metadata()["mode"].replace("128", "127")}, "multiple of 64"),
        (GOOD, {"mode": metadata()["mode"].replace("128", "192")}, "must be 9, as mode m has, got 4"),
        (GOOD, {"grid": "[1, 2]"}, "tiles or none"),
        (GOOD, {"grid": "[1, 1, 1]"}, r"grid must be"),
        (GOOD, {"grid": "[9999999999, 1]"}, r"grid must be"),
        (GOOD, {"encoder": "zz"}, "32 hexadecimal digits"),
        ({"weights": torch.zeros(4, 32)}, {}, "must hold 'features', got"),
        (GOOD | {"more": torch.zeros(1)}, {}, "must hold 'features', got"),
        (GOOD | {"scales": torch.ones(4)}, {}, "must hold 'features', got"),
        ({"features": torch.zeros(4, 32, dtype=torch.int8)}, {}, "must hold 'features' and 'scales', got"),
        ({"features": torch.zeros(4, 32, dtype=torch.int16)}, {}, "bf16, fp16, fp32 or int8"),
        (WHOLE | {"scales": torch.ones(5)}, {}, r"scales must be fp32 \[4\]"),
        (WHOLE | {"scales": torch.ones(4).half()}, {}, r"scales must be fp32 \[4\]"),
        (WHOLE | {"scales": torch.tensor([1.0, 0.0, 1.0, 1.0])}, {}, "above 0 and at most"),
        (WHOLE | {"scales": torch.tensor([1.0, torch.nan, 1.0, 1.0])}, {}, "above 0 and at most|NaN"),
        (WHOLE | {"scales": torch.full((4,), 1e30)}, {}, "above 0 and at most"),
        (GOOD, {"picture": "[0, 5]"}, "picture must be"),
        (GOOD, {"picture": "[99999999, 5]"}, "picture must be"),
        ({"features": torch.zeros(4, 32, 1)}, {}, "bf16, fp16, fp32 or int8"),
        ({"features": torch.full((4, 32), torch.nan)}, {}, "NaN or infinite"),
        ({"features": torch.full((4, 32), -torch.inf, dtype=torch.bfloat16)}, {}, "NaN or infinite"),
    ],
)
def test_bad_files_of_vision_tokens_are_refused(tmp_path, tensors, fields, message):
    write_file(tmp_path / "bad", tensors, metadata(**fields))
    with pytest.raises(CheckpointError, match=message):
        VisionTokens.load(tmp_path / "bad")


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_a_damaged_file_is_an_error_of_ours_or_nothing_at_all(tmp_path_factory, data):
    file = tmp_path_factory.mktemp("damaged") / "page"
    tokens().save(file)
    content = bytearray(file.read_bytes())
    if data.draw(st.booleans()):
        del content[data.draw(st.integers(0, len(content) - 1)) :]
    for _ in range(data.draw(st.integers(0, 3))):
        if content:
            content[data.draw(st.integers(0, min(len(content), 400) - 1))] = data.draw(st.integers(0, 255))
    file.write_bytes(content)
    with suppress(OptmemError):
        assert VisionTokens.load(file).features.shape == (4, 32)


def test_files_that_are_not_there(tmp_path):
    with pytest.raises(SourceNotFoundError, match="'none' is not in the folder"):
        VisionTokens.load(tmp_path / "none")
    with pytest.raises(OptmemError):
        VisionTokens.load(tmp_path)
    with pytest.raises(OutputError, match="cannot write page"):
        tokens().save(tmp_path / "no" / "folder" / "page")
    for name in ("/proc/page", "", "a\0b"):
        with pytest.raises(OutputError):
            tokens().save(name)
    with pytest.raises(InputError, match="NaN or infinite"):  # it could not be read back
        tokens(fill=torch.nan).save(tmp_path / "page")
    tokens().save(tmp_path / ("é" * 127))  # as long as a name may be
    assert len(list(tmp_path.iterdir())) == 1


# --- encode -------------------------------------------------------------------------------------------------------------------


def test_pictures_of_all_kinds_are_encoded(engine, tmp_path):
    array = grey(1)[0]
    Image.fromarray(array).save(tmp_path / "page.png")
    page = optmem.paginate("hello", size=128)[0]
    given = [array, Image.fromarray(array), str(tmp_path / "page.png"), tmp_path / "page.png", torch.from_numpy(array), page]
    encoded = engine.encode(given)
    assert [each.mode.name for each in encoded] == ["square 128"] * 6
    assert all(each.features.shape == (4, 32) and each.encoder == engine.encoder_fingerprint for each in encoded)
    for each in encoded[1:5]:
        assert_equal(each.features, encoded[0].features)
    for one in given:
        assert len(engine.encode(one)) == 1
    assert engine.encode([]) == []
    assert_equal(engine.encode(iter(given))[5].features, engine.encode(page)[0].features)


def test_pictures_are_not_held_while_others_are_read(engine, monkeypatch):
    """Of 64 scans only what the encoder sees is kept."""
    alive, most = [], []

    def seen(picture, name):  # noqa: ARG001 - as as_image has it
        pixels = np.full((512, 512), picture, dtype=np.uint8)
        alive.append(weakref.ref(pixels))
        most.append(sum(ref() is not None for ref in alive))
        return pixels

    monkeypatch.setattr("optmem.engine.engine.take_image", seen)
    assert len(engine.encode([1, 2, 3, 4], mode="square 64")) == 4
    assert max(most) <= 2


def test_a_picture_is_encoded_as_it_would_be_alone(engine):
    sizes = [128, 192, 128, 64, 192]
    pictures = [grey(1, side)[0] for side in sizes]
    together = engine.encode(pictures)
    assert [each.mode.size for each in together] == sizes
    for picture, each in zip(pictures, together, strict=True):
        torch.testing.assert_close(each.features, engine.encode(picture)[0].features, atol=1e-5, rtol=1e-4)


def test_a_mode_is_the_pages_own_or_the_one_asked_for(engine):
    wide = np.zeros((100, 200), dtype=np.uint8)
    assert engine.encode(wide, mode="square 192")[0].features.shape == (9, 32)
    assert engine.encode(np.zeros((512, 512), dtype=np.uint8))[0].mode == MODES["tiny"]
    with pytest.raises(InputError, match="200x100 pixels is not a square of a multiple of 64"):
        engine.encode(wide)
    with pytest.raises(InputError, match="multiple of 64 pixels up to 1280"):  # hours of attention are asked for by name
        engine.encode(np.zeros((8192, 8192), dtype=np.uint8))
    with pytest.raises(InputError, match="nano sees a page in one view"):
        engine.encode(wide, mode="gundam")
    with pytest.raises(InputError, match="mode must be one of"):
        engine.encode(wide, mode="square")


@pytest.mark.parametrize(
    ("family", "mode", "size", "expected"),
    [
        ("deepseek-ocr", None, (640, 640), "small"),
        ("deepseek-ocr", "gundam", (3000, 500), "gundam"),
        ("deepseek-ocr", None, (128, 128), "a square of .512, 640, 1024, 1280. pixels"),
        ("deepseek-ocr", "square 128", (128, 128), "has the modes"),
        ("deepseek-ocr", Mode("small", 512), (128, 128), "has the modes"),
        ("deepseek-ocr-2", None, (31, 7), "ocr2"),
        ("deepseek-ocr-2", "tiny", (512, 512), "has the modes ocr2"),
        ("nano", Mode("tiny", 512), (9, 9), "tiny"),
        ("nano", "ocr2", (512, 512), "one view"),
    ],
)
def test_modes_are_those_of_the_family(family, mode, size, expected):
    config = public_config(family)
    if " " in expected:
        with pytest.raises(InputError, match=expected):
            choose_mode(config, mode, *size)
    else:
        assert choose_mode(config, mode, *size).name == expected


def test_a_fingerprint_is_of_what_makes_the_tokens(engine):
    model = tiny_model(seed=3)
    assert Engine(model).encoder_fingerprint == engine.encoder_fingerprint  # the decoder's weights differ
    model.encoder.to(torch.bfloat16)
    assert Engine(model).encoder_fingerprint == engine.encoder_fingerprint
    with torch.no_grad():
        model.encoder.view_seperator.add_(1)
    assert Engine(model).encoder_fingerprint == engine.encoder_fingerprint
    with torch.no_grad():
        model.encoder.projector.layers.bias[0] += 1
    assert Engine(model).encoder_fingerprint != engine.encoder_fingerprint


# --- decode and glance --------------------------------------------------------------------------------------------------------


def test_a_draft_changes_nothing_but_the_time(engine):
    seen = engine.encode(grey(3))
    plain, drafted = (engine.decode(seen, rows=range(6), max_tokens=90, draft=draft) for draft in (None, "glance"))
    assert plain == drafted
    assert any(done.text for done in plain)
    assert all(done.accepted_length == 1 for done in plain)


def test_a_page_is_read_as_it_would_be_alone(engine):
    seen = engine.encode([*grey(3), *grey(1, 192)])
    together = engine.decode(seen, rows=[4, 0], max_tokens=30)
    assert together == [engine.decode(each, rows=[4, 0], max_tokens=30)[0] for each in seen]
    assert [row.number for row in together[0].rows][:1] == [4]
    assert engine.decode(iter(seen), rows=[4, 0], max_tokens=30) == together


def test_rows_are_random_access(engine):
    seen = engine.encode(grey(1))
    several = engine.decode(seen, rows=range(2, 5))[0]
    assert [row.number for row in several.rows] == [2, 3, 4]
    assert list(several.rows) == [engine.decode(seen, rows=[number])[0].rows[0] for number in (2, 3, 4)]
    assert engine.decode(seen, rows=())[0].text == ""


def test_stored_tokens_are_read_as_fresh_ones(engine, tmp_path):
    seen = engine.encode(grey(1))[0]
    seen.save(tmp_path / "page")
    assert engine.decode(VisionTokens.load(tmp_path / "page"), rows=[1]) == engine.decode(seen, rows=[1])
    assert engine.glance(VisionTokens.load(tmp_path / "page")) == engine.glance(seen)


def test_more_pages_than_fit_at_once_are_read_in_order(engine, monkeypatch):
    pictures = grey(5)
    whole = engine.decode(engine.encode(pictures), rows=[0], max_tokens=5)
    monkeypatch.setattr("optmem.engine.engine.PAGES_AT_ONCE", 2)
    assert engine.decode(engine.encode(pictures), rows=[0], max_tokens=5) == whole


def test_a_glance_has_a_chance_for_every_character(engine):
    (seen,) = engine.glance(engine.encode(grey(1)))
    assert seen.cell in engine.model.config.glance.cells
    assert len(seen.token_ids) == len(seen.probabilities)
    assert all(0 < chance <= 1 for chance in seen.probabilities)
    assert seen.text == TOKENIZER.text(seen.token_ids)
    rows = [row.number for row in seen.rows]
    assert engine.glance(engine.encode(grey(1)), rows=rows)[0].rows == seen.rows
    assert engine.glance(engine.encode(grey(1)), rows=[1, 0])[0].rows[1] == seen.rows[0]


def test_temperatures_move_confidence_and_not_the_text(engine):
    seen = engine.encode(grey(1))
    warm = Engine(engine.model, Temperatures(3.0, 4.0))
    (plain,), (tempered,) = (each.decode(seen, rows=range(3), max_tokens=20) for each in (engine, warm))
    assert (tempered.text, tempered.logprobs) == (plain.text, plain.logprobs)
    assert tempered.confidence < plain.confidence
    (cold,), (calm,) = (each.glance(seen, rows=range(4)) for each in (engine, warm))
    assert calm.token_ids == cold.token_ids
    assert sum(map(sum, (row.probabilities for row in calm.rows))) < sum(map(sum, (row.probabilities for row in cold.rows)))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"encoder": "1" * 32}, "of the encoder 11111111, this model has"),
        ({"features": torch.zeros(4, 48)}, "48 wide, this model's are 32"),
        ({"features": torch.full((4, 32), torch.nan)}, "NaN or infinite"),
        ({"features": torch.full((4, 32), -3e38)}, "values above 65504"),  # infinite in bf16, and norms over it in any type
        ({"features": torch.zeros(4 + 2 * 1, 32), "mode": Mode("x", 128, 64, 2), "grid": (2, 1)}, "one view"),
    ],
)
def test_tokens_that_do_not_fit_are_refused(engine, change, message):
    good = engine.encode(grey(1))[0]
    for read in (engine.decode, engine.glance):
        with pytest.raises(InputError, match=message):
            read([good, replace(good, **change)])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"rows": [128]}, "whole numbers from 0 to 127, got 128"),
        ({"rows": [True]}, "whole numbers from 0 to 127, got True"),
        ({"rows": iter(lambda: 3, 4)}, "more than 128 of them"),
        ({"rows": 3}, "rows are an iterable of numbers"),
        ({"draft": "magic"}, "draft must be 'auto', 'glance', 'ngrams', 'text', None"),
        ({"max_tokens": 0}, "max_tokens must be a whole number of at least 1"),
        ({"max_tokens": 1.5}, "max_tokens must be a whole number of at least 1"),
    ],
)
def test_settings_are_checked(engine, arguments, message):
    with pytest.raises(InputError, match=message):
        engine.decode(engine.encode(grey(1)), **arguments)


def test_what_is_no_page_is_refused(engine):
    with pytest.raises(InputError, match="take VisionTokens, as encode makes them, got ndarray"):
        engine.decode(grey(1))
    for nothing in (None, 5):
        with pytest.raises(InputError, match="VisionTokens or an iterable of them"):
            engine.glance(nothing)
    with pytest.raises(InputError, match="read together are for the public models"):
        engine.decode([engine.encode(grey(2))])


def test_what_holds_no_pages_is_refused(engine):
    for nothing in ("", b"", {}):
        with pytest.raises(InputError, match=f"VisionTokens or an iterable of them, got {type(nothing).__name__}"):
            engine.decode(nothing)
    for ask in (engine.encode, engine.ocr):
        with pytest.raises(InputError, match="one picture or an iterable of them, got dict"):
            ask({})
    assert engine.encode([]) == engine.decode([]) == []


def test_an_argument_that_there_is_not_is_named(engine):
    for ask in (engine.decode, engine.stream, engine.ocr):
        with pytest.raises(InputError, match="nothing called 'bogus' to ask for: there is prompt, rows, draft"):
            ask([], bogus=1)


def test_the_item_of_a_list_that_is_wrong_is_named(engine, tmp_path):
    good = grey(1)[0]
    (tmp_path / "bad.png").write_bytes(b"x")
    for bad, name in ((good.astype(float), "image 2"), (good[:100], "image 2"), (tmp_path / "bad.png", r"bad\.png")):
        with pytest.raises(InputError, match=f"^{name}[: ]"):
            engine.encode([good, bad])
    with pytest.raises(InputError, match=r"^image: a picture of"):
        engine.encode(good[:100])


def test_a_closed_engine_does_nothing_more(engine):
    with Engine(engine.model) as short:
        assert isinstance(short, Engine)
        seen = short.encode(grey(1))
    reads = (short.decode, short.glance, lambda seen: short.search(seen, "word"), lambda seen: short.stream(seen[0]))
    for ask in (*(partial(read, seen) for read in reads), lambda: short.encode(grey(1)), lambda: short.ocr(grey(1))):
        with pytest.raises(BackendError, match="this engine is closed: make a new one"):
            ask()


def test_names_of_files_are_names(engine):
    (seen,) = engine.encode(grey(1))
    for wrong in (None, 3, b"name"):
        with pytest.raises(InputError, match=f"is a str or a Path, got {type(wrong).__name__}"):
            seen.save(wrong)
        with pytest.raises(InputError, match=f"is a str or a Path, got {type(wrong).__name__}"):
            VisionTokens.load(wrong)


def test_a_document_is_a_list_of_pages(engine):
    (done,) = engine.decode(engine.encode(grey(1)), rows=[0])
    with pytest.raises(InputError, match="in order, as decode gives them, got one Completion"):
        document_text(done)
    with pytest.raises(InputError, match="as decode or glance gives them, got int"):
        document_text([1])


def test_public_families_are_encoded_without_a_tokenizer_and_have_no_glance():
    engine = Engine(Model.random("deepseek-ocr", scale=0.05))
    seen = engine.encode(np.zeros((640, 640), dtype=np.uint8))
    assert seen[0].features.shape[0] == 100
    with pytest.raises(CheckpointError, match=r"needs tokenizer\.json"):
        engine.decode(seen)


def test_what_only_the_public_models_have_is_refused(engine):
    seen = engine.encode(grey(1))
    for asked in ({"prompt": "Free OCR."}, {"stop": "x"}):
        with pytest.raises(InputError, match="is for the public models"):
            engine.decode(seen, **asked)
    assert "".join(engine.stream(seen[0], rows=range(3))) == engine.decode(seen, rows=range(3))[0].text
    assert [done.text for done in engine.ocr(grey(2), rows=[0])] == [
        done.text for done in engine.decode(engine.encode(grey(2)), rows=[0])
    ]


def test_nano_without_its_characters_is_refused(engine):
    bare = Engine(Model(engine.model.config, engine.model.weights()))
    with pytest.raises(CheckpointError, match=r"needs characters\.json"):
        bare.decode(engine.encode(grey(1)))


# --- checkpoints --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("fidelity", [None, {}, {"calibration": {"decoder_temperature": 2, "glance_temperature": 1.5}, "x": 1}])
def test_an_engine_comes_from_a_folder(engine, tmp_path, fidelity):
    files = {} if fidelity is None else {FIDELITY: json.dumps(fidelity).encode()}
    engine.model.save(tmp_path / "nano", files=files)
    loaded = Engine.from_pretrained(tmp_path / "nano", device="cpu")
    assert loaded.temperatures == (Temperatures(2.0, 1.5) if fidelity else None)
    assert loaded.encoder_fingerprint == engine.encoder_fingerprint
    seen = engine.encode(grey(1))
    assert loaded.decode(seen, rows=[0])[0].text == engine.decode(seen, rows=[0])[0].text
    half = Engine.from_pretrained(str(tmp_path / "nano"), dtype="bfloat16", device="cpu")
    assert half.model.decoder.dtype == torch.bfloat16
    assert half.decode(seen, rows=[0])[0].output_tokens > 0  # tokens of another type are taken, where the encoder is the same


def test_fp16_becomes_fp32_on_a_cpu(engine, tmp_path):
    config, weights = engine.model.config, engine.model.weights()
    half = Model(config, {name: value.half() for name, value in weights.items()}, TOKENIZER, engine.model.files)
    half.save(tmp_path / "nano")
    assert Engine.from_pretrained(tmp_path / "nano", device="cpu").model.decoder.dtype == torch.float32


def test_a_calibration_of_other_weights_is_refused(engine, tmp_path):
    model = engine.model
    model.save(tmp_path / "nano")
    noted = {"calibration": {"decoder_temperature": 2, "glance_temperature": 1.5}}
    for weights, is_same in ((model.weights(), True), ({"a": torch.ones(1)}, False)):
        (tmp_path / "nano" / "fidelity.json").write_text(json.dumps(noted | {"model": fingerprint(weights)}))
        if is_same:
            assert Engine.from_pretrained(tmp_path / "nano", device="cpu").temperatures == Temperatures(2, 1.5)
            continue
        with pytest.raises(CheckpointError, match="other weights"):
            Engine.from_pretrained(tmp_path / "nano", device="cpu")


@pytest.mark.parametrize(
    "content",
    ['{"calibration": 1}', '{"calibration": {}}', '{"calibration": {"decoder_temperature": 0, "glance_temperature": 1}}',
     '{"calibration": {"decoder_temperature": true, "glance_temperature": 1}}',
     '{"calibration": {"decoder_temperature": 1, "glance_temperature": 1%s}}' % ("0" * 400), '{"calibration": NaN}', "[]", "\xff"],
)  # fmt: skip
def test_absurd_calibrations_are_refused(engine, tmp_path, content):
    (tmp_path / FIDELITY).write_bytes(content.encode("latin-1"))
    with pytest.raises(CheckpointError):
        read_temperatures(tmp_path, engine.model)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("no-such", "there is no checkpoint 'no-such'"),
        (Path("/no/such"), "no folder 'such'"),
        ("", "there is no checkpoint ''"),  # not the present folder
        ("x" * 5000, "there is no checkpoint 'xxx"),
        ("\0", "there is no checkpoint"),
    ],
)
def test_a_checkpoint_that_is_not_there_is_named(name, message):
    with pytest.raises(SourceNotFoundError, match=message):
        Engine.from_pretrained(name)


def test_the_shipped_checkpoint_is_found_or_said_to_be_missing():
    shipped = Path(optmem.__file__).parent / "checkpoints" / "nano"
    if (shipped / "config.json").exists():
        assert find_checkpoint("nano") == shipped
    else:
        with pytest.raises(SourceNotFoundError, match="comes without the checkpoint 'nano'"):
            find_checkpoint("nano")


@pytest.mark.parametrize("wrong", [{"device": "abacus"}, {"device": "meta"}, {"dtype": "int4"}, {"dtype": torch.int8}])
def test_places_and_types_are_checked(engine, tmp_path, wrong):
    engine.model.save(tmp_path / "nano")
    with pytest.raises(InputError, match="must be auto"):
        Engine.from_pretrained(tmp_path / "nano", **wrong)


def test_a_gpu_that_is_not_here_and_a_name_that_is_none_are_errors_of_ours(engine, tmp_path):
    engine.model.save(tmp_path / "nano")
    with pytest.raises(BackendError, match="there is no device cuda:99"):
        Engine.from_pretrained(tmp_path / "nano", device="cuda:99")
    with pytest.raises(InputError, match="a checkpoint is a folder"):
        Engine.from_pretrained(None)


def test_symbols_are_read_as_everywhere():
    done = complete([row(0, "a\tb\x07\n")], TOKENIZER, vision_tokens=1, side=512)
    assert done.text == read_symbols(done.symbols) == "a\tb\x07\n"
