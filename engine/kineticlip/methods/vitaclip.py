"""Vita-CLIP (CVPR'23): prompts for both of CLIP's towers, which stay as they are.

Shape letters: B clips, T frames, M = B * T images, S side in pixels, E embedding, C classes,
W width of the text tower.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kineticlip.config import Config
from kineticlip.data.batch import Batch, VideoViews
from kineticlip.formats import load_into
from kineticlip.methods.clips import embed_distinct
from kineticlip.methods.head import check_single_labels, cosine_logits, kernels_of, view_scores
from kineticlip.methods.method import Method, Metrics
from kineticlip.methods.prompts_text import Placeholders, TextPrompts, clean, new_context
from kineticlip.methods.prompts_vision import VisionPrompts
from kineticlip.methods.text4vis import LOGIT_SCALE
from kineticlip.methods.text_side import adopt_text_tower, own_text_tower, under
from kineticlip.methods.trunk import FrozenTensors, build_visual, seeded, vit_of
from kineticlip.methods.vitaclip_cost import cost
from kineticlip.models.classifier import SUFFIX, build_classifier
from kineticlip.models.text import encode_embedded
from kineticlip.models.weights import Weights
from kineticlip.runtime.errors import UserError

log = logging.getLogger(__name__)


class VitaCLIP(nn.Module):
    """Two frozen towers, `prompts` beside the visual one, `prompt_learner` before the text one.

    The text tower's names are OpenAI's, at the root. Text features depend on no video: a step of
    several micro-batches computes them without gradients first and with gradients at its last
    one, and evaluation once. rows [C, E]: features of the classes in place of learned words.
    """

    plain_tower = False  # its attention gets prompts as sources
    token_embedding: nn.Module
    text_projection: Tensor

    def __init__(
        self,
        visual: nn.Module,
        prompts: VisionPrompts,
        *,
        tower: Any = None,
        learner: TextPrompts | None = None,
        rows: Tensor | None = None,
    ) -> None:
        super().__init__()
        self.logit_scale = nn.Parameter(torch.tensor(LOGIT_SCALE))
        self.visual, self.prompts, self.prompt_learner = visual, prompts, learner
        self.untrained: tuple[str, ...] = ()
        frozen = {} if rows is None else {"rows": F.normalize(rows.float(), dim=-1)}
        if learner is not None:
            frozen["attn_mask"] = adopt_text_tower(self, tower)
        self.frozen = FrozenTensors(**frozen)
        self._kept: Tensor | None = None  # unit rows, for evaluation
        self._features: Tensor | None = None  # of a step whose last micro-batch is to come
        self._gradient: Tensor | None = None  # of that step's loss by them, so far

    @property
    def attn_mask(self) -> Tensor:
        """The causal mask, in the dtype of the tower: this module can stand for one."""
        return cast(Tensor, self.frozen.attn_mask).to(self.text_projection.dtype)

    def forward(self, pixels: Tensor, *, ends_step: bool = True) -> Tensor:
        """pixels [B, T, 3, S, S], uint8 or normalised -> float32 logits [B, C].

        ends_step: this micro-batch is the last one before the optimiser steps.
        """
        if self.prompt_learner is not None and self.training and torch.is_grad_enabled():
            rows = F.normalize(self._shared_features(ends_step).float(), dim=-1)
        else:
            rows = self.classifier
        return cosine_logits(self.encode_clips(pixels), rows, self.logit_scale.float().exp())

    def encode_clips(self, pixels: Tensor) -> Tensor:
        """pixels [B, T, 3, S, S] -> video embeddings [B, E], not normalised."""
        clips, frames = pixels.shape[:2]
        self.prompts.check_frames(frames)
        dtype = cast(Tensor, self.visual.positional_embedding).dtype
        embeddings: Tensor = self.visual(
            pixels.flatten(0, 1),
            sources=self.prompts,
            offset=self.prompts.offset(clips, frames).to(dtype),
            pool=frames,
        )
        return embeddings

    def text_features(self) -> Tensor:
        """Features of the classes' prompts [C, E], not normalised; cut behind the longest one."""
        learner = self.prompt_learner
        assert learner is not None
        prompts = learner(self.token_embedding(learner.tokens[:, : learner.length]))  # [C, L, W]
        return encode_embedded(self, prompts, learner.ends)

    @property
    def classifier(self) -> Tensor:
        """Unit rows, float32 [C, E]; encoded once after the last step of training."""
        if self.prompt_learner is None:
            return cast(Tensor, self.frozen.rows)
        if self._kept is None:
            with torch.inference_mode(False), torch.no_grad():
                self._kept = F.normalize(self.text_features().float(), dim=-1)
        return self._kept

    def _shared_features(self, ends_step: bool) -> Tensor:
        """Text features whose gradient reaches the prompts in the step's last micro-batch."""
        self._kept = None
        if not ends_step:
            if self._features is None:
                with torch.no_grad():
                    self._features = self.text_features()
            leaf = self._features.detach().requires_grad_()
            leaf.register_hook(self._add_gradient)
            return leaf
        features = self.text_features()
        earlier = self._gradient
        if earlier is not None:
            features.register_hook(lambda gradient: gradient + earlier)
        self._features = self._gradient = None
        return features

    def _add_gradient(self, gradient: Tensor) -> None:
        self._gradient = gradient if self._gradient is None else self._gradient + gradient

    def train(self, mode: bool = True) -> VitaCLIP:
        """As always; the classes will be encoded again, since weights may have changed."""
        self._kept = None
        super().train(mode)
        return self


