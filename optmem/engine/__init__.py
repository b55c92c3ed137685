"""The engine: pictures to vision tokens, vision tokens to text.  For nano; the scheduler that serves all families is to come."""

from optmem.engine.engine import Engine
from optmem.engine.result import Attempt, Completion, Glanced, document_text
from optmem.engine.vision_tokens import VisionTokens

__all__ = ["Attempt", "Completion", "Engine", "Glanced", "VisionTokens", "document_text"]
