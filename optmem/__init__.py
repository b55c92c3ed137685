"""Optical memory for language models: text as pages, pages as vision tokens, tokens read back on demand."""

from optmem.errors import OptmemError
from optmem.pages import Page, paginate

__all__ = ["OptmemError", "Page", "paginate"]
__version__ = "0.1.0"
