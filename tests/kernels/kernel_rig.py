"""What the kernel tests share: the device, the dtypes, `check`, and inputs worth testing.

On a machine with a GPU the kernels run compiled on it, elsewhere in Triton's interpreter.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from kineticlip_kernels.tolerance import verify

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
FP32, FP16, BF16 = torch.float32, torch.float16, torch.bfloat16
DTYPES = [FP32, FP16, BF16]
# The tensor cores of a GPU multiply 16 bits; the interpreter has no such wish.
MATRIX_DTYPES = [FP16, BF16] if DEVICE == "cuda" else DTYPES
MATRIX = MATRIX_DTYPES[0]


def on_gpu(*cases: Any) -> list[Any]:
    """Cases of a parametrize that only a GPU is fast enough for: several of its larger tiles."""
    return list(cases) if DEVICE == "cuda" else []


def check(reference: Callable[..., Any], candidate: Callable[..., Any], **inputs: Any) -> None:
    """Fails unless every output and gradient obeys the rule of tolerance.py."""
    failed = [str(result) for result in verify(reference, candidate, inputs) if not result.passed]
    assert not failed, "\n".join(failed)


def randn(
    *shape: int,
    dtype: torch.dtype = FP32,
    seed: int = 0,
    scale: float = 1.0,
    mean: float = 0.0,
    grad: bool = True,
) -> Tensor:
    """mean + scale * a normal draw, in dtype on the test device, wanting a gradient."""
    generator = torch.Generator().manual_seed(seed)
    values = mean + scale * torch.randn(shape, generator=generator)
    return values.to(DEVICE, dtype).requires_grad_(grad)


def strided(tensor: Tensor) -> Tensor:
    """The same values with gaps between the rows and columns that are not neighbours."""
    wide = torch.full((*tensor.shape[:-1], 2 * tensor.shape[-1] + 3), float("nan"))
    wide = wide.to(tensor)
    wide[..., 1 : 1 + 2 * tensor.shape[-1] : 2] = tensor.detach()
    view = wide[..., 1 : 1 + 2 * tensor.shape[-1] : 2]
    return view.requires_grad_(tensor.requires_grad)
