"""EVL's decoder: one query per clip goes through the tokens of a trunk's last blocks.

Shape letters: B clips, T frames, N = 1 + P tokens (class token first), C trunk width, H and
K = C / H heads of the trunk, D width of the query's attention, Q its heads, O offsets.
Parameter names are the official ones.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn

from kineticlip.config import EvlConfig
from kineticlip.models.architectures import VisionShape
from kineticlip.models.transformer import LayerNorm, LinearActivation, Tap
from kineticlip.runtime.errors import UserError
from kineticlip_kernels.dispatch import Impl
from kineticlip_kernels.evl import (
    absorb_query,
    attend_tokens,
    displacement,
    neighbour_maps,
    project_mixed,
)


@dataclass(frozen=True, kw_only=True)
class DecoderShape:
    """Sizes of a decoder on a trunk; which temporal terms it adds to the tokens."""

    trunk: VisionShape
    frames: int
    layers: int
    qkv_dim: int
    heads: int
    mlp_width: int
    drop_out: float
    conv: bool
    position: bool
    attention: bool

    @property
    def grid(self) -> tuple[int, int]:
        return self.trunk.rows, self.trunk.grid

    @property
    def offsets(self) -> int:
        """O: displacements between two patches of the grid."""
        return (2 * self.grid[0] - 1) * (2 * self.grid[1] - 1)


def decoder_shape(options: EvlConfig, trunk: VisionShape, frames: int) -> DecoderShape:
    """The sizes that a configuration means on a trunk. UserError for ones that do not fit."""
    if options.layers > trunk.layers:
        raise UserError(f"evl.layers: {options.layers} decoder layers, {trunk.layers} blocks")
    qkv_dim = options.qkv_dim or trunk.width
    heads = options.heads or max(qkv_dim // 64, 1)
    if qkv_dim % heads:
        raise UserError(f"evl.heads: a width of {qkv_dim} (evl.qkv_dim) has no {heads} equal parts")
    return DecoderShape(
        trunk=trunk,
        frames=frames,
        layers=options.layers,
        qkv_dim=qkv_dim,
        heads=heads,
        mlp_width=round(options.mlp_factor * trunk.width),
        drop_out=options.mlp_drop_out,
        conv=options.temporal_conv,
        position=options.temporal_position,
        attention=options.temporal_attention,
    )


class Decoder(nn.Module):
    """Reads a trunk while it runs: layer i as soon as block N - K + i is done.

    Nothing of a block is kept but what the gradient of its layer needs.
    """

    def __init__(self, shape: DecoderShape, *, kernels: Impl = "auto") -> None:
        super().__init__()
        self.shape, self.kernels = shape, kernels
        width, frames, layers = shape.trunk.width, shape.frames, range(shape.layers)
        self.cls_token = nn.Parameter(torch.zeros(width))
        self.decoder_layers = nn.ModuleList(DecoderLayer(shape, kernels=kernels) for _ in layers)
        if shape.conv:
            self.temporal_conv = nn.ModuleList(
                nn.Conv1d(width, width, 3, padding=1, groups=width) for _ in layers
            )
        if shape.position:
            self.temporal_pos_embed = nn.ParameterList(
                nn.Parameter(torch.zeros(frames, width)) for _ in layers
            )
        if shape.attention:
            self.cross_attention = nn.ModuleList(OffsetWeights(shape) for _ in layers)

    def forward(
        self, trunk: Callable[[Tap], object], clips: int, index: Tensor | None = None
    ) -> Tensor:
        """trunk(tap) runs it over the images of `clips` clips -> the query behind it, [B, C].

        index [B, T]: which image is each frame of each clip, where they are not all written out
        one after another. What trunk(tap) does is not recorded for gradients unless it is inside.
        """
        shape = self.shape
        first = shape.trunk.layers - shape.layers
        state = self.cls_token.expand(clips, -1)  # [B, C]
        graded = torch.is_grad_enabled()

        def tap(block: int, q: Tensor, k: Tensor, v: Tensor, out: Tensor) -> None:
            nonlocal state
            if block < first:
                return
            with torch.set_grad_enabled(graded):
                state = self.step(
                    block - first,
                    state,
                    *(_by_clip(part.to(state.dtype), clips, index) for part in (q, k, out)),
                )

        trunk(tap)
        return state

    def step(self, layer: int, state: Tensor, q: Tensor, k: Tensor, out: Tensor) -> Tensor:
        """One decoder layer. state [B, C]; q, k [B, T, N, H, K]; out [B, T, N, C] -> [B, C]."""
        shape = self.shape
        conv = self.temporal_conv[layer] if shape.conv else None
        terms = {
            "conv_weight": conv.weight if conv is not None else None,
            "conv_bias": conv.bias if conv is not None else None,
            "position": self.temporal_pos_embed[layer] if shape.position else None,
            "motion": self.motion(layer, q, k) if shape.attention else None,
        }
        updated: Tensor = self.decoder_layers[layer](
            state, out, **cast("dict[str, Tensor | None]", terms)
        )
        return updated

    def motion(self, layer: int, q: Tensor, k: Tensor) -> Tensor:
        """What a layer's temporal attention adds to the patches. [B, T, N, H, K] -> [B, T, P, C].

        Weights are averaged over the heads behind the softmax, as in the official code.
        """
        weights = cast(OffsetWeights, self.cross_attention[layer])
        maps = neighbour_maps(q, k, impl=self.kernels)  # [2, B, T - 1, P, P]
        return displacement(maps, weights.w1, weights.w2, grid=self.shape.grid, impl=self.kernels)


def _by_clip(images: Tensor, clips: int, index: Tensor | None) -> Tensor:
    """Rows of images [M, ...] -> [B, T, ...]: a view where every clip has its own."""
    return images.unflatten(0, (clips, -1)) if index is None else images[index]


class OffsetWeights(nn.Module):
    """A learned vector for every displacement, to the frame before (w1) and to the one after."""

    def __init__(self, shape: DecoderShape) -> None:
        super().__init__()
        self.w1 = nn.Parameter(torch.zeros(shape.offsets, shape.trunk.width))
        self.w2 = nn.Parameter(torch.zeros(shape.offsets, shape.trunk.width))


class DecoderLayer(nn.Module):
    """state += attention(norm1(state), norm3(tokens)); state += mlp(norm2(state))."""

    def __init__(self, shape: DecoderShape, *, kernels: Impl = "auto") -> None:
        super().__init__()
        width = shape.trunk.width
        self.attn = QueryAttention(width, shape.qkv_dim, shape.heads)
        self.mlp = QueryMlp(width, shape.mlp_width, shape.drop_out, kernels=kernels)
        self.norm1 = LayerNorm(width, kernels=kernels)
        self.norm2 = LayerNorm(width, kernels=kernels)
        self.norm3 = LayerNorm(width, kernels=kernels)
        self.kernels = kernels

    def forward(self, state: Tensor, tokens: Tensor, **terms: Tensor | None) -> Tensor:
        """state [B, C], tokens [B, T, N, C] and the terms of `attend_tokens` -> [B, C].

        Keys and values are never projected: the query is taken through the weights of the keys
        and of norm3 to the tokens, and their weighted sum through those of the values. Exact.
        """
        attn, norm = self.attn, self.norm3
        _, y = self.norm1(state)
        query = absorb_query(attn.q_proj(y), norm.weight, attn.k_proj.weight, heads=attn.heads)
        mixed = attend_tokens(query, tokens, **terms, eps=norm.eps, impl=self.kernels)  # [B, Q, C]
        values = project_mixed(
            mixed, norm.weight, norm.bias, attn.v_proj.weight, attn.v_proj.bias
        )  # [B, D]
        # Softmax drops the key bias. Its gradient is zero, not missing: it decays like the others
        # and has its place in the optimiser's state.
        values = values + 0.0 * attn.k_proj.bias
        state, y = self.norm2(state, attn.out_proj(values))
        state = state + self.mlp(y)
        return state


class QueryAttention(nn.Module):
    """The projections of the query's attention: C to D and back."""

    def __init__(self, width: int, qkv_dim: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.q_proj = nn.Linear(width, qkv_dim)
        self.k_proj = nn.Linear(width, qkv_dim)
        self.v_proj = nn.Linear(width, qkv_dim)
        self.out_proj = nn.Linear(qkv_dim, width)
        for linear in (self.q_proj, self.k_proj, self.v_proj, self.out_proj):
            nn.init.xavier_uniform_(linear.weight)
            nn.init.zeros_(linear.bias)


class QueryMlp(nn.Module):
    """[B, C] -> [B, C] through a hidden layer with dropout behind QuickGELU."""

    def __init__(self, width: int, hidden: int, drop_out: float, *, kernels: Impl) -> None:
        super().__init__()
        self.fc1 = LinearActivation(width, hidden, "quick_gelu", kernels=kernels)
        self.drop_out = nn.Dropout(drop_out)
        self.fc2 = nn.Linear(hidden, width)
        for linear in (self.fc1, self.fc2):
            nn.init.xavier_uniform_(linear.weight)
            nn.init.normal_(linear.bias, std=1e-6)

    def forward(self, y: Tensor) -> Tensor:
        out: Tensor = self.fc2(self.drop_out(self.fc1(y)))
        return out
