"""The evaluation loop: views to scores, every view of a video from one decode.

While the device computes one group of videos, the loader's threads decode the next and a copy
stream brings them over; the clock says what the loop waited for.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from kineticlip.data.batch import BadVideo, VideoViews
from kineticlip.evaluation.clock import Clock, image_count
from kineticlip.methods.method import Method

GROUP = {"cpu": 1, "cuda": 4}  # full chunks of one group: what its last, smaller one weighs

Upload = Callable[[VideoViews], VideoViews]


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
    scorer = _GroupScorer(model, method, _uploader(device), clock)
    pending: Iterator[Scored | BadVideo] = iter(())
    for group in _groups(stream, clock, 0 if one_by_one else GROUP[device.type]):
        videos = group.videos
        with clock.waiting_for("transfer"):
            uploaded = scorer.upload_all(videos)
        with clock.waiting_for("compute"):
            scores = scorer.score(uploaded or videos)
            if uploaded and not (group.last and clock.sample):  # the last is seldom full
                clock.sample = uploaded
            yield from pending
        clock.count(videos)
        pending = _results(group.items, scores)
    with clock.waiting_for("compute"):
        results = list(pending)
    yield from results


@dataclass(frozen=True)
class _Group:
    """Videos that are scored together, and the bad ones between them; `last` of its stream."""

    items: Sequence[VideoViews | BadVideo]
    last: bool

    @property
    def videos(self) -> list[VideoViews]:
        return [item for item in self.items if isinstance(item, VideoViews)]


def _groups(stream: Iterable[VideoViews | BadVideo], clock: Clock, full: int) -> Iterator[_Group]:
    """The stream in groups of at least `full` chunks of images, the last one aside."""
    source = iter(stream)
    items: list[VideoViews | BadVideo] = []
    images = 0
    while True:
        with clock.waiting_for("decode"):
            item = next(source, None)
        if item is None:
            break
        items.append(item)
        images += image_count([item])
        if images >= full * clock.chunk:
            yield _Group(items, last=False)
            items, images = [], 0
    if items:
        yield _Group(items, last=True)


@dataclass(frozen=True)
class _GroupScorer:
    """Scores groups of videos on the device, in parts where they do not fit there whole."""

    model: nn.Module
    method: Method
    upload: Upload
    clock: Clock

    def upload_all(self, videos: Sequence[VideoViews]) -> list[VideoViews]:
        """The videos on the device; none where they do not fit there together."""
        try:
            return [self.upload(video) for video in videos]
        except torch.OutOfMemoryError:
            return []

    def score(self, videos: Sequence[VideoViews]) -> Tensor | None:
        """Scores [N, C]. Out of memory: fewer images a forward, and half the videos at a time."""
        if not videos:
            return None
        chunk = self.clock.chunk
        try:
            with torch.inference_mode():
                return self.method.score(
                    self.model, [self.upload(video) for video in videos], chunk
                )
        except torch.OutOfMemoryError:
            if chunk == len(videos) == 1:
                raise
        # Here the failed attempt's tensors are gone; inside the handler its frames would hold them.
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        self.clock.chunk = max(1, chunk // 2)
        self.clock.halvings += 1
        self.clock.sample = []
        middle = len(videos) // 2
        halves = [self.score(half) for half in (videos[:middle], videos[middle:])]
        return torch.cat([half for half in halves if half is not None])


def _results(
    items: Sequence[VideoViews | BadVideo], scores: Tensor | None
) -> Iterator[Scored | BadVideo]:
    """What `score_stream` yields for one group; waits for the device when it is first asked."""
    rows = iter(scores.float().cpu()) if scores is not None else iter(())
    for item in items:
        if isinstance(item, BadVideo):
            yield item
        else:
            yield Scored(replace(item, images=item.images[:0]), next(rows))


def _uploader(device: torch.device) -> Upload:
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
