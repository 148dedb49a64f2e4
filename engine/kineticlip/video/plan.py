"""Which frames to decode: the distinct ones, once, and where each clip position finds its own."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray


@dataclass(frozen=True, kw_only=True)
class Plan:
    """frames: distinct frame numbers, ascending. index: int64 [K, T] into frames."""

    frames: tuple[int, ...]
    index: NDArray[np.int64]


def plan_frames(indices: ArrayLike) -> Plan:
    """Merges the clips of one video: indices [K, T] of frame numbers -> Plan.

    A frame that several clips want is decoded once: frames[index] equals indices.
    """
    wanted = np.asarray(indices, dtype=np.int64)  # [K, T]
    assert wanted.ndim == 2 and wanted.size, f"expected frame numbers [K, T], got {wanted.shape}"
    assert wanted.min() >= 0, "frame numbers count from 0"
    frames, index = np.unique(wanted, return_inverse=True)
    return Plan(frames=tuple(frames.tolist()), index=index.reshape(wanted.shape).astype(np.int64))
