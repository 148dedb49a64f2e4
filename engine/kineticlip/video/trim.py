"""The few packets that a set of frames needs, and those packets as a small file in memory.

A decoder that cannot seek (DALI), or that reads a whole file to seek exactly (torchcodec), gets a
stream that holds just the groups and pictures needed.
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
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
from kineticlip.video.packets import Table, build_table, demux, select, why_not_by_packets

# Packet data held at once when a file is read without its table; larger files are read twice.
HELD_BYTES = 64 << 20
# Every picture of a trimmed stream lasts one tick: its times are made anew, so that a variable
# rate, an edit list or negative times cannot mislead the decoder.
TICK = Fraction(1, 25)
MUXERS = {"h264": "mp4", "hevc": "mp4"}  # all else: matroska, which holds VP8 as well


@dataclass(frozen=True, kw_only=True)
class Selection:
    """The packets that some frames need, in decoding order, and the rows of the table they are."""

    packets: list[Any]
    rows: NDArray[np.int64]
    table: Table

    @property
    def display_order(self) -> NDArray[np.int64]:
        """Indices into packets that put them in display order."""
        return np.argsort(self.table.pts[self.rows])


@dataclass(frozen=True, kw_only=True)
class Trimmed:
    """A stream in memory and where the wanted frames are in it.

    data: a whole MP4 or Matroska file with neither audio nor rotation. positions: rank in display
    order of each wanted frame. pictures: how many pictures there are.
    """

    data: bytes
    positions: tuple[int, ...]
    pictures: int


def trim(path: str | Path, numbers: Sequence[int], *, table: Table | None = None) -> Trimmed:
    """Cuts a video down to the packets that the frames `numbers` (ascending) need.

    Raises Unsuitable where frames cannot be told from packets, VideoError for an unreadable file.
    """
    with open_container(path) as container:
        stream = choose_stream(container, path)
        selection = select_packets(path, container, stream, numbers, table=table)
        order = selection.display_order
        rank = np.argsort(order)
        data = _remux(path, stream, selection.packets, rank)
    number = selection.table.number[selection.rows]
    places = dict(zip(number.tolist(), rank.tolist(), strict=True))
    return Trimmed(
        data=data, positions=tuple(places[wanted] for wanted in numbers), pictures=len(order)
    )


def select_packets(
    path: str | Path, container: Any, stream: Any, numbers: Sequence[int], *, table: Table | None
) -> Selection:
    """Reads the packets that `numbers` need from an open container; without a table, all first."""
    if table is None and check_regular_file(path).st_size > HELD_BYTES:
        table = read_table(path)
    try:
        if table is None:
            held = list(_facts(container, stream))
            table = _proven(build_table(stream, held))
            rows = select(table, numbers)
            return Selection(packets=[held[row][0] for row in rows], rows=rows, table=table)
        rows = select(table, numbers)
        packets = _packets_at(container, stream, rows.tolist())
    except Unsuitable:
        raise
    except DAMAGE as error:
        decoding_failed(path, error, 0)
    if len(packets) < len(rows):
        raise VideoError(path, "has fewer packets than when it was opened")
    return Selection(packets=packets, rows=rows, table=table)


def _packets_at(container: Any, stream: Any, rows: list[int]) -> list[Any]:
    """The packets of these rows, ascending; reading stops after the last."""
    needed, found = set(rows), []
    for row, packet in enumerate(packet for packet in container.demux(stream) if packet.size):
        if row in needed:
            found.append(packet)
        if row == rows[-1]:
            break
    return found


def read_table(path: str | Path) -> Table:
    """The packet table of a file. Raises Unsuitable where its pictures must be decoded to count."""
    with open_container(path) as container:
        stream = choose_stream(container, path)
        try:
            return _proven(build_table(stream, _facts(container, stream)))
        except Unsuitable:
            raise
        except DAMAGE as error:
            decoding_failed(path, error, 0)


def _facts(container: Any, stream: Any) -> Any:
    reason = why_not_by_packets(container, stream)
    if reason:
        raise Unsuitable(reason)
    return demux(container, stream)


def _proven(table: Table | str) -> Table:
    if isinstance(table, str):
        raise Unsuitable(table)
    return table


def _remux(path: str | Path, stream: Any, packets: list[Any], rank: NDArray[np.int64]) -> bytes:
    """Writes packets as a file of their own; rank: display rank of each."""
    codec = stream.codec.canonical_name
    # A picture may not be shown before it is decoded: display times are put off by the largest lag.
    delay = int((np.arange(len(packets)) - rank).max(initial=0))
    buffer = io.BytesIO()
    try:
        with av.open(buffer, "w", format=MUXERS.get(codec, "matroska")) as output:
            target = output.add_stream_from_template(stream, opaque=True)
            target.time_base = TICK
            target.set_display_rotation(0)  # FFmpeg versions differ in what they make of it
            for row, packet in enumerate(packets):
                packet.stream = target
                packet.time_base = TICK
                packet.dts, packet.pts, packet.duration = row, int(rank[row]) + delay, 1
                output.mux_one(packet)
    except (av.FFmpegError, ValueError) as error:
        raise Unsuitable(f"{codec} packets cannot be written anew: {error}") from None
    return buffer.getvalue()
