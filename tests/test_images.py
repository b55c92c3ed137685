"""images: every kind of picture, hostile files, folders and PDFs, and that reading is lazy."""

import contextlib
import gc
import io
import os
import re
import struct
import sys
import time
import tracemalloc
import warnings
import weakref
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, PngImagePlugin

from optmem import images
from optmem.errors import ImageError, InputError, MissingDependencyError, OptmemError, SourceNotFoundError
from optmem.images import as_image, load_images
from optmem.ops import MAX_SIDE


def encode(picture: Image.Image, kind: str = "PNG", **options) -> bytes:
    file = io.BytesIO()
    picture.save(file, kind, **options)
    return file.getvalue()


def noise(height: int = 20, width: int = 30) -> np.ndarray:
    return np.random.default_rng(height * width).integers(0, 256, (height, width, 3), dtype=np.uint8)


def assert_pixels(actual, expected) -> None:
    assert actual.dtype == np.uint8
    assert actual.flags.c_contiguous
    np.testing.assert_array_equal(actual, expected)


# --- kinds of source ----------------------------------------------------------------------------------------------------------


class Drawn:
    def image(self):
        return noise()[..., 0]


@pytest.mark.parametrize("kind", ["array", "tensor", "pil", "bytes", "bytearray", "memoryview", "file", "path", "str"])
def test_every_kind_of_source(kind, tmp_path):
    pixels = noise()
    data = encode(Image.fromarray(pixels))
    path = tmp_path / "page.png"
    path.write_bytes(data)
    source = {
        "array": pixels,
        "tensor": torch.from_numpy(pixels),
        "pil": Image.fromarray(pixels),
        "bytes": data,
        "bytearray": bytearray(data),
        "memoryview": memoryview(data),
        "file": io.BytesIO(data),
        "path": path,
        "str": str(path),
    }[kind]
    assert_pixels(as_image(source), pixels)


def test_anything_with_a_method_image():
    assert_pixels(as_image(Drawn()), noise()[..., 0])


class Endless:
    def image(self):
        return self


def test_a_method_image_that_gives_no_picture():
    with pytest.raises(InputError, match="got Endless, which has a method image"):
        as_image(Endless())
    assert isinstance(next(load_images([Endless()], on_error="yield")).error, InputError)


def test_bytes_of_any_strides():
    data = encode(Image.fromarray(noise()))
    spread = bytearray(2 * len(data))
    spread[::2] = data
    assert_pixels(as_image(memoryview(spread)[::2]), noise())
    released = memoryview(data)
    released.release()
    with pytest.raises(ImageError, match="cannot be read"):
        as_image(released)


@pytest.fixture
def pipe():
    """Bytes -> the path of a pipe that holds them and ends, where the system has such paths."""
    if not Path("/dev/fd").is_dir():
        pytest.skip("needs /dev/fd")
    opened = []

    def make(data: bytes) -> str:
        reading, writing = os.pipe()
        opened.append(reading)
        assert os.write(writing, data) == len(data)
        os.close(writing)
        return f"/dev/fd/{reading}"

    yield make
    for descriptor in opened:
        os.close(descriptor)


def test_pipes_are_read_once(pipe):
    data = encode(Image.fromarray(noise()))
    assert_pixels(as_image(pipe(data)), noise())
    assert [item.image().shape for item in load_images([pipe(data), pipe(data)])] == [(20, 30, 3)] * 2


class Broken:
    """A file, or what passes for one, that fails after its first bytes."""

    def __init__(self, error):
        self.error, self.parts = error, [GOOD_PNG[:100]]

    def read(self, _size):
        if self.parts:
            return self.parts.pop()
        raise self.error


@pytest.mark.parametrize("error", [OSError(5, "Input/output error", "/secret"), EOFError("cut"), zlib.error("0x7f0012345678")])
def test_files_that_fail_while_they_are_read(error):
    with pytest.raises(ImageError, match=r"^image cannot be read: (Input/output error|EOFError|error)$"):
        as_image(Broken(error))
    assert isinstance(next(load_images(Broken(error), on_error="yield")).error, ImageError)


