"""Nano: its vocabulary, its checkpoint, rows that are read in parallel, and the glance."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from optmem.engine.rows import PageRows, read_pages
from optmem.errors import CheckpointError, InputError
from optmem.model.cache import Cache
from optmem.model.config import ClipConfig, DecoderConfig, GlanceConfig, StageOneConfig
from optmem.model.config_json import public_config
from optmem.model.glance import centres
from optmem.model.model import Model
from optmem.model.nano import Row, count_rows, embed_prefix, join_rows, until_end
from optmem.pages import paginate, symbols
from optmem.pages.alphabet import SYMBOLS
from optmem.pixels import find_mode
from optmem.testing import assert_equal
from optmem.text.characters import ALPHABET, CHARACTERS, END, EOL, CharacterTokenizer, characters_json
from optmem.text.tokenizer import load_tokenizer
from optmem.train import forward
from optmem.train.alignment import Parts

TOKENIZER = CharacterTokenizer(characters_json())


def tiny_nano(**changes):
    return replace(
        public_config("nano"),
        stage_one=StageOneConfig(
            width=32, layers=2, heads=2, mlp_width=64, global_layers=(), window=8, neck_width=16, channels=(16, 32),
            crops_table=True,
        ),
        clip=ClipConfig(width=32, layers=1, heads=2, mlp_width=64, crops_table=True),
        decoder=DecoderConfig(
            vocab_size=704, hidden=32, layers=4, heads=2, dense_width=32, experts=64, expert_width=8, shared_experts=4, top_k=1
        ),
        glance=GlanceConfig(code=8, width=16),
        **changes,
    )  # fmt: skip


def tiny_model(seed=0):
    return Model(tiny_nano(), Parts(tiny_nano(), seed).weights(), TOKENIZER, {CHARACTERS: characters_json()})


def pages(count, side=128):
    rng = torch.Generator().manual_seed(count)
    return torch.randint(0, 256, (count, side, side, 1), generator=rng, dtype=torch.uint8)


def read_rows(decoder, prefix, rows, tokenizer, **settings):
    """These rows of one page."""
    return read_pages(decoder, [PageRows(prefix, rows, **settings)], tokenizer)[0]


# --- the vocabulary -----------------------------------------------------------------------------------------------------------


@given(st.text())
def test_every_text_comes_back_from_its_ids(text):
    ids = TOKENIZER.encode(text)
    assert TOKENIZER.special_ids.isdisjoint(ids)
    expected = text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")
    assert TOKENIZER.text(ids) == expected


@pytest.mark.parametrize("text", ["<row_3>", "<end>", symbols.TEXT_END, symbols.inverse("[user Ada]"), "<image>"])
def test_no_text_becomes_a_special_token_or_a_mark(text):
    ids = TOKENIZER.encode(text)
    assert TOKENIZER.special_ids.isdisjoint(ids)
    assert TOKENIZER.text(ids) == text
    assert symbols.TEXT_END not in TOKENIZER.symbols(ids)
    assert symbols.inverse("[") not in TOKENIZER.symbols(ids)


def test_ids_and_the_symbols_of_a_page_are_the_same():
    page = paginate("One\tline\nand – another: é\x07", size=256)[0]
    ids = TOKENIZER.ids_of(page.characters().symbols)
    assert TOKENIZER.text(ids.tolist()) == page.text()
    assert (TOKENIZER.ids_of(np.array([0x6F22, 0x10FFFF], dtype=np.uint32)) == -1).all()


def test_the_alphabet_has_all_that_our_pages_draw():
    assert set(SYMBOLS) - {"\0"} <= set(ALPHABET)
    assert TOKENIZER.vocab_size <= public_config("nano").decoder.vocab_size


def test_rows_have_names_and_bytes():
    assert TOKENIZER.token_bytes(TOKENIZER.rows[17]) == b"<row_17>"
    assert len(TOKENIZER.rows) == 128
    assert b"".join(map(TOKENIZER.token_bytes, TOKENIZER.encode("a\tb\né"))).decode() == "a\tb\né"
    with pytest.raises(CheckpointError):
        TOKENIZER.special("<row_128>")


@pytest.mark.parametrize(
    "content", [b"{}", characters_json("abc"), characters_json(ALPHABET + "a"), characters_json(rows=129), characters_json(rows=0)]
)
def test_bad_files_are_refused(content):
    with pytest.raises(CheckpointError):
        CharacterTokenizer(content)


# --- the checkpoint -----------------------------------------------------------------------------------------------------------


def test_nano_is_of_the_size_that_is_shipped():
    model = public_config("nano")
    count = sum(value.numel() for value in Parts(model).weights().values())
    assert 10e6 < count < 20e6


def test_a_saved_nano_comes_back_with_its_tokenizer(tmp_path):
    model = tiny_model()
    model.save(tmp_path / "nano")
    loaded = Model.load(tmp_path / "nano")
    assert loaded.config == model.config
    for name, weight in model.weights().items():
        assert_equal(loaded.weights()[name], weight)
    assert load_tokenizer(tmp_path / "nano").vocab_size == TOKENIZER.vocab_size
    assert loaded.tokenizer is not None


def test_a_place_has_one_position_on_pages_of_all_sizes():
    stage = tiny_model().encoder.sam_model
    assert_equal(stage._positions.at(stage.pos_embed[0], 8), stage._positions.at(stage.pos_embed[0], 16)[:8, :8])
    assert stage._positions.at(stage.pos_embed[0], 72).shape[:2] == (72, 72)


# --- training's forward against inference's -----------------------------------------------------------------------------------


@pytest.mark.parametrize("side", [64, 128, 192])
def test_training_sees_what_inference_sees(side):
    encoder = tiny_model().encoder
    torch.testing.assert_close(forward.encode(encoder, pages(2, side)).tokens, encoder(pages(2, side)), atol=1e-5, rtol=1e-4)


def test_training_reads_what_inference_reads():
    model = tiny_model()
    features = model.encoder(pages(2))
    mode = find_mode("square 128")
    prefix = forward.prefixes(model.encoder, model.decoder, features, TOKENIZER.special("<bos>"))
    for page in range(2):
        assert_equal(prefix[page], embed_prefix(model.encoder, model.decoder, features[page], mode, TOKENIZER))
    first, ids = prefix.shape[1], torch.randint(0, 644, (2, 3, 7), generator=torch.Generator().manual_seed(0))
    reading = forward.read(model.decoder, prefix, ids, torch.arange(first, first + 7).expand(2, 3, 7))
    for page, stretch in ((0, 0), (1, 2)):
        cache = Cache.for_tokens(model.decoder.config, first + 7, torch.float32)
        whole = torch.cat([prefix[page], model.decoder.embed(ids[page, stretch])])
        hidden = model.decoder(whole, cache.batch([cache.new_sequence(first)], [first + 7]), cache)
        ours = forward.logits(model.decoder, reading.hidden[-1][page, stretch])
        torch.testing.assert_close(ours, model.decoder.logits(hidden[first:]), atol=1e-5, rtol=1e-4)


# --- rows and glance ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def read():
    """A model that says something, and a page's prefix; on one thread, since a busy machine makes two slow for so little."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    model = tiny_model(seed=3)
    with torch.no_grad():
        model.decoder.lm_head.weight.mul_(20)
        model.decoder.model.embed_tokens.weight.mul_(20)
    prefix = embed_prefix(model.encoder, model.decoder, model.encoder(pages(1))[0], find_mode("square 128"), TOKENIZER)
    yield model.decoder, prefix
    torch.set_num_threads(threads)


