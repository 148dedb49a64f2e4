"""EVL (ECCV'22): a frozen trunk, and a query per clip that reads the tokens of its last blocks.

Lin et al., "Frozen CLIP Models are Efficient Video Learners". Shape letters: B clips, T frames,
M images, S side in pixels, N tokens, D width of the trunk, K decoder layers, C classes.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn

from kineticlip.config import Config
from kineticlip.data.batch import VideoViews
from kineticlip.formats import load_into, read_checkpoint
from kineticlip.methods.evl_cost import cost
from kineticlip.methods.evl_decoder import Decoder, DecoderShape, decoder_shape
from kineticlip.methods.head import average_views, cross_entropy, kernels_of
from kineticlip.methods.method import Cut, Method
from kineticlip.methods.trunk import build_visual, seeded, vit_of
from kineticlip.models.transformer import LayerNorm, Tap
from kineticlip.models.vision import VisionTransformer
from kineticlip.models.weights import Weights, resolve_weights
from kineticlip.runtime.errors import UserError

log = logging.getLogger(__name__)

UNUSED = (r"proj", r"ln_post\.(?:weight|bias)")  # of the trunk: official files leave them out
OWN = ("decoder.", "proj.")  # parameters that EVL adds


class EVL(nn.Module):
    """The trunk `visual`, the official `decoder.*`, and the head `proj.*`.

    A frozen trunk runs without gradients: training keeps nothing of it but what the decoder's
    own weights need, the normalised tokens of K blocks.
    """

    plain_tower = False  # the decoder taps its blocks
    classifier: Tensor | None = None  # a linear layer on what the query has read

    def __init__(
        self,
        visual: VisionTransformer,
        shape: DecoderShape,
        *,
        classes: int,
        drop_out: float = 0.5,
        finetune: bool = False,
    ) -> None:
        super().__init__()
        width = shape.trunk.width
        self.decoder = Decoder(shape, kernels=visual.ln_pre.kernels)
        self.proj = nn.Sequential(
            nn.LayerNorm(width), nn.Dropout(drop_out), nn.Linear(width, classes)
        )
        self.visual = visual
        self.finetune = finetune
        self.untrained: tuple[str, ...] = ()  # parts that no weights were found for
        visual.requires_grad_(finetune)
        for unused in (visual.proj, *visual.ln_post.parameters()):
            unused.requires_grad_(False)

    def forward(self, pixels: Tensor) -> Tensor:
        """pixels [B, T, 3, S, S], uint8 or normalised -> float32 logits [B, C].

        [B, T, N, D] are tokens behind block N - K - 1 (see `first_tokens`), and the trunk goes on
        from there.
        """
        return self.classify(pixels.flatten(0, 1), len(pixels))

    def classify(self, images: Tensor, clips: int, index: Tensor | None = None) -> Tensor:
        """images [M, ...] -> logits [clips, C]; index [clips, T] where clips share images."""
        state = self.decoder(partial(self._run_trunk, images), clips, index)  # [B, D]
        logits: Tensor = self.proj(state)
        return logits.float()

    def _run_trunk(self, images: Tensor, tap: Tap) -> None:
        with torch.set_grad_enabled(self.finetune and torch.is_grad_enabled()):
            if images.ndim == 4:
                self.visual(images, tap=tap)
            else:
                self._run_last_blocks(images, tap)

    def first_tokens(self, images: Tensor) -> Tensor:
        """What the first decoder layer's block starts from. [M, 3, S, S] -> [M, N, D]."""
        x, update = self.visual.ln_pre(self.visual.embed(images))[1], None
        for block in self.visual.blocks[: -self.decoder.shape.layers]:
            x, update, _ = block(x, update)
        tokens: Tensor = x if update is None else x + update
        return tokens

    def _run_last_blocks(self, x: Tensor, tap: Tap) -> None:
        """The rest of the trunk behind `first_tokens`."""
        x = x.to(self.visual.class_embedding.dtype)
        layers = self.decoder.shape.layers
        for index, block in list(enumerate(self.visual.blocks))[-layers:]:
            x, update, qkv = block(x)
            x = x + update
            tap(index, qkv[:, :, 0], qkv[:, :, 1], qkv[:, :, 2], x)


