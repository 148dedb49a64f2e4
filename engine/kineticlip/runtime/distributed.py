"""Which process this is, and what has to hold around DeepSpeed for runs that start and end cleanly.

Numbers are measurements with DeepSpeed 0.19.8 and torch 2.11 on two CPU cores.
"""

from __future__ import annotations

import logging
import os
import re
import socket
import sys
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any, NoReturn, TypeVar

from kineticlip.runtime.errors import UserError

if TYPE_CHECKING:
    import torch

T = TypeVar("T")

# Validation runs between collectives; its slowest rank may lag the others by this much.
COLLECTIVE_TIMEOUT = timedelta(minutes=60)


@dataclass(frozen=True, kw_only=True)
class Ranks:
    """This process among `world_size` of them; `local_rank` numbers those of one machine."""

    rank: int = 0
    local_rank: int = 0
    world_size: int = 1
    master_address: str = ""  # empty: one process, nobody to meet
    master_port: int = 0

    @property
    def is_first(self) -> bool:
        return self.rank == 0


def read_ranks(environment: Mapping[str, str]) -> Ranks:
    """Ranks from a launcher's variables, else from those of a Slurm step, else one process.

    Only `srun` sets SLURM_STEP_NUM_TASKS; in the batch script itself SLURM_NTASKS is the size of
    the whole job, and one process started there would wait for the others for ever.
    Raises UserError where a launcher set some of its variables and not the others.
    """
    needed = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    missing = [name for name in needed if name not in environment]
    if not missing:
        return Ranks(
            rank=_number(environment, "RANK"),
            local_rank=_number(environment, "LOCAL_RANK"),
            world_size=_number(environment, "WORLD_SIZE"),
            master_address=environment["MASTER_ADDR"],
            master_port=_number(environment, "MASTER_PORT"),
        )
    if "RANK" in environment or "WORLD_SIZE" in environment:
        raise UserError(f"environment: {', '.join(missing)} not set beside RANK or WORLD_SIZE")
    if "SLURM_STEP_NUM_TASKS" in environment and "SLURM_PROCID" in environment:
        return _slurm_ranks(environment)
    return Ranks()


def _number(environment: Mapping[str, str], name: str) -> int:
    text = environment[name]
    if not text.isdecimal():
        raise UserError(f"environment: {name} should be a whole number, got '{text}'")
    return int(text)


def _slurm_ranks(environment: Mapping[str, str]) -> Ranks:
    nodes = environment.get("SLURM_STEP_NODELIST", "")
    job = environment.get("SLURM_JOB_ID", "0")
    # One port a job and step, out of the range that systems hand out by themselves.
    step = int(environment.get("SLURM_STEP_ID", "0")) if job.isdecimal() else 0
    return Ranks(
        rank=_number(environment, "SLURM_PROCID"),
        local_rank=_number(environment, "SLURM_LOCALID"),
        world_size=_number(environment, "SLURM_STEP_NUM_TASKS"),
        master_address=environment.get("MASTER_ADDR") or first_host(nodes),
        master_port=int(environment.get("MASTER_PORT") or 15000 + (int(job) + step) % 10000),
    )


def first_host(nodes: str) -> str:
    """The first host of a Slurm node list: `gpu[003-007,012],login` -> `gpu003`."""
    match = re.match(r"([^,\[]+)(?:\[(\d+)[^\]]*\])?", nodes)
    if match is None:
        raise UserError(f"environment: SLURM_STEP_NODELIST is '{nodes}'; set MASTER_ADDR")
    return match[1] + (match[2] or "")


