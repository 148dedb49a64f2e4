"""Text4Vis (AAAI'23, IJCV'23): CLIP's frame embeddings, a temporal header, a frozen classifier.

Shape letters: B clips, T frames, M = B * T images, S side in pixels, E embedding, C classes,
V views of a video.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kineticlip.config import Config
from kineticlip.data.batch import Batch, VideoViews
from kineticlip.formats import load_into
from kineticlip.methods.head import (
    class_loss,
    cross_entropy,
    kernels_of,
    own_loss,
    unit_logits,
    unit_means,
    unit_videos,
)
from kineticlip.methods.method import Cut, Method, Metrics
from kineticlip.methods.trunk import (
    FrozenTensors,
    apply_header,
    build_visual,
    embed_views,
    encode_frames,
    seeded,
    two_rates,
)
from kineticlip.models.architectures import Architecture, ResNetShape
from kineticlip.models.classifier import Classifier, build_classifier
from kineticlip.models.cost import Part, block_parts, resnet, text, vit
from kineticlip.models.temporal import TEMPORAL_MODULES, TemporalTransformer
from kineticlip.models.vision import Dropouts
from kineticlip.models.weights import Weights
from kineticlip.runtime.errors import UserError

log = logging.getLogger(__name__)

TEST_SCALE = 100.0  # the official tests use this constant in place of exp(logit_scale)
LOGIT_SCALE = 2.6593  # ln(1 / 0.07), where no weights bring their own
POSITIONS = "fusion_model.frame_position_embeddings.weight"


class VideoCLIP(nn.Module):
    """The official model, parameter for parameter: `visual`, `fusion_model`, `logit_scale`.

    per_clip: the tower mixes the frames of a clip inside itself, so it needs whole clips. The
    header is bypassed where a clip has one row: with T = 1, and with joint attention, which
    gives one row a clip; the official code does so too.
    """

    def __init__(
        self, visual: nn.Module, header: nn.Module | None, *, embed: int, per_clip: bool = False
    ) -> None:
        super().__init__()
        self.visual = visual
        self.fusion_model = header
        self.logit_scale = nn.Parameter(torch.tensor(LOGIT_SCALE))
        self.embed, self.plain_tower = embed, not per_clip
        self.untrained: tuple[str, ...] = ()  # parts that no weights were found for
        self.frozen = FrozenTensors(classifier=torch.empty(0, embed))

    @property
    def classifier(self) -> Tensor:
        """Unit rows, float32 [C, E]."""
        return cast(Tensor, self.frozen.classifier)

    def set_classifier(self, classifier: Classifier) -> None:
        """Takes new classes; rows are normalised here, once. UserError for another width."""
        if classifier.matrix.shape[1] != self.embed:
            raise UserError(
                f"classifier: rows of {classifier.matrix.shape[1]}, embeddings of {self.embed}"
            )
        rows = F.normalize(classifier.matrix.float(), dim=-1)
        self.frozen.classifier = rows.to(self.logit_scale.device)  # [C, E]

    def forward(self, pixels: Tensor, labels: Tensor | None = None) -> Any:
        """pixels [B, T, 3, S, S], uint8 or normalised -> float32 logits [B, C].

        With labels [B] the loss and the accuracy instead.
        """
        kernels = kernels_of(self)
        units = unit_means(self.encode_frames(pixels), kernels=kernels)  # [B, E]
        scale = self.logit_scale.float().exp()
        if labels is None:
            return unit_logits(units, self.classifier, scale)
        return class_loss(units, self.classifier, labels, scale, kernels=kernels)

    def encode_frames(self, pixels: Tensor) -> Tensor:
        """pixels [B, T, 3, S, S] -> frame embeddings behind the header [B, T, E]."""
        return apply_header(self.fusion_model, encode_frames(self.visual, pixels))

    def encode_clips(self, pixels: Tensor) -> Tensor:
        """pixels [B, T, 3, S, S] -> video embeddings [B, E], not normalised."""
        return self.encode_frames(pixels).mean(dim=1)


def build(config: Config, class_names: Sequence[str]) -> VideoCLIP:
    """The model of a configuration; weights of CLIP or of a whole fine-tuned checkpoint."""
    weights = METHOD.weights(config)
    model = video_model(config, weights)
    model.set_classifier(build_classifier(config, class_names, weights=weights))
    return model


def video_model(config: Config, weights: Weights) -> VideoCLIP:
    """The model without its classes."""
    options, frames = config.text4vis, config.data.num_frames
    resnet = isinstance(weights.model.vision, ResNetShape)
    module = options.temporal_module
    if resnet and module not in ("none", "tsm"):
        raise UserError(f"text4vis.temporal_module: a ResNet has 'none' and 'tsm', not '{module}'")
    if module != "none" and options.joint:
        raise UserError("text4vis: joint attention and a temporal module cannot be combined")
    shifts = None
    if module != "none" and not resnet:
        shifts = partial(TEMPORAL_MODULES[module], frames=frames)
    visual = build_visual(
        config,
        weights,
        control_point=shifts,
        joint_frames=frames if options.joint else 0,
        shift_frames=frames if module == "tsm" else 0,
        dropouts=Dropouts(
            paths=options.drop_out,
            attention=options.attention_drop_out,
            tokens=options.embedding_drop_out,
        ),
    )
    model = VideoCLIP(
        visual,
        _header(config, weights),
        embed=weights.model.embed,
        per_clip=module != "none" or options.joint,
    )
    if weights.path is None:
        model.untrained = ("visual",)
    else:
        _load_rest(model, weights)
    if model.fusion_model is not None and (options.joint or frames == 1):
        log.warning("text4vis.header: one embedding a clip, so the temporal transformer is idle")
        model.fusion_model.requires_grad_(False)
    return model


def _header(config: Config, weights: Weights) -> nn.Module | None:
    """The header of the configuration; a fine-tuned file says how many positions it has."""
    if config.text4vis.header == "mean":
        return None
    positions, frames = weights.model.text.context, config.data.num_frames
    if weights.path is not None and POSITIONS in weights.tensors:
        positions = len(weights.tensors[POSITIONS])
    if frames > positions and not config.text4vis.joint:  # joint attention passes it by
        raise UserError(
            f"data.num_frames: {frames} frames, and the temporal transformer of "
            f"{weights.model.name} has {positions} positions; text4vis.header=mean has no limit"
        )
    with seeded(config.seed):
        return TemporalTransformer(
            weights.model.embed,
            weights.model.header_heads,
            layers=config.text4vis.header_layers,
            positions=positions,
            kernels=config.model.kernels,
            attention=config.model.attention,
        )


def _load_rest(model: VideoCLIP, weights: Weights) -> None:
    """The logit scale, and the header where the file is a fine-tuned model's."""
    tensors = weights.tensors
    if "logit_scale" in tensors:
        with torch.no_grad():
            model.logit_scale.copy_(tensors["logit_scale"])
    prefix = "fusion_model."
    header = {
        name.removeprefix(prefix): tensor
        for name, tensor in tensors.items()
        if name.startswith(prefix)
    }
    if model.fusion_model is None and header:
        log.warning("%s has a temporal header; text4vis.header: mean leaves it out", weights.source)
    elif model.fusion_model is not None and header:
        load_into(model.fusion_model, header, what=f"the header of {weights.source}")
    elif model.fusion_model is not None:
        model.untrained = ("fusion_model",)