def test_rows_read_in_parallel_are_the_rows_read_alone(read):
    together = read_rows(*read, range(5), TOKENIZER, max_symbols=12)
    assert len({tuple(row.ids) for row in together}) > 1
    assert together == [read_rows(*read, [row], TOKENIZER, max_symbols=12)[0] for row in range(5)]


def test_a_row_ends_where_the_decoder_says_so(read):
    decoder, prefix = read
    first = read_rows(decoder, prefix, [2], TOKENIZER, max_symbols=6)[0]
    assert (len(first.ids), first.ended_by) == (7, "length")
    assert len(first.logprobs) == 7
    stopper = CharacterTokenizer(characters_json())
    stopper._specials = {**stopper._specials, EOL: first.ids[3]}
    again = read_rows(decoder, prefix, [2], stopper, max_symbols=6)[0]
    assert (again.ids, again.ended_by) == (first.ids[: first.ids.index(first.ids[3])], "eol")


def test_rows_without_a_name_are_refused(read):
    with pytest.raises(InputError, match="rows are 0 to 127"):
        read_rows(*read, [128], TOKENIZER)
    assert read_rows(*read, [], TOKENIZER) == []


def test_rows_join_to_their_text():
    said = TOKENIZER.encode("ab\n")
    assert join_rows([Row(0, said, ended_by="eol"), Row(1, said, ended_by="eol"), Row(2, ended_by="end")], TOKENIZER) == "ab\nab\n"


