"""Parameters and multiply-adds: published numbers, torch's own counter, and built models."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from kineticlip.__main__ import main
from kineticlip.config import VitaConfig, load_config
from kineticlip.methods import METHODS
from kineticlip.methods.vitaclip_cost import clip_cost
from kineticlip.models.architectures import VisionShape, architecture
from kineticlip.models.cost import Part, text, totals

CONFIGS = Path(__file__).parents[2] / "configs"


def giga(macs: int) -> float:
    return round(macs / 1e9, 2)


def vit_of(name: str) -> VisionShape:
    shape = architecture(name).vision
    assert isinstance(shape, VisionShape)
    return shape


def cost(method: str, name: str, frames: int, *more: str) -> list[Part]:
    """The parts of a method on a named architecture, 400 classes."""
    config = load_config(None, [f"data.num_frames={frames}", *more])
    return METHODS[method].cost(config, architecture(name), 400)


# Published and specified numbers ----------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "frames", "true", "paper"),
    [
        ("ViT-B-32", 8, 35.42, 23.67),
        ("ViT-B-32", 32, 141.69, 94.70),
        ("ViT-B-16", 8, 140.66, 90.26),
        ("ViT-L-14", 8, 648.44, 415.39),
        ("ViT-L-14", 32, 2593.78, 1661.55),
        ("ViT-L-14-336", 8, 1528.02, 932.32),
        ("ViT-L-14-336", 32, 6112.09, 3729.30),
    ],
)
def test_text4vis_costs(name: str, frames: int, true: float, paper: float) -> None:
    sums = totals(cost("text4vis", name, frames))
    assert (giga(sums.official), giga(sums.paper)) == (true, paper)
    assert sums.ours < sums.official


@pytest.mark.parametrize(("frames", "true"), [(8, 49.50), (16, 98.99), (32, 198.00)])
def test_text4vis_costs_with_a_resnet(frames: int, true: float) -> None:
    assert giga(totals(cost("text4vis", "RN50", frames)).official) == true


@pytest.mark.parametrize(
    ("name", "model", "side", "printed"),
    [
        ("ViT-B-32", 106_802_945, 63_428_096, 71.627),
        ("ViT-B-16", 105_146_369, 63_428_096, 69.857),
        ("ViT-L-14", 346_552_577, 123_650_304, 230.386),
        ("ViT-L-14-336", 346_880_257, 123_650_304, 230.386),
        ("RN50", 113_973_089, 63_690_240, None),
    ],
)
def test_text4vis_parameters(name: str, model: int, side: int, printed: float | None) -> None:
    sums = totals(cost("text4vis", name, 8))
    assert sums.parameters == sums.trained == model
    assert text(architecture(name).text, 1).parameters == side
    if printed:
        assert round(sums.paper_parameters / 1e6, 3) == printed


def test_breakdown_of_a_large_tower() -> None:
    parts = {part.name: giga(part.official) for part in cost("text4vis", "ViT-L-14", 8)}
    assert parts["visual patch embedding"] == 1.23
    assert parts["visual q, k, v projections"] == 155.22
    assert parts["visual attention"] == 25.97
    assert parts["visual output projections"] == 51.74
    assert parts["visual MLPs"] == 413.93
    header = sum(part.official for part in header_parts("ViT-L-14", 8))
    assert giga(header + 8 * 1024 * 768) == 0.35  # and the projection


def test_evl_costs_and_parameters() -> None:
    base = totals(cost("evl", "ViT-B-16", 8))
    assert base.trained == 33_183_376
    assert giga(3 * base.paper) == 443.82
    assert giga(3 * base.official) == 453.88
    large = totals(cost("evl", "ViT-L-14", 32))
    assert large.trained == 58_826_128
    assert round(3 * large.paper / 1e9) == 7984
    assert round(3 * large.official / 1e9) == 8085
    wide = cost("evl", "ViT-L-14-336", 32)
    assert totals(wide).trained == 69_049_744
    maps = next(part for part in wide if part.name == "decoder temporal attention")
    assert round(maps.official / 1e9, 1) == 168.5
    backbone = sum(p.official for p in wide if p.name.startswith("visual"))
    assert round(backbone / 1e9) == 6111


@pytest.mark.parametrize(
    ("name", "frames", "official", "ours"),
    [
        ("ViT-B-16", 8, 149.3, 131.7),
        ("ViT-B-16", 16, 303.2, 263.9),
        ("ViT-L-14", 8, 679.2, 629.0),
        ("ViT-L-14-336", 32, 6375.5, 5938.6),
    ],
)
def test_vitaclip_costs(name: str, frames: int, official: float, ours: float) -> None:
    projected = totals(clip_cost(VitaConfig(), vit_of(name), frames, absorbed=False))
    assert round(projected.official / 1e9, 1) == official
    assert round(projected.ours / 1e9, 1) == ours
    found = totals(cost("vitaclip", name, frames))
    assert found.official == projected.official and found.ours < projected.ours


def test_vitaclip_parameters() -> None:
    parts = cost("vitaclip", "ViT-B-16", 8)
    assert totals(parts).trained == 30_158_849
    more = ("vitaclip.context=16", "vitaclip.train_cls_proj=true")
    published = cost("vitaclip", "ViT-B-16", 8, *more)
    assert totals(published).trained == 38_884_353
    frozen = next(part for part in parts if part.name == "class token projections")
    assert (frozen.parameters, frozen.trained) == (7_087_104, 0)


def test_words_that_prompts_start_as_are_counted_one_by_one() -> None:
    """Underscores are spaces: `a_video_of` is three words, which all classes share."""
    parts = cost("vitaclip", "ViT-B-16", 8, "vitaclip.context_words=a_video_of")
    assert next(part for part in parts if part.name == "text prompts").trained == 3 * 512


def header_parts(name: str, frames: int, *more: str) -> list[Part]:
    return [p for p in cost("text4vis", name, frames, *more) if p.name.startswith("header")]


def test_header_counts_are_torchs() -> None:
    from kineticlip.models.temporal import TemporalTransformer

    with torch.device("meta"):
        module = TemporalTransformer(512, 8, layers=2, kernels="reference", attention="reference")
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            module(torch.zeros(1, 5, 512))
    sums = totals(header_parts("ViT-B-16", 5, "text4vis.header_layers=2"))
    assert counter.get_total_flops() // 2 == sums.official == sums.ours
    assert sum(p.numel() for p in module.parameters()) == sums.parameters


def test_a_header_has_as_many_positions_as_the_text_tower() -> None:
    model = architecture("ViT-B-16")
    shorter = replace(model, text=replace(model.text, context=40))
    parts = METHODS["text4vis"].cost(load_config(None), shorter, 400)
    assert next(p for p in parts if p.name == "header positions").parameters == 40 * 512


# The command ------------------------------------------------------------------------------------


def test_info_command(capsys: pytest.CaptureFixture[str]) -> None:
    config = str(CONFIGS / "k400-text4vis-vitb16-f8.yaml")
    assert main(["info", config, "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["totals"]["parameters"] == 105_146_369
    assert report["totals"]["official"] == sum(
        part["official"] for part in report["parts"] if not part["once"]
    )
    assert report["views"] == 12
    assert main(["info", config]) == 0
    printed = capsys.readouterr().out
    assert "140.66" in printed
    assert "as the paper counts: 90.26 GMAC, 69.9 M parameters" in printed
    arguments = ["info", config, "--set", "text4vis.header=mean", "--json"]
    assert main(arguments) == 0
    mean = json.loads(capsys.readouterr().out)
    assert mean["totals"]["parameters"] == 105_146_369 - 18_953_728


def test_info_command_counts_what_the_contrastive_baseline_trains(
    capsys: pytest.CaptureFixture[str],
) -> None:
    def trained(*overrides: str) -> int:
        config = str(CONFIGS / "k400-text4vis-vitb16-f8.yaml")
        pairs = [word for pair in ("method=contrastive", *overrides) for word in ("--set", pair)]
        assert main(["info", config, "--json", *pairs]) == 0
        return int(json.loads(capsys.readouterr().out)["totals"]["trained"])

    assert trained() == 105_146_369 + 63_428_096
    assert trained("contrastive.text=frozen") == 105_146_369
    assert trained("contrastive.text=frozen", "contrastive.train_visual=false") == 18_953_728 + 1


def test_info_command_refuses_what_cannot_be(capsys: pytest.CaptureFixture[str]) -> None:
    config = str(CONFIGS / "k400-text4vis-vitb16-f8.yaml")
    assert main(["info", config, "--set", "data.resolution=336"]) == 2
    assert "ViT-B-16 takes 224 px, not 336" in capsys.readouterr().err
    assert main(["info", config, "--set", "method=nothing"]) == 2
    assert "unknown method 'nothing'" in capsys.readouterr().err
