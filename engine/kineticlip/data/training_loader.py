"""A training list to batches, in an order that depends on nothing but the seed.

Threads decode ahead, one video each (decoders and Pillow release the interpreter lock). A video
that cannot be read is named and counted, never passed over in silence.
"""

from __future__ import annotations

import functools
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from itertools import islice

import torch
from torch import Tensor

from kineticlip.config import Config, DataConfig
from kineticlip.data.ahead import run_ahead
from kineticlip.data.batch import BadVideo, Batch
from kineticlip.data.entries import Entry
from kineticlip.data.opening import cache_for, open_entry
from kineticlip.data.order import order_of
from kineticlip.data.pipelines import Pipeline, pipeline_of, training_pixels
from kineticlip.data.sampling import ClipRandom
from kineticlip.data.statistics import PixelStatistics
from kineticlip.runtime.errors import UserError
from kineticlip.video import ProbeCache, VideoError

TRIES = 32  # unreadable videos in a row, for one place of a batch, before training stops


def clip_of(
    entry: Entry,
    data: DataConfig,
    *,
    pipeline: Pipeline,
    statistics: PixelStatistics,
    rng: ClipRandom,
    cache: ProbeCache | None = None,
) -> tuple[Tensor, int]:
    """One training clip [T, 3, S, S] and its label, a function of the generators alone.

    Raises VideoError for a video that cannot be read.
    """
    source, first, count = open_entry(entry, data, cache)
    sample = pipeline.sample_stretch if entry.length >= 0 else pipeline.sample_train
    frames = source.read((first + sample(count, data, rng)).tolist())
    return training_pixels(pipeline, frames, entry.label, data, rng=rng, statistics=statistics)


@dataclass(frozen=True)
class _LoadedClip:
    """What is said of a clip whose pixels are in their batch: bad are the videos tried first."""

    name: str
    label: int
    bad: tuple[BadVideo, ...]


class TrainLoader:
    """Micro-batches of one rank: batch g of rank r is a function of (seed, g, r) alone.

    `order` says which entries stand in it. Batches may straddle two passes over the data, so every
    batch is full, no entry is dropped and none is repeated within a pass. `len(loader)`
    micro-batches make an epoch. Frames and augmentation of an entry are drawn from (seed, pass,
    index in the list). So a run that restarts at any micro-batch goes on as it would have.
    statistics: of the weights that train, with which float32 pixels are normalised.

    A video that cannot be read is recorded in `bad`; the place it leaves in the batch is filled
    with the entry that stands in the same place of this rank's next micro-batch, or the one after
    it, and so on, which is counted in `refilled`. The stream itself does not shift: all ranks stay
    in step, and the borrowed entry still comes in its own place. Where TRIES in a row cannot be
    read, UserError.
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
        pin_memory: bool = False,
    ) -> None:
        self.entries = entries
        self.order = order_of(entries, config, rank=rank, world=world)
        self.bad: dict[str, BadVideo] = {}  # by name: every unreadable video met so far
        self.refilled = 0
        data = self._data = config.data
        self._pipeline = pipeline_of(data, pipeline)
        self._pipeline.sample_train(1, data, ClipRandom.seeded(0))  # settings that fit none
        self._statistics = statistics
        self._cache = cache_for(data, cache, root=data.train_root, listed=data.train_list)
        self._pin = pin_memory

    def __len__(self) -> int:
        """Micro-batches in an epoch, the same number on every rank."""
        return self.order.batches

    def epoch(self, epoch: int, start: int = 0) -> Iterator[Batch]:
        """The batches of one epoch from micro-batch `start` on.

        pixels: [B, T, 3, S, S], in the dtype of the pipeline.
        """
        numbers = range(epoch * len(self) + start, (epoch + 1) * len(self))
        buffers: deque[Tensor] = deque()

        def tasks() -> Iterator[Callable[[], _LoadedClip]]:
            for number in numbers:
                buffer = self._buffer()
                buffers.append(buffer)
                for slot, place in zip(buffer, self.order.places(number), strict=True):
                    yield functools.partial(self._clip, place, slot)

        workers = self._data.workers
        clips = run_ahead(tasks(), workers=workers, ahead=2 * (self.order.size + workers))
        with closing(clips):
            for _ in numbers:
                loaded = list(islice(clips, self.order.size))
                for clip in loaded:
                    self.bad.update((bad.name, bad) for bad in clip.bad)
                    self.refilled += bool(clip.bad)
                yield Batch(
                    pixels=buffers.popleft(),
                    labels=torch.tensor([clip.label for clip in loaded]),
                    names=tuple(clip.name for clip in loaded),
                )

    def _buffer(self) -> Tensor:
        side = self._data.resolution
        shape = (self.order.size, self._data.num_frames, 3, side, side)
        return torch.empty(shape, dtype=self._pipeline.dtype, pin_memory=self._pin)

    def _clip(self, place: int, slot: Tensor) -> _LoadedClip:
        """Loads the clip of a place of the stream into its slot [T, 3, S, S] of a batch."""
        bad: list[BadVideo] = []
        for attempt in range(TRIES):
            turn, index = self.order.locate(self.order.later(place, attempt))
            entry = self.entries[index]
            try:
                pixels, label = clip_of(
                    entry,
                    self._data,
                    pipeline=self._pipeline,
                    statistics=self._statistics,
                    rng=ClipRandom.seeded(self.order.seed, turn, index),
                    cache=self._cache,
                )
            except VideoError as error:
                bad.append(BadVideo(entry.name, entry.label, error.reason))
                continue
            slot.copy_(pixels)
            return _LoadedClip(entry.name, label, tuple(bad))
        raise UserError(
            f"{TRIES} videos in a row cannot be read; the first: {bad[0].name}: {bad[0].reason} "
            "(is data.train_root right?)"
        )
