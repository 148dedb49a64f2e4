"""Which files NVDEC, the video decoder of NVIDIA's GPUs, takes."""

from __future__ import annotations

from kineticlip.video.probe import Probe
from kineticlip.video.torchcodec import PIXEL_FORMATS

# The smallest pictures that NVDEC takes (NVIDIA Video Codec SDK, decoder capabilities).
SMALLEST = {
    "h264": (48, 16),
    "hevc": (144, 144),
    "vp8": (48, 16),
    "vp9": (128, 128),
    "av1": (128, 128),
}
# Compute capabilities without an AV1 decoder: Volta, Turing, GA100, Hopper.
NO_AV1 = ((7, 0), (7, 2), (7, 5), (8, 0), (9, 0))


def why_not_on_gpu(probe: Probe, decoder: str, capability: tuple[int, int]) -> str:
    """Why NVDEC, used by "dali" or "torchcodec", does not take a file; "" where it should.

    capability: the GPU's compute capability. What this does not know of comes back as an error of
    the decoder, and goes to the CPU then.
    """
    if probe.why_in_sequence:
        return "its frames cannot be picked by packets"
    if probe.codec not in SMALLEST:
        return f"{probe.codec} is left to the CPU"
    if probe.pixel_format not in PIXEL_FORMATS:
        return f"{probe.pixel_format} is left to the CPU"
    if probe.codec == "av1" and capability in NO_AV1:
        return "this GPU has no AV1 decoder"
    reason = _why_not_this_size(probe.codec, *probe.stored_size)
    if not reason and decoder == "dali" and probe.color_matrix not in ("untagged", "bt601"):
        return f"DALI converts {probe.color_matrix} as if it were bt601"
    return reason


def _why_not_this_size(codec: str, width: int, height: int) -> str:
    least = SMALLEST[codec]
    if width < least[0] or height < least[1]:
        return f"{width} x {height} is below NVDEC's {least[0]} x {least[1]} for {codec}"
    if width % 2 or height % 2:
        return "odd sizes are left to the CPU"
    return ""
