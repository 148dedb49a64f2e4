"""Text4Vis's contrastive baseline: videos matched with the sentences of their classes.

Shape letters: B clips, T frames, S side in pixels, E embedding, C classes, n tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kineticlip.config import Config, ContrastiveConfig
from kineticlip.data.batch import VideoViews
from kineticlip.methods.head import (
    class_loss,
    kernels_of,
    own_loss,
    unit_logits,
    unit_means,
    unit_videos,
)
from kineticlip.methods.method import Method
from kineticlip.methods.nce import gather, matching_loss
from kineticlip.methods.text4vis import TEST_SCALE, VideoCLIP, video_model
from kineticlip.methods.text4vis import cost as text4vis_cost
from kineticlip.methods.text_side import adopt_text_tower, online_tower
from kineticlip.methods.trunk import (
    FrozenTensors,
    apply_header,
    embed_views,
    encode_frames,
    two_rates,
)
from kineticlip.models.architectures import Architecture
from kineticlip.models.classifier import build_classifier
from kineticlip.models.cost import Part, with_training
from kineticlip.models.prompts import expand_templates, render
from kineticlip.models.text import BATCH, encode_text, tokenize
from kineticlip.models.weights import Weights
from kineticlip.runtime.errors import UserError


class ContrastiveCLIP(nn.Module):
    """A VideoCLIP whose sentences are encoded as it trains.

    Parameter names are the official ones, the text tower's at the root. tower: open_clip's text
    transformer, and tokens [C, n] of the classes' sentences; or rows [C, E], frozen features.
    """

    text_projection: Tensor

    def __init__(
        self,
        video: VideoCLIP,
        options: ContrastiveConfig,
        *,
        tower: Any = None,
        tokens: Tensor | None = None,
        rows: Tensor | None = None,
    ) -> None:
        super().__init__()
        self.visual, self.fusion_model = video.visual, video.fusion_model
        self.logit_scale = video.logit_scale
        self.plain_tower, self.untrained = video.plain_tower, video.untrained
        self.options = options
        frozen = {}
        if tower is None:
            assert rows is not None
            frozen["rows"] = F.normalize(rows.float(), dim=-1)
        else:
            assert tokens is not None
            frozen["tokens"] = tokens
            frozen["attn_mask"] = adopt_text_tower(self, tower)
        self.online = tower is not None
        self.frozen = FrozenTensors(**frozen)
        self._class_rows: Tensor | None = None

    @property
    def attn_mask(self) -> Tensor:
        """The causal mask, in the dtype of the tower: this module can stand for one."""
        return cast(Tensor, self.frozen.attn_mask).to(self.text_projection.dtype)

    def forward(self, pixels: Tensor, labels: Tensor | None = None) -> Any:
        """pixels [B, T, 3, S, S] -> logits [B, C]; with labels [B] the loss and the accuracy.

        The matching loss over the pairs of all processes, or cross entropy over the classes.
        """
        kernels = kernels_of(self)
        frames = apply_header(self.fusion_model, encode_frames(self.visual, pixels))  # [B, T, E]
        videos = unit_means(frames, kernels=kernels)  # [B, E]
        scale = self.logit_scale.float().exp()
        if labels is None:
            return unit_logits(videos, self.class_rows(), scale)
        if self.options.loss == "ce":
            every = torch.arange(self.num_classes, device=labels.device)
            return class_loss(videos, self.sentences(every), labels, scale, kernels=kernels)
        sentences = self.sentences(labels)  # [B, E]
        if self.options.gather:
            videos, sentences, labels = gather(videos), gather(sentences), gather(labels)
        logits = unit_logits(videos, sentences, scale)  # [N, N]
        hits = labels[logits.detach().argmax(dim=1)] == labels
        loss = matching_loss(logits, labels, dual=self.options.loss == "ds")
        return loss, hits.float().mean()

    @property
    def num_classes(self) -> int:
        return len(cast(Tensor, self.frozen.tokens if self.online else self.frozen.rows))

    def sentences(self, labels: Tensor) -> Tensor:
        """Unit features of the classes' sentences, float32: labels [B] -> [B, E]."""
        if not self.online:
            return cast(Tensor, self.frozen.rows)[labels]
        features = encode_text(self, cast(Tensor, self.frozen.tokens)[labels])
        return F.normalize(features.float(), dim=-1)

    def class_rows(self) -> Tensor:
        """Every class's sentence, [C, E]; encoded once after the last step of training."""
        if self._class_rows is None:
            device = self.logit_scale.device
            with torch.no_grad():
                chunks = torch.arange(self.num_classes, device=device).split(BATCH)
                self._class_rows = torch.cat([self.sentences(rows) for rows in chunks])
        return self._class_rows

    @property
    def classifier(self) -> Tensor:
        """What scores are taken with: the classes' unit rows."""
        return self.class_rows()

    def train(self, mode: bool = True) -> ContrastiveCLIP:
        """As always; the classes will be encoded again, since weights may have changed."""
        self._class_rows = None
        super().train(mode)
        return self


def build(config: Config, class_names: Sequence[str]) -> ContrastiveCLIP:
    """The model of a configuration; weights of CLIP or of a whole fine-tuned checkpoint."""
    return contrastive_model(config, METHOD.weights(config), class_names)


def contrastive_model(
    config: Config, weights: Weights, class_names: Sequence[str]
) -> ContrastiveCLIP:
    """The video side is Text4Vis's; `contrastive.text` says what stands for the classes."""
    options = config.contrastive
    video = video_model(config, weights)
    video.visual.requires_grad_(options.train_visual)
    if options.text == "frozen":
        rows = build_classifier(config, class_names, weights=weights).matrix
        return ContrastiveCLIP(video, options, rows=rows)
    tokens = class_tokens(config, class_names, weights)
    return ContrastiveCLIP(video, options, tower=online_tower(config, weights), tokens=tokens)


def class_tokens(config: Config, class_names: Sequence[str], weights: Weights) -> Tensor:
    """Tokens [C, n] of the classes' sentences. UserError for a classifier that is not one text."""
    options = config.classifier
    templates = expand_templates((options.template,))
    if options.source != "text" or options.templates or len(templates) > 1 or options.center:
        raise UserError(
            "classifier: this method encodes the sentences themselves; it needs source text, one "
            "template and no centre"
        )
    return tokenize(render(templates[0], class_names), weights.model.text.context)


def score(model: nn.Module, videos: Sequence[VideoViews], chunk: int) -> Tensor:
    """As Text4Vis: probabilities [len(videos), C] from the mean of the raw view embeddings."""
    assert isinstance(model, ContrastiveCLIP)
    units = unit_videos(embed_views(model, videos, chunk), kernels=kernels_of(model))
    return unit_logits(units, model.class_rows(), TEST_SCALE).softmax(dim=-1)


def param_groups(model: nn.Module, config: Config) -> list[dict[str, Any]]:
    """Both CLIP towers at lr * clip_ratio, the header at lr; every parameter decays."""
    return two_rates(model, config, lambda name: name.startswith("fusion_model."))


def cost(config: Config, model: Architecture, classes: int) -> list[Part]:
    """Text4Vis's parts; which towers train is the configuration's choice."""
    options = config.contrastive

    def trains(part: Part) -> bool:
        if part.once:
            return options.text == "online"
        return options.train_visual or not part.name.startswith("visual")

    return with_training(text4vis_cost(config, model, classes), trains)


METHOD = Method(
    build=build,
    loss=partial(own_loss, method="contrastive"),
    score=score,
    param_groups=param_groups,
    cost=cost,
    clip_load=True,
)
