"""What an evaluation's rows depend on, as plain JSON: two equal ones give equal rows."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from typing import Any

from kineticlip.config import Config, config_to_dict
from kineticlip.runtime.journal import Json

UNTRAINED = "untrained"  # the protocol's weights id of a model with random weights
LIST_KEYS = ("train_list", "train_root", "val_list", "val_root", "labels")

Listed = tuple[str, int]  # a list line: path as listed, label (-1: several labels, or none)


def protocol_fingerprint(
    config: Config, entries: Sequence[Listed], *, class_names: Sequence[str], weights: str
) -> Json:
    """The fingerprint of a run.

    `weights` identifies the tensors (a tag, or a file's SHA-256); UNTRAINED marks random ones.
    Keys of the configuration that cannot change a score are left out.
    """
    plain = config_to_dict(config)
    for key in ("name", "output", "train", "optim"):
        del plain[key]
    for key in (*LIST_KEYS, "workers", "probe_cache"):
        del plain["data"][key]
    return {
        "method": config.method,
        "arch": config.model.arch,
        "weights": weights,
        "classifier": config.classifier.source,
        "frames": config.data.num_frames,
        "clips": config.test.clips,
        "crops": config.test.crops,
        "resolution": config.data.resolution,
        "precision": config.eval.precision,
        "list_sha256": _sha256("".join(f"{video} {label}\n" for video, label in entries)),
        "labels_sha256": _sha256("".join(f"{name}\n" for name in class_names)),
        "config_sha256": _sha256(json.dumps(plain, sort_keys=True)),
        "config": plain,
    }


def is_untrained(protocol: Mapping[str, Any]) -> bool:
    """Whether the results of this protocol are those of random weights."""
    return str(protocol.get("weights", "")).startswith(UNTRAINED)


def _sha256(text: str) -> str:
    return hashlib.sha256(text.encode("utf-8", "surrogateescape")).hexdigest()
