"""One evaluation by several processes of a machine: whole videos, no padding, no duplicates.

The parent deals the videos that have no result yet; every process scores its share into a results
folder of its own, parts/<rank>; the parent takes their journals over into the main one, also
those that an earlier, killed run left behind. Nobody waits for anybody, so there is no process
group. A process follows its parent when that is killed.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kineticlip.config import Config, config_to_dict
from kineticlip.evaluation.results import JOURNAL, THUMBNAILS, remove_results
from kineticlip.runtime.errors import UserError
from kineticlip.runtime.journal import Journal, Json, first_difference, read_journal
from kineticlip.runtime.launch import child_environment

PARTS, LOCK, SPEED, MESSAGES = "parts", "lock.jsonl", "speed.json", "messages.txt"
PATIENCE = 10.0  # seconds that processes of a killed parent may take to follow it
POLL_SECONDS = 0.2


@dataclass(frozen=True, kw_only=True)
class Order:
    """What a process is asked to do; it travels as JSON on its standard input."""

    config: dict[str, Any]
    videos: tuple[str, ...]
    out: str
    part: str
    settings: dict[str, Any]  # fields of list_eval.ListOptions
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
) -> Json:
    """Scores the listed videos that have no result yet; their rows are in out/journal.jsonl then.

    Gives the speed of all processes together. Raises UserError where another process works in
    the folder, where the folder belongs to another run, and where a process fails: what was
    finished by then is kept, and the next run goes on from there.
    """
    environments = process_environments(processes)
    out.mkdir(parents=True, exist_ok=True)
    with closing(Journal(out / PARTS / LOCK, {"format": 1})):
        merge_parts(out)
        done = finished_videos(out)
        todo = [name for name in dict.fromkeys(names) if name not in done]
        shares = [todo[rank::processes] for rank in range(processes)]
        orders = [
            Order(
                config=config_to_dict(config),
                videos=tuple(share),
                out=str(out),
                part=str(out / PARTS / str(rank)),
                settings={**settings, "thumbnails": -(-thumbnails // processes)},
                parent=os.getpid(),
            )
            for rank, share in enumerate(shares)
            if share
        ]
        try:
            failures = _run(orders, environments, total=len(todo), progress=progress)
        finally:
            speeds = [_read_speed(Path(order.part)) for order in orders]
            merge_parts(out)
        if failures:
            raise UserError("; ".join(failures))
    return combined_speed([speed for speed in speeds if speed])


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


def finished_videos(out: Path) -> set[str]:
    """Names with scores in the main journal; bad ones are tried again."""
    path = out / JOURNAL
    if not path.exists() or not path.stat().st_size:
        return set()
    return {row["video"] for row in read_journal(path)[1:] if "views" in row}


def check_same_run(out: Path, part: Path) -> None:
    """Raises UserError where the main journal belongs to another run than this part of it."""
    path = out / JOURNAL
    if path.exists() and path.stat().st_size:
        difference = first_difference(read_journal(path)[0], read_journal(part / JOURNAL)[0])
        if difference:
            raise UserError(
                f"{path}: belongs to another run: {difference}; "
                "choose another folder, or delete this one (--fresh)"
            )


def remove_run(out: Path) -> None:
    """Deletes the results in a folder, finished or not, so that it starts afresh."""
    remove_results(out)
    shutil.rmtree(out / PARTS, ignore_errors=True)


def take_over_parts(out: Path) -> None:
    """Merges what a killed run by several processes left. UserError where it still runs."""
    if (out / PARTS).is_dir():
        with closing(Journal(out / PARTS / LOCK, {"format": 1})):
            merge_parts(out)


def merge_parts(out: Path) -> int:
    """Takes the rows and pictures of all parts into the main folder and removes the parts.

    Gives the number of rows taken. Raises UserError where a part belongs to another run, and
    where the process that writes it does not end.
    """
    taken = 0
    for part in sorted((out / PARTS).glob("[0-9]*")):
        if (part / JOURNAL).exists() and (part / JOURNAL).stat().st_size:
            taken += _merge(out, part)
        for picture in (part / THUMBNAILS).glob("*.jpg"):
            (out / THUMBNAILS).mkdir(exist_ok=True)
            picture.replace(out / THUMBNAILS / picture.name)
        shutil.rmtree(part)
    return taken


def _merge(out: Path, part: Path) -> int:
    header = read_journal(part / JOURNAL)[0]
    with ExitStack() as stack:
        source = stack.enter_context(closing(_patiently(part / JOURNAL, header)))
        target = stack.enter_context(closing(Journal(out / JOURNAL, header)))
        known = {_kind(row) for row in target.rows}
        fresh = [row for row in source.rows if _kind(row) not in known]
        for row in fresh:
            target.append(row)
    return len(fresh)


def _kind(row: Json) -> tuple[str, str]:
    """A video's scores, its picture, or one reason why it was bad."""
    return row["video"], str(row.get("reason", "thumbnail" in row))


