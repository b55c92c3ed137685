"""Pictures are made ready in threads; what belongs to the caller is touched in the caller's."""

import io
import threading

import numpy as np
import pytest
import torch
from PIL import Image

from optmem.engine.ahead import Ahead
from optmem.engine.engine import Engine
from optmem.errors import ImageError
from optmem.images import as_image, take_image


def png(number):
    pixels = np.random.default_rng(number).integers(0, 256, (64, 64), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


class Watched:
    """A user's picture, which remembers who asked for it."""

    def __init__(self, content):
        self.content, self.threads = content, []

    def image(self):
        self.threads.append(threading.get_ident())
        return self.content


def test_results_come_in_order_and_errors_as_they_were_raised():
    ahead = Ahead()
    waits = [ahead.start(lambda number=number: 60 // number) for number in (1, 2, 0, 3)]
    assert [waits[k]() for k in (3, 1, 0)] == [20, 30, 60]
    with pytest.raises(ZeroDivisionError):
        waits[2]()
    ahead.close()


def test_what_cannot_begin_any_more_is_done_when_it_is_asked_for():
    ahead = Ahead()
    ahead.close()
    done = []
    wait = ahead.start(lambda: done.append(threading.get_ident()))
    assert done == []
    wait()
    assert done == [threading.get_ident()]


def test_taking_a_picture_reads_it_and_decoding_is_left():
    file = io.BytesIO(png(1))
    decode = take_image(file)
    assert file.read() == b""
    assert (decode() == as_image(png(1))).all()
    with pytest.raises(ImageError, match="damaged"):
        take_image(png(1)[:-30])()
    assert (take_image(Image.open(io.BytesIO(png(1)))) == as_image(png(1))).all()


@pytest.mark.parametrize("way", ["ocr", "encode"])
def test_a_users_objects_are_asked_in_the_users_thread_and_bytes_are_decoded_in_others(way, monkeypatch):
    engine = Engine.from_pretrained("nano", device="cpu")
    decoders, real = set(), Engine._show

    def show(self, pixels, mode, name):
        decoders.add(threading.get_ident())
        return real(self, pixels, mode, name)

    monkeypatch.setattr(Engine, "_show", show)
    pictures = [Watched(png(number)) for number in range(5)]
    pulled = []

    def given():
        for picture in pictures:
            pulled.append(threading.get_ident())
            yield picture

    found = list(engine.ocr(given())) if way == "ocr" else engine.encode(given())
    here = threading.get_ident()
    assert len(found) == 5
    assert {thread for picture in pictures for thread in picture.threads} == set(pulled) == {here}
    assert decoders
    assert here not in decoders
    if way == "encode":
        alone = [engine.encode(png(number))[0].features for number in range(5)]
        for tokens, expected in zip(found, alone, strict=True):
            torch.testing.assert_close(tokens.features, expected)
    engine.close()
