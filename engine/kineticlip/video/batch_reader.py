"""Batches of videos to frames on a device, by the decoder that is best there.

Files are trimmed in threads, grouped by codec and size (a decoder session serves one size), and
decoded there; files the decoder lacks are decoded on the CPU and copied. With DALI on a GPU,
folders of JPEG images are decoded there as well.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import cached_property, partial
from typing import TYPE_CHECKING, Any, Protocol

from kineticlip.runtime.errors import UserError, did_you_mean
from kineticlip.video import torchcodec
from kineticlip.video.container import Unsuitable, VideoError
from kineticlip.video.dali import DaliDecoder
from kineticlip.video.dali_images import SUFFIXES, DaliImages
from kineticlip.video.decode import DECODERS, VideoSource
from kineticlip.video.probe import Probe
from kineticlip.video.trim import Trimmed, trim

if TYPE_CHECKING:
    import torch

# Smallest pictures that NVDEC takes (NVIDIA Video Codec SDK, decoder capabilities).
SMALLEST = {"h264": (48, 16), "hevc": (144, 144), "vp8": (48, 16), "vp9": (128, 128)}
SMALLEST["av1"] = (128, 128)
# Compute capabilities without an AV1 decoder: Volta, Turing, GA100, Hopper.
NO_AV1 = ((7, 0), (7, 2), (7, 5), (8, 0), (9, 0))
# Decoded frames of one run, so that 32 frames of 1080p for 16 videos are not held at once.
RUN_BYTES = 2 << 30


Stream = Callable[[], AbstractContextManager[Any]]


class StreamDecoder(Protocol):
    """What DALI and torchcodec have in common: trimmed streams in, frames on the device out."""

    name: str

    def decode(self, streams: Sequence[Trimmed]) -> list[Any]:
        """uint8 [n, H, W, 3] a stream, not turned; an Unsuitable where it cannot be decoded."""

    def close(self) -> None:
        """Frees what it holds."""


class TorchcodecDecoder:
    """torchcodec behind the same contract: one decoder a stream, in threads."""

    name = "torchcodec"

    def __init__(self, *, num_threads: int = 16, device: str = "cuda") -> None:
        decoders = torchcodec.load()
        if device.startswith("cuda"):
            decoders.set_nvdec_cache_capacity(2 * num_threads)
        self._device = device
        self._pool = ThreadPoolExecutor(num_threads, thread_name_prefix="kineticlip-decode")

    def decode(self, streams: Sequence[Trimmed]) -> list[Any]:
        """As StreamDecoder.decode."""
        return list(self._pool.map(partial(self._decode, here=this_stream(self._device)), streams))

    def close(self) -> None:
        """Ends the threads."""
        self._pool.shutdown()

    def _decode(self, stream: Trimmed, *, here: Stream) -> Any:
        try:
            with here():
                return torchcodec.decode_trimmed(stream, device=self._device)
        except Unsuitable as error:
            return error


@dataclass(frozen=True, kw_only=True)
class Request:
    """Frames wanted of one open video: distinct numbers, ascending."""

    video: VideoSource
    numbers: tuple[int, ...]


@dataclass(frozen=True, kw_only=True)
class Decoded:
    """Their frames: torch uint8 [n, H, W, 3], upright, on the device; who decoded them, and why."""

    frames: torch.Tensor
    decoder: str
    notes: tuple[str, ...]


@dataclass(frozen=True)
class _Images:
    """The bytes of the wanted images of a folder."""

    files: list[bytes]


def why_not_on_gpu(probe: Probe, decoder: str, capability: tuple[int, int]) -> str:
    """Why NVDEC through this decoder does not take a file; "" where it should.

    capability: the GPU's compute capability. What this does not know comes back as an error of the
    decoder, and goes to the CPU then.
    """
    if probe.why_in_sequence:
        return "its frames cannot be picked by packets"
    if probe.codec not in SMALLEST:
        return f"{probe.codec} is left to the CPU"
    if probe.pixel_format not in torchcodec.PIXEL_FORMATS:
        return f"{probe.pixel_format} is left to the CPU"
    if probe.codec == "av1" and capability in NO_AV1:
        return "this GPU has no AV1 decoder"
    width, height = probe.orientation.upright_size(probe.width, probe.height)  # as stored
    least = SMALLEST[probe.codec]
    if width < least[0] or height < least[1]:
        return f"{width} x {height} is below NVDEC's {least[0]} x {least[1]} for {probe.codec}"
    if width % 2 or height % 2:
        return "odd sizes are left to the CPU"
    if decoder == "dali" and probe.color_matrix not in ("untagged", "bt601"):
        return f"DALI converts {probe.color_matrix} as if it were bt601"
    return ""


def make_stream_decoder(
    decoder: str, *, device: str, batch: int, num_threads: int
) -> tuple[StreamDecoder | None, str]:
    """(decoder, why it) for a device; None where videos are read on the CPU one by one.

    decoder: "auto" takes DALI on a GPU, torchcodec where DALI is missing, and PyAV on the CPU. A
    named one that cannot be had raises UserError.
    """
    if decoder not in DECODERS:
        raise UserError(f"unknown decoder {decoder!r}. {did_you_mean(decoder, DECODERS)}")
    on_gpu = device.startswith("cuda")
    if decoder == "pyav" or not on_gpu:
        if decoder == "dali":
            raise UserError(f"decoder 'dali' decodes on a GPU, not on {device!r}; use auto or pyav")
        return None, "asked for" if decoder == "pyav" else f"PyAV decodes fastest on {device}"
    index = int(device.partition(":")[2] or 0)
    reasons = []
    for name in ("dali", "torchcodec") if decoder == "auto" else (decoder,):
        try:
            if name == "dali":
                made: StreamDecoder = DaliDecoder(
                    batch=batch, num_threads=num_threads, device_id=index
                )
            else:
                made = TorchcodecDecoder(num_threads=num_threads, device=device)
        except Unsuitable as error:
            if decoder != "auto":
                raise UserError(f"decoder {decoder!r}: {error}") from None
            reasons.append(str(error))
        else:
            chosen = "asked for" if decoder != "auto" else "first choice on a GPU"
            return made, "; ".join(reasons) or chosen
    return None, "; ".join(reasons)


class BatchReader:
    """Reads frames of many videos at once onto a device.

    device: a torch device name. batch: videos in one run of the decoder. num_threads: files read,
    and streams decoded, at the same time. `decoder` and `reason` tell the choice. Use as a context
    manager, or close. One thread at a time may read.
    """

    def __init__(
        self, *, decoder: str = "auto", device: str = "cpu", batch: int = 16, num_threads: int = 16
    ) -> None:
        self._device = device
        self._batch = batch
        self._num_threads = num_threads
        self._streams, self.reason = make_stream_decoder(
            decoder, device=device, batch=batch, num_threads=num_threads
        )
        self.decoder = self._streams.name if self._streams is not None else "pyav"
        self._capability = _capability(device)
        self._pool = ThreadPoolExecutor(num_threads, thread_name_prefix="kineticlip-read")

    def __enter__(self) -> BatchReader:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Ends the threads and frees the decoder."""
        self._pool.shutdown()
        if self._streams is not None:
            self._streams.close()
        if "_images" in self.__dict__:
            self._images.close()

    def read(self, requests: Sequence[Request]) -> list[Decoded | VideoError]:
        """The frames of each request, in its place; a VideoError where a video cannot be read.

        Files of later runs are read and trimmed while the first ones are decoded.
        """
        here = this_stream(self._device)
        jobs = [self._pool.submit(self._start, request, here) for request in requests]
        results: list[Decoded | VideoError | None] = [None] * len(requests)
        for run in _runs(requests, self._batch):
            started = {index: jobs[index].result() for index in run}
            streams = {row: job for row, job in started.items() if isinstance(job, Trimmed)}
            results_of = dict(zip(streams, self._decode(list(streams.values())), strict=True))
            for index, job in started.items():
                request, frames = requests[index], results_of.get(index)
                if isinstance(job, _Images):
                    frames = self._pictures(request.video, job)
                if isinstance(frames, Unsuitable):
                    results[index] = self._on_cpu(request, str(frames), here)
                elif frames is not None:
                    turned = request.video.probe.orientation.apply(frames).contiguous()
                    results[index] = Decoded(frames=turned, decoder=self.decoder, notes=())
                elif not isinstance(job, (Trimmed, _Images)):
                    results[index] = job
        return [result for result in results if result is not None]

    def _decode(self, streams: list[Trimmed]) -> list[Any]:
        return self._streams.decode(streams) if self._streams is not None and streams else []

    @cached_property
    def _images(self) -> DaliImages:
        index = int(self._device.partition(":")[2] or 0) if self._capability != (0, 0) else None
        return DaliImages(num_threads=self._num_threads, device_id=index)

    def _pictures(self, video: VideoSource, images: _Images) -> torch.Tensor | Unsuitable:
        try:
            pictures = self._images.decode(images.files)
        except Unsuitable as error:
            return error
        if pictures.shape[1:3] != (video.height, video.width):
            return Unsuitable("its images differ in size")  # the CPU's way names the one
        return pictures

    def _start(self, request: Request, here: Stream) -> Trimmed | _Images | Decoded | VideoError:
        """What can be done in a thread: the trimmed stream or the images' bytes to be decoded.

        Where the CPU decodes, all of it.
        """
        if self._streams is None:
            return self._on_cpu(request, "", here)
        files = [request.video.files[number] for number in request.numbers if request.video.files]
        if files and self.decoder == "dali" and all(f.suffix.lower() in SUFFIXES for f in files):
            try:
                return _Images([file.read_bytes() for file in files])
            except OSError as error:
                return VideoError(request.video.path, str(error))
        probe = request.video.probe
        reason = why_not_on_gpu(probe, self.decoder, self._capability)
        if not reason:
            try:
                return trim(probe.path, request.numbers, table=request.video.table)
            except Unsuitable as error:
                reason = str(error)
            except VideoError as error:
                return error
        return self._on_cpu(request, reason, here)

    def _on_cpu(self, request: Request, reason: str, here: Stream) -> Decoded | VideoError:
        import torch

        video = request.video
        try:
            pictures = torch.from_numpy(video.read(request.numbers))
            with here():
                frames = pictures.to(self._device)
        except VideoError as error:
            return error
        notes = [f"not {self.decoder}: {reason}"] if reason else []
        return Decoded(frames=frames, decoder=video.decoder, notes=(*notes, *video.notes))


def this_stream(device: str) -> Stream:
    """Contexts for other threads that work on the stream of this one.

    A new thread works on the default stream, which waits for no other: its frames would be read
    before they are there, and their memory be used again while they are still read.
    """
    import torch

    if not device.startswith("cuda"):
        return nullcontext
    return partial(torch.cuda.stream, torch.cuda.current_stream(device))


def _runs(requests: Sequence[Request], batch: int) -> Iterator[list[int]]:
    """Requests of one codec and size together, at most `batch` and RUN_BYTES of them in a run."""

    def kind(index: int) -> tuple[str, int, int]:
        probe = requests[index].video.probe
        return probe.codec, probe.width, probe.height

    run: list[int] = []
    held = 0
    for index in sorted(range(len(requests)), key=kind):
        request = requests[index]
        size = 3 * request.video.width * request.video.height * len(request.numbers)
        if run and (len(run) == batch or held + size > RUN_BYTES):
            yield run
            run, held = [], 0
        run.append(index)
        held += size
    if run:
        yield run


def _capability(device: str) -> tuple[int, int]:
    """Compute capability of a GPU, (0, 0) of a CPU."""
    import torch

    return torch.cuda.get_device_capability(device) if device.startswith("cuda") else (0, 0)
