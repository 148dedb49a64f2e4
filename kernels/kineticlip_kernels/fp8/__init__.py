"""Inference in 8 bits: e4m3 operands with a scale a row, written by the op that makes them."""

from kineticlip_kernels.fp8.format import (
    FP8,
    FP8_MAX,
    Scaled,
    value_scale,
)
from kineticlip_kernels.fp8.linear_ops import (
    LINEAR_FACES,
    LinearImpl,
    linear_fp8,
    scaled_mm_reasons,
)
from kineticlip_kernels.fp8.ops import (
    MAX_ROW,
    add_layer_norm_fp8,
    attention_fp8,
    bias_quick_gelu_fp8,
    e4m3_reasons,
    layer_norm_fp8,
    quantize_rows,
)
from kineticlip_kernels.fp8.reference import (
    add_layer_norm_fp8_reference,
    attention_fp8_reference,
    bias_quick_gelu_fp8_reference,
    layer_norm_fp8_reference,
    linear_fp8_reference,
    quantize_rows_reference,
)

__all__ = [
    "FP8",
    "FP8_MAX",
    "LINEAR_FACES",
    "MAX_ROW",
    "LinearImpl",
    "Scaled",
    "add_layer_norm_fp8",
    "add_layer_norm_fp8_reference",
    "attention_fp8",
    "attention_fp8_reference",
    "bias_quick_gelu_fp8",
    "bias_quick_gelu_fp8_reference",
    "e4m3_reasons",
    "layer_norm_fp8",
    "layer_norm_fp8_reference",
    "linear_fp8",
    "linear_fp8_reference",
    "quantize_rows",
    "quantize_rows_reference",
    "scaled_mm_reasons",
    "value_scale",
]
