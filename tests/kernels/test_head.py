"""Averages, cosine logits, cross-entropy and top classes: the Triton face against the reference."""

from __future__ import annotations

from functools import partial

import pytest
import torch
import torch.nn.functional as F
from kernel_rig import BF16, DEVICE, DTYPES, FP32, check, on_gpu, randn, strided
from torch import Tensor

from kineticlip_kernels.dispatch import Impl, UnsupportedInput
from kineticlip_kernels.head import (
    IGNORED,
    class_cross_entropy,
    class_cross_entropy_reference,
    loss_triton,
    mean_normalize,
    mean_normalize_reference,
    mean_softmax,
    mean_softmax_reference,
    means_triton,
    top_classes,
    top_classes_reference,
    top_triton,
)

mean_normalize_face = partial(mean_normalize, impl="triton")
cross_entropy_face = partial(class_cross_entropy, impl="triton")


def rows(*shape: int, dtype: torch.dtype = FP32, seed: int = 0, grad: bool = True) -> Tensor:
    """Random rows of length one."""
    values = randn(*shape, dtype=FP32, seed=seed, grad=False)
    return F.normalize(values, dim=-1).to(dtype).requires_grad_(grad)


def labels(count: int, classes: int) -> Tensor:
    return torch.randint(classes, (count,), generator=torch.Generator().manual_seed(7)).to(DEVICE)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "shape", [(3, 5, 37), (1, 1, 64), (2, 9, 130), (0, 3, 8), *on_gpu((40, 32, 768))]
)
def test_mean_normalize(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    check(mean_normalize_reference, mean_normalize_face, x=randn(*shape, dtype=dtype))


def test_mean_normalize_of_strided_views_and_large_means() -> None:
    check(mean_normalize_reference, mean_normalize_face, x=strided(randn(3, 4, 20)))
    transposed = randn(5, 2, 16).detach().transpose(0, 1).requires_grad_()
    check(mean_normalize_reference, mean_normalize_face, x=transposed)
    check(mean_normalize_reference, mean_normalize_face, x=randn(2, 3, 24, mean=100.0))


@pytest.mark.parametrize("impl", ["reference", "triton"])
def test_mean_normalize_of_zeros_is_zeros(impl: Impl) -> None:
    x = torch.zeros(2, 3, 8, device=DEVICE, requires_grad=True)
    y = mean_normalize(x, impl=impl)
    (grad,) = torch.autograd.grad(y.sum(), x)
    assert not y.any() and bool(grad.isfinite().all())


def test_text4vis_averages_raw_embeddings_of_views() -> None:
    views, classes = randn(3, 4, 16, grad=False), rows(7, 16, seed=1, grad=False)
    official = views.mean(dim=1)
    official = (100 * (official / official.norm(dim=-1, keepdim=True)) @ classes.T).softmax(dim=-1)
    values, numbers = top_classes(mean_normalize(views), classes, 7)
    assert torch.allclose(official.gather(1, numbers), values, rtol=1e-4, atol=1e-7)
    assert torch.equal(values.sort(dim=-1, descending=True).values, values)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("count", "classes", "width"),
    [(5, 37, 40), (17, 16, 33), (1, 50, 64), *on_gpu((300, 9000, 768))],
)
def test_class_cross_entropy(count: int, classes: int, width: int, dtype: torch.dtype) -> None:
    check(
        class_cross_entropy_reference,
        cross_entropy_face,
        x=rows(count, width, dtype=dtype),
        classes=rows(classes, width, dtype=dtype, seed=1),
        labels=labels(count, classes),
        scale=torch.tensor(20.0, device=DEVICE, requires_grad=True),
    )


def test_class_cross_entropy_works_through_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loss_triton, "CHUNK", 16)
    inputs = {"x": rows(4, 24), "classes": rows(41, 24, seed=1), "labels": labels(4, 41)}
    check(
        class_cross_entropy_reference,
        cross_entropy_face,
        scale=torch.tensor([50.0], device=DEVICE, requires_grad=True),
        **inputs,
    )


@pytest.mark.parametrize("wanted", ["x", "classes", "scale"])
def test_class_cross_entropy_with_frozen_parts(wanted: str) -> None:
    inputs = {
        "x": strided(rows(3, 20, grad=wanted == "x")),
        "classes": strided(rows(18, 20, seed=1, grad=wanted == "classes")),
        "labels": labels(3, 18),
        "scale": torch.tensor(100.0, device=DEVICE, requires_grad=wanted == "scale"),
    }
    check(class_cross_entropy_reference, cross_entropy_face, **inputs)


