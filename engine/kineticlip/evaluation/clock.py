"""Where the time of an evaluation goes, and how fast its model is alone."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace

import torch
from torch import nn

from kineticlip.data.batch import BadVideo, VideoViews
from kineticlip.evaluation.speed import STAGES, Speed
from kineticlip.methods.method import Method

# A full group is scored again, to know the model's own speed; one view of a video where that would
# take longer than CEILING_LIMIT, and nothing where even that would, and a quarter of the run.
CEILING_LIMIT = 10.0  # seconds
CEILING_SECONDS = 2.0  # at most; short runs spend 2 % of their time on it, one group at least


@dataclass
class Clock:
    """Where the loop's time went, in seconds, and how much it did."""

    waits: dict[str, float] = field(default_factory=lambda: dict.fromkeys(STAGES, 0.0))
    videos: int = 0
    images: int = 0
    views: int = 0
    halvings: int = 0  # of the chunk, after running out of device memory
    chunk: int = 0  # images per trunk forward
    ceiling: float | None = None  # images per second of the model alone, where it was timed
    sample: list[VideoViews] = field(default_factory=list)  # the last full group, on the device
    started: float = field(default_factory=time.perf_counter)
    ended: float = 0.0

    @contextmanager
    def waiting_for(self, stage: str) -> Iterator[None]:
        """Counts the time that passes inside as waiting for this one of STAGES."""
        start = time.perf_counter()
        yield
        self.waits[stage] += time.perf_counter() - start

    def count(self, videos: Sequence[VideoViews]) -> None:
        """These videos are scored."""
        self.videos += len(videos)
        self.images += image_count(videos)
        self.views += sum(video.num_views for video in videos)

    def speed(self, *, tower: str = "", decoding: str = "") -> Speed:
        """What the clock shows, up to `ended` or to now."""
        elapsed = max((self.ended or time.perf_counter()) - self.started, 1e-9)
        ceiling = self.ceiling
        return Speed(
            seconds=elapsed,
            videos_per_second=self.videos / elapsed,
            views_per_second=self.views / elapsed,
            images_per_second=self.images / elapsed,
            videos=self.videos,
            images=self.images,
            chunk=self.chunk,
            tower=tower,
            chunk_halvings=self.halvings,
            model_images_per_second=ceiling,
            percent_of_model_speed=100 * self.images / elapsed / ceiling if ceiling else None,
            decoding=decoding,
            decode_percent=100 * self.waits["decode"] / elapsed,
            transfer_percent=100 * self.waits["transfer"] / elapsed,
            compute_percent=100 * self.waits["compute"] / elapsed,
        )


def image_count(videos: Iterable[VideoViews | BadVideo]) -> int:
    """How many distinct images these videos hold; a bad one holds none."""
    return sum(
        video.images.shape[0] * video.images.shape[1]
        for video in videos
        if isinstance(video, VideoViews)
    )


def one_view(video: VideoViews) -> VideoViews:
    """The first view of a video, and its images alone."""
    frames, frame_index = video.frame_index[:1].unique(return_inverse=True)
    crops, crop_index = video.crop_index[:1].unique(return_inverse=True)
    images = video.images[frames][:, crops]
    return replace(video, images=images, frame_index=frame_index, crop_index=crop_index)


def time_the_model(model: nn.Module, method: Method, clock: Clock) -> None:
    """Sets the clock's ceiling by scoring its sample again, or one view of it."""
    if not clock.images:
        return
    elapsed, each = clock.ended - clock.started, clock.waits["compute"] / clock.images
    for sample in (clock.sample, [one_view(video) for video in clock.sample[:1]]):
        limit = CEILING_LIMIT if sample is clock.sample else max(CEILING_LIMIT, elapsed / 4)
        if sample and each * image_count(sample) <= limit:
            seconds = min(CEILING_SECONDS, 0.02 * elapsed)
            with suppress(torch.OutOfMemoryError):
                clock.ceiling = measure_ceiling(model, method, sample, clock.chunk, seconds=seconds)
            return


def measure_ceiling(
    model: nn.Module, method: Method, videos: Sequence[VideoViews], chunk: int, *, seconds: float
) -> float:
    """Images per second of the model alone, on views that are already on the device."""
    device, images = videos[0].images.device, image_count(videos)
    rounds, start = 0, time.perf_counter()
    with torch.inference_mode():
        while rounds == 0 or time.perf_counter() - start < seconds:
            method.score(model, videos, chunk)
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            rounds += 1
    return rounds * images / (time.perf_counter() - start)
