"""The evaluation loop: files to scores, every view of a video from one decode.

While the device computes one group of videos, the loader's threads decode the next and a copy
stream brings them over; the clock says what the loop waited for.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from kineticlip.data.batch import BadVideo, VideoViews
from kineticlip.evaluation.results import ResultWriter
from kineticlip.methods.method import Method

# A full group is scored again, to know the model's own speed; one view of a video where that would
# take longer than CEILING_LIMIT, and nothing where even that would, and a quarter of the run.
CEILING_LIMIT = 10.0  # seconds
CEILING_SECONDS = 2.0  # at most; short runs spend 2 % of their time on it, one group at least
GROUP = {"cpu": 1, "cuda": 4}  # full chunks of one group: what its last, smaller one weighs


@dataclass
class Clock:
    """Where the loop's time went, in seconds, and how much it did."""

    waits: dict[str, float] = field(
        default_factory=lambda: {"decode": 0.0, "transfer": 0.0, "compute": 0.0}
    )
    videos: int = 0
    images: int = 0
    views: int = 0
    halvings: int = 0  # of the chunk, after running out of device memory
    chunk: int = 0  # images per trunk forward
    tower: str = ""  # how the trunk runs
    ceiling: float | None = None  # images per second of the model alone, where it was timed
    sample: list[VideoViews] = field(default_factory=list)  # the last full group, on the device
    started: float = field(default_factory=time.perf_counter)
    ended: float = 0.0

    @contextmanager
    def waiting_for(self, what: str) -> Iterator[None]:
        start = time.perf_counter()
        yield
        self.waits[what] += time.perf_counter() - start

    def summary(self) -> dict[str, float | str | None]:
        """Rates per second of wall time, and the share of it spent waiting for each stage."""
        elapsed = max((self.ended or time.perf_counter()) - self.started, 1e-9)
        return {
            "seconds": elapsed,
            "videos_per_second": self.videos / elapsed,
            "views_per_second": self.views / elapsed,
            "images_per_second": self.images / elapsed,
            "videos": self.videos,
            "images": self.images,
            "chunk": self.chunk,
            "tower": self.tower,
            "chunk_halvings": self.halvings,
            "model_images_per_second": self.ceiling,
            "percent_of_model_speed": (
                100 * self.images / elapsed / self.ceiling if self.ceiling else None
            ),
            **{f"{what}_percent": 100 * spent / elapsed for what, spent in self.waits.items()},
        }


@dataclass(frozen=True)
class Scored:
    """One finished video: its views without the pixels, and probabilities float32 [C]."""

    video: VideoViews
    scores: Tensor


def score_stream(
    model: nn.Module,
    method: Method,
    stream: Iterable[VideoViews | BadVideo],
    *,
    device: torch.device,
    chunk: int,
    clock: Clock | None = None,
    one_by_one: bool = False,
) -> Iterator[Scored | BadVideo]:
    """Scores videos as they come, in their order; a bad one passes through where it stood.

    Videos are grouped until they hold `chunk` images, on a GPU several times that, so the trunk
    sees full batches across videos. On a GPU results are fetched one group late, so the host
    never waits for compute while there is something to decode. Out of device memory: `chunk` is
    halved, the group is done again by halves and the clock counts it; no video is lost.

    one_by_one: a group is one video, so the shapes of every product, and with them the last bit
    of a score, depend on that video alone, wherever a run was interrupted.
    """
    clock = clock or Clock()
    clock.chunk = chunk
    upload = _uploader(device)
    full = GROUP[device.type]
    source = iter(stream)
    group: list[VideoViews | BadVideo] = []
    pending: tuple[list[VideoViews | BadVideo], Tensor | None] | None = None
    images = 0
    finished = False
    while not finished:
        with clock.waiting_for("decode"):
            item = next(source, None)
        if item is None:
            finished = True
        else:
            group.append(item)
            images += 0 if isinstance(item, BadVideo) else len(item.images.flatten(0, 1))
        if group and (finished or one_by_one or images >= full * clock.chunk):
            videos = [video for video in group if isinstance(video, VideoViews)]
            with clock.waiting_for("transfer"):
                uploaded = _uploaded(videos, upload)
            with clock.waiting_for("compute"):
                scores = _score_group(model, method, uploaded or videos, upload, clock)
                if uploaded and not (finished and clock.sample):  # the last is seldom full
                    clock.sample = uploaded
                if pending is not None:
                    yield from _results(*pending)
            clock.videos += len(videos)
            clock.images += images
            clock.views += sum(video.num_views for video in videos)
            pending = (group, scores)
            group, images = [], 0
    if pending is not None:
        with clock.waiting_for("compute"):
            results = list(_results(*pending))
        yield from results


