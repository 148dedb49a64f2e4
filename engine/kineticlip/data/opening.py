"""From an entry of a list to its open video, through the cache of probes."""

from __future__ import annotations

import functools
from pathlib import Path

from kineticlip.config import DataConfig
from kineticlip.data.entries import Entry
from kineticlip.video import ProbeCache, VideoError, VideoSource, open_video
from kineticlip.video.cache import cache_path

NARROW = 100  # longest side to shortest; beyond it a resized frame would not fit in memory


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
