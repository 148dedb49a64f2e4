"""From decoded frames to what the first GEMM reads: resize and crop, then u8 - 128 patches."""

from kineticlip_kernels.patches.ops import (
    ALIGNMENT,
    PRECISION,
    SUPPORT,
    Crop,
    Resample,
    cut_crops,
    cut_crops_reference,
    fold_patch_embedding,
    patch_columns,
    pixel_reasons,
    resample_table,
    rows_first,
    unfold_patches,
    unfold_patches_reference,
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