@pytest.mark.skipif(not Path("/proc/self/mem").exists(), reason="needs /proc")
def test_paths_that_fail_while_they_are_read():
    for read in (as_image, lambda path: list(load_images(path))):
        with pytest.raises(ImageError, match=r"^mem cannot be read: Input/output error"):
            read("/proc/self/mem")


def test_large_files_are_refused_with_the_limit(tmp_path, monkeypatch):
    path = tmp_path / "page.png"
    path.write_bytes(GOOD_PNG)
    sources = [path, GOOD_PNG, bytearray(GOOD_PNG), memoryview(GOOD_PNG).cast("B", (len(GOOD_PNG), 1)), io.BytesIO(GOOD_PNG)]
    monkeypatch.setattr(images, "MAX_FILE_BYTES", len(GOOD_PNG))
    assert [as_image(source).shape for source in sources] == [(64, 64, 3)] * 5
    monkeypatch.setattr(images, "MAX_FILE_BYTES", len(GOOD_PNG) - 1)
    sources[-1].seek(0)
    for source in sources:
        with pytest.raises(ImageError, match=f"has more than {len(GOOD_PNG) - 1:,} bytes, the most that is read"):
            as_image(source)


def test_checked_pixels_are_not_copied():
    pixels = noise()
    assert as_image(pixels) is pixels or np.shares_memory(as_image(pixels), pixels)


def test_any_strides():
    pixels = noise(40, 60)
    for view in (pixels[::-1], pixels[:, ::-2], pixels[5:7, ::3, ::-1], pixels[..., 1], pixels.transpose(1, 0, 2), pixels[..., :1]):
        assert_pixels(as_image(view), view[..., 0] if view.shape[-1] == 1 else view)
    tensor = torch.from_numpy(pixels)
    assert_pixels(as_image(tensor[::2].transpose(0, 1)), pixels[::2].transpose(1, 0, 2))
    assert_pixels(as_image(np.broadcast_to(np.uint8(7), (3, 4))), np.full((3, 4), 7))


@pytest.mark.parametrize(
    ("source", "words"),
    [
        (np.full((4, 4), np.nan, np.float32), "must be uint8, got float32; .*NaN and Inf"),
        (np.full((4, 4, 3), np.inf), "must be uint8, got float64"),
        (torch.zeros(4, 4), "must be uint8, got torch.float32; scale"),
        (np.zeros((4, 4), bool), "must be uint8, got bool"),
        (np.zeros((4, 4), np.int64), "must be uint8, got int64"),
        (np.zeros((4, 4), object), "must be uint8, got object"),
        (np.zeros((3, 4, 5), np.uint8), r"must be \[H, W\] or \[H, W, 3\], got \[3, 4, 5\]; move the channels to the end"),
        (np.zeros((4, 4, 4), np.uint8), "RGBA is laid on white"),
        (np.zeros((1, 4, 4, 3), np.uint8), "give a batch as a list"),
        (np.zeros(4, np.uint8), r"got \[4\]"),
        (np.uint8(3), "got uint8"),
        (torch.zeros(4, 4, dtype=torch.uint8).to_sparse(), "must be dense"),
        (torch.zeros(4, 4, dtype=torch.uint8, device="meta"), "must be dense and hold values"),
        (None, "got NoneType"),
        (7, "got int"),
        (io.StringIO("text"), "binary mode"),
    ],
)
def test_refuses_what_is_no_picture(source, words):
    with pytest.raises(InputError, match=words):
        as_image(source)


@pytest.mark.parametrize("shape", [(0, 0), (0, 5), (5, 0), (0, 5, 3), (1, MAX_SIDE + 1)])
def test_refuses_sizes(shape):
    with pytest.raises(ImageError, match=r"no pixels|a side may have"):
        as_image(np.zeros(shape, np.uint8))


def test_sizes_at_the_limit():
    assert as_image(np.zeros((1, 1), np.uint8)).shape == (1, 1)
    assert as_image(np.zeros((1, MAX_SIDE), np.uint8)).shape == (1, MAX_SIDE)
    assert as_image(encode(Image.new("1", (MAX_SIDE, 1)))).shape == (1, MAX_SIDE)
    assert as_image(np.zeros((10, 10), np.uint8), max_pixels=100).shape == (10, 10)
    with pytest.raises(ImageError, match="10x11 pixels; at most 100 are read"):
        as_image(np.zeros((11, 10), np.uint8), max_pixels=100)


