"""Starting the deepspeed launcher on this machine, and answering for what it started.

Measured with DeepSpeed 0.19.8: a SIGTERM to the launcher leaves its ranks training as orphans, and
it reports success when the process below it was killed. Signals to the whole process group and a
mark that the first rank writes last are what holds.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from types import FrameType

import kineticlip_kernels
from kineticlip.runtime.distributed import free_port
from kineticlip.runtime.errors import UserError

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
PATIENCE = 10.0  # seconds between the signal of a user and the one that nothing survives


def child_environment() -> dict[str, str]:
    """This process's environment, in which Python finds the packages that this process runs.

    An editable installation is found after the working directory; there a folder that is named
    like the package, a clone of it say, would hide it.
    """
    environment = dict(os.environ)
    packages = [Path(__file__).parents[2], Path(kineticlip_kernels.__path__[0]).parent]
    missing = [str(path) for path in packages if str(path) not in sys.path]
    if missing:
        known = environment.get("PYTHONPATH", "").split(os.pathsep)
        environment["PYTHONPATH"] = os.pathsep.join([*missing, *filter(None, known)])
    return environment


def launch(words: Sequence[str], *, processes: int, mark: Path) -> int:
    """Runs `kineticlip WORDS` as that many ranks; the exit status, 0 only if `mark` was written.

    Every signal reaches all ranks, and none outlives this process: they watch it.
    """
    import torch

    gpus = torch.cuda.device_count()
    command = [
        sys.executable, "-m", "deepspeed.launcher.runner", "-q",
        *device_words(processes, gpus=gpus, visible=os.environ.get("CUDA_VISIBLE_DEVICES", "")),
        "--master_addr", "127.0.0.1", "--master_port", str(free_port()), "--no_local_rank",
        "--module", "kineticlip", *words, "--started-by", str(os.getpid()),
    ]  # fmt: skip
    environment = child_environment()
    if gpus == 0:
        environment["DS_ACCELERATOR"] = "cpu"
        # More threads than cores would be slower by far; a user's own number stands.
        share = max((os.cpu_count() or 1) // processes, 1)
        environment.setdefault("OMP_NUM_THREADS", str(share))
    child = subprocess.Popen(command, env=environment, start_new_session=True)
    received: list[int] = []

    def pass_on(number: int, frame: FrameType | None) -> None:
        received.append(number)
        _signal_group(child.pid, signal.SIGTERM)

    before = {number: signal.signal(number, pass_on) for number in SIGNALS}
    try:
        status = _wait(child, received)
    finally:
        _signal_group(child.pid, signal.SIGKILL)
        child.wait()
        for number, handler in before.items():
            signal.signal(number, handler)
    if received:
        return 128 + received[0]
    if status == 0 and not mark.exists():
        print(f"error: the launcher ended without {mark}: a rank was killed", file=sys.stderr)
        return 1
    return status if status >= 0 else 128 - status


def device_words(processes: int, *, gpus: int, visible: str) -> list[str]:
    """What tells DeepSpeed's launcher on which GPUs to start so many ranks, one on each.

    gpus: how many this process sees; 0 starts ranks on the CPU. visible: CUDA_VISIBLE_DEVICES,
    which the launcher drops where it is given a number of GPUs (0.19.8): it would train on the
    first ones of the machine. Raises UserError for more ranks than GPUs.
    """
    if gpus and processes > gpus:
        seen = f" (CUDA_VISIBLE_DEVICES={visible})" if visible else ""
        raise UserError(f"--num-processes {processes}: only {gpus} GPUs are visible{seen}")
    if not gpus or not visible:
        return ["--num_gpus", str(processes)]
    devices = [word.strip() for word in visible.split(",")][:processes]
    if not all(word.isdecimal() for word in devices):
        raise UserError(
            f"CUDA_VISIBLE_DEVICES={visible}: the launcher takes numbers of GPUs, not their "
            "identifiers; nvidia-smi -L lists both"
        )
    return ["--include", f"localhost:{','.join(devices)}"]


def _wait(child: subprocess.Popen[bytes], received: Sequence[int]) -> int:
    while True:
        try:
            return child.wait(timeout=PATIENCE)
        except subprocess.TimeoutExpired:
            if received:
                _signal_group(child.pid, signal.SIGKILL)


def _signal_group(leader: int, number: int) -> None:
    try:
        os.killpg(leader, number)
    except ProcessLookupError:
        return  # all of them are gone
