"""Spatial views: geometry as numbers first, pixels second.

A `Geometry` says to what size a frame is resized and which square boxes are cut from it, in the
order of the official codes; the same numbers drive the Pillow path, the tensor path and any kernel.
Letters: U distinct frames, V distinct crops, S side of a crop.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor
from torch.nn import functional

from kineticlip.data.statistics import PixelStatistics
from kineticlip.runtime.errors import UserError
from kineticlip_kernels.patches import rows_first

Frames = NDArray[np.uint8]


@dataclass(frozen=True)
class Crop:
    """A square box by its upper left corner in the resized frame, mirrored after cutting if `flip`.

    It may reach beyond the frame; what lies outside is black.
    """

    x: int
    y: int
    flip: bool = False


@dataclass(frozen=True, kw_only=True)
class Geometry:
    """All views of one video: frames become width x height, then crops of side `size` are cut."""

    width: int
    height: int
    size: int
    crops: tuple[Crop, ...]

    def distinct(self) -> tuple[tuple[Crop, ...], NDArray[np.int64]]:
        """The crops without repeats, and for every crop its place among them (int64 [crops]).

        A square video has one box where the protocol names three: it is cut and encoded once.
        """
        place = {crop: number for number, crop in enumerate(dict.fromkeys(self.crops))}
        return tuple(place), np.array([place[crop] for crop in self.crops], dtype=np.int64)


def text4vis_geometry(
    width: int,
    height: int,
    *,
    size: int,
    crops: int,
    fixed: tuple[int, int] | None = None,
) -> Geometry:
    """The views of Text4Vis and BIKE for a frame of width x height (official `utils/`).

    The short side becomes 256 for 224-pixel crops, else the crop's own size; `fixed` (width,
    height) replaces that. 1: centre. 3: left, right, centre. 5: four corners, centre. 10: each of
    the five, then mirrored. Offsets are quarters of the margin rounded down, so the right crop may
    end up to three pixels short of the border: an official quirk, kept.
    """
    width, height = fixed or text4vis_frame_size(width, height, size)
    if crops == 1:
        corners = [(_centre(width, size), _centre(height, size))]
    elif crops in (3, 5, 10):
        x, y = (width - size) // 4, (height - size) // 4
        middle = (2 * x, 2 * y)
        if crops == 3:
            corners = [(0, 2 * y), (4 * x, 2 * y), middle]
        else:
            corners = [(0, 0), (4 * x, 0), (0, 4 * y), (4 * x, 4 * y), middle]
    else:
        raise UserError(f"test.crops: Text4Vis views have 1, 3, 5 or 10 crops, got {crops}")
    flips = (False, True) if crops == 10 else (False,)
    boxes = tuple(Crop(*corner, flip) for corner in corners for flip in flips)
    return Geometry(width=width, height=height, size=size, crops=boxes)


def evl_geometry(width: int, height: int, *, size: int, crops: int) -> Geometry:
    """The views of EVL and Vita-CLIP: 1 centre crop, or 3 along the long side, first to last."""
    width, height = shorter_to(width, height, size)
    boxes = evl_boxes(width, height, size=size, crops=crops)
    return Geometry(width=width, height=height, size=size, crops=boxes)


def evl_boxes(width: int, height: int, *, size: int, crops: int) -> tuple[Crop, ...]:
    """Those crops of a frame that is already resized to width x height."""
    x, y = width - size, height - size
    if crops == 1:
        corners = [(x // 2, y // 2)]
    elif crops == 3:
        corners = [(0, 0), (x // 2, y // 2), (x, y)]
    else:
        raise UserError(f"test.crops: EVL and Vita-CLIP views have 1 or 3 crops, got {crops}")
    return tuple(Crop(*corner) for corner in corners)


def text4vis_frame_size(width: int, height: int, size: int) -> tuple[int, int]:
    """(width, height) of a frame before crops of `size`: short side 256 for 224, else `size`."""
    return shorter_to(width, height, 256 if size == 224 else size)


def shorter_to(width: int, height: int, side: int) -> tuple[int, int]:
    """(width, height) with the shorter of them brought to `side`, the other rounded down."""
    if width < height:
        return side, int(side * height / width)
    return int(side * width / height), side


def _centre(length: int, size: int) -> int:
    # torchvision's CenterCrop: half-even rounding inside the frame, padding split downwards.
    return round((length - size) / 2) if length >= size else -((size - length) // 2)


def resize_pillow(frame: Frames, width: int, height: int) -> Frames:
    """Pillow's antialiased bicubic resize, uint8 [H, W, 3]; a frame of that size passes through."""
    if frame.shape[:2] == (height, width):
        return frame
    image = Image.fromarray(frame)
    return np.asarray(resize_image(image, width, height, Image.Resampling.BICUBIC))


