"""What is kept of a picture: its vision tokens, which encoder made them, and the file they travel in.

The file is safetensors: one tensor `features`, and in the metadata `format`, `mode` and `grid` as JSON, `encoder`, and `picture`
where the picture's size is known.  As int8 the features are whole numbers from -127 to 127, and `scales`, fp32 [n], says how much
one of them is in each row: half the size of bf16, and off by at most half a scale.
"""

from __future__ import annotations

import json
import os
import re
import secrets
from contextlib import suppress
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path

import torch
from torch import Tensor

from optmem.errors import CheckpointError, InputError, OutputError
from optmem.files import open_inside, parse_json
from optmem.model.tensor_file import Entry, all_finite, file_bytes, read_header, read_tensor, write_file
from optmem.pixels import NO_TILES, Grid, Mode

FORMAT = "optmem vision tokens 1"
FEATURES, SCALES = "features", "scales"
MAX_TOKENS = 1 << 16  # of one picture; 1,156 are the most that a public mode has
_FINGERPRINT = re.compile(r"[0-9a-f]{32}")
LARGEST = 65504.0  # fp16's: what is larger, no encoder made, and norms over it are infinite
_FLOATS = (torch.bfloat16, torch.float16, torch.float32)
_NAMES = {"format", "mode", "grid", "encoder"}


