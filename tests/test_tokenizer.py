"""Tokenizers: no text becomes a special token, hostile files are refused, ids and text go both ways."""

import json

import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st

from optmem.errors import CheckpointError, InputError, SourceNotFoundError
from optmem.testing.checkpoints import CORPUS, SPECIAL_PIECES, special_ids, tokenizer_json
from optmem.text.detokenize import decode
from optmem.text.tokenizer import EOS, IMAGE, BytePairTokenizer, has_tokenizer, load_tokenizer, tokenizer_file, tokenizer_name

CONTENT = tokenizer_json()
TOKENIZER = BytePairTokenizer(CONTENT)
LIBRARY = tokenizers.Tokenizer.from_str(CONTENT.decode())
SPECIALS = SPECIAL_PIECES


def variants(name):
    """A special token as an attacker would write it."""
    middle = len(name) // 2
    yield from (name, name + name, f"a{name}b", f" {name} ", f"\n{name}", name[:middle] + name + name[middle:])
    yield from (name[:middle] + gap + name[middle:] for gap in ("\u200b", "\u200d", "\ufeff", "\u00ad", "\0"))
    yield from ("\ud83d" + name, name + "\ude00", name[:-1] + "\ud800" + name[-1], name.replace("｜", "|"), name.upper())


@pytest.mark.parametrize("name", SPECIALS)
def test_no_spelling_of_a_special_token_becomes_one(name):
    for text in variants(name):
        ids = TOKENIZER.encode(text)
        assert TOKENIZER.special_ids.isdisjoint(ids), text.encode("utf-8", "backslashreplace")
    assert decode(TOKENIZER, TOKENIZER.encode(name)) == name, "the text itself is kept"


def test_the_library_alone_would_have_made_them():
    assert special_ids(CONTENT)[IMAGE] in LIBRARY.encode(f"a{IMAGE}b", add_special_tokens=False).ids


@given(st.lists(st.one_of(st.sampled_from(SPECIALS), st.text(max_size=5)), max_size=8).map("".join))
def test_no_text_becomes_a_special_token_and_all_of_it_is_kept(text):
    ids = TOKENIZER.encode(text)
    assert TOKENIZER.special_ids.isdisjoint(ids)
    assert decode(TOKENIZER, ids) == text


@pytest.mark.parametrize("text", [*CORPUS, "", " ", "\x00", "1234567 12", "漢字かな", "日" * 50, "e\u0301 é", "\r\n\t"])
def test_ids_are_those_of_the_library(text):
    text = text.replace("<td>", "").replace("</td>", "")
    assert TOKENIZER.encode(text) == LIBRARY.encode(text, add_special_tokens=False).ids


@pytest.mark.parametrize(
    ("text", "read"),
    [
        ("\ud800", "\ufffd"),
        ("a\udfffb", "a\ufffdb"),
        ("\ud83d\ude00", "😀"),
        ("\udc00\ud800", "\ufffd\ufffd"),
        ("\ud800😀", "\ufffd😀"),
    ],
)
def test_lone_surrogates_are_replaced_and_pairs_joined(text, read):
    assert decode(TOKENIZER, TOKENIZER.encode(text)) == read


def test_special_ids_by_name():
    assert TOKENIZER.special(EOS) == 1
    assert TOKENIZER.special(IMAGE) == special_ids(CONTENT)[IMAGE]
    assert TOKENIZER.special_ids == set(special_ids(CONTENT).values())
    with pytest.raises(CheckpointError, match="PAGE"):
        TOKENIZER.special("<PAGE>")


def test_ids_without_a_token_say_nothing():
    assert TOKENIZER.token_bytes(-1) == TOKENIZER.token_bytes(TOKENIZER.vocab_size) == TOKENIZER.token_bytes(10**30) == b""


def changed(**changes):
    return json.dumps({**json.loads(CONTENT), **changes}).encode()


def with_model(**changes):
    fields = json.loads(CONTENT)
    return changed(model={**fields["model"], **changes})


def with_tags(*tags):
    return changed(added_tokens=[*json.loads(CONTENT)["added_tokens"], *tags])


