"""CLIP's QuickGELU, x * sigmoid(1.702 x), fused with the bias or the linear layer before it."""

from kineticlip_kernels.mlp.ops import (
    bias_quick_gelu,
    check_bias,
    linear_quick_gelu,
)
from kineticlip_kernels.mlp.reference import (
    bias_quick_gelu_reference,
    linear_quick_gelu_reference,
    quick_gelu,
)

__all__ = [
    "bias_quick_gelu",
    "bias_quick_gelu_reference",
    "check_bias",
    "linear_quick_gelu",
    "linear_quick_gelu_reference",
    "quick_gelu",
]
