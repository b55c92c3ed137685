"""Labelled pages in archives: the same bytes, resumed where they stopped, read back as they were drawn."""

import json
import tarfile
from itertools import islice

import click
import pytest
from click.testing import CliRunner

from optmem.errors import InputError, SourceNotFoundError
from optmem.train import shards
from optmem.train.corpus import make_corpus
from optmem.train.degrade import EVERYTHING
from optmem.train.shards import read_shard, write_shards
from optmem.train.sources import Document
from optmem.train.synth import Form, SynthConfig, synth
from optmem.train.synth_command import register

CONFIG = SynthConfig((Form(256, "8x16", 192),), harms=EVERYTHING, batch=3)


@pytest.fixture(scope="module")
def corpus():
    return make_corpus([Document("d", "prose", "".join(f"The number {k} follows {k - 1}, and é.\n" for k in range(400)))])


def files(folder):
    return {file.name: file.read_bytes() for file in folder.iterdir()}


def test_archives_are_read_back(corpus, tmp_path):
    assert list(write_shards(tmp_path, CONFIG, corpus, 1, 7, each=5)) == [5, 7]
    stored = [page for file in sorted(tmp_path.glob("*.tar")) for page in read_shard(file)]
    assert [page.key for page in stored] == [f"{k:06}" for k in range(7)]
    for page, drawn in zip(stored, islice(synth(CONFIG, corpus, 1), 7), strict=True):
        assert (page.image == drawn.image).all()
        assert page.text == drawn.text
        assert page.label["kind"] == drawn.kind
        assert "".join(line["symbols"] for line in page.label["lines"]) == drawn.symbols
        assert [tuple(line["box"]) for line in page.label["lines"]] == [tuple(box) for _, box in drawn.lines()]


def test_archives_are_in_the_layout_of_webdataset(corpus, tmp_path):
    list(write_shards(tmp_path, CONFIG, corpus, 1, 2))
    with tarfile.open(tmp_path / "pages-000000.tar") as archive:
        members = archive.getmembers()
    assert [member.name for member in members] == [f"00000{k}.{suffix}" for k in range(2) for suffix in ("png", "txt", "json")]
    assert {(member.mtime, member.uid, member.mode) for member in members} == {(0, 0, 0o644)}


def test_the_same_arguments_give_the_same_bytes(corpus, tmp_path):
    for name in ("a", "b"):
        list(write_shards(tmp_path / name, CONFIG, corpus, 1, 7, each=4))
    assert files(tmp_path / "a") == files(tmp_path / "b")


def test_a_run_goes_on_where_it_stopped(corpus, tmp_path, monkeypatch):
    list(write_shards(tmp_path / "whole", CONFIG, corpus, 1, 9, each=4))
    next(write_shards(tmp_path / "cut", CONFIG, corpus, 1, 9, each=4))
    (tmp_path / "cut" / "pages-000001.part").write_bytes(b"killed while writing")
    written = []
    write_shard = shards.write_shard
    monkeypatch.setattr(shards, "write_shard", lambda file, *rest: (written.append(file.name), write_shard(file, *rest)))
    list(write_shards(tmp_path / "cut", CONFIG, corpus, 1, 9, each=4))
    assert written == ["pages-000001.tar", "pages-000002.tar"]
    assert files(tmp_path / "cut") == files(tmp_path / "whole")


def test_a_run_can_be_made_longer(corpus, tmp_path):
    list(write_shards(tmp_path / "whole", CONFIG, corpus, 1, 9, each=4))
    list(write_shards(tmp_path / "grown", CONFIG, corpus, 1, 6, each=4))
    list(write_shards(tmp_path / "grown", CONFIG, corpus, 1, 9, each=4))
    assert files(tmp_path / "grown") == files(tmp_path / "whole")


def test_other_arguments_take_another_folder(corpus, tmp_path):
    list(write_shards(tmp_path, CONFIG, corpus, 1, 4))
    for config, seed, pages in ((CONFIG, 2, 4), (SynthConfig(), 1, 4), (CONFIG, 1, 3)):
        with pytest.raises(InputError, match="take another folder"):
            next(write_shards(tmp_path, config, corpus, seed, pages))
    with pytest.raises(SourceNotFoundError):
        next(read_shard(tmp_path / "none.tar"))


def test_the_command_draws(corpus, tmp_path):
    folder = tmp_path / "corpus"
    for side in ("train", "held-out"):
        (folder / side).mkdir(parents=True)
        for name in ("prose", "code"):
            (folder / side / f"{name}.txt").write_bytes(getattr(corpus, name))
        (folder / side / "words.txt").write_text("one\ntwo", encoding="utf-8")
    (folder / "corpus.json").write_text("{}")
    cli = click.Group()
    register(cli)
    asked = ["synth", "-o", str(tmp_path / "out"), "--pages", "3", "--seed", "4", "--kinds", "code, json", "--size", "256"]
    result = CliRunner().invoke(cli, [*asked, "--corpus", str(folder), "--json"], catch_exceptions=False)
    assert json.loads(result.stdout)["pages"] == 3
    assert {page.label["kind"] for page in read_shard(tmp_path / "out" / "pages-000000.tar")} <= {"code", "json"}
    one = ["synth", "-o", str(tmp_path / "one"), "--pages", "1", "--size", "256", "--corpus", str(folder)]
    assert CliRunner().invoke(cli, one, catch_exceptions=False).stdout == f"1 page in {tmp_path / 'one'}\n"
    with pytest.raises(InputError, match="kind must be one of"):
        CliRunner().invoke(cli, [*asked[:-4], "--kinds", "poems", "--corpus", str(folder)], catch_exceptions=False)
