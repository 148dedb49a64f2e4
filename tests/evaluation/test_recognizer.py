"""From a weights file back to the model that was trained, whatever the method."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from kineticlip.config import (
    ClassifierConfig,
    Config,
    DataConfig,
    EvlConfig,
    ModelConfig,
    Text4VisConfig,
    load_config,
)
from kineticlip.evaluation.recognizer import config_of, with_weights
from kineticlip.formats.trained import export_weights
from kineticlip.methods import METHODS
from kineticlip.models.architectures import architecture
from kineticlip.models.text import encode_text, text_tower, tokenize
from kineticlip.runtime.errors import UserError

NAMES = ("a red ball", "a blue ball", "growing")


@pytest.fixture(autouse=True)
def empty_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def tiny(method: str) -> Config:
    return Config(
        method=method,
        model=ModelConfig(arch="ViT-tiny-16", weights="random"),
        classifier=ClassifierConfig(template="{}"),
        data=DataConfig(num_frames=2, resolution=64),
        text4vis=Text4VisConfig(header_layers=1),
        evl=EvlConfig(layers=2),
    )


def perturbed(model: Any) -> dict[str, torch.Tensor]:
    """The state of the model after every parameter has learned something."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter += 0.02 * torch.randn(parameter.shape, generator=generator)
    state: dict[str, torch.Tensor] = model.state_dict()
    return state


@pytest.mark.parametrize("method", sorted(METHODS))
def test_exported_weights_are_the_model_that_was_trained(method: str, tmp_path: Path) -> None:
    """Trained text towers included: they were once replaced by the one training began with."""
    config = tiny(method)
    model = METHODS[method].build(config, NAMES)
    state = perturbed(model)
    path = tmp_path / "weights.safetensors"
    export_weights(path, state, config=config, class_names=NAMES, step=1, classifier={})
    again = METHODS[method].build(with_weights(config_of(str(path)), str(path)), NAMES)
    assert not getattr(again, "untrained", ())
    found = again.state_dict()
    assert found.keys() == state.keys()
    different = [name for name, tensor in state.items() if not torch.equal(found[name], tensor)]
    assert different == []


def test_text_features_come_from_the_weights_own_tower(tmp_path: Path) -> None:
    config = tiny("text4vis")
    assert with_weights(config, "laion2b_s34b_b88k").classifier.text_weights == "laion2b_s34b_b88k"
    chosen = load_config(None, ["classifier.text_weights=openai"])
    assert with_weights(chosen, "laion2b_s34b_b88k").classifier.text_weights == "openai"
    model = METHODS["text4vis"].build(config, NAMES)  # keeps no text tower
    path = tmp_path / "weights.safetensors"
    export_weights(
        path, model.state_dict(), config=config, class_names=NAMES, step=1, classifier={}
    )
    assert with_weights(config, str(path)).classifier.text_weights == "random"
    torch.save({"visual.x": torch.zeros(1), "logit_scale": torch.zeros(1)}, tmp_path / "x.pt")
    with pytest.raises(UserError, match="of no known format"):
        with_weights(config, str(tmp_path / "x.pt"))


def test_an_official_nce_file_scores_with_all_of_its_parts(tmp_path: Path) -> None:
    """train_nce.py's layout, which the official test.py cannot read."""
    config = tiny("text4vis")
    state = perturbed(METHODS["text4vis"].build(config, NAMES))
    tower = text_tower(architecture("ViT-tiny-16").text, None, seed=3)
    clip = {name: value for name, value in state.items() if not name.startswith("fusion_model.")}
    header = {
        f"module.{name.removeprefix('fusion_model.')}": value
        for name, value in state.items()
        if name.startswith("fusion_model.")
    }
    layout = {"epoch": 2, "model_state_dict": {**clip, **tower.state_dict()}}
    path = tmp_path / "nce.pt"
    torch.save({**layout, "fusion_model_state_dict": header}, path)
    model = METHODS["text4vis"].build(with_weights(config, str(path)), NAMES)
    assert model.untrained == ()
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, state[name]), name
    expected = F.normalize(encode_text(tower, tokenize(NAMES)), dim=-1)
    torch.testing.assert_close(model.classifier, expected.detach(), atol=1e-5, rtol=0)