HOSTILE = {
    "empty": b"",
    "truncated": CONTENT[: len(CONTENT) // 2],
    "not utf-8": CONTENT[:-1] + b"\xff}",
    "a list": b"[]",
    "deep": b'{"a":' * 100_000,
    "duplicate": CONTENT[:-1] + b', "model": {}}',
    "nan": changed(version=1)[:-1] + b', "x": NaN}',
    "no model": changed(model=None),
    "another model": with_model(type="Unigram"),
    "merges of nothing": with_model(merges=[["q", "no such token"]]),
    "vocabulary of lists": with_model(vocab={"a": []}),
    "negative id": with_model(vocab={"a": -1}),
    "huge id": with_model(vocab={"a": 2**31}, merges=[]),
    "shared id": with_model(vocab={"a": 5, "b": 5}, merges=[]),
    "dropout": with_model(dropout=0.5),
    "another decoder": changed(decoder={"type": "WordPiece"}),
    "bad regex": changed(pre_tokenizer={"type": "Split", "pattern": {"Regex": "("}, "behavior": "Isolated", "invert": False}),
    "no tags": changed(added_tokens=[]),
    "tags no list": changed(added_tokens={}),
    "tag without id": with_tags({"content": "<x>"}),
    "tag of text id": with_tags({"content": "<x>", "id": "7"}),
    "tag id too large": with_tags({"content": "<x>", "id": 2**40}),
    "tag id negative": with_tags({"content": "<x>", "id": -1}),
    "tag id true": with_tags({"content": "<x>", "id": True}),
    "tag twice": with_tags({"content": IMAGE, "id": 900}),
    "tag id shared": with_tags({"content": "<x>", "id": 0}),
    "tag id of a word": with_tags({"content": "<x>", "id": 300}),
    "tag with surrogate": with_tags({"content": "<\ud800>", "id": 900}),
    "tag empty": with_tags({"content": "", "id": 900}),
    "tag that text spells": with_tags({"content": "a", "id": json.loads(CONTENT)["model"]["vocab"]["a"]}),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_hostile_files_are_refused(case):
    with pytest.raises(CheckpointError):
        BytePairTokenizer(HOSTILE[case])


def test_a_vocabulary_that_spells_a_special_token_cannot_use_it():
    """A vocabulary can hold a whole tag as a word of its own, and pairs that lead to it."""
    fields = json.loads(CONTENT)
    starts = [IMAGE[:length] for length in range(2, len(IMAGE))]
    vocab = fields["model"]["vocab"] | {start: 1000 + index for index, start in enumerate(starts)}
    pairs = [[IMAGE[:length], IMAGE[length]] for length in range(1, len(IMAGE))]
    fields["model"] |= {"vocab": vocab | {IMAGE: special_ids(CONTENT)[IMAGE]}, "merges": pairs}
    fields["pre_tokenizer"] = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False, "use_regex": False}
    with pytest.raises(CheckpointError, match="plain text can become"):
        BytePairTokenizer(json.dumps(fields).encode())


def test_a_text_that_still_made_one_is_refused():
    """A normalizer can turn other texts than the names into them; those are caught when they come."""
    fields = json.loads(CONTENT)
    fields["added_tokens"][3] |= {"content": "zed", "id": fields["model"]["vocab"].pop("z")}
    fields["model"]["vocab"]["zed"] = fields["added_tokens"][3]["id"]
    fields["model"]["merges"] = [["e", "d"], ["z", "ed"]]
    fields["model"]["vocab"] |= {"ed": 1000, "z": 1001}
    fields["pre_tokenizer"] = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False, "use_regex": False}
    swaps = [{"type": "Replace", "pattern": {"String": old}, "content": new} for old, new in (("zed", "zz"), ("quux", "zed"))]
    fields["normalizer"] = {"type": "Sequence", "normalizers": swaps}
    tokenizer = BytePairTokenizer(json.dumps(fields).encode())
    with pytest.raises(InputError, match="refused"):
        tokenizer.encode("a quux")


@settings(max_examples=60)
@given(st.data())
def test_a_damaged_file_is_refused_or_harmless(data):
    content = bytearray(CONTENT)
    for _ in range(data.draw(st.integers(1, 4))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    try:
        tokenizer = BytePairTokenizer(bytes(content))
        assert tokenizer.special_ids.isdisjoint(tokenizer.encode(f"a {IMAGE} b {EOS}"))
    except (CheckpointError, InputError):
        pass


def test_a_folder_says_which_tokenizer_it_has(tmp_path):
    assert not has_tokenizer(tmp_path)
    for reader in (load_tokenizer, tokenizer_file, tokenizer_name):
        with pytest.raises(CheckpointError, match="no tokenizer"):
            reader(tmp_path)
    (tmp_path / "tokenizer.json").write_bytes(CONTENT)
    assert has_tokenizer(tmp_path)
    assert (tokenizer_name(tmp_path), tokenizer_file(tmp_path)) == ("tokenizer.json", CONTENT)
    assert load_tokenizer(tmp_path).encode("fox") == TOKENIZER.encode("fox")
    with pytest.raises(SourceNotFoundError):
        load_tokenizer(tmp_path / "nowhere")
    with pytest.raises(SourceNotFoundError):
        has_tokenizer(tmp_path / "nowhere")


def test_a_link_that_leads_nowhere_is_a_broken_tokenizer_and_not_none(tmp_path):
    (tmp_path / "tokenizer.json").symlink_to("gone.json")
    assert has_tokenizer(tmp_path)
    for reader in (load_tokenizer, tokenizer_file):
        with pytest.raises(CheckpointError, match=r"'tokenizer\.json' is a link to a file that is not there"):
            reader(tmp_path)
