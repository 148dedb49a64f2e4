"""From decoded pictures to upright RGB, and how much of them may be kept."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
from av.sidedata.sidedata import SideDataContainer
from numpy.typing import NDArray

Frames = NDArray[np.uint8]  # [n, H, W, 3]


@dataclass(frozen=True, kw_only=True)
class Orientation:
    """What the container's display matrix asks for: exchange the axes first, then mirror."""

    transpose: bool = False
    flip_rows: bool = False
    flip_columns: bool = False

    def upright_size(self, width: int, height: int) -> tuple[int, int]:
        """(width, height) of the upright picture."""
        return (height, width) if self.transpose else (width, height)

    def apply(self, frames: Any) -> Any:
        """Turns [..., H, W, 3] (numpy or torch) upright as a view; torch copies what it mirrors."""
        if self.transpose:
            frames = frames.swapaxes(-3, -2)
        axes = tuple(axis for axis, flip in ((-3, self.flip_rows), (-2, self.flip_columns)) if flip)
        if not axes:
            return frames
        return np.flip(frames, axes) if isinstance(frames, np.ndarray) else frames.flip(axes)


def orientation_of(frame: Any) -> Orientation:
    """The orientation of an av.VideoFrame; angles between the axes go to the nearest one.

    The matrix maps picture (x, y) to display (a x + c y, b x + d y), in 16.16 fixed point
    (ISO/IEC 14496-12, 8.3.2). Angles are read from it as FFmpeg reads them.
    """
    # frame.side_data would tie frame and container into a cycle, which waits for the collector:
    # 2 GB over 2,000 reads of HMDB51's AVIs.
    data = SideDataContainer(frame).get("DISPLAYMATRIX")  # type: ignore[call-arg]  # no __init__
    if data is None:
        return Orientation()
    a, b, _, c, d, *_ = np.frombuffer(bytes(data), dtype=np.int32).tolist()
    if abs(a) + abs(d) >= abs(b) + abs(c):
        return Orientation(flip_rows=d < 0, flip_columns=a < 0)
    return Orientation(transpose=True, flip_rows=b < 0, flip_columns=c < 0)


def to_rgb(frame: Any, width: int, height: int) -> Frames:
    """An av.VideoFrame as uint8 [height, width, 3], not yet turned, by FFmpeg's own conversion.

    A picture of another size than the stream's first is scaled to it, as the ffmpeg tool does.
    """
    same = (frame.width, frame.height) == (width, height)
    size = {} if same else {"width": width, "height": height}
    rgb: Frames = frame.reformat(format="rgb24", threads=1, **size).to_ndarray()
    return rgb


def stored_bytes(frame: Any) -> int:
    """Memory that a decoded picture holds, with 2 KiB of bookkeeping."""
    size: int = 2048 + sum(plane.buffer_size for plane in frame.planes)
    return size


def upright(frames: Frames, orientation: Orientation) -> Frames:
    """[n, H, W, 3] turned upright, contiguous."""
    return np.ascontiguousarray(orientation.apply(frames))


def stack(
    frames: Iterable[tuple[int, Any]], numbers: tuple[int, ...], width: int, height: int
) -> tuple[Frames, set[int]]:
    """Converts those of (number, av.VideoFrame) that are wanted, one at a time.

    numbers: ascending. Returns uint8 [n, height, width, 3] and the numbers that did not come.
    """
    out = np.empty((len(numbers), height, width, 3), dtype=np.uint8)
    row = {number: index for index, number in enumerate(numbers)}
    missing = set(numbers)
    for number, frame in frames:
        if number in row:
            out[row[number]] = to_rgb(frame, width, height)
            missing.discard(number)
        if not missing:
            break
    return out, missing
