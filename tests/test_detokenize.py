"""Detokenising: deltas never end inside a character, and joined they are the whole."""

import tokenizers
from hypothesis import given
from hypothesis import strategies as st

from optmem.testing.checkpoints import SPECIAL_PIECES, tokenizer_json
from optmem.text.detokenize import Detokenizer, decode
from optmem.text.tokenizer import BytePairTokenizer

CONTENT = tokenizer_json()
TOKENIZER = BytePairTokenizer(CONTENT)
LIBRARY = tokenizers.Tokenizer.from_str(CONTENT.decode())
IDS = st.lists(st.integers(0, TOKENIZER.vocab_size + 3), max_size=60)


def stream(ids):
    detokenizer = Detokenizer(TOKENIZER)
    return [*(detokenizer.add(token) for token in ids), detokenizer.finish()]


@given(IDS)
def test_deltas_joined_are_the_whole(ids):
    assert "".join(stream(ids)) == decode(TOKENIZER, ids)


@given(st.lists(st.one_of(st.text(max_size=6), st.sampled_from(SPECIAL_PIECES)), max_size=10))
def test_no_delta_splits_a_character(pieces):
    ids = []
    for piece in pieces:
        ids += [TOKENIZER.special(piece)] if piece in SPECIAL_PIECES else TOKENIZER.encode(piece)
    text = "".join(pieces)
    deltas = stream(ids)
    assert "".join(deltas) == text
    assert "\ufffd" in text or not any("\ufffd" in delta for delta in deltas)


@given(IDS)
def test_any_ids_read_as_the_library_reads_them(ids):
    assert decode(TOKENIZER, ids) == LIBRARY.decode(ids, skip_special_tokens=False)


def test_bytes_that_never_become_a_character_are_shown():
    [first, *_] = TOKENIZER.encode("\U0001f9ff")  # no pair of this one was trained: its ids are bytes
    assert stream([first]) == ["", "\ufffd"]
    assert stream([first, *TOKENIZER.encode("a")])[1] == "\ufffda"
