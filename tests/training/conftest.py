"""What the training tests share: this process as the only rank."""

from __future__ import annotations

import gc
import os
from collections.abc import Iterator

import pytest
import torch

from kineticlip.runtime.distributed import Ranks, initialise


@pytest.fixture(scope="module")
def device() -> Iterator[torch.device]:
    """This process as the only rank; its variables are gone afterwards.

    The process group stays: DeepSpeed keeps what it derived from it as long as the process lives.
    """
    before = dict(os.environ)
    device = initialise(Ranks())
    gc.freeze()  # DeepSpeed's bf16 optimiser collects garbage in full, 0.24 s each time
    yield device
    gc.unfreeze()
    os.environ.clear()
    os.environ.update(before)
