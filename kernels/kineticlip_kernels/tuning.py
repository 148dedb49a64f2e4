"""Block sizes, warps and stages of the kernels: data in configs/*.json, looked up by shape.

A table maps a kernel to a list of rows. A row may carry conditions `max_<name>` on the sizes the
kernel passes to `blocks`; the first row all of whose conditions hold is taken, and its other
values are the kernel's meta-parameters. "status" says where the numbers of a table come from.
`kineticlip bench --tune` measures the alternatives.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path
from typing import Any

import torch

CONFIGS = Path(__file__).parent / "configs"
Blocks = Mapping[str, int]
Table = dict[str, list[dict[str, int]]]

_trial: ContextVar[tuple[str, Blocks] | None] = ContextVar("trial", default=None)


def blocks(kernel: str, device: torch.device, **sizes: int) -> Blocks:
    """The meta-parameters of one launch: BLOCK_*, num_warps, num_stages.

    KeyError for a kernel, or a shape, that the table of this device does not cover.
    """
    tried = _trial.get()
    if tried is not None and tried[0] == kernel:
        return tried[1]
    return _find(table_name(device), kernel, tuple(sorted(sizes.items())))


@contextmanager
def trial(kernel: str, row: Blocks) -> Iterator[None]:
    """Launches of one kernel within take these meta-parameters, whatever the tables say."""
    token = _trial.set((kernel, row))
    try:
        yield
    finally:
        _trial.reset(token)


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
def read_table(name: str) -> Table:
    """One table: kernel -> rows. Kernels that a device's table leaves out are the default's."""
    own = {key: rows for key, rows in _read(name).items() if key != "status"}
    return own if name in ("default", "interpreter") else read_table("default") | own


def own_kernels(name: str) -> frozenset[str]:
    """The kernels that a table itself has rows for."""
    return frozenset(_read(name)) - {"status"}


def status(name: str) -> str:
    """Where the numbers of a table come from."""
    return str(_read(name).get("status", "chosen for every GPU, measured on none"))


def _read(name: str) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((CONFIGS / f"{name}.json").read_text())
    return content


def row_number(rows: list[dict[str, int]], sizes: Mapping[str, int]) -> int:
    """The first row all of whose conditions hold. KeyError where there is none."""
    for number, row in enumerate(rows):
        if all(value <= row.get(f"max_{size}", value) for size, value in sizes.items()):
            return number
    raise KeyError(f"no row covers {dict(sizes)}")


@functools.cache
def _find(table: str, kernel: str, sizes: tuple[tuple[str, int], ...]) -> Blocks:
    rows = read_table(table)[kernel]
    row = rows[row_number(rows, dict(sizes))]
    return {key: value for key, value in row.items() if not key.startswith("max_")}