def resize_image(
    image: Image.Image, width: int, height: int, resample: Image.Resampling
) -> Image.Image:
    """Pillow's antialiased resize with the passes in Pillow 13's order, whichever is installed.

    Each pass rounds to bytes, so the order shows (docs/decisions/0005-pillow-13.md).
    """
    if rows_first((image.height, image.width), width, height):
        image = image.resize((image.width, height), resample)
    return image.resize((width, height), resample)


def apply_pillow(
    frames: Frames, geometry: Geometry, *, crops: Sequence[Crop] | None = None
) -> Tensor:
    """Resizes every frame once and cuts the crops: uint8 [U, H, W, 3] -> uint8 [U, V, 3, S, S].

    `crops` defaults to the distinct ones. The pixels are those of the official Pillow path.
    """
    boxes = geometry.distinct()[0] if crops is None else crops
    size = geometry.size
    out = np.zeros((len(frames), len(boxes), 3, size, size), dtype=np.uint8)
    for frame, images in zip(frames, out, strict=True):
        resized = resize_pillow(frame, geometry.width, geometry.height).transpose(2, 0, 1)
        for crop, image in zip(boxes, images, strict=True):
            cut_into(image, resized, crop)
    return torch.from_numpy(out)


def cut_into(image: Frames, planes: Frames, crop: Crop) -> None:
    """Copies the box of `planes` [3, H, W] into the black `image` [3, S, S], mirrored on demand."""
    size = image.shape[-1]
    height, width = planes.shape[1:]
    top, left = max(0, -crop.y), max(0, -crop.x)
    bottom, right = min(size, height - crop.y), min(size, width - crop.x)
    target = image[:, :, ::-1] if crop.flip else image
    target[:, top:bottom, left:right] = planes[
        :, crop.y + top : crop.y + bottom, crop.x + left : crop.x + right
    ]


def normalise(frames: Frames | Tensor, statistics: PixelStatistics) -> Tensor:
    """Normalised float32 planes in EVL's layout: uint8 [U, H, W, 3] -> [3, U, H, W]."""
    planes = torch.as_tensor(frames).permute(3, 0, 1, 2).contiguous()
    pixels = planes.to(torch.float32).div_(255.0)
    shift = pixels.new_tensor(statistics.mean).view(3, 1, 1, 1)
    scale = pixels.new_tensor(statistics.std).view(3, 1, 1, 1)
    return pixels.sub_(shift).div_(scale)


def apply_tensor(
    frames: Frames | Tensor,
    geometry: Geometry,
    *,
    statistics: PixelStatistics,
    crops: Sequence[Crop] | None = None,
    numbers: Sequence[int] | None = None,
    count: int = 0,
) -> Tensor:
    """Normalises, resizes, cuts: uint8 [U, H, W, 3] -> float32 [U, V, 3, S, S].

    EVL's and Vita-CLIP's order of operations: bilinear without antialiasing on normalised values.
    The official codes resize whole videos. With the ascending frame `numbers` and the video's
    frame `count` the few frames needed come out the same to the last bit (see `_official_lanes`)
    on an x86 CPU. A tensor's images are made, and stay, on its device.
    """
    boxes = geometry.distinct()[0] if crops is None else crops
    size = geometry.size
    order, place = _official_lanes(np.arange(len(frames)) if numbers is None else numbers, count)
    resized = functional.interpolate(
        normalise(frames[order], statistics),
        size=(geometry.height, geometry.width),
        mode="bilinear",
        align_corners=False,
    )  # [3, lanes, height, width]
    views = [resized[:, place, box.y : box.y + size, box.x : box.x + size] for box in boxes]
    return torch.stack(views).permute(2, 0, 1, 3, 4).contiguous()  # [U, V, 3, S, S]


def _official_lanes(
    numbers: Sequence[int] | NDArray[np.int64], count: int
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Which frame to put in which lane of the resize, and the lane of every frame.

    PyTorch's x86 kernel resizes frames eight at a time with fused multiply-add, and the last
    count % 8 of them one by one without it, which differs by one unit in the last place. Frames
    keep the company that they have in the whole video.
    """
    in_eights = np.asarray(numbers, dtype=np.int64) < count - count % 8
    body, tail = np.flatnonzero(in_eights), np.flatnonzero(~in_eights)
    padding = -len(body) % 8
    order = np.concatenate([body, np.repeat(body[:1], padding), tail])
    place = np.concatenate([np.arange(len(body)), len(body) + padding + np.arange(len(tail))])
    return order, place
