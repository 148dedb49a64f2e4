"""Shapes of the CLIP models: a table of OpenAI's, and open_clip's own config files for the rest."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cache
from typing import Any, Literal

from torch import Tensor

from kineticlip.data.statistics import CLIP_STATISTICS, PixelStatistics
from kineticlip.runtime.errors import UserError, did_you_mean

Activation = Literal["quick_gelu", "gelu"]


@dataclass(frozen=True, kw_only=True)
class VisionShape:
    """A CLIP ViT: patches, class token, learned positions, pre-LN blocks, projection to `embed`."""

    resolution: int
    patch: int
    width: int
    layers: int
    heads: int
    embed: int
    mlp_width: int
    activation: Activation = "quick_gelu"
    statistics: PixelStatistics = CLIP_STATISTICS
    height: int = 0  # of images that are not square, which are `resolution` wide

    @property
    def grid(self) -> int:
        return self.resolution // self.patch

    @property
    def rows(self) -> int:
        """Patches from top to bottom; `grid` of them stand side by side."""
        return (self.height or self.resolution) // self.patch

    @property
    def tokens(self) -> int:
        """N: the class token and the patches."""
        return self.rows * self.grid + 1


@dataclass(frozen=True, kw_only=True)
class ResNetShape:
    """CLIP's modified ResNet: three-convolution stem, anti-aliased strides, attention pooling."""

    resolution: int
    width: int
    layers: tuple[int, int, int, int]
    heads: int
    embed: int
    statistics: PixelStatistics = CLIP_STATISTICS


@dataclass(frozen=True, kw_only=True)
class TextShape:
    """The causal text transformer; its feature is the end-of-text token's, projected to `embed`."""

    width: int
    heads: int
    layers: int
    embed: int
    mlp_width: int
    context: int = 77
    vocabulary: int = 49408
    activation: Activation = "quick_gelu"


@dataclass(frozen=True, kw_only=True)
class Architecture:
    """Both towers under one name."""

    name: str
    vision: VisionShape | ResNetShape
    text: TextShape

    @property
    def embed(self) -> int:
        """E: the width in which images and sentences meet."""
        return self.text.embed

    @property
    def header_heads(self) -> int:
        """Heads of a temporal transformer on the embeddings: the text tower's, as Text4Vis has."""
        return self.text.width // 64


def _vit(
    name: str, resolution: int, patch: int, width: int, layers: int, embed: int, text_width: int
) -> Architecture:
    return Architecture(
        name=name,
        vision=VisionShape(
            resolution=resolution,
            patch=patch,
            width=width,
            layers=layers,
            heads=width // 64,
            embed=embed,
            mlp_width=4 * width,
        ),
        text=_text(text_width, embed),
    )


def _resnet(
    name: str,
    resolution: int,
    width: int,
    layers: tuple[int, int, int, int],
    embed: int,
    text_width: int,
) -> Architecture:
    vision = ResNetShape(
        resolution=resolution, width=width, layers=layers, heads=width * 32 // 64, embed=embed
    )
    return Architecture(name=name, vision=vision, text=_text(text_width, embed))


def _text(width: int, embed: int, layers: int = 12) -> TextShape:
    return TextShape(
        width=width, heads=width // 64, layers=layers, embed=embed, mlp_width=4 * width
    )


_TABLE = {
    model.name: model
    for model in (
        _vit("ViT-B-32", 224, 32, 768, 12, 512, 512),
        _vit("ViT-B-16", 224, 16, 768, 12, 512, 512),
        _vit("ViT-L-14", 224, 14, 1024, 24, 768, 768),
        _vit("ViT-L-14-336", 336, 14, 1024, 24, 768, 768),
        _resnet("RN50", 224, 64, (3, 4, 6, 3), 1024, 512),
        _resnet("RN101", 224, 64, (3, 4, 23, 3), 512, 512),
        _resnet("RN50x4", 288, 80, (4, 6, 10, 6), 640, 640),
        _resnet("RN50x16", 384, 96, (6, 8, 18, 8), 768, 768),
        _resnet("RN50x64", 448, 128, (3, 15, 36, 10), 1024, 1024),
    )
}
# No released weights: small enough to train from nothing on a CPU in a demonstration.
_TINY = _vit("ViT-tiny-16", 64, 16, 128, 4, 128, 128)
_TABLE[_TINY.name] = replace(_TINY, text=_text(128, 128, layers=4))

# Fields of open_clip's configs that a plain CLIP ViT may have; any other is another architecture.
_VISION_FIELDS = {"image_size", "layers", "width", "head_width", "mlp_ratio", "patch_size"}
_TEXT_FIELDS = {"context_length", "vocab_size", "width", "heads", "layers", "mlp_ratio"}


