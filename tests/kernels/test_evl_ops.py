"""EVL's ops: the lean and Triton faces against the reference."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from itertools import accumulate
from typing import Any

import pytest
import torch
from kernel_rig import BF16, DEVICE, FP16, FP32, MATRIX, check, on_gpu, randn, strided
from torch import Tensor

from kineticlip_kernels.dispatch import UnsupportedInput
from kineticlip_kernels.evl import (
    EvlImpl,
    attend_tokens,
    attend_tokens_reference,
    displacement,
    displacement_reference,
    displacement_triton,
    maps_triton,
    neighbour_maps,
    neighbour_maps_reference,
    offsets,
    tokens_triton,
)
from kineticlip_kernels.examples import examples

FACES: list[EvlImpl] = ["lean", "triton"]
FP64 = torch.float64


def maps_of(clips: int, frames: int, patches: int, dtype: torch.dtype = FP32) -> Tensor:
    """Rows that sum to one, as attention leaves them."""
    shape = (2, clips, frames - 1, patches, patches)
    return randn(*shape, seed=3, grad=False).softmax(dim=-1).to(dtype).requires_grad_()


def terms_of(
    tokens: Tensor, names: str, dtype: torch.dtype = FP32, motion: torch.dtype | None = None
) -> dict[str, Any]:
    """Any of c(onv), p(osition), m(otion): tensors, by the names that `attend_tokens` has."""
    clips, frames, count, width = tokens.shape
    terms = {}
    if "c" in names:
        terms["conv_weight"] = randn(width, 1, 3, dtype=dtype, seed=4, scale=0.5)
        terms["conv_bias"] = randn(width, dtype=dtype, seed=5)
    if "p" in names:
        terms["position"] = randn(frames, width, dtype=dtype, seed=6)
    if "m" in names:
        shape = (clips, frames, count - 1, width)
        terms["motion"] = randn(*shape, dtype=motion or dtype, seed=7)
    return terms


@pytest.mark.parametrize("dtype", [MATRIX, BF16])
@pytest.mark.parametrize("impl", FACES)
def test_neighbour_maps(impl: EvlImpl, dtype: torch.dtype) -> None:
    face = partial(neighbour_maps, impl=impl)
    shapes = [(1, 3, 20, 2, 5), (2, 2, 4, 1, 16), (1, 1, 5, 1, 4), (0, 2, 3, 1, 4)]
    for shape in shapes + on_gpu((2, 3, 197, 12, 64)):
        q, k = randn(*shape, dtype=dtype), randn(*shape, dtype=dtype, seed=1)
        check(neighbour_maps_reference, face, q=q, k=k)


@pytest.mark.parametrize("impl", FACES)
def test_neighbour_maps_of_a_packed_projection(impl: EvlImpl) -> None:
    packed = randn(
        1, 2, 5, 3, 2, 4, dtype=MATRIX, grad=False
    )  # [B, T, N, 3, H, K], what the tap sees
    q, k = packed[:, :, :, 0], packed[:, :, :, 1]
    assert not q.is_contiguous()
    check(neighbour_maps_reference, partial(neighbour_maps, impl=impl), q=q, k=k)
    gaps = strided(q)
    check(neighbour_maps_reference, partial(neighbour_maps, impl=impl), q=gaps, k=k)


@pytest.mark.parametrize(("maps_dtype", "dtype"), [(FP32, FP32), (FP16, FP16), (BF16, FP32)])
@pytest.mark.parametrize("impl", FACES)
def test_displacement(impl: EvlImpl, maps_dtype: torch.dtype, dtype: torch.dtype) -> None:
    face = partial(displacement, impl=impl)
    sizes = [(2, 3, (3, 4), 20), (1, 1, (2, 2), 4), (1, 2, (1, 3), 33)]
    for clips, frames, grid, width in sizes + on_gpu((10, 8, (14, 14), 768)):
        patches, bins = grid[0] * grid[1], (2 * grid[0] - 1) * (2 * grid[1] - 1)
        check(
            displacement_reference,
            face,
            maps=maps_of(clips, frames, patches, maps_dtype),
            previous_weight=randn(bins, width, dtype=dtype, seed=1),
            next_weight=randn(bins, width, dtype=dtype, seed=2),
            grid=grid,
        )


@pytest.mark.parametrize("impl", FACES)
@pytest.mark.parametrize("wanted", ["maps", "previous_weight"])
def test_displacement_with_frozen_parts(impl: EvlImpl, wanted: str) -> None:
    inputs = {
        "maps": maps_of(1, 2, 4),
        "previous_weight": randn(9, 8, seed=1),
        "next_weight": randn(9, 8, seed=2),
    }
    inputs = {name: value.detach().requires_grad_(name == wanted) for name, value in inputs.items()}
    check(displacement_reference, partial(displacement, impl=impl), grid=(2, 2), **inputs)


@pytest.mark.parametrize("names", ["", "c", "p", "m", "cpm"])
@pytest.mark.parametrize("impl", FACES)
def test_attend_tokens(impl: EvlImpl, names: str) -> None:
    tokens = randn(2, 3, 20, 20)
    check(
        attend_tokens_reference,
        partial(attend_tokens, impl=impl),
        query=randn(2, 3, 20, seed=1, scale=0.3),
        tokens=tokens,
        **terms_of(tokens, names),
    )


@pytest.mark.parametrize("dtype", [FP32, BF16])  # of the parameters
@pytest.mark.parametrize("impl", FACES)
def test_attend_tokens_in_bf16(impl: EvlImpl, dtype: torch.dtype) -> None:
    face = partial(attend_tokens, impl=impl)
    sizes = [((2, 2, 5, 24), 2), ((1, 1, 4, 8), 1)]
    for shape, heads in sizes + on_gpu(((2, 3, 197, 768), 12)):
        tokens = randn(*shape, dtype=BF16)
        query = randn(shape[0], heads, shape[3], dtype=dtype, seed=1, scale=0.3)
        check(
            attend_tokens_reference,
            face,
            query=query,
            tokens=tokens,
            **terms_of(tokens, "cpm", dtype, BF16),
        )


@pytest.mark.parametrize("impl", FACES)
def test_attend_tokens_of_frozen_large_and_strided_tokens(impl: EvlImpl) -> None:
    face, query = partial(attend_tokens, impl=impl), randn(1, 2, 16, seed=1, scale=0.3)
    frozen = randn(1, 2, 6, 16, grad=False)
    check(attend_tokens_reference, face, query=query, tokens=frozen, **terms_of(frozen, "cpm"))
    far = randn(1, 2, 6, 16, mean=100.0, grad=False)  # the mean must not cancel the variance
    check(attend_tokens_reference, face, query=query, tokens=far)
    gaps = strided(randn(1, 2, 6, 16))
    check(attend_tokens_reference, face, query=query, tokens=gaps, **terms_of(gaps, "c"))
    nothing = randn(0, 2, 6, 16)
    check(attend_tokens_reference, face, query=randn(0, 2, 16), tokens=nothing)


def test_lean_and_reference_pass_gradcheck() -> None:
    q, k = (randn(1, 2, 5, 2, 3, dtype=FP64, seed=seed) for seed in (0, 1))
    pair = [randn(9, 3, dtype=FP64, seed=seed) for seed in (0, 1)]
    tokens = randn(1, 3, 5, 4, dtype=FP64)
    terms = terms_of(tokens, "cpm", FP64)
    for impl in ("lean", "reference"):
        assert torch.autograd.gradcheck(partial(neighbour_maps, impl=impl), (q, k))
        face = partial(displacement, grid=(2, 2), impl=impl)
        assert torch.autograd.gradcheck(face, (maps_of(1, 2, 4, FP64), *pair))

        def attend(query: Tensor, tokens: Tensor, *values: Tensor, impl: EvlImpl = impl) -> Tensor:
            given: dict[str, Any] = dict(zip(terms, values, strict=True))
            return attend_tokens(query, tokens, **given, impl=impl)

        query = randn(1, 2, 4, dtype=FP64, seed=1)
        assert torch.autograd.gradcheck(attend, (query, tokens, *terms.values()))


@pytest.mark.parametrize("dtype", [FP32, BF16])
@pytest.mark.parametrize("name", ["neighbour_maps", "displacement", "attend_tokens"])
def test_autocast_does_not_change_the_lean_faces(name: str, dtype: torch.dtype) -> None:
    example = examples(torch.device(DEVICE), dtype)[name]
    inputs = {
        key: value.requires_grad_() if isinstance(value, Tensor) else value
        for key, value in example.inputs.items()
    }
    wanted = [value for value in inputs.values() if isinstance(value, Tensor)]

    def run(op: Callable[..., Tensor], autocast: bool) -> tuple[Tensor, ...]:
        with torch.autocast(DEVICE, BF16, enabled=autocast):
            out = op(**inputs, impl="lean")
            return (out, *torch.autograd.grad(out.square().sum(), wanted))

    expected, found = run(example.op, False), run(example.op, True)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    assert {value.dtype for value in found} == {dtype}
    if (name, dtype) == ("displacement", FP32):  # the quickest to compile; all share the wrapper
        compiled = torch.compile(example.op, fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(run(compiled, True), expected)


def test_offsets_are_the_displacement_of_the_patch() -> None:
    table = offsets((3, 4), torch.device("cpu"))
    assert table.shape == (12, 12) and int(table.max()) < 5 * 7
    for p, r in [(0, 0), (11, 0), (5, 6)]:
        dy, dx = p // 4 - r // 4, p % 4 - r % 4
        assert int(table[p, r]) == (dy + 2) * 7 + dx + 3


def peak_bytes(impl: EvlImpl) -> int:
    """One decoder layer at ViT-B/16 and 8 frames, forward and backward: the most memory at once."""
    tokens, query = torch.randn(1, 8, 197, 768), torch.randn(1, 12, 768) * 0.1
    q, k = torch.randn(2, 1, 8, 197, 12, 64)
    weights = [torch.randn(27 * 27, 768, requires_grad=True) for _ in range(2)]
    terms = {name: term.cpu() for name, term in terms_of(tokens, "cp").items()}
    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(
        activities=activities, profile_memory=True, acc_events=True
    ) as profile:
        motion = displacement(neighbour_maps(q, k, impl=impl), *weights, grid=(14, 14), impl=impl)
        attend_tokens(query, tokens, motion=motion, **terms, impl=impl).sum().backward()
    events = profile.profiler.kineto_results.events()
    changes = [event for event in events if event.name() == "[memory]"]
    changes.sort(key=lambda event: event.start_ns())
    return max(accumulate(event.nbytes() for event in changes))


def test_lean_needs_a_third_of_the_references_memory() -> None:
    lean, reference = peak_bytes("lean"), peak_bytes("reference")
    assert 5_000_000 < lean <= reference / 3


def test_operators_under_torch_compile() -> None:
    q, k = (randn(1, 2, 5, 1, 8, dtype=MATRIX, seed=seed) for seed in (0, 1))
    pair = [randn(9, 8, seed=seed) for seed in (2, 3)]
    tokens, query = randn(1, 2, 5, 8), randn(1, 2, 8, seed=1)
    terms = terms_of(tokens, "cp")

    def layer(q: Tensor, k: Tensor, tokens: Tensor, query: Tensor) -> Tensor:
        maps = neighbour_maps(q, k, impl="triton")
        motion = displacement(maps, *pair, grid=(2, 2), impl="triton")
        return attend_tokens(query, tokens, motion=motion, **terms, impl="triton")

    inputs = [q, k, tokens, query]
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    found = torch.autograd.grad(compiled(*inputs).sum(), inputs)
    expected = torch.autograd.grad(layer(*inputs).sum(), inputs)
    assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(found, expected, strict=True))

    checks = ("test_schema", "test_faketensor", "test_autograd_registration")
    opcheck = partial(torch.library.opcheck, test_utils=checks)
    opcheck(maps_triton._neighbour_maps.operator, (q, k))
    opcheck(displacement_triton._displacement.operator, (maps_of(1, 2, 4), *pair, 2, 2))
    arguments = (query, tokens, *terms.values(), None, 1e-5)
    opcheck(tokens_triton._attend_tokens.operator, arguments)


def test_what_cannot_run_says_why() -> None:
    tokens, query = randn(1, 2, 5, 8), randn(1, 2, 8)
    with pytest.raises(UnsupportedInput, match=r"conv_weight and conv_bias come together"):
        attend_tokens(query, tokens, conv_bias=randn(8))
    with pytest.raises(
        UnsupportedInput, match=r"motion is \(1, 2, 5, 8\), expected \(1, 2, 4, 8\)"
    ):
        attend_tokens(query, tokens, motion=tokens)
    with pytest.raises(UnsupportedInput, match="query is"):
        attend_tokens(randn(2, 2, 8), tokens)
    with pytest.raises(UnsupportedInput, match=r"previous_weight is \(8, 3\)"):
        displacement(maps_of(1, 2, 4), randn(8, 3), randn(9, 3), grid=(2, 2))
    with pytest.raises(UnsupportedInput, match=r"for a grid of 2 x 3"):
        displacement(maps_of(1, 2, 4), randn(15, 3), randn(15, 3), grid=(2, 3))
    with pytest.raises(UnsupportedInput, match="q is"):
        neighbour_maps(randn(1, 2, 5, 1, 8), randn(1, 2, 4, 1, 8))
    with pytest.raises(UnsupportedInput, match="tokens is fp64"):
        attend_tokens(query, tokens.double(), impl="triton")


def test_lean_terms_in_16_bits_are_added_in_32() -> None:
    query, tokens = randn(1, 2, 32, grad=False), randn(1, 3, 5, 32, grad=False).to(BF16)
    terms = {n: term.detach().to(BF16) for n, term in terms_of(tokens, "cp").items()}
    exact = {name: term.double() for name, term in terms.items()}
    truth = attend_tokens_reference(query.double(), tokens.double(), **exact)
    found = attend_tokens(query, tokens, **terms, impl="lean")
    torch.testing.assert_close(found.double(), truth, rtol=1e-5, atol=1e-5)


def test_displacement_of_more_bits_than_its_weights() -> None:
    maps, pair = maps_of(1, 2, 4).double(), [randn(9, 3, seed=seed) for seed in (0, 1)]
    found = displacement(maps, *pair, grid=(2, 2), impl="lean")
    expected = displacement(maps, *pair, grid=(2, 2), impl="reference")
    assert found.dtype == expected.dtype == torch.float32
    torch.testing.assert_close(found, expected)
