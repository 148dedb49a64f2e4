"""CLIP's modified ResNet (RN50 to RN50x64), with Text4Vis's temporal shift as an option.

Shape letters: M images (B * T where they are clips), S side in pixels, C channels, h x w the last
feature map, N = 1 + h * w tokens, H heads, K head width, E embedding.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kineticlip.models.architectures import ResNetShape
from kineticlip.models.temporal import shift
from kineticlip.runtime.errors import UserError

EXPANSION = 4  # a bottleneck's output channels over its inner ones
STRIDE = 32  # pixels per position of the last feature map


class ModifiedResNet(nn.Module):
    """Images to embeddings; OpenAI's and open_clip's state dicts load by name.

    Differs from the textbook ResNet in a stem of three convolutions, average pooling before every
    stride (also on the skip path), and attention pooling with the mean as its query.
    shift_frames = T > 0 puts a temporal shift before the first convolution of bottlenecks (`tsm`):
    all of them, or every second one when the third stage is as deep as RN101's. It has no
    parameters, so the state dict is the same. Weights start as CLIP's do.
    """

    def __init__(self, shape: ResNetShape, *, shift_frames: int = 0) -> None:
        super().__init__()
        self.shape = shape
        half, width = shape.width // 2, shape.width
        self.conv1 = nn.Conv2d(3, half, 3, stride=2, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(half)
        self.conv2 = nn.Conv2d(half, half, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(half)
        self.conv3 = nn.Conv2d(half, width, 3, padding=1, bias=False)
        self.bn3 = nn.BatchNorm2d(width)
        every = 2 if shape.layers[2] >= 23 else 1
        incoming, stages = width, []
        for stage, blocks in enumerate(shape.layers):
            inner = width * 2**stage
            stages.append(
                nn.Sequential(
                    *(
                        Bottleneck(
                            incoming if index == 0 else inner * EXPANSION,
                            inner,
                            stride=2 if stage and index == 0 else 1,
                            shift_frames=0 if index % every else shift_frames,
                        )
                        for index in range(blocks)
                    )
                )
            )
            incoming = inner * EXPANSION
        self.layer1, self.layer2, self.layer3, self.layer4 = stages
        self.attnpool = AttentionPool(
            incoming, shape.heads, side=shape.resolution // STRIDE, embed=shape.embed
        )
        self.reset_parameters()

    def reset_parameters(self) -> None:
        for module in self.modules():
            if isinstance(module, Bottleneck):
                nn.init.zeros_(module.bn3.weight)  # every block starts as its skip path

    def forward(self, pixels: Tensor) -> Tensor:
        """pixels [M, 3, S, S], uint8 or float already normalised -> embeddings [M, E]."""
        x = self._normalised(pixels)  # [M, 3, S, S]
        x = F.relu(self.bn1(self.conv1(x)))  # [M, width / 2, S / 2, S / 2]
        x = F.relu(self.bn2(self.conv2(x)))
        x = F.relu(self.bn3(self.conv3(x)))  # [M, width, S / 2, S / 2]
        x = F.avg_pool2d(x, 2)  # [M, width, S / 4, S / 4]
        for stage in (self.layer1, self.layer2, self.layer3, self.layer4):
            x = stage(x)
        embeddings: Tensor = self.attnpool(x)  # [M, 32 width, S / 32, S / 32] -> [M, E]
        return embeddings

    def _normalised(self, pixels: Tensor) -> Tensor:
        side = self.shape.resolution
        if pixels.shape[-2:] != (side, side):
            raise UserError(
                f"images of {pixels.shape[-1]}x{pixels.shape[-2]} pixels; "
                f"this tower takes {side}x{side} (data.resolution)"
            )
        dtype = self.conv1.weight.dtype
        if pixels.dtype != torch.uint8:
            return pixels.to(dtype)
        mean = torch.tensor(self.shape.statistics.mean, device=pixels.device).view(3, 1, 1)
        std = torch.tensor(self.shape.statistics.std, device=pixels.device).view(3, 1, 1)
        return ((pixels.float() / 255 - mean) / std).to(dtype)


class Bottleneck(nn.Module):
    """1x1, 3x3, 1x1 convolutions around a skip path; the stride is an average pooling."""

    def __init__(self, incoming: int, inner: int, *, stride: int, shift_frames: int) -> None:
        super().__init__()
        self.stride, self.shift_frames = stride, shift_frames
        outgoing = inner * EXPANSION
        self.conv1 = nn.Conv2d(incoming, inner, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(inner)
        self.conv2 = nn.Conv2d(inner, inner, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(inner)
        self.conv3 = nn.Conv2d(inner, outgoing, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(outgoing)
        # Pooling has no parameters, so the convolution is entry 0 and the norm entry 1, as in CLIP.
        self.downsample = (
            nn.Sequential(nn.Conv2d(incoming, outgoing, 1, bias=False), nn.BatchNorm2d(outgoing))
            if stride > 1 or incoming != outgoing
            else None
        )

    def forward(self, x: Tensor) -> Tensor:
        """[M, C, h, w] -> [M, 4 inner, h / stride, w / stride]."""
        skip = x
        if self.shift_frames:
            x = shift_channels(x, self.shift_frames)
        x = F.relu(self.bn1(self.conv1(x)))
        x = F.relu(self.bn2(self.conv2(x)))
        x = self.bn3(self.conv3(self._pooled(x)))
        if self.downsample is not None:
            skip = self.downsample(self._pooled(skip))
        return F.relu(x + skip)

    def _pooled(self, x: Tensor) -> Tensor:
        return F.avg_pool2d(x, self.stride) if self.stride > 1 else x


class AttentionPool(nn.Module):
    """One query, the mean of the map, attends to the mean and every position."""

    def __init__(self, channels: int, heads: int, *, side: int, embed: int) -> None:
        super().__init__()
        self.heads = heads
        self.positional_embedding = nn.Parameter(torch.empty(side * side + 1, channels))
        self.k_proj = nn.Linear(channels, channels)
        self.q_proj = nn.Linear(channels, channels)
        self.v_proj = nn.Linear(channels, channels)
        self.c_proj = nn.Linear(channels, embed)
        nn.init.normal_(self.positional_embedding, std=channels**-0.5)
        for linear in (self.k_proj, self.q_proj, self.v_proj, self.c_proj):
            nn.init.normal_(linear.weight, std=channels**-0.5)

    def forward(self, x: Tensor) -> Tensor:
        """[M, C, h, w] -> [M, E]."""
        x = x.flatten(2).transpose(1, 2)  # [M, h * w, C]
        x = torch.cat([x.mean(dim=1, keepdim=True), x], dim=1)  # [M, N, C]
        x = x + self.positional_embedding
        q = self.q_proj(x[:, :1]).unflatten(2, (self.heads, -1)).transpose(1, 2)  # [M, H, 1, K]
        k = self.k_proj(x).unflatten(2, (self.heads, -1)).transpose(1, 2)  # [M, H, N, K]
        v = self.v_proj(x).unflatten(2, (self.heads, -1)).transpose(1, 2)  # [M, H, N, K]
        pooled = F.scaled_dot_product_attention(q, k, v)  # [M, H, 1, K]
        out: Tensor = self.c_proj(pooled.flatten(1))  # [M, E]
        return out


def shift_channels(x: Tensor, frames: int) -> Tensor:
    """An eighth of the channels from the next frame, an eighth from the one before. [M, C, h, w].

    Rows are clip-major: frame t of clip b is row b * T + t; frames beyond the ends are zero.
    """
    clips = x.unflatten(0, (-1, frames)).flatten(3).transpose(2, 3)  # [B, T, h * w, C]
    shifted = shift(clips, x.shape[1] // 8).transpose(2, 3)  # [B, T, C, h * w]
    return shifted.reshape(x.shape)  # [M, C, h, w]
