"""Checkpoints: a folder with config.json, a tokenizer, and weights in safetensors files under their original names.

    verify(folder)             everything that is wrong with it, found without loading a weight
    load_weights(folder, ...)  the weights, straight to their type and device; memory is that of the weights and a few chunks
    save_pretrained(...)       the same layout back; the folder appears complete, or not at all

Weights are read by position and never mapped (see tensor_file.py).  Whatever could run code (pickle, .npy of objects) is refused
unopened.
"""

from __future__ import annotations

import json
import os
import re
import secrets
import shutil
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor

from optmem.errors import CheckpointError, InputError, SourceNotFoundError
from optmem.files import checkpoint_folder, open_inside, read_json
from optmem.machine import empty_weight
from optmem.model.config import ModelConfig
from optmem.model.config_json import CONFIG, check_config, read_config, write_config
from optmem.model.layout import expected_tensors, packed_tensors, stored_view
from optmem.model.tensor_file import Entry, all_finite, read_header, read_tensor, write_file
from optmem.text.tokenizer import IMAGE, Tokenizer, has_tokenizer, load_tokenizer

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
MAX_INDEX = 16 << 20  # bytes
MAX_SHARDS = 4096
MAX_SHARD_BYTES = 32 << 30  # one file for every model of the family, as the public ones have it

_SHARD_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,200}\.safetensors")
_FLOATS = (torch.bfloat16, torch.float16, torch.float32)
_READERS = min(os.cpu_count() or 1, 8)  # threads; reading and checking both release the interpreter
_REFUSED = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle", ".npy", ".npz", ".msgpack", ".h5", ".onnx")
_SHOWN = 5  # problems in one message


T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Stored:
    """One tensor of a checkpoint and the file it lies in."""

    shard: str
    entry: Entry


# --- reading ------------------------------------------------------------------------------------------------------------------


def verify(folder: str | os.PathLike[str]) -> list[str]:
    """Everything that is wrong with a checkpoint, in sentences; empty where it can be loaded.

    Reads config.json, the tokenizer where there is one, and the headers, no weight.  What only the weights show (NaN) is found by
    load_weights.  Weights of several types are named, though load_weights takes them where it is told a type.
    Raises SourceNotFoundError where there is no such folder.
    """
    path = checkpoint_folder(folder)
    problems: list[str] = []
    with ExitStack() as stack:
        stored = _attempt(problems, lambda: _stored_tensors(path, _open_shards(path, stack)))
    config = _attempt(problems, lambda: read_config(path))
    if config is not None:
        tokenizer = _attempt(problems, lambda: load_tokenizer(path)) if has_tokenizer(path) else None
        if tokenizer is not None:
            problems += _tokenizer_problems(tokenizer, config)
        if stored is not None:
            problems += _tensor_problems(stored, config) + _type_problems(stored, config)
    return problems


def load_weights(
    folder: str | os.PathLike[str], config: ModelConfig, *, device: torch.device | str = "cpu", dtype: torch.dtype | None = None
) -> dict[str, Tensor]:
    """Every weight of the model, by name; the experts of a layer as two tensors (see layout.py).

    dtype   torch.bfloat16, float16 or float32; None keeps what is stored, which then must be one type

    Raises CheckpointError before anything is allocated where names, shapes or types are not those of ``config``, and while
    reading where a value is not finite.
    """
    if dtype is not None and dtype not in _FLOATS:
        raise InputError(f"weights can be loaded as bfloat16, float16 or float32, not as {dtype}")
    check_config(config)
    path = checkpoint_folder(folder)
    with ExitStack() as stack:
        descriptors = _open_shards(path, stack)
        stored = _stored_tensors(path, descriptors)
        _raise_first(_tensor_problems(stored, config) + (_type_problems(stored, config) if dtype is None else []))
        kept = dtype or next(iter(stored.values())).entry.dtype
        weights = {name: empty_weight(shape, kept, device) for name, shape in packed_tensors(config).items()}
        _read_all(stored, weights, descriptors)
    return weights


def _read_all(stored: Mapping[str, Stored], weights: Mapping[str, Tensor], descriptors: Mapping[str, int]) -> None:
    def read(name: str) -> None:
        source = stored[name]
        read_tensor(descriptors[source.shard], source.entry, stored_view(weights, name), f"{source.shard}: tensor {name}")

    pool = ThreadPoolExecutor(_READERS)
    try:
        for _ in pool.map(read, stored):  # in the order of their bytes; raises what the first failure raised
            pass
    finally:
        pool.shutdown(cancel_futures=True)


def _open_shards(folder: Path, stack: ExitStack) -> dict[str, int]:
    """A descriptor for every file of weights, by name; the same ones that are checked are read."""
    return {name: stack.enter_context(open_inside(folder, name)) for name in _shard_names(folder)}


