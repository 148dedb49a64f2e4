"""What `kineticlip bench --tune` runs: every kernel at an engine shape, and what to try there."""

from __future__ import annotations

from kineticlip_kernels.tune.attention import attention_targets
from kineticlip_kernels.tune.evl import evl_targets
from kineticlip_kernels.tune.head import head_targets
from kineticlip_kernels.tune.patches import patches_targets
from kineticlip_kernels.tune.search import Target
from kineticlip_kernels.tune.shapes import Sizes
from kineticlip_kernels.tune.trunk import trunk_targets


def targets(at: Sizes | None = None) -> tuple[Target, ...]:
    """All of them; at: other shapes than the engine's."""
    at = at or Sizes()
    return (
        *trunk_targets(at),
        *attention_targets(at),
        *head_targets(at),
        *patches_targets(at),
        *evl_targets(at),
    )
