"""Parameters and multiply-adds of the towers, against torch's own counter and built models."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from kineticlip.models.architectures import ResNetShape, TextShape, VisionShape, architecture
from kineticlip.models.cost import Part, resnet, text, totals, vit

SMALL = VisionShape(resolution=32, patch=8, width=64, layers=3, heads=4, embed=32, mlp_width=192)


def counted(module: nn.Module, *inputs: torch.Tensor) -> int:
    """Multiply-adds by torch's counter, on tensors without memory."""
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        module(*inputs)
    flops = counter.get_total_flops()
    assert flops % 2 == 0
    return int(flops // 2)


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


def test_text_is_counted_once_and_cut_after_the_last_token() -> None:
    shape = architecture("ViT-B-16").text
    whole, cut = text(shape, 400), text(shape, 400, positions=18)
    assert round(whole.official / 1e9) == 1192
    assert round(cut.ours / 1e9) == 273
    assert totals([whole]).official == 0