def _shard_names(folder: Path) -> list[str]:
    files = {item.name for item in folder.iterdir()}
    if INDEX in files:
        if SINGLE in files:
            raise CheckpointError(f"the folder has both {SINGLE} and {INDEX}: keep the one that belongs to this model")
        return sorted(set(_weight_map(folder).values()))
    single = [name for name in sorted(files) if _SHARD_NAME.fullmatch(name)]
    if len(single) == 1:
        return single
    if single:
        raise CheckpointError(f"the folder has {len(single)} safetensors files and no {INDEX} that says which belong together")
    refused = [name for name in sorted(files) if name.endswith(_REFUSED)]
    if refused:
        raise CheckpointError(f"{refused[0]!r} is not opened: such files can run code or hide objects; convert it to safetensors")
    raise CheckpointError(f"the folder has no weights: neither {SINGLE} nor {INDEX}")


def _weight_map(folder: Path) -> dict[str, str]:
    """The index: which file each tensor lies in."""
    mapped = read_json(folder, INDEX, limit=MAX_INDEX).get("weight_map")
    if not isinstance(mapped, dict) or not mapped:
        raise CheckpointError(f"{INDEX} has no weight_map")
    for shard in mapped.values():
        if not isinstance(shard, str) or not _SHARD_NAME.fullmatch(shard):
            raise CheckpointError(f"{INDEX} names {str(shard)[:80]!r}, which is not the plain name of a safetensors file")
    if len(set(mapped.values())) > MAX_SHARDS:
        raise CheckpointError(f"{INDEX} names more than {MAX_SHARDS:,} files")
    return mapped


def _stored_tensors(folder: Path, descriptors: Mapping[str, int]) -> dict[str, Stored]:
    """Every tensor of the checkpoint, file by file in the order of their bytes; the index must agree with the files."""
    stored: dict[str, Stored] = {}
    for shard, descriptor in descriptors.items():
        for name, entry in read_header(descriptor, shard).tensors.items():
            if name in stored:
                raise CheckpointError(f"tensor {name[:200]!r} lies in two files, {stored[name].shard} and {shard}")
            stored[name] = Stored(shard, entry)
    if (folder / INDEX).exists():
        mapped = _weight_map(folder)
        wrong = [name for name in mapped.keys() | stored.keys() if name not in stored or mapped.get(name) != stored[name].shard]
        if wrong:
            raise CheckpointError(f"{INDEX} and the files disagree about {len(wrong)} tensors, among them {min(wrong)[:200]!r}")
    return stored


def _tensor_problems(stored: Mapping[str, Stored], config: ModelConfig) -> list[str]:
    """Missing, unknown and mis-shaped tensors, and those that hold no weights."""
    expected = expected_tensors(config)
    problems = [f"tensor {name} is missing" for name in expected if name not in stored]
    problems += [f"tensor {name[:200]!r} is not one of a {config.family} model" for name in stored if name not in expected]
    for name, shape in expected.items():
        if name not in stored:
            continue
        entry = stored[name].entry
        if entry.shape != shape:
            problems.append(f"tensor {name} has the shape {list(entry.shape)}, config.json makes it {list(shape)}")
        if entry.dtype not in _FLOATS:
            problems.append(f"tensor {name} holds {_type_name(entry.dtype)}, weights are BF16, F16 or F32")
    return problems


def _type_problems(stored: Mapping[str, Stored], config: ModelConfig) -> list[str]:
    """A model computes in one type: with its vectors in another than its matrices it would fail at the first page."""
    types: dict[torch.dtype, list[str]] = {}
    for name in expected_tensors(config):
        if name in stored and stored[name].entry.dtype in _FLOATS:
            types.setdefault(stored[name].entry.dtype, []).append(name)
    if len(types) < 2:
        return []
    fewest = min(types, key=lambda dtype: len(types[dtype]))
    named = " and ".join(sorted(map(_type_name, types)))
    return [f"the tensors hold {named}, {_type_name(fewest)} among them {types[fewest][0]}: load them as one type (dtype)"]


def _type_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _tokenizer_problems(tokenizer: Tokenizer, config: ModelConfig) -> list[str]:
    problems = []
    if tokenizer.vocab_size > config.decoder.vocab_size:
        problems.append(f"the tokenizer has ids up to {tokenizer.vocab_size - 1}, the model {config.decoder.vocab_size} rows")
    for field, special in {"bos_token_id": config.bos_id, "eos_token_id": config.eos_id}.items():
        if special not in tokenizer.special_ids:
            problems.append(f"{field} is {special}, which is no special token of the tokenizer")
    if config.image_id not in tokenizer.special_ids or tokenizer.token_bytes(config.image_id) != IMAGE.encode():
        problems.append(f"the model takes {config.image_id} for {IMAGE}, the tokenizer does not")
    return problems


