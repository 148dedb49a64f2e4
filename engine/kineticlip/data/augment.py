"""Training-time pixels: the official augmentations, drawn as numbers first, then applied.

Text4Vis and BIKE work on Pillow images and give uint8; EVL and Vita-CLIP crop normalised tensors
and give float32. Random numbers come from the clip's own generators in the official order.
Letters: T frames of a clip, S side of the crop.
"""

from __future__ import annotations

import math
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional

from kineticlip.config import DataConfig
from kineticlip.data.randaugment import (
    ACTIONCLIP_STYLE,
    EVL_STYLE,
    apply_steps,
    draw_actionclip,
    draw_evl,
)
from kineticlip.data.sampling import ClipRandom
from kineticlip.data.statistics import PixelStatistics
from kineticlip.data.views import Frames, normalise, resize_image, shorter_to, text4vis_frame_size

MIN_AREA = 0.08  # of the frame, smallest random crop
ASPECTS = (3 / 4, 4 / 3)
TRIES = 10


@dataclass(frozen=True)
class Box:
    """A crop of a frame, in whole pixels."""

    x: int
    y: int
    width: int
    height: int


@dataclass(frozen=True, kw_only=True)
class PillowRules:
    """What the training transforms of Text4Vis and BIKE do to one kind of data set.

    frame_size: (width, height) that frames of any shape are brought to; None: by their short
    side. multiscale: boxes of a few scales and places instead of random ones. gray: the share of
    clips that lose their colours. mirrored: the labels that a mirrored clip changes.
    """

    frame_size: tuple[int, int] | None = None
    multiscale: bool = False
    gray: float = 0.2
    mirrored: Mapping[int, int] = field(default_factory=dict)


PLAIN_RULES = PillowRules()

# Something-Something classes that name a direction: mirrored clips change label ("pulling
# something from left to right" and its like).
MIRRORED_LABELS = {86: 87, 87: 86, 93: 94, 94: 93, 166: 167, 167: 166}
TEXT4VIS_SOMETHING = PillowRules(frame_size=(320, 240), multiscale=True, mirrored=MIRRORED_LABELS)
BIKE_SOMETHING = PillowRules(frame_size=(320, 256), gray=0.0, mirrored=MIRRORED_LABELS)


@dataclass(frozen=True)
class PillowPlan:
    """What a Pillow clip goes through after its resize to width x height.

    `box` None: the short side is brought to S and a square cut at (`x`, `y`).
    """

    width: int
    height: int
    box: Box | None
    x: int
    y: int
    flip: bool
    gray: bool


def draw_text4vis_box(width: int, height: int, rng: random.Random) -> Box | None:
    """A random box of Text4Vis: uniform area and uniform aspect, sides swapped half the time.

    None after ten boxes that do not fit.
    """
    for _ in range(TRIES):
        area = rng.uniform(MIN_AREA, 1.0) * (width * height)
        aspect = rng.uniform(*ASPECTS)
        w, h = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if rng.random() < 0.5:
            w, h = h, w
        if w <= width and h <= height:
            x = rng.randint(0, width - w)
            return Box(x, rng.randint(0, height - h), w, h)
    return None