def test_class_cross_entropy_of_nothing() -> None:
    x, classes, scale = rows(0, 8), rows(5, 8, seed=1), torch.tensor(9.0, device=DEVICE)
    empty = cross_entropy_face(x, classes, labels(0, 5), scale)
    grads = torch.autograd.grad(empty.sum(), [x, classes])
    assert empty.shape == (0,) and grads[0].shape == (0, 8) and not grads[1].any()


def test_faces_agree_on_ignored_and_wrong_labels() -> None:
    found = {}
    for impl in ("reference", "triton"):
        x, classes = rows(5, 8), rows(5, 8, seed=1)
        scale = torch.tensor(9.0, device=DEVICE, requires_grad=True)
        target = torch.tensor([5, 2, IGNORED, -1, 0], device=DEVICE)
        loss = class_cross_entropy(x, classes, target, scale, impl=impl)
        assert loss.isnan().tolist() == [True, False, False, True, False]
        assert loss[2] == 0
        found[impl] = [loss.nan_to_num(), *torch.autograd.grad(loss.sum(), [x, classes, scale])]
        # Only the rows with a class have a gradient, and what they add to the others' is finite.
        assert found[impl][1].any(dim=1).tolist() == [False, True, False, False, True]
        official = F.cross_entropy(9 * x[1:3] @ classes.T, target[1:3], reduction="none")
        assert torch.allclose(loss[1:3], official, atol=1e-5)
    for triton, reference in zip(found["triton"], found["reference"], strict=True):
        assert torch.allclose(triton, reference, atol=1e-5)


def test_labels_may_be_a_column_of_a_table() -> None:
    x, classes = rows(5, 8), rows(7, 8, seed=1)
    scale = torch.tensor(9.0, device=DEVICE, requires_grad=True)
    table = torch.stack([labels(5, 7), labels(5, 7).flip(0)], dim=1)  # [N, 2]
    found = {}
    for impl in ("reference", "triton"):
        loss = class_cross_entropy(x, classes, table[:, 0], scale, impl=impl)
        found[impl] = [loss, *torch.autograd.grad(loss.sum(), [x, classes, scale])]
    for triton, reference in zip(found["triton"], found["reference"], strict=True):
        assert torch.allclose(triton, reference, atol=1e-5)


@pytest.mark.parametrize("dtype", [FP32, BF16])
@pytest.mark.parametrize(
    ("shape", "classes", "k"),
    [((5, 3, 40), 37, 5), ((17, 33), 50, 1), ((2, 2, 8), 5, 5), *on_gpu(((70, 768), 9000, 5))],
)
def test_top_classes(shape: tuple[int, ...], classes: int, k: int, dtype: torch.dtype) -> None:
    x = rows(*shape, dtype=dtype, grad=False)
    names = strided(rows(classes, shape[-1], dtype=dtype, seed=1, grad=False))
    values, numbers = top_classes(x, names, k, scale=10.0, impl="triton")
    expected, order = top_classes_reference(x, names, k, scale=10.0)
    assert torch.equal(numbers, order)
    assert torch.allclose(values, expected, rtol=1e-5, atol=1e-7)
    assert numbers.dtype == torch.int64 and values.dtype == FP32


def test_top_classes_takes_the_lower_number_of_equals() -> None:
    x = rows(1, 8, grad=False)
    names = rows(3, 8, seed=1, grad=False).repeat(7, 1)  # class i equals class i + 3
    _, numbers = top_classes(x, names, 4, scale=1.0, impl="triton")
    best = int((names[:3] @ x[0]).argmax())
    assert numbers[0].tolist() == [best, best + 3, best + 6, best + 9]
    values, numbers = top_classes(rows(0, 8, grad=False), names, 2, impl="triton")
    assert values.shape == numbers.shape == (0, 2)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(3, 4, 37), (2, 1, 64), (0, 2, 5), (1, 3, 1)])
