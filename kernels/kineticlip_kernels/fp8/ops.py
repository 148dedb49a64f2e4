"""Inference in 8 bits: e4m3 operands with a scale a row, written by the op that makes them.

Shape letters: D width in, F width out, M images, N tokens, H heads, K head width.
Opt-in: products of 3-bit mantissas cost accuracy. Nothing here has a gradient. The format is that
of Micikevicius et al., "FP8 Formats for Deep Learning" (2022), section 3.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor

from kineticlip_kernels.attention import (
    Source,
    attention_reasons,
    attention_reference,
    check_sources,
)
from kineticlip_kernels.dispatch import (
    Impl,
    UnsupportedInput,
    check_operands,
    choose,
    dtype_name,
    interpreting,
    triton_installed,
    triton_reasons,
)
from kineticlip_kernels.mlp import bias_quick_gelu_reference, check_bias
from kineticlip_kernels.norm import check_parameters, layer_norm_reference, reasons

FP8 = torch.float8_e4m3fn
FP8_MAX = 448.0  # the largest e4m3 value
MAX_ROW = 16384  # of quantize_rows and bias_quick_gelu_fp8: a row is one block

LinearImpl = Literal["auto", "reference", "triton", "scaled_mm"]
LINEAR_FACES = get_args(LinearImpl)


@dataclass(frozen=True)
class Scaled:
    """A tensor in 8 bits: values [..., D] e4m3 times scale [...] fp32, one a row."""

    values: Tensor
    scale: Tensor

    def dequantized(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """[..., D] in dtype."""
        return self.values.to(dtype) * self.scale.to(dtype).unsqueeze(-1)


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


def quantize_rows_reference(x: Tensor) -> Scaled:
    """The specification of `quantize_rows` in plain PyTorch."""
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    scale = wide.abs().amax(dim=-1) / FP8_MAX
    return _divided(wide, torch.where(scale > 0, scale, torch.ones_like(scale)))


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


def layer_norm_fp8_reference(x: Tensor, weight: Tensor, bias: Tensor, eps: float = 1e-5) -> Scaled:
    """The specification of `layer_norm_fp8` in plain PyTorch; nothing is rounded before the end."""
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    normed = layer_norm_reference(wide, weight.to(wide.dtype), bias.to(wide.dtype), eps)
    return quantize_rows_reference(normed)


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


def add_layer_norm_fp8_reference(
    residual: Tensor, update: Tensor, weight: Tensor, bias: Tensor, eps: float = 1e-5
) -> tuple[Tensor, Scaled]:
    """The specification of `add_layer_norm_fp8` in plain PyTorch."""
    total = residual + update
    return total, layer_norm_fp8_reference(total, weight, bias, eps)


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


def bias_quick_gelu_fp8_reference(x: Tensor, bias: Tensor) -> Scaled:
    """The specification of `bias_quick_gelu_fp8` in plain PyTorch."""
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    return quantize_rows_reference(bias_quick_gelu_reference(wide, bias))


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


def attention_fp8_reference(qkv: Tensor, *, sources: Sequence[Source] = ()) -> Scaled:
    """The specification of `attention_fp8` in plain PyTorch."""
    scale = value_scale(qkv, sources)  # [M]
    out = attention_reference(qkv, sources=sources).flatten(2)  # [M, N, H K]
    return _divided(out.to(scale.dtype), scale.unsqueeze(1).expand(out.shape[:2]))


def value_scale(qkv: Tensor, sources: Sequence[Source] = ()) -> Tensor:
    """max|v| / 448 of each image and its sources, 1 where all values are zero. -> [M]."""
    largest = _largest(qkv[:, :, 2])
    for _, v in sources:
        shared = _largest(v).repeat_interleave(len(qkv) // len(v))
        largest = torch.maximum(largest, shared)
    scale = largest.to(torch.promote_types(qkv.dtype, torch.float32)) / FP8_MAX
    return torch.where(scale > 0, scale, torch.ones_like(scale))


def _largest(v: Tensor) -> Tensor:
    """max|v| of each row of [M', n, H, K]; 0 where a row has no tokens."""
    if v[0:1].numel() == 0:
        return v.new_zeros(len(v))
    largest: Tensor = torch.linalg.vector_norm(v, float("inf"), dim=(1, 2, 3))
    return largest


def linear_fp8(
    x: Scaled,
    weight: Scaled,
    bias: Tensor | None = None,
    *,
    dtype: torch.dtype = torch.bfloat16,
    impl: LinearImpl = "auto",
) -> Tensor:
    """x @ weight.T + bias out of 8-bit operands. x [..., D], weight [F, D] -> [..., F] of dtype.

    The scales are applied to the sums, which are fp32. Hopper's tensor cores keep fewer bits of a
    running sum of e4m3 products: there the Triton face adds it to one in fp32 every 128 products.
    scaled_mm is PyTorch's own kernel (cuBLAS, or CUTLASS before CUDA 12.9 and on Blackwell), with
    use_fast_accum=False, which promises the same. It is the choice of "auto" on a GPU where it
    can run, and triton the next: row-wise scales need an output in 16 bits and a bias of its
    dtype. Raises UnsupportedInput for other shapes, and where the face asked for cannot run.
    """
    _check_linear(x, weight, bias)
    why_not = _linear_reasons(impl, x)
    if impl == "triton":
        face = choose("linear_fp8", impl, why_not, known=LINEAR_FACES)
    else:
        slow = "reference" if why_not or not triton_installed() else "triton"
        why_not += scaled_mm_reasons(weight, bias, dtype)
        known = LINEAR_FACES
        face = choose("linear_fp8", impl, why_not, fast="scaled_mm", slow=slow, known=known)
    if face == "reference":
        return linear_fp8_reference(x, weight, bias, dtype=dtype)
    if face == "triton":
        from kineticlip_kernels.fp8.operands_triton import linear_fp8_triton

        return linear_fp8_triton(x, weight, bias, dtype=dtype)
    flat = x.values.reshape(-1, x.values.shape[-1])
    out = torch._scaled_mm(
        flat,
        weight.values.t(),
        scale_a=x.scale.reshape(-1, 1).contiguous(),
        scale_b=weight.scale.reshape(1, -1),
        bias=bias,
        out_dtype=dtype,
        use_fast_accum=False,
    )
    return out.view(*x.values.shape[:-1], len(weight.values))


def linear_fp8_reference(
    x: Scaled, weight: Scaled, bias: Tensor | None = None, *, dtype: torch.dtype = torch.bfloat16
) -> Tensor:
    """The specification of `linear_fp8` in plain PyTorch."""
    wide = torch.promote_types(x.scale.dtype, torch.float32)
    product = F.linear(x.values.to(wide), weight.values.to(wide))
    out = product * x.scale.to(wide).unsqueeze(-1) * weight.scale.to(wide)
    return (out if bias is None else out + bias.to(wide)).to(dtype)


def e4m3_reasons(x: Tensor) -> list[str]:
    """Why the GPU that x is on cannot make or multiply e4m3; empty for other devices."""
    if x.is_cuda and torch.cuda.get_device_capability(x.device) < (8, 9):
        return [f"{torch.cuda.get_device_name(x.device)} has no e4m3 arithmetic"]
    return []


def scaled_mm_reasons(weight: Scaled, bias: Tensor | None, dtype: torch.dtype) -> list[str]:
    """What PyTorch's own product with row-wise scales does not take, of what `linear_fp8` does."""
    why_not = []
    if any(size % 16 for size in weight.values.shape):
        why_not.append(f"weight is {tuple(weight.values.shape)} (multiples of 16 only)")
    if dtype not in (torch.bfloat16, torch.float16):
        why_not.append(f"the output is to be {dtype_name(dtype)} (supported: fp16, bf16)")
    if bias is not None and bias.dtype != dtype:
        why_not.append(f"bias is {dtype_name(bias.dtype)} and the output {dtype_name(dtype)}")
    return why_not


def _row_reasons(impl: str, x: Tensor, **others: Tensor) -> list[str]:
    why_not = triton_reasons(impl, x=x, **others) + e4m3_reasons(x)
    if x.shape[-1] > MAX_ROW:
        why_not.append(f"rows of {x.shape[-1]} elements (at most {MAX_ROW})")
    return why_not


def _linear_reasons(impl: LinearImpl, x: Scaled) -> list[str]:
    why_not = e4m3_reasons(x.values)
    if impl == "triton" and not triton_installed():
        why_not.append("triton is not installed")
    if not x.values.is_cuda and not (impl == "triton" and interpreting()):
        why_not.append(f"x is on {x.values.device.type}")
    return why_not


def _check_linear(x: Scaled, weight: Scaled, bias: Tensor | None) -> None:
    operands: dict[str, Tensor | None] = {"bias": bias}
    for name, operand in {"x": x, "weight": weight}.items():
        if not isinstance(operand, Scaled):
            raise UnsupportedInput(
                f"linear_fp8: {name} is a {type(operand).__name__}, expected a Scaled, "
                "which quantize_rows makes"
            )
        operands |= {f"{name}.values": operand.values, f"{name}.scale": operand.scale}
    check_operands("linear_fp8", **operands)
    for name, operand in {"x": x, "weight": weight}.items():
        shape, scale = operand.values.shape, operand.scale.shape
        if operand.values.dtype != FP8 or scale != shape[:-1]:
            raise UnsupportedInput(
                f"linear_fp8: {name} is {tuple(shape)} {dtype_name(operand.values.dtype)} with "
                f"scale {tuple(scale)}; expected fp8 with a scale a row"
            )
    wide = weight.values.shape
    if len(wide) != 2 or x.values.shape[-1:] != wide[1:]:
        raise UnsupportedInput(
            f"linear_fp8: x is {tuple(x.values.shape)} and weight {tuple(wide)}; "
            "expected [..., D] and [F, D]"
        )
    if bias is not None and bias.shape != wide[:1]:
        raise UnsupportedInput(f"linear_fp8: bias is {tuple(bias.shape)}, expected [{wide[0]}]")


def _divided(wide: Tensor, scale: Tensor) -> Scaled:
    """wide / scale in e4m3; clamped, because PyTorch's cast makes NaN of what is too large."""
    return Scaled((wide / scale.unsqueeze(-1)).clamp(-FP8_MAX, FP8_MAX).to(FP8), scale)


def _refuse_gradients(op: str, *tensors: Tensor) -> None:
    if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors):
        raise UnsupportedInput(f"{op}: 8 bits are for inference; wrap the call in torch.no_grad()")
