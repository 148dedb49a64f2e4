"""The specification of both ops in plain PyTorch. Letters: see ops.py and class_ops.py."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from kineticlip_kernels.attention.sources import Source, shared_rows


def attention_reference(qkv: Tensor, *, sources: Sequence[Source] = ()) -> Tensor:
    """The specification of `attention` in plain PyTorch."""
    q, k, v = qkv.unbind(2)  # [M, N, H, K]
    q = q * q.shape[-1] ** -0.5
    keys, values = zip((k, v), *sources, strict=True)
    scores = torch.cat([_scores(q, key) for key in keys], dim=-1)  # [M, H, N, N + sum n]
    weights = _parts(scores.softmax(dim=-1), [key.shape[1] for key in keys])
    parts = [_mix(part, value) for part, value in zip(weights, values, strict=True)]
    return sum(parts[1:], parts[0])  # [M, N, H, K]


def class_attention_reference(
    x: Tensor, weight: Tensor, bias: Tensor, *, heads: int, sources: Sequence[Tensor] = ()
) -> Tensor:
    """The specification of `class_attention` in plain PyTorch."""
    query = absorbed_query(x, weight, bias, heads)  # [M, H, D]
    tokens = [shared_rows(source, len(x)) for source in (x, *sources)]  # [M, n, D]
    scores = torch.cat([query @ rows.transpose(1, 2) for rows in tokens], dim=-1)  # [M, H, S]
    weights = _parts(scores.softmax(dim=-1), [rows.shape[1] for rows in tokens])
    parts = [part @ rows for part, rows in zip(weights, tokens, strict=True)]
    return project_values(sum(parts[1:], parts[0]), weight, bias, heads)


def absorbed_query(x: Tensor, weight: Tensor, bias: Tensor, heads: int) -> Tensor:
    """The class token's query seen through the key projection, scaled. -> [M, H, D].

    q . (W_k y + b_k) = (W_k^T q) . y + q . b_k, and the last term is the same for every key.
    """
    width = x.shape[-1]
    q = F.linear(x[:, 0], weight[:width], bias[:width]) * (width // heads) ** -0.5  # [M, D]
    key_weight = weight[width : 2 * width].unflatten(0, (heads, -1))  # [H, K, D]
    return torch.einsum("mhk,hkd->mhd", q.unflatten(1, (heads, -1)), key_weight)


def project_values(mixed: Tensor, weight: Tensor, bias: Tensor, heads: int) -> Tensor:
    """W_v sum(p y) + b_v, head by head: the weights p sum to one. mixed [M, H, D] -> [M, H, K]."""
    width = mixed.shape[-1]
    value_weight = weight[2 * width :].unflatten(0, (heads, -1))  # [H, K, D]
    value_bias = bias[2 * width :].unflatten(0, (heads, -1))  # [H, K]
    out: Tensor = torch.einsum("mhd,hkd->mhk", mixed, value_weight) + value_bias
    return out


def _scores(q: Tensor, key: Tensor) -> Tensor:
    """q [M, N, H, K], key [M', n, H, K] -> [M, H, N, n]."""
    rows = len(key)
    grouped = q.unflatten(0, (rows, len(q) // max(rows, 1)))  # [M', M / M', N, H, K]
    return torch.einsum("grnhk,gshk->grhns", grouped, key).flatten(0, 1)


def _parts(weights: Tensor, sizes: Sequence[int]) -> list[Tensor]:
    """weights.split(sizes, dim=-1), whose backward behind a softmax Inductor gets wrong on a CPU
    (PyTorch 2.11): gradients off by more than their size."""
    ends = list(itertools.accumulate(sizes))
    return [weights[..., end - size : end] for end, size in zip(ends, sizes, strict=True)]


def _mix(weights: Tensor, value: Tensor) -> Tensor:
    """weights [M, H, N, n], value [M', n, H, K] -> [M, N, H, K]."""
    rows = len(value)
    grouped = weights.unflatten(0, (rows, len(weights) // max(rows, 1)))
    return torch.einsum("grhns,gshk->grnhk", grouped, value).flatten(0, 1)
