"""The ResNet trunk: the official outputs, and open_clip's with the same weights."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from kineticlip.formats import load_into
from kineticlip.models.architectures import ResNetShape, architecture
from kineticlip.models.resnet import ModifiedResNet, shift_channels
from kineticlip.runtime.errors import UserError

GOLDEN = Path(__file__).parents[1] / "golden" / "text4vis"
SIZES = json.loads((GOLDEN / "model_config.json").read_text())
SHAPE = ResNetShape(
    resolution=SIZES["rn"]["res"],
    width=SIZES["rn"]["width"],
    layers=tuple(SIZES["rn"]["layers"]),
    heads=SIZES["rn"]["width"] * 32 // 64,
    embed=SIZES["E"],
)


@pytest.fixture
def recorded(shared: Path) -> Path:
    """Recorded outputs that are too large to lie beside the tests."""
    return shared / "golden" / "text4vis"


def golden_model(recorded: Path, shift_frames: int) -> ModifiedResNet:
    weights = load_file(recorded / "clip_rn_visual.safetensors")
    weights = {
        name.removeprefix("visual."): tensor.float() if tensor.is_floating_point() else tensor
        for name, tensor in weights.items()
        if name.startswith("visual.")
    }
    model = ModifiedResNet(SHAPE, shift_frames=shift_frames).eval()
    load_into(model, weights, what="clip_rn_visual.safetensors")
    return model


def official(recorded: Path, case: str) -> Tensor:
    return load_file(recorded / f"case_{case}.safetensors")["frame_embeddings"]


@pytest.mark.parametrize(("case", "frames"), [("rn_plain", 0), ("rn_tsm", SIZES["T"])])
def test_frame_embeddings_are_the_official_ones(recorded: Path, case: str, frames: int) -> None:
    pixels = load_file(recorded / "frames_rn.safetensors")["frames_rn"]
    with torch.no_grad():
        torch.testing.assert_close(
            golden_model(recorded, frames)(pixels), official(recorded, case), atol=5e-5, rtol=1e-5
        )


def test_the_shift_matters(recorded: Path) -> None:
    assert (official(recorded, "rn_plain") - official(recorded, "rn_tsm")).abs().max() > 1e-2


def test_bytes_and_normalised_floats_agree() -> None:
    side = SHAPE.resolution
    pixels = torch.randint(0, 256, (2, 3, side, side), dtype=torch.uint8)
    mean = torch.tensor(SHAPE.statistics.mean).view(3, 1, 1)
    std = torch.tensor(SHAPE.statistics.std).view(3, 1, 1)
    model = ModifiedResNet(SHAPE).eval()
    with torch.no_grad():
        found = model(pixels)
        torch.testing.assert_close(found, model((pixels / 255 - mean) / std))
    assert found.abs().max() > 0.01


def test_rn50_is_open_clips_with_the_same_weights() -> None:
    from open_clip.modified_resnet import ModifiedResNet as Reference

    shape = architecture("RN50").vision
    assert isinstance(shape, ResNetShape)
    torch.manual_seed(0)
    reference = Reference(
        list(shape.layers),
        output_dim=shape.embed,
        heads=shape.heads,
        image_size=shape.resolution,
        width=shape.width,
    ).eval()
    for name, buffer in reference.named_buffers():  # or every norm would be the identity
        if name.endswith(("running_mean", "running_var")):
            buffer.uniform_(0.5, 1.5)
    for name, parameter in reference.named_parameters():
        if name.endswith("bn3.weight"):
            torch.nn.init.uniform_(parameter, 0.1, 0.3)
    model = ModifiedResNet(shape).eval()
    load_into(model, reference.state_dict(), what="open_clip RN50")
    image = torch.randn(1, 3, shape.resolution, shape.resolution)
    with torch.no_grad():
        expected = reference(image)
        torch.testing.assert_close(model(image), expected, atol=1e-5, rtol=1e-5)
    assert expected.abs().max() > 0.01


@pytest.mark.parametrize("name", ["RN50", "RN101", "RN50x4", "RN50x16", "RN50x64"])
def test_parameters_of_every_size_are_open_clips(name: str) -> None:
    from open_clip.modified_resnet import ModifiedResNet as Reference

    shape = architecture(name).vision
    assert isinstance(shape, ResNetShape)
    with torch.device("meta"):
        reference = Reference(
            list(shape.layers),
            output_dim=shape.embed,
            heads=shape.heads,
            image_size=shape.resolution,
            width=shape.width,
        )
        model = ModifiedResNet(shape)
    got = {name: tensor.shape for name, tensor in model.state_dict().items()}
    assert got == {name: tensor.shape for name, tensor in reference.state_dict().items()}


def test_shift_moves_eighths_between_neighbouring_frames_of_one_clip() -> None:
    x = torch.arange(1.0, 7.0).view(6, 1, 1, 1).expand(6, 16, 2, 3).contiguous()  # 2 clips of 3
    y = shift_channels(x, 3)[:, :, 0, 0]
    assert y[:, 0].tolist() == y[:, 1].tolist() == [2, 3, 0, 5, 6, 0]
    assert y[:, 2].tolist() == y[:, 3].tolist() == [0, 1, 2, 0, 4, 5]
    assert torch.equal(y[:, 4:], x[:, 4:, 0, 0])


def test_deep_networks_shift_every_second_block() -> None:
    deep = ResNetShape(resolution=32, width=8, layers=(2, 1, 23, 1), heads=4, embed=8)
    with torch.device("meta"):
        model = ModifiedResNet(deep, shift_frames=4)
    assert [block.shift_frames for block in model.layer1] == [4, 0]
    assert [block.shift_frames for block in model.layer3] == [4, 0] * 11 + [4]


def test_a_fresh_block_is_its_skip_path() -> None:
    block = ModifiedResNet(SHAPE).eval().layer2[1]
    x = torch.randn(2, 64, 8, 8)
    with torch.no_grad():
        torch.testing.assert_close(block(x), x.relu())


def test_gradients_reach_every_parameter() -> None:
    model = ModifiedResNet(SHAPE, shift_frames=2)
    for name, parameter in model.named_parameters():
        if name.endswith("bn3.weight"):
            torch.nn.init.ones_(parameter)
    model(torch.randn(4, 3, 64, 64)).square().sum().backward()
    silent = [n for n, p in model.named_parameters() if p.grad is None or not p.grad.any()]
    assert silent == []


def test_other_sizes_are_refused() -> None:
    with pytest.raises(UserError, match="images of 32x32 pixels; this tower takes 64x64"):
        ModifiedResNet(SHAPE)(torch.zeros(1, 3, 32, 32))
