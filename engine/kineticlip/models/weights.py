"""Where CLIP weights come from: an open_clip tag, a Hugging Face repository, a file, or nowhere."""

from __future__ import annotations

import hashlib
import json
import logging
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

from torch import Tensor

from kineticlip.data.statistics import PixelStatistics
from kineticlip.formats import clip_part, read_checkpoint, round_like_clip
from kineticlip.formats.trained import trained_from
from kineticlip.models.architectures import (
    Architecture,
    VisionShape,
    architecture,
    recognise,
    with_activation,
)
from kineticlip.models.fetch import fetch_from_hub, fetch_url
from kineticlip.runtime.errors import UserError, did_you_mean

log = logging.getLogger(__name__)

HUB_FILES = ("open_clip_model.safetensors", "open_clip_pytorch_model.bin", "model.safetensors")
FILE_SUFFIXES = (".pt", ".pth", ".bin", ".safetensors")


@dataclass(frozen=True)
class Weights:
    """Weights found on this machine, or none (`path` None): random, from the run's seed.

    model: the architecture with the activation and pixel statistics that these weights want.
    source: what the user wrote.
    rounded: a CLIP file's products go through fp16, as the official clip.load sends them.
    """

    model: Architecture
    source: str
    path: Path | None
    rounded: bool = False

    @cached_property
    def contents(self) -> dict[str, Tensor]:
        """Everything in the file under our names, float32. UserError where it cannot be read."""
        assert self.path is not None
        checkpoint = read_checkpoint(self.path)
        tensors = {
            name: tensor.float() if tensor.is_floating_point() else tensor
            for name, tensor in checkpoint.tensors.items()
        }
        return round_like_clip(tensors) if self.rounded and checkpoint.is_clip else tensors

    @property
    def has_visual(self) -> bool:
        """Whether the file holds a visual tower, and not a method's own parts alone."""
        return any(name.startswith("visual.") for name in self.contents)

    @property
    def tensors(self) -> dict[str, Tensor]:
        """The contents: both towers, and a method's own parts. UserError without a tower."""
        if not self.has_visual:
            raise UserError(f"{self.path}: holds no visual tower of CLIP")
        return self.contents

    @property
    def clip(self) -> dict[str, Tensor]:
        """Both towers and the logit scale, OpenAI's names; a file may lack the text tower."""
        return clip_part(self.tensors)

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 of the file."""
        assert self.path is not None
        digest = hashlib.sha256()
        with self.path.open("rb") as file:
            while block := file.read(1 << 20):
                digest.update(block)
        return digest.hexdigest()

    def check_fits(self) -> None:
        """UserError with a guess at the right name where the file is another architecture's."""
        found = recognise(self.tensors)
        if isinstance(self.model.vision, VisionShape) and found not in (None, self.model.name):
            raise UserError(
                f"{self.source}: weights of {found}, not of {self.model.name} (model.arch)"
            )


def resolve_weights(
    arch: str, weights: str, *, key: str = "model.weights", rounded: bool = False
) -> Weights:
    """Finds the weights, fetching them if they are not here. `key` is the config key, for messages.

    weights: an open_clip tag (`openai`, `laion2b_s34b_b88k`), `hf-hub:owner/name`, a file of any
    known format, or `random`. rounded: see `Weights`. Raises one-line UserErrors; without a
    network within seconds.
    """
    return replace(_resolve(arch, weights, key), rounded=rounded)


def _resolve(arch: str, weights: str, key: str) -> Weights:
    model = architecture(arch)
    if weights == "random":
        return Weights(model, weights, None)
    if weights.startswith("hf-hub:"):
        return _from_hub(model, weights, key)
    if Path(weights).is_file():
        return Weights(_as_trained(model, Path(weights)), weights, Path(weights))
    tags = _tags(model.name)
    tag = weights.lower().replace("-", "_")
    if tag in tags:
        return _from_tag(model, weights, tags[tag], key)
    if "/" in weights or weights.endswith(FILE_SUFFIXES):
        raise UserError(f"{key}: no such file: {weights}")
    known = (*tags, "random")
    raise UserError(f"{key}: no weights '{weights}' for {arch}. {did_you_mean(weights, known)}")


