"""What a picture costs at each provider, by the formula it publishes, and whether a page is cheaper there as a picture or as text.

    Anthropic   a token for every 28 x 28 pixels, after the picture was made to fit the model's edge and number of tokens
    OpenAI      tiles: a base and so much for every 512 x 512 pixels; patches: so much for every 32 x 32 pixels, up to a number
    Gemini      2: 258 for every tile; 3: a budget that the request chooses
    Qwen-VL     a token for every 28 x 28 or 32 x 32 pixels, sides rounded to that grid, and one before and behind

Sources, each as read in November 2026:
    platform.claude.com/docs/en/build-with-claude/vision (patches of 28 pixels, native resolutions, resize and padding)
    OpenAI's guide to images (tiles, patches and its worked example of 1800 x 2400); its forum for the factor 1.2 of GPT-5.2 and
    later (community.openai.com/t/1372291) and 1.62 of GPT-5.4 mini (/t/1380539)
    ai.google.dev/gemini-api/docs/tokens and /media-resolution; the size of Gemini 2's tiles is from memory
    Qwen2.5-VL's preprocessor_config.json and public copies of its resize; Qwen3-VL's bounds and the two tokens are from memory
    huggingface.co/datasets/JOHNISKING/image-token-cost: ten sizes as three providers billed them, with which the tests compare
Formulas change: `SOURCE_DATE` goes with every price.  What a text costs is an estimate, unless it was counted by the reader.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, Protocol

from optmem.errors import InputError
from optmem.text.count import estimate_tokens

SOURCE_DATE = "2026-11"
MAX_SIDE = 100_000  # pixels: what is larger is no picture
Provider = Literal["openai", "anthropic", "gemini", "qwen"]
Size = tuple[int, int]  # width, height


class Formula(Protocol):
    """How a provider counts a picture."""

    def seen(self, width: int, height: int) -> Size:
        """Pixels that the model sees of it: a larger picture is paid for and made smaller, a smaller one may be made larger."""

    def tokens(self, width: int, height: int) -> int:
        """What it costs."""


@dataclass(frozen=True, slots=True)
class Patches28:
    """Anthropic."""

    edge: int  # pixels of the longer side, at most
    most: int  # tokens
    side: int = 28

    def seen(self, width: int, height: int) -> Size:
        if self._fits(width, height):
            return width, height
        if height > width:
            found = self.seen(height, width)
            return found[1], found[0]
        least, most = 1, width  # the largest width that fits: the number of patches rises with it
        while least < most:
            half = (least + most + 1) // 2
            least, most = (half, most) if self._fits(half, _other(half, width, height)) else (least, half - 1)
        return least, _other(least, width, height)

    def tokens(self, width: int, height: int) -> int:
        width, height = self.seen(width, height)
        return self._cells(width) * self._cells(height)

    def _cells(self, pixels: int) -> int:
        return -(-pixels // self.side)

    def _fits(self, width: int, height: int) -> bool:
        columns, rows = self._cells(width), self._cells(height)
        return max(columns, rows) * self.side <= self.edge and columns * rows <= self.most


@dataclass(frozen=True, slots=True)
class Tiles512:
    """OpenAI's older models, detail high."""

    base: int
    each: int
    box: int = 2048  # pixels that the picture is first made to fit
    short: int = 768  # then its shorter side

    def seen(self, width: int, height: int) -> Size:
        by = min(1.0, self.box / max(width, height))
        by = min(by, self.short / min(width, height))
        return max(math.floor(width * by), 1), max(math.floor(height * by), 1)

    def tokens(self, width: int, height: int) -> int:
        width, height = self.seen(width, height)
        return self.base + self.each * -(-width // 512) * -(-height // 512)


@dataclass(frozen=True, slots=True)
class Patches32:
    """OpenAI's newer models."""

    most: int  # patches
    factor: float  # tokens of a patch
    side: int = 32

    def seen(self, width: int, height: int) -> Size:
        if self._cells(width) * self._cells(height) <= self.most:
            return width, height
        by = math.sqrt(self.most * self.side**2 / (width * height))
        across, down = width * by / self.side, height * by / self.side  # patches, not whole: then down to a whole number of one
        by *= min(max(math.floor(across), 1) / across, max(math.floor(down), 1) / down)
        return max(round(width * by), 1), max(round(height * by), 1)

    def tokens(self, width: int, height: int) -> int:
        width, height = self.seen(width, height)
        return math.ceil(min(self._cells(width) * self._cells(height), self.most) * self.factor - 1e-9)

    def _cells(self, pixels: int) -> int:
        return -(-pixels // self.side)


@dataclass(frozen=True, slots=True)
class Tiles768:
    """Gemini 2."""

    each: int = 258
    small: int = 384  # a picture up to this in both directions is one tile

    def seen(self, width: int, height: int) -> Size:
        return width, height

    def tokens(self, width: int, height: int) -> int:
        if max(width, height) <= self.small:
            return self.each
        side = min(max(math.floor(min(width, height) / 1.5), 256), 768)
        return self.each * -(-width // side) * -(-height // side)


@dataclass(frozen=True, slots=True)
class Fixed:
    """Gemini 3: the most that a resolution costs; what is billed is up to 5 % less."""

    each: int

    def seen(self, width: int, height: int) -> Size:
        return width, height

    def tokens(self, width: int, height: int) -> int:
        del width, height
        return self.each


@dataclass(frozen=True, slots=True)
class Grid:
    """Qwen-VL."""

    side: int  # pixels of a token
    least: int  # pixels of a picture
    most: int
    around: int = 2  # tokens before and behind

    def seen(self, width: int, height: int) -> Size:
        across, down = (max(round(pixels / self.side), 1) * self.side for pixels in (width, height))
        if across * down > self.most:
            by = math.sqrt(width * height / self.most)
            across, down = (max(math.floor(pixels / by / self.side), 1) * self.side for pixels in (width, height))
        elif across * down < self.least:
            by = math.sqrt(self.least / (width * height))
            across, down = (math.ceil(pixels * by / self.side) * self.side for pixels in (width, height))
        return across, down

    def tokens(self, width: int, height: int) -> int:
        across, down = self.seen(width, height)
        return across // self.side * (down // self.side) + self.around


@dataclass(frozen=True, slots=True)
class Reader:
    """A family of models that are billed alike."""

    name: str
    provider: Provider
    formula: Formula
    grid: int  # pixels: sides that are multiples of it waste nothing
    is_exact: bool = True  # False where only the most is published


def _readers() -> Mapping[str, Reader]:
    found = (
        Reader("claude", "anthropic", Patches28(2576, 4784), 28),  # 4.7 and later
        Reader("claude-standard", "anthropic", Patches28(1568, 1568), 28),
        Reader("gpt-5.4", "openai", Patches32(2500, 1.2), 32),  # 5.2 and later, detail high
        Reader("gpt-5.4-original", "openai", Patches32(10_000, 1.2), 32),  # detail original
        Reader("gpt-5.4-mini", "openai", Patches32(1536, 1.62), 32),  # and 4.1-mini, 5-mini
        Reader("gpt-5-nano", "openai", Patches32(1536, 2.46), 32),  # and 4.1-nano
        Reader("o4-mini", "openai", Patches32(1536, 1.72), 32),
        Reader("gpt-5", "openai", Tiles512(70, 140), 512),
        Reader("gpt-4o", "openai", Tiles512(85, 170), 512),  # and 4.1
        Reader("o3", "openai", Tiles512(75, 150), 512),  # and o1
        Reader("gemini-3", "gemini", Fixed(1120), 1, is_exact=False),
        Reader("gemini-3-medium", "gemini", Fixed(560), 1, is_exact=False),
        Reader("gemini-3-low", "gemini", Fixed(280), 1, is_exact=False),
        Reader("gemini-2", "gemini", Tiles768(), 768),
        Reader("qwen2.5-vl", "qwen", Grid(28, 56 * 56, 12_845_056), 28),
        Reader("qwen3-vl", "qwen", Grid(32, 256 * 256, 16_777_216), 32),
    )
    return {reader.name: reader for reader in found}


READERS = _readers()
DEFAULTS: Mapping[Provider, str] = {"openai": "gpt-5.4", "anthropic": "claude", "gemini": "gemini-3", "qwen": "qwen3-vl"}


def find_reader(name: str | Reader) -> Reader:
    """A family of models by its name, or a provider's newest.  Raises InputError for an unknown one."""
    if isinstance(name, Reader):
        return name
    found = READERS.get(DEFAULTS.get(name, name)) if isinstance(name, str) else None  # type: ignore[call-overload]
    if found is None:
        raise InputError(f"prices are known of {', '.join((*DEFAULTS, *READERS))}, not of {repr(name)[:80]}")
    return found


def reader_name(name: str) -> str:
    """What the one meant is called; "" stays "", the model that reads pages itself.  Raises InputError for an unknown one."""
    return find_reader(name).name if name else ""


def image_tokens(reader: str | Reader, width: int, height: int) -> int:
    """What a picture costs.  Raises InputError for an unknown reader, and what is no size."""
    _check(width, height)
    return find_reader(reader).formula.tokens(width, height)


def best_size(reader: str | Reader, width: int, height: int) -> Size:
    """Width and height to which a picture is scaled before it is sent: no more pixels than the model sees.

    What would be made larger there is left as it is: the model does it, and the bytes stay few.
    """
    _check(width, height)
    across, down = find_reader(reader).formula.seen(width, height)
    return (width, height) if across >= width and down >= height else (min(across, width), min(down, height))


@dataclass(frozen=True, slots=True)
class Price:
    """A page as a picture and as text, at one reader."""

    reader: str
    size: Size  # to send
    image_tokens: int
    text_tokens: int
    is_estimate: bool  # of the text: its tokens were not counted with the reader's own vocabulary
    is_exact: bool  # of the picture
    date: str = SOURCE_DATE  # of the formula

    @property
    def saved(self) -> int:
        """Tokens that the picture saves; below 0 where it costs more."""
        return self.text_tokens - self.image_tokens

    @property
    def is_worth_it(self) -> bool:
        """Whether the picture is cheaper."""
        return self.saved > 0

    def __str__(self) -> str:
        text = f"{'about ' if self.is_estimate else ''}{self.text_tokens:,} as text"
        image = f"{'' if self.is_exact else 'up to '}{self.image_tokens:,} as a picture of {self.size[0]}x{self.size[1]}"
        what = "a picture saves" if self.is_worth_it else "text saves"
        return f"{self.reader}: {image}, {text}: {what} {abs(self.saved):,} tokens"


def compare(reader: str | Reader, width: int, height: int, *, text: str = "", text_tokens: int | None = None) -> Price:
    """What a page costs as a picture and as text.

    text          what it says; its tokens are estimated
    text_tokens   as the reader's own vocabulary counts them, where that is known

    Raises InputError as `image_tokens` does.
    """
    found, size = find_reader(reader), best_size(reader, width, height)
    cost = estimate_tokens(text) if text_tokens is None else text_tokens
    return Price(found.name, size, found.formula.tokens(*size), cost, text_tokens is None, found.is_exact)


def _other(long: int, width: int, height: int) -> int:
    return max(round(long * height / width), 1)


def _check(width: int, height: int) -> None:
    for side in (width, height):
        if isinstance(side, bool) or not isinstance(side, int) or not 1 <= side <= MAX_SIDE:
            raise InputError(f"a picture has sides of 1 to {MAX_SIDE:,} pixels, got {repr(width)[:40]} x {repr(height)[:40]}")
