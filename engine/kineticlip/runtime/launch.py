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

import kineticlip
import kineticlip_kernels
from kineticlip.runtime.distributed import free_port

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
PATIENCE = 10.0  # seconds between the signal of a user and the one that nothing survives


def child_environment() -> dict[str, str]:
    """This process's environment, in which Python finds the packages that this process runs.

    An editable installation is found after the working directory; there a folder that is named
    like the package, a clone of it say, would hide it.
    """
    environment = dict(os.environ)
    packages = [Path(module.__path__[0]).parent for module in (kineticlip, kineticlip_kernels)]
    missing = [str(path) for path in packages if str(path) not in sys.path]
    if missing:
        known = environment.get("PYTHONPATH", "").split(os.pathsep)
        environment["PYTHONPATH"] = os.pathsep.join([*missing, *filter(None, known)])
    return environment


def launch(words: Sequence[str], *, processes: int, mark: Path) -> int:
    """Runs `kineticlip WORDS` as that many ranks; the exit status, 0 only if `mark` was written.

    Every signal reaches all ranks, and none outlives this process: they watch it.
    """
    command = [
        sys.executable, "-m", "deepspeed.launcher.runner", "-q", "--num_gpus", str(processes),
        "--master_addr", "127.0.0.1", "--master_port", str(free_port()), "--no_local_rank",
        "--module", "kineticlip", *words, "--started-by", str(os.getpid()),
    ]  # fmt: skip
    import torch

    environment = child_environment()
    if not torch.cuda.is_available():
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