def draw_multiscale_box(width: int, height: int, size: int, rng: random.Random) -> Box:
    """A box of one of four scales at one of 13 fixed places (Something-Something in Text4Vis).

    Sides may be one scale apart; a side within 3 pixels of `size` becomes `size`.
    """
    sides = [int(min(width, height) * scale) for scale in (1, 0.875, 0.75, 0.66)]
    sides = [size if abs(side - size) < 3 else side for side in sides]
    pairs = [(w, h) for i, h in enumerate(sides) for j, w in enumerate(sides) if abs(i - j) <= 1]
    w, h = rng.choice(pairs)
    right, down = rng.choice(PLACES)
    return Box(right * ((width - w) // 4), down * ((height - h) // 4), w, h)


# Quarter steps of the margins: corners, centre, middles of the borders, middles of the quarters.
PLACES = (
    *((0, 0), (4, 0), (0, 4), (4, 4), (2, 2)),
    *((0, 2), (4, 2), (2, 4), (2, 0)),
    *((1, 1), (3, 1), (1, 3), (3, 3)),
)


def plan_text4vis(
    width: int,
    height: int,
    *,
    size: int,
    rng: random.Random,
    rules: PillowRules = PLAIN_RULES,
    flip: bool = True,
) -> PillowPlan:
    """Draws the released recipe of Text4Vis or BIKE for frames of width x height.

    Box, mirror (one half), gray, each once a clip (`utils/Augmentation.py` of both). With `flip`
    off the mirror is drawn and ignored, so the other draws stay what they were.
    """
    width, height = rules.frame_size or text4vis_frame_size(width, height, size)
    x = y = 0
    if rules.multiscale:
        box: Box | None = draw_multiscale_box(width, height, size, rng)
    else:
        box = draw_text4vis_box(width, height, rng)
        if box is None:
            w, h = shorter_to(width, height, size)
            x = rng.randint(0, w - size)
            y = rng.randint(0, h - size)
    mirror = rng.random() < 0.5
    gray = rng.random() < rules.gray
    return PillowPlan(width, height, box, x, y, mirror and flip, gray)


def apply_text4vis(images: Sequence[Image.Image], plan: PillowPlan, size: int) -> Tensor:
    """Runs a plan over the RGB images of a clip -> uint8 [T, 3, S, S], the official pixels."""
    out = np.empty((len(images), 3, size, size), dtype=np.uint8)
    for image, planes in zip(images, out, strict=True):
        if image.size != (plan.width, plan.height):
            image = resize_image(image, plan.width, plan.height, Image.Resampling.BICUBIC)
        if plan.box is not None:
            box = plan.box
            image = image.crop((box.x, box.y, box.x + box.width, box.y + box.height))
            if image.size != (size, size):
                image = resize_image(image, size, size, Image.Resampling.BILINEAR)
        else:
            shape = shorter_to(plan.width, plan.height, size)
            image = resize_image(image, *shape, Image.Resampling.BILINEAR)
            image = image.crop((plan.x, plan.y, plan.x + size, plan.y + size))
        pixels = np.asarray(image.convert("L") if plan.gray else image)
        if plan.flip:
            pixels = pixels[:, ::-1]
        planes[...] = pixels if plan.gray else pixels.transpose(2, 0, 1)
    return torch.from_numpy(out)


def draw_evl_box(width: int, height: int, rng: ClipRandom) -> Box:
    """A random box of EVL: uniform area, log-uniform aspect; else the centre, aspect clamped."""
    for _ in range(TRIES):
        area = rng.python.uniform(MIN_AREA, 1.0) * (height * width)
        aspect = math.exp(rng.python.uniform(*(math.log(bound) for bound in ASPECTS)))
        w, h = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        rng.numpy.uniform()  # the official code draws for a swap of sides that it never makes
        if 0 < w <= width and 0 < h <= height:
            y = rng.python.randint(0, height - h)
            return Box(rng.python.randint(0, width - w), y, w, h)
    aspect = min(max(width / height, ASPECTS[0]), ASPECTS[1])
    w = width if width / height <= ASPECTS[1] else round(height * aspect)
    h = height if width / height >= ASPECTS[0] else round(width / aspect)
    return Box((width - w) // 2, (height - h) // 2, w, h)


def apply_evl(frames: Frames, box: Box, size: int, *, statistics: PixelStatistics) -> Tensor:
    """Cuts and resizes normalised frames: uint8 [T, H, W, 3] -> float32 [T, 3, S, S]."""
    cut = frames[:, box.y : box.y + box.height, box.x : box.x + box.width]
    pixels = functional.interpolate(
        normalise(cut, statistics), size=(size, size), mode="bilinear", align_corners=False
    )  # [3, T, S, S]
    return pixels.transpose(0, 1).contiguous()  # [T, 3, S, S]


def randaugment_clip(frames: Frames, rng: ClipRandom) -> Frames:
    """EVL's RandAugment: one draw for the clip, uint8 [T, H, W, 3] -> the same shape."""
    steps = [step for step in draw_evl(rng) if step is not None]
    if not steps:
        return frames
    images = (apply_steps(Image.fromarray(frame), steps, EVL_STYLE) for frame in frames)
    return np.stack([np.asarray(image) for image in images])


def augment_pillow(
    frames: Frames, label: int, data: DataConfig, rng: ClipRandom, *, rules: PillowRules
) -> tuple[Tensor, int]:
    """Text4Vis's and BIKE's way: uint8 [T, H, W, 3] -> uint8 [T, 3, S, S], and the label.

    data.augmentation `published` adds the RandAugment that Text4Vis's published runs logged.
    """
    size, height, width = data.resolution, frames.shape[1], frames.shape[2]
    images = [Image.fromarray(frame) for frame in frames]
    if data.augmentation == "published":
        images = [
            apply_steps(image, draw_actionclip(rng, width, height), ACTIONCLIP_STYLE)
            for image in images
        ]
    plan = plan_text4vis(width, height, size=size, rng=rng.python, rules=rules, flip=data.flip)
    if plan.flip:
        label = rules.mirrored.get(label, label)
    return apply_text4vis(images, plan, size), label


def augment_evl(
    frames: Frames, size: int, rng: ClipRandom, *, statistics: PixelStatistics
) -> Tensor:
    """EVL's and Vita-CLIP's way: uint8 [T, H, W, 3] -> float32 [T, 3, S, S], normalised."""
    height, width = frames.shape[1], frames.shape[2]
    frames = randaugment_clip(frames, rng)
    return apply_evl(frames, draw_evl_box(width, height, rng), size, statistics=statistics)
