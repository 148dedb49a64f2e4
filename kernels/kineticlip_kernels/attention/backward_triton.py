"""The backward pass of attention in Triton: keys and values in one kernel, queries in another.

Letters: see sets_triton.py. No atomics: gradients repeat to the bit.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls, allow-untyped-decorators

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from kineticlip_kernels import launch
from kineticlip_kernels.attention.backward_keys_triton import launch_keys
from kineticlip_kernels.attention.backward_queries_triton import launch_queries
from kineticlip_kernels.attention.sets_triton import key_sets, load_tile
from kineticlip_kernels.launch import ceil_div, power_of_two
from kineticlip_kernels.tuning import blocks


@triton.jit
def _delta(
    out_ptr,  # [M, N, H, K]
    grad_ptr,  # [M, N, H, K]
    delta_ptr,  # fp32 [M, H, N]
    rows,  # M N H
    N,
    H,
    K: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
):
    """sum(out * grad) over K: what every score of a query has in common in the backward."""
    first = tl.program_id(0).to(tl.int64) * BLOCK_ROWS
    row = first + tl.arange(0, BLOCK_ROWS)
    out = load_tile(out_ptr, first, rows, K, K, BLOCK_K, BLOCK_ROWS).to(tl.float32)
    grad = load_tile(grad_ptr, first, rows, K, K, BLOCK_K, BLOCK_ROWS).to(tl.float32)
    image, token, head = row // (N * H), row // H % N, row % H
    place = (image * H + head) * N + token
    tl.store(delta_ptr + place, tl.sum(out * grad, axis=1), mask=row < rows)


def attention_backward(
    flags: list[bool],
    qkv: Tensor,
    k0: Tensor | None,
    v0: Tensor | None,
    k1: Tensor | None,
    v1: Tensor | None,
    k2: Tensor | None,
    v2: Tensor | None,
    k3: Tensor | None,
    v3: Tensor | None,
    out: Tensor,
    lse: Tensor,
    grad: Tensor,
) -> list[Tensor]:
    """-> gradients of qkv and the eight; empty where there is no tensor or no wish.

    Parameters as torch.library wants them, each tensor by itself.
    """
    flat = (k0, v0, k1, v1, k2, v2, k3, v3)
    qkv, grad = qkv.contiguous(), grad.contiguous()
    grad_qkv = launch.empty(*qkv.shape, dtype=qkv.dtype, device=qkv.device)
    wanted = [any(flags[first : first + 2]) for first in range(1, 9, 2)]  # keys with their values
    if not qkv.shape[0] or not qkv.shape[1]:
        return [grad_qkv, *_no_gradients(wanted, flat, qkv.new_empty(0))]
    given = (grad, lse, _launch_delta(out, grad))
    keys, values = key_sets(qkv, flat)
    if flags[0]:
        launch_queries(qkv, keys, values, *given, grad_qkv)
        own = (grad_qkv[:, :, part].unsqueeze(0) for part in (1, 2))
        launch_keys(qkv, keys[0], values[0], *given, *own)
    found = [grad_qkv] + [qkv.new_empty(0) for _ in flat]
    for index, (k, v) in enumerate(zip(keys[1:], values[1:], strict=True)):
        if wanted[index]:
            # The images of a row are divided so that a source shared by all still fills a GPU.
            splits = min(len(qkv) // len(k), 16)
            parts = [
                launch.empty(splits, *k.shape, dtype=torch.float32, device=k.device)
                for _ in range(2)
            ]
            launch_keys(qkv, k, v, *given, *parts)
            first = 1 + 2 * index
            found[first : first + 2] = [part.sum(dim=0).to(k.dtype) for part in parts]
    return found


def _no_gradients(
    wanted: Sequence[bool], flat: Sequence[Tensor | None], empty: Tensor
) -> list[Tensor]:
    """Those of sources that nobody attended to: zeros; `empty` where there is none or no wish."""
    return [
        empty.clone()
        if tensor is None or not wanted[index // 2]
        else tensor.new_zeros(tensor.shape)
        for index, tensor in enumerate(flat)
    ]


def _launch_delta(out: Tensor, grad: Tensor) -> Tensor:
    images, tokens, heads, width = out.shape
    delta = launch.empty(images, heads, tokens, dtype=torch.float32, device=out.device)
    block = blocks("attention_backward_delta", out.device, head_width=width)
    rows = images * tokens * heads
    _delta[(ceil_div(rows, block["BLOCK_ROWS"]),)](
        out,
        grad,
        delta,
        rows,
        tokens,
        heads,
        K=width,
        BLOCK_K=max(power_of_two(width), 16),
        **block,
    )
    return delta
