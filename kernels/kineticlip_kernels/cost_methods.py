"""Floating-point operations and bytes of what surrounds the trunk; the rules are those of cost.py.

Shape letters: U frames, V crops, S side of a crop, M images, B clips, T frames, P patches,
N = 1 + P tokens, R rows, C classes or width of the trunk, E embedding, Q heads of a decoder.
"""

from __future__ import annotations

from kineticlip_kernels.cost import Cost, attention
from kineticlip_kernels.patches import patch_columns


def cut_crops(frames: int, height: int, width: int, crops: int, side: int) -> Cost:
    """Frames of height x width read, crops written; one byte a value."""
    return Cost(0, 3.0 * frames * (height * width + crops * side * side))


def unfold_patches(images: int, side: int, patch: int, itemsize: int) -> Cost:
    """Bytes read, the padded patch matrix written."""
    rows = (side // patch) ** 2
    return Cost(0, images * (3.0 * side * side + rows * patch_columns(patch) * itemsize))


def mean_normalize(
    clips: int, frames: int, width: int, itemsize: int, *, backward: bool = False
) -> Cost:
    """x read, y written; backward: y's gradient and the fp32 mean read, dx written."""
    extra = itemsize + 4 if backward else itemsize
    return Cost(0, clips * width * (frames * itemsize + extra))


def class_cross_entropy(
    rows: int, classes: int, width: int, itemsize: int, *, backward: bool = False
) -> Cost:
    """One product of R x C x E; backward: the logits again, then both gradients."""
    product, operands = 2.0 * rows * classes * width, (rows + classes) * width * itemsize
    return Cost(3 * product, 2 * operands) if backward else Cost(product, operands)


def top_classes(rows: int, classes: int, width: int, itemsize: int) -> Cost:
    """One product; the kernel makes it twice, which the limit does not ask for."""
    return Cost(2.0 * rows * classes * width, (rows + classes) * width * itemsize)


def mean_softmax(items: int, views: int, classes: int, itemsize: int) -> Cost:
    """Logits read, fp32 probabilities written."""
    return Cost(0, items * classes * (views * itemsize + 4))


def frame_attention(
    clips: int, frames: int, heads: int, width: int, itemsize: int, *, backward: bool = False
) -> Cost:
    """width is that of a head."""
    return attention(clips, frames, heads, width, itemsize, backward=backward)


def neighbour_maps(
    clips: int, frames: int, patches: int, width: int, itemsize: int, *, backward: bool = False
) -> Cost:
    """width is H K. Two directions of T - 1 products of P x P x H K; backward: four more each.

    q and k read, maps written; backward: q, k and the gradient of the maps read, two written.
    """
    pairs = 2.0 * clips * (frames - 1)
    product = 2 * pairs * patches * patches * width
    tensors = 2 * clips * frames * patches * width * itemsize
    maps = pairs * patches * patches * itemsize
    return Cost(4 * product, 2 * tensors + maps) if backward else Cost(product, tensors + maps)


def displacement(
    clips: int,
    frames: int,
    grid: tuple[int, int],
    width: int,
    itemsize: int,
    *,
    backward: bool = False,
) -> Cost:
    """Two directions of T - 1 products of P x P x C. Backward: those of the weights alone.

    Maps and weights read, sums written; backward: maps and gradient read, weights written.
    """
    patches, offsets = grid[0] * grid[1], (2 * grid[0] - 1) * (2 * grid[1] - 1)
    maps = 2.0 * clips * (frames - 1) * patches * patches
    sums = clips * frames * patches * width
    # One product either way, and the same three tensors: only their roles change.
    return Cost(2 * maps * width, (maps + sums + 2 * offsets * width) * itemsize)


def attend_tokens(
    clips: int,
    frames: int,
    tokens: int,
    width: int,
    heads: int,
    itemsize: int,
    *,
    backward: bool = False,
) -> Cost:
    """Scores and sums over T * N tokens for Q queries; tokens and motion read.

    Backward, the tokens frozen: four such products, and the gradient of the motion written.
    """
    values = clips * frames * tokens * width
    product = 2.0 * values * heads
    if backward:
        return Cost(4 * product, 3.0 * values * itemsize)
    return Cost(2 * product, 2.0 * values * itemsize)
