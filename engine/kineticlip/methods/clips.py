"""Scoring views with towers that mix the frames of a clip: every distinct clip goes through once.

Shape letters: K clips, T frames, V distinct crops of one video, S side in pixels, E embedding,
C classes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from kineticlip.data.batch import VideoViews


def distinct_clips(video: VideoViews) -> tuple[Tensor, Tensor]:
    """The clips of a video without repeats, and for every view its place among them.

    A short video shows the same frames in every clip, a square one the same pixels in every crop.
    -> pixels [V * K', T, 3, S, S], int64 [crops * K], crop-major.
    """
    rows, place = torch.unique(video.frame_index, dim=0, return_inverse=True)  # [K', T], [K]
    clips = video.images[rows].movedim(2, 0)  # [V, K', T, 3, S, S]
    views = video.crop_index[:, None] * len(rows) + place  # [crops, K]
    return clips.flatten(0, 1), views.flatten()


def embed_distinct(
    encode: Callable[[Tensor], Tensor], videos: Sequence[VideoViews], chunk: int
) -> list[Tensor]:
    """Embeddings of every view of each video, float32 [crops * K, E], crop-major.

    encode: clips [B, T, 3, S, S] -> [B, E]; it sees at most `chunk` images, or one clip.
    """
    pairs = [distinct_clips(video) for video in videos]
    clips = torch.cat([pixels for pixels, _ in pairs])
    batches = clips.split(max(1, chunk // clips.shape[1]))
    embeddings = torch.cat([encode(batch).float() for batch in batches])
    parts = embeddings.split([len(pixels) for pixels, _ in pairs])
    return [rows[place] for rows, (_, place) in zip(parts, pairs, strict=True)]
