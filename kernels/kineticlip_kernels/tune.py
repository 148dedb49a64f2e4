"""Finds the fastest block sizes of each kernel on one GPU: the content of configs/<gpu>.json.

A target is one row of a kernel's table, run at an engine shape that the row covers; the row keeps
its conditions and takes the meta-parameters of the fastest candidate.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from kineticlip_kernels import attention, fp8, mlp, norm, tuning
from kineticlip_kernels.tuning import Blocks, Table

Run = Callable[[], Any]
Measure = Callable[[Run], float]  # -> milliseconds; raises TooLarge for a launch that cannot be
FRAMES, TOKENS, WIDTH, HEADS = 32, 577, 1024, 16  # ViT-L/14-336
ROWS = FRAMES * TOKENS


class TooLarge(Exception):
    """A candidate needs more shared memory or registers than the GPU has."""


@dataclass(frozen=True)
class Target:
    """One row: the sizes that select it, how to run its kernel, and what to try."""

    kernel: str
    sizes: Mapping[str, int]
    make: Callable[[torch.device], Run]
    candidates: tuple[Blocks, ...]


def grid(**choices: tuple[int, ...]) -> tuple[Blocks, ...]:
    """Every combination of the values."""
    return tuple(
        dict(zip(choices, values, strict=True)) for values in itertools.product(*choices.values())
    )


def tune(
    targets: Iterable[Target], device: torch.device, measure: Measure
) -> Iterator[tuple[Target, list[tuple[Blocks, float]]]]:
    """Each target with its candidates that ran and their milliseconds, fastest first.

    Backward passes run on this thread: those of autograd's own would not see the candidate.
    """
    for target in targets:
        run = target.make(device)
        times: list[tuple[Blocks, float]] = []
        for row in target.candidates:
            with (
                torch.autograd.set_multithreading_enabled(False),
                tuning.trial(target.kernel, row),
                suppress(TooLarge),
            ):
                times.append((row, measure(run)))
        yield target, sorted(times, key=lambda item: item[1])


def with_rows(table: Table, chosen: Iterable[tuple[Target, Blocks]]) -> Table:
    """table with the row of each target replaced; conditions stay."""
    content = {kernel: [dict(row) for row in rows] for kernel, rows in table.items()}
    for target, blocks in chosen:
        rows = content[target.kernel]
        number = tuning.row_number(rows, target.sizes)
        conditions = {key: value for key, value in rows[number].items() if key.startswith("max_")}
        rows[number] = conditions | dict(blocks)
    return content


def randn(*shape: int, device: torch.device, grad: bool = False) -> Tensor:
    return torch.randn(shape, device=device).to(torch.bfloat16).requires_grad_(grad)


def recording(op: Callable[..., Any], device: torch.device, *shapes: tuple[int, ...]) -> Run:
    """op on tensors that want gradients: what a training step's forward does."""
    inputs = [randn(*shape, device=device, grad=True) for shape in shapes]
    return lambda: op(*inputs)


def forward_of(op: Callable[..., Any], *shapes: tuple[int, ...]) -> Callable[[torch.device], Run]:
    """A maker: op on fresh bf16 tensors, nothing recorded."""

    def make(device: torch.device) -> Run:
        inputs = [randn(*shape, device=device) for shape in shapes]
        return lambda: op(*inputs)

    return make


def backward_of(op: Callable[..., Any], *shapes: tuple[int, ...]) -> Callable[[torch.device], Run]:
    """A maker: the backward pass of op alone."""

    def make(device: torch.device) -> Run:
        inputs = [randn(*shape, device=device, grad=True) for shape in shapes]
        outputs = op(*inputs)
        outputs = outputs if isinstance(outputs, tuple) else (outputs,)
        grads = [torch.randn_like(out) for out in outputs]
        return lambda: torch.autograd.grad(outputs, inputs, grads, retain_graph=True)

    return make


