"""The pixels that Pillow 13 resizes to, with older versions too: Python 3.10 has none of 13."""

from __future__ import annotations

import PIL
from PIL import Image

COLUMNS_FIRST = int(PIL.__version__.split(".")[0]) < 13  # whatever the shape


def resized(image: Image.Image, size: tuple[int, int], resample: Image.Resampling) -> Image.Image:
    """Pillow 13's `image.resize(size, resample)`; size: (width, height)."""
    lost_width, lost_height = image.width - size[0], image.height - size[1]
    if COLUMNS_FIRST and lost_height > max(0, 2 * lost_width):
        image = image.resize((image.width, size[1]), resample)
    return image.resize(size, resample)
