"""The weights that a training run hands on: a state dict with all that using it takes."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor

from kineticlip.config import Config, config_to_dict
from kineticlip.formats.convert import save_checkpoint
from kineticlip.formats.load import read_checkpoint
from kineticlip.runtime.errors import UserError
from kineticlip.runtime.version import __version__

OWN = {"config", "class_names", "step", "classifier"}  # metadata of files that training writes


@dataclass(frozen=True, kw_only=True)
class TrainedWeights:
    """Weights of a finished run. config and class_names are empty in files of other code bases.

    classifier: where the classifier matrix came from, as the run recorded it.
    """

    tensors: dict[str, Tensor]
    config: dict[str, Any] = field(default_factory=dict)
    class_names: tuple[str, ...] = ()
    classifier: dict[str, Any] = field(default_factory=dict)
    step: int | None = None


def export_weights(
    path: Path,
    tensors: Mapping[str, Tensor],
    *,
    config: Config,
    class_names: Sequence[str],
    step: int,
    classifier: Mapping[str, Any],
) -> None:
    """Writes a state dict as safetensors with all that using it takes; whole or not at all."""
    facts = {
        "config": config_to_dict(config),
        "class_names": list(class_names),
        "step": step,
        "classifier": dict(classifier),
    }
    metadata = {key: json.dumps(value) for key, value in facts.items()}
    save_checkpoint(path, dict(tensors), {"version": __version__, **metadata})


def trained_from(path: str | Path) -> str:
    """model.weights of the run that wrote a file, "" for other files; reads its header alone."""
    if Path(path).suffix != ".safetensors":
        return ""
    try:
        with safe_open(path, framework="np") as file:
            facts = file.metadata() or {}
        return str(json.loads(facts["config"])["model"]["weights"]) if OWN <= facts.keys() else ""
    except (OSError, ValueError, SafetensorError):
        return ""  # whoever reads its tensors says what is wrong with it


def load_weights(path: str | Path) -> TrainedWeights:
    """Reads weights of any known format; UserError for a file of none, or a damaged one."""
    checkpoint = read_checkpoint(path)
    if not OWN <= checkpoint.metadata.keys():
        return TrainedWeights(tensors=checkpoint.tensors)
    try:
        facts = {key: json.loads(checkpoint.metadata[key]) for key in OWN}
    except ValueError as error:
        raise UserError(f"{path}: its metadata cannot be read: {error}") from None
    facts["class_names"] = tuple(facts["class_names"])
    return TrainedWeights(tensors=checkpoint.tensors, **facts)
