"""The operations of EVL's decoder: motion between neighbouring frames, and one query per clip.

Lin et al., "Frozen CLIP Models are Efficient Video Learners" (ECCV 2022), sections 3.2 and 3.3.
Shape letters: B clips, T frames, g x w the grid of patches, P = g * w, N = 1 + P tokens (class
token first), C width, H heads of the trunk, K = C / H, Q heads of the decoder, O offsets
(2 g - 1)(2 w - 1). Each op has a third face, "lean": plain PyTorch with hand-written gradients,
several times faster and smaller than the reference; "auto" takes it wherever Triton cannot run.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor

from kineticlip_kernels.dispatch import (
    UnsupportedInput,
    check_operands,
    choose,
    dtype_name,
    full_precision,
    matrix_reasons,
    triton_reasons,
)
from kineticlip_kernels.tables import kept

EvlImpl = Literal["auto", "reference", "lean", "triton"]
FACES = get_args(EvlImpl)

MAX_WIDTH = 2048  # C of `attend_tokens`: a tile of tokens is whole rows in registers
MAX_HEADS = 16  # Q; with 32, kernels of 1024 columns spill registers


def neighbour_maps(q: Tensor, k: Tensor, *, impl: EvlImpl = "auto") -> Tensor:
    """Where the patches of a frame find themselves in the frame before and in the frame after.

    q, k: [B, T, N, H, K] of one trunk block, before scaling, with bias; the class token is left
    out. maps[0, b, t] is frame t + 1 looking at t, maps[1, b, t] is frame t looking at t + 1:
    softmax over the other frame's patches, then the mean over heads -> [2, B, T - 1, P, P] of
    their dtype; [2, B, 0, P, P] for one frame. Differentiable. Raises UnsupportedInput for other
    shapes and dtypes, for tensors on several devices, and where the face asked for cannot run.
    """
    check_operands("neighbour_maps", q=q, k=k)
    if q.ndim != 5 or q.shape != k.shape or q.dtype != k.dtype or q.shape[2] < 2:
        raise UnsupportedInput(
            f"neighbour_maps: q is {tuple(q.shape)} {dtype_name(q.dtype)}, k {tuple(k.shape)} "
            f"{dtype_name(k.dtype)}; expected two [B, T, N >= 2, H, K] of one dtype"
        )
    face = _choose("neighbour_maps", impl, matrix_reasons(impl, q=q, k=k))
    if face == "triton":
        from kineticlip_kernels.evl.maps_triton import neighbour_maps_triton

        return neighbour_maps_triton(q, k)
    if face == "lean":
        from kineticlip_kernels.evl.lean import neighbour_maps_lean

        return neighbour_maps_lean(q, k)
    return neighbour_maps_reference(q, k)


def neighbour_maps_reference(q: Tensor, k: Tensor) -> Tensor:
    """The specification of `neighbour_maps` in plain PyTorch."""
    later, earlier = slice(1, None), slice(None, -1)
    pairs = [(q[:, later], k[:, earlier]), (q[:, earlier], k[:, later])]
    maps = []
    for queries, keys in pairs:
        queries, keys = wide(queries[:, :, 1:]), wide(keys[:, :, 1:])  # [B, T - 1, P, H, K]
        with full_precision(q):
            scores = torch.einsum("btphk,btrhk->bthpr", queries * q.shape[-1] ** -0.5, keys)
        maps.append(scores.softmax(dim=-1).mean(dim=2))  # [B, T - 1, P, P]
    return torch.stack(maps).to(q.dtype)


def displacement(
    maps: Tensor,
    previous_weight: Tensor,
    next_weight: Tensor,
    *,
    grid: tuple[int, int],
    impl: EvlImpl = "auto",
) -> Tensor:
    """Sums of learned offset vectors, weighted by where each patch went: EVL's X.

    maps [2, B, T - 1, P, P] of `neighbour_maps`; previous_weight (w1) and next_weight (w2):
    [O, C] of one dtype, a row for each offset -> [B, T, P, C] of that dtype. A missing neighbour
    adds nothing. Differentiable in all three. Raises UnsupportedInput as `neighbour_maps` does.
    """
    weights = (previous_weight, next_weight)
    _check_displacement(maps, weights, grid)
    why_not = triton_reasons(impl, maps=maps, previous_weight=weights[0], next_weight=weights[1])
    face = _choose("displacement", impl, why_not)
    if face == "triton":
        from kineticlip_kernels.evl.displacement_triton import displacement_triton

        return displacement_triton(maps, *weights, grid=grid)
    if face == "lean":
        from kineticlip_kernels.evl.lean import displacement_lean

        return displacement_lean(maps, *weights, grid=grid)
    return displacement_reference(maps, *weights, grid=grid)


def displacement_reference(
    maps: Tensor, previous_weight: Tensor, next_weight: Tensor, *, grid: tuple[int, int]
) -> Tensor:
    """The specification of `displacement` in plain PyTorch; it gathers [P, P, C]."""
    table = offsets(grid, maps.device)  # [P, P]
    dtype = torch.promote_types(wide(maps).dtype, wide(previous_weight).dtype)
    with full_precision(maps):
        before, after = (
            torch.einsum("btpr,prc->btpc", part.to(dtype), weight.to(dtype)[table])
            for part, weight in zip(maps, (previous_weight, next_weight), strict=True)
        )  # [B, T - 1, P, C]
    total = F.pad(before, (0, 0, 0, 0, 1, 0)) + F.pad(after, (0, 0, 0, 0, 0, 1))
    return total.to(previous_weight.dtype)


@kept(16)
def offsets(grid: tuple[int, int], device: torch.device) -> Tensor:
    """The row of the offset weights for query patch p and key patch r. int64 [P, P]."""
    rows, columns = grid
    y, x = torch.arange(rows, device=device), torch.arange(columns, device=device)
    dy = y[:, None, None, None] - y[None, None, :, None] + rows - 1
    dx = x[None, :, None, None] - x[None, None, None, :] + columns - 1
    return (dy * (2 * columns - 1) + dx).reshape(rows * columns, rows * columns)


def attend_tokens(
    query: Tensor,
    tokens: Tensor,
    *,
    conv_weight: Tensor | None = None,
    conv_bias: Tensor | None = None,
    position: Tensor | None = None,
    motion: Tensor | None = None,
    eps: float = 1e-5,
    impl: EvlImpl = "auto",
) -> Tensor:
    """One query per clip and head over all its tokens, normalised but never projected.

    f = tokens + depthwise conv over time of tokens + position + motion (none for class tokens),
    z = (f - mean) / std, and the result is sum_n softmax_n(query . z_n) z_n.
    query [B, Q, C], see `absorb_query`; tokens [B, T, N, C]; conv_weight [C, 1, 3] and conv_bias
    [C], zero padding; position [T, C]; motion [B, T, P, C], what `displacement` gives; every
    term may be left out -> [B, Q, C] of query's dtype. Dtypes may differ; sums are fp32.
    Differentiable in all. Raises UnsupportedInput for other shapes, for integers, for tensors on
    several devices, and where the face asked for cannot run.
    """
    terms = {
        "conv_weight": conv_weight,
        "conv_bias": conv_bias,
        "position": position,
        "motion": motion,
    }
    given = {name: term for name, term in terms.items() if term is not None}
    _check_tokens(query, tokens, given)
    why_not = triton_reasons(impl, query=query, tokens=tokens, **given)
    if tokens.shape[-1] > MAX_WIDTH:
        why_not.append(f"C is {tokens.shape[-1]} (at most {MAX_WIDTH})")
    if query.shape[1] > MAX_HEADS:
        why_not.append(f"Q is {query.shape[1]} (at most {MAX_HEADS})")
    face = _choose("attend_tokens", impl, why_not)
    if face == "triton":
        from kineticlip_kernels.evl.tokens_triton import attend_tokens_triton

        return attend_tokens_triton(query, tokens, **terms, eps=eps)
    if face == "lean":
        from kineticlip_kernels.evl.lean import attend_tokens_lean

        return attend_tokens_lean(query, tokens, **terms, eps=eps)
    return attend_tokens_reference(query, tokens, **terms, eps=eps)


def attend_tokens_reference(
    query: Tensor,
    tokens: Tensor,
    *,
    conv_weight: Tensor | None = None,
    conv_bias: Tensor | None = None,
    position: Tensor | None = None,
    motion: Tensor | None = None,
    eps: float = 1e-5,
) -> Tensor:
    """The specification of `attend_tokens` in plain PyTorch."""
    f = wide(tokens)  # [B, T, N, C]
    with full_precision(tokens):
        if conv_weight is not None and conv_bias is not None:
            clips, _, count, width = f.shape
            series = f.permute(0, 2, 3, 1).flatten(0, 1)  # [B * N, C, T]
            weight, bias = conv_weight.to(f.dtype), conv_bias.to(f.dtype)
            series = F.conv1d(series, weight, bias, padding=1, groups=width)
            f = f + series.unflatten(0, (clips, count)).permute(0, 3, 1, 2)
        if position is not None:
            f = f + position.to(f.dtype)[:, None]
        if motion is not None:
            f = f + F.pad(motion.to(f.dtype), (0, 0, 1, 0))
        z = F.layer_norm(f, f.shape[-1:], eps=eps).flatten(1, 2)  # [B, T * N, C]
        weights = (query.to(z.dtype) @ z.transpose(1, 2)).softmax(dim=-1)  # [B, Q, T * N]
        return (weights @ z).to(query.dtype)


def absorb_query(q: Tensor, norm_weight: Tensor, key_weight: Tensor, *, heads: int) -> Tensor:
    """The query of a clip seen through the key projection and the norm before it.

    q [B, D], projected, with bias; norm_weight [C]; key_weight [D, C] -> [B, Q, C]. The biases
    of the norm and of the keys add the same to every score of a query, so softmax drops them.
    """
    parts = q.unflatten(-1, (heads, -1)) * (q.shape[-1] // heads) ** -0.5  # [B, Q, D / Q]
    return torch.einsum("bqd,qdc->bqc", parts, key_weight.unflatten(0, (heads, -1))) * norm_weight


def project_mixed(
    mixed: Tensor, norm_weight: Tensor, norm_bias: Tensor, value_weight: Tensor, value_bias: Tensor
) -> Tensor:
    """Norm and value projection behind the weighted sum, whose weights add up to one.

    mixed [B, Q, C] of `attend_tokens`; value_weight [D, C]; value_bias [D] -> [B, D].
    """
    normed = mixed * norm_weight + norm_bias
    per_head = value_weight.unflatten(0, (mixed.shape[1], -1))  # [Q, D / Q, C]
    return torch.einsum("bqc,qdc->bqd", normed, per_head).flatten(1) + value_bias


def wide(x: Tensor) -> Tensor:
    """x in fp32, or as it is where it is wider."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _choose(op: str, impl: EvlImpl, why_not: Sequence[str]) -> str:
    return choose(op, impl, why_not, slow="lean", known=FACES)


