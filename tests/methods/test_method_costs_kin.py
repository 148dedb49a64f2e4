"""Counts of the methods beside Text4Vis, EVL and Vita-CLIP, against torch's counter and models."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from kineticlip.__main__ import main
from kineticlip.config import Config, load_config
from kineticlip.methods import METHODS
from kineticlip.models.architectures import VisionShape, architecture
from kineticlip.models.cost import Part, text, totals

CONFIGS = Path(__file__).parents[2] / "configs"
NAMES = tuple("abcde")
TINY = architecture("ViT-tiny-16")
FRAMES = 4


def settings(method: str) -> Config:
    return load_config(
        None,
        [
            f"method={method}", "model.arch=ViT-tiny-16", "model.weights=random",
            f"data.num_frames={FRAMES}", "data.resolution=64", "xclip.prompt_heads=2",
            "model.attention=reference", "model.kernels=reference", "text4vis.header_layers=2",
        ],
    )  # fmt: skip


def counted(model: Any) -> int:
    """Multiply-adds of one clip, the text encoded before."""
    pixels = torch.zeros(1, FRAMES, 3, 64, 64)
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH):  # torch does not count the CPU's flash
        model(pixels)
        with FlopCounterMode(display=False) as counter:
            model(pixels)
    return counter.get_total_flops() // 2


def found(method: str) -> tuple[Any, list[Part]]:
    config = settings(method)
    parts = METHODS[method].cost(config, TINY, len(NAMES))
    return METHODS[method].build(config, NAMES).eval(), parts


def seen(method: str, sums: int) -> int:
    """What torch counts of our multiply-adds, and the scores of the classes that it counts too."""
    shape = TINY.vision
    assert isinstance(shape, VisionShape)
    if method == "xclip":
        # A message token's weights times its value: one inner number is no product for torch.
        return sums - shape.layers * FRAMES * shape.tokens * shape.width
    return sums + len(NAMES) * TINY.embed


@pytest.mark.parametrize("method", ["xclip", "openvclip", "vificlip"])
def test_multiply_adds_are_torchs(method: str) -> None:
    model, parts = found(method)
    assert counted(model) == seen(method, totals(parts).ours)


@pytest.mark.parametrize("method", ["xclip", "openvclip", "vificlip", "actionclip"])
def test_parameters_are_the_models(method: str) -> None:
    model, parts = found(method)
    tower = text(TINY.text, 1).parameters
    own = sum(p.numel() for p in model.parameters())
    has_text = any(name.startswith("token_embedding") for name, _ in model.named_parameters())
    assert totals(parts).parameters == own - (tower if has_text else 0)
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert totals(parts).trained == trained


def test_actionclip_counts_tower_and_header() -> None:
    """Its forward is that of a training batch: the parts are counted by themselves."""
    model, parts = found("actionclip")
    pixels = torch.zeros(FRAMES, 3, 64, 64)
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model.fusion_model(model.visual(pixels)[None])
    assert counter.get_total_flops() // 2 == totals(parts).ours
    (tower,) = (part for part in parts if part.once)
    assert tower.official == text(TINY.text, 16 * len(NAMES)).official


@pytest.mark.parametrize(
    ("recipe", "published"),
    [
        ("k400-xclip-vitb32-f8", 39),
        ("k400-xclip-vitb16-f8", 145),
        ("k400-xclip-vitb16-f16", 287),
        ("k400-xclip-vitl14-f8", 658),
        ("k400-xclip-vitl14_336-f16", 3086),
    ],
)
def test_xclip_costs_what_its_authors_say(
    recipe: str, published: int, capsys: pytest.CaptureFixture[str]
) -> None:
    """Within 2.5 %, and never more: theirs count norms and additions too."""
    assert main(["info", str(CONFIGS / f"{recipe}.yaml"), "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    official = report["totals"]["official"] / 1e9
    assert 0.975 * published < official < published


def test_neighbours_cost_attention_only(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["info", str(CONFIGS / "k400-openvclip-vitb16-f8.yaml"), "--json"]
    assert main(arguments) == 0
    report = json.loads(capsys.readouterr().out)
    parts = {part["name"]: part for part in report["parts"]}
    assert (
        parts["attention to neighbouring frames"]["official"]
        == 2 * (parts["visual attention"]["official"])
    )
    assert report["totals"]["trained"] == 86_192_640 + 1
    assert main([*arguments, "--set", "model.arch=RN50"]) == 2
    assert "RN50 is a ResNet; Open-VCLIP needs a ViT" in capsys.readouterr().err
