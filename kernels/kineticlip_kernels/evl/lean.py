"""What the lean faces share. They are plain PyTorch with hand-written gradients.

What makes them small: the keys and values of T * N tokens are never projected, the weights of
P * P offset pairs never gathered, nothing but the normalised tokens and the maps kept for the
backward pass. Everything is a few large GEMMs and passes over one frame, which stays in cache.
Letters: see ops.py.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from kineticlip_kernels.dispatch import full_precision


def apply(function: Any, *inputs: Any) -> Tensor:
    result: Tensor = function.apply(*inputs)
    return result


def without_autocast(method: Callable[..., Any]) -> Callable[..., Any]:
    """A forward or backward in the precision of its inputs and of `wide`, wherever it is called.

    Autocast would round what is kept for the backward pass, and reject sums in place.
    """

    @functools.wraps(method)
    def run(ctx: Any, first: Tensor, *rest: Any) -> Any:
        with full_precision(first):
            return method(ctx, first, *rest)

    return run


def narrow(x: Tensor, dtype: torch.dtype) -> Tensor:
    """x in dtype. For results of an autograd.Function, where `x.to(dtype)` alone is a trap.

    Where x has that dtype already, `to` returns an alias, and torch.compile (PyTorch 2.11) drops
    the gradient of a Function whose result is one: every gradient becomes zero, silently.
    """
    return x if x.dtype == dtype else x.to(dtype)
