"""From frame or view embeddings to scores: averages, cosine logits, cross-entropy, top classes.

Shape letters: B clips, T frames (or views), N rows to score, V views of a row, E embedding,
C classes. Means, norms, logits and softmax are fp32 (fp64 for fp64) whatever the inputs are.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kineticlip_kernels.dispatch import (
    Impl,
    UnsupportedInput,
    check_operands,
    check_tensors,
    choose,
    dtype_name,
    triton_reasons,
)
from kineticlip_kernels.head.reference import (
    class_cross_entropy_reference,
    mean_normalize_reference,
    mean_softmax_reference,
    top_classes_reference,
)

MAX_WIDTH = 8192  # E of `mean_normalize`: a row is one block
MAX_CLASSES = 16384  # C of `mean_softmax`: a row is one block
MAX_TOP = 16  # k of `top_classes`: sorted in registers, which 32 spill


def mean_normalize(x: Tensor, *, impl: Impl = "auto") -> Tensor:
    """The mean over axis 1, scaled to length one. x [B, T, E] -> [B, E] of its dtype.

    Frames of a clip, or raw embeddings of a video's views (Text4Vis averages before it
    normalises). Differentiable. Raises UnsupportedInput for other shapes, for integers, and where
    the face asked for cannot run.
    """
    check_operands("mean_normalize", x=x)
    if x.ndim != 3 or x.shape[1] == 0:
        raise UnsupportedInput(f"mean_normalize: x is {tuple(x.shape)}, expected [B, T >= 1, E]")
    why_not = triton_reasons(impl, x=x)
    if x.shape[-1] > MAX_WIDTH:
        why_not.append(f"rows of {x.shape[-1]} elements (at most {MAX_WIDTH})")
    if choose("mean_normalize", impl, why_not) == "reference":
        return mean_normalize_reference(x)
    from kineticlip_kernels.head.means_triton import mean_normalize_triton

    return mean_normalize_triton(x)


def class_cross_entropy(
    x: Tensor, classes: Tensor, labels: Tensor, scale: Tensor | float, *, impl: Impl = "auto"
) -> Tensor:
    """-log softmax(scale * x @ classes.T)[label] of each row, without the matrix [N, C].

    As Wijmans et al., "Cut Your Losses in Large-Vocabulary Language Models" (2024), section 4.
    x [N, E] and classes [C, E] of one dtype, normalised by the caller for cosine logits; labels
    int64 [N]; scale: a number, or a tensor of one -> fp32 [N] (fp64 for fp64). Differentiable in
    x, classes and scale. The Triton face keeps N log-sums for backward and works through the
    classes in chunks. Raises UnsupportedInput for other shapes and dtypes, for tensors on several
    devices, and where the face asked for cannot run.

    Labels are in [0, C), or IGNORED: loss 0. Any other makes its row's loss NaN, on every face
    and device: an error would cost a wait for the GPU. Neither kind of row has a gradient.
    """
    _check_rows("class_cross_entropy", x, classes, 2)
    if not isinstance(scale, Tensor):
        scale = x.new_full((), scale, dtype=torch.promote_types(x.dtype, torch.float32))
    check_tensors("class_cross_entropy", x=x, labels=labels, scale=scale)
    if labels.shape != x.shape[:1] or labels.dtype != torch.int64:
        raise UnsupportedInput(
            f"class_cross_entropy: labels are {dtype_name(labels.dtype)} {tuple(labels.shape)}, "
            f"expected int64 [{len(x)}]"
        )
    if scale.numel() != 1 or not scale.is_floating_point():
        raise UnsupportedInput(
            f"class_cross_entropy: scale is {dtype_name(scale.dtype)} {tuple(scale.shape)}, "
            "expected one number"
        )
    why_not = triton_reasons(impl, x=x, classes=classes)
    if x.dtype != classes.dtype:
        why_not.append("x and classes differ in dtype")
    if choose("class_cross_entropy", impl, why_not) == "reference":
        return class_cross_entropy_reference(x, classes, labels, scale)
    from kineticlip_kernels.head.loss_triton import class_cross_entropy_triton

    return class_cross_entropy_triton(x, classes, labels, scale)


def top_classes(
    x: Tensor, classes: Tensor, k: int, *, scale: float = 100.0, impl: Impl = "auto"
) -> tuple[Tensor, Tensor]:
    """The k likeliest classes under softmax(scale * x @ classes.T), best first.

    x [N, E] or [N, V, E], whose views' softmaxes are averaged; classes [C, E] of x's dtype; both
    normalised by the caller -> (probabilities fp32 [N, k], class numbers int64 [N, k]). The
    Triton face reads the classes twice and never holds [N, C]: at C = 100,000 that matrix is
    1.6 GB for 4096 videos. Among equal probabilities it takes the lower number; the reference,
    torch.topk, promises none. No gradient. Raises UnsupportedInput for other shapes, for integers,
    for tensors on several devices, and where the face asked for cannot run.
    """
    _check_rows("top_classes", x, classes, 2, 3)
    if not 1 <= k <= len(classes):
        raise UnsupportedInput(f"top_classes: k is {k}, expected 1 to C = {len(classes)}")
    why_not = triton_reasons(impl, x=x, classes=classes)
    if x.dtype != classes.dtype:
        why_not.append("x and classes differ in dtype")
    if k > MAX_TOP:
        why_not.append(f"k is {k} (at most {MAX_TOP})")
    if choose("top_classes", impl, why_not) == "reference":
        return top_classes_reference(x, classes, k, scale=scale)
    from kineticlip_kernels.head.top_triton import top_classes_triton

    return top_classes_triton(x, classes, k, scale=scale)


def mean_softmax(logits: Tensor, *, impl: Impl = "auto") -> Tensor:
    """The mean over views of softmax(logits). logits [N, V, C] -> fp32 [N, C].

    How EVL and Vita-CLIP average views. Differentiable but for the Triton face, which "auto"
    leaves out where logits need a gradient. Raises UnsupportedInput for other shapes, for
    integers, and where the face asked for cannot run.
    """
    check_operands("mean_softmax", logits=logits)
    if logits.ndim != 3 or logits.shape[1] == 0:
        raise UnsupportedInput(
            f"mean_softmax: logits are {tuple(logits.shape)}, expected [N, V >= 1, C]"
        )
    why_not = triton_reasons(impl, logits=logits)
    if logits.shape[-1] > MAX_CLASSES:
        why_not.append(f"{logits.shape[-1]} classes (at most {MAX_CLASSES})")
    if torch.is_grad_enabled() and logits.requires_grad:
        why_not.append("logits need a gradient")
    if choose("mean_softmax", impl, why_not) == "reference":
        return mean_softmax_reference(logits)
    from kineticlip_kernels.head.means_triton import mean_softmax_triton

    return mean_softmax_triton(logits)


def _check_rows(op: str, x: Tensor, classes: Tensor, *ranks: int) -> None:
    check_operands(op, x=x, classes=classes)
    if x.ndim not in ranks or classes.ndim != 2 or x.shape[-1] != classes.shape[-1]:
        raise UnsupportedInput(
            f"{op}: x is {tuple(x.shape)}, classes {tuple(classes.shape)}; expected "
            f"[N, E]{' or [N, V, E]' if 3 in ranks else ''} and [C, E]"
        )
    if x.ndim == 3 and x.shape[1] == 0:
        raise UnsupportedInput(f"{op}: x is {tuple(x.shape)}, without views")
    if len(classes) == 0:
        raise UnsupportedInput(f"{op}: there are no classes")
