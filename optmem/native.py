"""The compiled modules, and why one is not here."""

from __future__ import annotations

import logging
import re
from dataclasses import dataclass
from functools import cache
from importlib import import_module
from types import ModuleType
from typing import Literal

from optmem.errors import BackendError, InputError

log = logging.getLogger(__name__)
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
        reason = re.sub(r"\S*/", "", str(error)) or "not built"  # no paths of this machine
        if name == "_cpu":
            log.warning("optmem._cpu is not here (%s): slow plain torch serves its operators", reason)
        return NativeModule(name, None, reason)
    if name == "_cpu":
        _check_isa(module)
    return NativeModule(name, module, "built")


def _check_isa(cpu: ModuleType) -> None:
    """OPTMEM_ISA is read at first use; a value that this machine cannot have is the user's to mend, not to be passed over."""
    try:
        cpu.isa()
    except ValueError as error:
        raise InputError(f"OPTMEM_ISA: {error}") from None
