"""The cost models around the trunk against counts made by hand, mostly at L/14-336, 32 frames."""

from __future__ import annotations

import pytest

from kineticlip_kernels import cost_methods
from kineticlip_kernels.cost import Cost

FRAMES, SIDE, WIDTH, HEADS, BF16 = 32, 24, 1024, 16, 2
PATCHES = SIDE * SIDE


@pytest.mark.parametrize(
    ("found", "gigaflops", "megabytes"),
    [
        # 21.1 G multiply-adds in both directions; q, k and the maps
        (cost_methods.neighbour_maps(1, FRAMES, PATCHES, WIDTH, BF16), 42.1, 75.5 + 41.1),
        (cost_methods.displacement(1, FRAMES, (SIDE, SIDE), WIDTH, BF16), 42.1, 41.1 + 9.0 + 37.7),
        (cost_methods.attend_tokens(1, FRAMES, PATCHES + 1, WIDTH, HEADS, BF16), 1.21, 75.6),
        (cost_methods.unfold_patches(1, 336, 14, BF16), 0, 0.339 + 0.682),
        (cost_methods.cut_crops(32, 1080, 1920, 3, 336), 0, 199.1 + 32.5),
        (cost_methods.class_cross_entropy(64, 100_000, 768, BF16), 9.83, 153.7),
        (cost_methods.mean_normalize(4, 32, 768, BF16), 0, 0.203),
        (cost_methods.frame_attention(1, 32, 12, 64, BF16), 0.00315, 0.197),
    ],
)
def test_forward_counts(found: Cost, gigaflops: float, megabytes: float) -> None:
    assert found.flops / 1e9 == pytest.approx(gigaflops, rel=5e-3)
    assert found.bytes / 1e6 == pytest.approx(megabytes, rel=5e-3)


def test_absorbing_the_projections_saves_sixty_four_times() -> None:
    projections = 4.0 * FRAMES * (PATCHES + 1) * WIDTH * WIDTH  # keys and values
    absorbed = cost_methods.attend_tokens(1, FRAMES, PATCHES + 1, WIDTH, HEADS, BF16)
    assert projections / absorbed.flops == pytest.approx(WIDTH / HEADS)
