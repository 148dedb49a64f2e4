"""Fused operations of KinetiCLIP: each one a reference, a Triton kernel and a dispatcher.

Every op is `kineticlip_kernels.<op>`, loaded when it is first asked for: importing this package
imports nothing else. The ops live in rooms, one package a family (`attention`, `evl`, `fp8`,
`head`, `mlp`, `norm`, `patches`, `temporal`), which hold their references too. One op has the
name of its room and is found there alone: `kineticlip_kernels.attention` is always the room,
`kineticlip_kernels.attention.attention` the op.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from kineticlip_kernels import attention, evl, fp8, head, mlp, norm, patches, temporal
    from kineticlip_kernels.attention import class_attention
    from kineticlip_kernels.dispatch import UnsupportedInput
    from kineticlip_kernels.evl import (
        absorb_query,
        attend_tokens,
        displacement,
        neighbour_maps,
        project_mixed,
    )
    from kineticlip_kernels.fp8 import (
        Scaled,
        add_layer_norm_fp8,
        attention_fp8,
        bias_quick_gelu_fp8,
        layer_norm_fp8,
        linear_fp8,
        quantize_rows,
    )
    from kineticlip_kernels.head import (
        class_cross_entropy,
        mean_normalize,
        mean_softmax,
        top_classes,
    )
    from kineticlip_kernels.mlp import bias_quick_gelu, linear_quick_gelu
    from kineticlip_kernels.norm import add_layer_norm, layer_norm
    from kineticlip_kernels.patches import cut_crops, fold_patch_embedding, unfold_patches
    from kineticlip_kernels.recompute import recomputed
    from kineticlip_kernels.temporal import frame_attention

__all__ = [
    "Scaled",
    "UnsupportedInput",
    "absorb_query",
    "add_layer_norm",
    "add_layer_norm_fp8",
    "attend_tokens",
    "attention",
    "attention_fp8",
    "bias_quick_gelu",
    "bias_quick_gelu_fp8",
    "class_attention",
    "class_cross_entropy",
    "cut_crops",
    "displacement",
    "evl",
    "fold_patch_embedding",
    "fp8",
    "frame_attention",
    "head",
    "layer_norm",
    "layer_norm_fp8",
    "linear_fp8",
    "linear_quick_gelu",
    "mean_normalize",
    "mean_softmax",
    "mlp",
    "neighbour_maps",
    "norm",
    "patches",
    "project_mixed",
    "quantize_rows",
    "recomputed",
    "temporal",
    "top_classes",
    "unfold_patches",
]

_HOMES = {
    "attention": "class_attention",
    "dispatch": "UnsupportedInput",
    "evl": "absorb_query attend_tokens displacement neighbour_maps project_mixed",
    "fp8": "Scaled add_layer_norm_fp8 attention_fp8 bias_quick_gelu_fp8 layer_norm_fp8 linear_fp8 "
    "quantize_rows",
    "head": "class_cross_entropy mean_normalize mean_softmax top_classes",
    "mlp": "bias_quick_gelu linear_quick_gelu",
    "norm": "add_layer_norm layer_norm",
    "patches": "cut_crops fold_patch_embedding unfold_patches",
    "recompute": "recomputed",
    "temporal": "frame_attention",
}
_HOME_OF = {name: home for home, names in _HOMES.items() for name in names.split()}

if not TYPE_CHECKING:  # to a type checker the names above are all there is

    def __getattr__(name: str) -> object:
        if name in _HOMES:
            return importlib.import_module(f"{__name__}.{name}")
        if name in _HOME_OF:
            return getattr(importlib.import_module(f"{__name__}.{_HOME_OF[name]}"), name)
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
