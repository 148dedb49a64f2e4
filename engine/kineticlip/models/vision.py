"""CLIP's vision transformer: the one trunk that every method runs.

Shape letters: M images (B * T where they are clips), S side in pixels, P patches,
N = 1 + P tokens, D width, H heads, K head width, E embedding.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kineticlip.models.architectures import VisionShape
from kineticlip.models.transformer import Block, BlockShape, LayerNorm, Sources, Tap, Transformer
from kineticlip.runtime.errors import UserError
from kineticlip_kernels.attention import AttentionImpl
from kineticlip_kernels.dispatch import Impl
from kineticlip_kernels.patches import fold_patch_embedding, unfold_patches


@dataclass(frozen=True, kw_only=True)
class Dropouts:
    """What a tower drops in training, as shares.

    paths: residual branches, for whole rows of the batch; attention: attention weights. Both
    rise linearly over the blocks, from none to this at the last. tokens: of the embedded images.
    """

    paths: float = 0.0
    attention: float = 0.0
    tokens: float = 0.0


NO_DROPOUTS = Dropouts()


class VisionTransformer(nn.Module):
    """Images to embeddings; OpenAI's and open_clip's ViT state dicts load by name.

    kernels and attention choose the faces of the ops. control_point makes the module that each
    block applies to the stream (temporal.py). joint_frames = T: tokens of all T frames of a clip
    attend to each other, one class token a clip, plus a learned `time_embedding` [T, D].
    Weights start as CLIP's do.
    """

    def __init__(
        self,
        shape: VisionShape,
        *,
        kernels: Impl = "auto",
        attention: AttentionImpl = "auto",
        control_point: Callable[[int], nn.Module] | None = None,
        joint_frames: int = 0,
        dropouts: Dropouts = NO_DROPOUTS,
    ) -> None:
        super().__init__()
        self.shape, self.joint_frames = shape, joint_frames
        width, layers = shape.width, shape.layers
        self.class_embedding = nn.Parameter(torch.empty(width))
        self.positional_embedding = nn.Parameter(torch.empty(shape.tokens, width))
        if joint_frames:
            self.time_embedding = nn.Parameter(torch.empty(joint_frames, width))
        self.kernels = kernels
        self.conv1 = PatchProjection(shape, kernels=kernels)
        self.embedding_drop_out = nn.Dropout(dropouts.tokens)
        self.ln_pre = LayerNorm(width, kernels=kernels)
        block = BlockShape(
            width=width,
            heads=shape.heads,
            mlp_width=shape.mlp_width,
            activation=shape.activation,
        )
        self.transformer = Transformer(
            [
                Block(
                    block,
                    kernels=kernels,
                    attention=attention,
                    drop_out=dropouts.paths * index / max(layers - 1, 1),
                    attention_drop_out=dropouts.attention * index / max(layers - 1, 1),
                    control_point=control_point(width) if control_point else None,
                )
                for index in range(layers)
            ]
        )
        self.ln_post = LayerNorm(width, kernels=kernels)
        self.proj = nn.Parameter(torch.empty(width, shape.embed))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        for parameter in (self.class_embedding, self.positional_embedding, self.proj):
            nn.init.normal_(parameter, std=self.shape.width**-0.5)
        if self.joint_frames:
            nn.init.normal_(self.time_embedding, std=self.shape.width**-0.5)
        nn.init.kaiming_uniform_(self.conv1.weight, a=5**0.5)
        for block in self.blocks:
            block.initialise_like_clip(len(self.blocks))

    def forward(
        self,
        pixels: Tensor,
        *,
        sources: Sources | None = None,
        tap: Tap | None = None,
        offset: Tensor | None = None,
        pool: int = 1,
    ) -> Tensor:
        """pixels [M, 3, S, S], uint8 or float already normalised -> embeddings [M / pool, E].

        sources(block, x) gives extra keys and values for that block's attention (see
        transformer.Source); under checkpointing it is called again in the backward pass.
        tap(block, q, k, v, out) sees q, k, v [M, N, H, K], before scaling, with bias, and the
        block's output [M, N, D]. offset [M or 1, 1 or N, D] is added before ln_pre. Without a
        tap the last block computes the class token alone, which is exact. pool: the mean over so
        many rows, taken before the projection (the same as after it). With joint_frames there
        are M / T rows of output, and of everything that the hooks see.
        """
        x = self.embed(pixels)  # [M, N, D]
        if offset is not None:
            x = x + offset
        _, x = self.ln_pre(self.embedding_drop_out(x))
        x = self.transformer(x, sources=sources, tap=tap, class_only=True)  # [M, 1 or N, D]
        _, x = self.ln_post(x[:, 0])  # [M, D]
        if pool > 1:
            x = x.unflatten(0, (-1, pool)).mean(dim=1)  # [M / pool, D]
        embeddings: Tensor = x @ self.proj  # [M / pool, E]
        return embeddings

    @property
    def blocks(self) -> list[Block]:
        return cast("list[Block]", list(self.transformer.resblocks))

    def embed(self, pixels: Tensor) -> Tensor:
        """Pixels to tokens with their positions, before ln_pre. [M, 3, S, S] -> [M, N, D]."""
        width, height = self.shape.resolution, self.shape.height or self.shape.resolution
        if pixels.shape[-2:] != (height, width):
            raise UserError(
                f"images of {pixels.shape[-1]}x{pixels.shape[-2]} pixels; "
                f"this tower takes {width}x{height} (data.resolution)"
            )
        patches = self.conv1(pixels) + self.positional_embedding[1:]  # [M, P, D]
        if self.joint_frames:
            patches = patches.unflatten(0, (-1, self.joint_frames))  # [B, T, P, D]
            patches = patches.transpose(1, 2) + self.time_embedding  # [B, P, T, D]
            patches = patches.flatten(1, 2)  # [B, P * T, D]
        first = self.class_embedding + self.positional_embedding[0]
        return torch.cat([first.expand(len(patches), 1, -1), patches], dim=1)


class PatchProjection(nn.Module):
    """The patch convolution as one matrix product. Its weight keeps the convolution's shape."""

    def __init__(self, shape: VisionShape, *, kernels: Impl = "auto") -> None:
        super().__init__()
        self.shape, self.kernels = shape, kernels
        self.weight = nn.Parameter(torch.empty(shape.width, 3, shape.patch, shape.patch))

    def forward(self, pixels: Tensor) -> Tensor:
        """[M, 3, S, S], uint8 or float already normalised -> [M, P, D], patches row by row.

        Bytes are never normalised: mean and standard deviation fold into weight and bias.
        """
        side, dtype = self.shape.patch, self.weight.dtype
        if pixels.dtype == torch.uint8:
            patches = unfold_patches(pixels, side, dtype=dtype, impl=self.kernels)  # [M, P, Q]
            statistics = self.shape.statistics
            weight, bias = fold_patch_embedding(self.weight, statistics.mean, statistics.std)
            return F.linear(patches, weight, bias)
        x = pixels.to(dtype)
        x = x.unflatten(3, (-1, side)).unflatten(2, (-1, side))  # [M, 3, g, p, g, p]
        x = x.permute(0, 2, 4, 1, 3, 5).flatten(3).flatten(1, 2)  # [M, P, 3 p p]
        return F.linear(x, self.weight.flatten(1))
