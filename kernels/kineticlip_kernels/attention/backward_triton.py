"""The backward pass of attention in Triton: keys and values in one kernel, queries in another.

Shape letters as in sets_triton.py. No atomics: gradients repeat to the bit.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls, allow-untyped-decorators

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from kineticlip_kernels import launch
from kineticlip_kernels.attention.sets_triton import (
    LOG2_E,
    key_sets,
    load_tile,
    set_arguments,
    store_tile,
)
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


@triton.jit
def _backward_keys(
    q_ptr,  # [M, N, H, K]
    k_ptr,  # one set: [M', n, H, K]
    v_ptr,
    grad_ptr,  # [M, N, H, K]: gradient of the output
    lse_ptr,  # fp32 [M, H, N]
    delta_ptr,  # fp32 [M, H, N]
    grad_k_ptr,  # [splits, M', n, H, K]
    grad_v_ptr,
    q_image_stride,
    q_token_stride,
    key_row,
    key_token,
    value_row,
    value_token,
    grad_split,  # strides of the two gradients
    grad_row,
    grad_token,
    N,
    H,
    length,  # n
    share,  # M / M'
    splits,  # programs that divide the images of a row among them
    scale,
    K: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """dv = p^T do and dk = ds^T q / sqrt(K), with ds = p (do v^T - delta), over all queries."""
    tiles = tl.cdiv(length, BLOCK_N)
    first = tl.program_id(0) % tiles * BLOCK_N
    head = tl.program_id(0) // tiles % H
    split = (tl.program_id(0) // tiles // H % splits).to(tl.int64)
    row = (tl.program_id(0) // tiles // H // splits).to(tl.int64)
    k = load_tile(k_ptr + row * key_row + head * K, first, length, key_token, K, BLOCK_K, BLOCK_N)
    v = load_tile(
        v_ptr + row * value_row + head * K, first, length, value_token, K, BLOCK_K, BLOCK_N
    )
    grad_k = tl.zeros([BLOCK_N, BLOCK_K], dtype=tl.float32)
    grad_v = tl.zeros([BLOCK_N, BLOCK_K], dtype=tl.float32)
    q_tiles = tl.cdiv(N, BLOCK_M)
    images = tl.cdiv(share, splits)
    begin = split * images
    count = tl.maximum(tl.minimum(images, share - begin), 0)
    for step in range(0, (count * q_tiles).to(tl.int32)):
        image = row * share + begin + step // q_tiles
        start = step % q_tiles * BLOCK_M
        token = start + tl.arange(0, BLOCK_M)
        q = load_tile(
            q_ptr + image * q_image_stride + head * K, start, N, q_token_stride, K, BLOCK_K, BLOCK_M
        )
        grad = load_tile(
            grad_ptr + image * N * H * K + head * K, start, N, H * K, K, BLOCK_K, BLOCK_M
        )
        statistics = (image * H + head) * N + token
        # Rows behind the end get weight 2^-inf = 0.
        lse = tl.load(lse_ptr + statistics, mask=token < N, other=float("inf"))
        delta = tl.load(delta_ptr + statistics, mask=token < N, other=0.0)
        scores = tl.dot(k, q.T, input_precision="ieee") * scale
        weights = tl.exp2(scores - lse[None, :])  # [BLOCK_N, BLOCK_M]
        grad_v = tl.dot(weights.to(grad.dtype), grad, grad_v, input_precision="ieee")
        grad_weights = tl.dot(v, grad.T, input_precision="ieee")
        grad_scores = weights * (grad_weights - delta[None, :])
        grad_k = tl.dot(grad_scores.to(q.dtype), q, grad_k, input_precision="ieee")
    place = split * grad_split + row * grad_row + head * K
    grad_k = grad_k * (scale * 0.6931471805599453)  # ln 2: scale is for powers of two
    store_tile(grad_k_ptr + place, grad_k, first, length, grad_token, K, BLOCK_K, BLOCK_N)
    store_tile(grad_v_ptr + place, grad_v, first, length, grad_token, K, BLOCK_K, BLOCK_N)


@triton.jit
def _backward_queries(
    q_ptr,  # as in _forward
    keys,
    values,
    strides,
    lengths,
    shares,
    grad_ptr,  # [M, N, H, K]: gradient of the output
    lse_ptr,  # fp32 [M, H, N]
    delta_ptr,  # fp32 [M, H, N]
    grad_q_ptr,  # strides as q
    q_image_stride,
    q_token_stride,
    N,
    H,
    scale,
    K: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """dq = ds k / sqrt(K), over all sets of keys."""
    tiles = tl.cdiv(N, BLOCK_M)
    first = tl.program_id(0) % tiles * BLOCK_M
    head = tl.program_id(0) // tiles % H
    image = (tl.program_id(0) // tiles // H).to(tl.int64)
    place = image * q_image_stride + head * K
    q = load_tile(q_ptr + place, first, N, q_token_stride, K, BLOCK_K, BLOCK_M)
    grad = load_tile(grad_ptr + image * N * H * K + head * K, first, N, H * K, K, BLOCK_K, BLOCK_M)
    token = first + tl.arange(0, BLOCK_M)
    statistics = (image * H + head) * N + token
    lse = tl.load(lse_ptr + statistics, mask=token < N, other=float("inf"))
    delta = tl.load(delta_ptr + statistics, mask=token < N, other=0.0)
    grad_q = tl.zeros([BLOCK_M, BLOCK_K], dtype=tl.float32)
    for index in tl.static_range(len(keys)):
        key_row, key_token, value_row, value_token = strides[index]
        row = image // shares[index]
        k_ptr = keys[index] + row * key_row + head * K
        v_ptr = values[index] + row * value_row + head * K
        length = lengths[index]
        for start in range(0, length, BLOCK_N):
            k = load_tile(k_ptr, start, length, key_token, K, BLOCK_K, BLOCK_N)
            v = load_tile(v_ptr, start, length, value_token, K, BLOCK_K, BLOCK_N)
            scores = tl.dot(q, k.T, input_precision="ieee") * scale
            # Keys behind the end score zero, at times far above real scores: their weight, in 16
            # bits infinite, would make NaN of their zeros. Masking scores spills on sm_100.
            known = (start + tl.arange(0, BLOCK_N) < length)[None, :]
            weights = tl.where(known, tl.exp2(scores - lse[:, None]), 0.0)
            grad_weights = tl.dot(grad, v.T, input_precision="ieee")
            grad_scores = weights * (grad_weights - delta[:, None])
            grad_q = tl.dot(grad_scores.to(k.dtype), k, grad_q, input_precision="ieee")
    grad_q = grad_q * (scale * 0.6931471805599453)
    store_tile(grad_q_ptr + place, grad_q, first, N, q_token_stride, K, BLOCK_K, BLOCK_M)


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
    """-> gradients of qkv and the eight; empty where there is no tensor or no wish."""
    qkv, grad = qkv.contiguous(), grad.contiguous()
    images, tokens, _, heads, width = qkv.shape
    keys, values = key_sets(qkv, (k0, v0, k1, v1, k2, v2, k3, v3))
    grad_qkv = launch.empty(*qkv.shape, dtype=qkv.dtype, device=qkv.device)
    found = [grad_qkv] + [qkv.new_empty(0) for _ in range(8)]
    if not images or not tokens:
        for index, tensor in enumerate((k0, v0, k1, v1, k2, v2, k3, v3), start=1):
            pair = (index - 1) // 2 * 2 + 1  # keys and values get theirs together
            if tensor is not None and any(flags[pair : pair + 2]):
                found[index] = tensor.new_zeros(tensor.shape)
        return found
    delta = _launch_delta(out, grad)
    if flags[0]:
        block = blocks("attention_backward_queries", qkv.device, head_width=width)
        _backward_queries[(ceil_div(tokens, block["BLOCK_M"]) * heads * images,)](
            qkv,
            keys,
            values,
            *set_arguments(images, keys, values),
            grad,
            lse,
            delta,
            grad_qkv,
            *qkv.stride()[:2],
            tokens,
            heads,
            width**-0.5 * LOG2_E,
            K=width,
            BLOCK_K=max(power_of_two(width), 16),
            **block,
        )
        own = (grad_qkv[:, :, 1], grad_qkv[:, :, 2])
        _launch_keys(qkv, keys[0], values[0], grad, lse, delta, *(g.unsqueeze(0) for g in own))
    for index in range(1, len(keys)):
        if any(flags[2 * index - 1 : 2 * index + 1]):
            k, v = keys[index], values[index]
            # The images of a row are divided so that a source shared by all still fills a GPU.
            splits = min(images // len(k), 16)
            parts = [
                launch.empty(splits, *k.shape, dtype=torch.float32, device=k.device)
                for _ in range(2)
            ]
            _launch_keys(qkv, k, v, grad, lse, delta, *parts)
            found[2 * index - 1 : 2 * index + 1] = [p.sum(dim=0).to(k.dtype) for p in parts]
    return found


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


def _launch_keys(
    qkv: Tensor,
    k: Tensor,
    v: Tensor,
    grad: Tensor,
    lse: Tensor,
    delta: Tensor,
    grad_k: Tensor,
    grad_v: Tensor,
) -> None:
    """Fills grad_k and grad_v, [splits, M', n, H, K] of equal strides."""
    images, tokens, _, heads, width = qkv.shape
    rows, length = k.shape[:2]
    splits = len(grad_k)
    block = blocks("attention_backward_keys", qkv.device, head_width=width)
    _backward_keys[(ceil_div(length, block["BLOCK_N"]) * heads * splits * rows,)](
        qkv,
        k,
        v,
        grad,
        lse,
        delta,
        grad_k,
        grad_v,
        *qkv.stride()[:2],
        *k.stride()[:2],
        *v.stride()[:2],
        *grad_k.stride()[:3],
        tokens,
        heads,
        length,
        images // rows,
        splits,
        width**-0.5 * LOG2_E,
        K=width,
        BLOCK_K=max(power_of_two(width), 16),
        **block,
    )
