"""Batches of videos to frames on a device, by the best decoder that the device has.

Files are trimmed in threads, grouped by codec and size (a session of the decoder serves one size),
and decoded on the device; what its decoder does not take is decoded on the CPU and copied there.
With DALI, folders of JPEG images are decoded on the device as well.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING

from kineticlip.video.container import Unsuitable, VideoError
from kineticlip.video.dali_images import SUFFIXES, DaliImages
from kineticlip.video.decode import VideoSource
from kineticlip.video.nvdec import why_not_on_gpu
from kineticlip.video.stream_decoders import OnCudaStream, make_stream_decoder, this_cuda_stream
from kineticlip.video.trim import Trimmed, trim

if TYPE_CHECKING:
    import torch

# Decoded frames of one run, so that 32 frames of 1080p for 16 videos are not held at once.
RUN_BYTES = 2 << 30


@dataclass(frozen=True, kw_only=True)
class Request:
    """Frames wanted of one open video: distinct numbers, ascending."""

    video: VideoSource
    numbers: tuple[int, ...]


@dataclass(frozen=True, kw_only=True)
class Decoded:
    """Its frames: torch uint8 [n, H, W, 3], upright, on the device; who decoded them, and why."""

    frames: torch.Tensor
    decoder: str
    notes: tuple[str, ...]


@dataclass(frozen=True)
class _Images:
    """The bytes of the wanted images of a folder."""

    files: list[bytes]


# What a thread makes of a request: the input of the device's decoder, or already the result.
_Started = Trimmed | _Images | Decoded | VideoError


class BatchReader:
    """Reads frames of many videos at once onto a device.

    device: a torch device name. batch: videos in one run of the decoder. num_threads: files read,
    and streams decoded, at the same time. `decoder` and `reason` tell the choice. Use as a context
    manager, or close. One thread at a time may read. Raises UserError for a decoder that is unknown
    or cannot be had.
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
        self._images: DaliImages | None = None  # made when the first folder comes
        self._capability = _capability(device)
        self._pool = ThreadPoolExecutor(num_threads, thread_name_prefix="kineticlip-read")

    def __enter__(self) -> BatchReader:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Ends the threads and frees the decoders."""
        self._pool.shutdown()
        for decoder in (self._streams, self._images):
            if decoder is not None:
                decoder.close()

    def read(self, requests: Sequence[Request]) -> list[Decoded | VideoError]:
        """The frames of each request, in its place; a VideoError where a video cannot be read.

        Files of later runs are read and trimmed while the first ones are decoded.
        """
        here = this_cuda_stream(self._device)
        jobs = [self._pool.submit(self._start, request, here) for request in requests]
        results: dict[int, Decoded | VideoError] = {}
        for run in _runs(requests, self._batch):
            started = {index: jobs[index].result() for index in run}
            decoded = self._decode(requests, started)
            for index, job in started.items():
                if isinstance(job, (Decoded, VideoError)):
                    results[index] = job
                else:
                    results[index] = self._result(requests[index], decoded[index], here)
        return [results[index] for index in range(len(requests))]

    def _start(self, request: Request, here: OnCudaStream) -> _Started:
        """What can be done in a thread; all of it where the CPU decodes."""
        if self._streams is None:
            return self._on_cpu(request, "", here)
        if self._takes_images(request):
            return _read_images(request)
        probe = request.video.probe
        reason = why_not_on_gpu(probe, self.decoder, self._capability)
        if not reason:
            try:
                return trim(
                    probe.path,
                    request.numbers,
                    table=request.video.table,
                    shown=probe.stored_size,
                )
            except Unsuitable as error:
                reason = str(error)
            except VideoError as error:
                return error
        return self._on_cpu(request, reason, here)

    def _takes_images(self, request: Request) -> bool:
        """Whether the video is a folder whose wanted images the device decodes."""
        files = [request.video.files[number] for number in request.numbers if request.video.files]
        jpeg = all(file.suffix.lower() in SUFFIXES for file in files)
        return self.decoder == "dali" and bool(files) and jpeg

    def _decode(
        self, requests: Sequence[Request], started: dict[int, _Started]
    ) -> dict[int, torch.Tensor | Unsuitable]:
        """Decodes a run's streams, together, and its folders: frames not yet turned, by index."""
        streams = {index: job for index, job in started.items() if isinstance(job, Trimmed)}
        decoded: dict[int, torch.Tensor | Unsuitable] = {}
        if self._streams is not None and streams:
            frames = self._streams.decode(list(streams.values()))
            decoded.update(zip(streams, frames, strict=True))
        for index, job in started.items():
            if isinstance(job, _Images):
                decoded[index] = self._decode_images(requests[index].video, job)
        return decoded

    def _decode_images(self, video: VideoSource, images: _Images) -> torch.Tensor | Unsuitable:
        try:
            if self._images is None:
                self._images = self._make_images()
            pictures = self._images.decode(images.files)
        except Unsuitable as error:
            return error
        if pictures.shape[1:3] != (video.height, video.width):
            return Unsuitable("its images differ in size")  # reading on the CPU names the one
        return pictures

    def _make_images(self) -> DaliImages:
        on_gpu = self._device.startswith("cuda")
        index = int(self._device.partition(":")[2] or 0) if on_gpu else None
        return DaliImages(num_threads=self._num_threads, device_id=index)

    def _result(
        self, request: Request, frames: torch.Tensor | Unsuitable, here: OnCudaStream
    ) -> Decoded | VideoError:
        """The decoder's frames turned upright; what it could not decode, by the CPU."""
        if isinstance(frames, Unsuitable):
            return self._on_cpu(request, str(frames), here)
        assert frames is not None, f"{self.decoder} gave neither frames nor a reason"
        upright = request.video.probe.orientation.apply(frames).contiguous()
        return Decoded(frames=upright, decoder=self.decoder, notes=())

    def _on_cpu(self, request: Request, reason: str, here: OnCudaStream) -> Decoded | VideoError:
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


def _read_images(request: Request) -> _Images | VideoError:
    video = request.video
    try:
        return _Images([video.files[number].read_bytes() for number in request.numbers])
    except OSError as error:
        return VideoError(video.path, str(error))


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
