"""The operations of EVL's decoder: motion between neighbouring frames, and one query per clip.

Lin et al., "Frozen CLIP Models are Efficient Video Learners" (ECCV 2022), sections 3.2 and 3.3.
Shape letters: B clips, T frames, g x w the grid of patches, P = g * w, N = 1 + P tokens (class
token first), C width, H heads of the trunk, K = C / H, Q heads of the decoder, O offsets
(2 g - 1)(2 w - 1). Each op has a third face, "lean": plain PyTorch with hand-written gradients,
several times faster and smaller than the reference; "auto" takes it wherever Triton cannot run.
"""

from __future__ import annotations

from torch import Tensor

from kineticlip_kernels.dispatch import (
    UnsupportedInput,
    check_operands,
    dtype_name,
    matrix_reasons,
    triton_reasons,
)
from kineticlip_kernels.evl.faces import EvlImpl, choose_face
from kineticlip_kernels.evl.reference import displacement_reference, neighbour_maps_reference


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
    face = choose_face("neighbour_maps", impl, matrix_reasons(impl, q=q, k=k))
    if face == "triton":
        from kineticlip_kernels.evl.maps_triton import neighbour_maps_triton

        return neighbour_maps_triton(q, k)
    if face == "lean":
        from kineticlip_kernels.evl.maps_lean import neighbour_maps_lean

        return neighbour_maps_lean(q, k)
    return neighbour_maps_reference(q, k)


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
    face = choose_face("displacement", impl, why_not)
    if face == "triton":
        from kineticlip_kernels.evl.displacement_triton import displacement_triton

        return displacement_triton(maps, *weights, grid=grid)
    if face == "lean":
        from kineticlip_kernels.evl.displacement_lean import displacement_lean

        return displacement_lean(maps, *weights, grid=grid)
    return displacement_reference(maps, *weights, grid=grid)


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
