"""One small call of every op: what `kineticlip doctor` chooses, runs and compares on a machine."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from kineticlip_kernels import attention, evl, fp8, head, mlp, norm, patches, temporal


@dataclass(frozen=True)
class Example:
    """op(**inputs, impl=...) and reference(**inputs) give the same, up to the tolerance rule.

    reference is None for ops whose results are not one tensor of floats, or have fewer bits.
    """

    op: Callable[..., Any]
    inputs: Mapping[str, Any]
    reference: Callable[..., Any] | None = None


def examples(device: torch.device, dtype: torch.dtype) -> dict[str, Example]:
    """name -> a call of the op of that name; floats in dtype, from one fixed random draw."""
    generator = torch.Generator().manual_seed(0)

    def randn(*shape: int, scale: float = 1.0) -> Tensor:
        values = scale * torch.randn(shape, generator=generator)
        return values.to(device, dtype)

    pixels = torch.randint(0, 256, (2, 3, 32, 32), generator=generator, dtype=torch.uint8)
    pixels = pixels.to(device)
    x, weight, bias = randn(4, 33, 128), randn(128), randn(128)
    hidden, wide, wide_bias = randn(4, 33, 256), randn(256, 128, scale=0.1), randn(256)
    qkv, source = randn(4, 33, 3, 2, 64), (randn(2, 5, 2, 64), randn(2, 5, 2, 64))
    projection, projection_bias = randn(384, 128, scale=0.1), randn(384)
    normed, eight = {"weight": weight, "bias": bias}, fp8.quantize_rows_reference(wide)
    frames = pixels.permute(0, 2, 3, 1)  # [U, H, W, 3]
    maps = randn(2, 1, 2, 16, 16).softmax(dim=-1)
    return {
        "layer_norm": Example(norm.layer_norm, {"x": x, **normed}, norm.layer_norm_reference),
        "add_layer_norm": Example(
            norm.add_layer_norm,
            {"residual": x, "update": randn(4, 33, 128), **normed},
            norm.add_layer_norm_reference,
        ),
        "bias_quick_gelu": Example(
            mlp.bias_quick_gelu,
            {"x": hidden, "bias": wide_bias},
            mlp.bias_quick_gelu_reference,
        ),
        "linear_quick_gelu": Example(
            mlp.linear_quick_gelu,
            {"x": x, "weight": wide, "bias": wide_bias},
            mlp.linear_quick_gelu_reference,
        ),
        "attention": Example(attention.attention, {"qkv": qkv}, attention.attention_reference),
        "attention with sources": Example(
            attention.attention,
            {"qkv": qkv, "sources": [source]},
            attention.attention_reference,
        ),
        "class_attention": Example(
            attention.class_attention,
            {"x": x, "weight": projection, "bias": projection_bias, "heads": 2},
            attention.class_attention_reference,
        ),
        "quantize_rows": Example(fp8.quantize_rows, {"x": x}),
        "layer_norm_fp8": Example(fp8.layer_norm_fp8, {"x": x, **normed}),
        "add_layer_norm_fp8": Example(
            fp8.add_layer_norm_fp8, {"residual": x, "update": x, **normed}
        ),
        "bias_quick_gelu_fp8": Example(fp8.bias_quick_gelu_fp8, {"x": hidden, "bias": wide_bias}),
        "attention_fp8": Example(fp8.attention_fp8, {"qkv": qkv}),
        "linear_fp8": Example(
            fp8.linear_fp8, {"x": fp8.quantize_rows_reference(x), "weight": eight}
        ),
        "cut_crops": Example(
            patches.cut_crops,
            {"frames": frames, "crops": [(0, 0, False)], "width": 20, "height": 20, "side": 16},
        ),
        "unfold_patches": Example(
            patches.unfold_patches, {"pixels": pixels, "patch": 8, "dtype": dtype}
        ),
        "mean_normalize": Example(head.mean_normalize, {"x": x}, head.mean_normalize_reference),
        "class_cross_entropy": Example(
            head.class_cross_entropy,
            {
                "x": randn(6, 128, scale=0.1),
                "classes": randn(40, 128, scale=0.1),
                "labels": torch.arange(6, device=device),
                "scale": torch.tensor(10.0, device=device),
            },
            head.class_cross_entropy_reference,
        ),
        "top_classes": Example(
            head.top_classes, {"x": randn(6, 128), "classes": randn(40, 128), "k": 5}
        ),
        "mean_softmax": Example(
            head.mean_softmax, {"logits": randn(4, 3, 50)}, head.mean_softmax_reference
        ),
        "frame_attention": Example(
            temporal.frame_attention,
            {"qkv": randn(3, 8, 3, 2, 64)},
            temporal.frame_attention_reference,
        ),
        "neighbour_maps": Example(
            evl.neighbour_maps,
            {"q": randn(1, 3, 17, 2, 64), "k": randn(1, 3, 17, 2, 64)},
            evl.neighbour_maps_reference,
        ),
        "displacement": Example(
            evl.displacement,
            {
                "maps": maps,
                "previous_weight": randn(49, 128),
                "next_weight": randn(49, 128),
                "grid": (4, 4),
            },
            evl.displacement_reference,
        ),
        "attend_tokens": Example(
            evl.attend_tokens,
            {"query": randn(2, 4, 128, scale=0.1), "tokens": randn(2, 3, 17, 128)},
            evl.attend_tokens_reference,
        ),
    }