# --- modes --------------------------------------------------------------------------------------------------------------------


def test_grey_stays_grey():
    grey = noise()[..., 0].copy()
    for data in (encode(Image.fromarray(grey)), encode(Image.fromarray(grey), "JPEG", quality=100)):
        assert as_image(data).shape == grey.shape
    assert_pixels(as_image(encode(Image.fromarray(grey))), grey)
    assert_pixels(as_image(encode(Image.fromarray(grey > 127))), (grey > 127) * 255)


def test_transparent_is_white_whatever_colour_it_hides():
    colours = np.zeros((2, 4, 4), np.uint8)
    colours[0, :, :3] = [[255, 255, 255], [0, 0, 0], [200, 0, 0], [10, 20, 30]]
    colours[0, :, 3] = [0, 0, 255, 128]
    colours[1, :, :3] = 255
    colours[1, :, 3] = [0, 64, 128, 255]  # white text on nothing
    expected = np.round(colours[..., :3] * (colours[..., 3:] / 255.0) + 255 - colours[..., 3:])
    for data in (encode(Image.fromarray(colours)), encode(Image.fromarray(colours), "WEBP", lossless=True, exact=True)):
        assert_pixels(as_image(data), expected)
    grey = Image.merge("LA", [Image.fromarray(colours[..., 0]), Image.fromarray(colours[..., 3])])
    assert_pixels(as_image(encode(grey)), expected[..., 0])


def test_transparency_of_palettes_and_keys():
    picture = Image.new("P", (3, 1))
    picture.putpalette([0, 0, 0, 255, 0, 0, 0, 0, 255])
    picture.putdata([0, 1, 2])
    white, red, blue = [255, 255, 255], [255, 0, 0], [0, 0, 255]
    assert_pixels(as_image(encode(picture, transparency=0)), [[white, red, blue]])
    assert_pixels(as_image(encode(picture, transparency=bytes([255, 0, 255]))), [[[0, 0, 0], white, blue]])
    assert_pixels(as_image(picture.convert("PA")), [[[0, 0, 0], red, blue]])
    assert_pixels(as_image(encode(Image.fromarray(np.array([[0, 9]], np.uint8)), transparency=9)), [[0, 255]])
    key = Image.fromarray(np.array([[[1, 2, 3], [4, 5, 6]]], np.uint8))
    assert_pixels(as_image(encode(key, transparency=(1, 2, 3))), [[white, [4, 5, 6]]])
    assert_pixels(as_image(encode(Image.new("1", (2, 1), 0), transparency=0)), [[255, 255]])


def test_16_bits_are_scaled_not_clipped():
    grey = np.array([[0, 128, 129, 256, 32768, 60000, 65535]], np.uint16)
    expected = np.round(grey / 65535 * 255)
    assert expected[0, 5] == 233
    assert_pixels(as_image(encode(Image.fromarray(grey))), expected)
    assert_pixels(as_image(Image.fromarray(grey)), expected)
    keyed = Image.fromarray(grey)
    keyed.info["transparency"] = 256
    assert_pixels(as_image(keyed)[0, 3:5], [255, 128])


@pytest.mark.parametrize("mode", ["CMYK", "YCbCr", "HSV", "RGBX", "RGBa", "RGB", "LA", "La", "L", "1", "P", "PA", "RGBA"])
def test_modes_become_grey_or_rgb(mode):
    try:
        picture = Image.fromarray(noise()).convert(mode)
    except ValueError:
        picture = Image.fromarray(noise()).convert({"RGBa": "RGBA", "La": "LA", "PA": "P"}[mode]).convert(mode)
    image = as_image(picture)
    assert image.shape == ((20, 30) if mode in ("1", "L", "LA", "La") else (20, 30, 3))
    assert image.dtype == np.uint8


@pytest.mark.parametrize("mode", ["I", "F"])
def test_refuses_modes_whose_white_is_not_known(mode):
    with pytest.raises(ImageError, match=f"mode {mode}, whose white"):
        as_image(Image.new(mode, (4, 4)))


