"""Small runs of EVL and Vita-CLIP in plain torch, saved as the official codes save them.

As a program: `python tests/official_run.py JSON` under the deepspeed launcher goes on with such
files in the engine. JSON: {"runs": [{"method": ..., "start": FILE, "output": DIR, "stage": 1}]}.
"""

from __future__ import annotations

import json
import math
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from kineticlip.config import Config, load_config
from kineticlip.data.batch import Batch
from kineticlip.formats import convert, save_checkpoint
from kineticlip.methods import METHODS
from kineticlip.runtime.distributed import Ranks, finish, initialise, read_ranks
from kineticlip.training.adopt import starting_point
from kineticlip.training.job import Job, Outcome, Validate
from kineticlip.training.loop import train

GOLDEN = Path(__file__).parent / "golden"
NAMES = ("juggling", "yoga", "zumba")
STEPS, STOP, BATCH = 5, 2, 4  # of the run; where it was saved; clips of a step
LR, DECAY = 4e-4, 0.05
OWN = {
    "evl": ("evl.layers=2", "evl.mlp_drop_out=0", "evl.class_drop_out=0"),
    "vitaclip": ("vitaclip.context=2", "vitaclip.global_prompts=2"),
}


def settings(method: str, output: Path | str, *more: str) -> Config:
    """The official recipe's optimiser and schedule on a tiny trunk."""
    pairs = (
        f"method={method}", f"output={output}", "model.arch=ViT-tiny-16", "model.weights=random",
        "data.num_frames=2", "data.resolution=64", f"optim.lr={LR}", f"train.steps={STEPS}",
        f"optim.weight_decay={DECAY}", "optim.warmup_epochs=0", "optim.rate_at=start",
        f"train.batch_size={BATCH}", "train.micro_batch_size=1", "train.precision=fp32",
        "train.log_every=1", "train.zero_stage=0",
    )  # fmt: skip
    return load_config(None, [*pairs, *OWN[method], *more])


class Clips:
    """Random clips, the same global batch however it is shared out; twelve to an epoch."""

    def __init__(self, ranks: Ranks) -> None:
        self.ranks = ranks

    def __len__(self) -> int:
        return 12 // self.ranks.world_size

    def epoch(self, epoch: int, start: int = 0) -> Iterator[Batch]:
        for index in range(start, len(self)):
            number = 12 * epoch + index * self.ranks.world_size + self.ranks.rank
            generator = torch.Generator().manual_seed(number)
            pixels = torch.randn(1, 2, 3, 64, 64, generator=generator)
            yield Batch(pixels=pixels, labels=torch.tensor([number % 3]), names=("",))


def plain_run(method: str, folder: Path) -> tuple[Path, dict[str, Tensor], list[float]]:
    """The whole run by torch alone: its checkpoint after STOP steps, last weights, losses."""
    config = settings(method, folder / "plain")
    torch.manual_seed(3)
    model = METHODS[method].build(config, NAMES)
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    with torch.no_grad():  # the official start leaves much at zero
        for name, parameter in trained.items():
            if name != "logit_scale":
                parameter.add_(torch.randn(parameter.shape) * 0.02)
    optimiser = torch.optim.AdamW(trained.values(), lr=LR, weight_decay=DECAY)
    batches = [batch for epoch in range(2) for batch in Clips(Ranks()).epoch(epoch)]
    file, losses = folder / f"{method}.pth", []
    for step in range(STEPS):
        if step == STOP:
            save_official(file, method, model, trained, optimiser)
        for group in optimiser.param_groups:
            group["lr"] = LR * (1 + math.cos(math.pi * step / STEPS)) / 2
        parts = []
        for batch in batches[BATCH * step : BATCH * (step + 1)]:
            loss, _ = METHODS[method].loss(model, batch)
            (loss / BATCH).backward()
            parts.append(loss.item())
        optimiser.step()
        optimiser.zero_grad()
        losses.append(sum(parts) / BATCH)
    return file, {name: tensor.clone() for name, tensor in model.state_dict().items()}, losses


def save_official(
    path: Path,
    method: str,
    model: nn.Module,
    trained: dict[str, nn.Parameter],
    optimiser: torch.optim.Optimizer,
) -> None:
    """Names and order are those of the official lists, moments filed under positions in them."""
    state = model.state_dict()
    if method == "evl":  # the decoder alone, as official files of a frozen trunk are
        state = {name: t for name, t in state.items() if not name.startswith("visual.")}
    official = {"model": _renamed(path, method, state)}
    for moment in ("exp_avg", "exp_avg_sq"):
        zeros = {n: torch.zeros_like(t) for n, t in state.items() if t.is_floating_point()}
        ours = {name: optimiser.state[p][moment] for name, p in trained.items()}
        official[moment] = _renamed(path, method, {**state, **zeros, **ours})
    if method == "evl":
        listed = json.loads((GOLDEN / "evl" / "checkpoint_keys.json").read_text())
        order = listed["k400_vitb16_8f_dec4x768"]["optimizer_param_order"]
        moved, buffers = set(order), set()
    else:
        entries = json.loads((GOLDEN / "vitaclip" / "vitb16_keys.json").read_text())
        order = [f"module.{entry['key']}" for entry in entries]
        moved = {f"module.{entry['key']}" for entry in entries if entry["trainable"]}
        buffers = {f"module.prompt_learner.token_{part}" for part in ("prefix", "suffix")}
    order = [name for name in order if name in official["model"]]
    assert len(order) == len(official["model"])
    parameters = [name for name in order if name not in buffers]
    states = {
        index: {
            "step": torch.tensor(float(STOP)),
            **{moment: official[moment][name] for moment in ("exp_avg", "exp_avg_sq")},
        }
        for index, name in enumerate(parameters)
        if name in moved
    }
    group = {"lr": 1e-4, "initial_lr": LR, "betas": (0.9, 0.999), "eps": 1e-8}
    group |= {"weight_decay": DECAY, "params": list(range(len(parameters)))}
    tree = {
        "model": {name: official["model"][name] for name in order},
        "optimizer": {"state": states, "param_groups": [group]},
        "lr_sched": {"T_max": STEPS, "base_lrs": [LR], "last_epoch": STOP},
        "loss_scaler": {},
        "next_step": STOP,
    }
    torch.save(tree, path)


def _renamed(path: Path, method: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    ours, theirs = path.with_suffix(".safetensors"), path.with_name("renamed.pth")
    save_checkpoint(ours, tensors, {})
    convert(ours, theirs, to=method)
    named: dict[str, Tensor] = torch.load(theirs, weights_only=True)["model"]
    return named


def go_on(
    method: str,
    start: Path | str,
    output: Path | str,
    *more: str,
    ranks: Ranks,
    device: torch.device,
    validate: Validate | None = None,
) -> Outcome:
    """The engine's run from such a file to the end."""
    config, resume, file = starting_point(settings(method, output, *more), str(start))
    job = Job(
        config=config,
        method=METHODS[method],
        model=METHODS[method].build(config, NAMES),
        loader=Clips(ranks),
        ranks=ranks,
        device=device,
        class_names=NAMES,
        validate=validate,
    )
    return train(job, resume=resume, official=file)


def main(argument: str) -> int:
    ranks = read_ranks(os.environ)
    device = initialise(ranks)
    plan: dict[str, Any] = json.loads(argument)
    for run in plan["runs"]:
        stage = f"train.zero_stage={run['stage']}"
        go_on(run["method"], run["start"], run["output"], stage, ranks=ranks, device=device)
    if ranks.is_first:
        print("done", flush=True)
    return finish(0, ranks)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
