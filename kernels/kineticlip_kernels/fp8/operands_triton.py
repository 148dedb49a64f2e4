"""8-bit operands in Triton: what makes them writes them.

Shape letters: R rows (all leading axes), D width.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls, allow-untyped-decorators

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from kineticlip_kernels import launch
from kineticlip_kernels.arithmetic_triton import row_scale
from kineticlip_kernels.attention.forward_triton import launch_forward as launch_attention
from kineticlip_kernels.fp8.format import FP8, Scaled, value_scale
from kineticlip_kernels.launch import Operator, power_of_two
from kineticlip_kernels.mlp.gelu_triton import gate
from kineticlip_kernels.norm.forward_triton import launch_forward as launch_norm
from kineticlip_kernels.tuning import blocks


@triton.jit
def _rows(
    x_ptr,  # [R, D], rows x_stride apart
    bias_ptr,  # [D]: the row becomes quick_gelu(x + bias) first; or None
    values_ptr,  # e4m3 [R, D]
    scale_ptr,  # fp32 [R]
    x_stride,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK_D)
    inside = column < D
    x = tl.load(x_ptr + row * x_stride + column, mask=inside, other=0.0).to(tl.float32)
    if bias_ptr is not None:
        x += tl.load(bias_ptr + column, mask=inside, other=0.0).to(tl.float32)
        x = tl.where(inside, x * gate(x, True), 0.0)
    scale = row_scale(tl.max(tl.abs(x), axis=0))
    tl.store(values_ptr + row * D + column, (x / scale).to(tl.float8e4nv), mask=inside)
    tl.store(scale_ptr + row, scale)


def quantize_rows_triton(x: Tensor) -> Scaled:
    """The Triton face of `quantize_rows`."""
    return Scaled(*_quantize_rows(x))


def bias_quick_gelu_fp8_triton(x: Tensor, bias: Tensor) -> Scaled:
    """The Triton face of `bias_quick_gelu_fp8`."""
    return Scaled(*_bias_quick_gelu(x, bias))


def layer_norm_fp8_triton(x: Tensor, weight: Tensor, bias: Tensor, eps: float = 1e-5) -> Scaled:
    """The Triton face of `layer_norm_fp8`."""
    return Scaled(*_layer_norm(x, weight, bias, eps))


def add_layer_norm_fp8_triton(
    residual: Tensor, update: Tensor, weight: Tensor, bias: Tensor, eps: float = 1e-5
) -> tuple[Tensor, Scaled]:
    """The Triton face of `add_layer_norm_fp8`."""
    total, values, scale = _add_layer_norm(residual, update, weight, bias, eps)
    return total, Scaled(values, scale)


def attention_fp8_triton(qkv: Tensor, *, sources: Sequence[tuple[Tensor, Tensor]] = ()) -> Scaled:
    """The Triton face of `attention_fp8`."""
    scale = value_scale(qkv, sources)  # [M]
    out: Tensor = _attention(qkv, [k for k, _ in sources], [v for _, v in sources], scale)
    values = out.flatten(2)  # [M, N, H K]
    return Scaled(values, scale.unsqueeze(1).expand(values.shape[:2]))


def _launch_rows(x: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor]:
    flat = launch.rows_of(x)
    rows, width = flat.shape
    values, scale = _outputs(x)
    if rows:
        _rows[(rows,)](
            flat,
            None if bias is None else bias.contiguous(),
            values,
            scale,
            flat.stride(0),
            D=width,
            BLOCK_D=power_of_two(width),
            **blocks("quantize_rows", x.device, width=width),
        )
    return values, scale


def _outputs(x: Tensor) -> tuple[Tensor, Tensor]:
    values = launch.empty(*x.shape, dtype=FP8, device=x.device)
    return values, launch.empty(*x.shape[:-1], dtype=torch.float32, device=x.device)


def _fake(x: Tensor, *rest: object) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape, dtype=FP8), x.new_empty(x.shape[:-1], dtype=torch.float32)


def _launch_bias_quick_gelu(x: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    return _launch_rows(x, bias)


def _launch_quantize(x: Tensor) -> tuple[Tensor, Tensor]:
    return _launch_rows(x, None)


def _launch_layer_norm(
    x: Tensor, weight: Tensor, bias: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    values, scale = _outputs(x)
    launch_norm(x, None, weight, bias, eps, y=values, scale=scale)
    return values, scale


def _launch_add_layer_norm(
    residual: Tensor, update: Tensor, weight: Tensor, bias: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    values, scale = _outputs(residual)
    total, *_ = launch_norm(residual, update, weight, bias, eps, y=values, scale=scale)
    assert total is not None
    return total, values, scale


def _launch_attention(
    qkv: Tensor, keys: list[Tensor], values: list[Tensor], scale: Tensor
) -> Tensor:
    images, tokens, _, heads, width = qkv.shape
    out = launch.empty(images, tokens, heads, width, dtype=FP8, device=qkv.device)
    flat = [tensor for pair in zip(keys, values, strict=True) for tensor in pair]
    launch_attention(qkv, flat, out, scale=scale)
    return out


_quantize_rows = Operator("quantize_rows", _launch_quantize, fake=_fake)
_bias_quick_gelu = Operator("bias_quick_gelu_fp8", _launch_bias_quick_gelu, fake=_fake)
_layer_norm = Operator("layer_norm_fp8", _launch_layer_norm, fake=_fake)
_add_layer_norm = Operator(
    "add_layer_norm_fp8",
    _launch_add_layer_norm,
    fake=lambda residual, *rest: (residual.new_empty(residual.shape), *_fake(residual)),
)
_attention = Operator(
    "attention_fp8",
    _launch_attention,
    fake=lambda qkv, keys, values, scale: qkv[:, :, 0].new_empty(qkv[:, :, 0].shape, dtype=FP8),
)
