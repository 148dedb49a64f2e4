"""CLIP's QuickGELU, x * sigmoid(1.702 x), fused with the bias or the whole linear layer before it.

Shape letters: D width in, F width out.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from kineticlip_kernels.dispatch import Impl, choose, triton_reasons


def bias_quick_gelu(x: Tensor, bias: Tensor, *, impl: Impl = "auto") -> Tensor:
    """quick_gelu(x + bias). x [..., F], bias [F] -> [..., F] of x's dtype."""
    if choose("bias_quick_gelu", impl, reasons(impl, x, bias)) == "reference":
        return bias_quick_gelu_reference(x, bias)
    from kineticlip_kernels.mlp_triton import bias_quick_gelu_triton

    return bias_quick_gelu_triton(x, bias)


def bias_quick_gelu_reference(x: Tensor, bias: Tensor) -> Tensor:
    """The specification of `bias_quick_gelu` in plain PyTorch."""
    return quick_gelu(x + bias.to(x.dtype))


def linear_quick_gelu(x: Tensor, weight: Tensor, bias: Tensor, *, impl: Impl = "auto") -> Tensor:
    """quick_gelu(x @ weight.T + bias). x [..., D], weight [F, D], bias [F] -> [..., F].

    All three have one dtype; products accumulate in fp32.
    """
    if choose("linear_quick_gelu", impl, linear_reasons(impl, x, weight, bias)) == "reference":
        return linear_quick_gelu_reference(x, weight, bias)
    from kineticlip_kernels.mlp_triton import linear_quick_gelu_triton

    return linear_quick_gelu_triton(x, weight, bias)


def linear_quick_gelu_reference(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """The specification of `linear_quick_gelu` in plain PyTorch."""
    return quick_gelu(F.linear(x, weight, bias))


def quick_gelu(x: Tensor) -> Tensor:
    """x * sigmoid(1.702 x), elementwise."""
    if torch.is_grad_enabled() and x.requires_grad:
        return x * torch.sigmoid(1.702 * x)
    return torch.mul(x, 1.702).sigmoid_().mul_(x)  # the same numbers in one temporary


def reasons(impl: str, x: Tensor, bias: Tensor) -> list[str]:
    """Why the Triton face of `bias_quick_gelu` cannot take these tensors."""
    return triton_reasons(impl, x=x, bias=bias)


def linear_reasons(impl: str, x: Tensor, weight: Tensor, bias: Tensor) -> list[str]:
    """Why the Triton face of `linear_quick_gelu` cannot take these tensors."""
    why_not = triton_reasons(impl, x=x, weight=weight, bias=bias)
    if not x.dtype == weight.dtype == bias.dtype:
        why_not.append("x, weight and bias differ in dtype")
    return why_not