@dataclass(frozen=True, slots=True, eq=False)
class VisionTokens:
    """One picture's vision tokens, before newlines and separator are put among them."""

    features: Tensor = field(repr=False)  # [mode.paper_tokens(grid), hidden]: tiles row by row, then the global view
    mode: Mode
    grid: Grid
    encoder: str  # fingerprint of the encoder that made them, 32 hexadecimal digits
    picture: tuple[int, int] | None = None  # width and height in pixels, as it came: boxes are in these

    def __post_init__(self) -> None:
        parts: dict[type, object] = {Tensor: self.features, Mode: self.mode, str: self.encoder}
        for kind, value in parts.items():
            if not isinstance(value, kind):
                raise InputError(f"vision tokens need features, a mode and an encoder's fingerprint, got {type(value).__name__}")
        if not (_is_pair(self.grid) and min(self.grid) >= 0):
            raise InputError(f"a grid has a number of columns and one of rows, got {str(self.grid)[:80]}")
        wanted = self.mode.paper_tokens(self.grid)
        if self.features.dim() != 2 or self.features.shape[0] != wanted:
            columns, rows = self.grid
            given = list(self.features.shape)
            raise InputError(f"mode {self.mode.name} with {columns}x{rows} tiles has [{wanted}, hidden] features, got {given}")
        if self.features.layout != torch.strided or self.features.dtype not in _FLOATS:
            raise InputError(f"features must be dense bfloat16, float16 or float32, got {self.features.dtype}")
        if not _FINGERPRINT.fullmatch(self.encoder):
            raise InputError(f"an encoder's fingerprint is 32 hexadecimal digits, got {self.encoder[:80]!r}")
        if self.picture is not None and not (_is_pair(self.picture) and min(self.picture) > 0):
            raise InputError(f"a picture has a width and a height of at least one pixel, got {str(self.picture)[:80]}")

    @property
    def hidden(self) -> int:
        """Width of a token."""
        return self.features.shape[1]

    @property
    def tiles(self) -> int:
        """How many tiles the picture was cut into besides its global view."""
        return 0 if self.grid == NO_TILES else self.grid[0] * self.grid[1]

    @property
    def fed_tokens(self) -> int:
        """What they cost a decoder, newlines and separator counted."""
        return self.mode.fed_tokens(self.grid)

    def check_fits(self, hidden: int, encoder: str) -> None:
        """Raises InputError where a decoder of this width, trained with this encoder, cannot read them, or they are not sane."""
        if self.hidden != hidden:
            raise InputError(f"these vision tokens are {self.hidden} wide, this model's are {hidden}: they are of another model")
        if self.encoder != encoder:
            raise InputError(
                f"these vision tokens are of the encoder {self.encoder[:8]}, this model has {encoder[:8]}: encode the picture again"
            )
        self._check_finite()
        if self.features.numel() and self.features.abs().max() > LARGEST:
            raise InputError(f"these vision tokens hold values above {LARGEST:g}, as no encoder makes: encode the picture again")

    def _check_finite(self) -> None:
        if not all_finite(self.features):
            raise InputError("these vision tokens hold NaN or infinite values: encode the picture again")

    def save(self, path: str | os.PathLike[str], *, int8: bool = False) -> None:
        """Write them to a file, which appears complete or not at all; one that is there is replaced.

        int8   a byte a number and a scale a row: half of bf16's size

        Raises OutputError where it cannot be written, InputError for no name, and for values that could not be read back.
        """
        target = _as_path(path)
        if not target.name or "\0" in target.name:
            raise OutputError(f"{str(path)!r} is no name of a file to write vision tokens to")
        tensors, metadata = self._content(int8=int8)
        unfinished = target.with_name(f".{secrets.token_hex(8)}.unfinished")
        try:
            write_file(unfinished, tensors, metadata)
            unfinished.replace(target)
        except OSError as error:
            raise OutputError(f"cannot write {target.name}: {error.strerror or error}") from None
        finally:
            with suppress(OSError):
                unfinished.unlink(missing_ok=True)

    def to_bytes(self, *, int8: bool = False) -> bytes:
        """What `save` writes to a file.  Raises InputError as it does."""
        return file_bytes(*self._content(int8=int8))

    def _content(self, *, int8: bool) -> tuple[dict[str, Tensor], dict[str, str]]:
        self._check_finite()
        metadata = {"format": FORMAT, "mode": json.dumps(asdict(self.mode)), "grid": json.dumps(self.grid), "encoder": self.encoder}
        if self.picture is not None:
            metadata["picture"] = json.dumps(self.picture)
        return _as_int8(self.features) if int8 else {FEATURES: self.features}, metadata

    @classmethod
    def load(cls, path: str | os.PathLike[str], *, device: torch.device | str = "cpu") -> VisionTokens:
        """The tokens in a file.  Raises SourceNotFoundError where there is none, CheckpointError where it is damaged or holds
        something else, NaN included: nothing is allocated before its header is checked."""
        source = _as_path(path)
        with open_inside(source.parent.resolve(), source.name) as descriptor:
            return cls._from_file(descriptor, source.name, device)

    @classmethod
    def from_bytes(cls, content: bytes, *, name: str = "vision tokens", device: torch.device | str = "cpu") -> VisionTokens:
        """The tokens in what `to_bytes` gave.  Raises CheckpointError as `load` does."""
        descriptor = os.memfd_create("vision tokens", os.MFD_CLOEXEC)  # a file that no disk sees
        try:
            rest = memoryview(content)
            while rest:
                rest = rest[os.write(descriptor, rest) :]
            return cls._from_file(descriptor, name, device)
        finally:
            os.close(descriptor)

    @classmethod
    def _from_file(cls, descriptor: int, name: str, device: torch.device | str) -> VisionTokens:
        header = read_header(descriptor, name)
        mode, grid, encoder, picture = _read_metadata(header.metadata, name)
        entry = header.tensors.get(FEATURES)
        is_int8 = entry is not None and entry.dtype == torch.int8
        names = {FEATURES, SCALES} if is_int8 else {FEATURES}
        if entry is None or header.tensors.keys() != names:
            wanted = " and ".join(map(repr, sorted(names)))
            raise CheckpointError(f"{name} must hold {wanted}, got {_shown(list(header.tensors))}")
        if not (is_int8 or entry.dtype in _FLOATS) or len(entry.shape) != 2:
            given = list(entry.shape)
            raise CheckpointError(f"{name}: features must be [n, hidden] of bf16, fp16, fp32 or int8, got {given}")
        if entry.shape[0] != mode.paper_tokens(grid):
            wanted = f"{mode.paper_tokens(grid)}, as mode {mode.name} has"
            raise CheckpointError(f"{name}: the number of tokens must be {wanted}, got {entry.shape[0]}")
        features = _read(descriptor, entry, name, device)
        if is_int8:
            features *= _read_scales(descriptor, header.tensors[SCALES], entry, name, device)[:, None]
        return cls(features, mode, grid, encoder, picture)


def _as_path(given: object) -> Path:
    """Raises InputError for what is no name of a file."""
    if not isinstance(given, str | os.PathLike):
        raise InputError(f"vision tokens are in a file, whose name is a str or a Path, got {type(given).__name__}")
    return Path(given)