def build(config: Config, class_names: Sequence[str]) -> VitaCLIP:
    """The model of a configuration; weights of CLIP or of a whole Vita-CLIP checkpoint."""
    return vita_model(config, METHOD.weights(config), class_names)


def vita_model(config: Config, weights: Weights, class_names: Sequence[str]) -> VitaCLIP:
    """The model with these weights. F, where a checkpoint has prompts, is the checkpoint's."""
    visual = build_visual(config, weights)
    visual.requires_grad_(False)
    tensors = weights.tensors if weights.path is not None else {}
    missing = [] if weights.path is not None else ["visual"]
    prompts, trained = _vision_prompts(config, weights, under("prompts.", tensors))
    prompts.check_frames(config.data.num_frames)
    if not trained:
        missing.append("prompts")
    parts: dict[str, Any] = {}
    if config.vitaclip.text == "classifier":
        names = [*class_names]
        if not config.classifier.source.endswith(SUFFIX):
            names = [clean(name) for name in names]
        if "token_embedding.weight" in tensors:  # CLIP's own text tower, as it never trains
            config = replace(config, classifier=replace(config.classifier, text_weights=""))
        parts["rows"] = build_classifier(config, names, weights=weights).matrix
    else:
        tower = own_text_tower(config, weights, tensors).requires_grad_(False)
        parts = {"tower": tower, "learner": _text_prompts(config, weights, class_names, tower)}
        if "prompt_learner.ctx" not in tensors:
            missing.append("prompt_learner")
    model = VitaCLIP(visual, prompts, **parts)
    model.untrained = tuple(missing)
    if "logit_scale" in tensors:
        with torch.no_grad():
            model.logit_scale.copy_(tensors["logit_scale"])
    return model


# vitaclip key -> the parameters that are there only if it is on
_PARTS = {
    "summary": r"blocks\.\d+\.summary_.+",
    "local_prompts": r"blocks\.\d+\.local_prompts",
    "global_prompts": r"global_prompts",
}


def _vision_prompts(
    config: Config, weights: Weights, tensors: dict[str, Tensor]
) -> tuple[VisionPrompts, bool]:
    """The prompts, and whether the weights have them."""
    options, shape = config.vitaclip, vit_of(weights.model, "Vita-CLIP")
    frames = len(tensors["time_embed"]) if "time_embed" in tensors else config.data.num_frames
    with seeded(config.seed):
        prompts = VisionPrompts(
            shape,
            frames=frames,
            summary=options.summary,
            local=options.local_prompts,
            global_prompts=options.global_prompts,
            kernels=config.model.kernels,
            attention=config.model.attention,
        )
    for name, parameter in prompts.named_parameters():
        parameter.requires_grad_(options.train_cls_proj or ".cls_proj." not in name)
    if not tensors:
        return prompts, False
    own = prompts.state_dict()
    for key, pattern in _PARTS.items():
        there = any(re.fullmatch(pattern, name) for name in tensors)
        here = any(re.fullmatch(pattern, name) for name in own)
        if here and not there:
            raise UserError(f"vitaclip.{key}: {weights.source} was trained without; turn it off")
        if there and not here:
            log.warning("%s has them; vitaclip.%s leaves them out", weights.source, key)
    wanted = {name: tensor for name, tensor in tensors.items() if name in own}
    ready = tensors.get("global_prompts")
    if ready is not None and prompts.has_global and len(ready[0]) != options.global_prompts:
        raise UserError(
            f"vitaclip.global_prompts: {weights.source} has {len(ready[0])}, "
            f"not {options.global_prompts}"
        )
    load_into(prompts, wanted, what=f"the prompts of {weights.source}")
    return prompts, True


