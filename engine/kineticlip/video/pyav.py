"""Frames by PyAV, whose FFmpeg comes with its wheel: in sequence, or only the packets needed.

The sequential read defines what every other way must return.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import av

from kineticlip.video.container import (
    Unsuitable,
    VideoError,
    choose_stream,
    decoding_failed,
    open_container,
)
from kineticlip.video.pictures import Frames, stack, upright
from kineticlip.video.probe import Scan, sequential_decode
from kineticlip.video.trim import Selection, select_packets


def read_in_sequence(scan: Scan, numbers: tuple[int, ...]) -> Frames:
    """Frames `numbers` (ascending) of a plain decode from the start, stopping after the last.

    Returns uint8 [n, H, W, 3], upright. Raises VideoError where decoding stops before that.
    """
    path, (width, height) = scan.probe.path, scan.probe.stored_size
    if scan.pictures is not None:
        frames, missing = stack(enumerate(scan.pictures), numbers, width, height)
    else:
        with open_container(path) as container:
            stream = choose_stream(container, path)
            decoded = sequential_decode(path, container, stream)
            frames, missing = stack(decoded, numbers, width, height)
    if missing:
        raise VideoError(path, f"ends before frame {min(missing)}, which its packets promise")
    return upright(frames, scan.probe.orientation)


def read_by_packets(scan: Scan, numbers: tuple[int, ...]) -> Frames:
    """The same frames from only the packets that they need.

    Raises Unsuitable where the packets do not allow it, or where what the decoder hands out differs
    from what the packet table says.
    """
    path, (width, height) = scan.probe.path, scan.probe.stored_size
    with open_container(path) as container:
        stream = choose_stream(container, path)
        selection = select_packets(path, container, stream, numbers, table=scan.table)
        decoded = _decode(path, stream.codec_context, selection)
        frames, missing = stack(decoded, numbers, width, height)
    if missing:
        raise Unsuitable(f"the decoder handed out no frame {min(missing)}")
    return upright(frames, scan.probe.orientation)


def _decode(path: str | Path, context: Any, selection: Selection) -> Iterator[tuple[int, Any]]:
    """(number, av.VideoFrame) of a selection, each checked against the time its packet gave."""
    table = selection.table
    rows = selection.rows[selection.display_order]
    expected = ((table.number[row], table.pts[row]) for row in rows if table.number[row] >= 0)
    decoded = 0
    try:
        for packet in [*selection.packets, None]:
            for frame in context.decode(packet):
                if frame.is_corrupt:  # what stands in for the damage depends on what was decoded
                    raise Unsuitable("damaged pictures")
                number, pts = next(expected, (-1, -1))
                if frame.pts != pts:
                    raise Unsuitable(f"the decoder gave the picture of time {frame.pts}, not {pts}")
                yield int(number), frame
                decoded += 1
    except av.FFmpegError as error:
        decoding_failed(path, error, decoded)
