"""Opens one video: how many frames it has, and any of them, exact, by number."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from kineticlip.runtime.errors import UserError, did_you_mean
from kineticlip.video import torchcodec
from kineticlip.video.cache import ProbeCache
from kineticlip.video.container import Unsuitable, VideoError
from kineticlip.video.folder import TEMPLATE, image_size, list_images, read_folder
from kineticlip.video.packets import Table
from kineticlip.video.pictures import Frames
from kineticlip.video.probe import Probe, Scan, scan
from kineticlip.video.pyav import read_by_packets, read_in_sequence
from kineticlip.video.torchcodec import read_by_torchcodec

Reader = Callable[[Scan, tuple[int, ...]], Frames]
READERS: dict[str, Reader] = {"torchcodec": read_by_torchcodec, "pyav": read_by_packets}
DECODERS = ("auto", "dali", *READERS)


class VideoSource:
    """An open video: facts, and `read`. No file stays open; reads may run in several threads.

    num_frames: pictures a sequential decode hands out. width, height: upright. decoder: the name of
    the one in use. notes: why it is not the preferred one, in the order of the decisions. files:
    the images of a folder, by frame number; empty for a video file.
    """

    def __init__(
        self,
        scan: Scan,
        decoder: str,
        notes: Sequence[str],
        reader: Reader,
        *,
        files: Sequence[Path] = (),
    ) -> None:
        self.probe = scan.probe
        self.decoder = decoder
        self.notes = list(notes)
        self.files = tuple(files)
        self._scan = scan
        self._reader = reader
        self._lock = threading.Lock()

    @property
    def path(self) -> str:
        return self.probe.path

    @property
    def table(self) -> Table | None:
        """The packet table, where opening the file made one."""
        return self._scan.table

    @property
    def num_frames(self) -> int:
        return self.probe.num_frames

    @property
    def width(self) -> int:
        return self.probe.width

    @property
    def height(self) -> int:
        return self.probe.height

    def read(self, numbers: Sequence[int]) -> Frames:
        """The frames of these numbers, in this order: uint8 [n, H, W, 3], upright.

        Any order, repeats allowed; each distinct frame is decoded once. Raises VideoError for a
        number the video does not have, and where decoding fails.
        """
        wanted = np.asarray(numbers, dtype=np.int64).reshape(-1)
        if not len(wanted):
            return np.empty((0, self.height, self.width, 3), dtype=np.uint8)
        distinct, index = np.unique(wanted, return_inverse=True)
        for number in (int(distinct[0]), int(distinct[-1])):
            if not 0 <= number < self.num_frames:
                raise VideoError(
                    self.path,
                    f"has no frame {number}; it has {self.num_frames}, "
                    f"numbered 0 to {self.num_frames - 1}",
                )
        frames = self._read_distinct(tuple(distinct.tolist()))
        if len(distinct) == len(wanted) and bool((np.diff(index) > 0).all()):
            return frames
        return frames[index]

    def _read_distinct(self, numbers: tuple[int, ...]) -> Frames:
        reader = self._reader
        if reader is read_in_sequence:
            return reader(self._scan, numbers)
        try:
            return reader(self._scan, numbers)
        except Unsuitable as error:
            with self._lock:
                if self._reader is not read_in_sequence:
                    self._reader, self.decoder = read_in_sequence, "pyav"
                    self.notes.append(f"read in sequence: {error}")
            return read_in_sequence(self._scan, numbers)


def open_video(
    path: str | Path,
    *,
    decoder: str = "auto",
    frame_template: str = TEMPLATE,
    cache: ProbeCache | None = None,
) -> VideoSource:
    """Opens a video file, or a folder of images as a video.

    decoder: "auto", or one by name; a named one that cannot return this file's frames to the bit
    is replaced by PyAV, and the source's notes say why. cache: probes of earlier runs.
    Raises VideoError where the file cannot be read, UserError for an unknown decoder, and for
    torchcodec where it is not there.
    """
    if decoder not in DECODERS:
        raise UserError(f"unknown decoder {decoder!r}. {did_you_mean(decoder, DECODERS)}")
    if os.path.isdir(path):  # Path.is_dir raises where a parent may not be searched
        return _open_folder(path, frame_template)
    found = cache.scan(path) if cache is not None else scan(path)
    name, notes = choose_decoder(found.probe, decoder)
    reader = read_in_sequence if found.probe.why_in_sequence else READERS[name]
    return VideoSource(found, name, notes, reader)


def choose_decoder(probe: Probe, decoder: str = "auto") -> tuple[str, list[str]]:
    """(name, notes): the CPU decoder of a file, and why it is not the asked one.

    auto is PyAV for every file: on trimmed packets it is ahead of torchcodec or level with it, and
    its FFmpeg is the same on every machine (docs/decisions/0001).
    """
    notes = []
    if decoder == "dali":
        notes.append("dali decodes batches on a GPU; one video on the CPU is read by PyAV")
    if decoder == "torchcodec":
        reason = torchcodec.why_not(probe)
        if not reason:
            return "torchcodec", notes
        notes.append(f"not torchcodec: {reason}")
    if probe.why_in_sequence:
        notes.append(f"read in sequence: {probe.why_in_sequence}")
    return "pyav", notes


def _open_folder(path: str | Path, template: str) -> VideoSource:
    files = list_images(path, template)
    width, height = image_size(files[0])
    probe = Probe(
        path=str(path),
        container="folder",
        codec=files[0].suffix.lstrip(".").lower(),
        pixel_format="rgb24",
        color_matrix="rgb",
        stream=0,
        width=width,
        height=height,
        rotation=0,
        mirrored=False,
        num_frames=len(files),
        declared_frames=0,
        counted="files",
        in_time_order=True,
        variable_rate=False,
        frame_rate=0.0,
        duration=0.0,
        keyframes=len(files),
        why_in_sequence="",
    )
    return VideoSource(
        Scan(probe=probe),
        "folder",
        [],
        lambda _, numbers: read_folder(files, numbers),
        files=files,
    )
