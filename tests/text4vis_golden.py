"""Outputs of the official Text4Vis and BIKE codes, and the model they came from."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
from safetensors.torch import load_file
from torch import Tensor

from kineticlip.models.architectures import Architecture, TextShape, VisionShape

GOLDEN = Path(__file__).parent / "golden" / "text4vis"
SHAPE = json.loads((GOLDEN / "model_config.json").read_text())
FRAMES = SHAPE["T"]
ATOL = 5e-5  # of embeddings and logits: another order of fp32 sums

VISION = VisionShape(
    resolution=SHAPE["res"],
    patch=SHAPE["P"],
    width=SHAPE["W"],
    layers=SHAPE["L"],
    heads=SHAPE["W"] // 64,
    embed=SHAPE["E"],
    mlp_width=4 * SHAPE["W"],
)
ARCHITECTURE = Architecture(
    name="golden",
    vision=VISION,
    text=TextShape(
        width=SHAPE["TW"],
        heads=SHAPE["TW"] // 64,
        layers=SHAPE["TL"],
        embed=SHAPE["E"],
        mlp_width=4 * SHAPE["TW"],
        context=SHAPE["ctx"],
        vocabulary=SHAPE["V"],
    ),
)


def tensors(name: str) -> dict[str, Tensor]:
    """One safetensors file, weights widened from the fp16 they are stored in."""
    loaded = load_file(GOLDEN / f"{name}.safetensors")
    return {
        key: value.float() if value.is_floating_point() else value for key, value in loaded.items()
    }


def arrays(name: str) -> dict[str, np.ndarray]:
    with np.load(GOLDEN / f"{name}.npz") as archive:
        return dict(archive)


def under(prefix: str, state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The entries below a prefix, without it."""
    return {key[len(prefix) :]: value for key, value in state.items() if key.startswith(prefix)}
