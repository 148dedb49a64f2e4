"""Pictures of matrices as PNG data URIs: one pixel a class pair, enlarged by the page."""

from __future__ import annotations

import base64
import io

import numpy as np
from numpy.typing import NDArray
from PIL import Image

# Blue for right, orange for wrong: told apart by all common kinds of colour vision, and legible
# on white and on near-black, so one picture serves both themes.
RIGHT = (59, 116, 224)
WRONG = (226, 114, 34)

# Dark blue to yellow through teal, rising steadily in lightness.
RAMP = (
    (38, 32, 78),
    (48, 84, 146),
    (33, 138, 150),
    (84, 184, 121),
    (189, 216, 88),
    (253, 236, 140),
)


def confusion_picture(confusion: NDArray[np.int64]) -> str:
    """Shares of each row of counts [C, C]; opacity is the square root of the share.

    The root lifts rare mistakes: one video in fifty is a seventh as opaque as all of them.
    """
    shares = confusion / np.maximum(confusion.sum(axis=1, keepdims=True), 1)  # [C, C]
    pixels = np.empty((*confusion.shape, 4), dtype=np.uint8)
    pixels[..., :3] = WRONG
    np.einsum("iic->ic", pixels)[..., :3] = RIGHT
    pixels[..., 3] = np.round(255 * np.sqrt(shares))
    return _data_uri(pixels)


def cosine_picture(cosines: NDArray[np.float64]) -> str:
    """Cosines [C, C] on the ramp from 0 to 1; negative ones take the colour of 0."""
    position = np.clip(cosines, 0, 1) * (len(RAMP) - 1)
    below = np.minimum(position.astype(int), len(RAMP) - 2)  # [C, C]
    stops = np.array(RAMP, dtype=np.float64)
    share = (position - below)[..., None]  # [C, C, 1]
    pixels = stops[below] * (1 - share) + stops[below + 1] * share  # [C, C, 3]
    return _data_uri(np.round(pixels).astype(np.uint8))


def ramp_css() -> str:
    """The ramp as the colour list of a CSS gradient."""
    return ", ".join(f"rgb({r} {g} {b})" for r, g, b in RAMP)


def _data_uri(pixels: NDArray[np.uint8]) -> str:
    data = io.BytesIO()
    Image.fromarray(pixels).save(data, "PNG", optimize=True)
    return "data:image/png;base64," + base64.b64encode(data.getvalue()).decode()
