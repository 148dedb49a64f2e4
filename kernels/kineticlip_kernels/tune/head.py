"""Means, loss and top classes of a training step and of an evaluation."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch

from kineticlip_kernels import head
from kineticlip_kernels.tune.search import Run, Target, grid
from kineticlip_kernels.tune.shapes import Sizes, forward_of, randn


def head_targets(at: Sizes) -> tuple[Target, ...]:
    def loss_of(device: torch.device, rows: int) -> Run:
        x, classes = (randn(n, at.width, device=device, grad=True) for n in (rows, at.classes))
        labels = torch.zeros(rows, dtype=torch.int64, device=device)
        scale = torch.full((1,), 10.0, device=device)

        def run() -> Any:
            loss = head.class_cross_entropy(x, classes, labels, scale, impl="triton")
            return torch.autograd.grad(loss.sum(), [x, classes])

        return run

    def top_of(device: torch.device) -> Run:
        views = randn(at.videos, at.views, at.width, device=device)
        names = randn(at.names, at.width, device=device)
        return partial(head.top_classes, views, names, 5, impl="triton")

    logits = grid(
        BLOCK_C=(64, 128), BLOCK_R=(16, 64), BLOCK_E=(64,), num_warps=(4, 8), num_stages=(3, 4)
    )
    return (
        Target(
            "mean_normalize",
            {"width": at.width},
            forward_of(partial(head.mean_normalize, impl="triton"),
                       (at.clips, at.frames, at.width)),
            grid(BLOCK_T=(2, 4, 8), num_warps=(2, 4, 8)),
        ),
        Target(
            "class_logits",
            {"rows": at.clips, "itemsize": 2},
            partial(loss_of, rows=at.clips),
            logits,
        ),
        Target(
            "class_logits",
            {"rows": at.clips * at.frames, "itemsize": 2},
            partial(loss_of, rows=at.clips * at.frames),
            logits,
        ),
        Target(
            "top_classes",
            {"itemsize": 2},
            top_of,
            grid(PROGRAMS=(132, 264), BLOCK_C=(64, 128), BLOCK_R=(16,), BLOCK_E=(64,),
                 num_warps=(4, 8), num_stages=(3, 4)),
        ),
        Target(
            "mean_softmax",
            {"classes": at.classes},
            forward_of(partial(head.mean_softmax, impl="triton"),
                       (at.videos, at.views, at.classes)),
            grid(num_warps=(1, 2, 4)),
        ),
    )  # fmt: skip
