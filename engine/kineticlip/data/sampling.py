"""Which frames of a video a clip shows: pure functions of the frame count, 0-based indices.

Four official samplings live here: Text4Vis uniform and dense, BIKE's training sampler, and the
strided ("dense") and segment ("TSN") samplings that EVL and Vita-CLIP share. Random ones draw from
a generator that is passed in, in the order of the official codes, so their streams repeat bit for
bit. Letters: T frames of a clip, K clips of a video.
"""

from __future__ import annotations

import random
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Indices = NDArray[np.int64]

DENSE_SPAN = 128  # frames that a Text4Vis dense clip reaches over


@dataclass(frozen=True)
class ClipRandom:
    """The two generators that the official codes mix; equal seeds give equal clips."""

    python: random.Random
    numpy: np.random.RandomState

    @classmethod
    def seeded(cls, *keys: int) -> ClipRandom:
        """Independent generators for every tuple of keys, such as (seed, epoch, index)."""
        first, second = np.random.SeedSequence(keys).generate_state(2)
        return cls(random.Random(int(first)), np.random.RandomState(second))


def text4vis_uniform_train(count: int, num_frames: int, rng: np.random.RandomState) -> Indices:
    """One random frame of each of T equal segments; a short video shows every frame. -> [T]

    Text4Vis `datasets/`: Video_dataset._sample_indices, not dense.
    """
    if count <= num_frames:
        extra = rng.randint(0, count, num_frames - count)
        return np.sort(np.concatenate([np.arange(count), extra]).astype(np.int64))
    ticks = np.arange(num_frames + 1) * count // num_frames
    # One broadcast call draws the same stream as a call per segment, five times faster.
    return np.asarray(ticks[:-1] + rng.randint(0, np.diff(ticks)), dtype=np.int64)


def text4vis_dense_train(count: int, num_frames: int, rng: np.random.RandomState) -> Indices:
    """T frames at a fixed stride within 128 frames from a random start, wrapping round. -> [T]

    Official quirk kept: the last possible start is never drawn. Validation inside the official
    training script draws the same way.
    """
    starts = max(1, 1 + count - DENSE_SPAN)
    start = 0 if starts == 1 else int(rng.randint(0, starts - 1))
    return _dense_clips(np.array([start]), count, num_frames).reshape(-1)


def text4vis_uniform_test(count: int, num_frames: int, clips: int) -> Indices:
    """K evenly shifted combs of T frames. -> [K, T]

    Official quirk kept: with fewer frames than T a start may be -1, which is the last frame
    (NumPy >= 1.20 rounds the starts down). One clip is the official validation sampler.
    """
    tick = count / num_frames
    starts = np.floor(np.linspace(0, tick - 1, clips))
    places: Indices = (starts[:, None] + tick * np.arange(num_frames)).astype(np.int64)  # [K, T]
    return places % count


def text4vis_dense_test(count: int, num_frames: int, clips: int) -> Indices:
    """K clips of stride 128 // T whose starts spread over the video, wrapping round. -> [K, T]

    The official code divides by zero for one clip; here that clip starts at frame 0.
    """
    step = max(0, count - DENSE_SPAN) // max(1, clips - 1)
    return _dense_clips(np.arange(clips) * step, count, num_frames)


def _dense_clips(starts: Indices, count: int, num_frames: int) -> Indices:
    offsets = np.arange(num_frames, dtype=np.int64) * (DENSE_SPAN // num_frames)
    return (starts[:, None] + offsets) % count  # [K, T]


def bike_train(count: int, num_frames: int, rng: random.Random) -> Indices:
    """A frame of each of T segments, both borders included, from Python's generator. -> [T]"""
    low, high = _segment_borders(count, num_frames)
    pairs = zip(low.tolist(), high.tolist(), strict=True)
    return np.array([rng.randint(*pair) for pair in pairs], dtype=np.int64)


def segment_train(count: int, num_frames: int, rng: np.random.RandomState) -> Indices:
    """A frame of each of T segments, both borders included (EVL's `--tsn_sampling`). -> [T]"""
    low, high = _segment_borders(count, num_frames)
    return rng.randint(low, high + 1).astype(np.int64)


def _segment_borders(count: int, num_frames: int) -> tuple[Indices, Indices]:
    # np.rint is the half-even rounding of Python's round(), which the official codes use.
    borders = np.rint((count - 1) / num_frames * np.arange(num_frames + 1)).astype(np.int64)
    return borders[:-1], borders[1:]


def segment_test(count: int, num_frames: int, clips: int) -> Indices:
    """Segment midpoints; K clips take K evenly spaced places within every segment. -> [K, T]

    The official codes have no such sampling: with `--tsn_sampling` their evaluation stops with an
    error. Clip k of K takes the frame at (i + (k + 1/2) / K) / T of the video, rounded down.
    """
    place = np.arange(num_frames) * (2 * clips) + 2 * np.arange(clips)[:, None] + 1  # [K, T]
    return place * count // (2 * clips * num_frames)


def strided_train(count: int, num_frames: int, stride: int, rng: np.random.RandomState) -> Indices:
    """T frames at a stride from a random start. -> [T]

    Official quirk kept: a short video repeats the last frame that the stride reaches, not the
    last frame of the video (which is what the test sampling repeats).
    """
    offsets = np.arange(num_frames, dtype=np.int64) * stride
    span = int(offsets[-1]) + 1
    if span >= count:
        return np.minimum(offsets, (count - 1) // stride * stride)
    return offsets + int(rng.randint(0, count - span + 1))


def strided_test(count: int, num_frames: int, stride: int, clips: int) -> Indices:
    """K clips of T frames at a stride, spread from first to last start. -> [K, T]

    One clip stands in the middle. A short video is continued with its last frame.
    """
    offsets = np.arange(num_frames, dtype=np.int64) * stride
    slide = max(0, count - 1 - int(offsets[-1]))
    if clips == 1:
        starts = np.array([slide // 2])
    else:
        starts = np.rint(slide / (clips - 1) * np.arange(clips)).astype(np.int64)
    return np.minimum(starts[:, None] + offsets, count - 1)  # [K, T]
