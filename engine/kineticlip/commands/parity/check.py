"""One comparison with a recorded output, and how it is made."""

from __future__ import annotations

import traceback
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from kineticlip.runtime.errors import UserError


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


# What a directory of another grammar, or of sizes that the engine has no form for, ends a part in.
NOT_REPLAYED = (AssertionError, LookupError, RuntimeError, ValueError)


def attempt(name: str, checks: Iterator[Check]) -> Iterator[Check]:
    """The checks of one part of a suite; where it cannot go on, a failed check with the reason."""
    try:
        yield from checks
    except NOT_REPLAYED as error:
        yield Check(name=f"{name}: replayed", error=float("inf"), tolerance=0.0, detail=_why(error))


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


def _why(error: Exception) -> str:
    """The error in one line; where it arose, unless it was meant for users."""
    message = next(iter(str(error).splitlines()), "")
    if isinstance(error, UserError):
        return message
    last = traceback.extract_tb(error.__traceback__)[-1]
    return f"{type(error).__name__}: {message} ({Path(last.filename).name}:{last.lineno})"


def _array(value: Any) -> NDArray[np.float64]:
    if isinstance(value, torch.Tensor):
        value = value.detach().cpu().double().numpy()
    return np.asarray(value, dtype=np.float64)


def _brief(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:56]} ..."
