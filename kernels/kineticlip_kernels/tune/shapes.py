"""The shapes that tuning runs kernels at, and its runs: forward, recorded, backward alone."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from kineticlip_kernels.tune.search import Run

Maker = Callable[[torch.device], Run]


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """The shapes that are run; ViT-L/14-336 with 32 frames unless told otherwise."""

    frames: int = 32
    side: int = 24  # patches along an edge
    width: int = 1024
    heads: int = 16
    clips: int = 16  # of a training step
    views: int = 12
    videos: int = 64
    classes: int = 400
    names: int = 100_000  # of a vocabulary
    pixels: tuple[int, int] = (720, 1280)
    crop: int = 336

    @property
    def patches(self) -> int:
        return self.side**2

    @property
    def tokens(self) -> int:
        return self.patches + 1

    @property
    def rows(self) -> int:
        return self.frames * self.tokens


def randn(*shape: int, device: torch.device, grad: bool = False) -> Tensor:
    return torch.randn(shape, device=device).to(torch.bfloat16).requires_grad_(grad)


def recording(op: Callable[..., Any], *shapes: tuple[int, ...]) -> Maker:
    """A maker: op on tensors that want gradients, as in a training step's forward."""

    def make(device: torch.device) -> Run:
        inputs = [randn(*shape, device=device, grad=True) for shape in shapes]
        return lambda: op(*inputs)

    return make


def forward_of(op: Callable[..., Any], *shapes: tuple[int, ...]) -> Maker:
    """A maker: op on fresh bf16 tensors, nothing recorded."""

    def make(device: torch.device) -> Run:
        inputs = [randn(*shape, device=device) for shape in shapes]
        return lambda: op(*inputs)

    return make


def backward_of(op: Callable[..., Any], *shapes: tuple[int, ...]) -> Maker:
    """A maker: the backward pass of op alone."""

    def make(device: torch.device) -> Run:
        inputs = [randn(*shape, device=device, grad=True) for shape in shapes]
        outputs = op(*inputs)
        outputs = outputs if isinstance(outputs, tuple) else (outputs,)
        grads = [torch.randn_like(out) for out in outputs]
        return lambda: torch.autograd.grad(outputs, inputs, grads, retain_graph=True)

    return make
