"""Frames by NVIDIA DALI: batches of trimmed streams to tensors, on the GPU's decoder engines.

Frame numbers are exact. Colours are DALI's: it upsamples chroma linearly and knows BT.601 alone,
so streams tagged otherwise do not come here (`nvdec.why_not_on_gpu`).
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import numpy as np

from kineticlip.video.container import Unsuitable
from kineticlip.video.trim import Trimmed


@functools.lru_cache(maxsize=1)
def load() -> Any:
    """The nvidia.dali package. Raises Unsuitable where it cannot be imported."""
    try:
        from nvidia import dali
        from nvidia.dali import fn, types  # noqa: F401  (attributes of the package from now on)
    except (ImportError, OSError) as error:
        raise Unsuitable(f"DALI cannot be imported: {str(error).splitlines()[0]}") from None
    return dali


def new_pipeline(batch: int, num_threads: int, device_id: int | None) -> Any:
    """An empty pipeline that is fed by hand, one run at a time; device_id None is the CPU."""
    return load().Pipeline(
        batch_size=batch,
        num_threads=num_threads,
        device_id=device_id,
        prefetch_queue_depth=1,
        exec_dynamic=True,
    )


class DaliDecoder:
    """Decodes batches of trimmed streams; not for several threads at once.

    batch: streams in one run. num_threads: streams decoded at the same time; NVDEC has seven
    engines on an H200 and each stream waits for its own pictures, so 16 keep them busy. device_id:
    the GPU, or None for the CPU, where DALI decodes VP8, VP9 and MJPEG only. Raises Unsuitable
    where DALI or the GPU is missing.
    """

    name = "dali"

    def __init__(
        self, *, batch: int = 16, num_threads: int = 16, device_id: int | None = 0
    ) -> None:
        self.batch = batch
        self._device_id = device_id
        dali = load()

        try:
            self._pipeline = new_pipeline(batch, num_threads, device_id)
            with self._pipeline:
                uint8, int32 = dali.types.UINT8, dali.types.INT32
                frames = dali.fn.decoders.video(
                    dali.fn.external_source(name="data", dtype=uint8, ndim=1),
                    device="cpu" if device_id is None else "mixed",
                    frames=dali.fn.external_source(name="positions", dtype=int32, ndim=1),
                    pad_mode="none",  # a frame that is not there is an error, not a black picture
                    affine=False,  # the cores are shared with the threads that read files
                )
                self._pipeline.set_outputs(frames)
            self._pipeline.build()
        except RuntimeError as error:
            raise Unsuitable(f"DALI: {reason_of(error)}") from None

    def decode(self, streams: Sequence[Trimmed]) -> list[Any]:
        """One torch tensor uint8 [n, H, W, 3] a stream, on the device, not yet turned upright.

        Of an uncropped stream, what is shown. An Unsuitable, with the reason, takes the place of a
        stream that cannot be decoded.
        """
        import torch

        results: list[Any] = []
        for start in range(0, len(streams), self.batch):
            some = streams[start : start + self.batch]
            try:
                results.extend(self._run(some))
            except torch.OutOfMemoryError:
                raise  # no fault of the streams
            except RuntimeError as error:
                # One bad stream fails its whole batch without a name; the pipeline survives.
                if len(some) == 1:
                    results.append(Unsuitable(f"DALI: {reason_of(error)}"))
                else:
                    results.extend(result for stream in some for result in self.decode([stream]))
        return results

    def close(self) -> None:
        """Frees the pipeline and its decoder sessions."""
        self._pipeline = None

    def _run(self, streams: Sequence[Trimmed]) -> list[Any]:
        import torch
        from torch.utils.dlpack import from_dlpack

        pipeline = self._pipeline
        pipeline.feed_input("data", [np.frombuffer(s.data, dtype=np.uint8) for s in streams])
        pipeline.feed_input(
            "positions", [np.array(stream.positions, dtype=np.int32) for stream in streams]
        )
        (frames,) = pipeline.run()
        copies = [_shown(stream, from_dlpack(frames[row])) for row, stream in enumerate(streams)]
        if self._device_id is not None:
            # DALI reuses its buffers: the copies must be done before they go back.
            torch.cuda.current_stream(self._device_id).synchronize()
        return copies


def _shown(stream: Trimmed, frames: Any) -> Any:
    """A copy of what a stream shows of its decoded pictures; an Unsuitable for another size."""
    try:
        return stream.cut(frames).clone()
    except Unsuitable as error:
        return Unsuitable(f"DALI: {error}")


def reason_of(error: Exception) -> str:
    """The line of DALI's long message that says what happened."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    for row, line in enumerate(lines):
        if line == "encountered:" and row + 1 < len(lines):
            return lines[row + 1][:200]
    return lines[0][:200] if lines else type(error).__name__
