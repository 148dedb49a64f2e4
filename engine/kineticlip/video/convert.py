"""Videos rewritten once for fast reading: small H.264 with short closed groups, or JPEG folders.

Frames keep their numbers: what was frame n is frame n. Rotation is applied, audio left out.
"""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
from numpy.typing import NDArray
from PIL import Image

from kineticlip.errors import UserError
from kineticlip.video.container import VideoError, choose_stream, open_container
from kineticlip.video.folder import TEMPLATE, list_frames
from kineticlip.video.pictures import to_rgb
from kineticlip.video.probe import Probe, pictures, probe

# Frames in a closed group. Eight frames of a 300-frame clip then cost 40 packets instead of 159
# at 250, for 40 % more bytes.
GROUP = 12
X264 = {"preset": "veryfast", "crf": "20", "g": str(GROUP), "keyint_min": str(GROUP), "bf": "2"}
JPEG_QUALITY = 95
BT601, LIMITED_RANGE = 6, 1  # ITU-T H.273: MatrixCoefficients, and FFmpeg's AVCOL_RANGE_MPEG


def shrunk(width: int, height: int, side: int) -> tuple[int, int]:
    """(width, height), both even, with the short side at most `side` (0: any), the shape kept."""
    scale = min(1.0, side / min(width, height)) if side else 1.0
    return max(2, 2 * round(width * scale / 2)), max(2, 2 * round(height * scale / 2))


def reencode(path: str | Path, target: Path, *, side: int) -> int:
    """Writes target, an MP4, and returns its number of frames; an earlier whole one is kept.

    side: of the short edge, 0 to keep the size; never enlarged. Colours are written as BT.601,
    which every decoder converts right. Raises VideoError where the source does not decode to its
    end, UserError where target cannot be written.
    """
    facts = probe(path)
    if _holds(target, facts.num_frames):
        return facts.num_frames
    size = shrunk(facts.width, facts.height, side)
    with _beside(target) as part:
        with av.open(str(part), "w", format="mp4", options={"movflags": "faststart"}) as output:
            rate = Fraction(facts.frame_rate or 25).limit_denominator(1001)
            stream = output.add_stream("libx264", rate=rate, options=X264)
            context = stream.codec_context
            stream.width, stream.height = size
            stream.pix_fmt = "yuv420p"
            context.thread_count = 1
            context.colorspace, context.color_range = BT601, LIMITED_RANGE
            for number, (pts, tick, image) in enumerate(_upright(path, facts)):
                if not facts.in_time_order:
                    pts, tick = number, 1 / rate
                if not number:
                    context.time_base = tick
                frame = av.VideoFrame.from_ndarray(image, format="rgb24").reformat(
                    *size, "yuv420p", interpolation="BICUBIC", threads=1
                )
                frame.pts, frame.time_base = pts, tick
                output.mux(stream.encode(frame))
            output.mux(stream.encode(None))
        if not _holds(part, facts.num_frames):
            raise VideoError(path, f"promises {facts.num_frames} frames; fewer could be written")
        part.replace(target)
    return facts.num_frames


def extract_frames(path: str | Path, target: Path, *, side: int) -> int:
    """Writes a folder of JPEG files named by the default template from 1 on; returns how many.

    An earlier whole folder is kept. Arguments and errors as reencode.
    """
    facts = probe(path)
    if target.is_dir() and len(list_frames(target)) == facts.num_frames:
        return facts.num_frames
    size = shrunk(facts.width, facts.height, side) if side else (facts.width, facts.height)
    count = 0
    with _beside(target) as part:
        part.mkdir()
        for _, _, image in _upright(path, facts):
            count += 1
            picture = Image.fromarray(image)
            if picture.size != size:
                picture = picture.resize(size, Image.Resampling.BICUBIC)
            picture.save(part / TEMPLATE.format(count), quality=JPEG_QUALITY)
        if count != facts.num_frames:
            raise VideoError(path, f"promises {facts.num_frames} frames, of which {count} decode")
        part.rename(target)
    return count


def _upright(path: str | Path, facts: Probe) -> Iterator[tuple[Any, Any, NDArray[np.uint8]]]:
    """(pts, time base, uint8 [H, W, 3]) of every picture, in output order."""
    stored = facts.orientation.upright_size(facts.width, facts.height)
    with open_container(path) as container:
        stream = choose_stream(container, path)
        for _, frame in pictures(path, container, stream):
            image = facts.orientation.apply(to_rgb(frame, *stored))
            yield frame.pts, frame.time_base, np.ascontiguousarray(image)


def _holds(target: Path, frames: int) -> bool:
    """Whether target is a video of so many frames."""
    try:
        return probe(target).num_frames == frames
    except VideoError:
        return False


@contextlib.contextmanager
def _beside(target: Path) -> Iterator[Path]:
    """A path in target's folder to write and then rename; what is left of it is removed."""
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f".{target.name}.", dir=target.parent) as folder:
            yield Path(folder) / target.name
    except OSError as error:
        raise UserError(f"{target}: cannot be written: {error.strerror or error}") from None