def architecture(name: str) -> Architecture:
    """The model under open_clip's or OpenAI's spelling: `ViT-L-14-336`, `ViT-L/14@336px`.

    The models of the table are OpenAI's and use QuickGELU. Weights that open_clip trained with
    the exact GELU need it too: `weights.resolve_weights` knows that of its tags, and the suffixes
    `-gelu` and `-quickgelu` say it of a file. Raises UserError for an unknown or unfit name.
    """
    base = name.replace("/", "-").replace("@", "-").removesuffix("px")
    if base in _TABLE:
        return _TABLE[base]
    for suffix, activation in (("-quickgelu", "quick_gelu"), ("-gelu", "gelu")):
        stem = base.removesuffix(suffix)
        if stem != base and (stem in _TABLE or stem in _open_clip_configs()):
            return with_activation(architecture(stem), activation)  # type: ignore[arg-type]
    if base in _open_clip_configs():
        return _from_open_clip(base, _open_clip_configs()[base])
    raise UserError(f"model.arch: unknown architecture '{name}'. {did_you_mean(base, known())}")


def with_activation(model: Architecture, activation: Activation) -> Architecture:
    """The same shapes with another activation in both towers; a ResNet has none to change."""
    vision = model.vision
    if isinstance(vision, VisionShape):
        vision = replace(vision, activation=activation)
    return replace(model, vision=vision, text=replace(model.text, activation=activation))


def known() -> list[str]:
    """Every name that `architecture` accepts, without suffixes and aliases."""
    fit = {name for name, config in _open_clip_configs().items() if not _differences(config)}
    return sorted(set(_TABLE) | {name for name in fit if not name.endswith("-quickgelu")})


def recognise(state: Mapping[str, Tensor]) -> str | None:
    """The table's name for a CLIP state dict (OpenAI's keys), told by its ViT's tensor shapes."""
    if "visual.conv1.weight" not in state or "visual.positional_embedding" not in state:
        return None
    seen = (
        tuple(state["visual.conv1.weight"].shape),
        len(state["visual.positional_embedding"]),
        sum(key.endswith("in_proj_weight") and key.startswith("visual.") for key in state),
    )
    for name, model in _TABLE.items():
        shape = model.vision
        if isinstance(shape, VisionShape):
            kernel = (shape.width, 3, shape.patch, shape.patch)
            if seen == (kernel, shape.tokens, shape.layers):
                return name
    return None


@cache
def _open_clip_configs() -> dict[str, dict[str, Any]]:
    import open_clip

    found = {}
    for name in open_clip.list_models():
        config = open_clip.get_model_config(name)
        if config is not None:
            found[name] = config
    return found


def _differences(config: Mapping[str, Any]) -> list[str]:
    """What sets an open_clip config apart from a plain CLIP ViT; empty when nothing does."""
    vision, text = config["vision_cfg"], config["text_cfg"]
    odd = sorted(set(vision) - _VISION_FIELDS) + sorted(set(text) - _TEXT_FIELDS)
    odd += sorted(set(config) - {"embed_dim", "quick_gelu", "vision_cfg", "text_cfg"})
    if not isinstance(vision.get("layers"), int) or "patch_size" not in vision:
        odd.append("layers")
    return odd


def _from_open_clip(name: str, config: Mapping[str, Any]) -> Architecture:
    odd = _differences(config)
    if odd:
        raise UserError(
            f"model.arch: '{name}' is not a plain CLIP ViT (it sets {', '.join(odd[:4])}). "
            f"{did_you_mean(name, known())}"
        )
    vision, text, embed = config["vision_cfg"], config["text_cfg"], config["embed_dim"]
    activation: Activation = "quick_gelu" if config.get("quick_gelu") else "gelu"
    return Architecture(
        name=name,
        vision=VisionShape(
            resolution=vision["image_size"],
            patch=vision["patch_size"],
            width=vision["width"],
            layers=vision["layers"],
            heads=vision["width"] // vision.get("head_width", 64),
            embed=embed,
            mlp_width=int(vision["width"] * vision.get("mlp_ratio", 4.0)),
            activation=activation,
        ),
        text=TextShape(
            width=text["width"],
            heads=text["heads"],
            layers=text["layers"],
            embed=embed,
            mlp_width=int(text["width"] * text.get("mlp_ratio", 4.0)),
            context=text["context_length"],
            vocabulary=text["vocab_size"],
            activation=activation,
        ),
    )
