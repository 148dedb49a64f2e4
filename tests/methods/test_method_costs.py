"""Parameters and multiply-adds: published numbers, torch's own counter, and built models."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from kineticlip.__main__ import main
from kineticlip.methods.cost import evl, header, text4vis, vitaclip
from kineticlip.models.architectures import ResNetShape, TextShape, VisionShape, architecture
from kineticlip.models.cost import Part, resnet, text, totals, vit

CONFIGS = Path(__file__).parents[2] / "configs"
SMALL = VisionShape(resolution=32, patch=8, width=64, layers=3, heads=4, embed=32, mlp_width=192)


def giga(macs: int) -> float:
    return round(macs / 1e9, 2)


def vit_of(name: str) -> VisionShape:
    shape = architecture(name).vision
    assert isinstance(shape, VisionShape)
    return shape


def counted(module: nn.Module, *inputs: torch.Tensor) -> int:
    """Multiply-adds by torch's counter, on tensors without memory."""
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        module(*inputs)
    flops = counter.get_total_flops()
    assert flops % 2 == 0
    return int(flops // 2)


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
    sums = totals(text4vis(architecture(name), frames))
    assert (giga(sums.official), giga(sums.paper)) == (true, paper)
    assert sums.ours < sums.official


@pytest.mark.parametrize(("frames", "true"), [(8, 49.50), (16, 98.99), (32, 198.00)])
def test_text4vis_costs_with_a_resnet(frames: int, true: float) -> None:
    assert giga(totals(text4vis(architecture("RN50"), frames)).official) == true


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
    sums = totals(text4vis(architecture(name), 8))
    assert sums.parameters == sums.trained == model
    assert text(architecture(name).text, 1).parameters == side
    if printed:
        assert round(sums.paper_parameters / 1e6, 3) == printed


def test_breakdown_of_a_large_tower() -> None:
    parts = {part.name: giga(part.official) for part in text4vis(architecture("ViT-L-14"), 8)}
    assert parts["visual patch embedding"] == 1.23
    assert parts["visual q, k, v projections"] == 155.22
    assert parts["visual attention"] == 25.97
    assert parts["visual output projections"] == 51.74
    assert parts["visual MLPs"] == 413.93
    rest = sum(part.official for part in header(768, 8)) + 8 * 1024 * 768  # and the projection
    assert giga(rest) == 0.35


def test_evl_costs_and_parameters() -> None:
    base = totals(evl(vit_of("ViT-B-16"), 8, classes=400))
    assert base.trained == 33_183_376
    assert giga(3 * base.paper) == 443.82
    assert giga(3 * base.official) == 453.88
    large = totals(evl(vit_of("ViT-L-14"), 32, classes=400, qkv_dim=1024, heads=16))
    assert large.trained == 58_826_128
    assert round(3 * large.paper / 1e9) == 7984
    assert round(3 * large.official / 1e9) == 8085
    wide = evl(vit_of("ViT-L-14-336"), 32, classes=400, qkv_dim=1024, heads=16)
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
    model = architecture(name)
    projected = totals(vitaclip(model, frames, classes=400, absorbed=False))
    assert round(projected.official / 1e9, 1) == official
    assert round(projected.ours / 1e9, 1) == ours
    assert totals(vitaclip(model, frames, classes=400)).ours < projected.ours


def test_vitaclip_parameters() -> None:
    parts = vitaclip(architecture("ViT-B-16"), 8, classes=400)
    assert totals(parts).trained == 30_158_849
    published = vitaclip(architecture("ViT-B-16"), 8, classes=400, context=16, train_cls_proj=True)
    assert totals(published).trained == 38_884_353
    frozen = next(part for part in parts if part.name == "class token projections")
    assert (frozen.parameters, frozen.trained) == (7_087_104, 0)


def test_text_is_counted_once_and_cut_after_the_last_token() -> None:
    shape = architecture("ViT-B-16").text
    whole, cut = text(shape, 400), text(shape, 400, positions=18)
    assert round(whole.official / 1e9) == 1192
    assert round(cut.ours / 1e9) == 273
    assert totals([whole]).official == 0


# Against torch's counter and built models -------------------------------------------------------


def test_vit_counts_are_torchs() -> None:
    from open_clip.transformer import VisionTransformer as Official

    from kineticlip.models.vision import VisionTransformer

    with torch.device("meta"):
        official = Official(32, 8, 64, 3, 4, 3.0, output_dim=32)
        ours = VisionTransformer(SMALL, kernels="reference", attention="reference")
        pixels = torch.zeros(6, 3, 32, 32)
    sums = totals(vit(SMALL, 6))
    assert counted(official, pixels) == sums.official
    assert counted(ours, pixels) == sums.ours
    assert sum(p.numel() for p in ours.parameters()) == sums.parameters


@pytest.mark.parametrize("layers", [(1, 2, 1, 1), (3, 4, 6, 3)])
def test_resnet_counts_are_torchs(layers: tuple[int, int, int, int]) -> None:
    from open_clip.modified_resnet import ModifiedResNet as Official

    from kineticlip.models.resnet import ModifiedResNet

    shape = ResNetShape(resolution=64, width=16, layers=layers, heads=8, embed=24)
    with torch.device("meta"):
        official = Official(list(layers), output_dim=24, heads=8, image_size=64, width=16)
        ours = ModifiedResNet(shape)
        pixels = torch.zeros(2, 3, 64, 64)
    sums = totals(resnet(shape, 2))
    assert counted(official, pixels) == sums.official
    assert counted(ours, pixels) == sums.ours
    assert sum(p.numel() for p in ours.parameters()) == sums.parameters


def test_header_counts_are_torchs() -> None:
    from kineticlip.models.temporal import TemporalTransformer

    with torch.device("meta"):
        module = TemporalTransformer(64, 4, layers=2, kernels="reference", attention="reference")
        frames = torch.zeros(1, 5, 64)
    sums = totals(header(64, 5, layers=2))
    assert counted(module, frames) == sums.official == sums.ours
    assert sum(p.numel() for p in module.parameters()) == sums.parameters


def test_text_counts_are_torchs() -> None:
    from open_clip.transformer import TextTransformer

    shape = TextShape(
        width=64, heads=4, layers=2, embed=32, mlp_width=256, context=12, vocabulary=50
    )
    with torch.device("meta"):
        tower = TextTransformer(
            context_length=12, vocab_size=50, width=64, heads=4, layers=2, output_dim=32
        )
        tokens = torch.zeros(3, 12, dtype=torch.long)
    part = text(shape, 3)
    assert counted(tower, tokens) == part.official
    assert sum(p.numel() for p in tower.parameters()) == part.parameters


def test_totals_add_what_they_say() -> None:
    parts = [
        Part(name="a", parameters=5, trained=2, official=10, ours=7, in_paper=True),
        Part(name="b", parameters=3, official=4, ours=-1),
        Part(name="c", parameters=9, official=100, ours=100, in_paper=True, once=True),
    ]
    sums = totals(parts)
    assert (sums.parameters, sums.trained) == (8, 2)
    assert (sums.official, sums.ours, sums.paper) == (14, 6, 10)


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
    assert "no counts for 'nothing'" in capsys.readouterr().err