def loss(model: Callable[..., Any], batch: Batch) -> tuple[Tensor, Metrics]:
    """Cross entropy; a clip with several labels spreads its probability evenly over them."""
    if batch.labels.is_floating_point():
        return cross_entropy(model, batch)
    return own_loss(model, batch, method="text4vis")


def score(model: nn.Module, videos: Sequence[VideoViews], chunk: int) -> Tensor:
    """Probabilities [len(videos), C]: raw view embeddings averaged, then 100 times the cosines."""
    assert isinstance(model, VideoCLIP)
    units = unit_videos(embed_views(model, videos, chunk), kernels=kernels_of(model))
    return unit_logits(units, model.classifier, TEST_SCALE).softmax(dim=-1)


def embed_videos(model: nn.Module, videos: Sequence[VideoViews], chunk: int) -> Tensor:
    """The mean of each video's raw view embeddings, float32 [len(videos), E]."""
    assert isinstance(model, VideoCLIP)
    return torch.stack([rows.mean(dim=0) for rows in embed_views(model, videos, chunk)])


def param_groups(model: nn.Module, config: Config) -> list[dict[str, Any]]:
    """The tower and the logit scale at lr * clip_ratio; header and control points at lr.

    Every parameter decays, as in the official code; a group without parameters is left out.
    """
    return two_rates(model, config, _is_new)


def _is_new(name: str) -> bool:
    of_clip = "visual" in name and "control_point" not in name
    return not of_clip and name != "logit_scale"


def cost(config: Config, model: Architecture, classes: int) -> list[Part]:
    """Tower, temporal header, logit scale; the text tower, once.

    The classifier, C * E multiply-adds for a video, is not counted, nor is it in the paper.
    """
    layers = config.text4vis.header_layers if config.text4vis.header == "transformer" else 0
    parts = video_cost(model, config.data.num_frames, header_layers=layers)
    return [*parts, text(model.text, classes)]


def video_cost(model: Architecture, frames: int, *, header_layers: int = 0) -> list[Part]:
    """What runs for every clip: T frames through the tower and the header (0 layers: mean)."""
    shape, embed = model.vision, model.embed
    parts = resnet(shape, frames) if isinstance(shape, ResNetShape) else vit(shape, frames)
    if header_layers:
        positions = model.text.context * embed
        parts += block_parts(
            "header",
            embed,
            4 * embed,
            header_layers,
            tokens=frames,
            rows=1,
            trained=True,
            paper_is_mlp=True,
        )
        parts += [Part(name="header positions", parameters=positions, trained=positions)]
    return [*parts, Part(name="logit scale", parameters=1, trained=1)]


def feature_cut(model: nn.Module) -> Cut:
    """Frame embeddings [E]."""
    assert isinstance(model, VideoCLIP)
    if not model.plain_tower:
        raise UserError(
            "text4vis.temporal_module, text4vis.joint: features are of single frames, and this "
            "trunk mixes them"
        )
    return Cut("frame embeddings", cast("Callable[[Tensor], Tensor]", model.visual))


METHOD = Method(
    build=build,
    loss=loss,
    score=score,
    param_groups=param_groups,
    cost=cost,
    feature_cut=feature_cut,
    clip_load=True,
)
