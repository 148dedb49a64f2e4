"""Writes what a frozen trunk makes of a list of videos; `feature_store` reads it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from kineticlip.data.batch import BadVideo, VideoViews
from kineticlip.data.entries import Entry
from kineticlip.evaluation.feature_store import INDEX, Facts
from kineticlip.evaluation.ready import ReadyModel
from kineticlip.formats.files import write_safetensors
from kineticlip.runtime.journal import Journal

SHARD_BYTES = 1 << 28


def write_features(
    folder: str | Path,
    stream: Callable[[Sequence[Entry]], Iterable[VideoViews | BadVideo]],
    entries: Sequence[Entry],
    *,
    encode: Callable[[Tensor], Tensor],
    facts: Mapping[str, Any],
    ready: ReadyModel,
    shard_bytes: int = SHARD_BYTES,
    done: Callable[[int], object] = lambda count: None,
) -> tuple[int, int]:
    """Encodes the entries that the folder lacks -> (videos written, unreadable ones).

    stream(entries) gives their views, in order; encode is that of a Cut of the ready model, and
    every distinct image goes through it once. Rows keep the trunk's dtype. A kill loses the shard
    that was being filled, and no more. UserError where the folder was made with other settings or
    is being written.
    """
    folder = Path(folder)
    journal = Journal(folder / INDEX, facts)
    with closing(journal):
        known = {name for row in journal.rows for name in (*row["videos"], *row["bad"])}
        todo = [entry for entry in {e.name: e for e in entries}.values() if entry.name not in known]
        shard = _Shard(folder, journal, len(journal.rows))
        for item in stream(todo):
            if isinstance(item, BadVideo):
                shard.bad[item.name] = item.reason
            else:
                rows = encode_images(encode, item.images, ready.device, ready.chunk)
                shard.add(item, rows)
            done(1)
            if shard.size >= shard_bytes:
                shard = shard.finish()
        written = shard.finish().written
    bad_now, bad_before = _bad_count(written), _bad_count(journal.rows)
    return len(todo) - bad_now, bad_before + bad_now


def encode_images(
    encode: Callable[[Tensor], Tensor], images: Tensor, device: torch.device, chunk: int
) -> Tensor:
    """[U, V, 3, S, S] -> [U, V, ...] on the CPU."""
    flat = images.flatten(0, 1).split(chunk)
    with torch.inference_mode():
        rows = torch.cat([encode(part.to(device)).cpu() for part in flat])
    views: Tensor = rows.unflatten(0, images.shape[:2])
    return views


def _bad_count(lines: Sequence[Facts]) -> int:
    return sum(len(line["bad"]) for line in lines)


class _Shard:
    """Videos on their way to one file, and the journal lines of this process so far."""

    def __init__(self, folder: Path, journal: Journal, number: int) -> None:
        self.folder, self.journal, self.number = folder, journal, number
        self.tensors: dict[str, Tensor] = {}
        self.videos: dict[str, Facts] = {}
        self.bad: dict[str, str] = {}
        self.written: list[Facts] = []

    @property
    def size(self) -> int:
        return sum(tensor.nbytes for tensor in self.tensors.values())

    def add(self, video: VideoViews, rows: Tensor) -> None:
        key = str(len(self.tensors))
        self.tensors[key] = rows
        self.videos[video.name] = {
            "key": key,
            "frame_index": video.frame_index.tolist(),
            "crop_index": video.crop_index.tolist(),
            "decoder": video.decoder,
            "num_frames": video.num_frames,
        }

    def finish(self) -> _Shard:
        """Writes file, then line; -> an empty shard behind this one."""
        if not self.videos and not self.bad:
            return self
        name = f"{self.number:06d}.safetensors"
        if self.tensors:
            write_safetensors(self.folder / name, self.tensors, {"format": "kineticlip-features"})
        line = {"shard": name, "videos": self.videos, "bad": self.bad}
        self.journal.append(line)
        self.journal.sync()
        after = _Shard(self.folder, self.journal, self.number + 1)
        after.written = [*self.written, line]
        return after