def _is_pair(given: object) -> bool:
    return isinstance(given, tuple) and len(given) == 2 and all(type(number) is int for number in given)


def _as_int8(features: Tensor) -> dict[str, Tensor]:
    """Whole numbers and what one of them is in each row.  Raises InputError for what no encoder makes."""
    wide = features.float()
    if wide.numel() and wide.abs().max() > LARGEST:
        raise InputError(f"these vision tokens hold values above {LARGEST:g}, as no encoder makes: they have no place in int8")
    scales = (wide.abs().amax(1) / 127).clamp(min=torch.finfo(torch.float32).tiny)
    return {FEATURES: (wide / scales[:, None]).round().to(torch.int8), SCALES: scales}


def _read(descriptor: int, entry: Entry, where: str, device: torch.device | str) -> Tensor:
    """A tensor of the file; whole numbers as fp32."""
    dtype = entry.dtype if entry.dtype.is_floating_point else torch.float32
    found = torch.empty(entry.shape, dtype=dtype, device=device)
    read_tensor(descriptor, entry, found, where)
    return found


def _read_scales(descriptor: int, entry: Entry, features: Entry, where: str, device: torch.device | str) -> Tensor:
    """fp32 [n].  Raises CheckpointError for others, and for such as no features have."""
    if entry.dtype != torch.float32 or entry.shape != features.shape[:1]:
        wanted = f"fp32 [{features.shape[0]}]"
        raise CheckpointError(f"{where}: scales must be {wanted}, got {entry.dtype} {list(entry.shape)}")
    scales = _read(descriptor, entry, where, device)
    if not bool(((scales > 0) & (scales <= LARGEST / 127)).all()):
        raise CheckpointError(f"{where}: scales must be above 0 and at most {LARGEST / 127:g}")
    return scales


def _shown(names: list[str]) -> str:
    return ", ".join(repr(name[:40]) for name in names[:3]) or "none"


def _read_metadata(metadata: dict[str, str], where: str) -> tuple[Mode, Grid, str, tuple[int, int] | None]:
    """Mode, grid, fingerprint and the picture's size.  Raises CheckpointError."""
    if metadata.get("format") != FORMAT:
        raise CheckpointError(f"{where} is not a file of vision tokens: its format is {metadata.get('format', 'not said')[:80]!r}")
    if metadata.keys() - {"picture"} != _NAMES:
        raise CheckpointError(f"{where}: the metadata must be exactly {', '.join(sorted(_NAMES))}, got {_shown(list(metadata))}")
    mode = _read_mode(parse_json(metadata["mode"].encode("utf-8", "replace"), f"{where}: mode"), where)
    grid = re.fullmatch(r"\[([1-9][0-9]?), ([1-9][0-9]?)\]", metadata["grid"])
    if grid is None:
        raise CheckpointError(f"{where}: grid must be [columns, rows], got {metadata['grid'][:80]!r}")
    if not _FINGERPRINT.fullmatch(metadata["encoder"]):
        raise CheckpointError(f"{where}: encoder must be 32 hexadecimal digits, got {metadata['encoder'][:80]!r}")
    size = re.fullmatch(r"\[([1-9][0-9]{0,6}), ([1-9][0-9]{0,6})\]", metadata.get("picture", "[1, 1]"))
    if size is None:
        raise CheckpointError(f"{where}: picture must be [width, height], got {metadata['picture'][:80]!r}")
    columns, rows = int(grid[1]), int(grid[2])
    try:
        tokens = mode.paper_tokens((columns, rows))
    except InputError as error:
        raise CheckpointError(f"{where}: {error}") from None
    if tokens > MAX_TOKENS:
        raise CheckpointError(f"{where}: {tokens:,} tokens are more than any picture has ({MAX_TOKENS:,})")
    return mode, (columns, rows), metadata["encoder"], (int(size[1]), int(size[2])) if "picture" in metadata else None


def _read_mode(found: dict[str, object], where: str) -> Mode:
    types = {each.name: {"str": str, "bool": bool}.get(str(each.type), int) for each in fields(Mode)}
    if {name: type(value) for name, value in found.items()} != types:
        raise CheckpointError(f"{where}: mode must have exactly {', '.join(types)}, each of its type, got {_shown(list(found))}")
    try:
        return Mode(**found)  # type: ignore[arg-type]
    except InputError as error:
        raise CheckpointError(f"{where}: {error}") from None
