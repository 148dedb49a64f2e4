"""ActionCLIP (2021): a temporal transformer on frame embeddings, many sentences for each class.

Shape letters: B clips, T frames, E embedding, C classes, P templates, n tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kineticlip.config import Config
from kineticlip.data.batch import VideoViews
from kineticlip.methods.head import kernels_of, own_loss, unit_logits, unit_means, unit_videos
from kineticlip.methods.method import Method
from kineticlip.methods.nce import gather, matching_loss
from kineticlip.methods.text4vis import TEST_SCALE, VideoCLIP, video_model
from kineticlip.methods.text4vis import cost as text4vis_cost
from kineticlip.methods.text_side import adopt_text_tower, own_text_tower
from kineticlip.methods.trunk import (
    FrozenTensors,
    apply_header,
    embed_views,
    encode_frames,
    two_rates,
)
from kineticlip.models.architectures import Architecture
from kineticlip.models.cost import Part, text, with_training
from kineticlip.models.prompts import expand_templates, render
from kineticlip.models.text import BATCH, encode_text, tokenize
from kineticlip.runtime.errors import UserError
from kineticlip_kernels.head import mean_softmax


class ActionCLIP(nn.Module):
    """Text4Vis's video side, and a text tower that trains with it, under OpenAI's names.

    tokens: [P, C, n], every class in every template.
    """

    text_projection: Tensor

    classifier: Tensor | None = None  # several sentences a class: no row stands for it

    def __init__(self, video: VideoCLIP, tower: Any, tokens: Tensor) -> None:
        super().__init__()
        self.visual, self.fusion_model = video.visual, video.fusion_model
        self.logit_scale = video.logit_scale
        self.plain_tower, self.untrained = video.plain_tower, video.untrained
        self.frozen = FrozenTensors(attn_mask=adopt_text_tower(self, tower), tokens=tokens)
        self._kept: Tensor | None = None

    @property
    def attn_mask(self) -> Tensor:
        """The causal mask, in the dtype of the tower: this module can stand for one."""
        return cast(Tensor, self.frozen.attn_mask).to(self.text_projection.dtype)

    @property
    def tokens(self) -> Tensor:
        return cast(Tensor, self.frozen.tokens)

    def forward(self, pixels: Tensor, labels: Tensor | None = None) -> Any:
        """pixels [B, T, 3, S, S] -> probabilities [B, C]; with labels [B] loss and accuracy.

        In training each clip gets one sentence of its class, in a template drawn at random; the
        loss is the KL divergence in both directions, with clips of one class as positives.
        """
        frames = apply_header(self.fusion_model, encode_frames(self.visual, pixels))  # [B, T, E]
        videos = unit_means(frames, kernels=kernels_of(self))  # [B, E]
        if labels is None:
            return self.probabilities(videos)
        draw = torch.randint(len(self.tokens), labels.shape).to(labels.device)
        sentences = encode_text(self, self.tokens[draw, labels]).float()  # [B, E]
        videos, sentences, labels = gather(videos), gather(sentences), gather(labels)
        scale = self.logit_scale.float().exp()
        logits = unit_logits(videos, F.normalize(sentences, dim=-1), scale)  # [N, N]
        hits = labels[logits.detach().argmax(dim=1)] == labels
        return matching_loss(logits, labels), hits.float().mean()

    def probabilities(self, videos: Tensor) -> Tensor:
        """Unit embeddings [B, E] -> [B, C]: the mean over the templates of each one's softmax."""
        rows = self.class_rows()  # [P, C, E]
        logits = unit_logits(videos, rows.flatten(0, 1), TEST_SCALE)  # [B, P * C]
        return mean_softmax(logits.unflatten(1, rows.shape[:2]), impl=kernels_of(self))

    def class_rows(self) -> Tensor:
        """Unit features of every sentence [P, C, E]; encoded once after the last step."""
        if self._kept is None:
            with torch.inference_mode(False), torch.no_grad():
                parts = [encode_text(self, t) for t in self.tokens.flatten(0, 1).split(BATCH)]
                rows = F.normalize(torch.cat(parts).float(), dim=-1)
                self._kept = rows.unflatten(0, self.tokens.shape[:2])
        assert self._kept is not None
        return self._kept

    def train(self, mode: bool = True) -> ActionCLIP:
        """As always; the sentences will be encoded again, since weights may have changed."""
        self._kept = None
        super().train(mode)
        return self


def build(config: Config, class_names: Sequence[str]) -> ActionCLIP:
    """The model of a configuration; its header is `text4vis.header`."""
    weights = METHOD.weights(config)
    tensors = weights.tensors if weights.path is not None else {}
    video = video_model(config, weights)
    tower = own_text_tower(config, weights, tensors)
    tower.requires_grad_(config.actionclip.train_text)
    context = weights.model.text.context
    templates = expand_templates(config.actionclip.templates)
    if not templates:
        raise UserError("actionclip.templates: there is none")
    tokens = [tokenize(render(template, class_names), context) for template in templates]
    return ActionCLIP(video, tower, torch.stack(tokens))


def score(model: nn.Module, videos: Sequence[VideoViews], chunk: int) -> Tensor:
    """Probabilities [len(videos), C] from the mean of a video's raw view embeddings."""
    assert isinstance(model, ActionCLIP)
    units = unit_videos(embed_views(model, videos, chunk), kernels=kernels_of(model))
    return model.probabilities(units)


def param_groups(model: nn.Module, config: Config) -> list[dict[str, Any]]:
    """Both CLIP towers at lr * clip_ratio, the header at lr; every parameter decays."""
    return two_rates(model, config, lambda name: name.startswith("fusion_model."))


def cost(config: Config, model: Architecture, classes: int) -> list[Part]:
    """Text4Vis's parts; the text tower trains too, and reads every class in every template."""
    options = config.actionclip
    sentences = classes * len(expand_templates(options.templates))
    tower = with_training([text(model.text, sentences)], lambda part: options.train_text)
    return [*text4vis_cost(config, model, classes)[:-1], *tower]


METHOD = Method(
    build=build,
    loss=partial(own_loss, method="actionclip"),
    score=score,
    param_groups=param_groups,
    cost=cost,
    clip_load=True,
)