def _text_prompts(
    config: Config, weights: Weights, class_names: Sequence[str], tower: Any
) -> TextPrompts:
    options = config.vitaclip
    if options.context < 1 and not options.context_words:
        raise UserError(f"vitaclip.context should be at least 1, got {options.context}")
    rows = Placeholders.of(
        class_names,
        context=options.context,
        words=options.context_words,
        context_length=weights.model.text.context,
    )
    if options.context_words and options.per_class:
        log.warning("vitaclip.per_class: context_words are shared by all classes")
    with seeded(config.seed):
        context = new_context(
            rows,
            tower.token_embedding,
            words=options.context_words,
            per_class=options.per_class,
            position=options.position,
        )
    if weights.path is not None and "prompt_learner.ctx" in weights.tensors:
        trained = under("prompt_learner.", weights.tensors)
        _check_context(config, weights.source, trained, context, rows, tower.token_embedding)
        context = trained["ctx"].clone()
    return TextPrompts(rows, context, position=options.position)


def _check_context(
    config: Config,
    source: str,
    trained: Mapping[str, Tensor],
    context: Tensor,
    rows: Placeholders,
    embedding: nn.Module,
) -> None:
    """UserError where trained words do not go with the options or with these classes."""
    found = trained["ctx"]
    if found.ndim != context.ndim:
        has = "words of every class" if found.ndim == 3 else "one set of words for all classes"
        raise UserError(f"vitaclip.per_class: {source} has {has}")
    if found.shape[-2:] != context.shape[-2:]:
        raise UserError(f"vitaclip.context: {source} has {found.shape[-2]} words, not "
                        f"{context.shape[-2]}")  # fmt: skip
    if found.ndim == 2:
        return  # shared words go with any class
    same = len(found) == len(context)
    if same and "tokens" in trained:
        same = torch.equal(trained["tokens"], rows.tokens)
    elif same and "token_suffix" in trained:
        suffix = embedding(rows.tokens[:, 1 + rows.context :])
        same = torch.allclose(trained["token_suffix"].float(), suffix, atol=1e-3)
    if not same:
        raise UserError(
            f"data.labels: {source} has learned words for {len(found)} other classes; for new ones "
            "set vitaclip.text=classifier and classifier.template=name: class names as they are"
        )


def loss(model: Callable[..., Any], batch: Batch) -> tuple[Tensor, Metrics]:
    """Cross entropy over the classes."""
    check_single_labels(batch, method="vitaclip")
    # A DeepSpeed engine knows; a bare model steps after every batch.
    ends_step = getattr(model, "is_gradient_accumulation_boundary", lambda: True)()
    logits: Tensor = model(batch.pixels, ends_step=ends_step)  # [B, C]
    hits = logits.detach().argmax(dim=-1) == batch.labels
    return F.cross_entropy(logits, batch.labels), {"accuracy": hits.float().mean()}


def score(model: nn.Module, videos: Sequence[VideoViews], chunk: int) -> Tensor:
    """Probabilities [len(videos), C]: the mean over a video's views of their softmax."""
    assert isinstance(model, VitaCLIP)
    views = embed_distinct(model.encode_clips, videos, chunk)
    scale = model.logit_scale.float().exp()
    logits = partial(cosine_logits, rows=model.classifier, scale=scale)
    return view_scores(views, logits, kernels=kernels_of(model))


def param_groups(model: nn.Module, config: Config) -> list[dict[str, Any]]:
    """One group with everything that trains; all of it decays, as in the official code."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    options = config.optim
    return [
        {
            "name": "prompts",
            "params": trained,
            "lr": options.lr,
            "weight_decay": options.weight_decay,
        }
    ]


METHOD = Method(
    build=build,
    loss=loss,
    score=score,
    param_groups=param_groups,
    cost=cost,
    pipeline="evl",
)
