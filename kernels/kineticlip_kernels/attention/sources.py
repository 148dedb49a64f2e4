"""Extra keys and values of `attention`, which several images share.

A source has M' rows of n tokens, and row m of the batch reads source row m // (M // M').
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from kineticlip_kernels.dispatch import UnsupportedInput, check_operands, dtype_name

Source = tuple[Tensor, Tensor]  # keys and values, each [M', n, H, K]
MAX_SOURCES = 4  # of the Triton face: a custom operator has a fixed number of arguments


def check_sources(op: str, qkv: Tensor, sources: Sequence[Source]) -> None:
    """Raises UnsupportedInput unless the operands are what `attention` says, of one dtype."""
    operands: dict[str, Tensor] = {"qkv": qkv}
    for index, source in enumerate(sources):
        if isinstance(source, Tensor) or len(source) != 2:
            raise UnsupportedInput(f"{op}: source {index} is no pair (k, v) of tensors")
        operands[f"k of source {index}"], operands[f"v of source {index}"] = source
    check_operands(op, **operands)
    if qkv.ndim != 5 or qkv.shape[2] != 3:
        raise UnsupportedInput(f"{op}: qkv is {tuple(qkv.shape)}, expected [M, N, 3, H, K]")
    for index, (k, v) in enumerate(sources):
        same = k.shape == v.shape and k.dtype == v.dtype
        if not same or k.ndim != 4 or k.shape[2:] != qkv.shape[3:] or k.dtype != qkv.dtype:
            raise UnsupportedInput(
                f"{op}: source {index} is k {tuple(k.shape)} {dtype_name(k.dtype)}, "
                f"v {tuple(v.shape)} {dtype_name(v.dtype)}; expected two "
                f"[M', n, {qkv.shape[3]}, {qkv.shape[4]}] of {dtype_name(qkv.dtype)}"
            )
        rows = k.shape[0]
        if rows == 0 or len(qkv) % rows:
            raise UnsupportedInput(
                f"{op}: source {index} has {rows} rows, which do not divide {len(qkv)} images"
            )


def shared_rows(source: Tensor, images: int) -> Tensor:
    """[M', n, ...] -> [M, n, ...], each row repeated for the images that share it."""
    rows = len(source)
    if rows == images:
        return source
    repeated = source.unsqueeze(1).expand(rows, images // rows, *source.shape[1:])
    return repeated.flatten(0, 1)


def with_sources(qkv: Tensor, sources: Sequence[Source]) -> tuple[Tensor, Tensor, Tensor]:
    """q [M, N, H, K]; k and v [M, N + sum n, H, K], views of qkv where there are no sources."""
    q, k, v = qkv.unbind(2)
    if not sources:
        return q, k, v
    keys = torch.cat([k, *(shared_rows(key, len(q)) for key, _ in sources)], dim=1)
    values = torch.cat([v, *(shared_rows(value, len(q)) for _, value in sources)], dim=1)
    return q, keys, values