def _uploaded(
    videos: Sequence[VideoViews], upload: Callable[[VideoViews], VideoViews]
) -> list[VideoViews]:
    """The videos on the device; none where they do not fit there together."""
    try:
        return [upload(video) for video in videos]
    except torch.OutOfMemoryError:
        return []


def _score_group(
    model: nn.Module,
    method: Method,
    videos: Sequence[VideoViews],
    upload: Callable[[VideoViews], VideoViews],
    clock: Clock,
) -> Tensor | None:
    """Scores [N, C]. Out of memory: fewer images a forward, and half the videos at a time."""
    if not videos:
        return None
    try:
        with torch.inference_mode():
            return method.score(model, [upload(video) for video in videos], clock.chunk)
    except torch.OutOfMemoryError:
        if clock.chunk == len(videos) == 1:
            raise
    # Here the failed attempt's tensors are gone; inside the handler its frames would hold them.
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    clock.chunk = max(1, clock.chunk // 2)
    clock.halvings += 1
    clock.sample = []
    middle = len(videos) // 2
    halves = (videos[:middle], videos[middle:])
    scores = [_score_group(model, method, half, upload, clock) for half in halves]
    return torch.cat([half for half in scores if half is not None])


def _results(
    group: Sequence[VideoViews | BadVideo], scores: Tensor | None
) -> Iterator[Scored | BadVideo]:
    rows = iter(scores.float().cpu()) if scores is not None else iter(())
    for item in group:
        if isinstance(item, BadVideo):
            yield item
        else:
            yield Scored(replace(item, images=item.images[:0]), next(rows))


def _uploader(device: torch.device) -> Callable[[VideoViews], VideoViews]:
    """Moves a video's pixels and indices to the device; on a GPU from pinned memory, aside."""
    if device.type != "cuda":
        return lambda video: video
    copies = torch.cuda.Stream(device)

    def upload(video: VideoViews) -> VideoViews:
        if video.images.is_cuda:  # decoded there
            return video
        with torch.cuda.stream(copies):
            moved = replace(
                video,
                images=_pinned(video.images).to(device, non_blocking=True),
                frame_index=video.frame_index.to(device, non_blocking=True),
                crop_index=video.crop_index.to(device, non_blocking=True),
            )
        compute = torch.cuda.current_stream(device)
        compute.wait_stream(copies)
        for tensor in (moved.images, moved.frame_index, moved.crop_index):
            tensor.record_stream(compute)
        return moved

    return upload


def _pinned(tensor: Tensor) -> Tensor:
    return tensor if tensor.is_cuda or tensor.is_pinned() else tensor.pin_memory()


def measure_ceiling(
    model: nn.Module, method: Method, videos: Sequence[VideoViews], chunk: int, *, seconds: float
) -> float:
    """Images per second of the model alone, on views that are already on the device."""
    device = videos[0].images.device
    images = sum(len(video.images.flatten(0, 1)) for video in videos)
    rounds, start = 0, time.perf_counter()
    with torch.inference_mode():
        while rounds == 0 or time.perf_counter() - start < seconds:
            method.score(model, videos, chunk)
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            rounds += 1
    return rounds * images / (time.perf_counter() - start)


def evaluate_videos(
    model: nn.Module,
    method: Method,
    stream: Iterable[VideoViews | BadVideo],
    writer: ResultWriter,
    *,
    total: int,
    done: int = 0,
    device: torch.device,
    chunk: int,
    thumbnails: int = 0,
    one_by_one: bool = False,
    progress: bool = True,
    tower: str = "",
) -> Clock:
    """Scores a stream of videos into a results folder, each as soon as it is done.

    `total` counts the videos to come, and `done` those before, for the bar. Pictures of the first
    `thumbnails` good videos are kept. The returned clock knows where the time went, and how fast
    the model alone is on the last full group of videos.
    """
    from tqdm import tqdm

    clock = Clock(tower=tower)
    kept: list[VideoViews] = []
    watched = _keep(stream, kept, thumbnails)
    bar = tqdm(
        total=done + total,
        initial=done,
        unit="video",
        disable=None if progress else True,
        dynamic_ncols=True,
    )
    with bar:
        results = score_stream(
            model, method, watched, device=device, chunk=chunk, clock=clock, one_by_one=one_by_one
        )
        for item in results:
            if isinstance(item, BadVideo):
                writer.add_bad(item.name, item.reason)
            else:
                video = item.video
                writer.add(
                    video.name,
                    item.scores.numpy(),
                    views=video.num_views,
                    frames=video.num_frames,
                    decoder=video.decoder,
                    notes=video.notes,
                )
            bar.update()
    clock.ended = time.perf_counter()
    for video in kept:
        writer.save_thumbnail(video.name, _pictures(video))
    _time_the_model(model, method, clock)
    clock.sample = []
    return clock


def _time_the_model(model: nn.Module, method: Method, clock: Clock) -> None:
    """Sets the clock's ceiling by scoring its sample again, or one view of it."""
    if not clock.images:
        return
    elapsed, each = clock.ended - clock.started, clock.waits["compute"] / clock.images
    for sample in (clock.sample, [_one_view(video) for video in clock.sample[:1]]):
        cost = each * sum(len(video.images.flatten(0, 1)) for video in sample)
        limit = CEILING_LIMIT if sample is clock.sample else max(CEILING_LIMIT, elapsed / 4)
        if sample and cost <= limit:
            seconds = min(CEILING_SECONDS, 0.02 * elapsed)
            with suppress(torch.OutOfMemoryError):
                clock.ceiling = measure_ceiling(model, method, sample, clock.chunk, seconds=seconds)
            return


def _keep(
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
    frames = video.images[:, 0].permute(0, 2, 3, 1)  # [n, S, S, 3]
    if frames.dtype != torch.uint8:
        mean, std = torch.tensor(video.statistics.mean), torch.tensor(video.statistics.std)
        frames = ((frames.float() * std + mean) * 255).round().clamp(0, 255).byte()
    return frames.cpu().numpy()


def compare_precisions(
    model: nn.Module, reference: nn.Module, method: Method, videos: Sequence[VideoViews], chunk: int
) -> dict[str, float]:
    """What the model's precision costs on one view of some videos, against a reference model.

    videos: how many; top1_agreement and top5_agreement: share of them in percent with the same
    first class, and the same set of five; score_difference: the largest, of probabilities.
    """
    if not videos:
        return {"videos": 0, "top1_agreement": 100.0, "top5_agreement": 100.0} | {
            "score_difference": 0.0
        }
    views = [_one_view(video) for video in videos]
    with torch.inference_mode():
        here = method.score(model, views, chunk).cpu()  # [N, C]
        there = method.score(reference, views, chunk).cpu()
    places = [rows.topk(min(5, rows.shape[1]), dim=-1).indices for rows in (here, there)]
    sets = [rows.sort(dim=-1).values for rows in places]
    return {
        "videos": len(videos),
        "top1_agreement": 100 * (places[0][:, 0] == places[1][:, 0]).float().mean().item(),
        "top5_agreement": 100 * (sets[0] == sets[1]).all(dim=-1).float().mean().item(),
        "score_difference": (here - there).abs().max().item(),
    }


def _one_view(video: VideoViews) -> VideoViews:
    """The first view of a video, and its images alone."""
    frames, frame_index = video.frame_index[:1].unique(return_inverse=True)
    crops, crop_index = video.crop_index[:1].unique(return_inverse=True)
    images = video.images[frames][:, crops]
    return replace(video, images=images, frame_index=frame_index, crop_index=crop_index)
