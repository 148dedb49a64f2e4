"""The operations of EVL's decoder: motion between neighbouring frames, and one query per clip.

Lin et al., "Frozen CLIP Models are Efficient Video Learners" (ECCV 2022), sections 3.2 and 3.3.
Each op has one more face, "lean": plain PyTorch with hand-written gradients, several times faster
and smaller than the reference; "auto" takes it wherever Triton cannot run.
"""

from kineticlip_kernels.evl.faces import (
    FACES,
    EvlImpl,
)
from kineticlip_kernels.evl.ops import (
    displacement,
    neighbour_maps,
)
from kineticlip_kernels.evl.reference import (
    attend_tokens_reference,
    displacement_reference,
    neighbour_maps_reference,
    offsets,
)
from kineticlip_kernels.evl.tokens_ops import (
    MAX_HEADS,
    MAX_WIDTH,
    absorb_query,
    attend_tokens,
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