def _as_trained(model: Architecture, path: Path) -> Architecture:
    """The architecture as the weights wanted it that the run which wrote a file began from.

    A file of another origin says nothing about that: activation and pixel statistics are those of
    the architecture's name.
    """
    origin, seen = trained_from(path), {path.resolve()}
    while Path(origin).is_file() and Path(origin).resolve() not in seen:
        seen.add(Path(origin).resolve())
        origin = trained_from(origin)
    if origin.startswith("hf-hub:"):
        return _as_on_hub(model, origin.removeprefix("hf-hub:"))
    tags, tag = _tags(model.name), origin.lower().replace("-", "_")
    if tag in tags:
        return _as_published(model, tags[tag])
    if origin not in ("", "random"):
        log.warning(
            "%s: trained from %s, which is not here: activation and pixel statistics are those "
            "of %s",
            *(path, origin, model.name),
        )
    return model


def _tags(name: str) -> dict[str, dict[str, Any]]:
    """open_clip's published weights of a model: tag -> where they are and what they want."""
    from open_clip import pretrained

    found = {}
    for model_name in (f"{name}-quickgelu", name):
        quick = model_name.endswith("-quickgelu")
        for tag in pretrained.list_pretrained_tags_by_model(model_name):
            entry = pretrained.get_pretrained_cfg(model_name, tag)
            found[tag] = {"quick_gelu": quick, **entry}
    return found


def _from_tag(model: Architecture, weights: str, entry: Mapping[str, Any], key: str) -> Weights:
    model = _as_published(model, entry)
    repository, filename = os.path.split(entry.get("hf_hub", ""))
    url = entry.get("url", "")
    attempts: list[Callable[[], Path | str]] = []
    if repository:
        stem = filename.removesuffix(".bin").removesuffix(".pth")
        names = (f"{stem}.safetensors", filename) if filename else HUB_FILES[:2]
        attempts.append(partial(fetch_from_hub, repository, names))
    if url:
        attempts.append(partial(fetch_url, url))
    reasons = []
    for fetch in attempts:
        found = fetch()
        if isinstance(found, Path):
            return Weights(model, weights, found)
        reasons.append(found)
    raise _unavailable(f"'{weights}' of {model.name}", reasons, key)


def _from_hub(model: Architecture, weights: str, key: str) -> Weights:
    repository = weights.removeprefix("hf-hub:")
    found = fetch_from_hub(repository, HUB_FILES)
    if not isinstance(found, Path):
        raise _unavailable(f"'{weights}'", [found], key)
    return Weights(_as_on_hub(model, repository), weights, found)


def _as_published(model: Architecture, entry: Mapping[str, Any]) -> Architecture:
    return _adapted(model, entry["quick_gelu"], entry.get("mean"), entry.get("std"))


def _as_on_hub(model: Architecture, repository: str) -> Architecture:
    settings = fetch_from_hub(repository, ("open_clip_config.json",))
    if not isinstance(settings, Path):
        return model
    config = json.loads(settings.read_text())
    pixels = config.get("preprocess_cfg", {})
    quick = bool(config.get("model_cfg", {}).get("quick_gelu"))
    return _adapted(model, quick, pixels.get("mean"), pixels.get("std"))


def _adapted(model: Architecture, quick_gelu: bool, mean: Any, std: Any) -> Architecture:
    """The architecture with the activation and pixel statistics that published weights want."""
    model = with_activation(model, "quick_gelu" if quick_gelu else "gelu")
    if mean is None or std is None:
        return model
    statistics = PixelStatistics(mean=tuple(mean), std=tuple(std))
    return replace(model, vision=replace(model.vision, statistics=statistics))


def _unavailable(what: str, reasons: list[str], key: str) -> UserError:
    why = "; ".join(reasons) or "nothing is published"
    return UserError(
        f"{key}: weights {what} are not on this machine and cannot be fetched ({why}). "
        f"Give {key} a file of CLIP weights, or 'random' for untrained ones"
    )
