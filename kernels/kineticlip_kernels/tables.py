"""Tables that depend on sizes alone: tensors made once, good for every call that follows."""

from __future__ import annotations

import functools
from collections.abc import Callable, Hashable
from typing import Any, TypeVar, cast

import torch
from torch.utils._python_dispatch import is_in_torch_dispatch_mode

F = TypeVar("F", bound=Callable[..., Any])


def kept(maxsize: int) -> Callable[[F], F]:
    """Decorator: keeps the last `maxsize` tables that a function of plain values has made.

    Nobody writes to a table. It is an ordinary tensor even where the first call is inside
    torch.inference_mode, whose tensors a later forward pass could not save for its backward pass.
    torch.compile traces how it is made.
    """

    def decorate(make: F) -> F:
        @functools.lru_cache(maxsize=maxsize)
        def made(*sizes: Hashable) -> Any:
            with torch.inference_mode(False):
                return make(*sizes)

        @functools.wraps(make)
        def look_up(*sizes: Hashable) -> Any:
            # Nor is a table kept that a FakeTensorMode or the like would make.
            passing = torch.compiler.is_compiling() or is_in_torch_dispatch_mode()
            return make(*sizes) if passing else made(*sizes)

        return cast("F", look_up)

    return decorate
