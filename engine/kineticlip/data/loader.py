"""Lists to batches: threads that decode ahead, in an order that depends on nothing but the seed.

One thread decodes one video (decoders and Pillow release the interpreter lock); results come out
in list order and a bounded number of them waits. A video that cannot be read is named and
counted, never passed over in silence.
"""

from __future__ import annotations

import functools
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from kineticlip.config import Config, DataConfig
from kineticlip.data.augment import augment
from kineticlip.data.batch import BadVideo, Batch, VideoViews
from kineticlip.data.entries import Entry
from kineticlip.data.sampling import ClipRandom, sample_test, sample_train
from kineticlip.data.views import apply_pillow, apply_tensor, geometry
from kineticlip.runtime.errors import UserError
from kineticlip.video import ProbeCache, VideoError, VideoSource, open_video, plan_frames
from kineticlip.video.cache import cache_path

T = TypeVar("T")

READ_BYTES = 1 << 28  # decoded frames of one video held at a time
NARROW = 100  # longest side to shortest; beyond it a resized frame would not fit in memory
TRIES = 32  # unreadable videos in a row, for one place of a batch, before training stops


@functools.cache
def _shared_cache(path: str) -> ProbeCache:
    """One open cache a file and process; it closes with the process."""
    return ProbeCache(path)


def cache_for(
    data: DataConfig, given: ProbeCache | None, *, root: str, listed: str
) -> ProbeCache | None:
    """The cache given, or the one data.probe_cache names. UserError where it cannot be used."""
    if given is not None:
        return given
    path = cache_path(data.probe_cache, root=root, listed=listed)
    return _shared_cache(str(path)) if path is not None else None


def scoring_cache(data: DataConfig, given: ProbeCache | None) -> ProbeCache | None:
    """cache_for the list to score."""
    return cache_for(data, given, root=data.val_root, listed=data.val_list)


def pipeline_of(data: DataConfig, default: str) -> str:
    """The sampling and pixel rules in force: data.pipeline, or the method's own for auto."""
    return default if data.pipeline == "auto" else data.pipeline


def views_of(
    video: Entry | str | Path,
    config: Config,
    *,
    pipeline: str = "text4vis",
    cache: ProbeCache | None = None,
) -> VideoViews:
    """All test views of one video; every distinct frame is decoded and cut once.

    `pipeline` are the method's own rules; config.data.pipeline overrides them. Raises VideoError
    for a video that cannot be read.
    """
    entry = video if isinstance(video, Entry) else Entry(str(video), str(video), -1)
    data, rules = config.data, pipeline_of(config.data, pipeline)
    source, first, count = open_entry(entry, data, cache)
    plan = plan_frames(sample_test(count, data, config.test, rules))
    shape = geometry(
        source.width,
        source.height,
        size=data.resolution,
        crops=config.test.crops,
        pipeline=rules,
        something=data.something,
    )
    crops, place = shape.distinct()
    images = []
    for numbers in _portions(plan.frames, source):
        frames = source.read([first + number for number in numbers])
        if rules == "evl":
            images.append(apply_tensor(frames, shape, crops=crops, numbers=numbers, count=count))
        else:
            images.append(apply_pillow(frames, shape, crops=crops))
    return VideoViews(
        name=entry.name,
        label=entry.label,
        images=images[0] if len(images) == 1 else torch.cat(images),
        frame_index=torch.from_numpy(plan.index),
        crop_index=torch.from_numpy(place),
        decoder=source.decoder,
        num_frames=count,
        notes=tuple(source.notes),
    )


def clip_of(
    entry: Entry,
    data: DataConfig,
    *,
    pipeline: str,
    rng: ClipRandom,
    cache: ProbeCache | None = None,
) -> tuple[Tensor, int]:
    """One training clip [T, 3, S, S] and its label, a function of the generators alone.

    Raises VideoError for a video that cannot be read.
    """
    source, first, count = open_entry(entry, data, cache)
    # BIKE draws the stretches of Charades with the segment sampler of Text4Vis, not its own.
    rules = "text4vis" if pipeline == "bike" and entry.length >= 0 else pipeline
    indices = sample_train(count, data, rules, rng)
    return augment(source.read((first + indices).tolist()), entry.label, data, pipeline, rng)


