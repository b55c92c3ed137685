"""Pictures from outside to checked pixels: uint8 [H, W] or [H, W, 3], C-contiguous; and folders and PDFs to one after another.

What is read is decided by content, never by name: PNG, JPEG, WebP and, page by page, PDF.  Limits are checked before anything is
decoded.  Whatever goes wrong is an ImageError that names the picture by its file name, or a SourceNotFoundError.
"""

from __future__ import annotations

import io
import math
import os
import threading
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import BinaryIO, Literal, TypeVar, cast

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import ExifTags, JpegImagePlugin, PngImagePlugin, WebPImagePlugin
from PIL.Image import Image as Picture
from PIL.Image import Transpose

from optmem.errors import ImageError, InputError, MissingDependencyError, OptmemError, SourceNotFoundError
from optmem.ops import MAX_SIDE

Pixels = NDArray[np.uint8]  # [H, W] grey or [H, W, 3] RGB, C-contiguous
Result = TypeVar("Result")

MAX_PIXELS = 100_000_000
MAX_FILE_BYTES = 512 * 2**20
SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".pdf")
FORMATS = "PNG, JPEG or WebP"
DAMAGED = f"is damaged, incomplete or holds what {FORMATS} does not allow"
PDF = b"%PDF-"
READ_BYTES = 2**20  # at once: read(n) sets n bytes aside before it knows how many there are
UPRIGHT = {  # by EXIF's orientation
    2: Transpose.FLIP_LEFT_RIGHT,
    3: Transpose.ROTATE_180,
    4: Transpose.FLIP_TOP_BOTTOM,
    5: Transpose.TRANSPOSE,
    6: Transpose.ROTATE_270,
    7: Transpose.TRANSVERSE,
    8: Transpose.ROTATE_90,
}


@dataclass(frozen=True, slots=True)
class LoadedImage:
    """One picture of a source: its name, and its pixels or what is wrong with it."""

    name: str
    pixels: Pixels | None
    error: OptmemError | None = None
    text: str = ""  # that a PDF says stands on this page; nobody has checked it

    def image(self) -> Pixels:
        """The pixels; raises the error of a bad picture."""
        if self.pixels is None:
            assert self.error is not None
            raise self.error
        return self.pixels


def as_image(source: object, *, name: str | None = None, max_pixels: int = MAX_PIXELS) -> Pixels:
    """One picture as checked pixels; no copy where `source` already is such an array.

    source is a path, bytes, a binary file, a PIL image, a uint8 array or tensor [H, W] or [H, W, 3] with any strides, or anything
    whose method image() gives one of these.  Grey stays grey; transparency is laid on white; EXIF orientation is applied.

    Raises ImageError where it cannot be read or is too large, SourceNotFoundError where there is no such file, and InputError where
    it is no picture at all or max_pixels is no whole number.
    """
    taken = take_image(source, name=name, max_pixels=max_pixels)
    return taken() if callable(taken) else taken


def take_image(source: object, *, name: str | None = None, max_pixels: int = MAX_PIXELS) -> Pixels | Callable[[], Pixels]:
    """What as_image does, in two steps: all that belongs to the caller, a file, an object of theirs, is asked here and now; what
    is left of a picture that came as bytes, to decode them, may be done in any thread by calling the result.

    Raises as as_image does, in either step.
    """
    _check_max_pixels(max_pixels)
    name = printable(name) if name else name_of(source, "image")
    data = _content(source, name)
    if data is not None:
        return partial(_decode, data, name, max_pixels)
    if isinstance(source, Picture):  # its pixels are perhaps still in a file
        return _guarded(lambda: _from_picture(source, name, max_pixels), name, DAMAGED)
    if isinstance(source, torch.Tensor):
        return _from_array(_tensor_as_array(source, name), name, max_pixels)
    if isinstance(source, np.ndarray):
        return _from_array(source, name, max_pixels)
    if _has(source, "image"):
        given = _drawn(source.image, name)  # type: ignore[attr-defined]
        if _has(given, "image"):  # perhaps itself, for ever
            raise InputError(f"{name}: image() must give a picture, got {type(given).__name__}, which has a method image() again")
        return take_image(given, name=name, max_pixels=max_pixels)
    raise InputError(f"{name}: a picture is a path, bytes, a file, a PIL image or a uint8 array, got {type(source).__name__}")


