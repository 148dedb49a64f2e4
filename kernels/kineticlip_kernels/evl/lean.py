"""The lean faces of ops.py: plain PyTorch with hand-written gradients. See there for the letters.

What makes them small: the keys and values of T * N tokens are never projected, the weights of
P * P offset pairs never gathered, nothing but the normalised tokens and the maps kept for the
backward pass. Everything is a few large GEMMs and passes over one frame, which stays in cache.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from kineticlip_kernels.dispatch import full_precision
from kineticlip_kernels.evl.ops import wide


def _apply(function: Any, *inputs: Any) -> Tensor:
    result: Tensor = function.apply(*inputs)
    return result


def _without_autocast(method: Callable[..., Any]) -> Callable[..., Any]:
    """A forward or backward in the precision of its inputs and of `wide`, wherever it is called.

    Autocast would round what is kept for the backward pass, and reject sums in place.
    """

    @functools.wraps(method)
    def run(ctx: Any, first: Tensor, *rest: Any) -> Any:
        with full_precision(first):
            return method(ctx, first, *rest)

    return run


def _narrow(x: Tensor, dtype: torch.dtype) -> Tensor:
    """x in dtype. For results of an autograd.Function, where `x.to(dtype)` alone is a trap.

    Where x has that dtype already, `to` returns an alias, and torch.compile (PyTorch 2.11) drops
    the gradient of a Function whose result is one: every gradient becomes zero, silently.
    """
    return x if x.dtype == dtype else x.to(dtype)


def neighbour_maps_lean(q: Tensor, k: Tensor) -> Tensor:
    """The lean face of `neighbour_maps`: one pair of frames at a time."""
    for _ in range(q.shape[0]):
        pass  # torch.compile takes the number of clips for a constant now: it unrolls the Function
    return _apply(_NeighbourMaps, q, k)


class _NeighbourMaps(torch.autograd.Function):
    @staticmethod
    @_without_autocast
    def forward(ctx: Any, q: Tensor, k: Tensor) -> Tensor:
        ctx.save_for_backward(q, k)
        clips, frames, patches = q.shape[0], q.shape[1], q.shape[2] - 1
        maps = q.new_empty(2, clips, frames - 1, patches, patches)
        for clip, here, there, out in _neighbours(maps):
            scores = _scores(q[clip, here], k[clip, there])  # [H, P, P]
            torch.softmax(scores, dim=-1, out=scores)
            out.copy_(scores.mean(dim=0))
        return maps

    @staticmethod
    @_without_autocast
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        q, k = ctx.saved_tensors
        heads, scale = q.shape[3], q.shape[4] ** -0.5
        grad_q, grad_k = torch.zeros_like(wide(q)), torch.zeros_like(wide(k))
        for clip, here, there, upper in _neighbours(grad):
            weights = _scores(q[clip, here], k[clip, there]).softmax(dim=-1)  # [H, P, P]
            part = wide(upper) * (scale / heads)  # every head has the same part in the mean
            slope = part * weights
            slope -= weights * slope.sum(dim=-1, keepdim=True)
            grad_q[clip, here, 1:] += (slope @ _heads(k[clip, there])).transpose(0, 1)
            grad_k[clip, there, 1:] += (slope.mT @ _heads(q[clip, here])).transpose(0, 1)
        return grad_q.to(q.dtype), grad_k.to(k.dtype)


def _neighbours(maps: Tensor) -> Iterator[tuple[int, int, int, Tensor]]:
    """Every map [P, P] with its clip, the frame that looks and the frame it looks at."""
    for clip in range(maps.shape[1]):
        for frame in range(maps.shape[2]):
            yield clip, frame + 1, frame, maps[0, clip, frame]
            yield clip, frame, frame + 1, maps[1, clip, frame]


def _heads(tokens: Tensor) -> Tensor:
    """[N, H, K] -> [H, P, K] in fp32."""
    return wide(tokens[1:]).transpose(0, 1)


def _scores(q: Tensor, k: Tensor) -> Tensor:
    """q, k [N, H, K] of two frames -> [H, P, P] in fp32."""
    return torch.bmm(_heads(q) * q.shape[-1] ** -0.5, _heads(k).mT)


def displacement_lean(
    maps: Tensor, previous_weight: Tensor, next_weight: Tensor, *, grid: tuple[int, int]
) -> Tensor:
    """The lean face of `displacement`: bins by horizontal offset, then one GEMM per grid row.

    For the patches of one row of the grid, the offsets to row r share their vertical part, so
    the weights they use are rows of a contiguous window, and a map needs spreading over the
    2 w - 1 horizontal offsets only. That is 2 times the necessary products, against 3.7 with
    bins for both directions, and no copy of the weights.
    """
    weights = (previous_weight, next_weight)
    if torch.float64 in (maps.dtype, previous_weight.dtype):
        exact = [tensor.double() for tensor in (maps, *weights)]
        return _apply(_Displacement, *exact, grid).to(previous_weight.dtype)
    return _apply(_Displacement, maps, *weights, grid)


class _Displacement(torch.autograd.Function):
    @staticmethod
    @_without_autocast
    def forward(
        ctx: Any, maps: Tensor, previous: Tensor, following: Tensor, grid: tuple[int, int]
    ) -> Tensor:
        ctx.save_for_backward(maps, previous, following)
        ctx.grid = grid
        clips, frames = maps.shape[1], maps.shape[2] + 1
        total = torch.bmm(_bins(maps, 0, grid), _windows(previous, grid))  # [g, B * T * w, C]
        total.baddbmm_(_bins(maps, 1, grid), _windows(following, grid))
        by_row: Tensor = total.unflatten(1, (clips, frames, grid[1]))  # [g, B, T, w, C]
        return _narrow(by_row.permute(1, 2, 0, 3, 4).flatten(2, 3), previous.dtype)

    @staticmethod
    @_without_autocast
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor, Tensor, None]:
        maps, *weights = ctx.saved_tensors
        rows, columns = ctx.grid
        by_row = wide(grad).unflatten(2, ctx.grid).permute(2, 0, 1, 3, 4).flatten(1, 3)
        grad_maps = torch.empty_like(maps) if ctx.needs_input_grad[0] else None
        grad_weights = []
        for direction, weight in enumerate(weights):
            bins = _bins(maps, direction, ctx.grid)  # [g, B * T * w, g * (2 w - 1)]
            total = bins.new_zeros(2 * rows - 1, 2 * columns - 1, weight.shape[1])
            for row in range(rows):
                window = total[row : row + rows].flatten(0, 1)  # a view
                window.addmm_(bins[row].mT, by_row[row])
            grad_weights.append(total.flatten(0, 1).to(weight.dtype))
            if grad_maps is not None:
                torch.bmm(by_row, _windows(weight, ctx.grid).mT, out=bins)
                spread = _spread(bins, maps, direction, ctx.grid).permute(1, 2, 0, 3, 4, 5)
                grad_maps[direction] = spread.reshape(maps.shape[1:]).flip(-1)
        return grad_maps, grad_weights[0], grad_weights[1], None


def _bins(maps: Tensor, direction: int, grid: tuple[int, int]) -> Tensor:
    """The maps of one direction, spread over horizontal offsets. -> [g, B * T * w, g * (2 w - 1)].

    Frames without that neighbour are rows of zeros.
    """
    rows, columns = grid
    queries = maps.shape[1] * (maps.shape[2] + 1) * columns
    bins = wide(maps[:0]).new_zeros(rows, queries, rows * (2 * columns - 1))
    # Key patches run backwards, so that offsets (p - r) run forwards: see _spread and _windows.
    source = maps[direction].flip(-1).unflatten(-2, grid).unflatten(-1, grid)
    _spread(bins, maps, direction, grid).copy_(source.permute(2, 0, 1, 3, 4, 5))
    return bins


def _spread(bins: Tensor, maps: Tensor, direction: int, grid: tuple[int, int]) -> Tensor:
    """The elements of `bins` that carry a map: a view [g, B, T - 1, w, g, w].

    The last key column of query column p has the offset p, the one before it p + 1, and so on.
    """
    rows, columns = grid
    clips, frames = maps.shape[1], maps.shape[2] + 1
    line = rows * (2 * columns - 1)  # of one query
    row, clip, frame = clips * frames * columns * line, frames * columns * line, columns * line
    return bins.as_strided(
        (rows, clips, frames - 1, columns, rows, columns),
        (row, clip, frame, line + 1, 2 * columns - 1, 1),
        frame if direction == 0 else 0,  # the first frame has no previous one
    )


def _windows(weight: Tensor, grid: tuple[int, int]) -> Tensor:
    """The weights that each grid row uses: a view [g, g * (2 w - 1), C] of overlapping windows."""
    rows, columns = grid
    width, line = weight.shape[1], (2 * columns - 1) * weight.shape[1]
    shape = (rows, rows * (2 * columns - 1), width)
    return wide(weight).contiguous().as_strided(shape, (line, width, 1))


def attend_tokens_lean(
    query: Tensor,
    tokens: Tensor,
    *,
    conv_weight: Tensor | None = None,
    conv_bias: Tensor | None = None,
    position: Tensor | None = None,
    motion: Tensor | None = None,
    eps: float = 1e-5,
) -> Tensor:
    """The lean face of `attend_tokens`: keeps the normalised tokens and the weights."""
    return _apply(_AttendTokens, query, tokens, conv_weight, conv_bias, position, motion, eps)


class _AttendTokens(torch.autograd.Function):
    @staticmethod
    @_without_autocast
    def forward(
        ctx: Any,
        query: Tensor,
        tokens: Tensor,
        conv_weight: Tensor | None,
        conv_bias: Tensor | None,
        position: Tensor | None,
        motion: Tensor | None,
        eps: float,
    ) -> Tensor:
        f = _sum_terms(tokens, conv_weight, conv_bias, position, motion)
        z, _, rstd = torch.native_layer_norm(f, f.shape[-1:], None, None, eps)
        z = z.flatten(1, 2)  # [B, T * N, C]
        weights = torch.bmm(query.to(z.dtype), z.mT)  # [B, Q, T * N]
        torch.softmax(weights, dim=-1, out=weights)
        mixed = torch.bmm(weights, z)  # [B, Q, C]
        kept = tokens if ctx.needs_input_grad[2] else None
        ctx.save_for_backward(query, kept, conv_weight, z, rstd, weights)
        ctx.shape = tokens.shape
        ctx.dtypes = [
            None if term is None else term.dtype
            for term in (query, tokens, conv_weight, conv_bias, position, motion)
        ]
        return _narrow(mixed, query.dtype)

    @staticmethod
    @_without_autocast
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        query, tokens, conv_weight, z, rstd, weights = ctx.saved_tensors
        grad, query = grad.to(z.dtype), query.to(z.dtype)
        slope = torch.bmm(grad, z.mT).mul_(weights)  # [B, Q, T * N]
        slope.addcmul_(weights, slope.sum(dim=-1, keepdim=True), value=-1)
        grad_query = torch.bmm(slope, z)
        both = torch.cat([weights, slope], dim=1).mT  # [B, T * N, 2 Q]
        grad_z = torch.bmm(both, torch.cat([grad, query], dim=1))  # [B, T * N, C]
        grad_f = _layer_norm_backward(grad_z, z, rstd).view(ctx.shape)  # [B, T, N, C]
        need = ctx.needs_input_grad
        found = [
            grad_query,
            _conv_input_gradient(grad_f, conv_weight) if need[1] else None,
            _conv_weight_gradient(grad_f, tokens) if need[2] else None,
            grad_f.sum(dim=(0, 1, 2)) if need[3] else None,
            grad_f.sum(dim=(0, 2)) if need[4] else None,
            grad_f[:, :, 1:] if need[5] else None,
        ]
        narrow = [
            None if part is None else part.to(dtype)
            for part, dtype in zip(found, ctx.dtypes, strict=True)
        ]
        return (*narrow, None)


def _sum_terms(
    tokens: Tensor,
    conv_weight: Tensor | None,
    conv_bias: Tensor | None,
    position: Tensor | None,
    motion: Tensor | None,
) -> Tensor:
    """f in one new tensor [B, T, N, C] of fp32."""
    if conv_weight is None:
        f = wide(tokens).clone() if wide(tokens) is tokens else wide(tokens)
    else:
        before, centre, after = conv_weight.to(wide(tokens[:0]).dtype)[:, 0].unbind(1)  # [C] each
        f = tokens * (1 + centre)
        f[:, 1:].addcmul_(tokens[:, :-1], before)
        f[:, :-1].addcmul_(tokens[:, 1:], after)
    if conv_bias is not None:
        f += conv_bias if position is None else (wide(conv_bias) + wide(position))[:, None]
    elif position is not None:
        f += position[:, None]
    if motion is not None:
        f[:, :, 1:] += motion
    return f


def _layer_norm_backward(grad: Tensor, z: Tensor, rstd: Tensor) -> Tensor:
    """rstd (g - mean(g) - z mean(g z)), in the memory of the gradient."""
    projection = torch.linalg.vecdot(grad, z).unsqueeze(-1) / z.shape[-1]
    grad.sub_(grad.mean(dim=-1, keepdim=True)).addcmul_(z, projection, value=-1)
    return grad.mul_(rstd.view(*grad.shape[:2], 1))


def _conv_input_gradient(grad: Tensor, conv_weight: Tensor | None) -> Tensor:
    """Gradient of the tokens: the convolution runs backwards, plus the term that skips it."""
    if conv_weight is None:
        return grad
    before, centre, after = conv_weight.to(grad.dtype)[:, 0].unbind(1)
    found = grad * (1 + centre)
    found[:, :-1].addcmul_(grad[:, 1:], before)
    found[:, 1:].addcmul_(grad[:, :-1], after)
    return found


def _conv_weight_gradient(grad: Tensor, tokens: Tensor) -> Tensor:
    """[C, 1, 3]: products of gradient and neighbouring frames, one frame at a time."""
    frames, width = grad.shape[1], grad.shape[3]
    found = grad.new_zeros(3, width)
    for frame in range(frames):
        for tap in range(3):
            source = frame + tap - 1
            if 0 <= source < frames:
                found[tap] += (grad[:, frame] * tokens[:, source]).sum(dim=(0, 1))
    return found.mT.unsqueeze(1)
