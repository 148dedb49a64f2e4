"""The sampling and pixel rules of the official codes, a record each: all that loaders know of them.

`data.pipeline` and `Method.pipeline` name one; `pipeline_of` looks it up, once a loader. Letters:
T frames of a clip, K clips of a video, U distinct frames, V distinct crops, S side of a crop.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Protocol

import torch
from torch import Tensor

from kineticlip.config import DataConfig, ViewConfig
from kineticlip.data import sampling
from kineticlip.data.augment import (
    BIKE_SOMETHING,
    PLAIN_RULES,
    TEXT4VIS_SOMETHING,
    PillowRules,
    augment_evl,
    augment_pillow,
)
from kineticlip.data.sampling import DENSE_SPAN, ClipRandom, Indices
from kineticlip.data.statistics import PixelStatistics
from kineticlip.data.views import (
    Frames,
    Geometry,
    apply_pillow,
    apply_tensor,
    evl_geometry,
    text4vis_geometry,
)
from kineticlip.runtime.errors import UserError
from kineticlip_kernels.patches import cut_crops


class Cut(Protocol):
    """Decoded frames to the distinct crops of a geometry: [U, H, W, 3] -> [U, V, 3, S, S].

    numbers, count: which frames of a video of how many these are, where the official code resizes
    whole videos. statistics: what float32 pixels are normalised with; bytes stay bytes.
    """

    def __call__(
        self,
        frames: Frames,
        geometry: Geometry,
        *,
        statistics: PixelStatistics,
        numbers: Sequence[int] | None = None,
        count: int = 0,
    ) -> Tensor: ...


class CutOnDevice(Protocol):
    """The same for frames that are tensors, on their device; the same bytes."""

    def __call__(
        self,
        frames: Tensor,
        geometry: Geometry,
        *,
        statistics: PixelStatistics,
        numbers: Sequence[int] | None = None,
        count: int = 0,
    ) -> Tensor: ...


@dataclass(frozen=True, kw_only=True)
class Pipeline:
    """One official code's way from a video to pixels.

    sample_train(count, data, rng) -> [T]: the frames of one training clip of a video of `count`
    frames; sample_stretch the same for a list's stretch of a video. data.sampling `dense` means
    Text4Vis's 128-frame span, or a stride of data.sampling_rate for evl; `uniform` means segments.
    sample_test(count, data, views) -> [K, T]: those of every clip of one test video.
    geometry(width, height, data, crops): the views of a frame of that size.
    cut, cut_on_device: see Cut. augment(frames, label, data, rng, statistics): the training pixels
    [T, 3, S, S] of uint8 [T, H, W, 3], and the label, which a mirrored clip may change.
    dtype: of all pixels: uint8, or float32 normalised with the statistics given.
    Settings that fit no video raise UserError.
    """

    name: str
    sample_train: Callable[[int, DataConfig, ClipRandom], Indices]
    sample_stretch: Callable[[int, DataConfig, ClipRandom], Indices]
    sample_test: Callable[[int, DataConfig, ViewConfig], Indices]
    geometry: Callable[[int, int, DataConfig, int], Geometry]
    cut: Cut
    cut_on_device: CutOnDevice
    augment: Callable[[Frames, int, DataConfig, ClipRandom, PixelStatistics], tuple[Tensor, int]]
    dtype: torch.dtype


def _text4vis_train(count: int, data: DataConfig, rng: ClipRandom) -> Indices:
    if data.sampling == "dense":
        return sampling.text4vis_dense_train(count, _dense_frames(data), rng.numpy)
    return sampling.text4vis_uniform_train(count, data.num_frames, rng.numpy)


def _bike_train(count: int, data: DataConfig, rng: ClipRandom) -> Indices:
    if data.sampling == "dense":
        return sampling.text4vis_dense_train(count, _dense_frames(data), rng.numpy)
    return sampling.bike_train(count, data.num_frames, rng.python)


def _text4vis_test(count: int, data: DataConfig, views: ViewConfig) -> Indices:
    if views.sampling == "dense":
        return sampling.text4vis_dense_test(count, _dense_frames(data), views.clips)
    return sampling.text4vis_uniform_test(count, data.num_frames, views.clips)


def _dense_frames(data: DataConfig) -> int:
    if data.num_frames > DENSE_SPAN:
        raise UserError(
            f"dense sampling spreads at most {DENSE_SPAN} frames over {DENSE_SPAN}, got "
            f"data.num_frames={data.num_frames}; use sampling: uniform"
        )
    return data.num_frames


def _evl_train(count: int, data: DataConfig, rng: ClipRandom) -> Indices:
    if data.sampling == "dense":
        return sampling.strided_train(count, data.num_frames, data.sampling_rate, rng.numpy)
    return sampling.segment_train(count, data.num_frames, rng.numpy)


def _evl_test(count: int, data: DataConfig, views: ViewConfig) -> Indices:
    if views.sampling == "dense":
        return sampling.strided_test(count, data.num_frames, data.sampling_rate, views.clips)
    return sampling.segment_test(count, data.num_frames, views.clips)


def _pillow_geometry(
    width: int, height: int, data: DataConfig, crops: int, *, something: PillowRules
) -> Geometry:
    fixed = something.frame_size if data.something else None
    return text4vis_geometry(width, height, size=data.resolution, crops=crops, fixed=fixed)


def _evl_geometry(width: int, height: int, data: DataConfig, crops: int) -> Geometry:
    return evl_geometry(width, height, size=data.resolution, crops=crops)


def _cut_bytes(
    frames: Frames,
    geometry: Geometry,
    *,
    statistics: PixelStatistics,
    numbers: Sequence[int] | None = None,
    count: int = 0,
) -> Tensor:
    return apply_pillow(frames, geometry)


def _cut_bytes_on_device(
    frames: Tensor,
    geometry: Geometry,
    *,
    statistics: PixelStatistics,
    numbers: Sequence[int] | None = None,
    count: int = 0,
) -> Tensor:
    return cut_crops(
        frames,
        [(crop.x, crop.y, crop.flip) for crop in geometry.distinct()[0]],
        width=geometry.width,
        height=geometry.height,
        side=geometry.size,
    )


def _augment_pillow(
    frames: Frames,
    label: int,
    data: DataConfig,
    rng: ClipRandom,
    statistics: PixelStatistics,
    *,
    something: PillowRules,
) -> tuple[Tensor, int]:
    rules = something if data.something else PLAIN_RULES
    return augment_pillow(frames, label, data, rng, rules=rules)


def _augment_evl(
    frames: Frames, label: int, data: DataConfig, rng: ClipRandom, statistics: PixelStatistics
) -> tuple[Tensor, int]:
    return augment_evl(frames, data.resolution, rng, statistics=statistics), label


PIPELINES = {
    pipeline.name: pipeline
    for pipeline in (
        Pipeline(
            name="text4vis",
            sample_train=_text4vis_train,
            sample_stretch=_text4vis_train,
            sample_test=_text4vis_test,
            geometry=partial(_pillow_geometry, something=TEXT4VIS_SOMETHING),
            cut=_cut_bytes,
            cut_on_device=_cut_bytes_on_device,
            augment=partial(_augment_pillow, something=TEXT4VIS_SOMETHING),
            dtype=torch.uint8,
        ),
        Pipeline(
            name="bike",
            sample_train=_bike_train,
            # BIKE draws the stretches of Charades with the sampler of Text4Vis, not its own.
            sample_stretch=_text4vis_train,
            sample_test=_text4vis_test,
            geometry=partial(_pillow_geometry, something=BIKE_SOMETHING),
            cut=_cut_bytes,
            cut_on_device=_cut_bytes_on_device,
            augment=partial(_augment_pillow, something=BIKE_SOMETHING),
            dtype=torch.uint8,
        ),
        Pipeline(  # Vita-CLIP's too
            name="evl",
            sample_train=_evl_train,
            sample_stretch=_evl_train,
            sample_test=_evl_test,
            geometry=_evl_geometry,
            cut=apply_tensor,
            cut_on_device=apply_tensor,
            augment=_augment_evl,
            dtype=torch.float32,
        ),
    )
}


def pipeline_of(data: DataConfig, default: str) -> Pipeline:
    """The rules in force: data.pipeline's, or those named `default`, the method's own, for auto."""
    return PIPELINES[default if data.pipeline == "auto" else data.pipeline]


def training_pixels(
    pipeline: Pipeline,
    frames: Frames,
    label: int,
    data: DataConfig,
    *,
    rng: ClipRandom,
    statistics: PixelStatistics,
) -> tuple[Tensor, int]:
    """The pixels of one training clip, and its label.

    frames: uint8 [T, H, W, 3] -> [T, 3, S, S]. data.augmentation: `none` gives the centre view;
    `released` what the official code does; `published` what its published runs logged besides.
    """
    if data.augmentation == "none":
        height, width = frames.shape[1:3]
        centre = pipeline.geometry(width, height, data, 1)
        return pipeline.cut(frames, centre, statistics=statistics)[:, 0], label
    return pipeline.augment(frames, label, data, rng, statistics)
