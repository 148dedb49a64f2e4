"""Checkpoints of the official EVL code: names, shapes, order; read and written again."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from kineticlip.commands.parity.check import Check, compare, exactly
from kineticlip.commands.parity.evl.model import (
    make_model,
    read_tensors,
)
from kineticlip.commands.parity.evl.training import factor
from kineticlip.config import OptimConfig
from kineticlip.formats import convert, read_checkpoint


def checkpoint_keys(folder: Path) -> Iterator[Check]:
    """Names, shapes and order of the released models' parameters, by their own shapes."""
    recorded = json.loads((folder / "checkpoint_keys.json").read_text())
    for name, facts in recorded.items():
        shapes = {key.removeprefix("module."): s for key, s in facts["state_dict"].items()}
        with torch.device("meta"):
            model = make_model(sizes_of(shapes))
        own = {n: list(p.shape) for n, p in model.named_parameters() if p.requires_grad}
        order = [key.removeprefix("module.") for key in facts["optimizer_param_order"]]
        yield exactly(f"keys of {name}: names and shapes", own, shapes)
        yield exactly(f"keys of {name}: order", list(own), order)
        count = sum(p.numel() for p in model.parameters() if p.requires_grad)
        yield exactly(f"keys of {name}: parameters", count, facts["trainable_parameters"])


def sizes_of(shapes: Mapping[str, list[int]]) -> dict[str, Any]:
    """The sizes that parameter shapes tell; what they do not (heads, patch) is made up."""
    layer = "decoder.decoder_layers.0"
    width = shapes["decoder.cls_token"][0]
    offsets = shapes["decoder.cross_attention.0.w1"][0]
    tall = next(n for n in range(round(offsets**0.5), 0, -1) if offsets % n == 0)
    layers = sum(key.endswith(".attn.q_proj.weight") for key in shapes)
    return {
        "input_size": [(tall + 1) // 2, (offsets // tall + 1) // 2],
        "patch_size": [1, 1],
        "width": width,
        "heads": 1,
        "layers": layers,
        "num_frames": shapes["decoder.temporal_pos_embed.0"][0],
        "num_classes": shapes["proj.2.bias"][0],
        "decoder_num_layers": layers,
        "decoder_qkv_dim": shapes[f"{layer}.attn.q_proj.bias"][0],
        "decoder_num_heads": 1,
        "decoder_mlp_factor": shapes[f"{layer}.mlp.fc1.bias"][0] / width,
    }


def checkpoint_checks(folder: Path) -> Iterator[Check]:
    """A whole checkpoint of the official main.py: read, loaded, and written again."""
    facts = json.loads((folder / "checkpoint_mini.json").read_text())
    flat = read_tensors(folder / "checkpoint_mini.safetensors")
    official = {k.removeprefix("model."): t for k, t in flat.items() if k.startswith("model.")}
    state: dict[int, dict[str, Tensor]] = {}
    for key, tensor in flat.items():
        if key.startswith("optimizer.state."):
            index, name = key.removeprefix("optimizer.state.").split(".")
            state.setdefault(int(index), {})[name] = tensor
    tree = {
        "model": official,
        "optimizer": {"state": state, "param_groups": facts["optimizer_param_groups"]},
        "lr_sched": facts["lr_sched"],
        "loss_scaler": facts["loss_scaler"],
        "next_step": facts["next_step"],
    }
    with tempfile.TemporaryDirectory() as scratch:
        path, again = Path(scratch) / facts["file_name"], Path(scratch) / "again.pth"
        torch.save(tree, path)
        checkpoint = read_checkpoint(path)
        convert(path, again, to="evl")
        written = torch.load(again, weights_only=True)["model"]
    yield exactly("checkpoint: format", checkpoint.format, "evl")
    yield exactly("checkpoint: next step", checkpoint.metadata["next_step"], facts["next_step"])
    sizes = sizes_of({n: list(t.shape) for n, t in checkpoint.tensors.items()})
    model = make_model(sizes)
    own = {n: p for n, p in model.named_parameters() if p.requires_grad}
    yield exactly("checkpoint: names", sorted(checkpoint.tensors), sorted(own))
    moments = [list(state[index]["exp_avg"].shape) for index in sorted(state)]
    yield exactly(
        "checkpoint: optimiser state order", moments, [list(p.shape) for p in own.values()]
    )
    yield exactly("checkpoint: names written", sorted(written), sorted(official))
    for key in official:
        yield exactly(f"checkpoint: {key}", written.get(key), official[key])
    schedule = facts["lr_sched"]
    optim = OptimConfig(lr=schedule["base_lrs"][0], warmup_epochs=0.0, rate_at="start")
    rate = optim.lr * factor(facts["next_step"], schedule["T_max"], 1, optim)
    yield compare(
        "checkpoint: next rate", rate, facts["optimizer_param_groups"][0]["lr"], atol=1e-12
    )
