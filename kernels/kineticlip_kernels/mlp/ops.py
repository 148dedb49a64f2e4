"""CLIP's QuickGELU, x * sigmoid(1.702 x), fused with the bias or the whole linear layer before it.

The formula is clip/model.py's QuickGELU; Hendrycks and Gimpel, "Gaussian Error Linear Units"
(2016), section 2, have it as an approximation of the GELU.

Not fused: its derivative with the product that makes its gradient in the layer behind. It would
save one write and one read of [R, F] a layer, 9.5 MB a frame of ViT-L/14-336 in 16 bits, but
needs one autograd node over two linear layers, and ZeRO-3 gathers the parameters of one layer at
a time.

Shape letters: R rows, D width in, F width out.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kineticlip_kernels.dispatch import (
    Impl,
    UnsupportedInput,
    check_operands,
    choose,
    dtype_name,
    matrix_reasons,
    triton_reasons,
)
from kineticlip_kernels.mlp.reference import (
    bias_quick_gelu_reference,
    linear_quick_gelu_reference,
)


def bias_quick_gelu(x: Tensor, bias: Tensor, *, impl: Impl = "auto") -> Tensor:
    """quick_gelu(x + bias). x [..., F], bias [F] -> [..., F] of x's dtype.

    bias may have another dtype than x. Differentiable in both. Raises UnsupportedInput for other
    shapes, for integers, for tensors on several devices, and where the face asked for cannot run.
    """
    check_bias("bias_quick_gelu", x, bias)
    if choose("bias_quick_gelu", impl, triton_reasons(impl, x=x, bias=bias)) == "reference":
        return bias_quick_gelu_reference(x, bias)
    from kineticlip_kernels.mlp.gelu_triton import bias_quick_gelu_triton

    return bias_quick_gelu_triton(x, bias)


def linear_quick_gelu(x: Tensor, weight: Tensor, bias: Tensor, *, impl: Impl = "auto") -> Tensor:
    """quick_gelu(x @ weight.T + bias). x [..., D], weight [F, D], bias [F] -> [..., F].

    All three have one dtype (autocast, which picks one itself, gets the reference); products
    accumulate in fp32. Differentiable in all three. Raises UnsupportedInput for other shapes and
    dtypes, for tensors on several devices, and where the face asked for cannot run.
    """
    check_operands("linear_quick_gelu", x=x, weight=weight, bias=bias)
    if weight.ndim != 2 or x.shape[-1:] != weight.shape[1:] or bias.shape != weight.shape[:1]:
        raise UnsupportedInput(
            f"linear_quick_gelu: x is {tuple(x.shape)}, weight {tuple(weight.shape)} and bias "
            f"{tuple(bias.shape)}; expected [..., D], [F, D] and [F]"
        )
    same = x.dtype == weight.dtype == bias.dtype
    if not same and not torch.is_autocast_enabled(x.device.type):
        dtypes = ", ".join(dtype_name(tensor.dtype) for tensor in (x, weight, bias))
        raise UnsupportedInput(
            f"linear_quick_gelu: x, weight and bias are {dtypes}; expected one dtype"
        )
    why_not = matrix_reasons(impl, x=x, weight=weight, bias=bias)
    if choose("linear_quick_gelu", impl, why_not) == "reference":
        return linear_quick_gelu_reference(x, weight, bias)
    from kineticlip_kernels.mlp.linear_triton import linear_quick_gelu_triton

    return linear_quick_gelu_triton(x, weight, bias)


def check_bias(op: str, x: Tensor, bias: Tensor) -> None:
    """Raises UnsupportedInput unless bias is [F] for x [..., F]: one of 1 would be broadcast by
    PyTorch, and read past its end by a kernel."""
    check_operands(op, x=x, bias=bias)
    if bias.ndim != 1 or bias.shape != x.shape[-1:]:
        raise UnsupportedInput(
            f"{op}: x is {tuple(x.shape)} and bias {tuple(bias.shape)}; expected [..., F] and [F]"
        )