def load_images(
    source: object, *, dpi: float = 144, max_pixels: int = MAX_PIXELS, on_error: Literal["raise", "yield"] = "raise"
) -> Iterator[LoadedImage]:
    """The pictures of a file, a folder (sorted by name), a PDF (page by page), or of an iterable of these, one at a time.

    A PDF is a path, bytes or a binary file, as any picture is.  Nothing is read before it is asked for and nothing is kept.
    on_error="yield" gives what cannot be read (a picture, a page, a PDF, an empty folder) as an item with its error and goes on;
    "raise" raises it.  A generator's own exceptions pass through.
    """
    if on_error not in ("raise", "yield"):
        raise InputError(f"on_error must be raise or yield, got {on_error!r}")
    if not (isinstance(dpi, (int, float, np.integer, np.floating)) and 1 <= dpi <= 2400):
        raise InputError(f"dpi must be 1 to 2400, got {dpi!r}")
    _check_max_pixels(max_pixels)
    for item in _items(source, float(dpi), max_pixels):
        if item.error is not None:
            if on_error == "raise":
                raise item.error
            item.error.__context__ = None
            item.error.__traceback__ = None  # its frames hold the file and the half-read picture
        yield item
        del item  # so that the caller alone decides how long the pixels live


def is_whole(value: object) -> bool:
    """Whether a setting is a whole number: an int, also one of NumPy's, and no bool."""
    return isinstance(value, (int, np.integer)) and not isinstance(value, bool)


def printable(name: str) -> str:
    """A name as it may stand in a message: without folders, and escaped where it holds control characters."""
    last = name.replace("\\", "/").rstrip("/").rsplit("/", 1)[-1] or name
    return last if last.isprintable() else ascii(last)


# --- one picture --------------------------------------------------------------------------------------------------------------


def name_of(source: object, default: str) -> str:
    """What a picture is called in messages."""
    given = source if isinstance(source, (str, os.PathLike)) else getattr(source, "name", None) or getattr(source, "filename", None)
    return printable((os.fsdecode(given) if isinstance(given, (str, bytes, os.PathLike)) else "") or default)


def _has(source: object, method: str) -> bool:
    return callable(getattr(source, method, None))


def _check_max_pixels(max_pixels: int) -> None:
    if not (is_whole(max_pixels) and max_pixels >= 1):
        raise InputError(f"max_pixels must be a whole number of at least 1, got {max_pixels!r}")


def _content(source: object, name: str) -> bytes | None:
    """All bytes of a path, bytes or a file, up to the limit; None for a source that is not made of bytes."""
    if isinstance(source, (str, os.PathLike)):
        with _open(Path(os.fsdecode(source)), name) as file:
            return _read_all(file, name)
    if isinstance(source, (bytes, bytearray, memoryview)):
        return _guarded(lambda: _whole(source, name), name, "cannot be read: its memory is not there")
    if _has(source, "read") and not _has(source, "image"):
        return _read_all(cast(BinaryIO, source), name)
    return None


def _open(path: Path, name: str) -> BinaryIO:
    try:
        return path.open("rb")
    except IsADirectoryError:
        raise ImageError(f"{name} is a folder, not a picture; load_images reads folders") from None
    except (OSError, ValueError) as error:  # ValueError: a NUL in the path
        reason = error.strerror if isinstance(error, OSError) and error.strerror else "not a path"
        raise SourceNotFoundError(f"{name} cannot be opened: {reason}") from None


def _read_all(file: BinaryIO, name: str) -> bytes:
    """A file from where it stands to its end.  It may be a pipe, or anything that has read(): no seek, any exception."""
    parts: list[bytes] = []
    size = 0
    while size <= MAX_FILE_BYTES:
        try:
            part: object = file.read(READ_BYTES)
        except Exception as error:
            reason = error.strerror if isinstance(error, OSError) and error.strerror else type(error).__name__
            raise ImageError(f"{name} cannot be read: {reason}") from None
        if not isinstance(part, bytes):
            raise InputError(f"{name}: a file must be opened in binary mode, its read() gave {type(part).__name__}")
        if not part:
            return b"".join(parts)
        parts.append(part)
        size += len(part)
    raise _too_large(name)


