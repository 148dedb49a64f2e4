"""Going on with a run of an official code base: its AdamW's state in place of a fresh one.

ZeRO keeps the state of a group as one flat tensor, cut into as many parts as there are processes.
DeepSpeed knows which piece of a part is which parameter's; it makes that link with the first
step, and here it is made before.
"""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from kineticlip.config import Config
from kineticlip.formats import OptimiserState, read_checkpoint, read_optimiser
from kineticlip.methods import method_named
from kineticlip.runtime.distributed import Ranks
from kineticlip.runtime.errors import UserError
from kineticlip.training.checkpoint import Progress
from kineticlip.training.optim import Timetable


def starting_point(config: Config, resume: str) -> tuple[Config, str, str]:
    """What `--resume FILE` stands for: (the run from that file's weights, auto, FILE).

    The run's own checkpoints go before the file, so the same command can be given again. The
    trunk of a file without one, such as EVL's decoder alone, is what model.weights names. Other
    values of --resume are given back as they are, with no file.
    """
    if resume in ("auto", "never") or not Path(resume).is_file():
        return config, resume, ""
    given = config.model.weights
    has_trunk = any(name.startswith("visual.") for name in read_checkpoint(resume).tensors)
    if not has_trunk and given != resume:
        config = method_named(config.method).with_trunk(config, given)
    return replace(config, model=replace(config.model, weights=resume)), "auto", resume


def official_state(path: str, config: Config, ranks: Ranks) -> OptimiserState:
    """The state in a checkpoint, checked against the run: what differs is said, and ours holds.

    Raises UserError where this run cannot go on from it.
    """
    state = read_optimiser(path)
    if config.train.zero_stage == 3:
        raise UserError(
            f"--resume {path}: an official optimiser goes on at train.zero_stage 0 to 2"
        )
    ours = {
        "lr": ("optim.lr", config.optim.lr),
        "weight_decay": ("optim.weight_decay", config.optim.weight_decay),
        "betas": ("optim.betas", config.optim.betas),
        "eps": ("optim.eps", config.optim.eps),
        "num_steps": ("train.steps", config.train.steps),
    }
    for name, there in state.settings.items():
        key, here = ours[name]
        if (tuple(there) if isinstance(there, list) else there) != here and ranks.is_first:
            note = f"{path}: {key} was {there} there; this run goes on with {here}"
            print(note, file=sys.stderr)
    return state


def adopt(state: OptimiserState, engine: Any, config: Config, table: Timetable) -> Progress:
    """Fills the engine's fresh optimiser, and says where the run stands then.

    Every rank calls it. Raises UserError where the trained parameters are not the same ones, and
    for a run that has its end behind it.
    """
    if not 0 < state.next_step < table.steps:
        raise UserError(
            f"{state.source}: stands at step {state.next_step}, and this run has {table.steps} "
            "(train.steps, train.epochs)"
        )
    trained = {name: p for name, p in engine.module.named_parameters() if p.requires_grad}
    _check(state, trained)
    flat = config.train.zero_stage > 0
    optimiser = engine.optimizer.optimizer if flat else engine.optimizer
    for group in optimiser.param_groups:
        for parameter in group["params"]:
            optimiser.state[parameter] = _empty(parameter, state.step, group)
    if flat:
        engine.optimizer._lazy_init_hp_params_optimizer_state()
    for moment, tensors in state.moments.items():
        for name, parameter in trained.items():
            value = tensors[name].reshape(parameter.shape).to(parameter.device)
            _fill(parameter, value, moment, None if flat else optimiser)
    return Progress(
        step=state.next_step,
        position=table.position_after(state.next_step),
        skipped=state.next_step - state.step,
        epoch_length=table.epoch_length,
    )


def _check(state: OptimiserState, trained: dict[str, nn.Parameter]) -> None:
    there = state.moments["exp_avg"]
    new = [name for name in trained if name not in there]
    gone = [name for name in there if name not in trained]
    for names, what in ((new, "did not train there"), (gone, "trained there and does not here")):
        if names:
            more = f", nor {len(names) - 1} others" if len(names) > 1 else ""
            raise UserError(
                f"{state.source}: its optimiser does not go with this run: "
                f"'{names[0]}' {what}{more}"
            )
    for name, parameter in trained.items():
        if there[name].numel() != parameter.numel():
            raise UserError(
                f"{state.source}: '{name}' is {tuple(there[name].shape)} there, "
                f"{tuple(parameter.shape)} here"
            )


def _empty(parameter: Tensor, step: int, group: dict[str, Any]) -> dict[str, Tensor]:
    """AdamW's state as its first step makes it; the fused one counts on the device."""
    device = parameter.device if group.get("fused") or group.get("capturable") else None
    return {
        "step": torch.tensor(float(step), device=device),
        "exp_avg": torch.zeros_like(parameter),
        "exp_avg_sq": torch.zeros_like(parameter),
    }


def _fill(
    parameter: nn.Parameter, value: Tensor, moment: str, whole: torch.optim.Optimizer | None
) -> None:
    """One moment of one parameter: into a whole optimiser, or this rank's piece of a shared one."""
    if whole is not None:
        whole.state[parameter][moment].copy_(value)
        return
    from deepspeed.utils import safe_set_full_optimizer_state

    safe_set_full_optimizer_state(parameter, value, moment)
