"""A chart of `train.charts` as a PNG: the few shapes of SVG that it is made of, drawn with Pillow at twice their size and more.

What is no such shape is refused, so that a chart never loses a part on its way.
"""

from __future__ import annotations

import io
import re
from collections.abc import Iterator
from functools import cache
from importlib.resources import files
from itertools import pairwise
from math import cos, pi, sin
from xml.etree import ElementTree

from PIL import Image, ImageDraw, ImageFont

Point = tuple[float, float]
SCALE, SMOOTH = 2, 2  # pixels of the PNG for each of the SVG; and of what is drawn for each of the PNG
_STEP = re.compile(r"([MLHVhvalz])((?:[-\d., ])*)", re.IGNORECASE)
_NUMBER = re.compile(r"-?\d+(?:\.\d+)?")
_ARC = 24  # corners of a disc
_SVG = "{http://www.w3.org/2000/svg}"


def paint(svg: str, scale: int = SCALE) -> bytes:
    """The file of a PNG."""
    root = ElementTree.fromstring(svg)  # noqa: S314
    width, height = (float(each) for each in root.attrib["viewBox"].split()[2:])
    factor = scale * SMOOTH
    image = Image.new("RGB", (round(width * factor), round(height * factor)), "white")
    brush = _Brush(ImageDraw.Draw(image), factor, float(root.attrib["font-size"]), root.attrib["fill"])
    for element in root:
        brush.draw(element)
    file = io.BytesIO()
    image.resize((round(width * scale), round(height * scale)), Image.Resampling.LANCZOS).save(file, "PNG", optimize=True)
    return file.getvalue()


@cache
def _font(pixels: int) -> ImageFont.FreeTypeFont:
    return ImageFont.truetype(io.BytesIO(files("optmem").joinpath("fonts/DejaVuSans.ttf").read_bytes()), pixels)


class _Brush:
    def __init__(self, canvas: ImageDraw.ImageDraw, factor: float, font_size: float, ink: str) -> None:
        self.canvas, self.factor, self.font_size, self.ink = canvas, factor, font_size, ink

    def draw(self, element: ElementTree.Element) -> None:
        name, given = element.tag.removeprefix(_SVG), element.attrib
        if name == "text":
            self._text(element)
        elif name == "polyline":
            numbers = [float(each) for each in _NUMBER.findall(given["points"])]
            self._line(list(zip(numbers[::2], numbers[1::2], strict=True)), given)
        elif name == "path":
            self._path(given)
        else:
            assert name == "rect", f"a chart has no {name}"  # the paper

    def _at(self, point: Point) -> Point:
        return point[0] * self.factor, point[1] * self.factor

    def _text(self, element: ElementTree.Element) -> None:
        given = element.attrib
        is_bold = given.get("font-weight") == "bold"
        font = _font(round(float(given.get("font-size", self.font_size)) * self.factor))
        anchor = {"end": "rs", "middle": "ms"}.get(given.get("text-anchor", ""), "ls")
        at = self._at((float(given["x"]), float(given["y"])))
        ink = given.get("fill", self.ink)
        width = self.factor / 5 if is_bold else 0
        self.canvas.text(at, element.text or "", ink, font, anchor, stroke_width=width, stroke_fill=ink)

    def _path(self, given: dict[str, str]) -> None:
        across, down = (float(each) for each in _NUMBER.findall(given.get("transform", "translate(0,0)")))
        points = [(x + across, y + down) for x, y in _points(given["d"])]
        fill = given.get("fill")
        if fill is None:
            self._line(points, given)
        else:
            placed = [self._at(point) for point in points]
            self.canvas.polygon(placed, fill)
            self._line([*points, points[0]], given)

    def _line(self, points: list[Point], given: dict[str, str]) -> None:
        width = max(round(float(given.get("stroke-width", 1)) * self.factor), 1)
        dashes = [float(each) for each in given.get("stroke-dasharray", "").split()]
        for some in _dashed(points, dashes) if dashes else [points]:
            self.canvas.line([self._at(point) for point in some], given["stroke"], width, "curve")


def _points(path: str) -> list[Point]:
    """The corners of a path: lines, and half circles in steps."""
    found: list[Point] = []
    x = y = 0.0
    for letter, rest in _STEP.findall(path):
        numbers = [float(each) for each in _NUMBER.findall(rest)]
        if letter in "ML":
            x, y = numbers[-2:]
        elif letter in "Hh":
            x = numbers[0] + (x if letter == "h" else 0)
        elif letter in "Vv":
            y = numbers[0] + (y if letter == "v" else 0)
        elif letter == "a":
            found += _half_circle((x, y), numbers)
            x, y = x + numbers[-2], y + numbers[-1]
        else:
            assert letter in "zZ", f"a chart's path has no {letter}"
            continue
        found.append((x, y))
    return found


def _half_circle(start: Point, numbers: list[float]) -> Iterator[Point]:
    """Clockwise to where `numbers` end, level with the start or not."""
    radius, across = numbers[0], numbers[-2]
    centre, sign = start[0] + across / 2, 1 if across < 0 else -1
    for step in range(1, _ARC // 2):
        angle = pi * step / (_ARC // 2)
        yield centre + sign * radius * cos(angle), start[1] + sign * radius * sin(angle)


def _dashed(points: list[Point], dashes: list[float]) -> Iterator[list[Point]]:
    """Parts of a line that are drawn."""
    left, number = dashes[0], 0
    for (x, y), (to_x, to_y) in pairwise(points):
        length = ((to_x - x) ** 2 + (to_y - y) ** 2) ** 0.5
        at = 0.0
        while at < length:
            step = min(left, length - at)
            ends = [(x + (to_x - x) * share, y + (to_y - y) * share) for share in (at / length, (at + step) / length)]
            if number % 2 == 0:
                yield ends
            at, left = at + step, left - step
            if left <= 0:
                number += 1
                left = dashes[number % len(dashes)]
