"""Ranks from the environment of each launcher, and the process group of a single process."""

from __future__ import annotations

import os
import socket
import subprocess
import sys

import pytest

from kineticlip.runtime.distributed import (
    Ranks,
    device_index,
    first_host,
    free_port,
    read_ranks,
)
from kineticlip.runtime.errors import UserError

LAUNCHER = {
    "RANK": "5",
    "LOCAL_RANK": "1",
    "WORLD_SIZE": "8",
    "MASTER_ADDR": "10.0.0.1",
    "MASTER_PORT": "29500",
}
SLURM_STEP = {
    "SLURM_PROCID": "3",
    "SLURM_LOCALID": "1",
    "SLURM_NTASKS": "16",
    "SLURM_STEP_NUM_TASKS": "4",
    "SLURM_STEP_NODELIST": "gpu[003-007,012]",
    "SLURM_JOB_ID": "1234567",
    "SLURM_STEP_ID": "2",
}


def test_a_launcher_names_the_rank() -> None:
    expected = Ranks(
        rank=5, local_rank=1, world_size=8, master_address="10.0.0.1", master_port=29500
    )
    assert read_ranks({**LAUNCHER, **SLURM_STEP}) == expected
    assert not expected.is_first


def test_a_slurm_step_names_the_rank() -> None:
    expected = Ranks(
        rank=3, local_rank=1, world_size=4, master_address="gpu003", master_port=15000 + 4569
    )
    assert read_ranks(SLURM_STEP) == expected
    chosen = read_ranks({**SLURM_STEP, "MASTER_ADDR": "login", "MASTER_PORT": "4000"})
    assert (chosen.master_address, chosen.master_port) == ("login", 4000)


def test_a_slurm_batch_script_is_one_process() -> None:
    batch = {"SLURM_PROCID": "0", "SLURM_LOCALID": "0", "SLURM_NTASKS": "16"}
    assert read_ranks(batch) == Ranks() == read_ranks({})


def test_half_a_launcher_is_refused() -> None:
    with pytest.raises(UserError, match="LOCAL_RANK, MASTER_PORT not set beside RANK"):
        read_ranks({"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "localhost"})
    with pytest.raises(UserError, match="WORLD_SIZE should be a whole number, got 'two'"):
        read_ranks({**LAUNCHER, "WORLD_SIZE": "two"})


@pytest.mark.parametrize(
    ("nodes", "host"),
    [("gpu[003-007,012],login", "gpu003"), ("gpu[12,14]", "gpu12"), ("a,b", "a"), ("solo", "solo")],
)
def test_first_host_of_a_node_list(nodes: str, host: str) -> None:
    assert first_host(nodes) == host


def test_a_free_port_can_be_bound() -> None:
    port = free_port()
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", port))


SINGLE = """
import sys, torch
from kineticlip.runtime.distributed import Ranks, barrier, finish, initialise
device = initialise(Ranks())
initialise(Ranks())  # a second time is fine
total = torch.ones(3, device=device)
torch.distributed.all_reduce(total)
barrier()
print(torch.distributed.get_world_size(), total.sum().item())
sys.exit(finish(3, Ranks()))
"""


def test_one_process_needs_no_launcher() -> None:
    """Fails where DeepSpeed logs to stdout or `finish` leaves a lone process by the back door."""
    ran = subprocess.run(
        [sys.executable, "-c", SINGLE], capture_output=True, text=True, timeout=120
    )
    assert (ran.returncode, ran.stdout) == (3, "1 3.0\n"), ran.stderr
    assert ran.stderr == ""


def test_a_process_ends_with_the_one_that_started_it() -> None:
    watched = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    code = (
        "import signal\nfrom kineticlip.runtime.distributed import end_with\n"
        f"end_with({watched.pid}, poll_seconds=0.05)\nprint('ready', flush=True)\nsignal.pause()"
    )
    watcher = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    try:
        assert watcher.stdout is not None
        assert watcher.stdout.readline() == "ready\n"
        with pytest.raises(subprocess.TimeoutExpired):  # while the other lives, so does this one
            watcher.wait(timeout=0.2)
        watched.kill()  # and nobody reaps it yet
        assert watcher.wait(timeout=10) == 1
    finally:
        for process in (watched, watcher):
            if process.poll() is None:
                os.kill(process.pid, 9)
                process.wait()


def test_a_process_takes_the_gpu_of_its_place_or_the_one_it_sees() -> None:
    assert device_index(Ranks(local_rank=3), visible=8) == 3
    assert device_index(Ranks(local_rank=3), visible=1) == 0  # Slurm, one GPU a task
    with pytest.raises(UserError, match=r"process 3 of this machine: only 2 GPUs are visible"):
        device_index(Ranks(local_rank=2), visible=2)


def test_float32_is_not_tf32_after_a_process_has_joined() -> None:
    code = """
import torch
torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = True
from kineticlip.runtime.distributed import Ranks, initialise
initialise(Ranks())
print(torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32)
"""
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert ran.stdout == "False False\n"
