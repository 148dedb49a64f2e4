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
from torch.func import functional_call

from kineticlip.config import Config
from kineticlip.data.batch import Batch, VideoViews
from kineticlip.methods.clips import embed_distinct
from kineticlip.methods.head import cross_entropy
from kineticlip.methods.method import Method, Metrics
from kineticlip.methods.text4vis import LOGIT_SCALE
from kineticlip.methods.trunk import FrozenTensors, build_visual, vit_of
from kineticlip.models.architectures import Architecture
from kineticlip.models.classifier import build_classifier
from kineticlip.models.cost import Part, text, vit
from kineticlip.models.prompts import expand_templates
from kineticlip.models.weights import Weights, resolve_weights
from kineticlip.runtime.errors import UserError

log = logging.getLogger(__name__)


class OpenVCLIP(nn.Module):
    """The tower `visual`, the mean over time, frozen unit rows of the classes [C, E]."""

    plain_tower = False  # its attention gets neighbouring frames as sources

    def __init__(self, visual: nn.Module, rows: Tensor) -> None:
        super().__init__()
        self.visual = visual
        self.logit_scale = nn.Parameter(torch.tensor(LOGIT_SCALE))
        self.untrained: tuple[str, ...] = ()
        self.frozen = FrozenTensors(classifier=F.normalize(rows.float(), dim=-1))
        self.pull: Pull | None = None

    @property
    def classifier(self) -> Tensor:
        """Unit rows, float32 [C, E]."""
        return cast(Tensor, self.frozen.classifier)

    def forward(self, pixels: Tensor, *, share: float = 0.0) -> Tensor:
        """pixels [B, T, 3, S, S], uint8 or normalised -> float32 logits [B, C].

        share: of CLIP's weights in those that compute them; the others still have gradients.
        """
        if not share:
            return self.logits(self.encode_clips(pixels), self.logit_scale)
        assert self.pull is not None
        mixed = self.pull.mix(dict(self.named_parameters()), share)
        scale = mixed.pop("logit_scale", self.logit_scale)
        tower = {name.removeprefix("visual."): tensor for name, tensor in mixed.items()}
        return self.logits(self.encode_clips(pixels, tower), scale)

    def logits(self, videos: Tensor, scale: Tensor) -> Tensor:
        """Video embeddings [B, E] -> the mean of their frames' scaled cosines, float32 [B, C]."""
        with torch.autocast(videos.device.type, enabled=False):
            logits: Tensor = scale.float().exp() * videos.float() @ self.classifier.T
        return logits

    def encode_clips(self, pixels: Tensor, weights: dict[str, Tensor] | None = None) -> Tensor:
        """pixels [B, T, 3, S, S] -> means over the frames' unit embeddings, float32 [B, E].

        Shorter than 1 where frames differ, as in the official code, which averages cosines.
        weights: the tower's parameters, where they are to be others than its own.
        """
        images, frames = pixels.flatten(0, 1), pixels.shape[1]
        neighbours = _neighbours(frames)
        options = {"sources": lambda block, x: [neighbours]}
        embeddings: Tensor = (  # [M, E]
            self.visual(images, **options)
            if weights is None
            else functional_call(self.visual, weights, (images,), options)
        )
        units = F.normalize(embeddings.float(), dim=-1)
        videos: Tensor = units.unflatten(0, (-1, frames)).mean(dim=1)  # [B, E]
        return videos


class Pull(nn.Module):
    """CLIP's own weights beside those that train, for losses at points between them.

    The paper's "interpolated weight optimization": with a share s drawn for every micro-batch,
    a second loss is taken at (1 - s) * weights + s * CLIP's, and its gradient there, not that
    through the mixture (1 - s times it), is added with the weight `ratio`.
    """

    def __init__(
        self, clip: Mapping[str, Tensor], *, ratio: float, shares: tuple[float, float]
    ) -> None:
        super().__init__()
        self.ratio, self.shares, self.names = ratio, shares, tuple(clip)
        self.clip = FrozenTensors(**{f"at{i}": t.clone() for i, t in enumerate(clip.values())})

    def draw(self) -> float:
        low, high = self.shares
        return low + (high - low) * float(torch.rand(()))

    def mix(self, own: Mapping[str, Tensor], share: float) -> dict[str, Tensor]:
        """The trained parameters with so much of CLIP's; gradients reach `own`."""
        return {
            name: torch.lerp(own[name], clip.to(own[name].dtype), share)
            for name, clip in zip(self.names, self.clip.buffers(), strict=True)
        }


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


