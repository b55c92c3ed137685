"""The modes that a model was trained with, from its configuration."""

from __future__ import annotations

from optmem.model.config import ModelConfig
from optmem.pixels import MODES, Mode


def modes_of(config: ModelConfig) -> dict[str, Mode]:
    """Modes by name: the single views of V1 and UL and their tiled one, or V2's only one."""
    tiles = {"tile_size": config.tile_side, "max_tiles": config.max_tiles, "tile_above": config.tile_side}
    if not config.has_newlines:
        return {"ocr2": Mode("ocr2", config.base_side, has_newlines=False, **tiles)}
    single = {name: mode for name, mode in MODES.items() if mode.has_newlines and not mode.is_tiled}
    return single | {"gundam": Mode("gundam", config.base_side, **tiles)}
