"""Block sizes, warps and stages of the kernels: data in configs/*.json, looked up by shape.

A table maps a kernel to a list of rows. A row may carry conditions `max_<name>` on the sizes the
kernel passes to `blocks`; the first row all of whose conditions hold is taken, and its other
values are the kernel's meta-parameters. "status" says where the numbers of a table come from.
`kineticlip bench --tune` measures the alternatives.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Mapping
from pathlib import Path

import torch

CONFIGS = Path(__file__).parent / "configs"
Blocks = Mapping[str, int]


def blocks(kernel: str, device: torch.device, **sizes: int) -> Blocks:
    """The meta-parameters of one launch: BLOCK_*, num_warps, num_stages.

    KeyError for a kernel, or a shape, that the table of this device does not cover.
    """
    return _find(table_name(device), kernel, tuple(sorted(sizes.items())))


@functools.cache
def table_name(device: torch.device) -> str:
    """The table for a device: its own, `default` for other GPUs, `interpreter` for the CPU."""
    if device.type != "cuda":
        return "interpreter"
    name = torch.cuda.get_device_name(device).lower()
    return next((table for table in tables() if table in name.split()), "default")


@functools.cache
def tables() -> tuple[str, ...]:
    """The names of the committed tables."""
    return tuple(sorted(path.stem for path in CONFIGS.glob("*.json")))


@functools.cache
def read_table(name: str) -> dict[str, list[dict[str, int]]]:
    """One table: kernel -> rows. Kernels that a device's table leaves out are the default's."""
    table: dict[str, list[dict[str, int]]] = json.loads((CONFIGS / f"{name}.json").read_text())
    table.pop("status", None)
    return table if name in ("default", "interpreter") else read_table("default") | table


def status(name: str) -> str:
    """Where the numbers of a table come from."""
    table = json.loads((CONFIGS / f"{name}.json").read_text())
    return str(table.get("status", "chosen for every GPU, measured on none"))


@functools.cache
def _find(table: str, kernel: str, sizes: tuple[tuple[str, int], ...]) -> Blocks:
    for row in read_table(table)[kernel]:
        limits = {key: value for key, value in row.items() if key.startswith("max_")}
        if all(value <= limits.get(f"max_{size}", value) for size, value in sizes):
            return {key: value for key, value in row.items() if key not in limits}
    raise KeyError(f"{table}.json: no row of {kernel} covers {dict(sizes)}")
