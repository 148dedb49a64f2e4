"""Opening a local video file safely, and choosing its video stream by one rule."""

from __future__ import annotations

import os
import stat
from pathlib import Path
from typing import Any, NoReturn

import av
from av.stream import Discard, Disposition

from kineticlip.runtime.errors import UserError

# What FFmpeg may guess a file to be. Its list ends before everything that reads further files or
# the network: playlists (hls, dash, concat), session descriptions (sdp, rtsp), image patterns.
FORMATS = (
    "mov,mp4,m4a,3gp,3g2,mj2,matroska,webm,avi,mpeg,mpegts,mpegvideo,flv,live_flv,gif,ogg,asf,"
    "h264,hevc,av1,obu,m4v,ivf,nut,mxf,rm,dv,wtv,mjpeg,apng,yuv4mpegpipe,jpeg_pipe,png_pipe,"
    "webp_pipe,bmp_pipe"
)
# One picture may not claim more: 8192 x 8192, 200 MB as RGB. FFmpeg checks before it allocates.
MAX_PIXELS = 1 << 26
# HMDB51 carries Latin-1 titles. From version 19 on PyAV takes them as they are.
ANY_TITLE = {"metadata_errors": "ignore"} if int(av.__version__.split(".")[0]) < 19 else {}
# What PyAV raises for damaged streams; IndexError where one appears on the way (MPEG-TS).
DAMAGE = (av.FFmpegError, ValueError, IndexError)


class VideoError(UserError):
    """A video that cannot be read, or not in full: which file, and why in one line."""

    def __init__(self, path: str | Path, reason: str) -> None:
        super().__init__(f"{path}: {reason}")
        self.path = str(path)
        self.reason = reason

    def __reduce__(self) -> tuple[type[VideoError], tuple[str, str]]:
        return VideoError, (self.path, self.reason)


class Unsuitable(Exception):
    """One way of reading a file fails or is not proven exact; str() says why. Another may do.

    It never reaches a user: who catches it reads the file in another way, and notes the reason.
    """


def open_container(path: str | Path) -> Any:
    """Opens a local file as an av.InputContainer; the caller closes it.

    Only regular files of the formats above are opened: never a URL, a device, or a text file
    that names other files. Raises VideoError.
    """
    check_regular_file(path)
    try:
        return av.open(
            # The prefix keeps a colon in the name from being read as a protocol.
            f"file:{os.path.abspath(path)}",
            **ANY_TITLE,
            container_options={
                "format_whitelist": FORMATS,
                "protocol_whitelist": "file",
                "fpsprobesize": "0",  # the guess at a rate decodes 24 frames of a VFR phone clip
            },
        )
    except (av.FFmpegError, ValueError) as error:
        raise VideoError(path, _why_not_opened(Path(path), error)) from None


def check_regular_file(path: str | Path) -> os.stat_result:
    """The file's status. Raises VideoError unless it is a regular file with something in it."""
    try:
        status = os.stat(path)
    except FileNotFoundError:
        raise VideoError(path, "no such file") from None
    except (OSError, ValueError) as error:
        raise VideoError(path, f"cannot be opened: {_one_line(error)}") from None
    if not stat.S_ISREG(status.st_mode):
        raise VideoError(path, "is not a regular file")
    if status.st_size == 0:
        raise VideoError(path, "is empty")
    return status


def choose_stream(container: Any, path: str | Path) -> Any:
    """The stream every decoder reads: a default one of the container, of these the largest.

    This is the choice of the ffmpeg tool and of av_find_best_stream; ties go to the first, cover
    pictures do not count. All other streams are discarded in the demuxer.
    Raises VideoError where there is no video.
    """
    streams = [
        stream
        for stream in container.streams.video
        if not stream.disposition & Disposition.attached_pic
    ]
    if not streams:
        kinds = sorted({str(stream.type) for stream in container.streams})
        raise VideoError(path, f"holds no video, only {', '.join(kinds) or 'an empty container'}")
    known = [stream for stream in streams if stream.codec_context is not None]
    if not known:
        raise VideoError(path, "its codec is unknown to FFmpeg")
    chosen = min(
        known,
        key=lambda stream: (
            not stream.disposition & Disposition.default,
            -stream.codec_context.width * stream.codec_context.height,
            stream.index,
        ),
    )
    for stream in container.streams:
        if stream.index != chosen.index:
            stream.discard = Discard.all
    context = chosen.codec_context
    # One thread a video: two cost 5-20 % more CPU time and gain wall time only from 720p on.
    context.thread_count = 1
    context.options = {"max_pixels": str(MAX_PIXELS)}
    return chosen


def decoding_failed(path: str | Path, error: Exception, decoded: int) -> NoReturn:
    """Raises the VideoError of a file that opens but does not decode to its end."""
    place = f"after {decoded} pictures" if decoded else "at its first picture"
    raise VideoError(path, f"decoding stops {place}: {_one_line(error)}") from None


def _one_line(error: BaseException) -> str:
    text = getattr(error, "strerror", None) or str(error) or type(error).__name__
    return str(text).splitlines()[0][:200]


def _why_not_opened(path: Path, error: BaseException) -> str:
    """A reason that a person can act on, from the first bytes of the file."""
    try:
        file = path.open("rb")
    except OSError as denied:
        return f"cannot be opened: {_one_line(denied)}"
    with file:
        head = file.read(512)
        start = head.lstrip()[:256].lower()
        if start.startswith((b"<!doctype html", b"<html", b"<?xml", b"<head")):
            return "is a web page, not a video (a failed download?)"
        if start.startswith((b"ffconcat", b"#extm3u", b"v=0", b"[playlist]")):
            return "is a playlist or session description, not a video; these are not followed"
        if head[4:8] == b"ftyp" and not _has_index(file, path.stat().st_size):
            return "is an MP4 without its index (moov box): cut off while recorded or downloaded"
    return f"is not a video that FFmpeg can open: {_one_line(error)}"


def _has_index(file: Any, size: int) -> bool:
    """Whether a moov box stands at the top level of an ISO base media file, whole."""
    offset = 0
    while offset + 8 <= size:
        file.seek(offset)
        header = file.read(16)
        length = int.from_bytes(header[:4], "big")
        if length == 1:
            length = int.from_bytes(header[8:16], "big")
        if header[4:8] == b"moov":
            return offset + length <= size
        if length < 8:
            return False
        offset += length
    return False
