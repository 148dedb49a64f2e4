"""What DeepSpeed is told: the run's own settings over a user's JSON, checked before anything runs.

DeepSpeed 0.19.8 ignores unknown top-level keys (a misspelt `zero_optimization` trains at stage 0)
and clips gradients at 1.0 where `gradient_clipping` is absent, so nothing is left to it here.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from kineticlip.config import Config
from kineticlip.runtime.distributed import import_deepspeed
from kineticlip.runtime.errors import UserError, did_you_mean

Json = dict[str, Any]

# Top-level keys of DeepSpeed that mean something here, beside those that this module sets.
_PASSED_ON = frozenset(
    {
        "activation_checkpointing", "aio", "bf16", "comet", "comms_logger",
        "communication_data_type", "compile", "csv_monitor", "data_types", "disable_allgather",
        "disable_python_gc", "dump_state", "flops_profiler", "fp16", "gradient_allreduce_op",
        "gradient_predivide_factor", "log_level", "memory_breakdown", "prescale_gradients",
        "tensorboard", "timers", "wall_clock_breakdown", "wandb", "zero_allow_untested_optimizer",
        "zero_force_ds_cpu_optimizer", "zero_optimization",
    }
)  # fmt: skip
_NOT_HERE = {
    "amp": "train.precision",
    "checkpoint": "train.checkpoint_every",
    "optimizer": "the section optim",
    "scheduler": "optim.schedule",
    "steps_per_print": "train.log_every",
    "torch_autocast": "train.precision",
}


def accumulation_steps(config: Config, *, world_size: int) -> int:
    """Micro-batches of one process in an optimiser step; UserError if that is no whole number."""
    train = config.train
    together = train.micro_batch_size * world_size
    if train.batch_size % together:
        raise UserError(
            f"train.batch_size {train.batch_size} is no multiple of train.micro_batch_size "
            f"{train.micro_batch_size} x {world_size} processes; nearest: "
            f"{max(round(train.batch_size / together), 1) * together}"
        )
    return train.batch_size // together


def deepspeed_settings(config: Config, *, world_size: int, cuda: bool) -> Json:
    """The whole DeepSpeed config of a run; reads train.deepspeed if it names a file.

    Raises UserError for a combination that trains wrongly or not at all, for an unknown key, and
    for a key of the file that contradicts the run's config.
    """
    train = config.train
    if train.zero_stage == 0 and train.precision != "fp32":
        raise UserError(
            f"train.zero_stage 0 with train.precision {train.precision}: DeepSpeed then starts "
            "Adam one step late; use train.zero_stage 1, also on one GPU"
        )
    if train.precision == "fp16" and not cuda:
        raise UserError("train.precision fp16 needs a GPU; on a CPU use bf16 or fp32")
    accumulation = accumulation_steps(config, world_size=world_size)
    owned = {
        "train_batch_size": (train.batch_size, "train.batch_size"),
        "train_micro_batch_size_per_gpu": (train.micro_batch_size, "train.micro_batch_size"),
        "gradient_accumulation_steps": (accumulation, "train.micro_batch_size"),
        "gradient_clipping": (train.gradient_clipping, "train.gradient_clipping"),
        "bf16.enabled": (train.precision == "bf16", "train.precision"),
        "fp16.enabled": (train.precision == "fp16", "train.precision"),
        "zero_optimization.stage": (train.zero_stage, "train.zero_stage"),
    }
    settings: Json = {
        "steps_per_print": 2**31,  # its own progress lines, which say less than ours
        "log_level": "error",
        "zero_force_ds_cpu_optimizer": False,  # else offloading compiles its own Adam (94 s)
        # It would wait for the device in every forward pass and every step (0.19.8).
        "timers": {"throughput": {"enabled": False}},
    }
    if train.precision == "bf16":
        # Sums over micro-batches and processes keep 8 bits of mantissa otherwise.
        settings["data_types"] = {"grad_accum_dtype": "fp32"}
    if train.deepspeed:
        path = Path(train.deepspeed)
        user = _read(path)
        _check_keys(user, {dotted.split(".")[0] for dotted in owned}, path)
        _check_zero_keys(user.get("zero_optimization", {}), path)
        present = dict(_leaves(user))
        for dotted, (value, key) in owned.items():
            if present.get(dotted, value) != value:
                raise UserError(
                    f"{path}: {dotted} is {present[dotted]!r} there, {value!r} by {key}; "
                    "take it out of one of the two"
                )
        settings = _merged(settings, user)
    for dotted, (value, _) in owned.items():
        section, dot, name = dotted.partition(".")
        settings = _merged(settings, {section: {name: value}} if dot else {section: value})
    if train.zero_stage == 0:
        settings["gradient_clipping"] = 0.0  # the loop's, which also skips what is not finite
    return settings


def _read(path: Path) -> Json:
    try:
        settings = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"train.deepspeed: no such file: {path}") from None
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"train.deepspeed: {path} cannot be read: {error}") from None
    except json.JSONDecodeError as error:
        raise UserError(f"{path}:{error.lineno}: not valid JSON: {error.msg}") from None
    if not isinstance(settings, dict):
        raise UserError(f"{path}: expected a JSON object of DeepSpeed settings")
    return settings


def _check_keys(user: Json, owned: set[str], path: Path) -> None:
    for key, value in user.items():
        if key in _NOT_HERE:
            raise UserError(f"{path}: '{key}' is not DeepSpeed's to set here; use {_NOT_HERE[key]}")
        if key not in _PASSED_ON | owned:
            hint = did_you_mean(key, _PASSED_ON | owned)
            raise UserError(f"{path}: unknown key '{key}'. {hint}")
        if key in ("bf16", "fp16", "zero_optimization", "data_types") and not isinstance(
            value, dict
        ):
            raise UserError(f"{path}: '{key}' should be an object, got {value!r}")


def _check_zero_keys(section: Json, path: Path) -> None:
    """The one section that DeepSpeed checks itself, though with a traceback."""
    from pydantic import ValidationError

    if not section:
        return
    import_deepspeed()
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig

    fields = DeepSpeedZeroConfig.model_fields
    known = {field.alias or name for name, field in fields.items()}
    for key in section:
        if key not in known | fields.keys():
            hint = did_you_mean(key, known)
            raise UserError(f"{path}: unknown key 'zero_optimization.{key}'. {hint}")
    try:
        DeepSpeedZeroConfig(**section)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        raise UserError(f"{path}: 'zero_optimization.{where}': {first['msg']}") from None


def _leaves(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in tree.items():
        if isinstance(value, dict):
            yield from _leaves(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _merged(below: Json, above: Mapping[str, Any]) -> Json:
    merged = dict(below)
    for key, value in above.items():
        nested = isinstance(value, dict) and isinstance(merged.get(key), dict)
        merged[key] = _merged(merged[key], value) if nested else value
    return merged


@contextlib.contextmanager
def linear_restored() -> Iterator[None]:
    """Puts torch.nn.functional.linear back, however the block ends.

    Stage 3 replaces it for the life of the process, by one whose gradients are wrong under
    torch.compile (0.19.8).
    """
    linear = nn.functional.linear
    try:
        yield
    finally:
        nn.functional.linear = linear


@contextlib.contextmanager
def scalars_apart(model: nn.Module, *, stage: int) -> Iterator[None]:
    """Carries parameters without dimensions (CLIP's logit scale) past DeepSpeed's first broadcast.

    0.19.8 views each parameter as bytes there, which torch cannot do without a dimension. Stage 3
    gets them with one, for good; below, the mark makes it leave them out, and they go from here.
    """
    scalars = [parameter for parameter in model.parameters() if parameter.dim() == 0]
    for scalar in scalars:
        if stage == 3:
            scalar.data = scalar.data.view(1)
        else:
            torch.distributed.broadcast(scalar.data, 0)
            scalar.ds_optim_param = True  # type: ignore[attr-defined]
    yield
    for scalar in scalars:
        if stage < 3:
            del scalar.ds_optim_param  # type: ignore[attr-defined]
