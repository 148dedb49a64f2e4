"""JPEG files to tensors by NVIDIA DALI: nvJPEG and the decoder engines of a GPU.

The same graph on a CPU is libjpeg-turbo, Pillow's decoder, to the bit. nvJPEG rounds its inverse
cosine transform differently; chroma is upsampled as there.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from kineticlip.video.container import Unsuitable
from kineticlip.video.dali import load, new_pipeline, reason_of

if TYPE_CHECKING:
    import torch

SUFFIXES = (".jpg", ".jpeg")


class DaliImages:
    """Decodes JPEG files of one size; not for several threads at once.

    batch: images in one run. device_id: the GPU, or None for the CPU. Raises Unsuitable where DALI
    or the GPU is missing.
    """

    def __init__(
        self, *, batch: int = 64, num_threads: int = 16, device_id: int | None = 0
    ) -> None:
        dali = load()
        self.batch = batch
        self._device_id = device_id
        try:
            self._pipeline = new_pipeline(batch, num_threads, device_id)
            with self._pipeline:
                pictures = dali.fn.decoders.image(
                    dali.fn.external_source(name="data", dtype=dali.types.UINT8, ndim=1),
                    device="cpu" if device_id is None else "mixed",
                    output_type=dali.types.RGB,
                    adjust_orientation=False,  # a frame's EXIF is not read on the CPU either
                    jpeg_fancy_upsampling=True,
                    affine=False,
                )
                self._pipeline.set_outputs(pictures)
            self._pipeline.build()
        except RuntimeError as error:
            raise Unsuitable(f"DALI: {reason_of(error)}") from None

    def decode(self, files: Sequence[bytes]) -> torch.Tensor:
        """The pictures of n files: uint8 [n, H, W, 3] on the device.

        Raises Unsuitable where one of them cannot be decoded or has another size than the first.
        """
        import torch

        runs = [self._run(files[at : at + self.batch]) for at in range(0, len(files), self.batch)]
        pictures = [picture for run in runs for picture in run]
        if any(picture.shape != pictures[0].shape for picture in pictures):
            raise Unsuitable("its images differ in size")
        return torch.stack(pictures)

    def close(self) -> None:
        """Frees the pipeline."""
        self._pipeline = None

    def _run(self, files: Sequence[bytes]) -> list[torch.Tensor]:
        import torch
        from torch.utils.dlpack import from_dlpack

        self._pipeline.feed_input("data", [np.frombuffer(data, dtype=np.uint8) for data in files])
        try:
            (pictures,) = self._pipeline.run()
        except RuntimeError as error:
            raise Unsuitable(f"DALI: {reason_of(error)}") from None
        copies = [from_dlpack(pictures[row]).clone() for row in range(len(files))]
        if self._device_id is not None:
            # DALI reuses its buffers: the copies must be done before they go back.
            torch.cuda.current_stream(self._device_id).synchronize()
        return copies
