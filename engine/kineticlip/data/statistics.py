"""Which mean and standard deviation a model's weights want pixels to be normalised with."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class PixelStatistics:
    """Mean and standard deviation by channel, RGB, of pixels in 0..1.

    They belong to the weights: a tower normalises bytes itself (uint8 pixels), and the loaders
    normalise with the same numbers where a pipeline hands over float32.
    """

    mean: tuple[float, float, float]
    std: tuple[float, float, float]


# Of CLIP's own training images (openai/CLIP, `clip/clip.py`: _transform).
CLIP_STATISTICS = PixelStatistics(
    mean=(0.48145466, 0.4578275, 0.40821073), std=(0.26862954, 0.26130258, 0.27577711)
)
