"""X-CLIP against transformers' XCLIPModel with the same random weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from kineticlip.config import Config, DataConfig, ModelConfig, XClipConfig, override
from kineticlip.data.batch import Batch, VideoViews
from kineticlip.methods import METHODS
from kineticlip.methods.xclip import METHOD, NEW, XCLIP, build, xclip_model
from kineticlip.models.architectures import Architecture, TextShape, VisionShape
from kineticlip.models.weights import Weights
from kineticlip.runtime.errors import UserError

ARCHITECTURE = Architecture(
    name="tiny-xclip",
    vision=VisionShape(
        resolution=32, patch=16, width=32, layers=2, heads=2, embed=24, mlp_width=128
    ),
    text=TextShape(width=16, heads=2, layers=2, embed=24, mlp_width=64, vocabulary=64),
)
TOKENS = torch.zeros(5, 77, dtype=torch.long)
TOKENS[:, :6] = torch.randint(1, 60, (5, 6), generator=torch.Generator().manual_seed(3))
TOKENS[range(5), [2, 6, 4, 5, 6]] = 63  # end of text: the largest id
NAMES = tuple("abcde")


def theirs() -> torch.nn.Module:
    from transformers import XCLIPConfig, XCLIPModel

    common = {"num_hidden_layers": 2, "num_attention_heads": 2}
    model = XCLIPModel(
        XCLIPConfig(
            projection_dim=24,
            prompt_layers=2,
            prompt_num_attention_heads=3,
            text_config={
                "hidden_size": 16, "intermediate_size": 64, "vocab_size": 64, **common,
            },
            vision_config={
                "hidden_size": 32, "intermediate_size": 128, "image_size": 32, "patch_size": 16,
                "mit_hidden_size": 24, "mit_intermediate_size": 96, "mit_num_hidden_layers": 1,
                "mit_num_attention_heads": 4, "num_frames": 4, **common,
            },
        )
    )  # fmt: skip
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():  # wide enough for every part to move the result
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.copy_(0.15 * noise + (1.0 if parameter.ndim == 1 else 0.0))
        model.logit_scale.fill_(2.0)
    return model.eval()


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[torch.nn.Module, str]:
    model, path = theirs(), tmp_path_factory.mktemp("xclip") / "model.safetensors"
    save_file(model.state_dict(), path, metadata={"format": "pt"})
    return model, str(path)


def config(**changes: Any) -> Config:
    return Config(
        method="xclip",
        data=DataConfig(num_frames=int(str(changes.pop("frames", 4))), resolution=32),
        xclip=XClipConfig(integration_heads=4, prompt_heads=3, **changes),
    )


def ours(path: str, **changes: Any) -> XCLIP:
    weights = Weights(ARCHITECTURE, path, Path(path))
    return xclip_model(config(**changes), weights, TOKENS).eval()


def clips(count: int = 3) -> Tensor:
    return torch.randn(count, 4, 3, 32, 32, generator=torch.Generator().manual_seed(2))


def test_transformers_logits(pair: tuple[torch.nn.Module, str]) -> None:
    reference, path = pair
    model = ours(path)
    assert model.untrained == ()
    with torch.no_grad():
        want = reference(input_ids=TOKENS, pixel_values=clips())
        videos, _ = model.encode_clips(clips())
        logits = model(clips())
    unit = torch.nn.functional.normalize(videos, dim=-1)
    torch.testing.assert_close(unit, want.video_embeds, atol=1e-5, rtol=0)
    torch.testing.assert_close(logits, want.logits_per_video, atol=1e-5, rtol=0)
    assert logits.std() > 0.05


@pytest.mark.parametrize(
    "part", ["prompts.blocks.1.summary_attn_layer.in_proj_weight", "mit.position_embedding",
             "prompts_generator.alpha"],
)  # fmt: skip
def test_every_part_counts(pair: tuple[torch.nn.Module, str], part: str) -> None:
    model = ours(pair[1])
    with torch.no_grad():
        before = model(clips())
        model.get_parameter(part).zero_()
        assert (model(clips()) - before).abs().max() > 1e-3


def test_scores_are_means_over_distinct_clips(pair: tuple[torch.nn.Module, str]) -> None:
    model = ours(pair[1])
    frames = torch.randn(5, 2, 3, 32, 32, generator=torch.Generator().manual_seed(4))
    video = VideoViews(
        name="", label=0, images=frames, frame_index=torch.tensor([[0, 1, 2, 3], [1, 2, 3, 4]]),
        crop_index=torch.tensor([0, 1, 1]), decoder="", num_frames=5,
    )  # fmt: skip
    with torch.inference_mode():
        found = METHOD.score(model, [video, video], 8)
        expected = model(video.clips()).softmax(dim=-1).mean(dim=0)
    torch.testing.assert_close(found, expected.expand(2, -1), atol=1e-6, rtol=1e-5)


def test_all_of_it_trains() -> None:
    frozen = build(tiny(), ("red ball", "blue_ball"))
    held = {name for name, p in frozen.named_parameters() if not p.requires_grad}
    assert "text_projection" in held and not any(name.startswith("visual.") for name in held)
    settings = override(tiny(), ["xclip.train_text=true"])
    model = build(settings, ("red ball", "blue_ball")).train()
    assert model.untrained == ("visual", *NEW)
    batch = Batch(
        pixels=torch.randint(0, 256, (2, 2, 3, 64, 64)).to(torch.uint8),
        labels=torch.tensor([0, 1]),
        names=("a", "b"),
    )
    value, _ = METHODS["xclip"].loss(model, batch)
    value.backward()
    missing = [name for name, p in model.named_parameters() if p.grad is None]
    assert missing == []
    groups = METHOD.param_groups(model, override(Config(), ["optim.lr=8e-5"]))
    rates = {group["name"]: (group["lr"], group["weight_decay"]) for group in groups}
    assert rates == {
        "clip matrices": (pytest.approx(8e-6), 0.2), "clip vectors": (pytest.approx(8e-6), 0.0),
        "new matrices": (8e-5, 0.2), "new vectors": (8e-5, 0.0),
    }  # fmt: skip
    grouped = sum(len(group["params"]) for group in groups)
    assert grouped == len(list(model.parameters()))


def tiny() -> Config:
    return Config(
        method="xclip",
        model=ModelConfig(arch="ViT-tiny-16", weights="random"),
        data=DataConfig(num_frames=2, resolution=64),
    )


def test_wrong_inputs_are_one_line(pair: tuple[torch.nn.Module, str]) -> None:
    with pytest.raises(UserError, match=r"data\.num_frames: .* integrates 4 frames, not 8"):
        ours(pair[1], frames=8)
    with pytest.raises(UserError, match=r"data\.num_frames: .* integrates 4 frames, not 2"):
        ours(pair[1])(clips()[:, :2])
    with pytest.raises(UserError, match=r"xclip\.prompt_heads: 7 heads do not divide"):
        build(override(tiny(), ["xclip.prompt_heads=7"]), NAMES)
    with pytest.raises(UserError, match=r"ResNet; X-CLIP needs a ViT"):
        build(override(tiny(), ["model.arch=RN50", "data.resolution=224"]), NAMES)