def build(config: Config, class_names: Sequence[str]) -> EVL:
    """The model of a configuration: CLIP's trunk, and a decoder from the weights or untrained.

    model.weights may be CLIP's, an official EVL file (a decoder alone: the trunk comes from
    evl.backbone), or a whole model. Raises UserError where they do not fit the configuration.
    """
    weights = METHOD.weights(config)
    own: dict[str, Tensor] = {}
    if weights.path is not None:
        own = {n: t for n, t in weights.contents.items() if n.startswith(OWN)}
    trunk = weights
    if own and not weights.has_visual:
        trunk = resolve_weights(config.model.arch, config.evl.backbone, key="evl.backbone")
    model = _assemble(config, trunk, classes=len(class_names))
    if own:
        _load_own(model, own, weights, class_names)
    else:
        model.untrained = ("decoder", "proj")
    if trunk.path is None:
        model.untrained = (*model.untrained, "visual")
    return model


def _assemble(config: Config, trunk: Weights, *, classes: int) -> EVL:
    vision = vit_of(trunk.model, "EVL")
    shape = decoder_shape(config.evl, vision, config.data.num_frames)
    whole = trunk.path is None or "visual.proj" in trunk.tensors
    visual = build_visual(config, trunk, optional=() if whole else UNUSED)
    with seeded(config.seed):
        return EVL(
            cast(VisionTransformer, visual),
            shape,
            classes=classes,
            drop_out=config.evl.class_drop_out,
            finetune=config.evl.finetune,
        )


def _load_own(
    model: EVL, own: dict[str, Tensor], weights: Weights, class_names: Sequence[str]
) -> None:
    """The decoder and the head. What the number of frames, pixels and classes fixes goes first:
    none of it can be resized, and a list of shapes would not say which key to change."""
    shape, source = model.decoder.shape, weights.source
    rows = {name: len(tensor) for name, tensor in own.items()}
    classes = rows.get("proj.2.weight", len(class_names))
    if classes != len(class_names):
        raise UserError(
            f"{source}: a model of {classes} classes, but {len(class_names)} are to be scored "
            "(data.labels)"
        )
    frames = rows.get("decoder.temporal_pos_embed.0", shape.frames)
    if frames != shape.frames:
        raise UserError(
            f"{source}: a model of {frames} frames, not {shape.frames} (data.num_frames)"
        )
    offsets = rows.get("decoder.cross_attention.0.w1", shape.offsets)
    if offsets != shape.offsets:
        raise UserError(
            f"{source}: a model of another resolution: {offsets} displacements, and "
            f"{model.visual.shape.resolution} px have {shape.offsets} (model.arch, data.resolution)"
        )
    load_into(model, own, what=source, optional=(r"visual\..*",))
    _compare_names(weights, class_names)


def _compare_names(weights: Weights, class_names: Sequence[str]) -> None:
    assert weights.path is not None
    trained = json.loads(read_checkpoint(weights.path).metadata.get("class_names", "[]"))
    differ = [pair for pair in zip(trained, class_names, strict=False) if pair[0] != pair[1]]
    if differ:
        log.warning(
            "%s: %d classes have other names than in training: '%s' was '%s'",
            *(weights.source, len(differ), differ[0][1], differ[0][0]),
        )


def score(model: nn.Module, videos: Sequence[VideoViews], chunk: int) -> Tensor:
    """Probabilities [len(videos), C]: the mean over a video's views of their softmax.

    An image that several views show runs through the trunk once where they share a forward.
    """
    assert isinstance(model, EVL)
    images, numbers = number_images(videos)
    logits = [
        model.classify(images[distinct], len(index), index)
        for distinct, index in packs(numbers, chunk)
    ]
    counts = [video.num_views for video in videos]
    return average_views(torch.cat(logits), counts, kernels=kernels_of(model))