def test_cmyk_jpeg():
    assert as_image(encode(Image.new("CMYK", (8, 8), (0, 0, 0, 0)), "JPEG")).min() > 250


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_applied(orientation):
    pixels = noise()
    undo = {1: lambda a: a, 2: np.fliplr, 3: lambda a: np.rot90(a, 2), 4: np.flipud, 5: lambda a: a.transpose(1, 0, 2)}
    undo |= {6: lambda a: np.rot90(a, 3), 7: lambda a: np.rot90(a, 2).transpose(1, 0, 2), 8: np.rot90}
    exif = Image.Exif()
    exif[0x0112] = orientation
    assert_pixels(as_image(encode(Image.fromarray(pixels), exif=exif)), undo[orientation](pixels))


def orientation_text(value: int) -> bytes:
    info = PngImagePlugin.PngInfo()
    exif = Image.Exif()
    exif[0x0112] = value
    info.add_text("Raw profile type exif", f"\nexif\n{len(exif.tobytes()):8}\n{exif.tobytes().hex()}\n")
    return encode(Image.fromarray(noise()), pnginfo=info)


def test_exif_that_cannot_be_read_is_no_orientation():
    picture = Image.fromarray(noise())
    for junk in (b"junk", b"MM\0*", b"II*\0\xff\xff\xff\xff", b"Exif\0\0" + b"\xff" * 40):
        assert_pixels(as_image(encode(picture, exif=junk)), noise())
        assert as_image(encode(picture, "JPEG", exif=junk)).shape == (20, 30, 3)
        assert_pixels(as_image(encode(picture, "WEBP", lossless=True, exif=junk)), noise())
    assert_pixels(as_image(orientation_text(6)), np.rot90(noise(), 3))
    info = PngImagePlugin.PngInfo()
    info.add_text("Raw profile type exif", "\nexif\n 4\nno hexadecimals")
    assert_pixels(as_image(encode(picture, pnginfo=info)), noise())


def test_a_picture_of_the_caller_is_left_as_it_is():
    exif = Image.Exif()
    exif[0x0112] = 6
    picture = Image.open(io.BytesIO(encode(Image.fromarray(noise()), exif=exif)))
    for _ in range(2):
        assert_pixels(as_image(picture), np.rot90(noise(), 3))
    assert picture.size == (30, 20)
    assert picture.getexif()[0x0112] == 6


# --- hostile files ------------------------------------------------------------------------------------------------------------


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png(width: int, height: int, *chunks: bytes) -> bytes:
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + b"".join(chunks) + chunk(b"IDAT", zlib.compress(b"\0" * 16)) + chunk(b"IEND", b"")


def jpeg_of(width: int, height: int) -> bytes:
    data = bytearray(encode(Image.new("L", (8, 8)), "JPEG"))
    start = data.index(b"\xff\xc0")
    data[start + 5 : start + 9] = struct.pack(">HH", height, width)
    return bytes(data)


def webp_of(width: int, height: int) -> bytes:
    data = bytearray(encode(Image.new("RGBA", (8, 8), (1, 2, 3, 4)), "WEBP", lossless=True))
    header = (
        b"VP8X" + struct.pack("<I", 10) + b"\x10\0\0\0" + (width - 1).to_bytes(3, "little") + (height - 1).to_bytes(3, "little")
    )
    body = b"WEBP" + header + bytes(data[12:])
    return b"RIFF" + struct.pack("<I", len(body)) + body