def _whole(data: bytes | bytearray | memoryview, name: str) -> bytes:
    if (data.nbytes if isinstance(data, memoryview) else len(data)) > MAX_FILE_BYTES:
        raise _too_large(name)
    return bytes(data)  # of a view with any strides; bytes themselves are not copied


def _too_large(name: str) -> ImageError:
    return ImageError(f"{name} has more than {MAX_FILE_BYTES:,} bytes, the most that is read of one file")


def check_file(data: bytes, name: str) -> None:
    """Raises ImageError for bytes that do not begin as a picture or a PDF does.  Pixels are not read."""
    if not data.startswith(PDF):
        picture = _guarded(lambda: _reader_of(data, name)(io.BytesIO(data)), name, DAMAGED)
        check_size(picture.height, picture.width, name)


def _decode(data: bytes, name: str, max_pixels: int) -> Pixels:
    if data.startswith(PDF):
        raise ImageError(f"{name} is a PDF: load_images gives its pages")
    reader = _reader_of(data, name)
    return _guarded(lambda: _from_picture(reader(io.BytesIO(data)), name, max_pixels), name, DAMAGED)


def _reader_of(data: bytes, name: str) -> Callable[[BinaryIO], Picture]:
    if not data:
        raise ImageError(f"{name} is empty: it has 0 bytes")
    reader = _reader(data[:16])
    if reader is None:
        raise ImageError(f"{name} is not {FORMATS}; convert it to one of these")
    return reader


def _reader(head: bytes) -> Callable[[BinaryIO], Picture] | None:
    """The decoder for these first bytes.  Not Image.open: its limit on pixels is one for the whole process."""
    if head.startswith(b"\x89PNG\r\n\x1a\n"):
        return PngImagePlugin.PngImageFile
    if head.startswith(b"\xff\xd8\xff"):
        return JpegImagePlugin.JpegImageFile
    if head[:4] == b"RIFF" and head[8:12] == b"WEBP":
        return WebPImagePlugin.WebPImageFile
    return None


def _drawn(image: Callable[[], object], name: str) -> object:
    """What an object's own method gives; what it raises is this picture's fault and no other's."""
    try:
        return image()
    except (OptmemError, MemoryError):
        raise
    except Exception as error:
        raise ImageError(f"{name}: its image() failed with {type(error).__name__}") from error


def _guarded(read: Callable[[], Result], name: str, wrong: str) -> Result:
    """Decoders raise nearly anything for a damaged file, with heap addresses and paths in it: one exception leaves here."""
    try:
        return read()
    except OptmemError:
        raise
    except MemoryError:
        raise ImageError(f"{name} does not fit into memory") from None
    except Exception:
        raise ImageError(f"{name} {wrong}") from None


def check_size(height: int, width: int, name: str, max_pixels: int = MAX_PIXELS) -> None:
    """Raises ImageError for a picture without pixels, with too many, or with too long a side."""
    if height < 1 or width < 1:
        raise ImageError(f"{name} has no pixels: {width}x{height}")
    if max(height, width) > MAX_SIDE:
        raise ImageError(f"{name} is {width}x{height} pixels; a side may have at most {MAX_SIDE:,}")
    if height * width > max_pixels:
        raise ImageError(f"{name} is {width}x{height} pixels; at most {max_pixels:,} are read: make it smaller")


def _from_picture(picture: Picture, name: str, max_pixels: int) -> Pixels:
    """A PIL image of any mode as pixels.  Nothing is decoded before the size is checked."""
    check_size(picture.height, picture.width, name, max_pixels)
    if getattr(picture, "is_animated", False):
        raise ImageError(f"{name} is an animation; save the frame that is meant as a picture of its own")
    picture = _upright(picture)
    if picture.mode.startswith("I;16"):
        return _from_16_bits(picture)
    if picture.mode in ("I", "F"):
        raise ImageError(f"{name} has mode {picture.mode}, whose white is not known; scale it to 0 .. 255 and convert it to L")
    if picture.has_transparency_data:
        return _on_white(np.asarray(picture.convert("LA" if picture.mode in ("1", "L", "LA", "La") else "RGBA")))
    return np.array(picture.convert("L" if picture.mode in ("1", "L") else "RGB"))


def _upright(picture: Picture) -> Picture:
    """A picture as EXIF says it stands; EXIF that cannot be read says nothing."""
    picture.load()  # here, so that damaged pixels are not taken for damaged EXIF
    try:
        method = UPRIGHT.get(picture.getexif().get(ExifTags.Base.Orientation, 1))
    except Exception:
        method = None
    return picture if method is None else picture.transpose(method)


