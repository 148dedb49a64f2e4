"""The recorded outputs of Text4Vis and BIKE as files, and the model that they belong to."""

from __future__ import annotations

import json
import zipfile
import zlib
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from torch import Tensor

from kineticlip.models.architectures import Architecture, ResNetShape, TextShape, VisionShape
from kineticlip.runtime.errors import UserError

EMBEDDINGS = 5e-5  # of embeddings and logits, float32 on a CPU: another order of sums
PROBABILITIES = 1e-5
LOSSES = 1e-5
SUMS = 1e-3  # of normalised pixels; one grey level of one pixel is 0.015


class Golden:
    """One folder of recorded outputs. FileNotFoundError, with its name, for a file it lacks."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def path(self, name: str) -> Path:
        path = self.folder / name
        if not path.is_file():
            raise FileNotFoundError(2, "no such file", str(path))
        return path

    def json(self, name: str) -> Any:
        path = self.path(f"{name}.json")
        try:
            return json.loads(path.read_text(encoding="utf-8"))
        except ValueError as error:
            raise UserError(f"{path}: damaged: {error}") from None

    def arrays(self, name: str) -> dict[str, NDArray[Any]]:
        path = self.path(f"{name}.npz")
        try:
            with np.load(path) as archive:
                return dict(archive)
        except (ValueError, OSError, EOFError, zipfile.BadZipFile, zlib.error) as error:
            raise UserError(f"{path}: damaged: {error}") from None

    def tensors(self, name: str) -> dict[str, Tensor]:
        """Floats widened to float32: weights are stored as the float16 that they are."""
        return self._safetensors(name)[0]

    def metadata(self, name: str) -> dict[str, str]:
        return self._safetensors(name)[1]

    def _safetensors(self, name: str) -> tuple[dict[str, Tensor], dict[str, str]]:
        path = self.path(f"{name}.safetensors")
        try:
            with safe_open(path, "pt") as file:
                stored = {key: file.get_tensor(key) for key in file.keys()}
                metadata = dict(file.metadata() or {})
        except (SafetensorError, OSError) as error:
            raise UserError(f"{path}: damaged: {error}") from None
        widened = {k: t.float() if t.is_floating_point() else t for k, t in stored.items()}
        return widened, metadata

    @cached_property
    def sizes(self) -> dict[str, Any]:
        sizes: dict[str, Any] = self.json("model_config")
        return sizes

    @cached_property
    def text(self) -> TextShape:
        sizes = self.sizes
        return TextShape(
            width=sizes["TW"],
            heads=sizes["TW"] // 64,
            layers=sizes["TL"],
            embed=sizes["E"],
            mlp_width=4 * sizes["TW"],
            context=sizes["ctx"],
            vocabulary=sizes["V"],
        )

    @cached_property
    def vit(self) -> Architecture:
        sizes = self.sizes
        vision = VisionShape(
            resolution=sizes["res"],
            patch=sizes["P"],
            width=sizes["W"],
            layers=sizes["L"],
            heads=sizes["W"] // 64,
            embed=sizes["E"],
            mlp_width=4 * sizes["W"],
        )
        return Architecture(name="recorded ViT", vision=vision, text=self.text)

    @cached_property
    def resnet(self) -> Architecture:
        sizes = self.sizes["rn"]
        first, second, third, fourth = sizes["layers"]
        vision = ResNetShape(
            resolution=sizes["res"],
            width=sizes["width"],
            layers=(first, second, third, fourth),
            heads=sizes["width"] * 32 // 64,
            embed=self.sizes["E"],
        )
        return Architecture(name="recorded ResNet", vision=vision, text=self.text)

    @cached_property
    def class_names(self) -> tuple[str, ...]:
        rows = len(self.tensors("case_text")["text_features"])
        return tuple(f"class {number}" for number in range(rows))


def normalised(pixels: Tensor, shape: VisionShape | ResNetShape) -> Tensor:
    """uint8 [..., 3, S, S] -> float32, in the official order of operations."""
    of = shape.statistics
    mean, std = torch.tensor(of.mean).view(3, 1, 1), torch.tensor(of.std).view(3, 1, 1)
    return (pixels.float() / 255 - mean) / std


def ratios(actual: Any, expected: Any) -> NDArray[np.float64]:
    """actual / expected, 1 where both are 0: compared with ones, that is a relative tolerance."""
    got, want = np.asarray(actual, dtype=np.float64), np.asarray(expected, dtype=np.float64)
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.where(got == want, 1.0, got / want)
