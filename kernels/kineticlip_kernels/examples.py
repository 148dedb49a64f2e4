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
    draw = _Draw(device, dtype)
    shared = _Shared(draw)
    return {
        **_norm(draw, shared),
        **_mlp(shared),
        **_attention(shared),
        **_fp8(shared),
        **_patches(draw, shared),
        **_head(draw, shared),
        **_temporal(draw),
        **_evl(draw, shared),
    }


class _Draw:
    """Normal floats of one dtype on one device, from one seed."""

    def __init__(self, device: torch.device, dtype: torch.dtype) -> None:
        self.device, self.dtype = device, dtype
        self.generator = torch.Generator().manual_seed(0)

    def __call__(self, *shape: int, scale: float = 1.0) -> Tensor:
        values = scale * torch.randn(shape, generator=self.generator)
        return values.to(self.device, self.dtype)

    def bytes(self, *shape: int) -> Tensor:
        values = torch.randint(0, 256, shape, generator=self.generator, dtype=torch.uint8)
        return values.to(self.device)


class _Shared:
    """What the examples of several ops have in common."""

    def __init__(self, draw: _Draw) -> None:
        self.pixels = draw.bytes(2, 3, 32, 32)
        self.x = draw(4, 33, 128)
        self.normed = {"weight": draw(128), "bias": draw(128)}
        self.hidden = draw(4, 33, 256)
        self.wide, self.wide_bias = draw(256, 128, scale=0.1), draw(256)
        self.qkv = draw(4, 33, 3, 2, 64)
        self.source = (draw(2, 5, 2, 64), draw(2, 5, 2, 64))
        self.projection = {"weight": draw(384, 128, scale=0.1), "bias": draw(384)}
        self.maps = draw(2, 1, 2, 16, 16).softmax(dim=-1)


def _norm(draw: _Draw, at: _Shared) -> dict[str, Example]:
    both = {"residual": at.x, "update": draw(4, 33, 128), **at.normed}
    return {
        "layer_norm": Example(norm.layer_norm, {"x": at.x, **at.normed}, norm.layer_norm_reference),
        "add_layer_norm": Example(norm.add_layer_norm, both, norm.add_layer_norm_reference),
    }


def _mlp(at: _Shared) -> dict[str, Example]:
    return {
        "bias_quick_gelu": Example(
            mlp.bias_quick_gelu,
            {"x": at.hidden, "bias": at.wide_bias},
            mlp.bias_quick_gelu_reference,
        ),
        "linear_quick_gelu": Example(
            mlp.linear_quick_gelu,
            {"x": at.x, "weight": at.wide, "bias": at.wide_bias},
            mlp.linear_quick_gelu_reference,
        ),
    }


def _attention(at: _Shared) -> dict[str, Example]:
    return {
        "attention": Example(attention.attention, {"qkv": at.qkv}, attention.attention_reference),
        "attention with sources": Example(
            attention.attention,
            {"qkv": at.qkv, "sources": [at.source]},
            attention.attention_reference,
        ),
        "class_attention": Example(
            attention.class_attention,
            {"x": at.x, **at.projection, "heads": 2},
            attention.class_attention_reference,
        ),
    }


def _fp8(at: _Shared) -> dict[str, Example]:
    x, weight = fp8.quantize_rows_reference(at.x), fp8.quantize_rows_reference(at.wide)
    return {
        "quantize_rows": Example(fp8.quantize_rows, {"x": at.x}),
        "layer_norm_fp8": Example(fp8.layer_norm_fp8, {"x": at.x, **at.normed}),
        "add_layer_norm_fp8": Example(
            fp8.add_layer_norm_fp8, {"residual": at.x, "update": at.x, **at.normed}
        ),
        "bias_quick_gelu_fp8": Example(
            fp8.bias_quick_gelu_fp8, {"x": at.hidden, "bias": at.wide_bias}
        ),
        "attention_fp8": Example(fp8.attention_fp8, {"qkv": at.qkv}),
        "linear_fp8": Example(fp8.linear_fp8, {"x": x, "weight": weight}),
    }


def _patches(draw: _Draw, at: _Shared) -> dict[str, Example]:
    frames = at.pixels.permute(0, 2, 3, 1)  # [U, H, W, 3]
    return {
        "cut_crops": Example(
            patches.cut_crops,
            {"frames": frames, "crops": [(0, 0, False)], "width": 20, "height": 20, "side": 16},
        ),
        "unfold_patches": Example(
            patches.unfold_patches, {"pixels": at.pixels, "patch": 8, "dtype": draw.dtype}
        ),
    }


def _head(draw: _Draw, at: _Shared) -> dict[str, Example]:
    return {
        "mean_normalize": Example(head.mean_normalize, {"x": at.x}, head.mean_normalize_reference),
        "class_cross_entropy": Example(
            head.class_cross_entropy,
            {
                "x": draw(6, 128, scale=0.1),
                "classes": draw(40, 128, scale=0.1),
                "labels": torch.arange(6, device=draw.device),
                "scale": torch.tensor(10.0, device=draw.device),
            },
            head.class_cross_entropy_reference,
        ),
        "top_classes": Example(
            head.top_classes, {"x": draw(6, 128), "classes": draw(40, 128), "k": 5}
        ),
        "mean_softmax": Example(
            head.mean_softmax, {"logits": draw(4, 3, 50)}, head.mean_softmax_reference
        ),
    }


def _temporal(draw: _Draw) -> dict[str, Example]:
    return {
        "frame_attention": Example(
            temporal.frame_attention,
            {"qkv": draw(3, 8, 3, 2, 64)},
            temporal.frame_attention_reference,
        ),
    }


def _evl(draw: _Draw, at: _Shared) -> dict[str, Example]:
    return {
        "neighbour_maps": Example(
            evl.neighbour_maps,
            {"q": draw(1, 3, 17, 2, 64), "k": draw(1, 3, 17, 2, 64)},
            evl.neighbour_maps_reference,
        ),
        "displacement": Example(
            evl.displacement,
            {
                "maps": at.maps,
                "previous_weight": draw(49, 128),
                "next_weight": draw(49, 128),
                "grid": (4, 4),
            },
            evl.displacement_reference,
        ),
        "attend_tokens": Example(
            evl.attend_tokens,
            {"query": draw(2, 4, 128, scale=0.1), "tokens": draw(2, 3, 17, 128)},
            evl.attend_tokens_reference,
        ),
    }
