"""LayerNorm over the last axis, alone and fused with the residual addition before it."""

from kineticlip_kernels.norm.ops import (
    MAX_WIDTH,
    add_layer_norm,
    check_parameters,
    layer_norm,
    reasons,
)
from kineticlip_kernels.norm.reference import (
    add_layer_norm_reference,
    layer_norm_reference,
)

__all__ = [
    "MAX_WIDTH",
    "add_layer_norm",
    "add_layer_norm_reference",
    "check_parameters",
    "layer_norm",
    "layer_norm_reference",
    "reasons",
]
