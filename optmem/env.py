"""What this machine has and which code serves each operator: the answer to "what am I running?"."""

from __future__ import annotations

import logging
import os
import platform
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch

from optmem import ops
from optmem.machine import cpu_multiplies_bf16
from optmem.native import NativeModule, native
from optmem.ops import registry

# Of these the reference looks at its arguments on the host, and what waits for the host cannot be recorded.
WAITING = ("expert_mlp", "paged_attention", "rope_cache", "route")
PACKAGES = ("torch", "triton", "numpy", "pillow", "markdown-it-py", "pypdfium2", "flash-attn")


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _devices() -> list[dict[str, Any]]:
    devices: list[dict[str, Any]] = [{"device": "cpu", "cores": os.cpu_count(), "threads": torch.get_num_threads()}]
    devices[0]["products"] = "bf16 and fp32" if cpu_multiplies_bf16() else "fp32; models are held as such"
    for index in range(torch.cuda.device_count()):
        card = torch.cuda.get_device_properties(index)
        devices.append({"device": f"cuda:{index}", "name": card.name, "memory_gib": round(card.total_memory / 2**30, 1)})
    return devices


def _module(native_module: NativeModule) -> dict[str, Any]:
    row: dict[str, Any] = {"module": f"optmem.{native_module.name}", "built": native_module.module is not None}
    if native_module.module is None:
        row["reason"] = native_module.reason
    elif native_module.name == "_cpu":
        row["isa"] = native_module.module.isa()
    else:
        row["devices"] = native_module.module.device_count()
    return row


def _graphs(rows: Sequence[ops.Implementation]) -> dict[str, str]:
    """Whether a GPU's passes are recorded as CUDA graphs; the engine's log names those that were tried and could not be."""
    waiting = [row.operator for row in rows if row.device == "cuda" and row.operator in WAITING and row.name == "reference"]
    if not torch.cuda.is_available():
        return {"served_by": "plain calls", "reason": "no GPU"}
    if waiting:
        return {"served_by": "graphs of the encoder", "reason": f"no kernel yet for {', '.join(waiting)}, which decoding needs"}
    return {"served_by": "graphs", "reason": "a pass is recorded when its size comes for the second time"}


@contextmanager
def _quiet() -> Iterator[None]:
    """Without the warning that Triton is missing: the rows of the operators say so, and without a GPU it is no matter."""
    log = logging.getLogger(registry.__name__)
    before, log.disabled = log.disabled, True
    try:
        yield
    finally:
        log.disabled = before


def report(*, all_devices: bool = False) -> dict[str, Any]:
    """Versions, devices, native modules and the implementation behind every operator, as plain data.

    Operators are listed for the devices of this machine, or for all devices that have an implementation.
    """
    with _quiet():
        rows = ops.implementations()
    return {
        "optmem": _version("optmem"),
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}",
        "packages": {name: _version(name) for name in PACKAGES},
        "devices": _devices(),
        "native": [_module(native("_cpu")), _module(native("_cuda"))],
        "graphs": _graphs(rows),
        "operators": [
            {"operator": row.operator, "device": row.device, "implementation": row.name, "reason": row.reason}
            for row in rows
            if row.device != "cuda" or torch.cuda.is_available() or all_devices
        ],
    }


def describe(facts: dict[str, Any]) -> str:
    """The report as lines for a terminal."""
    lines = [f"optmem {facts['optmem'] or '(not installed)'}, Python {facts['python']}, {facts['system']}", ""]
    lines += [f"  {name:16} {found or 'not installed'}" for name, found in facts["packages"].items()]
    lines.append("")
    for row in (*facts["devices"], *facts["native"]):
        (_, name), *rest = row.items()
        lines.append(f"  {name:16} " + ", ".join(f"{key} {value}" for key, value in rest))
    lines.append(f"  {'passes':16} {facts['graphs']['served_by']}: {facts['graphs']['reason']}")
    lines += ["", f"  {'operator':16} {'device':7} {'served by':10} why"]
    lines += [f"  {row['operator']:16} {row['device']:7} {row['implementation']:10} {row['reason']}" for row in facts["operators"]]
    return "\n".join(lines)
