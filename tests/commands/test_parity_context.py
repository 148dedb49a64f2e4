"""Outputs of a CLIP with a shorter text context: a header has as many positions as that."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from checkpoint_files import text4vis_state
from kineticlip.commands.parity import text4vis
from kineticlip.commands.parity.text4vis.files import Golden
from kineticlip.config import Config, DataConfig, Text4VisConfig
from kineticlip.methods.text4vis import video_model
from kineticlip.models.weights import Weights
from kineticlip.runtime.errors import UserError
from text4vis_golden import ARCHITECTURE, GOLDEN, tensors

CONTEXT = 40  # behind the last end of text, at 11, and more than any clip's frames
POSITIONS = "fusion_model.frame_position_embeddings.weight"
SHORTER = replace(ARCHITECTURE, text=replace(ARCHITECTURE.text, context=CONTEXT))


@pytest.fixture
def shorter(tmp_path: Path) -> Path:
    """The recorded outputs, which the rows that go had no part in."""
    folder = tmp_path / "shorter"
    shutil.copytree(GOLDEN, folder)
    sizes = json.loads((folder / "model_config.json").read_text())
    (folder / "model_config.json").write_text(json.dumps({**sizes, "ctx": CONTEXT}))
    for name, key in (
        ("clip_vit_base", "positional_embedding"),
        ("fusion_transf", POSITIONS),
    ):
        path = folder / f"{name}.safetensors"
        with safe_open(path, "pt") as file:
            metadata = file.metadata()
        cut = load_file(path)
        whole = cut[key].float().norm().item()
        cut[key] = cut[key][:CONTEXT].clone()
        kept = cut[key].float().norm().item() / whole
        save_file(cut, path, metadata)
    # Nearly all that training does to the table is its weight decay, the same for every row.
    loop = json.loads((folder / "train_loop.json").read_text())
    loop["Transf"]["final"][POSITIONS][0] *= kept
    (folder / "train_loop.json").write_text(json.dumps(loop))
    text = load_file(folder / "case_text.safetensors")
    text["tokens"] = text["tokens"][:, :CONTEXT].clone()
    save_file(text, folder / "case_text.safetensors")
    keys = json.loads((folder / "checkpoint_keys.json").read_text())
    for listed in keys.values():
        for entry in listed:
            if entry[0] in ("positional_embedding", POSITIONS):
                entry[1][0] = CONTEXT
    (folder / "checkpoint_keys.json").write_text(json.dumps(keys))
    return folder


@pytest.mark.parametrize(
    "part",
    [
        "text",
        "header",
        "vit_plain",
        "vit_joint",
        "checkpoint/vit_plain",
        "multiview",
        "nce",
        "train",
    ],
)
def test_outputs_of_a_shorter_context_are_replayed(shorter: Path, part: str) -> None:
    golden = Golden(shorter)
    found = list(text4vis.parts(golden)[part](golden))
    assert found and [check.name for check in found if not check.passed] == []


def options(frames: int) -> Config:
    """A configuration of the golden model."""
    resolution = ARCHITECTURE.vision.resolution
    return Config(
        data=DataConfig(num_frames=frames, resolution=resolution), text4vis=Text4VisConfig()
    )


def test_a_new_header_has_a_position_for_every_token_of_the_text(tmp_path: Path) -> None:
    path = tmp_path / "clip.pt"
    torch.save(tensors("clip_vit_base"), path)
    model = video_model(options(4), Weights(SHORTER, str(path), path))
    assert len(model.state_dict()[POSITIONS]) == CONTEXT and model.untrained == ("fusion_model",)
    with pytest.raises(UserError, match=r"data.num_frames: 41 frames, .* has 40 positions"):
        video_model(options(CONTEXT + 1), Weights(SHORTER, str(path), path))
    joint = replace(options(CONTEXT + 1), text4vis=Text4VisConfig(joint=True))
    video_model(joint, Weights(SHORTER, str(path), path))  # nothing goes through its header


def test_a_file_keeps_the_positions_that_it_has(tmp_path: Path) -> None:
    """Headers used to have 77, whatever the context."""
    path = tmp_path / "before.pt"
    header = tensors("fusion_transf")
    state = text4vis_state("vit_plain", header=False) | header
    torch.save({"model_state_dict": {f"module.{n}": t for n, t in state.items()}}, path)
    model = video_model(options(4), Weights(SHORTER, str(path), path))
    assert torch.equal(model.state_dict()[POSITIONS], header[POSITIONS])
    assert len(header[POSITIONS]) == 77 and model.untrained == ()
