"""A stream of videos scored into a results folder, each written as soon as it is done."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator
from dataclasses import replace

import numpy as np
import torch
from numpy.typing import NDArray

from kineticlip.data.batch import BadVideo, VideoViews
from kineticlip.evaluation.clock import Clock, time_the_model
from kineticlip.evaluation.loop import Scored, score_stream
from kineticlip.evaluation.recognizer import Recognizer
from kineticlip.evaluation.result_writer import ResultWriter


def evaluate_videos(
    recognizer: Recognizer,
    stream: Iterable[VideoViews | BadVideo],
    writer: ResultWriter,
    *,
    total: int,
    done: int = 0,
    thumbnails: int = 0,
    progress: bool = True,
) -> Clock:
    """Scores a stream of videos into a results folder, each as soon as it is done.

    `total` counts the videos to come, and `done` those before, for the bar. Pictures of the first
    `thumbnails` good videos are kept. The returned clock knows where the time went, and how fast
    the model alone is on the last full group of videos.
    """
    from tqdm import tqdm

    clock = Clock()
    shown: list[VideoViews] = []
    results = score_stream(
        recognizer.model,
        recognizer.method,
        _with_pictures(stream, shown, thumbnails),
        device=recognizer.device,
        chunk=recognizer.ready.chunk,
        clock=clock,
        one_by_one=recognizer.config.eval.deterministic,
    )
    bar = tqdm(
        total=done + total,
        initial=done,
        unit="video",
        disable=None if progress else True,
        dynamic_ncols=True,
    )
    with bar:
        for item in results:
            _write(writer, item)
            bar.update()
    clock.ended = time.perf_counter()
    for video in shown:
        writer.save_thumbnail(video.name, _pictures(video))
    time_the_model(recognizer.model, recognizer.method, clock)
    clock.sample = []
    return clock


def _write(writer: ResultWriter, item: Scored | BadVideo) -> None:
    if isinstance(item, BadVideo):
        writer.add_bad(item.name, item.reason)
        return
    video = item.video
    writer.add(
        video.name,
        item.scores.numpy(),
        views=video.num_views,
        frames=video.num_frames,
        decoder=video.decoder,
        notes=video.notes,
    )


def _with_pictures(
    stream: Iterable[VideoViews | BadVideo], kept: list[VideoViews], limit: int
) -> Iterator[VideoViews | BadVideo]:
    """The stream itself; of its first `limit` good videos a few pixels stay behind in `kept`."""
    for item in stream:
        if isinstance(item, VideoViews) and len(kept) < limit:
            shown = np.linspace(0, len(item.images) - 1, min(4, len(item.images))).round()
            kept.append(replace(item, images=item.images[shown.astype(int), :1].clone()))
        yield item


def _pictures(video: VideoViews) -> NDArray[np.uint8]:
    """Kept frames as pictures, uint8 [n, S, S, 3]; normalised ones are brought back to pixels."""
    frames = video.images[:, 0].cpu().permute(0, 2, 3, 1)  # [n, S, S, 3]
    if frames.dtype != torch.uint8:
        mean, std = torch.tensor(video.statistics.mean), torch.tensor(video.statistics.std)
        frames = ((frames.float() * std + mean) * 255).round().clamp(0, 255).byte()
    return frames.numpy()
