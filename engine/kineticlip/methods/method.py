"""What the engine knows of a method: a record of functions, and what its model offers.

Whatever is not here, neither loop, command nor report may ask for. Shape letters: B clips,
T frames, S side in pixels, M images, N tokens, D width, E embedding, C classes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol, cast

from torch import Tensor, nn

from kineticlip.config import Config
from kineticlip.data.batch import Batch, VideoViews
from kineticlip.models.architectures import Architecture
from kineticlip.models.cost import Part
from kineticlip.models.weights import Weights, resolve_weights

Metrics = dict[str, Tensor]


class VideoModel(Protocol):
    """What a method's model offers beside being an `nn.Module`."""

    @property
    def visual(self) -> nn.Module:
        """The trunk, a CLIP tower of `models`; its parameters are `visual.*` in every file.

        Evaluation casts, packs and compiles it, or puts a recorded twin in its place.
        """

    @property
    def untrained(self) -> tuple[str, ...]:
        """Attributes of the model that no weights were found for, so that none is scored."""

    @property
    def classifier(self) -> Tensor | None:
        """Unit rows [C, E] that scores are taken with; None where they depend on the video."""

    @property
    def plain_tower(self) -> bool:
        """Whether `visual` is only ever called as visual(images [M, 3, S, S]) -> [M, E].

        Each image by itself: no sources, taps or offsets, and no frames mixed inside.
        """

    def __call__(self, pixels: Tensor) -> Any:
        """pixels [B, T, 3, S, S], uint8 or float32 already normalised -> logits [B, C].

        Where there is a feature cut, also rows [B, T, ...] of it in place of pixels.
        """


def as_video_model(model: nn.Module) -> VideoModel:
    """A built model as the record promises it."""
    return cast(VideoModel, model)


@dataclass(frozen=True)
class Cut:
    """Where a frozen trunk is cut, to store what comes out and train the rest on it.

    name: what comes out, for people and to tell stores apart; encode: images [M, 3, S, S] ->
    rows [M, ...], which the model takes in place of the images.
    """

    name: str
    encode: Callable[[Tensor], Tensor]


@dataclass(frozen=True, kw_only=True)
class Method:
    """What one method adds to the trunk.

    build(config, class_names) makes a VideoModel with its weights loaded.
    loss(model, batch) gives the scalar to minimise and what to log; it calls `model(...)`, which
    may be a wrapper such as a DeepSpeed engine.
    score(model, videos, chunk) gives probabilities [len(videos), C] in float32, views aggregated as
    the official code does; the trunk sees at most `chunk` images at a time.
    param_groups(model, config) gives optimiser groups with their own `lr`; frozen parameters
    are in none.
    cost(config, model, classes) gives the parts of an architecture's model, with parameters and
    multiply-adds, for `kineticlip info`; UserError where the method does not run on it.
    before_training(model, config) makes what training alone needs, before the engine takes the
    model over; it gives the originals, by name, of frozen parameters that it rounded.
    feature_cut(model) gives the place with the fewest numbers behind which nothing frozen is lost;
    UserError for a trunk that trains or sees whole clips. None: the method has no such place.
    with_trunk(config, weights) gives the configuration whose trunk comes from these weights where
    model.weights is a file without one.
    pipeline names the sampling and pixel rules of the official code (data.pipeline auto).
    clip_load: the official code opens CLIP with clip.load, which rounds products to fp16; see
    model.rounding.
    """

    build: Callable[[Config, Sequence[str]], nn.Module]
    loss: Callable[[Callable[..., Any], Batch], tuple[Tensor, Metrics]]
    score: Callable[[nn.Module, Sequence[VideoViews], int], Tensor]
    param_groups: Callable[[nn.Module, Config], list[dict[str, Any]]]
    cost: Callable[[Config, Architecture, int], list[Part]]
    before_training: Callable[[nn.Module, Config], dict[str, Tensor]] = lambda model, config: {}
    feature_cut: Callable[[nn.Module], Cut] | None = None
    with_trunk: Callable[[Config, str], Config] = lambda config, weights: config
    pipeline: Literal["text4vis", "evl", "bike"] = "text4vis"
    clip_load: bool = False

    def rounds_clip(self, config: Config) -> bool:
        """Whether CLIP's own weights go through fp16 in this configuration."""
        return self.clip_load and config.model.rounding == "official"

    def weights(self, config: Config) -> Weights:
        """The weights of config.model, rounded as the official code rounds them."""
        return resolve_weights(
            config.model.arch, config.model.weights, rounded=self.rounds_clip(config)
        )
