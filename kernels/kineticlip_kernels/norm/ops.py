"""LayerNorm over the last axis, alone and fused with the residual addition before it.

Shape letters: D width. Statistics are fp32 (fp64 for fp64) whatever the dtype of the tensors.
"""

from __future__ import annotations

from torch import Tensor

from kineticlip_kernels.dispatch import (
    Impl,
    UnsupportedInput,
    check_operands,
    choose,
    triton_reasons,
)
from kineticlip_kernels.norm.reference import add_layer_norm_reference, layer_norm_reference
from kineticlip_kernels.recompute import remember

# A row is one block, held in registers: a block of 16384 spills in the backward, at 12288 wide
# 64 bytes on sm_100 and 40 on sm_90.
MAX_WIDTH = 8192


def layer_norm(
    x: Tensor, weight: Tensor, bias: Tensor, eps: float = 1e-5, *, impl: Impl = "auto"
) -> Tensor:
    """(x - mean) / sqrt(var + eps) * weight + bias. x [..., D], weight and bias [D] -> [..., D].

    Ba, Kiros and Hinton, "Layer Normalization" (2016), equation 4. weight and bias may have more
    bits than x (fp32 parameters under bf16 activations); the result has the dtype of x.
    Differentiable in x, weight and bias. Raises UnsupportedInput for other shapes, for integers,
    for tensors on several devices, and where the face asked for cannot run.
    """
    check_parameters("layer_norm", weight, bias, x=x)
    face = choose("layer_norm", impl, reasons(impl, x, weight, bias))
    function = layer_norm_reference if face == "reference" else _layer_norm_triton
    return remember(function(x, weight, bias, eps), function, x, weight, bias, eps)


def add_layer_norm(
    residual: Tensor,
    update: Tensor,
    weight: Tensor,
    bias: Tensor,
    eps: float = 1e-5,
    *,
    impl: Impl = "auto",
) -> tuple[Tensor, Tensor]:
    """The residual stream after one more update, and its LayerNorm.

    residual and update [..., D] of one dtype -> (residual + update, layer_norm of it), both
    [..., D] of that dtype. The statistics are those of the sum as it is stored. weight and bias:
    see `layer_norm`. Differentiable in all four. Raises UnsupportedInput as `layer_norm` does.
    """
    check_parameters("add_layer_norm", weight, bias, residual=residual, update=update)
    why_not = reasons(impl, residual, weight, bias)
    if update.dtype != residual.dtype:
        why_not.append("residual and update differ in dtype")
    if choose("add_layer_norm", impl, why_not) == "reference":
        total, y = add_layer_norm_reference(residual, update, weight, bias, eps)
        return total, remember(y, layer_norm_reference, total, weight, bias, eps)
    from kineticlip_kernels.norm.norm_triton import add_layer_norm_triton

    total, y = add_layer_norm_triton(residual, update, weight, bias, eps)
    return total, remember(y, _layer_norm_triton, total, weight, bias, eps)


def _layer_norm_triton(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    from kineticlip_kernels.norm.norm_triton import layer_norm_triton

    return layer_norm_triton(x, weight, bias, eps)


def check_parameters(op: str, weight: Tensor, bias: Tensor, **rows: Tensor) -> None:
    """Raises UnsupportedInput unless weight and bias are [D], and all rows one [..., D].

    The kernels take D from the rows: shorter parameters would be read past their end.
    """
    check_operands(op, **rows, weight=weight, bias=bias)
    (name, x), *others = rows.items()
    width = weight.shape
    if width != x.shape[-1:] or width != bias.shape or not width:
        raise UnsupportedInput(
            f"{op}: {name} is {tuple(x.shape)}, weight {tuple(width)} and bias "
            f"{tuple(bias.shape)}; expected [..., D] and two [D]"
        )
    for other, tensor in others:
        if tensor.shape != x.shape:
            raise UnsupportedInput(
                f"{op}: {name} is {tuple(x.shape)} and {other} {tuple(tensor.shape)}; "
                "expected one shape"
            )


def reasons(impl: str, x: Tensor, weight: Tensor, bias: Tensor) -> list[str]:
    """Why the Triton face cannot take these tensors."""
    why_not = triton_reasons(impl, x=x, weight=weight, bias=bias)
    if x.shape[-1] > MAX_WIDTH:
        why_not.append(f"rows of {x.shape[-1]} elements (at most {MAX_WIDTH})")
    return why_not
