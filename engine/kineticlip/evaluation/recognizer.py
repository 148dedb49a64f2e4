"""A recogniser ready to use: configuration, weights and class names made into a model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor, nn

from kineticlip.config import Config, Text4VisConfig, config_from_dict
from kineticlip.data.scoring_loader import views_of
from kineticlip.data.statistics import PixelStatistics
from kineticlip.evaluation.fingerprint import UNTRAINED
from kineticlip.evaluation.loop import Scored, score_stream
from kineticlip.evaluation.ready import ReadyModel, ready, ready_for_run
from kineticlip.formats import read_checkpoint
from kineticlip.formats.trained import load_weights
from kineticlip.methods import method_named
from kineticlip.methods.method import Method, as_video_model
from kineticlip.methods.trunk import statistics_of
from kineticlip.models.architectures import architecture, recognise
from kineticlip.models.weights import resolve_weights
from kineticlip.runtime.errors import UserError

TEXT_TOWER = "token_embedding.weight"  # a file with this has the tower whole


@dataclass(frozen=True, kw_only=True)
class Prediction:
    """One video's classes, best first, with their probabilities."""

    video: str
    ranking: tuple[tuple[str, float], ...]
    frames: int
    views: int
    decoder: str


@dataclass(frozen=True, kw_only=True)
class Recognizer:
    """A model ready to score on its device, with everything its results depend on.

    weights: what identifies the tensors, the SHA-256 of their file or UNTRAINED. statistics: what
    the weights want pixels to be normalised with.
    """

    config: Config
    class_names: tuple[str, ...]
    method: Method
    ready: ReadyModel
    weights: str
    statistics: PixelStatistics

    @property
    def model(self) -> nn.Module:
        return self.ready.model

    @property
    def device(self) -> torch.device:
        return self.ready.device

    @property
    def untrained(self) -> bool:
        return self.weights == UNTRAINED

    @property
    def classifier(self) -> Tensor | None:
        """The frozen matrix [C, E] that scores are taken with, for methods that have one."""
        rows = as_video_model(self.model).classifier
        return rows.detach().float().cpu() if rows is not None else None

    def for_run(self, images: int) -> Recognizer:
        """The same, its model in the steady state of a run of about `images` images."""
        return replace(self, ready=ready_for_run(self.ready, self.config, images=images))

    def predict(self, video: str | Path) -> Prediction:
        """Ranks the classes for one video file or frame folder, with the configured views.

        Raises VideoError where it cannot be decoded.
        """
        views = views_of(
            video, self.config, statistics=self.statistics, pipeline=self.method.pipeline
        )
        stream = score_stream(
            self.model, self.method, [views], device=self.device, chunk=self.ready.chunk
        )
        item = next(stream)
        assert isinstance(item, Scored)
        scores, order = item.scores.sort(descending=True, stable=True)
        ranking = zip(order.tolist(), scores.tolist(), strict=True)
        return Prediction(
            video=str(video),
            ranking=tuple((self.class_names[number], score) for number, score in ranking),
            frames=item.video.num_frames,
            views=item.video.num_views,
            decoder=item.video.decoder,
        )


def with_weights(config: Config, weights: str, labels: str = "") -> Config:
    """The configuration of a run with these weights in place of its own.

    weights: a file, an open_clip tag or `random`. Text features come from their own text tower;
    from the one that training used where a fine-tuned file holds none. labels: classes to score
    instead of the configured ones, which then count as the classes of training.
    """
    own_text = not Path(weights).is_file() or TEXT_TOWER in read_checkpoint(weights).tensors
    text_weights = config.classifier.text_weights or (weights if own_text else config.model.weights)
    model = replace(config.model, weights=weights)
    classifier = replace(config.classifier, text_weights=text_weights)
    config = replace(config, model=model, classifier=classifier)
    if labels and labels != config.data.labels:
        config = scoring_others(config)
        config = replace(config, data=replace(config.data, labels=labels))
    return config


def scoring_others(config: Config) -> Config:
    """The configuration for other classes than its own, which were those of training."""
    trained = config.classifier.training_labels or config.data.labels
    return replace(config, classifier=replace(config.classifier, training_labels=trained))


def plain_clip(arch: str | None = None) -> Config:
    """CLIP itself, its frame embeddings averaged: there is no part that has to be trained."""
    config = Config(name="clip", text4vis=Text4VisConfig(header="mean"))
    if arch is None:
        return config
    resolution = architecture(arch).vision.resolution
    return replace(
        config,
        model=replace(config.model, arch=arch),
        data=replace(config.data, resolution=resolution),
    )


def config_of(weights: str) -> Config:
    """The configuration that a weights file carries, which KinetiCLIP's own do.

    Its data.labels is the file itself, which carries the class names: the label file of training
    may be elsewhere by now. CLIP as it was published carries none and needs none: its tensors'
    shapes tell the architecture. UserError for any other file.
    """
    found = load_weights(weights)
    if not found.config:
        published = read_checkpoint(weights)
        arch = recognise(published.tensors) if published.is_clip else None
        if arch is None:
            raise UserError(f"{weights}: carries no configuration: give --config as well")
        return plain_clip(arch)
    config = config_from_dict(found.config, weights)
    if not found.class_names:
        return config
    return replace(config, data=replace(config.data, labels=str(weights)))


def load_recognizer(
    config: Config,
    class_names: Sequence[str],
    *,
    device: torch.device,
    with_reference: bool = False,
) -> Recognizer:
    """Builds the configured model and makes it ready to score on `device`.

    Raises UserError where weights are missing for a part that has to be trained: a score of a
    random head looks like any other. `model.weights: random` runs, marked as untrained.
    with_reference: of an 8-bit model keep the one in bf16 too.
    """
    method = method_named(config.method)
    model = method.build(config, class_names)
    missing = as_video_model(model).untrained
    if missing and config.model.weights != "random":
        raise UserError(
            f"{config.model.weights}: no trained weights for {', '.join(missing)}; give --weights "
            "a fine-tuned checkpoint, or 'random' to run untrained"
        )
    identity = UNTRAINED
    if config.model.weights != "random":
        identity = resolve_weights(config.model.arch, config.model.weights).fingerprint
    statistics = statistics_of(model)
    return Recognizer(
        config=config,
        class_names=tuple(class_names),
        method=method,
        ready=ready(model, config, device=device, with_reference=with_reference),
        weights=identity,
        statistics=statistics,
    )


def pick_device() -> torch.device:
    """The first GPU that torch sees, else the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")
