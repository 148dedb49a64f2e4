"""The operations of EVL's decoder: motion between neighbouring frames, and one query per clip."""

from kineticlip_kernels.evl.ops import (
    FACES,
    MAX_HEADS,
    MAX_WIDTH,
    EvlImpl,
    absorb_query,
    attend_tokens,
    attend_tokens_reference,
    displacement,
    displacement_reference,
    neighbour_maps,
    neighbour_maps_reference,
    offsets,
    project_mixed,
)

__all__ = [
    "FACES",
    "MAX_HEADS",
    "MAX_WIDTH",
    "EvlImpl",
    "absorb_query",
    "attend_tokens",
    "attend_tokens_reference",
    "displacement",
    "displacement_reference",
    "neighbour_maps",
    "neighbour_maps_reference",
    "offsets",
    "project_mixed",
]