def number_images(videos: Sequence[VideoViews]) -> tuple[Tensor, Tensor]:
    """All images of several videos in one row, and every view's own of them, crop-major.

    -> images [M, ...], int64 [views, T].
    """
    numbers, first = [], 0
    for video in videos:
        frames, crops = video.images.shape[:2]
        frame = video.frame_index[None] * crops  # [1, K, T]
        numbers.append((first + frame + video.crop_index[:, None, None]).flatten(0, 1))
        first += frames * crops
    return torch.cat([video.images.flatten(0, 1) for video in videos]), torch.cat(numbers)


def packs(numbers: Tensor, chunk: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Views in groups that together show at most `chunk` distinct images, one view at least.

    numbers [views, T] -> (the distinct images, int64 [M]; where each view finds its own of them,
    [B, T]).
    """
    rows = numbers.tolist()
    start, seen = 0, set(rows[0])
    for end, row in enumerate(rows[1:], 1):
        if len(seen.union(row)) > chunk:
            yield torch.unique(numbers[start:end], return_inverse=True)
            start, seen = end, set()
        seen.update(row)
    yield torch.unique(numbers[start:], return_inverse=True)


def param_groups(model: nn.Module, config: Config) -> list[dict[str, Any]]:
    """One group at one rate; everything decays, biases, norms and positions too.

    UserError for ZeRO stage 3: a decoder layer is computed from parameters of several modules
    whose own forwards, by which that stage gathers them, never run.
    """
    if config.train.zero_stage == 3:
        raise UserError("train.zero_stage: EVL trains at stages 0 to 2; its decoder is small")
    options = config.optim
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return [
        {
            "name": "evl",
            "params": parameters,
            "lr": options.lr,
            "weight_decay": options.weight_decay,
        }
    ]


def cast_trunk(model: nn.Module, config: Config) -> dict[str, Tensor]:
    """Rounds a frozen trunk to evl.backbone_precision in place -> its parameters as they were.

    Its norms keep float32 weights, as in the official code. The decoder stays as it is and gets
    the tokens in its own precision.
    """
    assert isinstance(model, EVL)
    precision = config.evl.backbone_precision
    if precision == "train":
        return {}
    if config.evl.finetune:
        raise UserError("evl.backbone_precision: only of a frozen trunk; evl.finetune trains it")
    if config.train.precision not in ("fp32", precision):
        raise UserError(
            f"evl.backbone_precision {precision}: train.precision {config.train.precision} rounds "
            "the trunk too; use train.precision fp32 for a decoder in float32"
        )
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}[precision]
    originals: dict[str, Tensor] = {}
    for place, module in model.visual.named_modules(prefix="visual"):
        if isinstance(module, LayerNorm):
            continue
        for name, parameter in module.named_parameters(prefix=place, recurse=False):
            originals[name] = parameter.data
            parameter.data = parameter.data.to(dtype)
    return originals


def feature_cut(model: nn.Module) -> Cut:
    """Tokens [N, D] before the first block that the decoder reads.

    A twelfth of what the decoder reads, for a third (ViT-B) or a sixth (ViT-L) of the trunk
    computed again.
    """
    assert isinstance(model, EVL)
    if model.finetune:
        raise UserError("evl.finetune: features are of a frozen trunk; turn it off")
    shape = model.decoder.shape
    return Cut(f"tokens before block {shape.trunk.layers - shape.layers}", model.first_tokens)


def with_trunk(config: Config, weights: str) -> Config:
    """The configuration with these weights as evl.backbone."""
    return replace(config, evl=replace(config.evl, backbone=weights))


METHOD = Method(
    build=build,
    loss=cross_entropy,
    score=score,
    param_groups=param_groups,
    cost=cost,
    before_training=cast_trunk,
    feature_cut=feature_cut,
    with_trunk=with_trunk,
    pipeline="evl",
)
