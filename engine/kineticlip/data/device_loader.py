"""Test views that never leave the GPU: decoded, resized and cut there, by batches of videos.

A video that the GPU's decoder does not take is decoded on the CPU and copied; its decoder says so
in the results. Frames of two batches are held at a time.
"""

from __future__ import annotations

import functools
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace

import torch

from kineticlip.config import Config
from kineticlip.data.ahead import run_ahead
from kineticlip.data.batch import BadVideo, VideoViews
from kineticlip.data.entries import Entry
from kineticlip.data.opening import open_entry, scoring_cache
from kineticlip.data.pipelines import pipeline_of
from kineticlip.data.scoring_loader import check_views, views_of
from kineticlip.data.statistics import PixelStatistics
from kineticlip.video import Plan, ProbeCache, VideoError, VideoSource, plan_frames
from kineticlip.video.batch_reader import BatchReader, Decoded, Request

BATCH = 16  # videos in one run of the decoder
NO_ROOM = "read on the CPU: out of device memory"


@dataclass(frozen=True, kw_only=True)
class _Opened:
    """One video, and which of its frames are wanted how."""

    entry: Entry
    source: VideoSource
    plan: Plan
    request: Request
    count: int


def why_not_on_device(config: Config, device: torch.device) -> str:
    """Why videos are read by threads of the CPU; "" where a DeviceLoader can take them."""
    if device.type != "cuda":
        return "no GPU: decoded on the CPU"
    if config.data.decoder == "pyav":
        return "data.decoder=pyav: decoded on the CPU"
    return ""


class DeviceLoader:
    """The test views of entries, in list order, with images on `device`.

    Iterating yields VideoViews, or a BadVideo in the place of one that cannot be read. `choice`
    says which decoder was taken and why; the views' notes say why single files went to the CPU.
    Out of device memory a batch is read by halves, at last a video by the CPU. Raises UserError
    where a decoder asked for by name cannot be had.
    """

    def __init__(
        self,
        entries: Sequence[Entry],
        config: Config,
        *,
        device: torch.device,
        statistics: PixelStatistics,
        pipeline: str = "text4vis",
        cache: ProbeCache | None = None,
    ) -> None:
        self._rules = pipeline_of(config.data, pipeline)
        check_views(config, self._rules)
        self._statistics = statistics
        self.entries, self._config = entries, config
        self._cache = scoring_cache(config.data, cache)
        self._device = device
        name = f"cuda:{device.index or 0}" if device.type == "cuda" else device.type
        self._reader = BatchReader(
            decoder=config.data.decoder if device.type == "cuda" else "auto",
            device=name,
            batch=BATCH,
            num_threads=max(config.data.workers, 16) if device.type == "cuda" else 2,
        )
        self.choice = f"{self._reader.decoder}: {self._reader.reason}"

    def __len__(self) -> int:
        return len(self.entries)

    def __iter__(self) -> Iterator[VideoViews | BadVideo]:
        batches = (
            self.entries[start : start + BATCH] for start in range(0, len(self.entries), BATCH)
        )
        # One thread decodes a batch ahead of the trunk; the reader has threads of its own.
        tasks = (functools.partial(self._read, batch) for batch in batches)
        for videos, done in run_ahead(tasks, workers=1, ahead=2):
            if done is not None:
                torch.cuda.current_stream(self._device).wait_event(done)
            yield from self._handed_over(videos)

    def _handed_over(self, videos: deque[VideoViews | BadVideo]) -> Iterator[VideoViews | BadVideo]:
        while videos:
            video = videos.popleft()
            if isinstance(video, VideoViews) and video.images.is_cuda:
                for tensor in (video.images, video.frame_index, video.crop_index):
                    tensor.record_stream(torch.cuda.current_stream(self._device))
            yield video

    def _read(
        self, entries: Sequence[Entry]
    ) -> tuple[deque[VideoViews | BadVideo], torch.cuda.Event | None]:
        if self._device.type != "cuda":
            return deque(self._within_memory(entries)), None
        with torch.cuda.device(self._device), torch.cuda.stream(self._stream):
            videos = deque(self._within_memory(entries))
            done = torch.cuda.Event()
            done.record()
        return videos, done

    def _within_memory(self, entries: Sequence[Entry]) -> list[VideoViews | BadVideo]:
        try:
            return list(self._views(entries))
        except torch.OutOfMemoryError:
            pass  # its traceback goes first, and with it the tensors of the failed attempt
        if self._device.type == "cuda":
            torch.cuda.empty_cache()
        if len(entries) == 1:
            return [self._on_cpu(entries[0])]
        middle = len(entries) // 2
        return self._within_memory(entries[:middle]) + self._within_memory(entries[middle:])

    def _on_cpu(self, entry: Entry) -> VideoViews | BadVideo:
        """The views of a video as the threads make them; they travel in the evaluation loop."""
        try:
            video = views_of(
                entry,
                self._config,
                statistics=self._statistics,
                pipeline=self._rules.name,
                cache=self._cache,
            )
        except VideoError as error:
            return BadVideo(entry.name, entry.label, error.reason)
        return replace(video, notes=(*video.notes, NO_ROOM))

    @functools.cached_property
    def _stream(self) -> torch.cuda.Stream:
        return torch.cuda.Stream(self._device)

    def _views(self, entries: Sequence[Entry]) -> Iterator[VideoViews | BadVideo]:
        with ThreadPoolExecutor(self._config.data.workers) as pool:
            opened = list(pool.map(self._open, entries))
        requests = [item.request for item in opened if isinstance(item, _Opened)]
        results = self._reader.read(requests)
        assert len(results) == len(requests), "a result for every request, in its place"
        read = iter(results)
        for item in opened:
            if isinstance(item, BadVideo):
                yield item
                continue
            frames = next(read)
            if isinstance(frames, VideoError):
                yield BadVideo(item.entry.name, item.entry.label, frames.reason)
            else:
                yield self._cut(item, frames)

    def _open(self, entry: Entry) -> _Opened | BadVideo:
        try:
            source, first, count = open_entry(entry, self._config.data, self._cache)
        except VideoError as error:
            return BadVideo(entry.name, entry.label, error.reason)
        config = self._config
        plan = plan_frames(self._rules.sample_test(count, config.data, config.test))
        numbers = tuple(first + number for number in plan.frames)
        request = Request(video=source, numbers=numbers)
        return _Opened(entry=entry, source=source, plan=plan, request=request, count=count)

    def _cut(self, item: _Opened, decoded: Decoded) -> VideoViews:
        width, height = item.source.width, item.source.height
        shape = self._rules.geometry(width, height, self._config.data, self._config.test.crops)
        images = self._rules.cut_on_device(
            decoded.frames,
            shape,
            numbers=item.plan.frames,
            count=item.count,
            statistics=self._statistics,
        )  # [U, V, 3, S, S]
        return VideoViews(
            name=item.entry.name,
            label=item.entry.label,
            images=images,
            frame_index=torch.from_numpy(item.plan.index).to(images.device),
            crop_index=torch.from_numpy(shape.distinct()[1]).to(images.device),
            decoder=decoded.decoder,
            num_frames=item.count,
            notes=decoded.notes,
            statistics=self._statistics,
        )
