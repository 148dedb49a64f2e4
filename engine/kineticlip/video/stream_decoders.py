"""Decoders of trimmed streams behind one contract, and which of them a device gets."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import TYPE_CHECKING, Any, Protocol

from kineticlip.runtime.errors import UserError, did_you_mean
from kineticlip.video import torchcodec
from kineticlip.video.container import Unsuitable
from kineticlip.video.dali import DaliDecoder
from kineticlip.video.decode import DECODERS
from kineticlip.video.trim import Trimmed

if TYPE_CHECKING:
    import torch

OnCudaStream = Callable[[], AbstractContextManager[Any]]


class StreamDecoder(Protocol):
    """What DALI and torchcodec have in common: trimmed streams in, frames on the device out."""

    name: str

    def decode(self, streams: Sequence[Trimmed]) -> list[torch.Tensor | Unsuitable]:
        """Each stream's wanted frames, in its place: uint8 [n, H, W, 3], shown, not turned.

        An Unsuitable takes the place of a stream that cannot be decoded.
        """

    def close(self) -> None:
        """Frees what it holds."""


class TorchcodecDecoder:
    """torchcodec behind this contract: one decoder a stream, in threads.

    Raises Unsuitable where torchcodec cannot decode on this machine.
    """

    name = "torchcodec"

    def __init__(self, *, num_threads: int = 16, device: str = "cuda") -> None:
        decoders = torchcodec.load()
        if device.startswith("cuda"):
            decoders.set_nvdec_cache_capacity(2 * num_threads)
        self._device = device
        self._pool = ThreadPoolExecutor(num_threads, thread_name_prefix="kineticlip-decode")

    def decode(self, streams: Sequence[Trimmed]) -> list[torch.Tensor | Unsuitable]:
        """As StreamDecoder.decode."""
        here = this_cuda_stream(self._device)
        return list(self._pool.map(partial(self._decode, here=here), streams))

    def close(self) -> None:
        """Ends the threads."""
        self._pool.shutdown()

    def _decode(self, stream: Trimmed, *, here: OnCudaStream) -> torch.Tensor | Unsuitable:
        try:
            with here():
                frames: torch.Tensor = torchcodec.decode_trimmed(stream, device=self._device)
        except Unsuitable as error:
            return error
        return frames


def make_stream_decoder(
    decoder: str, *, device: str, batch: int, num_threads: int
) -> tuple[StreamDecoder | None, str]:
    """(decoder, why this one) for a device; None where videos are read one by one on the CPU.

    decoder: "auto" takes DALI on a GPU, torchcodec where DALI is missing, and PyAV on the CPU.
    Raises UserError for one that is named and cannot be had.
    """
    if decoder not in DECODERS:
        raise UserError(f"unknown decoder {decoder!r}. {did_you_mean(decoder, DECODERS)}")
    if decoder == "pyav":
        return None, "asked for"
    if not device.startswith("cuda"):
        if decoder == "dali":
            raise UserError(f"decoder 'dali' decodes on a GPU, not on {device!r}; use auto or pyav")
        return None, f"PyAV decodes fastest on {device}"
    reasons: list[str] = []
    for name in ("dali", "torchcodec") if decoder == "auto" else (decoder,):
        try:
            made = _make(name, device=device, batch=batch, num_threads=num_threads)
        except Unsuitable as error:
            reasons.append(str(error))
        else:
            chosen = "first choice on a GPU" if decoder == "auto" else "asked for"
            return made, "; ".join(reasons) or chosen
    if decoder != "auto":
        raise UserError(f"decoder {decoder!r}: {reasons[0]}")
    return None, "; ".join(reasons)


def _make(name: str, *, device: str, batch: int, num_threads: int) -> StreamDecoder:
    if name == "dali":
        index = int(device.partition(":")[2] or 0)
        return DaliDecoder(batch=batch, num_threads=num_threads, device_id=index)
    return TorchcodecDecoder(num_threads=num_threads, device=device)


def this_cuda_stream(device: str) -> OnCudaStream:
    """Makes contexts in which other threads work on the CUDA stream of this one.

    A new thread works on the default stream, which waits for no other: its frames would be read
    before they are there, and their memory be used again while they are still read.
    """
    import torch

    if not device.startswith("cuda"):
        return nullcontext
    return partial(torch.cuda.stream, torch.cuda.current_stream(device))
