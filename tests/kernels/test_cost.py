"""The cost models at ViT-L/14-336, a frame and a layer, against counts made by hand."""

from __future__ import annotations

import pytest

from kineticlip_kernels import cost
from kineticlip_kernels.cost import Cost

ROWS, WIDTH, HIDDEN, BF16 = 577, 1024, 4096, 2


@pytest.mark.parametrize(
    ("found", "gigaflops", "megabytes"),
    [
        (cost.linear(ROWS, WIDTH, 3 * WIDTH, BF16), 3.630, 4.73 + 6.29),  # activations + weights
        (cost.linear_quick_gelu(ROWS, WIDTH, HIDDEN, BF16), 4.840, 5.91 + 8.39),
        (cost.attention(1, ROWS, 16, 64, BF16), 1.364, 4.73),
        (cost.layer_norm(ROWS, WIDTH, BF16), 0, 2.363),
        (cost.add_layer_norm(ROWS, WIDTH, BF16), 0, 4.727),
        (cost.bias_quick_gelu(ROWS, HIDDEN, BF16), 0, 9.454),
        (cost.attention(1, ROWS, 16, 64, BF16, backward=True), 3.409, 9.454),
    ],
)
def test_forward_counts(found: Cost, gigaflops: float, megabytes: float) -> None:
    assert found.flops / 1e9 == pytest.approx(gigaflops, rel=1e-3)
    assert found.bytes / 1e6 == pytest.approx(megabytes, rel=2e-3)


def test_backward_of_a_linear_layer_is_two_products() -> None:
    forward = cost.linear_quick_gelu(ROWS, WIDTH, HIDDEN, BF16)
    assert cost.linear_quick_gelu(ROWS, WIDTH, HIDDEN, BF16, backward=True).flops == (
        2 * forward.flops
    )


def test_absorbed_projections_save_what_they_should() -> None:
    full = cost.linear(ROWS, WIDTH, 3 * WIDTH, BF16).flops
    assert cost.class_attention(1, ROWS, 16, WIDTH, BF16).flops < 0.02 * full


def test_sources_add_keys_but_no_queries() -> None:
    alone = cost.attention(4, 10, 2, 8, BF16)
    more = cost.attention(4, 10, 2, 8, BF16, sources=[(2, 5)])
    assert more.flops == pytest.approx(1.5 * alone.flops)
    assert more.bytes - alone.bytes == 2 * 2 * 5 * 2 * 8 * BF16


def test_the_slower_limit_counts() -> None:
    assert Cost(100, 10).seconds(10, 10) == 10
    assert Cost(100, 10).seconds(1000, 10) == 1
    assert Cost(1, 2) + Cost(3, 4) == Cost(4, 6)
