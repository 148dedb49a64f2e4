"""What a list holds: entries, each a video or a stretch of one, with its labels."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Entry:
    """One line of a list: a video, or a stretch of one, with its label.

    `name` as the list writes it, `path` with the root before it. `num_frames` is what the list
    says (-1: nothing). A stretch begins at frame `first` and is `length` frames long (-1: to
    the end). `labels` holds all of them where videos have several or none; `label` is -1 then.
    """

    name: str
    path: str
    label: int
    num_frames: int = -1
    first: int = 0
    length: int = -1
    labels: tuple[int, ...] | None = None


@dataclass(frozen=True, kw_only=True)
class VideoList:
    """The entries of one list file, and what was left out of them."""

    source: str
    sha256: str  # of the file: two results compare only over the same list
    entries: tuple[Entry, ...]
    min_frames: int = 0
    short: tuple[str, ...] = ()  # names of entries with fewer frames than min_frames
    empty: tuple[str, ...] = ()  # names of entries without a frame
    lines: tuple[int, ...] = ()  # where read_list found each entry, counted from 1

    def summary(self) -> str:
        """One line for the log: how many entries, how many left out and why."""
        parts = [f"{self.source}: {len(self.entries)} videos"]
        if self.short:
            parts.append(f"{len(self.short)} with fewer than {self.min_frames} frames left out")
        if self.empty:
            parts.append(f"{len(self.empty)} without frames left out ({self.empty[0]}, ...)")
        return "; ".join(parts)
