"""The record that a video recogniser is made of; the loops know nothing else about it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from torch import Tensor, nn

from kineticlip.config import Config
from kineticlip.data.batch import Batch, VideoViews

Metrics = dict[str, Tensor]


@dataclass(frozen=True, kw_only=True)
class Method:
    """What one method adds to the trunk.

    build(config, class_names) makes the model, weights loaded. Its forward maps pixels
    [B, T, 3, S, S] (uint8, or float32 already normalised) to logits [B, C].
    loss(model, batch) gives the scalar to minimise and what to log; it calls `model(...)`, which
    may be a wrapper such as a DeepSpeed engine.
    score(model, videos, chunk) gives probabilities [len(videos), C] in float32, views aggregated as
    the official code does; the trunk sees at most `chunk` images at a time.
    param_groups(model, config) gives optimiser groups with their own `lr`; frozen parameters
    are in none.
    prepare(model, config) makes what training alone needs, before the engine takes the model
    over; it gives the originals, by name, of frozen parameters that it rounded.
    pipeline names the sampling and pixel rules of the official code (data.pipeline auto).
    """

    build: Callable[[Config, Sequence[str]], nn.Module]
    loss: Callable[[Callable[..., Any], Batch], tuple[Tensor, Metrics]]
    score: Callable[[nn.Module, Sequence[VideoViews], int], Tensor]
    param_groups: Callable[[nn.Module, Config], list[dict[str, Any]]]
    prepare: Callable[[nn.Module, Config], dict[str, Tensor]] = lambda model, config: {}
    pipeline: Literal["text4vis", "evl", "bike"] = "text4vis"
