"""The likeliest of many classes in Triton, without their matrix. Letters: see logits_triton.py."""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls, allow-untyped-decorators

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from kineticlip_kernels import launch
from kineticlip_kernels.head.logits_triton import launch_log_sum, logits_of
from kineticlip_kernels.launch import Operator, ceil_div, power_of_two
from kineticlip_kernels.tuning import blocks


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
            logits = logits_of(
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


def top_classes_triton(
    x: Tensor, classes: Tensor, k: int, *, scale: float = 100.0
) -> tuple[Tensor, Tensor]:
    """The Triton face of `top_classes`."""
    views = x if x.ndim == 3 else x.unsqueeze(1)  # [N, V, E]
    probabilities, numbers = _top_classes_op(views.detach(), classes.detach(), k, scale)
    return probabilities, numbers


def _top_classes(x: Tensor, classes: Tensor, k: int, scale: float) -> tuple[Tensor, Tensor]:
    """x [N, V, E] -> (fp32 [N, k], int64 [N, k])."""
    items, views, width = x.shape
    rows, classes = launch.readable(x.flatten(0, 1)), launch.readable(classes)
    factor = torch.full((1,), scale, dtype=torch.float32, device=x.device)
    log_sum = launch_log_sum(rows, classes, factor, None)[0][0].logsumexp(dim=0)
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


_top_classes_op = Operator(
    "top_classes",
    _top_classes,
    fake=lambda x, classes, k, scale: (
        x.new_empty(x.shape[0], k, dtype=torch.float32),
        x.new_empty(x.shape[0], k, dtype=torch.int64),
    ),
)
