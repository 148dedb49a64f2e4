"""One comparison with a recorded output, and how it is made."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray


@dataclass(frozen=True, kw_only=True)
class Check:
    """What was compared, by how much it differs, and how much it may."""

    name: str
    error: float
    tolerance: float
    detail: str = ""

    @property
    def passed(self) -> bool:
        return self.error <= self.tolerance  # False for NaN


def compare(name: str, actual: Any, expected: Any, *, atol: float, relative: bool = False) -> Check:
    """Largest absolute difference against `atol`; relative: to the largest magnitude expected.

    Tensors, arrays and nested lists of numbers. Another shape is an infinite error.
    """
    got, want = _array(actual), _array(expected)
    if got.shape != want.shape:
        detail = f"shape {list(got.shape)}, expected {list(want.shape)}"
        return Check(name=name, error=float("inf"), tolerance=atol, detail=detail)
    error = float(np.abs(got - want).max()) if want.size else 0.0
    if relative and want.size:
        error /= max(float(np.abs(want).max()), 1e-30)
    return Check(name=name, error=error, tolerance=atol)


def exactly(name: str, actual: Any, expected: Any) -> Check:
    """Equality of anything; the error counts the elements that differ."""
    if isinstance(expected, np.ndarray | torch.Tensor):
        got, want = _array(actual), _array(expected)
        differ = got.size if got.shape != want.shape else int((got != want).sum())
        return Check(name=name, error=float(differ), tolerance=0.0)
    same = actual == expected
    detail = "" if same else f"{_brief(actual)}, expected {_brief(expected)}"
    return Check(name=name, error=0.0 if same else 1.0, tolerance=0.0, detail=detail)


def _array(value: Any) -> NDArray[np.float64]:
    if isinstance(value, torch.Tensor):
        value = value.detach().cpu().double().numpy()
    return np.asarray(value, dtype=np.float64)


def _brief(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:56]} ..."
