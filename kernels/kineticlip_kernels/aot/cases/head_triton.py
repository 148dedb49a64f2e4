"""Launches of the head's kernels with 400 and 100,000 classes, for compilation only."""

from __future__ import annotations

import torch
from torch import Tensor

from kineticlip_kernels.head.loss_triton import class_cross_entropy_triton
from kineticlip_kernels.head.means_triton import mean_normalize_triton, mean_softmax_triton
from kineticlip_kernels.head.top_triton import top_classes_triton


def meta(*shape: int, dtype: torch.dtype = torch.bfloat16, grad: bool = True) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta", requires_grad=grad)


def mean_normalize(width: int) -> None:
    x = meta(8, 32, width)
    y = mean_normalize_triton(x)
    torch.autograd.grad(y, x, torch.empty_like(y))


def cross_entropy(rows: int, classes: int, dtype: torch.dtype = torch.bfloat16) -> None:
    inputs = [meta(rows, 768, dtype=dtype), meta(classes, 768, dtype=dtype)]
    inputs.append(meta(1, dtype=torch.float32))
    labels = meta(rows, dtype=torch.int64, grad=False)
    loss = class_cross_entropy_triton(inputs[0], inputs[1], labels, inputs[2])
    torch.autograd.grad(loss, inputs, torch.empty_like(loss))


CASES = {
    "mean_normalize 768": lambda: mean_normalize(768),
    "mean_normalize 4096": lambda: mean_normalize(4096),
    "class_cross_entropy 8 x 400": lambda: cross_entropy(8, 400),
    "class_cross_entropy 256 x 100000": lambda: cross_entropy(256, 100_000),
    "class_cross_entropy fp32": lambda: cross_entropy(256, 400, torch.float32),
    "top_classes fp32": lambda: top_classes_triton(
        meta(8, 768, dtype=torch.float32), meta(400, 768, dtype=torch.float32), 5
    ),
    "top_classes 16 of 100000": lambda: top_classes_triton(
        meta(64, 768, grad=False), meta(100_000, 768, grad=False), 16
    ),
    "mean_softmax 400": lambda: mean_softmax_triton(meta(64, 12, 400, grad=False)),
    "mean_softmax 4096": lambda: mean_softmax_triton(meta(64, 12, 4096, grad=False)),
    "mean_softmax 16384": lambda: mean_softmax_triton(meta(64, 3, 16384, grad=False)),
}

KINDS = {
    "head.means_triton._mean_forward": "memory",
    "head.means_triton._mean_backward": "memory",
    "head.means_triton._mean_softmax": "memory",
    "head.logits_triton._log_sum": "matrix",
    "head.loss_triton._grad_logits": "matrix",
    "head.top_triton._top": "matrix",
}
