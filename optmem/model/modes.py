"""The modes that a model was trained with, from its configuration."""

from __future__ import annotations

from optmem.model.config import ModelConfig
from optmem.pixels import MODES, Mode


def modes_of(config: ModelConfig) -> dict[str, Mode]:
    """Modes by name: the single views of V1 and UL and their tiled one, or V2's only one."""
    name = "gundam" if config.has_newlines else "ocr2"
    tiled = Mode(name, config.base_side, config.tile_side, config.max_tiles, config.tile_side, config.has_newlines)
    if not config.has_newlines:
        return {name: tiled}
    single = {name: mode for name, mode in MODES.items() if mode.has_newlines and not mode.is_tiled}
    return single | {name: tiled}
