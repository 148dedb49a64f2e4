"""Cross-entropy over many classes in Triton, without their matrix.

Letters: see logits_triton.py.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls, allow-untyped-decorators

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from kineticlip_kernels import launch
from kineticlip_kernels.head.logits_triton import launch_log_sum, logits_of
from kineticlip_kernels.head.reference import IGNORED
from kineticlip_kernels.launch import FusedOp, ceil_div
from kineticlip_kernels.tuning import blocks

LARGE = 1 << 15  # half of the largest fp16 number: rows that may add up, each at most one
CHUNK = 8192  # classes per step of the backward pass: its [chunk, N] is all that is kept of [C, N]


@triton.jit
def _grad_logits(
    x_ptr,  # [R, E]
    classes_ptr,  # [chunk, E]
    labels_ptr,  # int64 [R]
    scale_ptr,  # fp32 [1]
    log_sum_ptr,  # fp32 [R]
    grad_ptr,  # fp32 [R]
    out_ptr,  # [chunk, R] in the dtype of x
    x_stride,
    classes_stride,
    rows,
    count,
    first,  # number of the chunk's first class
    E: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_E: tl.constexpr,
):
    """scale * (softmax - onehot) * grad for one tile: the gradient of classes @ x.T."""
    row = tl.program_id(1) * BLOCK_R + tl.arange(0, BLOCK_R)
    place = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    scale = tl.load(scale_ptr).to(tl.float32)
    logits = logits_of(
        x_ptr, classes_ptr, scale, row, place, x_stride, classes_stride, rows, count, E, BLOCK_E
    )
    log_sum = tl.load(log_sum_ptr + row, mask=row < rows, other=0.0)
    label = tl.load(labels_ptr + row, mask=row < rows, other=-1)
    grad = tl.load(grad_ptr + row, mask=row < rows, other=0.0) * scale
    hit = (place + first)[:, None] == label[None, :]
    probability = tl.exp(logits - log_sum[None, :]) - tl.where(hit, 1.0, 0.0)
    value = (probability * grad[None, :]).to(out_ptr.dtype.element_ty)
    mask = (place < count)[:, None] & (row < rows)[None, :]
    tl.store(out_ptr + place.to(tl.int64)[:, None] * rows + row[None, :], value, mask=mask)


def class_cross_entropy_triton(x: Tensor, classes: Tensor, labels: Tensor, scale: Tensor) -> Tensor:
    """The Triton face of `class_cross_entropy`."""
    (loss,) = _class_cross_entropy(x, classes, labels, scale)
    return loss


def _class_cross_entropy_forward(
    x: Tensor, classes: Tensor, labels: Tensor, scale: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """-> (loss, log sum exp, mean logit - the label's), all fp32 [N]."""
    partial, target = launch_log_sum(launch.readable(x), launch.readable(classes), scale, labels)
    assert target is not None
    log_sum = partial[0].logsumexp(dim=0)
    mean = ((partial[0] - log_sum).exp() * partial[1]).sum(dim=0)
    loss = (log_sum - target).masked_fill(labels == IGNORED, 0.0)
    return loss, log_sum, (mean - target).where(_known(labels, classes), 0.0)


def _known(labels: Tensor, classes: Tensor) -> Tensor:
    """Which rows have a class, and so a gradient."""
    return (labels >= 0) & (labels < len(classes))


def _class_cross_entropy_backward(
    flags: list[bool],
    x: Tensor,
    classes: Tensor,
    labels: Tensor,
    scale: Tensor,
    log_sum: Tensor,
    excess: Tensor,
    grad_loss: Tensor,
) -> list[Tensor]:
    """Chunk by chunk of classes: one kernel for the gradient of the logits, then two GEMMs."""
    grad_loss = grad_loss.where(_known(labels, classes), 0.0)
    rows, labels = len(x), labels.contiguous()
    # The gradient of the logits is stored in x's dtype, and its sums over rows are: in fp16 a loss
    # scale of 65536 times a logit scale of 100 would be infinite. So large ones are divided by the
    # largest row's, but for rows that are infinite themselves.
    peak: Tensor | None = None
    if x.dtype == torch.float16 and rows:
        largest = grad_loss.abs().nan_to_num(0.0, posinf=0.0).amax() * scale.abs().reshape(())
        peak = (largest * max(rows / LARGE, 1.0)).clamp(min=1.0)
    x, classes = launch.readable(x), launch.readable(classes)
    grad_x = torch.zeros(x.shape, dtype=torch.float32, device=x.device)
    grad_classes = classes.new_zeros(classes.shape if flags[1] else 0)
    # The logits are linear in the scale, so d loss / d scale = (mean logit - label's) / scale.
    grad_scale = ((grad_loss * excess).sum() / scale).reshape(scale.shape)
    grad_rows = grad_loss if peak is None else grad_loss / peak
    block = blocks("class_logits", x.device, rows=rows, itemsize=x.itemsize)
    for first in range(0, len(classes) if rows and any(flags[:2]) else 0, CHUNK):
        chunk = classes[first : first + CHUNK]
        grad = launch.empty(len(chunk), rows, dtype=x.dtype, device=x.device)
        _grad_logits[(ceil_div(len(chunk), block["BLOCK_C"]), ceil_div(rows, block["BLOCK_R"]))](
            x,
            chunk,
            labels,
            scale,
            log_sum,
            grad_rows,
            grad,
            x.stride(0),
            classes.stride(0),
            rows,
            len(chunk),
            first,
            E=x.shape[1],
            **block,
        )
        if flags[0]:
            grad_x += grad.T @ chunk
        if flags[1]:
            grad_classes[first : first + CHUNK] = grad @ x
    if peak is not None:
        grad_x, grad_classes = grad_x.mul_(peak), grad_classes.mul_(peak)
    return [grad_x.to(x.dtype), grad_classes, grad_scale]


_class_cross_entropy = FusedOp(
    "class_cross_entropy",
    _class_cross_entropy_forward,
    _class_cross_entropy_backward,
    fake_forward=lambda x, classes, labels, scale: (
        x.new_empty(x.shape[0], dtype=torch.float32),
        x.new_empty(x.shape[0], dtype=torch.float32),
        x.new_empty(x.shape[0], dtype=torch.float32),
    ),
    fake_backward=lambda flags, x, classes, labels, scale, log_sum, excess, grad_loss: [
        x.new_empty(x.shape),
        classes.new_empty(classes.shape if flags[1] else 0),
        scale.new_empty(scale.shape),
    ],
    save=lambda inputs, outputs: ((*inputs, *outputs[1:]), ()),
    results=1,
    spread=(0, 1, 1, 2),  # x, classes, labels (never wanted), scale
)