def check_tokenizer(tokenizer: Tokenizer, config: ModelConfig) -> None:
    """Refuse a tokenizer that belongs to another model."""
    _raise_first(_tokenizer_problems(tokenizer, config))


def _attempt(problems: list[str], step: Callable[[], T]) -> T | None:
    """What the step returns, or None and one problem more."""
    try:
        return step()
    except (CheckpointError, SourceNotFoundError) as error:
        problems.append(str(error))
        return None


def _raise_first(problems: list[str]) -> None:
    if problems:
        more = f"; and {len(problems) - _SHOWN} more" if len(problems) > _SHOWN else ""
        raise CheckpointError("; ".join(problems[:_SHOWN]) + more)


# --- writing ------------------------------------------------------------------------------------------------------------------


def save_pretrained(
    folder: str | os.PathLike[str],
    config: ModelConfig,
    weights: Mapping[str, Tensor],
    *,
    files: Mapping[str, bytes] | None = None,
    max_shard_bytes: int = MAX_SHARD_BYTES,
) -> None:
    """Write a checkpoint that load_weights reads back bit for bit, durably.

    folder    must not exist, or be empty: it is made beside its final place and appears there complete, by one rename
    weights   as load_weights returns them
    files     what else belongs to the model, such as tokenizer.json, by plain name

    Raises InputError where the folder holds something, or the weights are not those of ``config``, not of one type or not finite.
    """
    target = Path(folder).absolute()
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise InputError(f"{target.name!r} exists already: save to a new folder, so that no checkpoint is ever half replaced")
    _check_for_saving(config, weights, files or {})
    target.parent.mkdir(parents=True, exist_ok=True)
    with _appearing(target) as unfinished:
        _write_shards(unfinished, config, weights, max_shard_bytes)
        for name, content in (files or {}).items():
            _write_durably(unfinished / name, content)
        # Last: without its config.json not even the unfinished folder could be taken for a checkpoint.
        write_config(unfinished, config, _type_name(weights["model.embed_tokens.weight"].dtype))


@contextmanager
def _appearing(target: Path) -> Iterator[Path]:
    """A new folder that takes the target's name when the block is left, and vanishes where the block fails."""
    unfinished = target.parent / f".{target.name}.{secrets.token_hex(4)}.unfinished"
    unfinished.mkdir()
    try:
        yield unfinished
        _sync_folder(unfinished)
        unfinished.rename(target)
    except BaseException:
        shutil.rmtree(unfinished, ignore_errors=True)
        raise
    _sync_folder(target.parent)


def _check_for_saving(config: ModelConfig, weights: Mapping[str, Tensor], files: Mapping[str, bytes]) -> None:
    check_config(config)
    wanted = packed_tensors(config)
    wrong = wanted.keys() ^ weights.keys()
    wrong |= {name for name in wanted.keys() & weights.keys() if tuple(weights[name].shape) != wanted[name]}
    wrong |= {name for name in wanted.keys() & weights.keys() if weights[name].dtype not in _FLOATS}
    if wrong:
        raise InputError(f"{len(wrong)} tensors are not those of this config, among them {min(wrong)!r}")
    types = sorted({_type_name(tensor.dtype) for tensor in weights.values()})
    if len(types) > 1:
        raise InputError(f"the tensors hold {' and '.join(types)}, a checkpoint is of one type")
    infinite = [name for name, tensor in weights.items() if not all_finite(tensor)]
    if infinite:
        raise InputError(f"{len(infinite)} tensors hold NaN or infinite values, among them {infinite[0]!r}: nothing was saved")
    for name in files:
        if Path(name).name != name or name in ("", ".", "..", CONFIG, INDEX) or name.endswith(".safetensors"):
            raise InputError(f"{name!r} is not a plain file name, or one that the checkpoint itself needs")


def _write_shards(folder: Path, config: ModelConfig, weights: Mapping[str, Tensor], max_bytes: int) -> None:
    """Files of at most ``max_bytes`` (or one tensor), and the index, named as the public ones are."""
    shards: list[dict[str, Tensor]] = []
    room = total = 0
    for name in expected_tensors(config):
        tensor = stored_view(weights, name)
        size = tensor.numel() * tensor.element_size()
        if not shards or size > room:
            shards.append({})
            room = max_bytes
        shards[-1][name] = tensor
        room, total = room - size, total + size
    weight_map = {}
    for number, tensors in enumerate(shards, 1):
        shard = f"model-{number:05d}-of-{len(shards):06d}.safetensors"
        write_file(folder / shard, tensors, {"format": "pt"})
        weight_map.update(dict.fromkeys(tensors, shard))
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    _write_durably(folder / INDEX, json.dumps(index, indent=2).encode())


def _write_durably(path: Path, content: bytes) -> None:
    with path.open("xb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
