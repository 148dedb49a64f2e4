"""The optimiser that official EVL and Vita-CLIP checkpoints hold beside the weights.

Both codes save the state dict of one torch AdamW whose single group lists all parameters of the
model in the order of its own state dict (buffers left out), and whose states are filed under
positions in that list; a parameter that never trained has none. So the file itself says which
moment belongs to which tensor, and moments take the way of the weights: names are mapped and
projections joined by the same rules.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from kineticlip.formats.files import Contents, Tensors, read_tree
from kineticlip.formats.table import apply_rules, identify
from kineticlip.runtime.errors import UserError

MOMENTS = ("exp_avg", "exp_avg_sq")
_LAYOUTS = ("evl", "vitaclip")
_BUFFERS = re.compile(r"prompt_learner\.token_(?:prefix|suffix)")


@dataclass(frozen=True, kw_only=True)
class OptimiserState:
    """Where an official run stood.

    next_step: batches done. step: steps that AdamW took, fewer where the scaler skipped some.
    moments: `exp_avg` and `exp_avg_sq` by our parameter names, float32.
    settings: lr (of the start), weight_decay, betas, eps, num_steps; those that the file names.
    """

    source: str
    next_step: int
    step: int
    moments: dict[str, Tensors]
    settings: dict[str, Any]


def read_optimiser(path: str | Path) -> OptimiserState:
    """The state to go on from. UserError for another layout, and for a file of weights alone."""
    tree = read_tree(path)
    model, optimiser = tree.get("model"), tree.get("optimizer")
    if not isinstance(model, Mapping) or not isinstance(optimiser, Mapping):
        raise UserError(
            f"{path}: holds no optimiser to go on with; to start from its weights, "
            f"leave out --resume and set model.weights={path}"
        )
    tensors = {str(name).removeprefix("module."): tensor for name, tensor in model.items()}
    layout = identify(Contents(kind="torch", tensors=tensors), str(path))
    if layout.name not in _LAYOUTS:
        raise UserError(
            f"{path}: a checkpoint of {layout.name}; optimisers are taken over from "
            f"{' and '.join(_LAYOUTS)}"
        )
    group, numbered = _one_group(optimiser, tensors, path)
    states = {name: state for name, state in numbered.items() if state}
    names = apply_rules(states, layout.rename, str(path), f"format {layout.name}")
    moments = {
        moment: layout.finish(
            {new: _moment(states[name], moment, tensors[name], f"{path}: '{name}'")
             for name, new in names.items() if new is not None}
        )
        for moment in MOMENTS
    }  # fmt: skip
    schedule = tree.get("lr_sched") or {}
    settings = {key: group[key] for key in ("weight_decay", "betas", "eps") if key in group}
    settings["lr"] = group.get("initial_lr", group.get("lr"))
    if "T_max" in schedule:
        settings["num_steps"] = schedule["T_max"]
    step = _common_step(states, path)
    return OptimiserState(
        source=str(path),
        next_step=int(tree.get("next_step", step)),
        step=step,
        moments=moments,
        settings=settings,
    )


def _one_group(
    optimiser: Mapping[str, Any], tensors: Tensors, path: str | Path
) -> tuple[Mapping[str, Any], dict[str, Mapping[str, Any]]]:
    """The only parameter group, and the states by name of their parameter."""
    groups, states = optimiser.get("param_groups") or [], optimiser.get("state") or {}
    parameters = [name for name in tensors if not _BUFFERS.fullmatch(name)]
    if len(groups) != 1 or len(groups[0].get("params", ())) != len(parameters):
        sizes = " + ".join(str(len(group.get("params", ()))) for group in groups) or "none"
        raise UserError(
            f"{path}: its optimiser has parameters in groups of {sizes}, the official code one "
            f"group with all {len(parameters)}"
        )
    of = dict(zip(groups[0]["params"], parameters, strict=True))
    strangers = [str(number) for number in states if number not in of]
    if strangers or not states:
        missing = f"states of unknown parameters {', '.join(strangers[:3])}"
        raise UserError(f"{path}: its optimiser has {missing if strangers else 'no states'}")
    return groups[0], {of[number]: state for number, state in states.items()}


def _moment(state: Mapping[str, Any], moment: str, like: Tensor, what: str) -> Tensor:
    found = state.get(moment)
    if not isinstance(found, Tensor) or found.shape != like.shape:
        shape = tuple(found.shape) if isinstance(found, Tensor) else "missing"
        raise UserError(f"{what}: its {moment} is {shape}, the tensor {tuple(like.shape)}")
    return found.float()


def _common_step(states: Mapping[str, Mapping[str, Any]], path: str | Path) -> int:
    """AdamW's count, a number or (torch >= 1.12) a tensor; the same for every parameter."""
    steps = {int(torch.as_tensor(state.get("step", 0))) for state in states.values()}
    if len(steps) != 1:
        raise UserError(f"{path}: its parameters took different numbers of steps: {sorted(steps)}")
    return steps.pop()
