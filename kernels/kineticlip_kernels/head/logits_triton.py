"""Logits of many classes in Triton, a tile at a time: what the loss and the top classes share.

Shape letters: N rows, V views, R = N * V rows of embeddings, E embedding, C classes. The tiles of
the products have the classes in front, [classes, rows]: a batch has few rows, and Hopper's matrix
instruction wants 64 rows of its first operand and takes as little as 8 columns of its second.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls, allow-untyped-decorators

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from kineticlip_kernels import launch
from kineticlip_kernels.arithmetic_triton import PRECISION
from kineticlip_kernels.launch import ceil_div
from kineticlip_kernels.tuning import blocks


@triton.jit
def logits_of(
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
    logits = logits_of(
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


def launch_log_sum(
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
