"""Vita-CLIP's prompts for the vision tower: keys and values beside an image's own tokens.

No output of a prompt token is ever read (each block drops them and brings its own), so prompts
need no query, output projection or MLP: they are extra sources of the block's attention, exactly.
X-CLIP's message token is the summary token here.

Shape letters: B clips, T frames at run time, F frames that the prompts were made for, M = B * T,
N tokens, D width, L blocks, G global prompts; a group is F consecutive frames of one clip.
"""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor, nn

from kineticlip.models.architectures import VisionShape
from kineticlip.models.transformer import Attention, LayerNorm
from kineticlip.runtime.errors import UserError
from kineticlip_kernels.attention import AttentionImpl
from kineticlip_kernels.dispatch import Impl


class BlockPrompts(nn.Module):
    """What one block's prompts take from the class tokens of a group.

    `cls_proj` maps the class token of every frame. Summary: those rows attend to each other, and
    every frame gets its own result as one token. Local: they are added to learned vectors, and
    every frame gets all F of them.
    """

    def __init__(
        self,
        width: int,
        heads: int,
        *,
        frames: int,
        summary: bool,
        local: bool,
        kernels: Impl = "auto",
        attention: AttentionImpl = "auto",
    ) -> None:
        super().__init__()
        self.frames = frames
        self.cls_proj = nn.Linear(width, width)
        self.summary = self.local = False
        if summary:
            self.summary = True
            self.summary_ln = LayerNorm(width, kernels=kernels)
            self.summary_attn_layer = Attention(width, heads, kernels=kernels, impl=attention)
        if local:
            self.local = True
            self.local_prompts = nn.Parameter(torch.empty(1, frames, width))

    def forward(self, first: Tensor) -> list[Tensor]:
        """Class tokens [M, D] -> sources: local [M / F, F, D], summary [M, 1, D]."""
        own = first.to(self.cls_proj.weight.dtype)
        rows = self.cls_proj(own).unflatten(0, (-1, self.frames))  # [M / F, F, D]
        sources = []
        if self.local:
            sources.append(self.local_prompts + rows)
        if self.summary:
            update, _ = self.summary_attn_layer(self.summary_ln(rows)[1])
            sources.append((rows + update).flatten(0, 1).unsqueeze(1))
        return sources


class VisionPrompts(nn.Module):
    """All prompts of a tower and its time embedding; names are the official ones, see formats."""

    def __init__(
        self,
        shape: VisionShape,
        *,
        frames: int,
        summary: bool = True,
        local: bool = True,
        global_prompts: int = 8,
        kernels: Impl = "auto",
        attention: AttentionImpl = "auto",
    ) -> None:
        super().__init__()
        self.frames, self.groups, self.patch = frames, summary or local, shape.patch
        self.time_embed = nn.Parameter(torch.empty(frames, shape.width))
        self.has_global = global_prompts > 0
        if self.has_global:
            size = (shape.layers, global_prompts, shape.width)
            self.global_prompts = nn.Parameter(torch.empty(size))
        if self.groups:
            self.blocks = nn.ModuleList(
                BlockPrompts(
                    shape.width,
                    shape.heads,
                    frames=frames,
                    summary=summary,
                    local=local,
                    kernels=kernels,
                    attention=attention,
                )
                for _ in range(shape.layers)
            )
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """The official initial values; `cls_proj` keeps torch's own, and is never trained there."""
        width = self.time_embed.shape[1]
        bound = (6 / (3 * self.patch**2 + width)) ** 0.5
        nn.init.normal_(self.time_embed, std=0.02)
        if self.has_global:
            nn.init.uniform_(self.global_prompts, -bound, bound)
        for block in cast("list[BlockPrompts]", list(self.blocks) if self.groups else []):
            if block.local:
                nn.init.uniform_(block.local_prompts, -bound, bound)
            if block.summary:
                for third in block.summary_attn_layer.in_proj_weight.split(width):
                    nn.init.xavier_uniform_(third)
                nn.init.zeros_(block.summary_attn_layer.in_proj_bias)
                nn.init.xavier_uniform_(block.summary_attn_layer.out_proj.weight)
                nn.init.zeros_(block.summary_attn_layer.out_proj.bias)

    def check_frames(self, frames: int) -> None:
        """UserError for clips that cannot be cut into whole groups.

        The official code then groups frames of different videos, without a word.
        """
        if self.groups and frames % self.frames:
            raise UserError(
                f"data.num_frames: summary and local prompts made for {self.frames} frames work "
                f"on a multiple of {self.frames}, not on {frames}"
            )

    def forward(self, block: int, x: Tensor) -> list[Tensor]:
        """Sources of one block from its residual stream x [M, N, D]: [M', n, D] each."""
        sources = self.blocks[block](x[:, 0]) if self.groups else []
        if self.has_global:
            sources.append(self.global_prompts[block].unsqueeze(0))
        return [source.to(x.dtype) for source in sources]

    def offset(self, clips: int, frames: int) -> Tensor:
        """The time embedding of every image, [M, 1, D]; T other than F reads the nearest row."""
        rows = torch.arange(frames, device=self.time_embed.device) * self.frames // frames
        return self.time_embed[rows].repeat(clips, 1).unsqueeze(1)
