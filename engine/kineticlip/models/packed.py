"""A tower made ready for the steady state: packed and 8-bit layers, compiled, or as a CUDA graph.

Shape letters: M images, N tokens, R rows of a product, D width in, F width out, H heads,
K head width. Nothing here has a gradient.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kineticlip.config import EvalPrecision
from kineticlip.models.vision import VisionTransformer
from kineticlip.runtime.errors import UserError

QUICK = 1.702  # quick_gelu(x) = swish(1.702 x) / 1.702, and oneDNN fuses swish into the product
ROWS = 64  # quantised at a time, in the cache; bench/cpu_choices.py
MIDDLE = 128  # oneDNN multiplies unsigned activations: byte = round(x / scale) + 128

Fused = Literal["none", "swish", "gelu"]  # activations behind a product


class PackedLinear(nn.Module):
    """A linear layer in bf16 whose weight lies in oneDNN's own order. [..., D] -> [..., F].

    Packed once instead of in every call (bench/cpu_choices.py). The activation is part of the
    product.
    """

    def __init__(self, weight: Tensor, bias: Tensor, activation: Fused = "none") -> None:
        super().__init__()
        packed = torch.ops.mkldnn._reorder_linear_weight(weight.bfloat16().contiguous())
        self.packed: Tensor = packed  # opaque: neither a parameter nor a buffer
        self.bias = bias.bfloat16()
        self.activation = activation

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = torch.ops.mkldnn._linear_pointwise(
            x, self.packed, self.bias, self.activation, [], "none"
        )
        return out


class ByteLinear(nn.Module):
    """A linear layer on bytes: a scale for each row of x and of the weight. [..., D] -> [..., F].

    x bf16 is quantised on the way in (symmetric, by its row's largest magnitude / 127), products
    are exact in int32, and the sum leaves in bf16.
    """

    def __init__(self, weight: Tensor, bias: Tensor, activation: Fused = "none") -> None:
        super().__init__()
        scale = weight.float().abs().amax(dim=1).clamp_min(1e-12) / 127  # [F]
        values = (weight.float() / scale[:, None]).round().to(torch.int8)  # [F, D]
        packed = torch.ops.onednn.qlinear_prepack(values, None)
        self.packed: Tensor = packed
        # Plain attributes: a cast of the model to bf16 must leave the scales alone.
        self.scale, self.offset = scale, torch.zeros(len(weight), dtype=torch.int32)
        self.bias, self.activation = bias.bfloat16(), activation
        self.quantise: Callable[[Tensor], tuple[Tensor, Tensor]] = quantise_rows

    def forward(self, x: Tensor) -> Tensor:
        values, scale = self.quantise(x.flatten(0, -2))  # [R, D], [R, 1]
        out = self.product(values)  # [R, F]
        # In place: new memory of this size has to be mapped page by page.
        torch.addcmul(self.bias, out, scale.bfloat16(), out=out)
        if self.activation == "swish":
            out = F.silu(out, inplace=True)
        elif self.activation == "gelu":
            out = F.gelu(out)
        result: Tensor = out.unflatten(0, x.shape[:-1])
        return result

    def product(self, values: Tensor) -> Tensor:
        """Bytes uint8 [R, D] around 128 -> bf16 [R, F], without the scales of the rows."""
        out: Tensor = torch.ops.onednn.qlinear_pointwise(
            values, 1.0, MIDDLE, self.packed, self.scale, self.offset, None, 1.0, 0,
            torch.bfloat16, "none", [], "",
        )  # fmt: skip
        return out


def quantise_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    """x [R, D] -> bytes uint8 [R, D] around 128, and scales float32 [R, 1]."""
    values = torch.empty(x.shape, dtype=torch.uint8)
    scale = torch.empty(len(x), 1)
    for start in range(0, len(x), ROWS):
        rows = x[start : start + ROWS].float()
        part = rows.abs().amax(dim=-1, keepdim=True).clamp_min_(1e-12).div_(127)
        scale[start : start + ROWS] = part
        # By way of int32: the conversion of floats to bytes is not vectorised.
        values[start : start + ROWS] = rows.div_(part).round_().add_(MIDDLE).int()
    return values, scale


def fused_quantise(x: Tensor) -> tuple[Tensor, Tensor]:
    """quantise_rows as one loop, for a compiler."""
    rows = x.float()
    scale = rows.abs().amax(dim=-1, keepdim=True).clamp_min(1e-12) / 127
    return ((rows / scale).round() + MIDDLE).to(torch.uint8), scale


def compile_bytes(tower: nn.Module, *, backend: str = "inductor") -> None:
    """Has the quantisation before a tower's int8 products compiled when it first runs.

    One loop over a row instead of several (bench/cpu_choices.py).
    """
    quantise = torch.compile(fused_quantise, dynamic=True, backend=backend)
    for layer in tower.modules():
        if isinstance(layer, ByteLinear):
            layer.quantise = quantise


def pack_tower(tower: nn.Module, precision: EvalPrecision) -> int:
    """Puts packed (bf16) or byte (int8) layers in place of a transformer tower's large ones.

    To be called with float32 weights, which are rounded once. The factors of QuickGELU move into
    the weights around it. Gives the number of layers; 0 where there is nothing to pack: a ResNet,
    another precision, a CPU without bf16 instructions. Raises UserError where int8 cannot run.
    """
    if precision == "int8":
        if "onednn" not in torch.backends.quantized.supported_engines:
            raise UserError("eval.precision=int8 needs a PyTorch with oneDNN")
        if not isinstance(tower, VisionTransformer):
            raise UserError("eval.precision=int8 is for transformers, not for a ResNet")
    elif (
        precision != "bf16"
        or not isinstance(tower, VisionTransformer)
        or not torch.ops.mkldnn._is_mkldnn_bf16_supported()
    ):
        return 0
    kind = ByteLinear if precision == "int8" else PackedLinear
    for block in tower.blocks:
        attention, mlp = cast(Any, block.attn), cast(Any, block.mlp)
        out, first, second = attention.out_proj, mlp.c_fc, mlp.c_proj
        attention.packed = kind(attention.in_proj_weight, attention.in_proj_bias)
        attention.out_proj = kind(out.weight, out.bias)
        if first.activation == "quick_gelu":
            mlp.c_fc = kind(first.weight * QUICK, first.bias * QUICK, "swish")
            mlp.c_proj = kind(second.weight / QUICK, second.bias)
        else:
            mlp.c_fc = kind(first.weight, first.bias, "gelu")
            mlp.c_proj = kind(second.weight, second.bias)
    return 4 * len(tower.blocks)
