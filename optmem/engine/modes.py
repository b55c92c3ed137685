"""Which mode a picture is shown in."""

from __future__ import annotations

from optmem.errors import InputError
from optmem.model.config import ModelConfig
from optmem.model.modes import modes_of
from optmem.pixels import MODES, PIXELS_PER_TOKEN, Mode, find_mode


def choose_mode(config: ModelConfig, mode: Mode | str | None, height: int, width: int) -> Mode:
    """The mode of a picture of this size: the one asked for, or the view that has the picture's own size.

    Raises InputError where the model has no such mode, or the picture is not of the size of a view.
    """
    if mode is None:
        return _own(config, height, width)
    return _of_nano(find_mode(mode)) if config.family == "nano" else _of_family(config, mode)


LADDER = ("tiny", "small", "base", "large", "gundam")  # from the fewest tokens to the most


def next_mode(config: ModelConfig, mode: Mode | None) -> Mode | None:
    """The next larger mode that a public model was trained with, for a page that turned in circles; None where there is none."""
    if mode is None or config.family == "nano" or mode.name not in LADDER:
        return None
    known = modes_of(config)
    larger = LADDER[LADDER.index(mode.name) + 1 :]
    return next((known[name] for name in larger if name in known), None)


def _own(config: ModelConfig, height: int, width: int) -> Mode:
    known = _single_views() if config.family == "nano" else modes_of(config)
    sides = {mode.size: mode for mode in known.values() if not mode.is_tiled}
    if height == width and height in sides:
        return sides[height]
    if height == width <= max(sides, default=0) and height % PIXELS_PER_TOKEN == 0 and config.family == "nano":
        return find_mode(f"square {height}")
    if config.family == "deepseek-ocr-2":
        return known["ocr2"]
    multiples = f"a square of a multiple of 64 pixels up to {max(sides)}"  # beyond, attention over one picture takes hours
    allowed = multiples if config.family == "nano" else f"a square of {sorted(sides)} pixels"
    raise InputError(
        f"a picture of {width}x{height} pixels is not {allowed}: say in which mode to show it: mode='small', or --mode small"
    )


def _single_views() -> dict[str, Mode]:
    return {name: mode for name, mode in MODES.items() if not mode.is_tiled}


def _of_nano(mode: Mode) -> Mode:
    if mode.is_tiled or not mode.has_newlines:
        allowed = ", ".join(_single_views())
        raise InputError(f"nano sees a page in one view: mode must be {allowed} or 'square <pixels>', got {mode.name!r}")
    return mode


def _of_family(config: ModelConfig, mode: Mode | str) -> Mode:
    known = modes_of(config)
    name = mode.name if isinstance(mode, Mode) else mode
    if name not in known or (isinstance(mode, Mode) and mode != known[name]):
        raise InputError(f"a {config.family} model has the modes {', '.join(known)}, got {name!r}")
    return known[name]