def _patiently(path: Path, header: Json) -> Journal:
    """The journal, once the process that holds it has followed its parent."""
    deadline = time.monotonic() + PATIENCE
    while True:
        try:
            return Journal(path, header)
        except UserError:
            if time.monotonic() > deadline:
                raise
            time.sleep(POLL_SECONDS)


def _run(
    orders: Sequence[Order],
    environments: Sequence[Mapping[str, str]],
    *,
    total: int,
    progress: bool,
) -> list[str]:
    """Starts a process for every order and waits; what went wrong, a line each."""
    from tqdm import tqdm

    command = [sys.executable, "-m", "kineticlip", "eval", "--part-of-run"]
    children: list[subprocess.Popen[bytes]] = []
    with ExitStack() as stack:
        bar = stack.enter_context(
            tqdm(total=total, unit="video", disable=None if progress else True, dynamic_ncols=True)
        )
        try:
            for order, environment in zip(orders, environments, strict=False):
                Path(order.part).mkdir(parents=True, exist_ok=True)
                messages = stack.enter_context((Path(order.part) / MESSAGES).open("wb"))
                child = subprocess.Popen(
                    command, env=environment, stdin=subprocess.PIPE, stderr=messages
                )
                children.append(child)
                assert child.stdin is not None
                child.stdin.write(order.dumped())
                child.stdin.close()
            lines = [_new_lines(Path(order.part) / JOURNAL) for order in orders]
            while any(child.poll() is None for child in children):
                bar.update(sum(next(new) for new in lines))
                if any((child.returncode or 0) > 0 for child in children):
                    break  # a mistake that all share; one that was killed stops nobody else
                time.sleep(POLL_SECONDS)
            bar.update(sum(next(new) for new in lines))
        finally:
            for child in children:
                if child.poll() is None:
                    child.terminate()
            statuses = [child.wait() for child in children]
    return _failures(orders, statuses)


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


def write_speed(part: Path, speed: Mapping[str, Any]) -> None:
    """Leaves the speed of this process for its parent."""
    (part / SPEED).write_text(json.dumps(dict(speed)))


def _read_speed(part: Path) -> Json:
    path = part / SPEED
    if not path.exists():
        return {}
    speed: Json = json.loads(path.read_text())
    return speed


def combined_speed(speeds: Sequence[Mapping[str, Any]]) -> Json:
    """Clock summaries of processes that ran side by side, as one over the longest of their times.

    Counts and the speeds of the models add up; shares of waiting are means over the processes. A
    process that did not time its model leaves that of all unknown.
    """
    if not speeds:
        return {}
    total: Json = dict(speeds[0])
    seconds = max(speed["seconds"] for speed in speeds)
    for key in ("videos", "images", "chunk_halvings"):
        total[key] = sum(speed[key] for speed in speeds)
    ceilings = [speed["model_images_per_second"] for speed in speeds if speed["videos"]]
    ceiling = sum(ceilings) if ceilings and None not in ceilings else None
    views = sum(speed["views_per_second"] * speed["seconds"] for speed in speeds)
    for key in (key for key in total if key.endswith("_percent")):
        total[key] = sum(speed[key] for speed in speeds) / len(speeds)
    total["seconds"], total["processes"] = seconds, len(speeds)
    total["videos_per_second"] = total["videos"] / seconds
    total["images_per_second"] = total["images"] / seconds
    total["views_per_second"] = views / seconds
    total["model_images_per_second"] = ceiling
    total["percent_of_model_speed"] = (
        100 * total["images_per_second"] / ceiling if ceiling else None
    )
    return total
