"""Pictures from outside to checked pixels: uint8 [H, W] or [H, W, 3], C-contiguous; and folders and PDFs to one after another.

What is read is decided by content, never by name: PNG, JPEG, WebP and, page by page, PDF.  Limits are checked before anything is
decoded.  Whatever goes wrong is an ImageError that names the picture by its file name, or a SourceNotFoundError.
"""

from __future__ import annotations

import io
import math
import os
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import BinaryIO, Literal, cast

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import ImageOps, JpegImagePlugin, PngImagePlugin, WebPImagePlugin
from PIL.Image import Image as Picture

from optmem.errors import ImageError, InputError, MissingDependencyError, OptmemError, SourceNotFoundError
from optmem.ops import MAX_SIDE

Pixels = NDArray[np.uint8]  # [H, W] grey or [H, W, 3] RGB, C-contiguous

MAX_PIXELS = 100_000_000
MAX_FILE_BYTES = 512 * 2**20
SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".pdf")
FORMATS = "PNG, JPEG or WebP"


@dataclass(frozen=True, slots=True)
class LoadedImage:
    """One picture of a source: its name, and its pixels or what is wrong with it."""

    name: str
    pixels: Pixels | None
    error: OptmemError | None = None

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
    it is no picture at all.
    """
    name = printable(name or _name_of(source) or "image")
    if isinstance(source, (str, os.PathLike)):
        with _open(Path(source), name) as file:
            return _read_file(file, name, max_pixels)
    if isinstance(source, (bytes, bytearray, memoryview)):
        return _read_file(io.BytesIO(source), name, max_pixels)
    if isinstance(source, Picture):
        return _guarded(lambda: _from_picture(source, name, max_pixels), name)
    if isinstance(source, torch.Tensor):
        return _from_array(_tensor_as_array(source, name), name, max_pixels)
    if isinstance(source, np.ndarray):
        return _from_array(source, name, max_pixels)
    if callable(getattr(source, "image", None)):
        return as_image(source.image(), name=name, max_pixels=max_pixels)  # type: ignore[attr-defined]
    if callable(getattr(source, "read", None)):
        return _read_file(_read_all(cast(BinaryIO, source), name), name, max_pixels)
    raise InputError(f"{name}: a picture is a path, bytes, a file, a PIL image or a uint8 array, got {type(source).__name__}")


def load_images(
    source: object, *, dpi: float = 144, max_pixels: int = MAX_PIXELS, on_error: Literal["raise", "yield"] = "raise"
) -> Iterator[LoadedImage]:
    """The pictures of a file, a folder (sorted by name), a PDF (page by page), or of an iterable of these, one at a time.

    Nothing is read before it is asked for and nothing is kept.  on_error="yield" gives a bad picture as an item with its error and
    goes on; "raise" raises it.  A generator's own exceptions pass through.
    """
    if on_error not in ("raise", "yield"):
        raise InputError(f"on_error must be raise or yield, got {on_error!r}")
    if not (math.isfinite(dpi) and 1 <= dpi <= 2400):
        raise InputError(f"dpi must be 1 to 2400, got {dpi}")
    for name, load in _jobs(source, dpi, max_pixels):
        try:
            item = LoadedImage(name, load())
        except OptmemError as error:
            if on_error == "raise":
                raise
            item = LoadedImage(name, None, error)
        yield item
        del item  # so that the caller alone decides how long the pixels live


def printable(name: str) -> str:
    """A name as it may stand in a message: without folders, and escaped where it holds control characters."""
    last = name.replace("\\", "/").rstrip("/").rsplit("/", 1)[-1]
    return last if last.isprintable() else ascii(last)


# --- one picture --------------------------------------------------------------------------------------------------------------


def _name_of(source: object) -> str | None:
    given = source if isinstance(source, (str, os.PathLike)) else getattr(source, "name", None) or getattr(source, "filename", None)
    return os.fsdecode(given) if isinstance(given, (str, bytes, os.PathLike)) else None


def _open(path: Path, name: str) -> BinaryIO:
    try:
        return path.open("rb")
    except IsADirectoryError:
        raise ImageError(f"{name} is a folder, not a picture; load_images reads folders") from None
    except (OSError, ValueError) as error:  # ValueError: a NUL in the path
        reason = error.strerror if isinstance(error, OSError) and error.strerror else "not a path"
        raise SourceNotFoundError(f"{name} cannot be opened: {reason}") from None


def _read_all(file: BinaryIO, name: str) -> BinaryIO:
    try:
        data = file.read(MAX_FILE_BYTES + 1)
    except (OSError, ValueError) as error:
        raise ImageError(f"{name} cannot be read: {type(error).__name__}") from None
    if not isinstance(data, bytes):
        raise InputError(f"{name}: a file must be opened in binary mode, its read() gave {type(data).__name__}")
    return io.BytesIO(data)


def _read_file(file: BinaryIO, name: str, max_pixels: int) -> Pixels:
    size = file.seek(0, os.SEEK_END)
    if size > MAX_FILE_BYTES:
        raise ImageError(f"{name} has {size:,} bytes; at most {MAX_FILE_BYTES:,} are read")
    file.seek(0)
    head = file.read(16)
    file.seek(0)
    if head.startswith(b"%PDF-"):
        raise ImageError(f"{name} is a PDF: load_images gives its pages")
    reader = _reader(head)
    if reader is None:
        raise ImageError(f"{name} is not {FORMATS}; convert it to one of these")
    return _guarded(lambda: _from_picture(reader(file), name, max_pixels), name)


def _reader(head: bytes) -> Callable[[BinaryIO], Picture] | None:
    """The decoder for these first bytes.  Not Image.open: its limit on pixels is one for the whole process."""
    if head.startswith(b"\x89PNG\r\n\x1a\n"):
        return PngImagePlugin.PngImageFile
    if head.startswith(b"\xff\xd8\xff"):
        return JpegImagePlugin.JpegImageFile
    if head[:4] == b"RIFF" and head[8:12] == b"WEBP":
        return WebPImagePlugin.WebPImageFile
    return None


def _guarded(read: Callable[[], Pixels], name: str) -> Pixels:
    """Decoders raise nearly anything for a damaged file, with heap addresses and paths in it: one exception leaves here."""
    try:
        return read()
    except OptmemError:
        raise
    except MemoryError:
        raise ImageError(f"{name} does not fit into memory") from None
    except Exception:
        raise ImageError(f"{name} is damaged, incomplete or holds what {FORMATS} does not allow") from None


def check_size(height: int, width: int, name: str, max_pixels: int = MAX_PIXELS) -> None:
    """Raises ImageError for a picture without pixels, with too many, or with too long a side."""
    if height < 1 or width < 1:
        raise ImageError(f"{name} has no pixels: {width}x{height}")
    if max(height, width) > MAX_SIDE:
        raise ImageError(f"{name} is {width}x{height} pixels; a side may have at most {MAX_SIDE:,}")
    if height * width > max_pixels:
        raise ImageError(f"{name} is {width}x{height} pixels; at most {max_pixels:,} are read (max_pixels)")


def _from_picture(picture: Picture, name: str, max_pixels: int) -> Pixels:
    """A PIL image of any mode as pixels.  Nothing is decoded before the size is checked."""
    check_size(picture.height, picture.width, name, max_pixels)
    if getattr(picture, "is_animated", False):
        raise ImageError(f"{name} is an animation; save the frame that is meant as a picture of its own")
    picture = ImageOps.exif_transpose(picture)
    if picture.mode.startswith("I;16"):
        return _from_16_bits(picture)
    if picture.mode in ("I", "F"):
        raise ImageError(f"{name} has mode {picture.mode}, whose white is not known; scale it to 0 .. 255 and convert it to L")
    if picture.has_transparency_data:
        return _on_white(np.asarray(picture.convert("LA" if picture.mode in ("1", "L", "LA", "La") else "RGBA")))
    return np.array(picture.convert("L" if picture.mode in ("1", "L") else "RGB"))


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

Job = tuple[str, Callable[[], Pixels]]  # a name, and what loads it


def _jobs(source: object, dpi: float, max_pixels: int) -> Iterator[Job]:
    if isinstance(source, (str, os.PathLike)):
        yield from _path_jobs(Path(source), dpi, max_pixels)
    elif _is_picture(source):
        name = printable(_name_of(source) or "image 1")
        yield name, lambda: as_image(source, name=name, max_pixels=max_pixels)
    elif isinstance(source, Iterable):
        for number, item in enumerate(source, 1):
            yield from _item_jobs(item, number, dpi, max_pixels)
    else:
        raise InputError(f"pictures come from paths, folders, PDFs, arrays or iterables of these, got {type(source).__name__}")


def _item_jobs(item: object, number: int, dpi: float, max_pixels: int) -> Iterator[Job]:
    if isinstance(item, (str, os.PathLike)):
        yield from _path_jobs(Path(item), dpi, max_pixels)
    else:
        name = printable(_name_of(item) or f"image {number}")
        yield name, lambda: as_image(item, name=name, max_pixels=max_pixels)


def _is_picture(source: object) -> bool:
    if isinstance(source, (bytes, bytearray, memoryview, Picture, torch.Tensor, np.ndarray)):
        return True
    return callable(getattr(source, "image", None)) or callable(getattr(source, "read", None))


def _path_jobs(path: Path, dpi: float, max_pixels: int) -> Iterator[Job]:
    name = printable(path.name or str(path))
    try:
        is_folder = path.is_dir()
        files = sorted(child for child in path.iterdir() if child.suffix.lower() in SUFFIXES) if is_folder else [path]
    except (OSError, ValueError) as error:
        raise SourceNotFoundError(f"{name} cannot be opened: {type(error).__name__}") from None
    if is_folder and not files:
        raise SourceNotFoundError(f"{name} holds no file that ends in {', '.join(SUFFIXES)}")
    for file in files:
        if _is_pdf(file):
            yield from _pdf_jobs(file, dpi, max_pixels)
        else:
            yield printable(file.name), lambda file=file: as_image(file, max_pixels=max_pixels)  # type: ignore[misc]


def _is_pdf(path: Path) -> bool:
    try:
        with path.open("rb") as file:
            return file.read(5) == b"%PDF-"
    except (OSError, ValueError):
        return False  # as_image will say what is wrong


def _pdf_jobs(path: Path, dpi: float, max_pixels: int) -> Iterator[Job]:
    name = printable(path.name)
    pdfium = _pdfium(name)
    try:
        document = pdfium.PdfDocument(path)
        num_pages = len(document)
    except Exception:
        yield name, lambda: _refuse(f"{name} is damaged or encrypted, or not a PDF; remove the password or export it again")
        return
    try:
        for number in range(num_pages):
            page_name = f"{name} page {number + 1}"
            yield page_name, lambda i=number, said=page_name: _render(document, i, said, dpi, max_pixels)  # type: ignore[misc]
    finally:
        document.close()


def _refuse(message: str) -> Pixels:
    raise ImageError(message)


def _pdfium(name: str) -> ModuleType:
    try:
        import pypdfium2
    except ImportError:
        raise MissingDependencyError(f"{name} is a PDF, which needs pypdfium2: pip install 'optmem[pdf]'") from None
    return cast(ModuleType, pypdfium2)


def _render(document: object, number: int, name: str, dpi: float, max_pixels: int) -> Pixels:
    def render() -> Pixels:
        page = document[number]  # type: ignore[index]
        try:
            width, height = (math.ceil(points * dpi / 72) for points in page.get_size())
            check_size(height, width, name, max_pixels)
            bitmap = page.render(scale=dpi / 72, rev_byteorder=True)
            pixels = np.array(bitmap.to_numpy()[..., :3])  # out of PDFium's own memory
            bitmap.close()
            return pixels
        finally:
            page.close()

    try:
        return render()
    except OptmemError:
        raise
    except Exception:
        raise ImageError(f"{name} is damaged and cannot be drawn") from None