def _check_displacement(
    maps: Tensor, weights: tuple[Tensor, Tensor], grid: tuple[int, int]
) -> None:
    check_operands("displacement", maps=maps, previous_weight=weights[0], next_weight=weights[1])
    patches, bins = grid[0] * grid[1], (2 * grid[0] - 1) * (2 * grid[1] - 1)
    if maps.ndim != 5 or len(maps) != 2 or maps.shape[3:] != (patches, patches):
        raise UnsupportedInput(
            f"displacement: maps are {tuple(maps.shape)}, expected "
            f"[2, B, T - 1, {patches}, {patches}] for a grid of {grid[0]} x {grid[1]}"
        )
    first, second = weights
    same = first.shape == second.shape and first.dtype == second.dtype
    if first.ndim != 2 or len(first) != bins or not same:
        raise UnsupportedInput(
            f"displacement: previous_weight is {tuple(first.shape)} {dtype_name(first.dtype)}, "
            f"next_weight {tuple(second.shape)} {dtype_name(second.dtype)}; expected two "
            f"[{bins}, C] of one dtype"
        )


def _check_tokens(query: Tensor, tokens: Tensor, given: dict[str, Tensor]) -> None:
    check_operands("attend_tokens", query=query, tokens=tokens, **given)
    if tokens.ndim != 4:
        raise UnsupportedInput(
            f"attend_tokens: tokens are {tuple(tokens.shape)}, expected [B, T, N, C]"
        )
    clips, frames, count, width = tokens.shape
    expected = {
        "conv_weight": (width, 1, 3),
        "conv_bias": (width,),
        "position": (frames, width),
        "motion": (clips, frames, count - 1, width),
    }
    for name, term in given.items():
        if term.shape != expected[name]:
            raise UnsupportedInput(
                f"attend_tokens: {name} is {tuple(term.shape)}, expected {expected[name]}"
            )
    if query.ndim != 3 or (query.shape[0], query.shape[2]) != (clips, width):
        raise UnsupportedInput(
            f"attend_tokens: query is {tuple(query.shape)}, expected [{clips}, Q, {width}]"
        )
    if ("conv_weight" in given) != ("conv_bias" in given):
        raise UnsupportedInput("attend_tokens: conv_weight and conv_bias come together")
