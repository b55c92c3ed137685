"""What happens to pictures on their way to a reader: blur, noise, JPEG, small shifts and rotations.

Each is a frozen dataclass with the share of pages it happens to; the strength is drawn for each page.  Those that move ink say how,
as a matrix [2, 3] from places on the page to places in the picture, both measured from the corner of the first pixel.
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass
from math import cos, radians, sin
from typing import NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageFilter

from optmem.errors import InputError

Pixels = NDArray[np.uint8]
Affine = NDArray[np.float64]
PAPER = 255
UNMOVED: Affine = np.array([[1.0, 0.0, 0.0], [0.0, 1.0, 0.0]])


class Degraded(NamedTuple):
    """A picture, and where the page's places are on it."""

    image: Pixels
    affine: Affine


class Degradation(Protocol):
    """One kind of harm."""

    @property
    def share(self) -> float:
        """Of pages that it happens to."""

    def apply(self, image: Pixels, random: np.random.Generator) -> Degraded:
        """A harmed copy of a picture uint8 [H, W]."""


@dataclass(frozen=True, slots=True)
class _Harm:
    share: float = 0.3

    def __post_init__(self) -> None:
        if not 0 <= self.share <= 1:
            raise InputError(f"the share of {type(self).__name__} must be from 0 to 1, got {self.share}")


@dataclass(frozen=True, slots=True)
class Blur(_Harm):
    """A Gaussian of up to `most` pixels."""

    most: float = 0.8

    def apply(self, image: Pixels, random: np.random.Generator) -> Degraded:
        """As Degradation.apply."""
        blurred = Image.fromarray(image).filter(ImageFilter.GaussianBlur(random.uniform(0.2, self.most)))
        return Degraded(np.array(blurred), UNMOVED)


@dataclass(frozen=True, slots=True)
class Noise(_Harm):
    """Normal noise of a standard deviation of up to `most` grey levels."""

    most: float = 24.0

    def apply(self, image: Pixels, random: np.random.Generator) -> Degraded:
        """As Degradation.apply."""
        noise = random.standard_normal(image.shape, dtype=np.float32) * np.float32(random.uniform(0, self.most))
        return Degraded(np.clip(np.rint(image + noise), 0, 255).astype(np.uint8), UNMOVED)


@dataclass(frozen=True, slots=True)
class Jpeg(_Harm):
    """Compressed and opened again, at a quality of `worst` to `best`."""

    worst: int = 30
    best: int = 90

    def apply(self, image: Pixels, random: np.random.Generator) -> Degraded:
        """As Degradation.apply."""
        file = io.BytesIO()
        Image.fromarray(image).save(file, "JPEG", quality=int(random.integers(self.worst, self.best + 1)))
        return Degraded(np.array(Image.open(file)), UNMOVED)


@dataclass(frozen=True, slots=True)
class Shift(_Harm):
    """Moved by whole pixels, up to `most` in each direction; what leaves the picture is lost."""

    most: int = 3

    def apply(self, image: Pixels, random: np.random.Generator) -> Degraded:
        """As Degradation.apply."""
        right, down = random.integers(-self.most, self.most + 1, size=2).tolist()
        height, width = image.shape
        moved = np.full_like(image, PAPER)
        moved[max(down, 0) : height + min(down, 0), max(right, 0) : width + min(right, 0)] = image[
            max(-down, 0) : height - max(down, 0), max(-right, 0) : width - max(right, 0)
        ]
        return Degraded(moved, np.array([[1.0, 0.0, right], [0.0, 1.0, down]]))


@dataclass(frozen=True, slots=True)
class Rotation(_Harm):
    """Turned about its middle by up to `most` degrees."""

    most: float = 0.7

    def apply(self, image: Pixels, random: np.random.Generator) -> Degraded:
        """As Degradation.apply."""
        angle = radians(random.uniform(-self.most, self.most))
        height, width = image.shape
        affine = about(cos(angle), sin(angle), width / 2, height / 2)
        back = about(cos(angle), -sin(angle), width / 2, height / 2)
        turned = Image.fromarray(image).transform(
            (width, height), Image.Transform.AFFINE, back.ravel().tolist(), Image.Resampling.BICUBIC, fillcolor=PAPER
        )
        return Degraded(np.array(turned), affine)


EVERYTHING: tuple[Degradation, ...] = (Rotation(), Shift(), Blur(), Noise(), Jpeg())


def about(cosine: float, sine: float, x: float, y: float) -> Affine:
    """A rotation that leaves a point where it is."""
    return np.array([[cosine, -sine, x - cosine * x + sine * y], [sine, cosine, y - sine * x - cosine * y]])


def scaling(scale: float) -> Affine:
    """A page shown smaller or larger."""
    return UNMOVED * scale


def then(first: Affine, second: Affine) -> Affine:
    """One movement after another."""
    linear = second[:, :2] @ first
    linear[:, 2] += second[:, 2]
    return linear


def degrade(image: Pixels, harms: Sequence[Degradation], random: np.random.Generator) -> Degraded:
    """A picture after the harms that chance chose for it, in their order."""
    affine = UNMOVED
    for harm in harms:
        if random.random() < harm.share:
            image, moved = harm.apply(image, random)
            affine = then(affine, moved)
    return Degraded(image, affine)


def move_boxes(boxes: NDArray[np.float64], affine: Affine) -> NDArray[np.float64]:
    """The smallest upright boxes around moved ones: [..., 4] left, top, right, bottom."""
    corners = np.stack([boxes[..., [0, 1]], boxes[..., [2, 1]], boxes[..., [0, 3]], boxes[..., [2, 3]]], axis=-2)
    moved = corners @ affine[:, :2].T + affine[:, 2]
    return np.concatenate([moved.min(axis=-2), moved.max(axis=-2)], axis=-1)