@pytest.mark.parametrize(
    ("rows", "count"),
    [("", 0), (".", 1), ("v", 0), ("...vvv", 3), ("..v....vv", 7), ("..vvvv.v", 2), ("v..", 3), ("vvv.", 0), (".v", 1), ("v.", 0)],
)
def test_one_misread_row_takes_no_others_with_it(rows, count):
    """. says something, v says that it is below the text."""
    assert count_rows([row == "v" for row in rows]) == count


@given(st.lists(st.booleans(), max_size=40))
def test_the_end_of_a_text_is_where_the_fewest_rows_contradict(below):
    wrong = [sum(below[:at]) + sum(not row for row in below[at:]) for at in range(len(below) + 1)]
    assert wrong[count_rows(below)] == min(wrong)


def test_a_glance_reads_all_cells_or_some_rows():
    model = tiny_model()
    assert model.glance is not None
    tokens = model.encoder(pages(1))[0]
    whole, part = model.glance.read(tokens), model.glance.read(tokens, range(2, 4))
    assert whole.ids.shape == (128 // whole.cell[0], 128 // whole.cell[1])
    assert ((whole.probabilities > 0) & (whole.probabilities <= 1)).all()
    assert_equal(part.ids, whole.ids[2:4])
    with pytest.raises(InputError, match="one square view"):
        model.glance.read(tokens[:3])


def test_centres_are_the_middles_of_cells():
    pixels, shape = centres(64, (16, 8))
    assert shape == (4, 8)
    assert pixels[9].tolist() == [24, 12]


def test_end_is_end_of_text_for_the_engine():
    assert public_config("nano").eos_id == TOKENIZER.special(END)


@pytest.mark.parametrize(
    ("below", "count"),
    [
        ([], 2),
        (["   "], 2),
        (["   ", "  "], 2),
        (["   ", " F ", "_"], 2),  # stray signs
        (["   ", "one misread row", " "], 2),
        (["more of", "the text"], 4),  # then it is the mark that was misread
        ([symbols.LINE_END, symbols.LINE_END], 4),  # and empty lines are text
    ],
)
def test_what_is_said_below_the_end_is_no_row(below, count):
    said = ["a" + symbols.LINE_END, "b" + symbols.TEXT_END, *below]
    ids = [TOKENIZER.ids_of(np.frombuffer(row.encode("utf-32-le"), dtype="<u4")).tolist() for row in said]
    rows = [Row(at, row, ended_by="eol") for at, row in enumerate(ids)]
    assert until_end(rows, TOKENIZER) == rows[:count]
