"""Optical memory for language models: text as pages, pages as vision tokens, tokens read back on demand."""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from optmem.engine import Completion, Engine, Glanced, VisionTokens, document_text
    from optmem.errors import OptmemError
    from optmem.memory.memory import Memory
    from optmem.pages import Page, paginate
else:
    _HOMES = dict.fromkeys(("Completion", "Engine", "Glanced", "VisionTokens", "document_text"), "optmem.engine")
    _HOMES |= {"OptmemError": "optmem.errors", "Page": "optmem.pages", "paginate": "optmem.pages"}
    _HOMES |= {"Memory": "optmem.memory.memory"}

    def __getattr__(name: str) -> object:
        """A public name, imported when it is first asked for: torch takes seconds, in which the command line must hear Ctrl-C."""
        if name in ("engine", "errors", "pages"):  # as `import optmem` has always brought them
            return import_module(f"optmem.{name}")
        if name not in _HOMES:
            raise AttributeError(f"module 'optmem' has no attribute {name!r}")
        globals()[name] = getattr(import_module(_HOMES[name]), name)
        return globals()[name]

    def __dir__() -> list[str]:
        return sorted({*globals(), *_HOMES})


__all__ = ["Completion", "Engine", "Glanced", "Memory", "OptmemError", "Page", "VisionTokens", "document_text", "paginate"]
__version__ = "0.1.0"
