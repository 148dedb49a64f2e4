"""The linear layer on 8-bit operands. Letters: see ops.py."""

from __future__ import annotations

from typing import Literal, get_args

import torch
from torch import Tensor

from kineticlip_kernels.dispatch import (
    UnsupportedInput,
    check_operands,
    choose,
    dtype_name,
    interpreting,
    triton_installed,
)
from kineticlip_kernels.fp8.format import FP8, Scaled
from kineticlip_kernels.fp8.ops import e4m3_reasons
from kineticlip_kernels.fp8.reference import linear_fp8_reference

LinearImpl = Literal["auto", "reference", "triton", "scaled_mm"]
LINEAR_FACES = get_args(LinearImpl)


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
        from kineticlip_kernels.fp8.linear_triton import linear_fp8_triton

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
