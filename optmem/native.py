"""The compiled modules, and why one is not here."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from importlib import import_module
from types import ModuleType
from typing import Literal

from optmem.errors import BackendError

ModuleName = Literal["_cpu", "_cuda"]


@dataclass(frozen=True, slots=True)
class NativeModule:
    """A compiled module, or the reason for its absence."""

    name: str
    module: ModuleType | None
    reason: str

    def require(self) -> ModuleType:
        """The module; raises BackendError where it is not built."""
        if self.module is None:
            raise BackendError(f"optmem.{self.name} is not here ({self.reason}); build it with `make build` or reinstall optmem")
        return self.module


@cache
def native(name: ModuleName) -> NativeModule:
    """Imports optmem._cpu or optmem._cuda once.  A missing module is a fact to report, not an error yet."""
    try:
        module = import_module(f"optmem.{name}")
    except ImportError as error:
        return NativeModule(name, None, str(error) or "not built")
    return NativeModule(name, module, "built")
