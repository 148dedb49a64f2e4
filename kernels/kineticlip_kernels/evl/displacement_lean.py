"""The lean face of `displacement`: a few large GEMMs on views. Letters: see ops.py."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from kineticlip_kernels.dispatch import wide
from kineticlip_kernels.evl.lean import apply, narrow, without_autocast


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
        return apply(_Displacement, *exact, grid).to(previous_weight.dtype)
    return apply(_Displacement, maps, *weights, grid)


class _Displacement(torch.autograd.Function):
    @staticmethod
    @without_autocast
    def forward(
        ctx: Any, maps: Tensor, previous: Tensor, following: Tensor, grid: tuple[int, int]
    ) -> Tensor:
        ctx.save_for_backward(maps, previous, following)
        ctx.grid = grid
        clips, frames = maps.shape[1], maps.shape[2] + 1
        total = torch.bmm(_bins(maps, 0, grid), _windows(previous, grid))  # [g, B * T * w, C]
        total.baddbmm_(_bins(maps, 1, grid), _windows(following, grid))
        by_row: Tensor = total.unflatten(1, (clips, frames, grid[1]))  # [g, B, T, w, C]
        return narrow(by_row.permute(1, 2, 0, 3, 4).flatten(2, 3), previous.dtype)

    @staticmethod
    @without_autocast
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