def loss(model: Callable[..., Any], batch: Batch) -> tuple[Tensor, Metrics]:
    """Cross entropy, and that of weights drawn back to CLIP where openvclip.pull asks for it."""
    value, metrics = cross_entropy(model, batch)
    pull = cast(OpenVCLIP, getattr(model, "module", model)).pull
    if pull is None:
        return value, metrics
    share = pull.draw()
    pulled, _ = cross_entropy(partial(model, share=share), batch)
    metrics = {**metrics, "pulled_loss": pulled.detach()}
    return value + pull.ratio / (1 - share) * pulled, metrics


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
    return open_model(config, METHOD.weights(config), class_names)


def open_model(config: Config, weights: Weights, class_names: Sequence[str]) -> OpenVCLIP:
    """The model with these weights, `openvclip.clip_share` of CLIP's own mixed in."""
    vit_of(weights.model, "Open-VCLIP")
    visual = build_visual(config, weights)
    share = config.openvclip.clip_share
    if share:
        towers = {n.removeprefix("visual."): t for n, t in _own_clip(config).items()}
        visual.load_state_dict(interpolate_weights(visual.state_dict(), towers, share))
        log.info("openvclip: %g of CLIP's own weights", share)
    rows = build_classifier(config, class_names, weights=weights).matrix
    model = OpenVCLIP(visual, rows)
    if weights.path is None:
        model.untrained = ("visual",)
    elif "logit_scale" in weights.tensors:
        with torch.no_grad():
            model.logit_scale.copy_(weights.tensors["logit_scale"])
    return model


def _own_clip(config: Config) -> dict[str, Tensor]:
    """The tower and the logit scale of openvclip.clip_weights."""
    options = config.openvclip
    clip = resolve_weights(config.model.arch, options.clip_weights, key="openvclip.clip_weights")
    if clip.path is None:
        raise UserError(
            "openvclip.clip_weights: random weights cannot serve as the CLIP to pull towards"
        )
    return {n: t for n, t in clip.clip.items() if n.startswith("visual.") or n == "logit_scale"}


def before_training(model: nn.Module, config: Config) -> dict[str, Tensor]:
    """Gives the model what openvclip.pull draws it to in training."""
    assert isinstance(model, OpenVCLIP)
    if config.openvclip.pull:
        model.pull = _pull(model, config)
    return {}


def _pull(model: OpenVCLIP, config: Config) -> Pull:
    low, high = config.openvclip.pull_shares
    if low > high:
        raise UserError(f"openvclip.pull_shares: the lower share first, got [{low:g}, {high:g}]")
    if config.train.activation_checkpointing or config.train.zero_stage == 3:
        raise UserError(
            "openvclip.pull: without train.activation_checkpointing, and at train.zero_stage 0 to "
            "2; a second set of weights goes through the tower"
        )
    clip = _own_clip(config)
    interpolate_weights(model.state_dict(), clip, high)  # UserError where the shapes differ
    return Pull(clip, ratio=config.openvclip.pull, shares=(low, high))


def score(model: nn.Module, videos: Sequence[VideoViews], chunk: int) -> Tensor:
    """Probabilities [len(videos), C]: the softmax of the mean over a video's views of logits."""
    assert isinstance(model, OpenVCLIP)
    views = embed_distinct(model.encode_clips, videos, chunk)
    means = torch.stack([rows.mean(dim=0) for rows in views])
    return model.logits(means, model.logit_scale).softmax(dim=-1)


def param_groups(model: nn.Module, config: Config) -> list[dict[str, Any]]:
    """The whole tower and the logit scale, at one learning rate; vectors do not decay."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    options = config.optim
    parts = {
        "matrices": ([p for p in trained if p.dim() > 1], options.weight_decay),
        "vectors": ([p for p in trained if p.dim() <= 1], 0.0),
    }
    return [
        {"name": name, "params": params, "lr": options.lr, "weight_decay": decay}
        for name, (params, decay) in parts.items()
    ]


def cost(config: Config, model: Architecture, classes: int) -> list[Part]:
    """CLIP's tower with the keys and values of three frames; the text is frozen.

    Ours computes output and MLP of the last block for the class token alone.
    """
    shape, frames, options = vit_of(model, "Open-VCLIP"), config.data.num_frames, config.classifier
    n, width, hidden = shape.tokens, shape.width, shape.mlp_width
    more = frames * shape.layers * 4 * n**2 * width
    saved = frames * (n - 1) * (width**2 + 2 * width * hidden)
    templates = expand_templates(options.templates or (options.template,))
    return [
        *vit(shape, frames, paper_is_mlp=False, last_block_whole=True),
        Part(name="attention to neighbouring frames", official=more, ours=more, in_paper=True),
        Part(name="visual last block: class token only", ours=-saved),
        Part(name="logit scale", parameters=1, trained=1, in_paper=True),
        text(model.text, classes * len(templates)),
    ]


METHOD = Method(
    build=build,
    loss=loss,
    score=score,
    param_groups=param_groups,
    cost=cost,
    before_training=before_training,
)
