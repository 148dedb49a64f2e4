"""What `cut_crops` shows of the frames: Pillow's coefficients, cut to the size of the crops."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from kineticlip_kernels.patches.resample import Crop, Resample, resample_table
from kineticlip_kernels.tables import kept


class Windows(NamedTuple):
    """What `crops` show of the frames; see the kernels for the shapes."""

    columns_first: Tensor
    columns_weights: Tensor
    variants: Tensor
    rows_first: Tensor
    rows_weights: Tensor
    row_start: int
    rows: int  # source rows that any crop reads: [row_start, row_start + rows)


@kept(64)  # videos of one size come in runs; saves five host copies each
def windows(
    source: tuple[int, int],
    target: tuple[int, int],
    crops: tuple[Crop, ...],
    side: int,
    resample: Resample,
    device: torch.device,
) -> Windows:
    """source and target: (width, height)."""
    variants = sorted({(x, mirrored) for x, _, mirrored in crops})
    column_table = resample_table(source[0], target[0], resample)
    row_table = resample_table(source[1], target[1], resample)
    columns = [_cut(column_table, x, side, mirrored) for x, mirrored in variants]
    rows = [_cut(row_table, y, side, False) for _, y, _ in crops]
    rows_first = torch.stack([first for first, _ in rows])  # [V, S]
    rows_weights = torch.stack([weights for _, weights in rows])  # [V, taps, S]
    used = rows_first[(rows_weights != 0).any(dim=1)]
    row_start = int(used.min()) if used.numel() else 0
    row_end = min(int(used.max()) + rows_weights.shape[1], source[1]) if used.numel() else 1
    return Windows(
        torch.stack([first for first, _ in columns]).to(device),
        torch.stack([weights for _, weights in columns]).to(device),
        torch.tensor([variants.index((x, m)) for x, _, m in crops], dtype=torch.int32).to(device),
        (rows_first - row_start).clamp_(min=0).to(device),
        rows_weights.to(device),
        row_start,
        row_end - row_start,
    )


def _cut(
    table: tuple[Tensor, Tensor], start: int, side: int, mirrored: bool
) -> tuple[Tensor, Tensor]:
    """The part of a table that a crop sees: first [S], weights [taps, S]; zero outside."""
    first, weights = table
    place = torch.arange(start, start + side)
    place = place.flip(0) if mirrored else place
    inside = (place >= 0) & (place < len(first))
    place = place.clamp(0, len(first) - 1)
    return first[place] * inside, weights[:, place] * inside
