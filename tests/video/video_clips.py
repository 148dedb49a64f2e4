"""Small clips whose frames carry their number, and the plain read they are compared with."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
from numpy.typing import NDArray

from kineticlip.video.container import ANY_TITLE

BITS = 8
CELL = 16  # a bit is a 16 x 16 block, so it survives every codec here
WIDTH, HEIGHT = 144, 96


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """How a clip is encoded. times: presentation time of each frame in ticks of 1/30 s."""

    suffix: str
    codec: str
    pixel_format: str = "yuv420p"
    frames: int = 40
    options: dict[str, str] = field(default_factory=dict)
    muxer: dict[str, str] = field(default_factory=dict)
    times: Callable[[int], int] = lambda number: number
    rotation: int = 0
    size: tuple[int, int] = (WIDTH, HEIGHT)


X264 = {"preset": "veryfast", "crf": "30"}
RECIPES = {
    # two B-frames between references, closed groups of twelve: five groups
    "h264": Recipe(suffix=".mp4", codec="libx264", options={**X264, "g": "12", "bf": "3"}),
    "h264_open": Recipe(
        suffix=".mp4",
        codec="libx264",
        options={**X264, "x264-params": "keyint=12:bframes=3:open-gop=1"},
    ),
    "h264_mkv": Recipe(suffix=".mkv", codec="libx264", options={**X264, "g": "250", "bf": "3"}),
    "h264_vfr": Recipe(
        suffix=".mp4",
        codec="libx264",
        options={**X264, "g": "12", "bf": "2"},
        times=lambda number: number + number // 3 * 4,
    ),
    "h264_odd": Recipe(
        suffix=".mp4", codec="libx264", options={**X264, "g": "12"}, size=(150, 102)
    ),
    "h264_turned": Recipe(suffix=".mp4", codec="libx264", options={**X264, "g": "12"}, rotation=90),
    "h264_10bit": Recipe(
        suffix=".mp4", codec="libx264", pixel_format="yuv420p10le", options={**X264, "g": "12"}
    ),
    "h264_444": Recipe(
        suffix=".mp4", codec="libx264", pixel_format="yuv444p", options={**X264, "g": "12"}
    ),
    "h264_ts": Recipe(suffix=".ts", codec="libx264", options={**X264, "g": "12", "bf": "3"}),
    "h264_avi": Recipe(suffix=".avi", codec="libx264", options={**X264, "g": "12", "bf": "3"}),
    "h264_fragmented": Recipe(
        suffix=".mp4",
        codec="libx264",
        options={**X264, "g": "12", "bf": "2"},
        muxer={"movflags": "frag_keyframe+empty_moov"},
    ),
    "hevc": Recipe(
        suffix=".mp4",
        codec="libx265",
        options={
            "preset": "ultrafast",
            "x265-params": "keyint=12:min-keyint=12:no-open-gop=1:bframes=3:b-pyramid=1:"
            "log-level=none:pools=none:frame-threads=1",
        },
    ),
    "hevc_open": Recipe(
        suffix=".mp4",
        codec="libx265",
        options={
            "preset": "ultrafast",
            "x265-params": "keyint=12:min-keyint=12:open-gop=1:bframes=3:"
            "log-level=none:pools=none:frame-threads=1",
        },
    ),
    "vp9": Recipe(
        suffix=".webm", codec="libvpx-vp9", options={"g": "12", "cpu-used": "8", "deadline": "1"}
    ),
    "vp8": Recipe(
        suffix=".webm", codec="libvpx", options={"g": "12", "cpu-used": "8", "deadline": "1"}
    ),
    "mjpeg": Recipe(suffix=".avi", codec="mjpeg", pixel_format="yuvj420p"),
    "mpeg4_bframes": Recipe(suffix=".avi", codec="mpeg4", options={"g": "12", "bf": "2"}),
    "mpeg2": Recipe(suffix=".mpg", codec="mpeg2video", options={"g": "12", "bf": "2"}),
}


def picture(number: int, width: int = WIDTH, height: int = HEIGHT) -> NDArray[np.uint8]:
    """A moving gradient with the frame's number as blocks along the top: uint8 [H, W, 3]."""
    rows, columns = np.mgrid[:height, :width]
    image = np.stack(
        [
            (columns * 2 + number * 5) % 256,
            (rows * 2 + number * 3) % 256,
            np.full_like(rows, number * 7 % 256),
        ],
        axis=-1,
    ).astype(np.uint8)  # [H, W, 3]
    for bit in range(BITS):
        image[:CELL, bit * CELL : (bit + 1) * CELL] = 235 if number >> bit & 1 else 20
    return image


def number_of(frame: NDArray[np.uint8]) -> int:
    """The number that a decoded frame carries."""
    middle = slice(CELL // 4, CELL - CELL // 4)
    return sum(
        int(frame[middle, bit * CELL + CELL // 4 : (bit + 1) * CELL - CELL // 4].mean() > 128)
        << bit
        for bit in range(BITS)
    )


def write_clip(path: Path, recipe: Recipe) -> None:
    """Encodes a recipe's frames."""
    width, height = recipe.size
    with av.open(str(path), "w", options=recipe.muxer) as container:
        stream = container.add_stream(recipe.codec, rate=30, options=recipe.options)
        stream.width, stream.height = width, height
        stream.pix_fmt = recipe.pixel_format
        stream.codec_context.thread_count = 1
        stream.codec_context.time_base = Fraction(1, 30)
        if recipe.rotation:
            stream.set_display_rotation(recipe.rotation)
        for number in range(recipe.frames):
            frame = av.VideoFrame.from_ndarray(picture(number, width, height), format="rgb24")
            frame.pts, frame.time_base = recipe.times(number), Fraction(1, 30)
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))


def read_plainly(path: Path, keep: Sequence[int] | None = None) -> tuple[int, dict[int, NDArray]]:
    """(frame count, {number: uint8 [H, W, 3]}) of a plain decode by PyAV, turned upright.

    Uses nothing of the engine: it is what the engine is compared with. keep: numbers to convert,
    None for all.
    """
    kept = {}
    count = 0
    with av.open(str(path), **ANY_TITLE) as container:
        stream = container.streams.best("video")
        stream.codec_context.thread_count = 1
        for number, frame in enumerate(container.decode(stream)):
            if keep is None or number in keep:
                kept[number] = np.rot90(frame.to_ndarray(format="rgb24"), frame.rotation // 90)
            count += 1
    return count, kept
