"""One evaluation by several processes of a machine: whole videos, no padding, no duplicates.

The parent deals the videos that have no result yet; every process scores its share into a part of
the run (`parts`), which the parent then takes over. Nobody waits for anybody, so there is no
process group. A process follows its parent when that is killed.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kineticlip.config import Config, config_to_dict
from kineticlip.evaluation.parts import finished_videos, merge_parts, part_folder, parts_locked
from kineticlip.evaluation.results import JOURNAL
from kineticlip.evaluation.speed import Performance, combined
from kineticlip.runtime.errors import UserError
from kineticlip.runtime.files import write_atomic
from kineticlip.runtime.journal import dump_json
from kineticlip.runtime.launch import child_environment

SPEED, MESSAGES = "speed.json", "messages.txt"
POLL_SECONDS = 0.2


@dataclass(frozen=True, kw_only=True)
class Order:
    """What a process is asked to do; it travels as JSON on its standard input."""

    config: dict[str, Any]
    videos: tuple[str, ...]
    out: str
    part: str
    settings: dict[str, Any]  # fields of run.ListOptions
    parent: int

    def dumped(self) -> bytes:
        return json.dumps(vars(self)).encode()

    @classmethod
    def loaded(cls, text: str) -> Order:
        values = json.loads(text)
        return cls(**{**values, "videos": tuple(values["videos"])})


def evaluate_in_processes(
    config: Config,
    out: Path,
    names: Sequence[str],
    *,
    processes: int,
    settings: Mapping[str, Any],
    thumbnails: int = 0,
    progress: bool = True,
) -> Performance | None:
    """Scores the listed videos that have no result yet; their rows are in out/journal.jsonl then.

    Gives the performance of all processes together, None where nothing was left to do. Raises
    UserError where another process works in the folder, where the folder belongs to another run,
    and where a process fails: what was finished by then is kept, and the next run goes on there.
    """
    environments = process_environments(processes)
    out.mkdir(parents=True, exist_ok=True)
    with parts_locked(out):
        merge_parts(out)
        done = finished_videos(out)
        todo = [name for name in dict.fromkeys(names) if name not in done]
        shares = [todo[rank::processes] for rank in range(processes)]
        orders = [
            Order(
                config=config_to_dict(config),
                videos=tuple(share),
                out=str(out),
                part=str(part_folder(out, rank)),
                settings={**settings, "thumbnails": -(-thumbnails // processes)},
                parent=os.getpid(),
            )
            for rank, share in enumerate(shares)
            if share
        ]
        try:
            failures = _run_orders(orders, environments, total=len(todo), progress=progress)
        finally:
            found = [_read_performance(Path(order.part)) for order in orders]
            merge_parts(out)
        if failures:
            raise UserError("; ".join(failures))
    return combined([performance for performance in found if performance is not None])


def process_environments(processes: int) -> list[dict[str, str]]:
    """Environments of the processes: a GPU each, or their share of the cores.

    Raises UserError for more processes than GPUs.
    """
    import torch

    if processes < 1:
        raise UserError(f"--num-processes should be at least 1, got {processes}")
    base = child_environment()
    gpus = torch.cuda.device_count()
    if not gpus:
        share = max((os.cpu_count() or 1) // processes, 1)
        return [{"OMP_NUM_THREADS": str(share), **base} for _ in range(processes)]
    if processes > gpus:
        raise UserError(f"--num-processes {processes}: this machine shows {gpus} GPUs")
    visible = base.get("CUDA_VISIBLE_DEVICES", "")
    devices = visible.split(",") if visible else [str(number) for number in range(gpus)]
    return [{**base, "CUDA_VISIBLE_DEVICES": devices[rank]} for rank in range(processes)]


def _run_orders(
    orders: Sequence[Order],
    environments: Sequence[Mapping[str, str]],
    *,
    total: int,
    progress: bool,
) -> list[str]:
    """Starts a process for every order and waits; what went wrong, a line each."""
    from tqdm import tqdm

    children: list[subprocess.Popen[bytes]] = []
    with tqdm(
        total=total, unit="video", disable=None if progress else True, dynamic_ncols=True
    ) as bar:
        try:
            for order, environment in zip(orders, environments, strict=False):
                children.append(_start(order, environment))
                _hand_over(children[-1], order)
            journals = [_new_lines(Path(order.part) / JOURNAL) for order in orders]
            while any(child.poll() is None for child in children):
                bar.update(sum(next(lines) for lines in journals))
                if any((child.returncode or 0) > 0 for child in children):
                    break  # a mistake that all share; one that was killed stops nobody else
                time.sleep(POLL_SECONDS)
            bar.update(sum(next(lines) for lines in journals))
        finally:
            for child in children:
                if child.poll() is None:
                    child.terminate()
            statuses = [child.wait() for child in children]
    return _failures(orders, statuses)


def _start(order: Order, environment: Mapping[str, str]) -> subprocess.Popen[bytes]:
    """A process for the order, which it waits for; what it says goes into a file of its part."""
    part = Path(order.part)
    part.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-m", "kineticlip", "eval", "--part-of-run"]
    with (part / MESSAGES).open("wb") as messages:
        return subprocess.Popen(command, env=environment, stdin=subprocess.PIPE, stderr=messages)


def _hand_over(child: subprocess.Popen[bytes], order: Order) -> None:
    assert child.stdin is not None
    child.stdin.write(order.dumped())
    child.stdin.close()


def _failures(orders: Sequence[Order], statuses: Sequence[int]) -> list[str]:
    """One line for the first mistake, or one for every process that was killed."""
    messages = [_last_line(Path(order.part) / MESSAGES) for order in orders]
    for message, status in zip(messages, statuses, strict=True):
        if status > 0:
            return [message.removeprefix("error: ") or f"a process ended with status {status}"]
    return [
        f"process {rank} was killed by signal {-status}; run again to go on"
        for rank, status in enumerate(statuses)
        if status
    ]


def _last_line(path: Path) -> str:
    lines = path.read_text(errors="replace").split("\n")
    return next((line for line in reversed(lines) if line.strip()), "")


def _new_lines(path: Path) -> Iterator[int]:
    """How many lines a growing journal has gained since the last time, its header aside."""
    position, first = 0, True
    while True:
        found = b""
        if path.exists():
            with path.open("rb") as file:
                file.seek(position)
                found = file.read()
        position += len(found)
        count = found.count(b"\n")
        yield count - 1 if first and count else count
        first = first and not count


def write_performance(part: Path, performance: Performance) -> None:
    """Leaves the performance of this process for its parent."""
    write_atomic(part / SPEED, dump_json(performance.to_json()))


def _read_performance(part: Path) -> Performance | None:
    path = part / SPEED
    if not path.exists():
        return None
    return Performance.from_json(json.loads(path.read_text()), str(path))
