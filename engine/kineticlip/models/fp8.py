"""A vision tower on 8-bit products: e4m3 operands, written by the ops that make them.

Shape letters: M images, N tokens, D width, H heads, K head width. For inference on GPUs with e4m3
arithmetic (compute capability 8.9 and up); elsewhere the same numbers come from plain PyTorch,
slowly. The residual stream, the scores of the attention and the last block's class token stay
in 16 bits.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kineticlip.models.transformer import Block, KeysValues, Source
from kineticlip.models.vision import VisionTransformer
from kineticlip.runtime.errors import UserError
from kineticlip_kernels.dispatch import Impl
from kineticlip_kernels.fp8 import (
    Scaled,
    add_layer_norm_fp8,
    attention_fp8,
    bias_quick_gelu_fp8,
    layer_norm_fp8,
    linear_fp8,
    quantize_rows,
)


def quantize_tower(tower: nn.Module, *, kernels: Impl = "auto") -> int:
    """Puts 8-bit blocks in place of a tower's; gives the number of layers in 8 bits.

    To be called on the tower's device, with its most exact weights, which are rounded once.
    Raises UserError for a ResNet and for blocks with modules of their own inside.
    """
    if not isinstance(tower, VisionTransformer):
        raise UserError("eval.precision=fp8 is for transformers, not for a ResNet")
    blocks = tower.transformer.resblocks
    for index, block in enumerate(blocks):
        blocks[index] = EightBitBlock(cast(Block, block), kernels=kernels)
    return 4 * len(blocks)


class EightBitBlock(nn.Module):
    """A `Block` whose four products multiply e4m3; its parameters keep their names."""

    def __init__(self, block: Block, *, kernels: Impl = "auto") -> None:
        super().__init__()
        if block.control_point is not None:
            raise UserError("eval.precision=fp8: not for towers with temporal modules; use bf16")
        self.ln_1, self.attn, self.ln_2, self.mlp = block.ln_1, block.attn, block.ln_2, block.mlp
        self.control_point, self.kernels = None, kernels
        self._plain = (block,)  # in a tuple: its modules are registered above
        # Plain attributes: a cast of the tower to bf16 must leave them alone.
        self._qkv = quantize_rows(block.attn.in_proj_weight.detach())
        self._out = quantize_rows(block.attn.out_proj.weight.detach())
        self._first = quantize_rows(block.mlp.c_fc.weight.detach())
        self._second = quantize_rows(block.mlp.c_proj.weight.detach())

    @torch.no_grad()
    def forward(
        self,
        x: Tensor,
        update: Tensor | None = None,
        *,
        sources: Callable[[Tensor], Sequence[Source]] | None = None,
        class_only: bool = False,
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """See `Block`; with class_only, one token a frame, the block itself in 16 bits."""
        if class_only:
            result: tuple[Tensor, Tensor, Tensor | None] = self._plain[0](
                x, update, sources=sources, class_only=True
            )
            return result
        x, y = self._normed(x, update, self.ln_1)
        qkv = self._linear(y, self._qkv, self.attn.in_proj_bias, x.dtype)
        qkv = qkv.unflatten(-1, (3, self.attn.heads, -1))  # [M, N, 3, H, K]
        extra = sources(x) if sources is not None else ()
        pairs = [self._keys_values(source, qkv) for source in extra]
        mixed = attention_fp8(qkv, sources=pairs, impl=self.kernels)  # [M, N, D]
        out = self.attn.out_proj
        x, y = self._normed(x, self._linear(mixed, self._out, out.bias, x.dtype), self.ln_2)
        hidden = self._activated(y, x.dtype)
        second = self.mlp.c_proj
        return x, self._linear(hidden, self._second, second.bias, x.dtype), qkv

    def _linear(self, x: Scaled, weight: Scaled, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
        return linear_fp8(x, weight, bias, dtype=dtype, impl=self.kernels)

    def _normed(self, x: Tensor, update: Tensor | None, norm: Any) -> tuple[Tensor, Scaled]:
        if update is None:
            return x, layer_norm_fp8(x, norm.weight, norm.bias, norm.eps, impl=self.kernels)
        weight, bias = norm.weight, norm.bias
        return add_layer_norm_fp8(x, update, weight, bias, norm.eps, impl=self.kernels)

    def _activated(self, y: Scaled, dtype: torch.dtype) -> Scaled:
        first = self.mlp.c_fc
        if first.activation == "gelu":
            hidden = F.gelu(self._linear(y, self._first, first.bias, dtype))
            return quantize_rows(hidden, impl=self.kernels)
        hidden = self._linear(y, self._first, None, dtype)
        return bias_quick_gelu_fp8(hidden, first.bias, impl=self.kernels)

    def _keys_values(self, source: Source, qkv: Tensor) -> KeysValues:
        """Ready keys and values of a source [M', n, H, K]; tokens are projected in 8 bits."""
        if not isinstance(source, Tensor):
            return source(qkv[:, :, 1], qkv[:, :, 2])
        y, width = self._normed(source, None, self.ln_1)[1], source.shape[-1]
        weight = Scaled(self._qkv.values[width:], self._qkv.scale[width:])
        kv = self._linear(y, weight, self.attn.in_proj_bias[width:], qkv.dtype)
        k, v = kv.unflatten(-1, (2, self.attn.heads, -1)).unbind(2)
        return k, v
