"""Open-VCLIP (ICML'23): CLIP whose frames also attend to their neighbours, drawn back to CLIP.

No parameters are added: every frame's queries meet the keys and values of frames t - 1, t and
t + 1. Shape letters: B clips, T frames, M = B * T images, N tokens, H heads, K head width,
E embedding, C classes.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kineticlip.architectures import ResNetShape
from kineticlip.batch import VideoViews
from kineticlip.classifier import build_classifier
from kineticlip.config import Config
from kineticlip.errors import UserError
from kineticlip.methods.clips import embed_distinct, view_scores
from kineticlip.methods.method import Method
from kineticlip.methods.text4vis import LOGIT_SCALE, loss
from kineticlip.methods.trunk import FrozenTensors, build_visual, cosine_logits
from kineticlip.weights import Weights, resolve_weights

log = logging.getLogger(__name__)


class OpenVCLIP(nn.Module):
    """The tower `visual`, the mean over time, frozen unit rows of the classes [C, E]."""

    def __init__(self, visual: nn.Module, rows: Tensor, class_names: Sequence[str]) -> None:
        super().__init__()
        self.visual = visual
        self.logit_scale = nn.Parameter(torch.tensor(LOGIT_SCALE))
        self.class_names = tuple(class_names)
        self.untrained: tuple[str, ...] = ()
        self.frozen = FrozenTensors(classifier=F.normalize(rows.float(), dim=-1))

    @property
    def classifier(self) -> Tensor:
        """Unit rows, float32 [C, E]."""
        return cast(Tensor, self.frozen.classifier)

    def forward(self, pixels: Tensor) -> Tensor:
        """pixels [B, T, 3, S, S], uint8 or normalised -> float32 logits [B, C]."""
        scale = self.logit_scale.float().exp()
        return cosine_logits(self.encode_clips(pixels), self.classifier, scale)

    def encode_clips(self, pixels: Tensor) -> Tensor:
        """pixels [B, T, 3, S, S] -> video embeddings [B, E], not normalised."""
        frames = pixels.shape[1]
        neighbours = _neighbours(frames)
        embeddings: Tensor = self.visual(
            pixels.flatten(0, 1), sources=lambda block, x: [neighbours], pool=frames
        )
        return embeddings


def _neighbours(frames: int) -> Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """Keys and values [M, N, H, K] -> those of the frames before and after, [M, 2 N, H, K]."""
    return lambda k, v: (neighbouring(k, frames), neighbouring(v, frames))


def neighbouring(x: Tensor, frames: int) -> Tensor:
    """Tokens [M, N, ...] of the frames before and after each, side by side: [M, 2 N, ...].

    Beyond the ends of a clip they are zero and stay in the softmax, as in the official code.
    """
    clips = x.unflatten(0, (-1, frames))  # [B, T, N, ...]
    nothing = torch.zeros_like(clips[:, :1])
    before = torch.cat([nothing, clips[:, :-1]], dim=1)
    after = torch.cat([clips[:, 1:], nothing], dim=1)
    return torch.cat([before, after], dim=2).flatten(0, 1)


def interpolate_weights(
    tuned: Mapping[str, Tensor], clip: Mapping[str, Tensor], share: float
) -> dict[str, Tensor]:
    """(1 - share) * tuned + share * CLIP's, for every name that both have.

    Raises UserError for a share outside 0..1 and for tensors of another shape.
    """
    if not 0 <= share <= 1:
        raise UserError(f"openvclip.clip_share should be between 0 and 1, got {share:g}")
    mixed = dict(tuned)
    for name in tuned.keys() & clip.keys():
        if tuned[name].shape != clip[name].shape:
            raise UserError(
                f"openvclip.clip_weights: '{name}' is {tuple(clip[name].shape)}, "
                f"the tuned one {tuple(tuned[name].shape)}"
            )
        original = clip[name].to(tuned[name].dtype)
        mixed[name] = torch.lerp(tuned[name], original, share)
    return mixed


def build(config: Config, class_names: Sequence[str]) -> OpenVCLIP:
    """The model of a configuration; weights of CLIP or of a fine-tuned tower."""
    weights = resolve_weights(config.model.arch, config.model.weights)
    return open_model(config, weights, class_names)


def open_model(config: Config, weights: Weights, class_names: Sequence[str]) -> OpenVCLIP:
    """The model with these weights, `openvclip.clip_share` of CLIP's own mixed in."""
    if isinstance(weights.model.vision, ResNetShape):
        raise UserError(f"model.arch: {weights.model.name} is a ResNet; Open-VCLIP needs a ViT")
    visual = build_visual(config, weights)
    share = config.openvclip.clip_share
    if share:
        clip = resolve_weights(
            config.model.arch, config.openvclip.clip_weights, key="openvclip.clip_weights"
        )
        if clip.path is None:
            raise UserError("openvclip.clip_weights: random weights are no CLIP to draw back to")
        towers = {n.removeprefix("visual."): t for n, t in clip.clip.items() if "visual." in n}
        visual.load_state_dict(interpolate_weights(visual.state_dict(), towers, share))
        log.info("openvclip: %g of the weights of %s", share, clip.source)
    rows = build_classifier(config, class_names, weights=weights).matrix
    model = OpenVCLIP(visual, rows, class_names)
    if weights.path is None:
        model.untrained = ("visual",)
    elif "logit_scale" in weights.tensors:
        with torch.no_grad():
            model.logit_scale.copy_(weights.tensors["logit_scale"])
    return model


def score(model: nn.Module, videos: Sequence[VideoViews], chunk: int) -> Tensor:
    """Probabilities [len(videos), C]: the mean over a video's views of their softmax."""
    assert isinstance(model, OpenVCLIP)
    views = embed_distinct(model.encode_clips, videos, chunk)
    scale = model.logit_scale.float().exp()
    return view_scores(views, partial(cosine_logits, rows=model.classifier, scale=scale))


def param_groups(model: nn.Module, config: Config) -> list[dict[str, Any]]:
    """The whole tower and the logit scale, at one learning rate."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    options = config.optim
    return [
        {"name": "clip", "params": trained, "lr": options.lr, "weight_decay": options.weight_decay}
    ]


OPENVCLIP = Method(build=build, loss=loss, score=score, param_groups=param_groups)
