"""The one rule for "equal enough", used by the tests, the benchmarks and `kineticlip doctor`.

A result may be at most twice as far from the truth as plain PyTorch in the same dtype is:

    max|candidate - truth| <= 2 * max|baseline - truth| + FLOOR[dtype] * max|truth|

truth: the reference in float64 on the same, already rounded, inputs; baseline: the reference in
the dtype under test. The factor 2 leaves room for another order of summation, the floor for
results that the baseline happens to get exactly right.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

# A few units in the last place: 2^-53, 2^-24, 2^-11 and 2^-8 are half of one.
FLOOR = {torch.float64: 1e-12, torch.float32: 1e-6, torch.float16: 1e-4, torch.bfloat16: 1e-3}


@dataclass(frozen=True)
class Comparison:
    """One tensor of one op, compared: `error` must not exceed `bound`."""

    name: str
    error: float
    bound: float

    @property
    def passed(self) -> bool:
        return self.error <= self.bound  # False when the error is NaN

    def __str__(self) -> str:
        verdict = "ok" if self.passed else "FAILED"
        return f"{self.name}: error {self.error:.3g}, allowed {self.bound:.3g}: {verdict}"


def compare(name: str, candidate: Tensor, baseline: Tensor, truth: Tensor) -> Comparison:
    """Applies the rule to one tensor; shapes and the dtypes of the first two must agree.

    NaN anywhere in the candidate is an infinite error, so poisoned outputs cannot pass.
    """
    if candidate.shape != truth.shape or candidate.dtype != baseline.dtype:
        raise AssertionError(
            f"{name}: {tuple(candidate.shape)} {candidate.dtype}, "
            f"expected {tuple(truth.shape)} {baseline.dtype}"
        )
    scale = _largest(truth)
    bound = 2 * max_error(baseline, truth) + FLOOR[candidate.dtype] * scale
    return Comparison(name, max_error(candidate, truth), bound)


def max_error(candidate: Tensor, truth: Tensor) -> float:
    """max|candidate - truth| in float64; infinite where the candidate has NaN, 0 when empty."""
    return _largest((candidate.double() - truth.double()).nan_to_num(nan=float("inf")))


def _largest(tensor: Tensor) -> float:
    return float(tensor.abs().max()) if tensor.numel() else 0.0