def free_port() -> int:
    """A TCP port of this machine that nobody listens on."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port: int = listener.getsockname()[1]
    return port


def initialise(ranks: Ranks) -> torch.device:
    """Joins the process group (NCCL on GPUs, gloo on CPUs), once; gives this process's device.

    No launcher is needed: a single process meets nobody and opens no port. Its variables are set
    all the same, because DeepSpeed looks for MPI where they are absent.
    """
    import torch

    cuda = torch.cuda.is_available()
    device = torch.device("cpu")
    if cuda:
        device = torch.device("cuda", device_index(ranks, visible=torch.cuda.device_count()))
    full_precision_products()
    os.environ.update(
        RANK=str(ranks.rank),
        LOCAL_RANK=str(device.index if cuda else ranks.local_rank),  # DeepSpeed's device, too
        WORLD_SIZE=str(ranks.world_size),
        MASTER_ADDR=ranks.master_address or "127.0.0.1",
        MASTER_PORT=str(ranks.master_port),
    )
    if cuda:
        torch.cuda.set_device(device)
    if not torch.distributed.is_initialized():
        # torch exports the store, though not to type checkers.
        alone = ranks.world_size == 1
        store = torch.distributed.HashStore() if alone else None  # type: ignore[attr-defined]
        torch.distributed.init_process_group(
            "nccl" if cuda else "gloo",
            store=store,
            rank=ranks.rank,
            world_size=ranks.world_size,
            timeout=COLLECTIVE_TIMEOUT,
        )
    import_deepspeed().init_distributed(dist_backend="nccl" if cuda else "gloo", verbose=False)
    return device


def device_index(ranks: Ranks, *, visible: int) -> int:
    """The GPU of a process among the visible ones; a task that sees one alone (Slurm) takes it.

    Raises UserError where a machine has more processes than GPUs.
    """
    if visible == 1:
        return 0
    if ranks.local_rank >= visible:
        raise UserError(
            f"process {ranks.local_rank + 1} of this machine: only {visible} GPUs are visible; "
            "start one process a GPU"
        )
    return ranks.local_rank


def full_precision_products() -> None:
    """float32 means float32: no TF32 in convolutions, where it is torch's default, nor products.

    An environment variable (TORCH_ALLOW_TF32_CUBLAS_OVERRIDE) can turn the latter on as well.
    """
    import torch

    torch.backends.cuda.matmul.allow_tf32 = False
    torch.backends.cudnn.allow_tf32 = False


def import_deepspeed() -> ModuleType:
    """DeepSpeed, made to keep quiet: errors alone, and on stderr, since stdout is the caller's."""
    import torch

    if not torch.cuda.is_available():
        os.environ["DS_ACCELERATOR"] = "cpu"  # or every process warns that it has no GPU
    import deepspeed
    from deepspeed.utils import logger

    logger.setLevel(logging.ERROR)
    for handler in logger.handlers:
        if isinstance(handler, logging.StreamHandler) and handler.stream is sys.stdout:
            handler.setStream(sys.stderr)
    # DeepSpeed asks this table for one op, shared-memory collectives on CPUs, which only inference
    # would use: compiled on first use (20 s, hangs on a stale lock), it leaves 69 MB a rank in
    # /dev/shm. Filling the table runs compilers and linkers, with their complaints on stderr.
    deepspeed.ops.__compatible_ops__ = {}
    module: ModuleType = deepspeed
    return module


def barrier() -> None:
    """Waits for all processes; nothing to wait for without a process group."""
    import torch

    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.barrier()


def gather(value: T, ranks: Ranks) -> list[T]:
    """The values of all processes, by rank, on every one of them; plain data only."""
    import torch

    if ranks.world_size == 1:
        return [value]
    values: list[Any] = [None] * ranks.world_size
    torch.distributed.all_gather_object(values, value)
    return values


def finish(status: int, ranks: Ranks) -> int:
    """The last act of a rank program: its exit status, or no return where several ranks ran.

    Left to the interpreter, 5 of 40 two-rank gloo runs aborted at exit, their work done (gloo's
    threads outlive the interpreter); leaving at once, 0 of 40 did. Only commands may call this: it
    skips every cleanup handler of the process.
    """
    if ranks.world_size == 1:
        return status
    if status == 0:
        barrier()
    _leave(status)


def _leave(status: int) -> NoReturn:
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def end_with(process: int, *, poll_seconds: float = 1.0) -> threading.Thread:
    """Ends this process soon after another one is gone, killed or not.

    The DeepSpeed launcher does not pass a kill on to its ranks, which would train on unseen.
    """

    def watch() -> None:
        while _alive(process):
            time.sleep(poll_seconds)
        print(f"process {process}, which started this one, is gone", file=sys.stderr)
        _leave(1)

    thread = threading.Thread(target=watch, name=f"end-with-{process}", daemon=True)
    thread.start()
    return thread


def _alive(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    try:  # gone, though nobody has asked for its exit status: a zombie
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:  # no /proc on this system
        return True
