"""What travels from the loaders to a model: training clips, and the views of one test video."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from kineticlip.data.statistics import CLIP_STATISTICS, PixelStatistics


@dataclass(frozen=True, kw_only=True)
class Batch:
    """Training clips of one forward.

    pixels: uint8 [B, T, 3, S, S], or float32 already normalised; labels: int64 [B], or
    float32 [B, C] where a clip has several; names: the list entries they came from.
    """

    pixels: Tensor
    labels: Tensor
    names: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class VideoViews:
    """One test video: its distinct images once, and where each view finds its own.

    images: uint8 [U, V, 3, S, S] (U distinct frames, V distinct crops), or float32 already
    normalised. View (crop i, clip k) shows images[frame_index[k], crop_index[i]]; views are
    numbered crop-major, as in the official codes. frame_index: int64 [K, T]; crop_index: int64
    [crops]. notes: why its frames were read another way than planned. statistics: what float32
    images were normalised with.
    """

    name: str
    label: int
    images: Tensor
    frame_index: Tensor
    crop_index: Tensor
    decoder: str
    num_frames: int
    notes: tuple[str, ...] = ()
    statistics: PixelStatistics = CLIP_STATISTICS

    @property
    def num_views(self) -> int:
        return len(self.crop_index) * len(self.frame_index)

    def to(self, device: torch.device) -> VideoViews:
        """The same video with its images and indices on a device."""
        return replace(
            self,
            images=self.images.to(device),
            frame_index=self.frame_index.to(device),
            crop_index=self.crop_index.to(device),
        )

    def clips(self) -> Tensor:
        """Every view written out: [crops * K, T, 3, S, S]."""
        views = self.images[self.frame_index][:, :, self.crop_index]  # [K, T, crops, 3, S, S]
        return views.permute(2, 0, 1, 3, 4, 5).flatten(0, 1)  # [crops * K, T, 3, S, S]


@dataclass(frozen=True)
class BadVideo:
    """A video that could not be read, and why in one line."""

    name: str
    label: int
    reason: str
