"""A method that nobody published: what one file has to bring, and nothing else.

The frozen trunk, the mean over the frames, a linear layer. Shape letters: B clips, T frames,
S side in pixels, E embedding, C classes.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from kineticlip.config import Config
from kineticlip.data.batch import VideoViews
from kineticlip.formats import load_into
from kineticlip.methods.head import average_views, cross_entropy
from kineticlip.methods.method import Cut, Method
from kineticlip.methods.text_side import under
from kineticlip.methods.trunk import build_visual, encode_frames, encode_views, seeded, vit_of
from kineticlip.models.architectures import Architecture
from kineticlip.models.cost import Part, vit


class MadeUp(nn.Module):
    """`visual` and `head`."""

    plain_tower = True
    classifier: Tensor | None = None

    def __init__(self, visual: nn.Module, embed: int, classes: int) -> None:
        super().__init__()
        self.visual, self.head = visual.requires_grad_(False), nn.Linear(embed, classes)
        self.untrained: tuple[str, ...] = ()

    def forward(self, pixels: Tensor) -> Tensor:
        """pixels [B, T, 3, S, S] or frame embeddings [B, T, E] -> logits [B, C]."""
        return self.logits(encode_frames(self.visual, pixels))

    def logits(self, frames: Tensor) -> Tensor:
        logits: Tensor = self.head(frames.float().mean(dim=1))
        return logits


def build(config: Config, class_names: Sequence[str]) -> MadeUp:
    weights = METHOD.weights(config)
    tensors = weights.tensors if weights.path is not None else {}
    visual = build_visual(config, weights)
    with seeded(config.seed):
        model = MadeUp(visual, weights.model.embed, len(class_names))
    if head := under("head.", tensors):
        load_into(model.head, head, what=weights.source)
    else:
        model.untrained = ("head",) if tensors else ("visual", "head")
    return model


def score(model: nn.Module, videos: Sequence[VideoViews], chunk: int) -> Tensor:
    assert isinstance(model, MadeUp)
    views = encode_views(model.visual, videos, chunk, per_clip=False)  # [V, T, E] each
    return average_views(model.logits(torch.cat(views)), [len(rows) for rows in views])


def param_groups(model: nn.Module, config: Config) -> list[dict[str, Any]]:
    assert isinstance(model, MadeUp)
    return [{"name": "head", "params": list(model.head.parameters()), "lr": config.optim.lr}]


def cost(config: Config, model: Architecture, classes: int) -> list[Part]:
    count, macs = (model.embed + 1) * classes, model.embed * classes
    tower = vit(vit_of(model, "made-up"), config.data.num_frames, trained=False)
    return [*tower, Part(name="head", parameters=count, trained=count, official=macs, ours=macs)]


def feature_cut(model: nn.Module) -> Cut:
    assert isinstance(model, MadeUp)
    return Cut("frame embeddings", model.visual)


METHOD = Method(
    build=build,
    loss=cross_entropy,
    score=score,
    param_groups=param_groups,
    cost=cost,
    feature_cut=feature_cut,
)
