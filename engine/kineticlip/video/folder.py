"""A folder of numbered image files as a video; only files that exist count as frames."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
from PIL import Image, UnidentifiedImageError

from kineticlip.runtime.errors import UserError
from kineticlip.video.container import MAX_PIXELS, VideoError
from kineticlip.video.pictures import Frames

TEMPLATE = "img_{:05d}.jpg"


def list_images(folder: str | Path, template: str = TEMPLATE) -> list[Path]:
    """The folder's image files that match the template, by their number.

    template: a file name with one number field, as for str.format. Frame 0 is the lowest number
    there is (data sets begin at 0 or 1). Raises VideoError where none matches or one is missing,
    and where the folder cannot be listed.
    """
    pattern = _pattern(template)
    try:
        names = list(Path(folder).iterdir())
    except OSError as error:
        raise VideoError(folder, f"cannot be listed: {error.strerror}") from None
    found = {}
    for path in names:
        match = pattern.fullmatch(path.name)
        if match and path.name == template.format(int(match[1])):
            found[int(match[1])] = path
    if not found:
        raise VideoError(
            folder,
            f"is a folder, and no image in it is named like {template.format(1)!r} "
            "(one of videos is for `kineticlip prepare`)",
        )
    numbers = sorted(found)
    if numbers[-1] - numbers[0] + 1 != len(numbers):
        gap = next(n for n in range(numbers[0], numbers[-1]) if n not in found)
        raise VideoError(
            folder, f"{template.format(gap)!r} is missing between its first image and its last"
        )
    return [found[number] for number in numbers]


def image_size(path: Path) -> tuple[int, int]:
    """(width, height) from an image's header. Raises VideoError."""
    try:
        with Image.open(path) as image:
            size: tuple[int, int] = image.size
    except (OSError, UnidentifiedImageError, Image.DecompressionBombError) as error:
        raise VideoError(path, f"is not a readable image: {error}") from None
    if size[0] * size[1] > MAX_PIXELS:
        raise VideoError(path, f"claims {size[0]} x {size[1]} pixels")
    return size


def read_folder(files: list[Path], numbers: tuple[int, ...]) -> Frames:
    """The chosen images: uint8 [n, H, W, 3]. All must have the first one's size."""
    return read_images([files[number] for number in numbers], image_size(files[0]))


def read_images(files: list[Path], size: tuple[int, int]) -> Frames:
    """Images of one (width, height): uint8 [n, H, W, 3]. Raises VideoError for any other."""
    width, height = size
    out = np.empty((len(files), height, width, 3), dtype=np.uint8)
    for row, file in enumerate(files):
        found = image_size(file)
        if found != size:
            raise VideoError(
                file, f"is {found[0]} x {found[1]}, the first image {width} x {height}"
            )
        try:
            with Image.open(file) as image:
                out[row] = np.asarray(image.convert("RGB"))
        except (OSError, ValueError, SyntaxError) as error:
            raise VideoError(file, f"is a damaged image: {error}") from None
    return out


def _pattern(template: str) -> re.Pattern[str]:
    """The template as a pattern of file names with one group, its number."""
    try:
        name = template.format(7)
        varies = name != template.format(8)
    except (ValueError, IndexError, KeyError, TypeError):
        varies = False
    fields = re.findall(r"\{[^{}]*\}", template)
    if not varies or len(fields) != 1 or "/" in template:
        raise UserError(f"frame template {template!r}: expected one number, as in {TEMPLATE!r}")
    before, after = template.split(fields[0])
    return re.compile(f"{re.escape(before)}(\\d+){re.escape(after)}")
