"""Which checkpoint is meant, how sure its answers are, and which encoder made a page's vision tokens."""

from __future__ import annotations

import hashlib
import logging
import os
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Literal, get_args

import torch
from torch import Tensor

from optmem.errors import BackendError, CheckpointError, InputError, SourceNotFoundError
from optmem.files import checkpoint_folder, is_there, read_json
from optmem.machine import fast_dtype, require_e4m3
from optmem.model.config_json import CONFIG
from optmem.model.encoder import Encoder
from optmem.model.model import Model
from optmem.model.quantize import quantize, quantize_e4m3

log = logging.getLogger(__name__)
SHIPPED = ("nano",)
FIDELITY = "fidelity.json"
MAX_FIDELITY = 16 << 20  # bytes
COLDEST, HOTTEST = 0.01, 100.0
_ASSEMBLY = ("image_newline", "view_seperator")  # put among the tokens later: what is stored does not depend on them
Held = Literal["int8", "fp8"]
INT8, FP8 = get_args(Held)
_DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}


@dataclass(frozen=True, slots=True)
class Precision:
    """What a model is held as."""

    dtype: torch.dtype | None  # of activations and weights; None is what is stored
    held: Held | None = None  # the decoder's matrices; with fp8 the encoder's too


@dataclass(frozen=True, slots=True)
class Temperatures:
    """What logits are divided by before a probability is said, so that it is the share that is right.  1 is uncalibrated."""

    decoder: float = 1.0
    glance: float = 1.0


def find_checkpoint(name: str | os.PathLike[str]) -> Path:
    """The folder of a checkpoint: one that is shipped, by its name, or any folder in the hub layout.

    Raises SourceNotFoundError where there is none.
    """
    if name in SHIPPED:
        shipped = Path(str(files("optmem"))) / "checkpoints" / str(name)
        if not (shipped / CONFIG).is_file():
            raise SourceNotFoundError(
                f"this copy of optmem comes without the checkpoint {name!r}: train one (optmem train) and give its folder instead"
            )
        return shipped
    if not isinstance(name, str | os.PathLike):
        raise InputError(f"a checkpoint is a folder, or one that is shipped ({', '.join(SHIPPED)}), got {name!r}")
    if isinstance(name, str) and not is_there(name):
        raise SourceNotFoundError(
            f"there is no checkpoint {name[:200]!r}: give a folder, or one that is shipped: {', '.join(SHIPPED)}"
        )
    return checkpoint_folder(name)


def load_model(folder: Path, device: torch.device, dtype: torch.dtype | None = None) -> Model:
    """A model in this type, or as it is stored; where a CPU multiplies that in software, as fp32."""
    model = Model.load(folder, device=device, dtype=dtype)
    stored = model.decoder.dtype
    if dtype is not None or device.type != "cpu" or stored in (torch.float32, fast_dtype(device)):
        return model
    log.info("%s is stored as %s and held as fp32: this CPU has no products of that type", folder.name, stored)
    return Model.load(folder, device=device, dtype=torch.float32)


def read_temperatures(folder: Path, model: Model) -> Temperatures | None:
    """The constants of calibration beside a model's weights; None where there are none.

    Raises CheckpointError for absurd ones, and where they were measured on other weights.
    """
    if not (folder / FIDELITY).is_file():
        return None
    noted = read_json(folder, FIDELITY, limit=MAX_FIDELITY)
    found = noted.get("calibration")
    if found is None:
        return None
    is_known = model.decoder.dtype != torch.float16  # which rounds away what the comparison needs
    if "model" in noted and is_known and noted["model"] != fingerprint(model.weights()):
        raise CheckpointError(f"{FIDELITY} was measured on other weights: run `optmem eval` on these, or remove it")
    values = [found.get(f"{part}_temperature") for part in ("decoder", "glance")] if isinstance(found, dict) else []
    numbers = [value for value in values if isinstance(value, int | float) and not isinstance(value, bool)]
    checked = [float(value) for value in numbers if COLDEST <= value <= HOTTEST]  # and so not NaN, nor too large for a float
    if len(checked) != 2:
        wanted = f"decoder_temperature and glance_temperature, numbers from {COLDEST} to {HOTTEST}"
        raise CheckpointError(f"{FIDELITY}: calibration must have {wanted}, got {str(found)[:80]}")
    return Temperatures(*checked)


def choose_device(device: torch.device | str) -> torch.device:
    """ "auto" is a GPU where there is one.  Raises InputError for what is no device, BackendError for a GPU that is not here."""
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if device == "auto":
        return torch.device("cuda" if count else "cpu")
    try:
        chosen = torch.device(device)
    except (RuntimeError, TypeError):
        chosen = None
    if chosen is None or chosen.type not in ("cpu", "cuda"):
        raise InputError(f"device must be auto, cpu, cuda or cuda:<number>, got {device!r}")
    if chosen.type == "cuda" and (chosen.index or 0) >= count:
        raise BackendError(f"there is no device {device}: torch finds {count} GPUs here; use cpu")
    return chosen


def choose_precision(dtype: torch.dtype | str, device: torch.device) -> Precision:
    """What a name means on a device.

    Raises InputError for what is no such name, and for int8 on a GPU; BackendError for fp8 on a GPU without it.
    """
    if dtype == "auto":
        return Precision(None)
    if dtype == INT8:
        if device.type != "cpu":
            raise InputError(f"dtype int8 is for a CPU, not for {device}: give device='cpu', or another dtype")
        return Precision(fast_dtype(device), held=INT8)
    if dtype == FP8:
        require_e4m3(device)
        return Precision(fast_dtype(device), held=FP8)
    chosen = _DTYPES.get(dtype) if isinstance(dtype, str) else dtype
    if chosen not in _DTYPES.values():
        raise InputError(f"dtype must be auto, {', '.join(_DTYPES)}, {INT8} or {FP8}, got {dtype!r}")
    return Precision(chosen)


def quantize_model(model: Model, held: Held | None) -> None:
    """Hold its matrices so from now on."""
    if held == INT8:
        quantize(model.decoder)
    elif held == FP8:
        if model.decoder.lm_head.weight.device.type == "cpu":
            log.warning("fp8 on a CPU is served by plain torch, for proof and not for speed: many times slower than dtype='auto'")
        quantize_e4m3(model.encoder, model.decoder)


def fingerprint(weights: Mapping[str, Tensor]) -> str:
    """32 hexadecimal digits that two sets of weights share only where all are equal as bf16, whatever type they are held in."""
    digest = hashlib.sha256()
    for name, weight in sorted(weights.items()):
        digest.update(f"{name} {list(weight.shape)}\n".encode())
        digest.update(weight.detach().to("cpu", torch.bfloat16).contiguous().view(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()[:32]


def encoder_fingerprint(encoder: Encoder) -> str:
    """The same over all that vision tokens depend on.  Raises InputError where the encoder is quantised."""
    if encoder.is_quantized:
        raise InputError("a quantised encoder cannot be compared: give the engine the fingerprint of the weights it was made of")
    return fingerprint({name: weight for name, weight in encoder.named_parameters() if name not in _ASSEMBLY})
