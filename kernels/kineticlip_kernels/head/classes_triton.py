"""Triton twin of ops.py: scores of many classes without their matrix.

Shape letters: N rows, V views, R = N * V rows of embeddings, E embedding, C classes. The tiles of
the products have the classes in front, [classes, rows]: a batch has few rows, and Hopper's matrix
instruction wants 64 rows of its first operand and takes as little as 8 columns of its second.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from kineticlip_kernels import launch
from kineticlip_kernels.head.ops import IGNORED
from kineticlip_kernels.launch import FusedOp, Operator, ceil_div, power_of_two
from kineticlip_kernels.tuning import blocks

# Of products in fp32: three of 19-bit floats, on tensor cores and as good. 16 bits are exact.
PRECISION = tl.constexpr("tf32x3")

LARGE = 1 << 15  # half of the largest fp16 number: rows that may add up, each at most one
CHUNK = 8192  # classes per step of the backward pass: its [chunk, N] is all that is kept of [C, N]


@triton.jit
def _logits(
    x_ptr,  # [R, E]
    classes_ptr,  # [C, E]
    scale,
    row,  # of x, a block
    place,  # of a class, a block
    x_stride,
    classes_stride,
    rows,
    count,
    E: tl.constexpr,
    BLOCK_E: tl.constexpr,
):
    """scale * classes @ x.T of one tile, fp32 [classes, rows]; -inf past the last class."""
    total = tl.zeros([place.shape[0], row.shape[0]], dtype=tl.float32)
    for start in range(0, E, BLOCK_E):
        column = start + tl.arange(0, BLOCK_E)
        class_at = place.to(tl.int64)[:, None] * classes_stride + column[None, :]
        mask = (place < count)[:, None] & (column < E)[None, :]
        weight = tl.load(classes_ptr + class_at, mask=mask, other=0.0)  # [C, E]
        row_at = row.to(tl.int64)[None, :] * x_stride + column[:, None]
        mask = (row < rows)[None, :] & (column < E)[:, None]
        x = tl.load(x_ptr + row_at, mask=mask, other=0.0)  # [E, R]
        total = tl.dot(weight, x, total, input_precision=PRECISION)
    return tl.where((place < count)[:, None], total * scale, float("-inf"))


@triton.jit
def _log_sum(
    x_ptr,  # [R, E]
    classes_ptr,  # [C, E]
    labels_ptr,  # int64 [R], or None
    scale_ptr,  # fp32 [1]
    partial_ptr,  # fp32 [2, blocks of classes, R]: log sum exp, mean logit under the softmax
    target_ptr,  # fp32 [R]: the logit of the label, or None
    x_stride,
    classes_stride,
    rows,
    count,
    E: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_E: tl.constexpr,
):
    row = tl.program_id(1) * BLOCK_R + tl.arange(0, BLOCK_R)
    place = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    scale = tl.load(scale_ptr).to(tl.float32)
    logits = _logits(
        x_ptr, classes_ptr, scale, row, place, x_stride, classes_stride, rows, count, E, BLOCK_E
    )
    top = tl.max(logits, axis=0)
    weight = tl.exp(logits - top[None, :])
    total = tl.sum(weight, axis=0)
    out = partial_ptr + tl.program_id(0).to(tl.int64) * rows + row
    tl.store(out, top + tl.log(total), mask=row < rows)
    mean = tl.sum(weight * tl.maximum(logits, -1e30), axis=0) / total  # 0 * -inf is NaN
    tl.store(out + tl.num_programs(0).to(tl.int64) * rows, mean, mask=row < rows)
    if labels_ptr is not None:
        label = tl.load(labels_ptr + row, mask=row < rows, other=-1)
        target = tl.sum(tl.where(place[:, None] == label[None, :], logits, 0.0), axis=0)
        first = tl.program_id(0) * BLOCK_C
        here = (label >= first) & (label < tl.minimum(first + BLOCK_C, count))
        tl.store(target_ptr + row, target, mask=(row < rows) & here)


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
    logits = _logits(
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


@triton.jit
def _top(
    x_ptr,  # [N * V, E]
    classes_ptr,  # [C, E]
    scale_ptr,  # fp32 [1]
    log_sum_ptr,  # fp32 [N * V]
    keys_ptr,  # int64 [N, splits, K]
    x_stride,
    classes_stride,
    items,
    views,
    count,
    per_split,
    E: tl.constexpr,
    K: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_E: tl.constexpr,
):
    """The K best classes of one split. A key is the bits of a probability, then ~class."""
    item = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)
    start = tl.program_id(1) * per_split
    scale = tl.load(scale_ptr).to(tl.float32)
    rows = items * views
    best = tl.zeros([BLOCK_R, K], dtype=tl.int64)
    for first in range(start, tl.minimum(start + per_split, count), BLOCK_C):
        place = first + tl.arange(0, BLOCK_C)
        mean = tl.zeros([BLOCK_C, BLOCK_R], dtype=tl.float32)
        for view in range(views):
            row = item * views + view
            logits = _logits(
                x_ptr,
                classes_ptr,
                scale,
                row,
                place,
                x_stride,
                classes_stride,
                rows,
                count,
                E,
                BLOCK_E,
            )
            log_sum = tl.load(log_sum_ptr + row, mask=row < rows, other=0.0)
            mean += tl.exp(logits - log_sum[None, :])
        bits = (mean / views).to(tl.int32, bitcast=True).to(tl.int64)  # ordered: none is negative
        keys = (bits << 32) | (0x7FFFFFFF - place).to(tl.int64)[:, None]
        keys = tl.where((place < count)[:, None], keys, 0)
        found = tl.topk(tl.trans(keys), K)  # [R, K]
        best = tl.topk(tl.reshape(tl.join(best, found), [BLOCK_R, 2 * K]), K)
    out = (item.to(tl.int64)[:, None] * tl.num_programs(1) + tl.program_id(1)) * K
    tl.store(keys_ptr + out + tl.arange(0, K)[None, :], best, mask=(item < items)[:, None])


def class_cross_entropy_triton(x: Tensor, classes: Tensor, labels: Tensor, scale: Tensor) -> Tensor:
    """The Triton face of `class_cross_entropy`."""
    (loss,) = _class_cross_entropy(x, classes, labels, scale)
    return loss


def top_classes_triton(
    x: Tensor, classes: Tensor, k: int, *, scale: float = 100.0
) -> tuple[Tensor, Tensor]:
    """The Triton face of `top_classes`."""
    views = x if x.ndim == 3 else x.unsqueeze(1)  # [N, V, E]
    probabilities, numbers = _top_classes_op(views.detach(), classes.detach(), k, scale)
    return probabilities, numbers


def _class_cross_entropy_forward(
    x: Tensor, classes: Tensor, labels: Tensor, scale: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """-> (loss, log sum exp, mean logit - the label's), all fp32 [N]."""
    partial, target = _launch_log_sum(launch.readable(x), launch.readable(classes), scale, labels)
    assert target is not None
    log_sum = partial[0].logsumexp(dim=0)
    mean = ((partial[0] - log_sum).exp() * partial[1]).sum(dim=0)
    loss = (log_sum - target).masked_fill(labels == IGNORED, 0.0)
    return loss, log_sum, (mean - target).where(_known(labels, classes), 0.0)


def _known(labels: Tensor, classes: Tensor) -> Tensor:
    """Which rows have a class, and so a gradient."""
    return (labels >= 0) & (labels < len(classes))


def _launch_log_sum(
    x: Tensor, classes: Tensor, scale: Tensor, labels: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """-> (partial fp32 [2, blocks of classes, R], the labels' logits fp32 [R])."""
    rows, count = len(x), len(classes)
    target = None
    if labels is not None:
        labels = labels.contiguous()
        # a label outside [0, C) leaves its NaN
        target = torch.full((rows,), float("nan"), dtype=torch.float32, device=x.device)
    block = blocks("class_logits", x.device, rows=rows, itemsize=x.itemsize)
    steps = ceil_div(count, block["BLOCK_C"])
    partial = launch.empty(2, steps, rows, dtype=torch.float32, device=x.device)
    if rows:
        _log_sum[(steps, ceil_div(rows, block["BLOCK_R"]))](
            x,
            classes,
            labels,
            scale,
            partial,
            target,
            x.stride(0),
            classes.stride(0),
            rows,
            count,
            E=x.shape[1],
            **block,
        )
    return partial, target


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


def _top_classes(x: Tensor, classes: Tensor, k: int, scale: float) -> tuple[Tensor, Tensor]:
    """x [N, V, E] -> (fp32 [N, k], int64 [N, k])."""
    items, views, width = x.shape
    rows, classes = launch.readable(x.flatten(0, 1)), launch.readable(classes)
    factor = torch.full((1,), scale, dtype=torch.float32, device=x.device)
    log_sum = _launch_log_sum(rows, classes, factor, None)[0][0].logsumexp(dim=0)
    block = dict(blocks("top_classes", x.device, itemsize=x.itemsize))
    wanted, top = block.pop("PROGRAMS"), power_of_two(k)
    block["BLOCK_C"] = max(block["BLOCK_C"], top)
    groups = max(ceil_div(items, block["BLOCK_R"]), 1)
    per_split = ceil_div(len(classes), max(wanted // groups, 1))
    per_split = ceil_div(per_split, block["BLOCK_C"]) * block["BLOCK_C"]
    splits = ceil_div(len(classes), per_split)
    keys = launch.empty(items, splits, top, dtype=torch.int64, device=x.device)
    if items:
        _top[(groups, splits)](
            rows,
            classes,
            factor,
            log_sum,
            keys,
            rows.stride(0),
            classes.stride(0),
            items,
            views,
            len(classes),
            per_split,
            E=width,
            K=top,
            **block,
        )
    best = keys.flatten(1).topk(k, dim=1).values  # [N, k]
    numbers = 0x7FFFFFFF - (best & 0x7FFFFFFF)
    return (best >> 32).int().view(torch.float32), numbers


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

_top_classes_op = Operator(
    "top_classes",
    _top_classes,
    fake=lambda x, classes, k, scale: (
        x.new_empty(x.shape[0], k, dtype=torch.float32),
        x.new_empty(x.shape[0], k, dtype=torch.int64),
    ),
)
