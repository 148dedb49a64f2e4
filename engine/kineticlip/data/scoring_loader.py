"""Lists to test views: threads that decode ahead, in the order of the list.

One thread decodes one video (decoders and Pillow release the interpreter lock). A video that
cannot be read is named in its place, never passed over in silence.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch

from kineticlip.config import Config
from kineticlip.data.ahead import run_ahead
from kineticlip.data.batch import BadVideo, VideoViews
from kineticlip.data.entries import Entry
from kineticlip.data.opening import open_entry, scoring_cache
from kineticlip.data.pipelines import Pipeline, pipeline_of
from kineticlip.data.statistics import PixelStatistics
from kineticlip.video import ProbeCache, VideoError, VideoSource, plan_frames

READ_BYTES = 1 << 28  # decoded frames of one video held at a time


def views_of(
    video: Entry | str | Path,
    config: Config,
    *,
    statistics: PixelStatistics,
    pipeline: str = "text4vis",
    cache: ProbeCache | None = None,
) -> VideoViews:
    """All test views of one video; every distinct frame is decoded and cut once.

    `pipeline` names the method's own rules; config.data.pipeline overrides them. statistics: of
    the weights that will see the views. Raises VideoError for a video that cannot be read.
    """
    entry = video if isinstance(video, Entry) else Entry(str(video), str(video), -1)
    rules = pipeline_of(config.data, pipeline)
    source, first, count = open_entry(entry, config.data, cache)
    plan = plan_frames(rules.sample_test(count, config.data, config.test))
    shape = rules.geometry(source.width, source.height, config.data, config.test.crops)
    images = []
    for numbers in _portions(plan.frames, source):
        frames = source.read([first + number for number in numbers])
        images.append(rules.cut(frames, shape, numbers=numbers, count=count, statistics=statistics))
    return VideoViews(
        name=entry.name,
        label=entry.label,
        images=images[0] if len(images) == 1 else torch.cat(images),
        frame_index=torch.from_numpy(plan.index),
        crop_index=torch.from_numpy(shape.distinct()[1]),
        decoder=source.decoder,
        num_frames=count,
        notes=tuple(source.notes),
        statistics=statistics,
    )


def _portions(frames: Sequence[int], source: VideoSource) -> Iterator[Sequence[int]]:
    """Runs of frames that decode into at most READ_BYTES, or single frames."""
    step = max(1, READ_BYTES // (3 * source.width * source.height))
    return (frames[start : start + step] for start in range(0, len(frames), step))


def check_views(config: Config, pipeline: Pipeline) -> None:
    """UserError for views that no video can give, before the first one is opened."""
    pipeline.sample_test(1, config.data, config.test)
    pipeline.geometry(64, 64, config.data, config.test.crops)


class ScoringLoader:
    """The test views of every `world`-th entry from `rank` on, in list order, once each.

    Iterating yields VideoViews, or a BadVideo in the place of one that cannot be read. Nothing is
    padded: ranks may differ by one video. At most 2 * data.workers videos wait in memory.
    statistics: of the weights that will see the views.
    """

    def __init__(
        self,
        entries: Sequence[Entry],
        config: Config,
        *,
        statistics: PixelStatistics,
        pipeline: str = "text4vis",
        rank: int = 0,
        world: int = 1,
        cache: ProbeCache | None = None,
    ) -> None:
        check_views(config, pipeline_of(config.data, pipeline))
        self.entries = entries[rank::world]
        self._load = functools.partial(
            views_of,
            config=config,
            statistics=statistics,
            pipeline=pipeline,
            cache=scoring_cache(config.data, cache),
        )
        self._workers = config.data.workers

    def __len__(self) -> int:
        return len(self.entries)

    def __iter__(self) -> Iterator[VideoViews | BadVideo]:
        tasks = (functools.partial(self._views, entry) for entry in self.entries)
        return run_ahead(tasks, workers=self._workers, ahead=2 * self._workers)

    def _views(self, entry: Entry) -> VideoViews | BadVideo:
        try:
            return self._load(entry)
        except VideoError as error:
            return BadVideo(entry.name, entry.label, error.reason)