def attend_class(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return attention.class_attention(x, weight, bias, heads=HEADS, impl="triton")


def multiply_fp8(device: torch.device) -> Run:
    x = fp8.quantize_rows(randn(ROWS, WIDTH, device=device))
    weight = fp8.quantize_rows(randn(4 * WIDTH, WIDTH, device=device))
    return lambda: fp8.linear_fp8(x, weight, impl="triton")


add_layer_norm = partial(norm.add_layer_norm, impl="triton")
bias_quick_gelu = partial(mlp.bias_quick_gelu, impl="triton")
linear_quick_gelu = partial(mlp.linear_quick_gelu, impl="triton")
attend = partial(attention.attention, impl="triton")

STREAM = ((ROWS, WIDTH), (ROWS, WIDTH), (WIDTH,), (WIDTH,))
HIDDEN = ((ROWS, 4 * WIDTH), (4 * WIDTH,))
LINEAR = ((ROWS, WIDTH), (4 * WIDTH, WIDTH), (4 * WIDTH,))
QKV = ((FRAMES, TOKENS, 3, HEADS, WIDTH // HEADS),)
CLASS = ((FRAMES, TOKENS, WIDTH), (3 * WIDTH, WIDTH), (3 * WIDTH,))
TILES = grid(
    BLOCK_M=(128, 256), BLOCK_N=(128, 256), BLOCK_K=(64,), GROUP_M=(8,), num_warps=(4, 8),
    num_stages=(3, 4),
)  # fmt: skip
ATTENTION_TILES = grid(BLOCK_M=(64, 128), BLOCK_N=(64, 128), num_warps=(4, 8), num_stages=(2, 3))

TARGETS = (
    Target(
        "layer_norm_forward",
        {"row_bytes": 2 * WIDTH},
        forward_of(add_layer_norm, *STREAM),
        grid(BLOCK_ROWS=(1, 2, 4, 8), num_warps=(2, 4, 8)),
    ),
    Target(
        "layer_norm_backward",
        {"row_bytes": 2 * WIDTH},
        backward_of(add_layer_norm, *STREAM),
        grid(BLOCK_ROWS=(1, 2, 4), PROGRAMS=(264, 528, 1056), num_warps=(4, 8)),
    ),
    Target(
        "bias_quick_gelu_forward",
        {"width": 4 * WIDTH},
        forward_of(bias_quick_gelu, *HIDDEN),
        grid(BLOCK_ROWS=(1, 2, 4), BLOCK_F=(1024, 2048), num_warps=(4, 8)),
    ),
    Target(
        "bias_quick_gelu_backward",
        {"width": 4 * WIDTH},
        backward_of(bias_quick_gelu, *HIDDEN),
        grid(BLOCK_ROWS=(2, 4, 8), BLOCK_F=(256, 512), PROGRAMS=(132, 264), num_warps=(4, 8)),
    ),
    Target(
        "linear_quick_gelu",
        {"rows": ROWS, "keep": 0},
        forward_of(linear_quick_gelu, *LINEAR),
        TILES,
    ),
    Target(
        "linear_quick_gelu",
        {"rows": ROWS, "keep": 1},
        lambda device: recording(linear_quick_gelu, device, *LINEAR),
        TILES,
    ),
    Target("attention_forward", {"head_width": 64}, forward_of(attend, *QKV), ATTENTION_TILES),
    Target(
        "attention_backward_keys", {"head_width": 64}, backward_of(attend, *QKV), ATTENTION_TILES
    ),
    Target(
        "attention_backward_queries",
        {"head_width": 64},
        backward_of(attend, *QKV),
        ATTENTION_TILES,
    ),
    Target(
        "class_attention_forward",
        {"width": WIDTH},
        forward_of(attend_class, *CLASS),
        grid(BLOCK_N=(16, 32, 64), num_warps=(8, 16), num_stages=(1, 2)),
    ),
    Target(
        "class_attention_backward",
        {"width": WIDTH},
        backward_of(attend_class, *CLASS),
        grid(BLOCK_N=(16, 32), num_warps=(8, 16), num_stages=(1,)),
    ),
    Target(
        "linear_fp8",
        {"rows": ROWS},
        multiply_fp8,
        grid(
            BLOCK_M=(128,),
            BLOCK_N=(128, 256),
            BLOCK_K=(64, 128),
            GROUP_M=(8,),
            num_warps=(4, 8),
            num_stages=(3, 4),
        ),
    ),
)
