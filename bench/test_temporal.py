"""Attention between the frames of a clip: ours against PyTorch's fused attention."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from kernel_bench import DTYPES, GPU, Case, Shape, randn, rivals
from kineticlip_kernels import cost_methods, temporal

HEADS, WIDTH = 12, 64
SIZES = ((1, 8), (1, 32), (8, 32), (64, 32)) if GPU else ((1, 8), (8, 32))  # clips, frames


def sdpa(qkv: Tensor) -> Tensor:
    q, k, v = qkv.transpose(1, 3).unbind(2)  # [B, H, T, K]
    return F.scaled_dot_product_attention(q, k, v).transpose(1, 2)


def cases() -> Iterator[Case]:
    kernel = partial(temporal.frame_attention, impl="triton")
    faces = {**rivals(temporal.frame_attention_reference, triton=kernel), "sdpa": sdpa}
    for (clips, frames), dtype in itertools.product(SIZES, DTYPES):
        shape = Shape(f"{clips} clips x {frames} frames", clips, frames, HEADS * WIDTH, HEADS)
        size = (clips, frames, HEADS, WIDTH, dtype.itemsize)
        forward = cost_methods.frame_attention(*size)
        both = forward + cost_methods.frame_attention(*size, backward=True)
        qkv = partial(randn, clips, frames, 3, HEADS, WIDTH, dtype=dtype)
        for impl, face in faces.items():
            case = partial(Case, op="frame_attention", impl=impl, dtype=dtype, shape=shape)
            yield case(cost=forward, make=partial(_inputs, qkv, False), run=face)
            yield case(
                cost=both,
                make=partial(_inputs, qkv, True),
                run=face,
                direction="forward+backward",
            )


def _inputs(make: Callable[..., Tensor], grad: bool) -> tuple[Tensor]:
    return (make(grad=grad),)


CASES = [case for case in cases() if case.impl != "torch.compile" or case.dtype == torch.bfloat16]


def test_temporal(case: Case, measure: Callable[[Case], dict[str, Any]]) -> None:
    assert measure(case)["p50_ms"] > 0
