"""Optical memory for language models: text as pages, pages as vision tokens, tokens read back on demand."""

from optmem.engine import Completion, Engine, Glanced, VisionTokens, document_text
from optmem.errors import OptmemError
from optmem.pages import Page, paginate

__all__ = ["Completion", "Engine", "Glanced", "OptmemError", "Page", "VisionTokens", "document_text", "paginate"]
__version__ = "0.1.0"