def _from_16_bits(picture: Picture) -> Pixels:
    grey = np.asarray(picture).astype(np.uint32)
    pixels = ((grey * 255 + 32767) // 65535).astype(np.uint8)
    if "transparency" in picture.info:
        pixels[grey == picture.info["transparency"]] = 255
    return pixels


def _on_white(pixels: Pixels) -> Pixels:
    """Colours and alpha [H, W, 2 or 4] -> colours on white: what is transparent is paper, whatever colour it hides."""
    ink = (255 - pixels[..., :-1]).astype(np.uint16)
    ink *= pixels[..., -1:]
    ink += 127
    ink //= 255
    colours: Pixels = 255 - ink.astype(np.uint8)
    return np.ascontiguousarray(colours[..., 0] if colours.shape[2] == 1 else colours)


def _tensor_as_array(tensor: torch.Tensor, name: str) -> NDArray[np.generic]:
    if tensor.layout != torch.strided or tensor.is_meta or tensor.is_quantized:
        raise InputError(f"{name}: a tensor of pixels must be dense and hold values, got {tensor.layout} on {tensor.device}")
    if tensor.dtype != torch.uint8:
        raise InputError(_wrong_type(name, str(tensor.dtype)))
    array: NDArray[np.generic] = tensor.cpu().numpy()
    return array


def _from_array(array: NDArray[np.generic], name: str, max_pixels: int) -> Pixels:
    if array.dtype != np.uint8:
        raise InputError(_wrong_type(name, str(array.dtype)))
    if array.ndim == 3 and array.shape[2] == 1:
        array = array[..., 0]
    if array.ndim != 2 and not (array.ndim == 3 and array.shape[2] == 3):
        raise InputError(f"{name}: pixels must be [H, W] or [H, W, 3], got {list(array.shape)}{_hint(array)}")
    check_size(array.shape[0], array.shape[1], name, max_pixels)
    return np.ascontiguousarray(np.asarray(array), dtype=np.uint8)


def _wrong_type(name: str, dtype: str) -> str:
    scale = "; scale floats to 0 .. 255 and round them, after NaN and Inf are dealt with" if "float" in dtype else ""
    return f"{name}: pixels must be uint8, got {dtype}{scale}"


def _hint(array: NDArray[np.generic]) -> str:
    if array.ndim == 3 and array.shape[0] in (1, 3):
        return "; move the channels to the end"
    if array.ndim == 3 and array.shape[2] == 4:
        return "; a PIL image in mode RGBA is laid on white"
    return "; give a batch as a list" if array.ndim == 4 else ""


# --- many pictures ------------------------------------------------------------------------------------------------------------


def _items(source: object, dpi: float, max_pixels: int) -> Iterator[LoadedImage]:
    if _is_source(source):
        yield from _source_items(source, 1, dpi, max_pixels)
    elif isinstance(source, Iterable):
        for number, item in enumerate(source, 1):
            yield from _source_items(item, number, dpi, max_pixels)
    else:
        raise InputError(f"pictures come from paths, folders, PDFs, arrays or iterables of these, got {type(source).__name__}")


def _is_source(source: object) -> bool:
    if isinstance(source, (str, os.PathLike, bytes, bytearray, memoryview, Picture, torch.Tensor, np.ndarray)):
        return True
    return _has(source, "image") or _has(source, "read")


def _source_items(source: object, number: int, dpi: float, max_pixels: int) -> Iterator[LoadedImage]:
    """The pictures of one source.  What is wrong with it is an item as well: those after it have their turn."""
    name = name_of(source, f"image {number}")
    if not isinstance(source, (str, os.PathLike)):
        yield from _opened_items(source, name, dpi, max_pixels)
        return
    try:
        files = _files(Path(os.fsdecode(source)), name)
    except OptmemError as error:
        yield LoadedImage(name, None, error)
        return
    for file in files:
        yield from _opened_items(file, printable(file.name or name), dpi, max_pixels)


def _files(path: Path, name: str) -> list[Path]:
    try:
        is_folder = path.is_dir()
        files = sorted(child for child in path.iterdir() if child.suffix.lower() in SUFFIXES) if is_folder else [path]
    except (OSError, ValueError) as error:
        raise SourceNotFoundError(f"{name} cannot be opened: {type(error).__name__}") from None
    if is_folder and not files:
        raise SourceNotFoundError(f"{name} holds no file that ends in {', '.join(SUFFIXES)}")
    return files


def _opened_items(source: object, name: str, dpi: float, max_pixels: int) -> Iterator[LoadedImage]:
    try:
        opened = [_opened(source, name)]
    except OptmemError as error:
        yield LoadedImage(name, None, error)
        return
    pdf = opened[0] if isinstance(opened[0], _Pdf) else None
    if pdf is None:
        yield _item(name, lambda: as_image(opened.pop(), name=name, max_pixels=max_pixels))  # pop: a file's bytes go with it
        return
    try:
        for number in range(pdf.num_pages):
            page_name = f"{name} page {number + 1}"
            page = _item(page_name, lambda i=number, said=page_name: pdf.render(i, said, dpi, max_pixels))  # type: ignore[misc]
            yield page if page.pixels is None else replace(page, text=pdf.text(number))
            del page
    finally:
        pdf.close()


def _item(name: str, load: Callable[[], Pixels]) -> LoadedImage:
    try:
        return LoadedImage(name, load())
    except OptmemError as error:
        return LoadedImage(name, None, error)


def _opened(source: object, name: str) -> object:
    """A PDF, or what as_image takes: the bytes of a path or file, since a pipe is read only once, or the source as it is."""
    if isinstance(source, Path) and _is_pdf(source):
        return _Pdf(source, name)  # of any size: PDFium reads what a page needs
    data = _content(source, name)
    if data is None:
        return source
    return _Pdf(data, name) if data.startswith(PDF) else data


def _is_pdf(path: Path) -> bool:
    try:
        if not path.is_file():
            return False  # a pipe would lose its first bytes
        with path.open("rb") as file:
            return file.read(len(PDF)) == PDF
    except (OSError, ValueError):
        return False  # _content will say what is wrong


class _Pdf:
    """An open PDF.  PDFium may run in one thread at a time, whatever the document: every call of it is made under one lock."""

    def __init__(self, content: Path | bytes, name: str) -> None:
        pdfium = _pdfium(name)
        try:
            with _pdfium_lock():
                self.document = pdfium.PdfDocument(content)
                self.num_pages = len(self.document)
        except Exception:
            raise ImageError(f"{name} is damaged or encrypted, or not a PDF; remove the password or export it again") from None

    def render(self, number: int, name: str, dpi: float, max_pixels: int) -> Pixels:
        with _pdfium_lock():
            return _guarded(lambda: self._render(number, name, dpi, max_pixels), name, "is damaged and cannot be drawn")

    def _render(self, number: int, name: str, dpi: float, max_pixels: int) -> Pixels:
        page = self.document[number]
        try:
            width, height = (math.ceil(points * dpi / 72) for points in page.get_size())
            check_size(height, width, name, max_pixels)
            bitmap = page.render(scale=dpi / 72, rev_byteorder=True)
            try:
                return np.array(bitmap.to_numpy()[..., :3])  # out of PDFium's own memory
            finally:
                bitmap.close()
        finally:
            page.close()

    def text(self, number: int) -> str:
        """A page's text layer, as far as it can be read: a page without one, or with a damaged one, says nothing."""
        with _pdfium_lock():
            try:
                page = self.document[number]
                try:
                    layer = page.get_textpage()
                    try:
                        return str(layer.get_text_range()).replace("\r\n", "\n")
                    finally:
                        layer.close()
                finally:
                    page.close()
            except Exception:
                return ""

    def close(self) -> None:
        with _pdfium_lock():
            self.document.close()


def _pdfium(name: str) -> ModuleType:
    try:
        import pypdfium2
    except ImportError:
        raise MissingDependencyError(f"{name} is a PDF, which needs pypdfium2: pip install 'optmem[pdf]'") from None
    return cast(ModuleType, pypdfium2)


def _pdfium_lock() -> threading.RLock:
    """The one lock, made when it is first needed.

    setdefault, since functools.cache may give two threads a lock each.  Reentrant, since a generator that is collected while its
    thread draws a page closes its document there.
    """
    lock: threading.RLock = globals().setdefault("_lock_of_pdfium", threading.RLock())
    return lock
