"""What a video file is: container, codec, upright size, how many frames, how they are timed."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from kineticlip.video.container import (
    DAMAGE,
    Unsuitable,
    VideoError,
    check_regular_file,
    choose_stream,
    decoding_failed,
    open_container,
)
from kineticlip.video.packets import Table, build_table, read_packets
from kineticlip.video.pictures import Orientation, orientation_of, stored_bytes

# Decoded pictures kept when a file had to be decoded to be counted: 480 frames of 320 x 240.
KEPT_BYTES = 64 << 20


# Values of AVColorSpace (ITU-T H.273, table 4). FFmpeg converts untagged pictures by BT.601.
MATRICES = {0: "rgb", 1: "bt709", 2: "untagged", 5: "bt601", 6: "bt601", 9: "bt2020"}
# (degrees counter-clockwise, mirrored left to right afterwards) -> the same as an orientation.
TURNS = {
    (degrees, mirrored): Orientation(
        transpose=degrees % 180 != 0,
        flip_rows=degrees in (90, 180),
        flip_columns=(degrees in (180, -90)) != mirrored,
    )
    for degrees in (0, 90, 180, -90)
    for mirrored in (False, True)
}


@dataclass(frozen=True, kw_only=True)
class Probe:
    """Facts about one file; plain values, so it can be stored as JSON.

    color_matrix: of YUV to RGB, as the pictures are tagged. width, height: upright. rotation:
    degrees to turn counter-clockwise (FFmpeg's sign: -90, 0, 90 or 180); mirrored: and then left to
    right. num_frames: pictures that a sequential decode hands out, never the container's claim
    (declared_frames, 0 where it makes none). counted: how that was found. in_time_order: whether
    time stamps increase in output order.
    why_in_sequence: why frames cannot be picked by packets; "" where they can. keyframes: closed
    groups of pictures, or key frames where in sequence. duration: seconds.
    """

    path: str
    container: str
    codec: str
    pixel_format: str
    color_matrix: str
    stream: int
    width: int
    height: int
    rotation: int
    mirrored: bool
    num_frames: int
    declared_frames: int
    counted: Literal["packets", "decoding", "files"]
    in_time_order: bool
    variable_rate: bool
    frame_rate: float
    duration: float
    keyframes: int
    why_in_sequence: str

    @property
    def orientation(self) -> Orientation:
        """The turn that rotation and mirrored describe."""
        return TURNS[self.rotation, self.mirrored]

    @property
    def stored_size(self) -> tuple[int, int]:
        """(width, height) as a decoder returns the pictures, before they are turned upright."""
        return self.orientation.upright_size(self.width, self.height)


@dataclass(frozen=True, kw_only=True)
class Scan:
    """A probe with what was learnt on the way: the packet table, or the decoded pictures.

    pictures: every decoded av.VideoFrame in output order, where they had to be decoded and fit
    KEPT_BYTES.
    """

    probe: Probe
    table: Table | None = None
    pictures: tuple[Any, ...] | None = None


def probe(path: str | Path) -> Probe:
    """Facts about a video file. Raises VideoError where it holds no decodable picture.

    Costs one pass over the packets and one decoded picture; files whose packets do not tell (AVI,
    MPEG, GIF, ...) are decoded once to be counted.
    """
    return scan(path).probe


def scan(path: str | Path) -> Scan:
    """Probes a file and keeps what a following read can use. Raises VideoError."""
    check_regular_file(path)
    with open_container(path) as container:
        try:
            return _scan_packets(path, container, choose_stream(container, path))
        except Unsuitable as error:
            reason = str(error)
    with open_container(path) as container:
        return _scan_pictures(path, container, choose_stream(container, path), reason)


def sequential_decode(path: str | Path, container: Any, stream: Any) -> Iterator[tuple[int, Any]]:
    """(number, av.VideoFrame) of a plain sequential decode: the order that defines the numbers.

    Raises VideoError where decoding stops with an error.
    """
    number = 0
    try:
        for frame in container.decode(stream):
            yield number, frame
            number += 1
    except DAMAGE as error:
        decoding_failed(path, error, number)


def _scan_packets(path: str | Path, container: Any, stream: Any) -> Scan:
    """Reads all packets, decoding until the first picture is there.

    Raises Unsuitable where the packets do not tell the frames.
    """
    first: list[Any] = []
    packets = read_packets(container, stream)

    def feed() -> Iterator[Any]:
        for packet, fact in packets:
            if not first:
                first.extend(stream.codec_context.decode(packet)[:1])
            yield packet, fact

    try:
        table = build_table(stream, feed())
        if not first:
            first.extend(stream.codec_context.decode(None)[:1])
    except DAMAGE as error:
        decoding_failed(path, error, len(first))
    if not first:
        raise VideoError(path, "no picture in it can be decoded")
    times = np.sort(table.pts[table.number >= 0])
    facts = _describe(path, container, stream, first[0], times, keyframes=int(table.group[-1]) + 1)
    return Scan(
        probe=Probe(
            num_frames=table.num_frames,
            counted="packets",
            in_time_order=True,
            why_in_sequence="",
            **facts,
        ),
        table=table,
    )


def _scan_pictures(path: str | Path, container: Any, stream: Any, reason: str) -> Scan:
    """Decodes everything, keeping the pictures while they fit."""
    first: Any = None
    kept: list[Any] | None = []
    kept_bytes, keyframes = 0, 0
    times: list[int | None] = []
    for _, frame in sequential_decode(path, container, stream):
        first = first or frame
        times.append(frame.pts)
        keyframes += bool(frame.key_frame)
        kept_bytes += stored_bytes(frame)
        if kept_bytes > KEPT_BYTES:
            kept = None
        elif kept is not None:
            kept.append(frame)
    if first is None:
        raise VideoError(path, "no picture in it can be decoded")
    known = np.array([time for time in times if time is not None], dtype=np.int64)
    facts = _describe(path, container, stream, first, np.sort(known), keyframes=keyframes)
    return Scan(
        probe=Probe(
            num_frames=len(times),
            counted="decoding",
            in_time_order=len(known) == len(times) and bool((np.diff(known) > 0).all()),
            why_in_sequence=reason,
            **facts,
        ),
        pictures=tuple(kept) if kept is not None else None,
    )


def _describe(
    path: str | Path,
    container: Any,
    stream: Any,
    first: Any,
    times: NDArray[np.int64],
    *,
    keyframes: int,
) -> dict[str, Any]:
    """The fields of Probe that both ways of counting share; times: sorted, in stream ticks."""
    orientation = orientation_of(first)
    width, height = orientation.upright_size(first.width, first.height)
    tick = float(stream.time_base or 0)
    gaps = np.diff(times)
    span = float(gaps.sum()) * tick
    rate = len(gaps) / span if span > 0 else float(stream.average_rate or 0)
    rotation, mirrored = next(turn for turn, same in TURNS.items() if same == orientation)
    return {
        "path": str(path),
        "container": container.format.name,
        "codec": stream.codec.canonical_name,
        "pixel_format": first.format.name,
        "color_matrix": MATRICES.get(int(first.colorspace), str(int(first.colorspace))),
        "stream": stream.index,
        "width": width,
        "height": height,
        "rotation": rotation,
        "mirrored": mirrored,
        "declared_frames": stream.frames,
        "variable_rate": _varies(gaps),
        "frame_rate": round(rate, 4),
        "duration": round(span + (1 / rate if rate else 0.0), 4),
        "keyframes": keyframes,
    }


def _varies(gaps: NDArray[np.int64]) -> bool:
    """Whether frame durations differ by more than rounding to ticks and a tenth of the median."""
    if len(gaps) < 2:
        return False
    middle = float(np.median(gaps))
    return bool((np.abs(gaps - middle) > max(1.0, 0.1 * middle)).any())
