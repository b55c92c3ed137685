"""Recorded passes of an encoder: views in few sizes, what they leave in their places dropped, and no page another's."""

import logging

import pytest
import torch

from optmem.engine.buckets import view_buckets
from optmem.engine.lanes import PlainLane
from optmem.engine.view_encoder import MOST_SIZES, ViewEncoder
from optmem.errors import InputError
from optmem.model.assembly import PIXELS_AT_ONCE, encode_views
from optmem.model.model import Model
from optmem.pixels import Mode, make_views
from optmem.testing import assert_equal, generator


def picture(number, side, mode=None, channels=()):
    pixels = torch.randint(0, 256, (side, side, *channels), generator=generator(f"picture {number}"), dtype=torch.uint8)
    return make_views(pixels.numpy(), mode or f"square {side}")


class Noting:
    """An encoder whose features are the views' first pixels; it notes the shapes that it is given."""

    def __init__(self):
        self.shapes = []

    def __call__(self, pixels):
        self.shapes.append(tuple(pixels.shape))
        return pixels[:, :1, :1, :1].flatten(1)[..., None].float().expand(-1, 3, 2)


TILED = Mode("tiled", 192, 128, 6, 128)


@pytest.mark.parametrize("count", [1, 2, 3, 5, 7, 8, 11])
def test_views_come_back_in_order_whatever_was_there_before(count):
    noting = Noting()
    recorded = ViewEncoder(noting, PlainLane())
    for number in (9, 0, 40):
        pictures = [picture(number + at, 128) for at in range(count)]
        assert [each.tolist() for each in recorded.encode(pictures)] == [each.tolist() for each in encode_views(Noting(), pictures)]
    assert {shape[0] for shape in noting.shapes} == {size for size, _ in view_buckets(count, PIXELS_AT_ONCE // 128**2)}


def test_one_pass_after_another_of_the_same_size_in_one_call():
    pictures = [picture(at, 2048) for at in range(9)]  # 4 at once
    recorded = ViewEncoder(Noting(), PlainLane())
    for _ in range(3):
        assert [each.tolist() for each in recorded.encode(pictures)] == [each.tolist() for each in encode_views(Noting(), pictures)]


def test_views_of_several_sizes_and_channels():
    pictures = [picture(1, 300, TILED), picture(2, 64), picture(3, 192, channels=(3,)), picture(4, 300, TILED), picture(5, 192)]
    found, wanted = ViewEncoder(Noting(), PlainLane()).encode(pictures), encode_views(Noting(), pictures)
    assert [each.tolist() for each in found] == [each.tolist() for each in wanted]
    assert ViewEncoder(Noting(), PlainLane()).encode([]) == []


def test_features_are_their_callers_own():
    recorded = ViewEncoder(Noting(), PlainLane())
    first = [recorded.encode([picture(1, 64)])[0] for _ in range(3)]
    kept = [each.clone() for each in first]
    recorded.encode([picture(2, 64)])
    for one, other in zip(first, kept, strict=True):
        assert_equal(one, other)


@pytest.mark.parametrize("family", ["nano", "deepseek-ocr"])
def test_a_models_features_are_those_of_the_same_passes(family):
    """Bit for bit those of its encoder over a pass of as many views, whatever the views are that nobody asked for."""
    model = Model.random(family, scale=1 if family == "nano" else 0.1)
    recorded, pictures = ViewEncoder(model.encoder, PlainLane()), [picture(at, 128) for at in range(3)]
    recorded.encode([picture(at, 128) for at in range(10, 14)])
    views = torch.stack([each.global_view for each in pictures])
    padded = torch.cat([views, torch.zeros_like(views[:1])])
    with torch.inference_mode():
        wanted = model.encoder(padded)[:3]
    for _ in range(2):
        for one, other in zip(recorded.encode(pictures), wanted, strict=True):
            assert_equal(one, other)
    for one, other in zip(recorded.encode(pictures), model.encode(pictures), strict=True):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-4)


def test_of_too_many_shapes_the_later_are_encoded_and_not_recorded(caplog):
    noting = Noting()
    recorded = ViewEncoder(noting, PlainLane())
    with caplog.at_level(logging.WARNING):
        for side in range(64, 64 * (MOST_SIZES + 3), 64):
            for _ in range(3):
                pictures = [picture(at, side) for at in range(3)]
                assert [each.shape for each in recorded.encode(pictures)] == [(3, 2)] * 3
    assert len(caplog.records) == 2
    assert {shape[0] for shape in noting.shapes} == {3, 4}
    assert len([place for place in recorded._pixels.values() if place is not None]) == MOST_SIZES


def test_what_the_encoder_refuses_is_refused_every_time():
    def encoder(pixels):
        if pixels.shape[1] == 128:
            raise InputError("no views of this size")
        return Noting()(pixels)

    recorded = ViewEncoder(encoder, PlainLane())
    for _ in range(3):
        with pytest.raises(InputError, match="this size"):
            recorded.encode([picture(1, 128)])
    assert len(recorded.encode([picture(1, 64)])) == 1
