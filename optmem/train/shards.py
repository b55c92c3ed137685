"""Labelled pages on disk: tar archives in the layout of WebDataset, the same bytes for the same arguments.

synth.json              what was asked for; a folder is only ever continued with the same
pages-000000.tar        1,024 pages: 000000.png, 000000.txt, 000000.json, 000001.png, ...
"""

from __future__ import annotations

import io
import json
import tarfile
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from optmem.errors import InputError, OutputError, SourceNotFoundError
from optmem.pages import read_symbols
from optmem.train.corpus import Corpus
from optmem.train.synth import LabelledPage, SynthConfig, draw_batch

PAGES_EACH = 1024
NOTE = "synth.json"


@dataclass(frozen=True)
class Stored:
    """A page as a shard holds it."""

    key: str
    image: NDArray[np.uint8]
    text: str
    label: dict[str, Any]  # kind, size, cell, view, affine, and lines with symbols, text and box


def describe(page: LabelledPage) -> dict[str, Any]:
    """The label of a page as JSON.  The symbols of a line are what a reader says; its text is what they mean."""
    lines = [{"symbols": said, "text": read_symbols(said), "box": box} for said, box in page.lines()]
    look = {"size": page.form.size, "cell": page.form.cell, "view": page.form.side}
    return {"kind": page.kind, **look, "affine": page.affine.tolist(), "lines": lines}


def _encode(page: LabelledPage) -> Iterator[tuple[str, bytes]]:
    """The files of a page by their suffixes."""
    picture, image = io.BytesIO(), Image.fromarray(page.image)
    if not ((page.image + 1) & 0xFE).any():  # black and white: one bit a pixel, half the bytes and half the time
        image = image.convert("1", dither=Image.Dither.NONE)
    image.save(picture, "PNG", compress_level=1)
    yield "png", picture.getvalue()
    yield "txt", page.text.encode("utf-8", "replace")
    yield "json", json.dumps(describe(page)).encode()


def _member(name: str, size: int) -> tarfile.TarInfo:
    member = tarfile.TarInfo(name)  # its time is 0 and its owner root: nothing of this machine
    member.size, member.mode = size, 0o644
    return member


def write_shard(file: Path, pages: Iterable[LabelledPage], first: int) -> None:
    """Writes an archive under its name only when it is whole."""
    unfinished = file.with_suffix(".part")
    with tarfile.open(unfinished, "w", format=tarfile.USTAR_FORMAT) as archive:
        for number, page in enumerate(pages, first):
            for suffix, content in _encode(page):
                archive.addfile(_member(f"{number:06}.{suffix}", len(content)), io.BytesIO(content))
    unfinished.replace(file)


def read_shard(file: Path) -> Iterator[Stored]:
    """The pages of an archive, one after the other."""
    if not file.is_file():
        raise SourceNotFoundError(f"{file} is not there")
    files: dict[str, bytes] = {}
    with tarfile.open(file, "r|") as archive:
        for member in archive:
            key, _, suffix = member.name.partition(".")
            content = archive.extractfile(member)
            files[suffix] = content.read() if content is not None else b""
            if files.keys() >= {"png", "txt", "json"}:
                image = np.asarray(Image.open(io.BytesIO(files["png"])).convert("L"))
                yield Stored(key, image, files["txt"].decode(), json.loads(files["json"]))
                files = {}


def pages_between(config: SynthConfig, corpus: Corpus, seed: int, first: int, last: int) -> Iterator[LabelledPage]:
    """Pages first to last (outside) of a seed's stream."""
    for number in range(first // config.batch, -(-last // config.batch)):
        for place, page in enumerate(draw_batch(config, corpus, seed, number).pages(), number * config.batch):
            if first <= place < last:
                yield page


def write_shards(
    folder: Path, config: SynthConfig, corpus: Corpus, seed: int, pages: int, *, each: int = PAGES_EACH
) -> Iterator[int]:
    """Writes the archives that a folder still lacks; yields the number of pages that are there, after every archive.

    Raises InputError where the folder was begun with other arguments.
    """
    note = {"pages": pages, "each": each, "seed": seed, "corpus": corpus.fingerprint, "config": _plain(config)}
    before = _begin(folder, note)
    try:
        for shard, first in enumerate(range(0, pages, each)):
            last, file = min(first + each, pages), folder / f"pages-{shard:06}.tar"
            if not file.exists() or min(first + each, before) != last:
                write_shard(file, pages_between(config, corpus, seed, first, last), first)
            yield last
        (folder / NOTE).write_text(json.dumps(note, indent=2) + "\n")
    except OSError as error:
        raise OutputError(f"cannot write to {folder}: {error.strerror}") from None


def _plain(config: SynthConfig) -> dict[str, Any]:
    harms = [{"harm": type(harm).__name__, **asdict(harm)} for harm in config.harms]  # type: ignore[call-overload]
    return {"forms": [asdict(form) for form in config.forms], "mix": asdict(config.mix), "harms": harms}


def _begin(folder: Path, note: dict[str, Any]) -> int:
    """How many pages the folder was begun for; notes it where it is new."""
    file = folder / NOTE
    try:
        if not file.exists():
            folder.mkdir(parents=True, exist_ok=True)
            file.write_text(json.dumps(note, indent=2) + "\n")
        found = json.loads(file.read_text())
    except OSError as error:
        raise OutputError(f"cannot write to {folder}: {error.strerror}") from None
    except ValueError:
        raise InputError(f"{file} is not JSON: take another folder") from None
    other = [name for name in ("seed", "corpus", "config", "each") if found.get(name) != json.loads(json.dumps(note[name]))]
    if other or note["pages"] < found.get("pages", 0):
        raise InputError(
            f"{folder} was begun with another {other[0] if other else 'and larger number of pages'}: take another folder"
        )
    return int(found["pages"])
