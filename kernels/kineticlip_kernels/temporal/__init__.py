"""Attention between the frames of a clip: sequences so short that one program holds them whole."""

from kineticlip_kernels.temporal.ops import (
    MAX_TILE,
    frame_attention,
    frame_reasons,
)
from kineticlip_kernels.temporal.reference import (
    frame_attention_reference,
)

__all__ = [
    "MAX_TILE",
    "frame_attention",
    "frame_attention_reference",
    "frame_reasons",
]
