"""What the engine can do without: whether it is on this machine, what it adds, how to get it."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from kineticlip.runtime.compiler import why_no_compiler
from kineticlip.video import dali, torchcodec
from kineticlip.video.container import Unsuitable


@dataclass(frozen=True, kw_only=True)
class Part:
    """An optional part: what it adds, and `missing`: why it is not here, with what to install."""

    name: str
    adds: str
    missing: Callable[[], str]


def examine_parts() -> list[dict[str, Any]]:
    """Plain data of every part: name, adds, present, and the reason where it is not."""
    rows = []
    for part in PARTS:
        reason = part.missing()
        rows.append({"name": part.name, "adds": part.adds, "present": not reason, "reason": reason})
    return rows


def _no_torchcodec() -> str:
    try:
        torchcodec.load()
    except Unsuitable as error:
        return str(error)
    return ""


def _no_dali() -> str:
    try:
        dali.load()
    except Unsuitable as error:
        return f"{error}: pip install nvidia-dali-cuda130 (Linux on x86-64)"
    return ""


def _not_installed(module: str, command: str) -> Callable[[], str]:
    def missing() -> str:
        found = importlib.util.find_spec(module) is not None
        return "" if found else f"{module} is not installed: {command}"

    return missing


PARTS = (
    Part(
        name="torchcodec",
        adds="a second exact decoder, on CPUs and on NVDEC (data.decoder=torchcodec)",
        missing=_no_torchcodec,
    ),
    Part(
        name="dali",
        adds="decoding on a GPU, the first choice there (data.decoder=dali)",
        missing=_no_dali,
    ),
    Part(
        name="triton",
        adds="the fused kernels on a GPU",
        missing=_not_installed("triton", "pip install triton (Linux)"),
    ),
    Part(
        name="C++ compiler",
        adds="compilation by Inductor (eval.compile) and, on a GPU, Triton's kernels",
        missing=why_no_compiler,
    ),
    Part(
        name="xformers",
        adds="another attention for GPUs (model.attention=xformers)",
        missing=_not_installed("xformers", "pip install xformers (Linux)"),
    ),
    Part(
        name="tensorboard",
        adds="curves of a training run (train.deepspeed: configs/deepspeed/tensorboard.json)",
        missing=_not_installed("tensorboard", "pip install 'kineticlip[monitor]'"),
    ),
)
