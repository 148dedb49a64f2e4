"""RandAugment, twice: the clip-wise one of EVL and Vita-CLIP, the frame-wise one of ActionCLIP.

Both choose a few of a fixed list of Pillow operations at a fixed strength. First the steps are
drawn (`Step`s, plain numbers), then applied; drawing follows the official generators' order, so
equal seeds give the official steps. The two lists differ in their operations, strengths, border
colour and filter; the tables below say how.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from PIL import Image, ImageDraw, ImageEnhance, ImageOps

from kineticlip.data.sampling import ClipRandom

Picture = Image.Image


@dataclass(frozen=True)
class Style:
    """How geometric operations read between pixels, and the colour beyond the border."""

    resample: Image.Resampling
    fill: tuple[int, int, int]


EVL_STYLE = Style(Image.Resampling.BICUBIC, (128, 128, 128))
ACTIONCLIP_STYLE = Style(Image.Resampling.NEAREST, (0, 0, 0))
CUTOUT_COLOUR = (125, 123, 114)


@dataclass(frozen=True)
class Step:
    """One operation of PIXELS with its numbers."""

    name: str
    values: tuple[float, ...] = ()


def apply_steps(image: Picture, steps: Sequence[Step], style: Style) -> Picture:
    """The steps one after another on an RGB picture; its size stays."""
    for step in steps:
        image = PIXELS[step.name](image, style, *step.values)
    return image


def _affine(image: Picture, style: Style, *matrix: float) -> Picture:
    return image.transform(
        image.size, Image.Transform.AFFINE, matrix, resample=style.resample, fillcolor=style.fill
    )


def _rotate(image: Picture, style: Style, degrees: float) -> Picture:
    return image.rotate(degrees, resample=style.resample, fillcolor=style.fill)


def _lift_dark(image: Picture, style: Style, amount: float) -> Picture:
    lifted = [min(255, value + int(amount)) if value < 128 else value for value in range(256)]
    return image.point(lifted * 3)


def _lift_and_solarize(image: Picture, style: Style, amount: float) -> Picture:
    lifted = (min(255, int(value + amount)) for value in range(256))
    return image.point([value if value < 128 else 255 - value for value in lifted] * 3)


def _cutout(image: Picture, style: Style, x: float, y: float, side: float) -> Picture:
    left, top = int(max(0.0, x - side / 2)), int(max(0.0, y - side / 2))
    box = (left, top, min(image.width, left + side), min(image.height, top + side))
    image = image.copy()
    ImageDraw.Draw(image).rectangle(box, CUTOUT_COLOUR)
    return image


PIXELS: dict[str, Callable[..., Picture]] = {
    "auto_contrast": lambda image, style: ImageOps.autocontrast(image),
    "equalize": lambda image, style: ImageOps.equalize(image),
    "invert": lambda image, style: ImageOps.invert(image),
    "rotate": _rotate,
    "posterize": lambda image, style, bits: ImageOps.posterize(image, int(bits)),
    "solarize": lambda image, style, level: ImageOps.solarize(image, level),
    "solarize_add": _lift_dark,
    "add_then_solarize": _lift_and_solarize,
    "color": lambda image, style, factor: ImageEnhance.Color(image).enhance(factor),
    "contrast": lambda image, style, factor: ImageEnhance.Contrast(image).enhance(factor),
    "brightness": lambda image, style, factor: ImageEnhance.Brightness(image).enhance(factor),
    "sharpness": lambda image, style, factor: ImageEnhance.Sharpness(image).enhance(factor),
    "shear_x": lambda image, style, slope: _affine(image, style, 1, slope, 0, 0, 1, 0),
    "shear_y": lambda image, style, slope: _affine(image, style, 1, 0, 0, slope, 1, 0),
    "translate_x_rel": lambda image, style, part: _affine(
        image, style, 1, 0, part * image.width, 0, 1, 0
    ),
    "translate_y_rel": lambda image, style, part: _affine(
        image, style, 1, 0, 0, 0, 1, part * image.height
    ),
    "translate_x": lambda image, style, pixels: _affine(image, style, 1, 0, pixels, 0, 1, 0),
    "translate_y": lambda image, style, pixels: _affine(image, style, 1, 0, 0, 0, 1, pixels),
    "cutout": _cutout,
}


def _negate_half(value: float, rng: random.Random) -> float:
    return -value if rng.random() > 0.5 else value


def _nothing(strength: float, rng: random.Random) -> tuple[float, ...]:
    return ()


def _signed(scale: float, around: float = 0.0) -> Callable[[float, random.Random], tuple[float]]:
    return lambda strength, rng: (around + _negate_half(strength * scale, rng),)


# name -> numbers from (strength 0..1, rng): timm's "increasing" set, as EVL and Vita-CLIP use it.
EVL_OPERATIONS: tuple[tuple[str, Callable[[float, random.Random], tuple[float, ...]]], ...] = (
    ("auto_contrast", _nothing),
    ("equalize", _nothing),
    ("invert", _nothing),
    ("rotate", _signed(30.0)),
    ("posterize", lambda strength, rng: (4 - int(strength * 4),)),
    ("solarize", lambda strength, rng: (256 - int(strength * 256),)),
    ("solarize_add", lambda strength, rng: (int(strength * 110),)),
    ("color", _signed(0.9, 1.0)),
    ("contrast", _signed(0.9, 1.0)),
    ("brightness", _signed(0.9, 1.0)),
    ("sharpness", _signed(0.9, 1.0)),
    ("shear_x", _signed(0.3)),
    ("shear_y", _signed(0.3)),
    ("translate_x_rel", _signed(0.45)),
    ("translate_y_rel", _signed(0.45)),
)


# The same without `inc` in the recipe: posterize and solarize weaken as the strength grows, and
# the four enhancements go from 0.1 to 1.9 without a draw of their direction.
EVL_PLAIN_OPERATIONS = tuple(
    {
        "posterize": (name, lambda strength, rng: (int(strength * 4),)),
        "solarize": (name, lambda strength, rng: (int(strength * 256),)),
        **{
            enhancement: (name, lambda strength, rng: (strength * 1.8 + 0.1,))
            for enhancement in ("color", "contrast", "brightness", "sharpness")
        },
    }.get(name, (name, numbers))
    for name, numbers in EVL_OPERATIONS
)


def draw_evl(
    rng: ClipRandom,
    *,
    count: int = 4,
    magnitude: float = 7.0,
    spread: float = 0.5,
    increasing: bool = True,
) -> list[Step | None]:
    """The steps of one clip, None where the coin leaves an operation out.

    The recipe `rand-m7-n4-mstd0.5-inc1`: 4 of 15 operations with replacement, each applied with
    probability one half at a strength N(7, 0.5) of 10. The choice comes from NumPy's generator,
    coins and strengths from Python's.
    """
    operations = EVL_OPERATIONS if increasing else EVL_PLAIN_OPERATIONS
    steps: list[Step | None] = []
    for number in rng.numpy.randint(0, len(operations), size=count).tolist():
        name, numbers = operations[number]
        if rng.python.random() > 0.5:
            steps.append(None)
            continue
        strength = min(10.0, max(0.0, rng.python.gauss(magnitude, spread))) / 10
        steps.append(Step(name, numbers(strength, rng.python)))
    return steps


# name -> (value at strength 0, value at strength 30, whether half of the draws are negated): the
# list of the RandAugment package that ActionCLIP imports.
ACTIONCLIP_OPERATIONS = (
    ("auto_contrast", 0.0, 1.0, False),
    ("equalize", 0.0, 1.0, False),
    ("invert", 0.0, 1.0, False),
    ("rotate", 0.0, 30.0, True),
    ("posterize", 0.0, 4.0, False),
    ("solarize", 0.0, 256.0, False),
    ("add_then_solarize", 0.0, 110.0, False),
    ("color", 0.1, 1.9, False),
    ("contrast", 0.1, 1.9, False),
    ("brightness", 0.1, 1.9, False),
    ("sharpness", 0.1, 1.9, False),
    ("shear_x", 0.0, 0.3, True),
    ("shear_y", 0.0, 0.3, True),
    ("cutout", 0.0, 40.0, False),
    ("translate_x", 0.0, 100.0, True),
    ("translate_y", 0.0, 100.0, True),
)


def draw_actionclip(
    rng: ClipRandom, width: int, height: int, *, count: int = 2, magnitude: float = 9.0
) -> list[Step]:
    """The steps of one FRAME: N 2, M 9 of 30, as the logs of the published Text4Vis runs say.

    Every frame of a clip draws its own, an official quirk that is part of that recipe.
    """
    steps = []
    for name, low, high, signed in rng.python.choices(ACTIONCLIP_OPERATIONS, k=count):
        value = low + magnitude / 30 * (high - low)
        if signed:
            value = _negate_half(value, rng.python)
        if name == "cutout":
            # The centre falls between the first pixel and the far border, 0 excluded.
            x, y = (side + (1 - side) * rng.numpy.random_sample() for side in (width, height))
            steps.append(Step(name, (float(x), float(y), value)))
        else:
            steps.append(Step(name, () if name in UNSCALED else (value,)))
    return steps


UNSCALED = ("auto_contrast", "equalize", "invert")
