"""Sifting many pages says what a search of each says; vision tokens as bytes are those of the file."""

import random

import pytest
import torch

from optmem import Engine, VisionTokens, paginate
from optmem.errors import CheckpointError, InputError

NEEDLES = ("Zanzibar", "9f3a77b1", "/srv/app.cfg")


@pytest.fixture(scope="module")
def engine():
    with Engine.from_pretrained("nano", device="cpu") as found:
        yield found


@pytest.fixture(scope="module", params=["8x16", "8x8", "6x12"])
def pages(request, engine):
    words = ["".join(random.Random(seed).choices("abcdefghijklmnopqrstuvwxyz", k=3 + seed % 7)) for seed in range(60)]
    texts = ["\n".join(" ".join(random.Random(f"{page}{row}").choices(words, k=6)) for row in range(20)) for page in range(5)]
    texts[2] += f"\nthe key of {NEEDLES[0]} is {NEEDLES[1]}\nin {NEEDLES[2].upper()}"
    return request.param, words, engine.encode([paginate(text, cell=request.param)[0] for text in texts])


def test_sifting_finds_what_a_search_finds(engine, pages):
    cell, words, tokens = pages
    asked = [*NEEDLES, words[0], words[7], "notthere"]
    found = engine.sieve(asked).find(torch.stack([page.features for page in tokens]), 0.5)
    if cell == "6x12":  # its cells do not divide a token's square: such pages are not sifted
        assert found == []
        return
    for number, word in enumerate(asked):
        searched = engine.search(tokens, word, ignore_case=True)
        sure = {(each.page, each.row) for each in searched if each.confidence > 0.55}
        all_of = {(each.page, each.row) for each in searched} | {
            (each.page, each.row) for each in engine.search(tokens, word, ignore_case=True, least=0.4)
        }
        sifted = {(each.page, each.row) for each in found if each.word == number}
        assert sifted <= all_of
        if len(sure) <= 4 * len(tokens):
            counts = {page: sum(1 for other, _ in sure if other == page) for page, _ in sure}
            assert all((page, row) in sifted for page, row in sure if counts[page] <= 2)
    assert {each.word for each in found} >= {0, 1, 2}
    assert 5 not in {each.word for each in found}


def test_what_cannot_be_sifted_for_is_refused(engine):
    for wrong in ("", "  ", "two\nlines"):
        with pytest.raises(InputError):
            engine.sieve([wrong])


@pytest.mark.parametrize("int8", [False, True])
def test_tokens_as_bytes_are_those_of_the_file(engine, tmp_path, int8):
    (tokens,) = engine.encode(paginate("hello"))
    content = tokens.to_bytes(int8=int8)
    tokens.save(tmp_path / "page.safetensors", int8=int8)
    assert (tmp_path / "page.safetensors").read_bytes() == content
    back, loaded = VisionTokens.from_bytes(content), VisionTokens.load(tmp_path / "page.safetensors")
    assert torch.equal(back.features, loaded.features)
    assert (back.mode, back.grid, back.encoder) == (tokens.mode, tokens.grid, tokens.encoder)
    for wrong in (b"", content[:-1], content + b"x", b"\x80\x04" + content):
        with pytest.raises(CheckpointError):
            VisionTokens.from_bytes(wrong)
