"""From decoded frames to what the first GEMM reads: resize and crop, then u8 - 128 patches."""

from kineticlip_kernels.patches.embedding import (
    ALIGNMENT,
    fold_patch_embedding,
    patch_columns,
)
from kineticlip_kernels.patches.ops import (
    cut_crops,
    pixel_reasons,
    unfold_patches,
)
from kineticlip_kernels.patches.reference import (
    cut_crops_reference,
    unfold_patches_reference,
)
from kineticlip_kernels.patches.resample import (
    PRECISION,
    SUPPORT,
    Crop,
    Resample,
    resample_table,
    rows_first,
)

__all__ = [
    "ALIGNMENT",
    "PRECISION",
    "SUPPORT",
    "Crop",
    "Resample",
    "cut_crops",
    "cut_crops_reference",
    "fold_patch_embedding",
    "patch_columns",
    "pixel_reasons",
    "resample_table",
    "rows_first",
    "unfold_patches",
    "unfold_patches_reference",
]
