"""From frame or view embeddings to scores: averages, cosine logits, cross-entropy, top classes."""

from kineticlip_kernels.head.ops import (
    MAX_CLASSES,
    MAX_TOP,
    MAX_WIDTH,
    class_cross_entropy,
    mean_normalize,
    mean_softmax,
    top_classes,
)
from kineticlip_kernels.head.reference import (
    EPS,
    IGNORED,
    class_cross_entropy_reference,
    mean_normalize_reference,
    mean_softmax_reference,
    top_classes_reference,
)

__all__ = [
    "EPS",
    "IGNORED",
    "MAX_CLASSES",
    "MAX_TOP",
    "MAX_WIDTH",
    "class_cross_entropy",
    "class_cross_entropy_reference",
    "mean_normalize",
    "mean_normalize_reference",
    "mean_softmax",
    "mean_softmax_reference",
    "top_classes",
    "top_classes_reference",
]