def test_mean_softmax(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    logits = randn(*shape, dtype=dtype, scale=5.0, grad=False)
    check(mean_softmax_reference, partial(mean_softmax, impl="triton"), logits=logits)
    check(mean_softmax_reference, partial(mean_softmax, impl="triton"), logits=strided(logits))


def test_references_pass_gradcheck() -> None:
    x, classes, scale = (randn(*s, dtype=torch.float64) for s in [(3, 5), (4, 5), (1,)])
    target = labels(3, 4)
    assert torch.autograd.gradcheck(mean_normalize_reference, randn(2, 3, 4, dtype=torch.float64))
    assert torch.autograd.gradcheck(
        lambda x, classes, scale: class_cross_entropy_reference(x, classes, target, scale),
        (x, classes, scale),
    )
    assert torch.autograd.gradcheck(mean_softmax_reference, randn(2, 3, 4, dtype=torch.float64))


def test_operators_under_torch_compile() -> None:
    x, classes = randn(3, 2, 16), rows(5, 16, seed=1)
    target, scale = labels(3, 5), torch.tensor(30.0, device=DEVICE, requires_grad=True)

    def loss(x: Tensor, classes: Tensor, scale: Tensor) -> Tensor:
        return cross_entropy_face(mean_normalize_face(x), classes, target, scale).mean()

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    inputs = [x, classes, scale]
    found = torch.autograd.grad(compiled(*inputs), inputs)
    expected = torch.autograd.grad(loss(*inputs), inputs)
    assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(found, expected, strict=True))

    torch.library.opcheck(means_triton._mean_normalize.operator, (x,))
    of_loss = (rows(3, 16), classes, target, scale)
    torch.library.opcheck(loss_triton._class_cross_entropy.operator, of_loss)
    of_top = (rows(2, 2, 16, grad=False), classes.detach(), 2, 10.0)
    torch.library.opcheck(top_triton._top_classes_op.operator, of_top)
    torch.library.opcheck(means_triton._mean_softmax_op.operator, (randn(2, 3, 5, grad=False),))


def test_what_cannot_run_says_why() -> None:
    x, classes = rows(2, 8), rows(5, 8)
    with pytest.raises(UnsupportedInput, match="k is 6, expected 1 to C = 5"):
        top_classes(x, classes, 6)
    with pytest.raises(UnsupportedInput, match=r"k is 17 \(at most 16\)"):
        top_classes(x, rows(70, 8), 17, impl="triton")
    assert top_classes(x, rows(70, 8), 17)[0].shape == (2, 17)
    with pytest.raises(UnsupportedInput, match=r"expected \[N, E\] and \[C, E\]"):
        class_cross_entropy(x, rows(5, 9), labels(2, 5), torch.tensor(1.0))
    for wrong in (labels(3, 5), labels(2, 5).int(), labels(2, 5)[:, None]):
        with pytest.raises(UnsupportedInput, match=r"expected int64 \[2\]"):
            class_cross_entropy(x, classes, wrong, torch.tensor(1.0))
    with pytest.raises(UnsupportedInput, match="without views"):
        top_classes(randn(2, 0, 8), classes, 2)
    with pytest.raises(UnsupportedInput, match="differ in dtype"):
        top_classes(x, classes.to(BF16), 2, impl="triton")
    with pytest.raises(UnsupportedInput, match="logits need a gradient"):
        mean_softmax(randn(1, 2, 3), impl="triton")
    with pytest.raises(UnsupportedInput, match=r"expected \[B, T >= 1, E\]"):
        mean_normalize(randn(2, 0, 8))


def test_gradients_in_fp16_under_a_loss_scale() -> None:
    """16384 times a logit scale of 100, over 64 rows: 25600. Of a row of weight 4 it is infinite,
    but not what it becomes: embeddings of length one are small in every channel."""
    rows_of = partial(torch.nn.functional.normalize, dim=-1)
    x, classes = rows_of(randn(64, 128, grad=False)), rows_of(randn(20, 128, seed=1, grad=False))
    target, scale = labels(64, 20), torch.tensor(100.0, device=DEVICE, requires_grad=True)
    grads = {}
    impls: tuple[Impl, ...] = ("reference", "triton")
    for impl in impls:
        leaves = [t.half().requires_grad_() for t in (x, classes)]
        losses = class_cross_entropy(leaves[0], leaves[1], target, scale, impl=impl)
        loss = (losses * torch.linspace(0, 4, 64, device=DEVICE)).mean()
        grads[impl] = torch.autograd.grad(loss * 16384, [*leaves, scale])
    for found, expected in zip(grads["triton"], grads["reference"], strict=True):
        assert expected.isfinite().all() and found.isfinite().all()
        bound = 2e-3 * expected.abs().max().item()
        torch.testing.assert_close(found, expected, rtol=2e-3, atol=bound)


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # NumPy's, of what is asked for
def test_a_row_that_overflows_leaves_the_others_alone() -> None:
    x, classes = (rows(n, 16, dtype=torch.float16, seed=n) for n in (4, 9))
    upper = torch.tensor([1.0, float("inf"), 2.0, 0.0], device=DEVICE)
    loss = class_cross_entropy(x, classes, labels(4, 9), 10.0, impl="triton")
    (grad,) = torch.autograd.grad(loss, x, upper)
    plain = class_cross_entropy(x, classes, labels(4, 9), 10.0, impl="reference")
    (expected,) = torch.autograd.grad(plain, x, upper)
    others = [0, 2, 3]
    assert not grad[1].isfinite().all()
    torch.testing.assert_close(grad[others], expected[others], rtol=2e-3, atol=2e-3)