GOOD_PNG = encode(Image.fromarray(noise(64, 64)))
GOOD_JPEG = encode(Image.fromarray(noise(64, 64)), "JPEG")
GOOD_WEBP = encode(Image.fromarray(noise(64, 64)), "WEBP")
BOMB = zlib.compress(b"\0" * (80 << 20))
HOSTILE = {
    "empty": b"",
    "junk": b"not a picture",
    "wrong magic": b"\x89PNG\r\n\x1a\r" + GOOD_PNG[8:],
    "png magic alone": GOOD_PNG[:8],
    "gif": encode(Image.new("P", (4, 4)), "GIF"),
    "tiff": encode(Image.new("L", (4, 4)), "TIFF"),
    "bmp": encode(Image.new("L", (4, 4)), "BMP"),
    "eps": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n",
    "svg": b"<svg xmlns='http://www.w3.org/2000/svg'/>",
    "psd": b"8BPS\0\1" + b"\0" * 40,
    "gif behind a png name": encode(Image.new("P", (4, 4)), "GIF") + GOOD_PNG,
    "pdf": b"%PDF-1.7\n",
    "png of 20000 x 20000": png(20_000, 20_000),
    "png of 2^31 - 1": png(2**31 - 1, 2**31 - 1),
    "png of 0 x 0": png(0, 0),
    "png of one side too long": png(70_000, 1),
    "jpeg of 65535 x 65535": jpeg_of(65535, 65535),
    "webp of 16383 x 16383": webp_of(16383, 16383),
    "webp of 2^24 x 2^24": webp_of(2**24, 2**24),
    "zTXt bomb": png(4, 4, chunk(b"zTXt", b"bomb\0\0" + BOMB)),
    "iTXt bomb": png(4, 4, chunk(b"iTXt", b"bomb\0\1\0\0\0" + BOMB)),
    "bad checksum": GOOD_PNG[:40] + bytes([GOOD_PNG[40] ^ 1]) + GOOD_PNG[41:],
    "exif of junk": encode(Image.new("L", (4, 4)), "JPEG", exif=b"Exif\0\0MM\0*\xff\xff\xff\xff" + b"\xff" * 40)[:-30],
}
HOSTILE |= {f"png cut at {cut}": GOOD_PNG[:cut] for cut in (20, 33, 60, 500, len(GOOD_PNG) // 2, len(GOOD_PNG) - 40)}
HOSTILE |= {f"jpeg cut at {cut}": GOOD_JPEG[:cut] for cut in (3, 10, 100, 400, len(GOOD_JPEG) // 2)}
HOSTILE |= {f"webp cut at {cut}": GOOD_WEBP[:cut] for cut in (12, 20, 40, len(GOOD_WEBP) // 2)}


@pytest.mark.parametrize("case", HOSTILE)
def test_hostile_files_are_one_error_without_addresses_or_paths(case, tmp_path):
    path = tmp_path / "secret-folder" / "page.png"
    path.parent.mkdir()
    path.write_bytes(HOSTILE[case])
    for source in (path, HOSTILE[case], io.BytesIO(HOSTILE[case])):
        with pytest.raises(ImageError) as caught:
            as_image(source)
        message = str(caught.value)
        assert not re.search(r"0x[0-9a-f]{8,}|secret-folder|BytesIO", message), message
        assert message.startswith("page.png" if source is path else "image"), message
        assert caught.value.__cause__ is None


def test_an_iccp_bomb_is_not_inflated():
    data = png(4, 4, chunk(b"iCCP", b"bomb\0\0" + BOMB))
    tracemalloc.start()
    try:
        with pytest.raises(ImageError):
            as_image(data)
        assert tracemalloc.get_traced_memory()[1] < 64 << 20
    finally:
        tracemalloc.stop()


def test_large_pictures_are_refused_before_they_are_decoded():
    data = encode(Image.new("L", (10_001, 10_000)))
    tracemalloc.start()
    try:
        with pytest.raises(ImageError, match="10001x10000 pixels; at most 100,000,000 are read"):
            as_image(data)
        assert tracemalloc.get_traced_memory()[1] < 8 << 20
    finally:
        tracemalloc.stop()


def test_the_warning_band_of_pillow_is_silent_and_its_limit_is_left_alone():
    before = Image.MAX_IMAGE_PIXELS
    data = encode(Image.new("1", (10_000, 10_000)))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert as_image(data).shape == (10_000, 10_000)
    assert before == Image.MAX_IMAGE_PIXELS


def test_random_damage_is_never_another_exception():
    rng = np.random.default_rng(0)
    for good in (GOOD_PNG, GOOD_JPEG, GOOD_WEBP):
        for _ in range(150):
            data = bytearray(good)
            for place in rng.integers(0, len(data), rng.integers(1, 6)):
                data[place] = rng.integers(256)
            with contextlib.suppress(ImageError):
                as_image(bytes(data))


@pytest.mark.parametrize("kind", ["PNG", "WEBP"])
def test_animations_are_refused(kind):
    frames = [Image.fromarray(noise()), Image.fromarray(noise()[::-1].copy())]
    data = encode(frames[0], kind, save_all=True, append_images=frames[1:])
    with pytest.raises(ImageError, match="is an animation; save the frame"):
        as_image(data)


def test_a_lazy_picture_of_pillow_may_be_damaged_too():
    picture = Image.open(io.BytesIO(GOOD_PNG[:500]))
    with pytest.raises(ImageError, match="damaged"):
        as_image(picture)
    still = Image.open(io.BytesIO(HOSTILE["gif"]))  # a picture that the caller opened may be of any format
    assert as_image(still).shape == (4, 4, 3)


def test_missing_files_and_folders(tmp_path):
    with pytest.raises(SourceNotFoundError, match=r"^nowhere.png cannot be opened: No such file"):
        as_image(tmp_path / "nowhere.png")
    with pytest.raises(SourceNotFoundError):
        as_image("nul\0byte.png")
    with pytest.raises(ImageError, match="is a folder"):
        as_image(tmp_path)
    with pytest.raises(SourceNotFoundError, match="holds no file"):
        list(load_images(tmp_path))
    with pytest.raises(SourceNotFoundError):
        list(load_images(tmp_path / "nowhere"))


def test_names_in_messages_are_printable(tmp_path):
    path = tmp_path / "evil\x1b[31m\n.png"
    path.write_bytes(b"junk")
    with pytest.raises(ImageError) as caught:
        as_image(path)
    assert str(caught.value).isprintable()


# --- many pictures ------------------------------------------------------------------------------------------------------------


def test_a_folder_is_read_in_order_of_names(tmp_path):
    for name in ("b.png", "a.JPG", "c.webp"):
        kind = {"png": "PNG", "jpg": "JPEG", "webp": "WEBP"}[name.lower().split(".")[1]]
        (tmp_path / name).write_bytes(encode(Image.fromarray(noise()), kind))
    (tmp_path / "notes.txt").write_text("no picture")
    (tmp_path / "deeper").mkdir()
    items = list(load_images(tmp_path))
    assert [item.name for item in items] == ["a.JPG", "b.png", "c.webp"]
    assert all(item.image().shape == (20, 30, 3) for item in items)


def test_bad_pictures_are_raised_or_yielded(tmp_path):
    bad = tmp_path / "bad.png"
    bad.write_bytes(GOOD_PNG[:100])
    sources = [noise(), bad, tmp_path / "gone.png", np.zeros((2, 2)), Drawn()]
    with pytest.raises(ImageError, match=r"^bad\.png"):
        list(load_images(sources))
    items = list(load_images(sources, on_error="yield"))
    assert [item.name for item in items] == ["image 1", "bad.png", "gone.png", "image 4", "image 5"]
    assert [type(item.error) for item in items] == [type(None), ImageError, SourceNotFoundError, InputError, type(None)]
    with pytest.raises(OptmemError, match="image 4: pixels must be uint8"):
        items[3].image()


def test_what_is_no_picture_does_not_end_a_batch(tmp_path):
    folder = tmp_path / "empty"
    folder.mkdir()
    sources = [GOOD_PNG, folder, tmp_path / "gone", "nul\0byte", GOOD_JPEG]
    items = list(load_images(sources, on_error="yield"))
    assert [item.name for item in items][1:3] == ["empty", "gone"]
    assert [type(item.error) for item in items] == [type(None), *[SourceNotFoundError] * 3, type(None)]
    assert all(item.error is None or item.error.__traceback__ is None for item in items)  # whose frames hold what was read
    with pytest.raises(SourceNotFoundError, match=r"^empty holds no file"):
        list(load_images(sources))
    assert [type(item.error) for item in load_images(folder, on_error="yield")] == [SourceNotFoundError]


def test_sources_and_settings_are_checked():
    assert [item.name for item in load_images(noise())] == ["image 1"]
    assert [item.image().shape for item in load_images(GOOD_PNG)] == [(64, 64, 3)]
    assert list(load_images([])) == []
    settings = [{"on_error": "ignore"}, {"on_error": None}, {"dpi": 0}, {"dpi": float("nan")}, {"dpi": 1e9}, {"dpi": 10**400}]
    settings += [{"dpi": "144"}, {"dpi": None}, {"dpi": 1j}]
    for wrong in settings:
        with pytest.raises(InputError, match=next(iter(wrong))):
            list(load_images(noise(), **wrong))
    for wrong in ("9", 0, -1, 1e8, None, True):
        for source in (noise(), GOOD_PNG):
            with pytest.raises(InputError, match="max_pixels must be a whole number") as caught:
                as_image(source, max_pixels=wrong)
            assert not isinstance(caught.value, ImageError)  # the picture is good
        with pytest.raises(InputError, match="max_pixels"):
            list(load_images([], max_pixels=wrong))
    assert as_image(noise(), max_pixels=np.int64(600)).shape == (20, 30, 3)
    assert len(list(load_images(noise(), dpi=np.float32(72)))) == 1
    with pytest.raises(InputError, match="got int"):
        list(load_images(7))


def test_a_generators_own_exception_passes_through():
    def broken():
        yield noise()
        raise KeyError("theirs")

    items = load_images(broken(), on_error="yield")
    assert next(items).error is None
    with pytest.raises(KeyError, match="theirs"):
        next(items)


def test_reading_is_lazy_and_nothing_is_kept():
    alive: list[weakref.ref] = []
    most = started = 0

    def pages():
        nonlocal started
        for _ in range(10_000):
            started += 1
            page = np.zeros((64, 64), np.uint8)
            alive.append(weakref.ref(page))
            yield page
            del page

    source = load_images(pages())
    assert started == 0
    next(source)
    assert started == 1
    gc.disable()  # reference counts alone must free a page
    try:
        for item in source:
            del item
            most = max(most, sum(ref() is not None for ref in alive[-8:]))
    finally:
        gc.enable()
    assert started == 10_000
    assert most <= 2


def test_memory_stays_bounded_over_many_files(tmp_path):
    path = tmp_path / "page.png"
    path.write_bytes(encode(Image.new("L", (512, 512))))
    tracemalloc.start()
    try:
        assert sum(item.image().shape[0] for item in load_images(path for _ in range(300))) == 300 * 512
        assert tracemalloc.get_traced_memory()[1] < 8 << 20
    finally:
        tracemalloc.stop()


# --- PDF ----------------------------------------------------------------------------------------------------------------------


@pytest.fixture
def pdf(tmp_path):
    pytest.importorskip("pypdfium2")
    path = tmp_path / "scan.bin"  # known by its content
    pages = [Image.new("RGB", (100, 50), colour) for colour in ("red", "lime", "blue")]
    path.write_bytes(encode(pages[0], "PDF", save_all=True, append_images=pages[1:], resolution=72))
    return path


def test_pdf_page_by_page(pdf):
    items = list(load_images(pdf, dpi=144))
    assert [item.name for item in items] == ["scan.bin page 1", "scan.bin page 2", "scan.bin page 3"]
    assert [item.image().shape for item in items] == [(100, 200, 3)] * 3
    assert [item.image()[50, 100].argmax() for item in items] == [0, 1, 2]
    assert next(load_images(pdf, dpi=72)).image().shape == (50, 100, 3)


def printed_pdf(*pages):
    """A PDF whose pages say these words; PDFium finds the objects without a table of them."""
    objects = ["<< /Type /Catalog /Pages 2 0 R >>", "", "<< /Type /Font /Subtype /Type1 /BaseFont /Helvetica >>"]
    kids = []
    for words in pages:
        kids.append(f"{len(objects) + 1} 0 R")
        content = f"BT /F1 12 Tf 10 50 Td ({words}) Tj ET"
        fonts, box = "/Resources << /Font << /F1 3 0 R >> >>", "/MediaBox [0 0 200 100]"
        objects.append(f"<< /Type /Page /Parent 2 0 R {box} {fonts} /Contents {len(objects) + 2} 0 R >>")
        objects.append(f"<< /Length {len(content)} >>\nstream\n{content}\nendstream")
    objects[1] = f"<< /Type /Pages /Kids [{' '.join(kids)}] /Count {len(kids)} >>"
    body = "".join(f"{number} 0 obj\n{what}\nendobj\n" for number, what in enumerate(objects, 1))
    return f"%PDF-1.7\n{body}trailer << /Root 1 0 R >>\n%%EOF\n".encode()


def test_a_pdf_says_what_stands_on_its_pages(pdf):
    items = list(load_images(printed_pdf("Invoice 4711", "", "in all 12,50")))
    assert [item.text for item in items] == ["Invoice 4711", "", "in all 12,50"]
    assert (items[0].image() < 128).any()
    assert [item.text for item in load_images(pdf)] == [""] * 3


@pytest.mark.parametrize("kind", ["bytes", "bytearray", "memoryview", "file", "pipe"])
def test_pdf_of_every_kind(kind, pdf, pipe):
    data = pdf.read_bytes()
    with pdf.open("rb") as file:
        source = {
            "bytes": lambda: data,
            "bytearray": lambda: bytearray(data),
            "memoryview": lambda: memoryview(data),
            "file": lambda: file,
            "pipe": lambda: pipe(data),
        }[kind]
        for given in (source(), [noise(), source()]):
            file.seek(0)
            items = [item for item in load_images(given) if " page " in item.name]
            assert [item.image()[50, 100].argmax() for item in items] == [0, 1, 2]
            assert items[0].name.endswith(" page 1")
    assert next(load_images(data)).name == "image 1 page 1"
    with pdf.open("rb") as file:
        assert next(load_images(file)).name == "scan.bin page 1"


def test_pdf_in_memory_is_limited_and_one_in_a_file_is_not(pdf, monkeypatch):
    monkeypatch.setattr(images, "MAX_FILE_BYTES", 100)
    with pytest.raises(ImageError, match="has more than 100 bytes"):
        list(load_images(pdf.read_bytes()))
    assert len(list(load_images(pdf))) == 3


def test_damaged_pdf_in_memory(pdf):
    items = list(load_images([pdf.read_bytes()[:60], GOOD_PNG], on_error="yield"))
    assert [type(item.error) for item in items] == [ImageError, type(None)]


def test_pdfium_runs_in_one_thread_at_a_time(pdf, monkeypatch):
    pypdfium2 = pytest.importorskip("pypdfium2")
    running = most = 0

    def counted(method):
        def call(*args, **kwargs):
            nonlocal running, most
            running += 1
            most = max(most, running)
            time.sleep(0.002)
            try:
                return method(*args, **kwargs)
            finally:
                running -= 1

        return call

    for owner, name in ((pypdfium2.PdfPage, "render"), (pypdfium2.PdfDocument, "get_page"), (pypdfium2.PdfDocument, "close")):
        monkeypatch.setattr(owner, name, counted(getattr(owner, name)))
    monkeypatch.delitem(vars(images), "_lock_of_pdfium", raising=False)  # the threads have to agree on one
    with ThreadPoolExecutor(8) as pool:
        counts = list(pool.map(lambda source: len(list(load_images(source))), [pdf, pdf.read_bytes()] * 8))
    assert counts == [3] * 16
    assert most == 1


def test_pdf_limits_are_checked_before_rendering(pdf):
    items = list(load_images(pdf, dpi=2400, max_pixels=1_000_000, on_error="yield"))
    assert ["3334x1667 pixels; at most 1,000,000" in str(item.error) for item in items] == [True] * 3


@pytest.mark.parametrize("cut", [5, 9, 60])
def test_damaged_pdf(pdf, cut):
    pdf.write_bytes(pdf.read_bytes()[:cut])
    with pytest.raises(ImageError, match=r"^scan.bin is damaged or encrypted"):
        list(load_images(pdf))
    assert len(list(load_images([pdf, noise()], on_error="yield"))) == 2


def test_pdf_is_no_single_picture(pdf):
    with pytest.raises(ImageError, match="is a PDF: load_images"):
        as_image(pdf)


def test_pdf_without_its_package(pdf, monkeypatch):
    monkeypatch.setitem(sys.modules, "pypdfium2", None)
    with pytest.raises(MissingDependencyError, match=r"pip install 'optmem\[pdf\]'"):
        list(load_images(pdf))
    items = list(load_images([GOOD_PNG, pdf, pdf.read_bytes(), GOOD_PNG], on_error="yield"))
    assert [item.name for item in items] == ["image 1", "scan.bin", "image 3", "image 4"]
    assert [type(item.error) for item in items] == [type(None), *[MissingDependencyError] * 2, type(None)]


def test_png_text_is_allowed():
    info = PngImagePlugin.PngInfo()
    info.add_text("Comment", "a" * 1000, zip=True)
    assert as_image(encode(Image.new("L", (4, 4)), pnginfo=info)).shape == (4, 4)