def open_entry(
    entry: Entry, data: DataConfig, cache: ProbeCache | None
) -> tuple[VideoSource, int, int]:
    """(video, first frame, frames) of an entry, which may be a stretch of its video."""
    # Charades names its frames after their folder: {id}-{:06d}.jpg
    template = data.frame_template.replace("{id}", Path(entry.path).name)
    source = open_video(entry.path, decoder=data.decoder, frame_template=template, cache=cache)
    if max(source.width, source.height) > NARROW * min(source.width, source.height):
        raise VideoError(
            entry.path, f"is {source.width} x {source.height}, too narrow to be resized"
        )
    if source.files and entry.length < 0 and source.num_frames < entry.num_frames:
        raise VideoError(
            entry.path, f"holds {source.num_frames} images; the list says {entry.num_frames}"
        )
    count = source.num_frames - entry.first
    if entry.length >= 0:
        count = min(count, entry.length)
    if count <= 0:
        raise VideoError(
            entry.path, f"has {source.num_frames} frames; the stretch begins at {entry.first}"
        )
    return source, entry.first, count


def _portions(frames: Sequence[int], source: VideoSource) -> Iterator[Sequence[int]]:
    """Runs of frames that decode into at most READ_BYTES, or single frames."""
    step = max(1, READ_BYTES // (3 * source.width * source.height))
    return (frames[start : start + step] for start in range(0, len(frames), step))


def run_ahead(
    tasks: Iterable[Callable[[], T]], *, workers: int, ahead: int
) -> Generator[T, None, None]:
    """Runs tasks in threads and gives their results in order, at most `ahead` of them early.

    An exception of a task comes out where its result would. Closing the iterator, or leaving a
    loop over it, drops what has not begun and waits for what has.
    """
    queue = iter(tasks)
    pool = ThreadPoolExecutor(workers, thread_name_prefix="kineticlip-loader")
    try:
        pending: deque[Future[T]] = deque(pool.submit(task) for task in islice(queue, ahead))
        while pending:
            result = pending.popleft().result()
            for task in islice(queue, 1):
                pending.append(pool.submit(task))
            yield result
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


class TestLoader:
    """The test views of every `world`-th entry from `rank` on, in list order, once each.

    Iterating yields VideoViews, or a BadVideo in the place of one that cannot be read. Nothing is
    padded: ranks may differ by one video. At most 2 * data.workers videos wait in memory.
    """

    __test__ = False  # not a test class of pytest

    def __init__(
        self,
        entries: Sequence[Entry],
        config: Config,
        *,
        pipeline: str = "text4vis",
        rank: int = 0,
        world: int = 1,
        cache: ProbeCache | None = None,
    ) -> None:
        rules = pipeline_of(config.data, pipeline)
        sample_test(1, config.data, config.test, rules)  # settings that no video can meet
        geometry(64, 64, size=32, crops=config.test.crops, pipeline=rules)
        self.entries = entries[rank::world]
        self._load = functools.partial(
            views_of, config=config, pipeline=pipeline, cache=scoring_cache(config.data, cache)
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


@functools.lru_cache(maxsize=4)
def permutation(length: int, seed: int) -> NDArray[np.int64]:
    """The order of one pass over the data, as torch's samplers and EVL's draw it."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randperm(length, generator=generator).numpy()


@dataclass(frozen=True)
class _Loaded:
    name: str
    label: int
    bad: tuple[BadVideo, ...]


class TrainLoader:
    """Micro-batches of one rank: batch g of rank r is a function of (seed, g, r) alone.

    The passes over the data, each a permutation seeded with seed + pass, make one endless stream;
    micro-batch g of all ranks takes the next world * B entries, rank r its contiguous B of them
    (EVL's order). Batches may straddle two passes, so every batch is full, no entry is dropped
    and none is repeated within a pass. `len(loader)` micro-batches make an epoch, the last of
    them reaching into the next pass. Frames and augmentation of an entry are drawn from (seed,
    pass, index in the list). So a run that restarts at any micro-batch goes on as it would have.

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
        pipeline: str = "text4vis",
        rank: int = 0,
        world: int = 1,
        cache: ProbeCache | None = None,
        pin_memory: bool = False,
    ) -> None:
        if not entries:
            raise UserError("there is no video to train on")
        if any(entry.labels is not None for entry in entries):
            raise UserError(
                "training needs one label a video; this list has none, or several "
                "(for Charades, train on the rows video_id,label,start_time,end_time,total_time)"
            )
        self.entries = entries
        self.bad: dict[str, BadVideo] = {}  # by name: every unreadable video met so far
        self.refilled = 0
        self._data = config.data
        self._pipeline = pipeline_of(config.data, pipeline)
        self._seed = config.seed
        self._size = config.train.micro_batch_size
        self._rank, self._world = rank, world
        data = config.data
        self._cache = cache_for(data, cache, root=data.train_root, listed=data.train_list)
        self._pin = pin_memory
        sample_train(1, config.data, self._pipeline, ClipRandom.seeded(0))  # settings that fit none

    def __len__(self) -> int:
        """Micro-batches in an epoch, the same number on every rank."""
        return -(-len(self.entries) // (self._world * self._size))

    def places(self, number: int) -> list[int]:
        """Where in the endless stream the clips of this rank's micro-batch `number` stand."""
        start = (number * self._world + self._rank) * self._size
        return list(range(start, start + self._size))

    def locate(self, place: int) -> tuple[int, int]:
        """(pass, index into entries) of a place of the stream."""
        turn, offset = divmod(place, len(self.entries))
        return turn, int(permutation(len(self.entries), self._seed + turn)[offset])

    def epoch(self, epoch: int, start: int = 0) -> Iterator[Batch]:
        """The batches of one epoch from micro-batch `start` on.

        pixels: uint8 [B, T, 3, S, S], or float32 normalised under the evl rules.
        """
        numbers = range(epoch * len(self) + start, (epoch + 1) * len(self))
        buffers: deque[Tensor] = deque()

        def tasks() -> Iterator[Callable[[], _Loaded]]:
            for number in numbers:
                buffer = self._buffer()
                buffers.append(buffer)
                for slot, place in zip(buffer, self.places(number), strict=True):
                    yield functools.partial(self._clip, place, slot)

        workers = self._data.workers
        clips = run_ahead(tasks(), workers=workers, ahead=2 * (self._size + workers))
        with closing(clips):
            for _ in numbers:
                loaded = list(islice(clips, self._size))
                for clip in loaded:
                    self.bad.update((bad.name, bad) for bad in clip.bad)
                    self.refilled += bool(clip.bad)
                yield Batch(
                    pixels=buffers.popleft(),
                    labels=torch.tensor([clip.label for clip in loaded]),
                    names=tuple(clip.name for clip in loaded),
                )

    def _buffer(self) -> Tensor:
        size = self._data.resolution
        dtype = torch.float32 if self._pipeline == "evl" else torch.uint8
        shape = (self._size, self._data.num_frames, 3, size, size)
        return torch.empty(shape, dtype=dtype, pin_memory=self._pin)

    def _clip(self, place: int, slot: Tensor) -> _Loaded:
        """Loads the clip of a place of the stream into its slot [T, 3, S, S] of a batch."""
        bad: list[BadVideo] = []
        for attempt in range(TRIES):
            turn, index = self.locate(place + attempt * self._world * self._size)
            entry = self.entries[index]
            rng = ClipRandom.seeded(self._seed, turn, index)
            try:
                pixels, label = clip_of(
                    entry, self._data, pipeline=self._pipeline, rng=rng, cache=self._cache
                )
            except VideoError as error:
                bad.append(BadVideo(entry.name, entry.label, error.reason))
                continue
            slot.copy_(pixels)
            return _Loaded(entry.name, label, tuple(bad))
        raise UserError(
            f"{TRIES} videos in a row cannot be read; the first: {bad[0].name}: {bad[0].reason} "
            "(is data.train_root right?)"
        )
