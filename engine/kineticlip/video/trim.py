"""Selects the packets that a set of frames needs, and makes a small file in memory of them.

A decoder that cannot seek (DALI), or that reads a whole file to seek exactly (torchcodec), gets a
stream that holds only the groups and pictures needed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kineticlip.video.container import (
    DAMAGE,
    VideoError,
    check_regular_file,
    choose_stream,
    decoding_failed,
    open_container,
)
from kineticlip.video.packets import Table, build_table, read_packets, select
from kineticlip.video.remux import Window, remux, remux_uncropped

# Packet data held at once when a file is read without its table; larger files are read twice.
HELD_BYTES = 64 << 20


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
    order of each wanted frame. pictures: how many pictures there are. window: of an uncropped
    stream, the part of each picture that is shown.
    """

    data: bytes
    positions: tuple[int, ...]
    pictures: int
    window: Window | None = None

    def cut(self, frames: Any) -> Any:
        """What is shown of decoded pictures [n, H, W, 3], as a view. Raises as Window.cut."""
        return frames if self.window is None else self.window.cut(frames)


def trim(
    path: str | Path,
    numbers: Sequence[int],
    *,
    table: Table | None = None,
    shown: tuple[int, int] | None = None,
) -> Trimmed:
    """Cuts a video down to the packets that the frames `numbers` (ascending) need.

    shown: (width, height) of its pictures before they are turned upright. With it the stream is
    uncropped, as decoders of a GPU need it, and has a window.
    Raises Unsuitable where frames cannot be told from packets, VideoError for an unreadable file.
    """
    with open_container(path) as container:
        stream = choose_stream(container, path)
        selection = select_packets(path, container, stream, numbers, table=table)
        order = selection.display_order
        rank = np.argsort(order)
        window = None
        if shown is None:
            data = remux(stream, selection.packets, rank)
        else:
            data, window = remux_uncropped(stream, selection.packets, rank, shown=shown)
    number = selection.table.number[selection.rows]
    places = dict(zip(number.tolist(), rank.tolist(), strict=True))
    return Trimmed(
        data=data,
        positions=tuple(places[wanted] for wanted in numbers),
        pictures=len(order),
        window=window,
    )


def select_packets(
    path: str | Path, container: Any, stream: Any, numbers: Sequence[int], *, table: Table | None
) -> Selection:
    """Reads the packets that `numbers` need from an open container; without a table, all first."""
    if table is None and check_regular_file(path).st_size > HELD_BYTES:
        table = read_table(path)
    try:
        if table is None:
            held = list(read_packets(container, stream))
            table = build_table(stream, held)
            rows = select(table, numbers)
            return Selection(packets=[held[row][0] for row in rows], rows=rows, table=table)
        rows = select(table, numbers)
        packets = _packets_at(container, stream, rows.tolist())
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
            return build_table(stream, read_packets(container, stream))
        except DAMAGE as error:
            decoding_failed(path, error, 0)
