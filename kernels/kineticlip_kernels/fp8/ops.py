"""Inference in 8 bits: e4m3 operands with a scale a row, written by the op that makes them.

Shape letters: D width in, F width out, M images, N tokens, H heads, K head width.
Opt-in: products of 3-bit mantissas cost accuracy. Nothing here has a gradient. The format is that
of Micikevicius et al., "FP8 Formats for Deep Learning" (2022), section 3.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from kineticlip_kernels.attention import Source, attention_reasons, check_sources
from kineticlip_kernels.dispatch import (
    Impl,
    UnsupportedInput,
    check_operands,
    choose,
    triton_reasons,
)
from kineticlip_kernels.fp8.format import Scaled
from kineticlip_kernels.fp8.reference import (
    add_layer_norm_fp8_reference,
    attention_fp8_reference,
    bias_quick_gelu_fp8_reference,
    layer_norm_fp8_reference,
    quantize_rows_reference,
)
from kineticlip_kernels.mlp import check_bias
from kineticlip_kernels.norm import check_parameters, reasons

MAX_ROW = 16384  # of quantize_rows and bias_quick_gelu_fp8: a row is one block


def quantize_rows(x: Tensor, *, impl: Impl = "auto") -> Scaled:
    """Each row divided by its largest magnitude / 448, rounded to e4m3.

    x [..., D] of any floating dtype -> values [..., D], scale [...], 1 for a row of zeros. Raises
    UnsupportedInput for integers, where a gradient is wanted, and where the face asked for cannot
    run.
    """
    check_operands("quantize_rows", x=x)
    _refuse_gradients("quantize_rows", x)
    if choose("quantize_rows", impl, _row_reasons(impl, x=x)) == "reference":
        return quantize_rows_reference(x)
    from kineticlip_kernels.fp8.operands_triton import quantize_rows_triton

    return quantize_rows_triton(x)


def layer_norm_fp8(
    x: Tensor, weight: Tensor, bias: Tensor, eps: float = 1e-5, *, impl: Impl = "auto"
) -> Scaled:
    """quantize_rows(layer_norm(x)), the normed row never stored in between.

    x [..., D], weight and bias [D] of any floating dtypes -> values [..., D], scale [...]. Raises
    UnsupportedInput as `layer_norm` does, and where a gradient is wanted.
    """
    check_parameters("layer_norm_fp8", weight, bias, x=x)
    _refuse_gradients("layer_norm_fp8", x, weight, bias)
    why_not = reasons(impl, x, weight, bias) + e4m3_reasons(x)
    if choose("layer_norm_fp8", impl, why_not) == "reference":
        return layer_norm_fp8_reference(x, weight, bias, eps)
    from kineticlip_kernels.fp8.operands_triton import layer_norm_fp8_triton

    return layer_norm_fp8_triton(x, weight, bias, eps)


def add_layer_norm_fp8(
    residual: Tensor,
    update: Tensor,
    weight: Tensor,
    bias: Tensor,
    eps: float = 1e-5,
    *,
    impl: Impl = "auto",
) -> tuple[Tensor, Scaled]:
    """The residual stream after one more update, and its LayerNorm in 8 bits.

    residual and update [..., D] of one dtype, weight and bias [D] -> (residual + update [..., D]
    of that dtype, `layer_norm_fp8` of it). Raises UnsupportedInput as `layer_norm_fp8` does.
    """
    check_parameters("add_layer_norm_fp8", weight, bias, residual=residual, update=update)
    _refuse_gradients("add_layer_norm_fp8", residual, update, weight, bias)
    why_not = reasons(impl, residual, weight, bias) + e4m3_reasons(residual)
    if update.dtype != residual.dtype:
        why_not.append("residual and update differ in dtype")
    if choose("add_layer_norm_fp8", impl, why_not) == "reference":
        return add_layer_norm_fp8_reference(residual, update, weight, bias, eps)
    from kineticlip_kernels.fp8.operands_triton import add_layer_norm_fp8_triton

    return add_layer_norm_fp8_triton(residual, update, weight, bias, eps)


def bias_quick_gelu_fp8(x: Tensor, bias: Tensor, *, impl: Impl = "auto") -> Scaled:
    """quantize_rows(quick_gelu(x + bias)), the activation never stored in between.

    x [..., F], bias [F] of any floating dtypes -> values [..., F], scale [...]. Raises
    UnsupportedInput as `bias_quick_gelu` does, and where a gradient is wanted.
    """
    check_bias("bias_quick_gelu_fp8", x, bias)
    _refuse_gradients("bias_quick_gelu_fp8", x, bias)
    if choose("bias_quick_gelu_fp8", impl, _row_reasons(impl, x=x, bias=bias)) == "reference":
        return bias_quick_gelu_fp8_reference(x, bias)
    from kineticlip_kernels.fp8.operands_triton import bias_quick_gelu_fp8_triton

    return bias_quick_gelu_fp8_triton(x, bias)


def attention_fp8(qkv: Tensor, *, sources: Sequence[Source] = (), impl: Impl = "auto") -> Scaled:
    """`attention`, its output in 8 bits.

    qkv [M, N, 3, H, K] and sources as `attention` takes them -> values [M, N, H K], scale [M, N].
    Raises UnsupportedInput as `attention` does, and where a gradient is wanted.

    A head sees only its own columns of a row, so no program knows the row's largest magnitude.
    But every output is a mean of values with weights that sum to one: max|v| of the image and
    its sources bounds it, and one scale an image serves all its rows.
    """
    check_sources("attention_fp8", qkv, sources)
    _refuse_gradients("attention_fp8", qkv, *(t for source in sources for t in source))
    why_not = attention_reasons(impl, qkv, sources) + e4m3_reasons(qkv)
    if choose("attention_fp8", impl, why_not) == "reference":
        return attention_fp8_reference(qkv, sources=sources)
    from kineticlip_kernels.fp8.operands_triton import attention_fp8_triton

    return attention_fp8_triton(qkv, sources=sources)


def e4m3_reasons(x: Tensor) -> list[str]:
    """Why the GPU that x is on cannot make or multiply e4m3; empty for other devices."""
    if x.is_cuda and torch.cuda.get_device_capability(x.device) < (8, 9):
        return [f"{torch.cuda.get_device_name(x.device)} has no e4m3 arithmetic"]
    return []


def _row_reasons(impl: str, x: Tensor, **others: Tensor) -> list[str]:
    why_not = triton_reasons(impl, x=x, **others) + e4m3_reasons(x)
    if x.shape[-1] > MAX_ROW:
        why_not.append(f"rows of {x.shape[-1]} elements (at most {MAX_ROW})")
    return why_not


def _refuse_gradients(op: str, *tensors: Tensor) -> None:
    if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors):
        raise UnsupportedInput(f"{op}: 8 bits are for inference; wrap the call in torch.no_grad()")
