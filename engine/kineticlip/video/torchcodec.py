"""Frames by torchcodec, from trimmed streams; an extra, which uses the system's FFmpeg libraries.

torchcodec does not tell which pictures its decoder marks as damaged (PyAV does, and such a file is
read in sequence then): of a damaged file it may show other concealment than a sequential decode.
`kineticlip prepare` names these files.
"""

from __future__ import annotations

import ctypes
import functools
import itertools
import sys
from typing import Any

import numpy as np

from kineticlip.runtime.errors import UserError
from kineticlip.video.container import Unsuitable
from kineticlip.video.pictures import Frames, upright
from kineticlip.video.probe import Probe, Scan
from kineticlip.video.remux import TICK
from kineticlip.video.trim import Trimmed, trim

# Codecs whose decoded pictures their standards define to the bit, in a pixel format that every
# FFmpeg converts to RGB by the same code. Others differ between FFmpeg versions: MPEG-4 by 2 of
# 255 (inverse transform), 10-bit H.264 by 35 (chroma filter).
CODECS = ("h264", "hevc", "vp8", "vp9", "av1")
PIXEL_FORMATS = ("yuv420p", "yuvj420p")
# glibc keeps what 1200 opens freed: 430 MB, all returned by one malloc_trim.
OPENS_BETWEEN_TRIMS = 256
_opens = itertools.count(1)


@functools.lru_cache(maxsize=1)
def load() -> Any:
    """The torchcodec.decoders module.

    Raises Unsuitable where it cannot decode on this machine, saying what to install.
    """
    try:
        import torchcodec
    except ModuleNotFoundError as error:
        if error.name != "torchcodec":
            raise
        raise Unsuitable(
            "torchcodec is not installed: pip install 'kineticlip[torchcodec]', and the package "
            "ffmpeg for its libraries"
        ) from None
    except (ImportError, OSError, RuntimeError) as error:
        raise Unsuitable(f"torchcodec cannot be imported: {str(error).splitlines()[0]}") from None
    if torchcodec.ffmpeg_major_version is None:
        raise Unsuitable("torchcodec finds no FFmpeg libraries: install the package ffmpeg")
    return torchcodec.decoders


def why_not(probe: Probe) -> str:
    """Why torchcodec would not return this file's frames to the bit; "" where it does.

    Raises UserError where no file could be decoded, for want of torchcodec or FFmpeg's libraries.
    """
    try:
        load()
    except Unsuitable as error:
        raise UserError(f"decoder 'torchcodec': {error}; or take 'auto'") from None
    if probe.why_in_sequence:
        return "its frames cannot be picked by packets"
    if probe.codec not in CODECS:
        return f"{probe.codec} is not decoded to the bit alike by all FFmpeg versions"
    if probe.pixel_format not in PIXEL_FORMATS:
        return f"{probe.pixel_format} is not converted to RGB alike by all FFmpeg versions"
    return ""


def read_by_torchcodec(scan: Scan, numbers: tuple[int, ...]) -> Frames:
    """Frames `numbers` (ascending): uint8 [n, H, W, 3], upright.

    Raises Unsuitable where torchcodec fails or counts other pictures than the packets promise.
    """
    trimmed = trim(scan.probe.path, numbers, table=scan.table)
    frames = decode_trimmed(trimmed, device="cpu").numpy()
    return upright(frames, scan.probe.orientation)


def decode_trimmed(trimmed: Trimmed, *, device: str) -> Any:
    """A trimmed stream's wanted frames: torch uint8 [n, H, W, 3] on the device, not yet turned.

    Of an uncropped stream they are views of what is shown.
    """
    import torch

    decoders = load()
    if next(_opens) % OPENS_BETWEEN_TRIMS == 0:
        release_freed_memory()
    try:
        decoder = decoders.VideoDecoder(
            trimmed.data,
            dimension_order="NHWC",
            num_ffmpeg_threads=1,
            device=device,
            seek_mode="exact",
        )
        if len(decoder) != trimmed.pictures:
            raise Unsuitable(f"torchcodec counts {len(decoder)} pictures of {trimmed.pictures}")
        # Where NVDEC does not take the stream it would be decoded on the CPU without a word.
        if device.startswith("cuda") and decoder.cpu_fallback:
            raise Unsuitable(f"torchcodec: {decoder.cpu_fallback}")
        batch = decoder.get_frames_at(list(trimmed.positions))
    except torch.OutOfMemoryError:
        raise  # no fault of the stream
    except (RuntimeError, ValueError, IndexError) as error:
        raise Unsuitable(f"torchcodec: {str(error).splitlines()[0][:200]}") from None
    ticks = np.rint(batch.pts_seconds.cpu().numpy() / float(TICK)).astype(np.int64)
    if not np.array_equal(ticks - ticks[0], np.array(trimmed.positions) - trimmed.positions[0]):
        raise Unsuitable("torchcodec returned pictures of other times than asked for")
    return trimmed.cut(batch.data)


def release_freed_memory() -> None:
    """Gives freed heap pages back to the system (glibc); other C libraries need no help."""
    if sys.platform.startswith("linux"):
        malloc_trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
        if malloc_trim is not None:
            malloc_trim(0)
