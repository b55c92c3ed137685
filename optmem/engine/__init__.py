"""The engine: pictures to vision tokens, vision tokens to text.  One loop reads for all who ask."""

from optmem.engine.engine import Engine
from optmem.engine.result import Attempt, Completion, Glanced, document_text
from optmem.engine.vision_tokens import VisionTokens

__all__ = ["Attempt", "Completion", "Engine", "Glanced", "VisionTokens", "document_text"]
