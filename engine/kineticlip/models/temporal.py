"""What Text4Vis adds over time: its temporal transformer, and the older shifts inside the trunk.

Shape letters: B clips, T frames, M = B * T images (row b * T + t), N tokens, D width, E embedding.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kineticlip.models.transformer import Block, BlockShape, KeysValues, Transformer
from kineticlip_kernels.attention import AttentionImpl
from kineticlip_kernels.dispatch import Impl
from kineticlip_kernels.temporal import frame_attention


def attend_frames(qkv: Tensor, *, sources: Sequence[KeysValues], impl: AttentionImpl) -> Tensor:
    """`frame_attention` in the place of a block's `attention`."""
    assert not sources, "frames attend to frames alone"
    return frame_attention(qkv, impl=impl)


class TemporalTransformer(nn.Module):
    """The `Transf` header of Text4Vis and BIKE: frames attend to each other, residual outside.

    Six pre-LN blocks with QuickGELU over frame embeddings plus learned positions; LayerNorm with
    eps 1e-12; heads as many as the text tower's. Frames are not averaged here. Keys and initial
    values are the official ones (`fusion_model.*`), xavier for the packed projections included.
    positions: rows of their table, and so the most frames; officially as many as the text tower
    has tokens. attention: the face of `kineticlip_kernels.temporal.frame_attention`.
    """

    def __init__(
        self,
        embed: int,
        heads: int,
        *,
        layers: int = 6,
        positions: int = 77,
        kernels: Impl = "auto",
        attention: AttentionImpl = "auto",
    ) -> None:
        super().__init__()
        self.frame_position_embeddings = nn.Embedding(positions, embed)
        shape = BlockShape(width=embed, heads=heads, mlp_width=4 * embed, eps=1e-12)
        blocks = [Block(shape, kernels=kernels, attention=attention) for _ in range(layers)]
        for block in blocks:
            block.attn.attend = attend_frames
        self.transformer = Transformer(blocks)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.normal_(self.frame_position_embeddings.weight, std=0.02)
        for block in cast("list[Block]", list(self.transformer.resblocks)):
            nn.init.xavier_uniform_(block.attn.in_proj_weight)
            nn.init.zeros_(block.attn.in_proj_bias)
            for linear in (block.attn.out_proj, block.mlp.c_fc, block.mlp.c_proj):
                nn.init.normal_(linear.weight, std=0.02)
                nn.init.zeros_(linear.bias)

    def forward(self, frames: Tensor) -> Tensor:
        """Frame embeddings [B, T, E], T at most `positions` -> [B, T, E]."""
        order = torch.arange(frames.shape[1], device=frames.device)
        x = frames + self.frame_position_embeddings(order)
        out: Tensor = self.transformer(x) + frames
        return out


class TokenShift(nn.Module):
    """`tokenshift`: a quarter of the class token's channels comes from the next frame, a quarter
    from the one before; frames beyond the ends are zero. No parameters."""

    twice = True  # before the attention and before the MLP

    def __init__(self, width: int, frames: int) -> None:
        super().__init__()
        self.fold, self.frames = width // 4, frames

    def forward(self, x: Tensor) -> Tensor:
        """[M, N, D] -> [M, N, D]; patch tokens stay as they are."""
        first = x[:, :1].unflatten(0, (-1, self.frames))  # [B, T, 1, D]
        return torch.cat([shift(first, self.fold).flatten(0, 1), x[:, 1:]], dim=1)


class TokenConv(nn.Module):
    """`tokent1d`: the class token through a learned convolution over time, one filter a channel,
    which starts as exactly the shift of `tokenshift`."""

    twice = True

    def __init__(self, width: int, frames: int) -> None:
        super().__init__()
        self.frames = frames
        channels = 4 * (width // 4)
        self.conv = nn.Conv1d(channels, channels, 3, padding=1, groups=channels, bias=False)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        fold = self.conv.in_channels // 4
        with torch.no_grad():
            self.conv.weight.zero_()
            self.conv.weight[:fold, 0, 2] = 1
            self.conv.weight[fold : 2 * fold, 0, 0] = 1
            self.conv.weight[2 * fold :, 0, 1] = 1

    def forward(self, x: Tensor) -> Tensor:
        """[M, N, D] -> [M, N, D]; patch tokens stay as they are."""
        series = x[:, 0].unflatten(0, (-1, self.frames)).transpose(1, 2)  # [B, D, T]
        first = self.conv(series).transpose(1, 2).flatten(0, 1)  # [M, D]
        return torch.cat([first.unsqueeze(1), x[:, 1:]], dim=1)


class PatchShift(nn.Module):
    """`tsm`: an eighth of the patch tokens' channels comes from the next frame, an eighth from the
    one before; the class token stays. The residual stream itself is shifted."""

    twice = False  # before the attention only

    def __init__(self, width: int, frames: int) -> None:
        super().__init__()
        self.fold, self.frames = width // 8, frames

    def forward(self, x: Tensor) -> Tensor:
        """[M, N, D] -> [M, N, D]."""
        patches = x[:, 1:].unflatten(0, (-1, self.frames))  # [B, T, N - 1, D]
        return torch.cat([x[:, :1], shift(patches, self.fold).flatten(0, 1)], dim=1)


def shift(x: Tensor, fold: int) -> Tensor:
    """Over axis 1: channels [0, fold) from t + 1, [fold, 2 fold) from t - 1, zeros beyond.

    x [B, T, n, D] -> [B, T, n, D].
    """
    ahead, behind, kept = x.split([fold, fold, x.shape[-1] - 2 * fold], dim=-1)
    ahead = F.pad(ahead[:, 1:], (0, 0, 0, 0, 0, 1))
    behind = F.pad(behind[:, :-1], (0, 0, 0, 0, 1, 0))
    return torch.cat([ahead, behind, kept], dim=-1)


# text4vis.temporal_module -> control point of each block, made from (width, frames)
TEMPORAL_MODULES = {"tokenshift": TokenShift, "tokent1d": TokenConv, "tsm": PatchShift}
