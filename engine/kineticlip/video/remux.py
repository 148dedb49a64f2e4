"""Packets of a video as a small file in memory, for decoders that take whole files.

A GPU's decoder gets its streams uncropped. DALI 2.4 files a decoder session under the size that is
shown and looks it up by the size that is coded: where the two differ (340 x 256 is coded as
352 x 256) it opens a session for every video, and a stream of 320 x 234 may get that of 320 x 240,
which puts its chroma in the wrong place. VP8, VP9 and AV1 have no cropping: what is coded is shown.
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import av
import numpy as np
from av.bitstream import BitStreamFilterContext
from numpy.typing import NDArray

from kineticlip.video.container import Unsuitable
from kineticlip.video.sps import CodedSize, coded_sizes

# Every picture of a file written here lasts one tick: its times are made anew, so that a variable
# rate, an edit list or negative times cannot mislead the decoder.
TICK = Fraction(1, 25)
MUXERS = {"h264": "mp4", "hevc": "mp4"}  # all else: matroska, which holds VP8 as well
# FFmpeg's filters that rewrite the parameter sets of a stream.
FILTERS = {"h264": "h264_metadata", "hevc": "hevc_metadata"}
NO_CROPPING = "crop_left=0:crop_right=0:crop_top=0:crop_bottom=0"


@dataclass(frozen=True, kw_only=True)
class Window:
    """What is shown of the pictures that a decoder returns, in samples.

    coded: (width, height) of those pictures.
    """

    left: int
    top: int
    width: int
    height: int
    coded: tuple[int, int]

    def cut(self, frames: Any) -> Any:
        """The window of frames [n, H, W, 3] as a view: [n, height, width, 3].

        Raises Unsuitable where the frames do not have the coded size.
        """
        height, width = frames.shape[1:3]
        if (width, height) != self.coded:
            raise Unsuitable(
                f"its pictures were decoded as {width} x {height}, "
                f"and are coded as {self.coded[0]} x {self.coded[1]}"
            )
        rows = slice(self.top, self.top + self.height)
        columns = slice(self.left, self.left + self.width)
        return frames[:, rows, columns]


def remux(stream: Any, packets: Sequence[Any], rank: NDArray[np.int64]) -> bytes:
    """Writes packets as a file of their own; rank: the display rank of each. Raises Unsuitable."""
    return _written(stream, packets, rank, coded=None)


def remux_uncropped(
    stream: Any, packets: Sequence[Any], rank: NDArray[np.int64], *, shown: tuple[int, int]
) -> tuple[bytes, Window]:
    """As remux, but every coded sample is shown, and the container says that size.

    shown: (width, height) of the pictures that a decoder returns of the stream as it is. The
    window is where they are in those of the new one. The packets given are used up. Raises
    Unsuitable where the parameter sets do not tell one coded size, or crop the left or top edge.
    """
    if stream.codec.canonical_name not in FILTERS:
        width, height = shown
        window = Window(left=0, top=0, width=width, height=height, coded=shown)
        return remux(stream, packets, rank), window
    coded = _coded_size(stream, packets[0])
    window = _window(coded, shown)
    return _written(stream, packets, rank, coded=coded), window


def _coded_size(stream: Any, packet: Any) -> CodedSize:
    """What the parameter sets say: those of the container, and any before the first picture."""
    codec, extradata = stream.codec.canonical_name, stream.codec_context.extradata or b""
    try:
        sizes = coded_sizes(codec, extradata, memoryview(packet))
    except (EOFError, ValueError) as error:
        raise Unsuitable(f"its parameter sets cannot be read: {error}") from None
    if len(sizes) != 1:
        raise Unsuitable(f"its parameter sets tell {len(sizes)} coded sizes, not one")
    return sizes.pop()


def _window(coded: CodedSize, shown: tuple[int, int]) -> Window:
    width, height = shown
    if coded.left or coded.top:
        # FFmpeg rounds the left one down to its memory's alignment, and shows what it rounds off.
        raise Unsuitable("its pictures are cropped at the left or top, which is left to the CPU")
    if width > coded.width or height > coded.height:
        raise Unsuitable(
            f"its pictures are shown as {width} x {height}, more than the "
            f"{coded.width} x {coded.height} that are coded"
        )
    return Window(left=0, top=0, width=width, height=height, coded=(coded.width, coded.height))


def _written(
    stream: Any, packets: Sequence[Any], rank: NDArray[np.int64], *, coded: CodedSize | None
) -> bytes:
    """The file; coded: the size to show all of, None to leave the stream as it is."""
    codec = stream.codec.canonical_name
    # A picture may not be shown before it is decoded: display times are put off by the largest lag.
    delay = int((np.arange(len(packets)) - rank).max(initial=0))
    buffer = io.BytesIO()
    try:
        with av.open(buffer, "w", format=MUXERS.get(codec, "matroska")) as output:
            target = output.add_stream_from_template(stream, opaque=True)
            target.time_base = TICK
            target.set_display_rotation(0)  # FFmpeg versions differ in what they make of it
            if coded is not None and coded.is_cropped:
                packets = _uncropped(stream, target, packets)
            if coded is not None:  # after the filter, which sets the size that was shown
                context = target.codec_context
                context.width, context.height = coded.width, coded.height
            for row, packet in enumerate(packets):
                packet.stream = target
                packet.time_base = TICK
                packet.dts, packet.pts, packet.duration = row, int(rank[row]) + delay, 1
                output.mux_one(packet)
    except (av.FFmpegError, ValueError) as error:
        raise Unsuitable(f"{codec} packets cannot be written anew: {error}") from None
    return buffer.getvalue()


def _uncropped(stream: Any, target: Any, packets: Sequence[Any]) -> list[Any]:
    """The packets, and the target's extradata, with parameter sets that crop nothing."""
    name = f"{FILTERS[stream.codec.canonical_name]}={NO_CROPPING}"
    rewrite = BitStreamFilterContext(name, in_stream=stream, out_stream=target)
    rewritten = [out for packet in packets for out in rewrite.filter(packet)]
    assert len(rewritten) == len(packets), f"{name} gave {len(rewritten)} of {len(packets)}"
    return rewritten
