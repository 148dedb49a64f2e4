"""The mean of a run's weights over its epochs (stochastic weight averaging, as Open-VCLIP's).

It lives on the first rank, in float32, and in the checkpoints of the run: a run that is stopped
and goes on averages each epoch once.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

FILE = "average.pt"  # in a checkpoint


class WeightAverage:
    """A running mean of state dicts; what holds whole numbers keeps the last values."""

    def __init__(self) -> None:
        self.count = 0
        self.mean: dict[str, Tensor] = {}

    def add(self, state: Mapping[str, Tensor]) -> None:
        """One more of the same names. On ranks that hold nothing the state is empty."""
        self.count += 1
        for name, tensor in state.items():
            if name in self.mean and tensor.is_floating_point():
                self.mean[name].lerp_(tensor.float(), 1 / self.count)
            else:
                self.mean[name] = tensor.float() if tensor.is_floating_point() else tensor
                self.mean[name] = self.mean[name].clone()

    def save(self, folder: Path) -> None:
        """Into a checkpoint that is being written."""
        if self.mean:
            torch.save({"count": self.count, "mean": self.mean}, folder / FILE)

    def load(self, folder: Path) -> None:
        """From a checkpoint; one without the file was written before the first epoch to count."""
        if (folder / FILE).is_file():
            found = torch.load(folder / FILE, weights_only=True)
            self.count, self.mean = found["count"], found["mean"]
